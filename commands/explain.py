"""The command that looks into a finished run's model."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..benchmark.errors import UserError, printable
from .terminal import err, interruptible, load_plugins, out, say

if TYPE_CHECKING:
    from ..analysis.look import Look
    from ..benchmark.store import Store


class Explainer(StrEnum):
    """How a map is made."""

    gradcam = "gradcam"
    gradcam_pp = "gradcam++"
    xgradcam = "xgradcam"
    layercam = "layercam"
    hirescam = "hirescam"
    ablationcam = "ablationcam"
    lrp = "lrp"
    lrp_zennit = "lrp-zennit"
    ig = "ig"


class Part(StrEnum):
    """Images that are shown."""

    train = "train"
    val = "val"
    test = "test"


def explain(
    run: Annotated[str, typer.Argument(help="A record's path, or the first letters of a run's hash.")],
    features: Annotated[
        bool,
        typer.Option(
            "--features", help="A projection of the features; how far they tell classes and attributes apart."
        ),
    ] = False,
    attribution: Annotated[
        bool,
        typer.Option(
            "--attribution",
            help="How much of the map lies on the object, by group; needs a variant :mask of the dataset.",
        ),
    ] = False,
    clusters: Annotated[
        bool, typer.Option("--clusters", help="What the groups that the run's source found show, and whom they hold.")
    ] = False,
    critical: Annotated[
        bool, typer.Option("--critical", help="ROC of the cluster classifier's loss and entropy (ClusterFix).")
    ] = False,
    explainer: Annotated[Explainer, typer.Option(help="How the maps of the gallery are made.")] = Explainer.gradcam,
    split: Annotated[Part, typer.Option(help="Whose images gallery and features show.")] = Part.test,
    columns: Annotated[int, typer.Option(min=1, max=24, help="Pictures of each group.")] = 4,
    out_: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for pictures and tables. Default: ./explain-RUN."),
    ] = None,
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder that holds the dataset.")] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The initial weights, where the run began with a file.")
    ] = None,
    plugin: Annotated[
        list[Path], typer.Option("--plugin", metavar="FILE", help="A Python file that registers entries.")
    ] = [],  # noqa: B006
) -> None:
    """Fit a finished run again and show what it looks at, beside the block's ERM: pictures and tables in a folder."""
    from ..analysis import look as looking
    from .console import BuildReporter

    load_plugins(plugin)
    path = looking.find_record(run)
    with interruptible(), BuildReporter(err) as report:
        seen = looking.look(path, root, weights, progress=report, report=report)
        if seen.other:
            n = len(seen.split("test"))
            text = f"fitted again it predicts {seen.other} of {n:,} test images otherwise than the record says"
            err.print(f"{text}: another machine, or other threads?", style="yellow", markup=False, soft_wrap=True)
        folder = out_ or Path(f"explain-{seen.record.label}-{seen.record.run[:8]}".replace("/", "_"))
        folder.mkdir(parents=True, exist_ok=True)
        if clusters:
            _clusters(seen, path, folder, explainer, columns)
        if features:
            _features(seen, folder, split)
        if attribution:
            from ..analysis import attribution as attributing

            silhouettes = _silhouettes(seen, root)
            _write(folder / "attribution", attributing.report(seen, silhouettes))
        if critical:
            from ..analysis import critical as sorting

            _write(folder / "critical", sorting.report(seen, folder / "critical.png"), folder / "critical.png")
        if not (clusters or features or attribution or critical):
            from ..analysis.gallery import gallery

            picture = folder / f"gallery-{explainer.value}.png"
            gallery(seen, picture, explainer.value, split.value, columns)
            say(f"wrote {picture}")


def _features(seen: "Look", folder: Path, split: Part) -> None:
    from ..analysis import separability

    picture = folder / f"features-{split.value}.png"
    _write(folder / f"features-{split.value}", separability.report(seen, split.value, picture), picture)


def _clusters(seen: "Look", path: Path, folder: Path, explainer: Explainer, columns: int) -> None:
    from ..analysis import clusters

    picture = folder / f"clusters-{explainer.value}.png"
    _write(folder / "clusters", clusters.report(seen, path, picture, explainer.value, columns), picture)


def _silhouettes(seen: "Look", root: Path | None) -> "Store":
    from ..analysis.look import reopen

    try:
        return reopen(seen.record, root, lambda what, done, total: None, variant="mask")
    except UserError as error:
        raise UserError(f"--attribution needs to know where the objects are: {error}") from error


def _write(path: Path, lines: list[dict[str, object]], *pictures: Path) -> None:
    """A table as Markdown on the screen and as CSV on disk."""
    from tabulate import tabulate

    from ..benchmark.home import write_bytes
    from ..leaderboard.render import write_csv

    headings = list(dict.fromkeys(key for line in lines for key in line))
    file = path.with_suffix(".csv")
    write_bytes(file, write_csv(headings, lines).encode())
    shown = [[_cell(line.get(key)) for key in headings] for line in lines]
    out.print(tabulate(shown, headings, tablefmt="github", disable_numparse=True), markup=False, highlight=False)
    for written in (file, *pictures):
        say(f"wrote {written}")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "n/a" if value is None else printable(str(value))
