"""What all commands share: where they print to, plugins, interrupts and `--set`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from .benchmark.errors import UserError

out = Console(width=None if sys.stdout.isatty() else 1000)  # a pipe has no width: there nothing is wrapped
err = Console(stderr=True)


def load_plugins(plugins: list[Path]) -> None:
    """Import the files named by --plugin."""
    from .benchmark.registry import load_plugin

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


def pair(text: str) -> tuple[str, str]:
    """Key and value of a --set; raises `UserError`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: write KEY=VALUE")
    return key, value
