"""The command `board`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..benchmark.errors import UserError
from .run import Splits
from .terminal import out, print_leaderboard, print_problems

if TYPE_CHECKING:
    from ..leaderboard.table import Table


class Format(StrEnum):
    """What `board` writes."""

    table = "table"
    md = "md"
    csv = "csv"
    latex = "latex"
    json = "json"
    html = "html"


def board(
    path: Annotated[
        Path | None, typer.Argument(help="Folder of records. Default: the runs in $WORSTGROUP_HOME.")
    ] = None,
    format_: Annotated[
        Format,
        typer.Option("--format", help="table, md, csv, latex (booktabs), json, or html: one page that works offline."),
    ] = Format.table,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write it there instead of printing it.")
    ] = None,
    splits: Splits = False,
    reproduction: Annotated[
        bool, typer.Option("--reproduction", help="The papers' numbers beside ours instead; as md or csv.")
    ] = False,
    costs: Annotated[
        Path | None,
        typer.Option(help="What methods cost beside what they gain instead, from this file or folder of `profile`."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="In a checkout: fail if its committed tables are not those of its results.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="In a checkout: make its committed tables anew from its results.")
    ] = False,
) -> None:
    """Print the leaderboard of all finished runs.

    Records that are damaged or whose numbers do not follow from each other are named and left out.
    """
    from ..benchmark import record
    from ..benchmark.home import runs_home
    from ..leaderboard import aggregate

    if check or update:
        if (check and update) or path or output or reproduction or costs:
            raise UserError("--check and --update stand alone: they are about the committed tables of a checkout")
        _committed(check)
        return
    folder = path or runs_home()
    if path is not None and not path.is_dir():
        raise UserError(f"{path}: there is no such folder")
    if output and format_ is Format.table and not (reproduction or costs):
        raise UserError(f"--output {output}: say in which --format, e.g. --format md")
    tables, problems = aggregate.board(record.find(folder))
    print_problems(problems)
    if reproduction:
        _write(_beside_papers(format_, tables), output)
        return
    if costs:
        _write(_beside_costs(costs, format_, tables), output)
        return
    if format_ is Format.table:
        print_leaderboard(tables, splits)
        if not tables:
            out.print(f"No finished run in {folder}. Start with `worstgroup run mini`.", markup=False, soft_wrap=True)
        return
    _write(_text(format_, tables, splits), output)


def _committed(check: bool) -> None:
    """Compare the tables of the checkout with its results, or make them anew."""
    from ..authoring import scaffold
    from ..leaderboard import committed

    if not scaffold.in_checkout(Path.cwd(), scaffold.PACKAGE):
        raise UserError("--check and --update are about the tables of a checkout of worstgroup; go there first")
    changed = (committed.differing if check else committed.update)(scaffold.PACKAGE)
    for file in changed:
        state = "differs from" if check else "made anew from"
        out.print(f"{file}: {state} {committed.RESULTS}", markup=False, soft_wrap=True)
    if not changed:
        out.print(f"the tables are those of {committed.RESULTS}", markup=False, highlight=False)
    if check and changed:
        out.print("`worstgroup board --update` makes them anew", highlight=False)
        raise typer.Exit(1)


def _beside_papers(format_: Format, tables: "list[Table]") -> str:
    from ..leaderboard import reproduction

    return reproduction.render(tables, "md" if format_ is Format.table else format_.value)


def _beside_costs(path: Path, format_: Format, tables: "list[Table]") -> str:
    from ..leaderboard import costs

    text = "md" if format_ is Format.table else format_.value
    if text not in ("md", "csv"):
        raise UserError(f"--format {text}: --costs is written as md or csv")
    return costs.render(costs.find(path), tables, text)


def _text(format_: Format, tables: "list[Table]", splits: bool) -> str:
    from ..leaderboard import page, render

    made = {
        Format.md: lambda: render.to_markdown(tables, splits),
        Format.csv: lambda: render.to_csv(tables),
        Format.latex: lambda: render.to_latex(tables, splits),
        Format.json: lambda: render.to_json(tables),
        Format.html: lambda: page.to_html(tables),
    }
    return made[format_]()


def _write(text: str, output: Path | None) -> None:
    from ..benchmark.home import write_bytes

    if output is None:
        sys.stdout.write(text)
    else:
        write_bytes(output, text.encode())
