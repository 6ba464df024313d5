"""The commands on datasets: `show`, `prepare` and `embed`."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ..benchmark.errors import UserError
from .terminal import err, interruptible, load_plugins, pair, say

if TYPE_CHECKING:
    from ..benchmark.store import Store


def show(
    name: Annotated[str, typer.Argument(help="A dataset, method, source, backbone, budget or suite.")],
    images: Annotated[
        bool, typer.Option("--images", help="Of a dataset: write a contact sheet, one row of pictures per group.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="The contact sheet, a PNG file. Default: ./NAME.png.")] = None,
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder that holds the dataset.")] = None,
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="data.size or data.transform.")] = [],  # noqa: B006
    plugin: Annotated[list[Path], typer.Option(metavar="FILE", help="A Python file that registers entries.")] = [],  # noqa: B006
) -> None:
    """Show the card of one entry, or pictures of a dataset."""
    from . import listing

    load_plugins(plugin)
    if not images:
        if output or root or set_:
            raise UserError("--output, --root and --set go with --images")
        say(listing.card(name))
        return
    from ..analysis.contact_sheet import contact_sheet

    store = _prepare(name, root, set_)
    path = output or Path(f"{store.card.name.translate(str.maketrans('/:[],', '-----')).strip('-')}.png")
    contact_sheet(store, path)
    say(f"wrote {path}")


def _prepare(name: str, root: Path | None, settings: list[str], **options: bool) -> "Store":
    """A dataset's store, with a progress bar while it is built."""
    from ..benchmark import prepare
    from .console import BuildReporter

    with interruptible(), BuildReporter(err) as report:
        return prepare.prepare(name, root, settings=_data_settings(settings), report=report, **options)


def _data_settings(settings: list[str]) -> dict[str, str]:
    pairs = dict(pair(text) for text in settings)
    foreign = [key for key in pairs if not key.startswith("data.")]
    if foreign:
        raise UserError(f"--set {foreign[0]}: only data.size and data.transform belong here")
    return {key.removeprefix("data."): value for key, value in pairs.items()}


def prepare(
    dataset: Annotated[str, typer.Argument(help="DATASET[:VARIANT].")],
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that holds the files (of embeddings: their file).")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch missing files, where the licence allows that.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse files with other than the official counts.")] = False,
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="data.size or data.transform.")] = [],  # noqa: B006
    plugin: Annotated[list[Path], typer.Option(metavar="FILE", help="A Python file that registers the dataset.")] = [],  # noqa: B006
) -> None:
    """Find, fetch or explain a dataset's files, verify them and build its store of decoded pictures."""
    from . import listing

    load_plugins(plugin)
    store = _prepare(dataset, root, set_, download=download, strict=strict)
    say(listing.prepared(store))


def embed(
    dataset: Annotated[str, typer.Option(help="DATASET[:VARIANT] of pictures.")],
    backbone: Annotated[str, typer.Option(help="The frozen backbone.")],
    output: Annotated[Path, typer.Option(help="The .npz to write.")],
    weights: Annotated[
        str, typer.Option(help="none, imagenet1k_v1, imagenet1k_v2, or a file. Default: the dataset's own.")
    ] = "",
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder that holds the dataset.")] = None,
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="data.size or data.transform.")] = [],  # noqa: B006
    plugin: Annotated[list[Path], typer.Option(metavar="FILE", help="A Python file that registers entries.")] = [],  # noqa: B006
) -> None:
    """Write a frozen backbone's features of a dataset as embeddings, to train on with --dataset embeddings."""
    from ..benchmark.embed import export
    from .console import BuildReporter

    load_plugins(plugin)
    with interruptible(), BuildReporter(err) as report:
        export(dataset, root, backbone, weights, output, _data_settings(set_), report)
    command = f"worstgroup run --dataset embeddings --root {quote(str(output))} --method erm,dfr"
    say(f"wrote {output}\nnext:\n  {command}")
