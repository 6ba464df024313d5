"""The command line: parses, calls, prints.

Heavy modules are imported inside the commands that need them, so that `--help` does not wait for torch.
"""

import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import data_commands
from .benchmark.errors import UserError
from .benchmark.machine import cores
from .terminal import err, interruptible, load_plugins, out, pair

if TYPE_CHECKING:
    from .benchmark.planning import Plan, Request
    from .leaderboard.aggregate import Table
    from .scaffold import Written

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One protocol, one engine and honest budgets for methods that resist spurious correlations.",
)


class Kind(StrEnum):
    """What `ls` lists."""

    datasets = "datasets"
    methods = "methods"
    sources = "sources"
    backbones = "backbones"
    budgets = "budgets"
    suites = "suites"
    runs = "runs"


class Format(StrEnum):
    """How `board` prints."""

    table = "table"
    md = "md"
    csv = "csv"


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except UserError as error:
        for line in str(error).splitlines():
            err.print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="A suite's name, or the path of a .toml file.")] = "",
    dataset: Annotated[str, typer.Option(help="DATASET[:VARIANT], instead of a suite.")] = "",
    method: Annotated[str, typer.Option(help=r"HOST[+SOURCE]\[@POLICY], several separated by commas.")] = "",
    backbone: Annotated[str, typer.Option(help="Default: the dataset's own.")] = "",
    weights: Annotated[
        str, typer.Option(help="none, imagenet1k_v1, imagenet1k_v2, or a file. Default: the dataset's own.")
    ] = "",
    budget: Annotated[str, typer.Option(help="RUNG[:ATTRIBUTE,...]. Default: each method's native rung.")] = "",
    extra: Annotated[
        str, typer.Option(help="val: train on the granted validation images too (shown as METHOD(+val)).")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Comma-separated. Default: 0,1,2, or the suite's.")] = "",
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="METHOD.KEY=VALUE, recipe.KEY=VALUE, data.size or data.transform."
        ),
    ] = [],  # noqa: B006
    root: Annotated[
        Path | None, typer.Option(help="Folder that holds the dataset (of embeddings: their file).")
    ] = None,
    plugin: Annotated[
        list[Path], typer.Option(help="A Python file that registers methods, datasets or backbones.")
    ] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(min=0, help="Worker processes. 0: 1 on a GPU, else one per core up to 4.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a run. 0: cores over default workers.")] = 0,
    shard: Annotated[str, typer.Option(help="i/n: only this part of the runs.")] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse dataset files with other than the official counts.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Prepare the datasets, say what would run, and stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the final table.")] = False,
) -> None:
    """Run what is missing of a suite, or of one dataset and some methods, and print its leaderboard."""
    from .benchmark import executors
    from .benchmark.planning import plan
    from .console import BuildReporter, RunReporter

    load_plugins(plugin)
    requests = _requests(suite, dataset, method, backbone, weights, budget, extra, seeds, set_)
    with interruptible(), BuildReporter(err, quiet) as build:
        made = plan(requests, root, strict=strict, report=build)
    if shard:
        made = executors.shard(made, shard)
    if dry_run:
        _print_plan(made)
        return
    with interruptible(), RunReporter(err, quiet) as reporter:
        workers = jobs or _default_jobs()
        threads = threads or cores() // _default_jobs()
        records = executors.run_plan(made, reporter, jobs=workers, threads=threads, plugins=plugin)
    _print_board(made)
    failed = sum(record.status == "failed" for record in records)
    if failed:
        err.print(f"{failed} of {len(records)} runs failed; the same command tries them again.", style="red")
        raise typer.Exit(1)


def _requests(
    suite: str,
    dataset: str,
    method: str,
    backbone: str,
    weights: str,
    budget: str,
    extra: str,
    seeds: str,
    settings: list[str],
) -> "list[Request]":
    from dataclasses import replace

    from .benchmark.planning import DEFAULT_SEEDS, Request, read_suite

    if bool(suite) == bool(dataset or method):
        raise UserError("name a suite (`worstgroup run mini`), or --dataset and --method; see `worstgroup ls suites`")
    changes = dict(pair(text) for text in settings)
    chosen = _numbers(seeds) if seeds else None
    if suite:
        if backbone or budget or extra or weights:
            raise UserError(
                "--backbone, --weights, --budget and --extra go with --dataset and --method; a suite names its own"
            )
        requests = [
            replace(request, settings={**request.settings, **changes}) for request in read_suite(suite).requests()
        ]
        return [replace(request, seeds=chosen) for request in requests] if chosen else requests
    if not (dataset and method):
        raise UserError(f"{'--method' if dataset else '--dataset'} is missing: name both --dataset and --method")
    names = [name for name in method.split(",") if name]
    seeds_ = chosen or DEFAULT_SEEDS
    return [Request(dataset, name, budget, backbone, weights, seeds_, changes, extra) for name in names]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UserError(f"--seeds {text}: write whole numbers separated by commas, e.g. 0,1,2") from error


def _default_jobs() -> int:
    """One run at a time on a GPU; on a CPU a few small processes beat one with all threads."""
    import torch

    return 1 if torch.cuda.is_available() else min(4, cores())


def _print_plan(plan: "Plan") -> None:
    from .benchmark.runner import finished

    for planned in plan.runs:
        if planned.spec is None:
            state = f"n/a ({planned.reason})"
        else:
            state = "finished" if finished(planned.spec) else "to run"
        out.print(f"{planned.label}: {state}", markup=False, highlight=False, soft_wrap=True)


def _print_board(plan: "Plan") -> None:
    from .benchmark.home import runs_home
    from .benchmark.record import record_path
    from .leaderboard import aggregate

    paths = [record_path(runs_home(), planned.spec) for planned in plan.runs if planned.spec is not None]
    found = aggregate.collect(path for path in paths if path.exists())
    _print_leaderboard(aggregate.build(found, (planned.absent for planned in plan.runs if planned.absent)))
    for planned in plan.runs if not found else ():
        if planned.absent:
            out.print(f"n/a: {planned.label}: {planned.reason}", markup=False, highlight=False, soft_wrap=True)


def _print_leaderboard(tables: "list[Table]") -> None:
    from .leaderboard import render

    _print_tables(render.to_terminal(tables, out.width))
    if tables:
        out.print(render.LEGEND, style="dim", markup=False, highlight=False)


def _print_tables(tables: list[Any]) -> None:
    for table in tables:
        out.print(table)


@app.command("ls")
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    stale: Annotated[bool, typer.Option("--stale", help="Only runs whose method's code has changed since.")] = False,
    plugin: Annotated[list[Path], typer.Option(help="A Python file that registers entries.")] = [],  # noqa: B006
) -> None:
    """List what there is."""
    from . import listing

    load_plugins(plugin)
    _print_tables([listing.table(kind.value, stale=stale)])


app.command()(data_commands.show)
app.command()(data_commands.prepare)
app.command()(data_commands.embed)


@app.command()
def board(
    path: Annotated[
        Path | None, typer.Argument(help="Folder of records. Default: the runs in $WORSTGROUP_HOME.")
    ] = None,
    format_: Annotated[Format, typer.Option("--format", help="table, md or csv.")] = Format.table,
) -> None:
    """Print the leaderboard of all finished runs."""
    from .benchmark import record
    from .benchmark.home import runs_home
    from .leaderboard import aggregate, render

    folder = path or runs_home()
    if path is not None and not path.is_dir():
        raise UserError(f"{path}: there is no such folder")
    tables = aggregate.build(aggregate.collect(record.find(folder)))
    if format_ is Format.table:
        _print_leaderboard(tables)
        if not tables:
            out.print(f"No finished run in {folder}. Start with `worstgroup run mini`.", soft_wrap=True)
    else:
        text = render.to_markdown(tables) if format_ is Format.md else render.to_csv(tables)
        sys.stdout.write(text)


@app.command()
def verify(
    path: Annotated[Path | None, typer.Argument(help="A record, or a folder of them. Default: all runs.")] = None,
) -> None:
    """Recompute every metric from the stored predictions; exit code 1 on any difference."""
    from .benchmark.home import runs_home
    from .leaderboard.verify import LEVELS, orphans, verify_all

    target = path or runs_home()
    verdicts = verify_all(target) if path or target.exists() else []
    stray = orphans(target) if target.is_dir() else []
    for verdict in verdicts:
        for problem in verdict.problems:
            err.print(f"{verdict.path.name}: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    for file in stray:
        err.print(f"{file}: predictions without a record", style="red", markup=False, highlight=False, soft_wrap=True)
    for level, meaning in LEVELS.items():
        count = sum(verdict.ok and verdict.level == level for verdict in verdicts)
        if count:
            out.print(f"{count} verified, level {level}: {meaning}", highlight=False, soft_wrap=True)
    bad = sum(not verdict.ok for verdict in verdicts) + len(stray)
    out.print(f"{len(verdicts)} records, {bad} with differences", highlight=False)
    if bad:
        raise typer.Exit(1)


@app.command()
def check(
    method: Annotated[str, typer.Argument(help=r"HOST[+SOURCE]\[@POLICY].")],
    plugin: Annotated[list[Path], typer.Option(help="A Python file that registers the method.")] = [],  # noqa: B006
) -> None:
    """Check that a method keeps the contract, in a temporary home; exit code 1 when a check fails."""
    from . import contract

    load_plugins(plugin)
    failed = False
    for verdict in contract.verdicts(method):
        bad = verdict.state == "failed"
        state, message = "FAILED" if bad else verdict.state, " ".join(verdict.message.split())
        line = f"{state:<6}  {verdict.check:<13} {verdict.seconds:5.1f} s  {message}".rstrip()
        out.print(line, style="red" if bad else None, markup=False, highlight=False, soft_wrap=True)
        failed |= bad
    if failed:
        raise typer.Exit(1)


@app.command("new-method")
def new_method(name: Annotated[str, typer.Argument(help="Lowercase letters, digits, - and _.")]) -> None:
    """Write a working method to start from: into methods/ in a checkout, else into this folder."""
    from . import scaffold

    _print_written(scaffold.new_method(name, Path.cwd()))


@app.command("new-dataset")
def new_dataset(name: Annotated[str, typer.Argument(help="Lowercase letters, digits, - and _.")]) -> None:
    """Write a working reader of your pictures to start from: into datasets/ in a checkout, else into this folder."""
    from . import scaffold

    _print_written(scaffold.new_dataset(name, Path.cwd()))


def _print_written(written: "Written") -> None:
    for line in (f"wrote {written.path}", "next:", *(f"  {command}" for command in written.commands)):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def cache(
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete shared artifacts and leftovers; never runs or data.")
    ] = False,
) -> None:
    """Show what lies in $WORSTGROUP_HOME."""
    from .benchmark.cache import contents, prune_artifacts
    from .benchmark.home import home

    if prune:
        out.print(f"freed {prune_artifacts() / 2**20:.1f} MiB", highlight=False)
    out.print(f"{home()}", highlight=False, soft_wrap=True)
    for name, count, size in contents():
        out.print(f"  {name:<22} {count:>6} files  {size / 2**20:>10.1f} MiB", highlight=False)


if __name__ == "__main__":
    main()
