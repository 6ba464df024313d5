"""Choices: how a model was selected, and the decisions of a fit, which a second fit on all images repeats."""

from dataclasses import dataclass

from .errors import UserError
from .selection import Score


@dataclass(frozen=True)
class Choice:
    """How a model was selected: criterion and value, the epoch if it was one, how many candidates stood, and what the
    criterion breaks ties by.
    """

    criterion: str
    value: float | None = None
    step: int | None = None
    candidates: int = 1
    ties: Score = ()


@dataclass(frozen=True)
class Decision:
    """What was chosen at a place in a method: a position (an epoch counts from 1), and the record of the choice."""

    place: str
    position: int
    choice: Choice


class Decisions:
    """The decisions of one fit, in order; where those of an earlier fit are `replayed` they are made again instead."""

    def __init__(self, replayed: "list[Decision] | None" = None) -> None:
        self.made: list[Decision] = []
        self._replayed = None if replayed is None else list(replayed)

    @property
    def repeats(self) -> bool:
        """Whether this fit repeats an earlier one's."""
        return self._replayed is not None

    @property
    def left(self) -> int:
        """Earlier decisions that this fit has not come to."""
        return len(self._replayed or [])

    def add(self, place: str, position: int, choice: Choice) -> None:
        """A decision of this fit."""
        self.made.append(Decision(place, position, choice))

    def earlier(self, place: str) -> Decision | None:
        """What the earlier fit decided here, None without one; raises `UserError` where that one did something else."""
        if self._replayed is None:
            return None
        if not self._replayed or self._replayed[0].place != place:
            raise UserError(
                f"the second fit comes to {place!r}, where the first one did not: fit must always do the same"
            )
        return self._replayed.pop(0)
