"""Errors a user can mend. The command line prints them without a traceback and exits with 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user gave is wrong: the message says what, which value, and what to do next."""


def printable(text: str) -> str:
    """Text from a file without control and invisible characters, which could rewrite a terminal or a table."""
    return "".join(character if character.isprintable() else " " for character in text)


def one_line(text: str, longest: int = 500) -> str:
    """Text from a file as part of a message: printable, on one line, and no longer than a reader bears."""
    shown = printable(text)
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with this message unless the condition holds (a NaN fails every comparison)."""
    if not condition:
        raise UserError(message)


class UnknownName(UserError):
    """A name that is in no registry; the message offers the closest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        close = get_close_matches(name, known, n=3, cutoff=0.5)
        offer = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(known) or 'none'}."
        super().__init__(f"unknown {kind} {name!r}. {offer}{' ' + hint if hint else ''}")


class MissingData(UserError):
    """A dataset is not on disk; the message says what to put where."""


class CorruptFile(UserError):
    """A file is truncated, foreign or altered; the message names it, on one line whatever it is called."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class DiskError(UserError):
    """The disk is full, read-only or forbidden: no run of the suite can go on."""


class BudgetExceeded(UserError):
    """A method asked for attribute labels that its annotation budget does not grant."""


class NonFiniteLoss(RuntimeError):
    """The training loss became NaN or infinite; the run is recorded as failed and the suite goes on."""

    def __init__(self, stage: str, epoch: int, step: int) -> None:
        super().__init__(f"stage {stage!r}: the loss is not finite at epoch {epoch}, step {step}")
        self.step = step
