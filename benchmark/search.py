"""Search ranges of settings, written as papers write them, and the draws from them.

A range stands in a configuration as `weight: Annotated[float, Search("10^U(-1,5)")] = 100.0`. Draw 0 of a search is the
defaults; every setting has a random stream of its own, so that a new setting never shifts another's draws.
"""

import math
import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, get_type_hints

import numpy as np

from .errors import UserError
from .spec import Recipe, derive_seed

_POWER = re.compile(r"(?:(\d+)\^)?U\(\s*([-+.\deE]+)\s*,\s*([-+.\deE]+)\s*\)")
_CHOICE = re.compile(r"\{(.+)\}")
DIGITS = 4
"""Significant digits of a drawn number."""


@dataclass(frozen=True)
class Search:
    """A range: `10^U(-1,5)` (log-uniform, any base), `U(0,1)` (uniform) or `{0,0.1,0.5}` (one of these).

    With `of` it is a factor on that setting of the recipe, e.g. a learning rate around the recipe's.
    """

    text: str
    of: str = ""

    def __post_init__(self) -> None:
        _ = self._parsed

    @cached_property
    def _parsed(self) -> "tuple[str, ...] | tuple[float, float, float]":
        """The choices, or base (0 where uniform), low and high."""
        text = self.text.strip()
        if choice := _CHOICE.fullmatch(text):
            return tuple(part.strip() for part in choice[1].split(","))
        if power := _POWER.fullmatch(text):
            try:
                base, low, high = float(power[1] or 0), float(power[2]), float(power[3])
                finite = math.isfinite(high - low) and math.isfinite(base**high if base else high)
            except (ValueError, OverflowError):
                base, low, high, finite = 0.0, math.nan, math.nan, False
            if finite and low <= high and (power[1] is None or base > 1):
                return base, low, high
        raise UserError(f"search range {self.text!r}: write 10^U(-1,5), 2^U(3,9), U(0.1,100) or {{0,0.1,0.5}}")

    def __str__(self) -> str:
        return f"{self.text} x recipe.{self.of}" if self.of else self.text

    def draw(self, rng: np.random.Generator, recipe: Recipe, *, whole: bool = False) -> str:
        """A value as text, as `--set` would take it; `whole` rounds it down (a factor to 1 at least)."""
        if isinstance(self._parsed[0], str):
            return str(self._parsed[rng.integers(len(self._parsed))])
        base, low, high = self._parsed
        value = rng.uniform(low, high)
        value = base**value if base else value
        value *= getattr(recipe, self.of) if self.of else 1
        if whole:
            return str(max(1, math.floor(value)) if self.of else math.floor(value))  # of 3 epochs 0.2 are none
        return f"{value:.{DIGITS}g}"


RECIPE = {"lr": Search("10^U(-1,1)", of="lr"), "weight_decay": Search("10^U(-2,1)", of="weight_decay")}
"""What of a recipe may be searched: the rest is the same for all methods of a block. For the usual lr 1e-3 and weight
decay 1e-4 these are SubpopBench's ranges."""


def ranges(config: type[Any]) -> dict[str, Search]:
    """The settings of a configuration class that have a search range, in order."""
    hints = get_type_hints(config, include_extras=True)
    found = {f.name: getattr(hints[f.name], "__metadata__", ()) for f in fields(config)}
    return {name: part for name, metadata in found.items() for part in metadata if isinstance(part, Search)}


def draw(config: type[Any], changed: dict[str, Search], prefix: str, number: int, recipe: Recipe) -> dict[str, str]:
    """Values as text of draw `number` (from 1) of every setting that has a range, `changed` ones instead of its own."""
    hints = get_type_hints(config)
    return {
        name: search.draw(
            np.random.default_rng(derive_seed("search", prefix, name, number)), recipe, whole=hints[name] is int
        )
        for name, search in (ranges(config) | changed).items()
    }
