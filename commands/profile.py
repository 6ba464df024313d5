"""The command `profile`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..benchmark import machine
from ..benchmark.errors import UnknownName, UserError
from .run import Backbone, Budget, Plugins, Root, Settings, Threads
from .terminal import err, load_plugins, out, pair, print_tables, say

if TYPE_CHECKING:
    from ..benchmark.profiled import Profile
    from ..benchmark.profiling import Ask, Effort


class Format(StrEnum):
    """What `profile` writes."""

    table = "table"
    md = "md"
    csv = "csv"
    json = "json"


def profile(
    method: Annotated[str, typer.Option(help=r"HOST[+SOURCE]\[@POLICY], several separated by commas.")] = "",
    dataset: Annotated[str, typer.Option(help="DATASET[:VARIANT]. Default: digits2, or with --size generated.")] = "",
    backbone: Backbone = "",
    size: Annotated[
        int | None, typer.Option(metavar="PX", help="Generated images of this size, or the dataset's resized to it.")
    ] = None,
    budget: Budget = "",
    batch: Annotated[int | None, typer.Option(metavar="N", help="Images of a batch. Default: the dataset's.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Steps timed together. Default: 50, on a CPU what ERM does in a second."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="How often ERM and the method take turns. Default: 5, on a CPU 7.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(metavar="N", help="Steps before anything is timed. Default: 20, on a CPU 3.")
    ] = None,
    set_: Settings = [],  # noqa: B006
    stages: Annotated[
        bool, typer.Option("--stages", help="Whole runs too, stage by stage (methods of several stages always).")
    ] = False,
    suite: Annotated[str, typer.Option(help="methods: all of them; gpu: what the project measures itself on.")] = "",
    root: Root = None,
    plugin: Plugins = [],  # noqa: B006
    threads: Threads = 0,
    format_: Annotated[Format, typer.Option("--format", help="table, md, csv or json.")] = Format.table,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="File to write, or a folder: in it the name says device, precision, network and date."
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a trace of a few steps, for Perfetto.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the result.")] = False,
) -> None:
    """Measure what methods cost beside ERM: training steps in turns with ERM's, and whole pipelines by stage."""
    from ..benchmark import profiling
    from .console import BuildReporter

    load_plugins(plugin)
    _check_places(format_, output, trace)
    base = _suite(suite) if suite else profiling.Ask(())
    ask = replace(
        base,
        methods=tuple(dict.fromkeys(name for name in method.split(",") if name)) or base.methods,
        dataset=dataset,
        backbone=backbone or base.backbone,
        size=base.size if size is None else size,
        budget=budget,
        batch=base.batch if batch is None else batch,
        settings={**base.settings, **dict(pair(text) for text in set_)},
        stages=stages or base.stages,
        trace=trace,
        root=root,
    )
    with _threads(threads), BuildReporter(err, quiet) as report:
        made = profiling.measure(ask, _effort(warmup, steps, rounds), report)
    _show(made, format_, output)


def _check_places(format_: Format, output: Path | None, trace: Path | None) -> None:
    """Raise `UserError` for places that nothing can be written to, before any work."""
    if output and format_ is Format.table:
        raise UserError(f"--output {output}: say in which --format, e.g. --format csv")
    for option, file in (("--output", output), ("--trace", trace)):
        if file and not file.absolute().parent.is_dir():
            raise UserError(f"{option} {file}: there is no folder {file.parent}")
    if trace and trace.is_dir():
        raise UserError(f"--trace {trace}: it is a folder; name a file, e.g. {trace / 'trace.json'}")


def _suite(name: str) -> "Ask":
    """A suite's measurements; raises `UserError` without the GPU that it is for."""
    from ..benchmark.device import pick_device
    from ..benchmark.profiling import SUITES, everything

    if name not in SUITES:
        raise UnknownName("profile suite", name, SUITES)
    if not SUITES[name].methods:
        return replace(SUITES[name], methods=everything())
    if pick_device().type != "cuda":
        raise UserError(
            f"--suite {name} needs a CUDA GPU, and torch sees none; on a CPU measure single methods instead, "
            "e.g. `worstgroup profile --method groupdro,ex2l --backbone resnet18 --size 64`"
        )
    return SUITES[name]


def _effort(warmup: int | None, steps: int | None, rounds: int | None) -> "Effort":
    """The device's defaults with what the command line says."""
    from ..benchmark.device import pick_device
    from ..benchmark.profiling import EFFORTS

    said = {"warmup": warmup, "steps": steps, "rounds": rounds}
    return replace(EFFORTS[pick_device().type], **{name: value for name, value in said.items() if value is not None})


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """As many threads as a run gets by default, or so many."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(machine.workers(torch.cuda.device_count(), threads=number)["threads"])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _show(made: "Profile", format_: Format, output: Path | None) -> None:
    from ..benchmark.home import write_bytes
    from . import profile_report

    if format_ is Format.table:
        print_tables(profile_report.to_terminal(made))
        for text in (profile_report.caption(made), profile_report.legend(made)):
            out.print(text, style="dim", markup=False, highlight=False)
        return
    write = {"md": profile_report.to_markdown, "csv": profile_report.to_csv, "json": profile_report.to_json}
    text = write[format_.value](made)
    if output is None:
        sys.stdout.write(text)
        return
    file = profile_report.place(output, made, format_.value)
    write_bytes(file, text.encode())
    say(f"wrote {file}", err)
