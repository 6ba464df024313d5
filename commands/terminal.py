"""What all commands share: where they print to, plugins, interrupts and `--set`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from ..benchmark.errors import UserError, one_line, printable

if TYPE_CHECKING:
    from ..leaderboard.table import Table

out = Console(emoji=False, width=None if sys.stdout.isatty() else 1000)  # a pipe has no width: there nothing is wrapped
err = Console(stderr=True, emoji=False)


def say(text: str, console: Console = out, style: str | None = None) -> None:
    """Print lines as they are: nothing in them is markup, or commands the terminal, whatever file they are from."""
    for line in text.splitlines() or [""]:
        console.print(printable(line), style=style, markup=False, highlight=False, soft_wrap=True)


def load_plugins(plugins: list[Path]) -> None:
    """Import the files named by --plugin."""
    from ..benchmark.registry import load_plugin

    for file in plugins:
        load_plugin(file)


@contextmanager
def interruptible() -> Iterator[None]:
    """An interrupt inside is one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        err.print(
            "interrupted. What is finished is kept; the same command goes on where this one stopped.", soft_wrap=True
        )
        raise typer.Exit(130) from interrupt


def pair(text: str, option: str = "--set", form: str = "KEY=VALUE") -> tuple[str, str]:
    """Key and value of a --set, or of another option; raises `UserError`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{option} {text}: write {form}")
    return key, value


def print_leaderboard(tables: "list[Table]", splits: bool = False) -> None:
    """Tables as wide as the terminal, and their legend."""
    from ..leaderboard import render

    print_tables(render.to_terminal(tables, out.width, splits))
    if tables:
        out.print(render.legend(tables, splits), style="dim", markup=False, highlight=False)


def print_tables(tables: list[Any]) -> None:
    """Tables, one below the other."""
    for table in tables:
        out.print(table)


def print_problems(problems: list[str]) -> None:
    """What was left out of a table, on the other stream."""
    for problem in problems:
        say(f"left out: {one_line(problem, 2000)}", err, "red")
