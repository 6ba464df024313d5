"""The command line: parses, calls, prints.

Heavy modules are imported inside the commands that need them, so that `--help` does not wait for torch.
"""

import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .benchmark.errors import UserError
from .commands import board, data, explain, profile, run, submission
from .commands.terminal import err, load_plugins, out, print_problems, print_tables, say

if TYPE_CHECKING:
    from .authoring.scaffold import Written

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
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


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except UserError as error:
        _print_error(str(error))
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a path too long, a folder that may not be listed, a disk that fails
        if not error.filename:
            raise
        _print_error(f"{error.filename}: {error.strerror or error}")
        sys.exit(2)


def _print_error(message: str) -> None:
    for line in message.splitlines():
        say(f"error: {line}", err, "red")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"worstgroup {version('worstgroup')}", markup=False, highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """One protocol, one engine and honest budgets for methods that resist spurious correlations."""


app.command()(run.run)
app.command()(run.tune)
app.command()(profile.profile)
app.command()(explain.explain)


@app.command("ls")
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    stale: Annotated[
        bool, typer.Option("--stale", help="Only runs whose method's or backbone's code has changed since.")
    ] = False,
    plugin: Annotated[list[Path], typer.Option(metavar="FILE", help="A Python file that registers entries.")] = [],  # noqa: B006
) -> None:
    """List what there is; of runs, records that cannot be read are named and left out."""
    from .commands import listing

    load_plugins(plugin)
    if kind is not Kind.runs:
        print_tables([listing.table(kind.value)])
        return
    shown, problems = listing.runs(only_stale=stale)
    print_problems(problems)
    print_tables([shown])


app.command()(data.show)
app.command()(data.prepare)
app.command()(data.embed)


app.command()(board.board)
app.command()(submission.verify)
app.command()(submission.submit)


@app.command()
def check(
    method: Annotated[str, typer.Argument(help=r"HOST[+SOURCE]\[@POLICY].")],
    plugin: Annotated[list[Path], typer.Option(metavar="FILE", help="A Python file that registers the method.")] = [],  # noqa: B006
) -> None:
    """Check that a method keeps the contract, in a temporary home; exit code 1 when a check fails."""
    from .authoring import contract

    load_plugins(plugin)
    failed = False
    for verdict in contract.verdicts(method):
        bad = verdict.state == "failed"
        state, message = "FAILED" if bad else verdict.state, " ".join(verdict.message.split())
        line = f"{state:<6}  {verdict.check:<13} {verdict.seconds:5.1f} s  {message}".rstrip()
        say(line, style="red" if bad else None)
        failed |= bad
    if failed:
        raise typer.Exit(1)


@app.command("new-method")
def new_method(name: Annotated[str, typer.Argument(help="Lowercase letters, digits, - and _.")]) -> None:
    """Write a working method to start from: into methods/ in a checkout, else into this folder."""
    from .authoring import scaffold

    _print_written(scaffold.new_method(name, Path.cwd()))


@app.command("new-dataset")
def new_dataset(name: Annotated[str, typer.Argument(help="Lowercase letters, digits, - and _.")]) -> None:
    """Write a working reader of your pictures to start from: into datasets/ in a checkout, else into this folder."""
    from .authoring import scaffold

    _print_written(scaffold.new_dataset(name, Path.cwd()))


def _print_written(written: "Written") -> None:
    for line in (f"wrote {written.path}", "next:", *(f"  {command}" for command in written.commands)):
        say(line)


@app.command()
def cache(
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Delete shared artifacts, the board's index and leftovers; never runs or data."),
    ] = False,
) -> None:
    """Show what lies in $WORSTGROUP_HOME."""
    from .benchmark.cache import contents, prune_artifacts
    from .benchmark.home import home

    if prune:
        out.print(f"freed {prune_artifacts() / 2**20:.1f} MiB", markup=False, highlight=False)
    say(str(home()))
    for name, count, size in contents():
        out.print(f"  {name:<22} {count:>6} files  {size / 2**20:>10.1f} MiB", markup=False, highlight=False)


if __name__ == "__main__":
    main()
