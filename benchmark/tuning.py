"""Search of settings within the budget: draws, their runs, and the choice among them by the rung's rule alone.

A candidate is an ordinary run on the first seed. The best draw is then run on every seed; its records name all
candidates, what they scored on validation and what they cost (spec: metrics and protocol, section 12).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .cost import StageCost
from .errors import UserError
from .record import RunRecord, Stage
from .search import RECIPE, Search, draw
from .spec import Recipe, RunSpec, override

Settings = tuple[tuple[str, Any], ...]
GIVEN_UP = "given up"


@dataclass(frozen=True)
class Space:
    """What a search draws from: method and source with the settings that draw 0 has; by `recipe.KEY`, `METHOD.KEY` or
    `SOURCE.KEY` the ranges that the user has `changed`, and the settings that he has `fixed` and gave no range.
    """

    parts: tuple[tuple[str, Any], ...]
    recipe: Recipe
    changed: Mapping[str, Search]
    fixed: frozenset[str] = frozenset()

    def at(self, number: int) -> tuple[list[Settings], Settings]:
        """Settings of every part, and those of the recipe that differ, at a draw from 1; raises `UserError`."""
        drawn = [self._drawn(name, config, number, {}) for name, config in self.parts]
        found = asdict(self._drawn("recipe", self.recipe, number, RECIPE))
        own = asdict(self.recipe)
        return [frozen(config) for config in drawn], tuple(sorted((k, v) for k, v in found.items() if v != own[k]))

    def _drawn(self, name: str, config: Any, number: int, ranges: dict[str, Search]) -> Any:
        changed = {key.removeprefix(f"{name}."): s for key, s in self.changed.items() if key.startswith(f"{name}.")}
        texts = draw(type(config), ranges | changed, name, number, self.recipe)
        free = {key: text for key, text in texts.items() if key in changed or f"{name}.{key}" not in self.fixed}
        drawn, problems = override(config, free, name)
        if problems:
            raise UserError(f"draw {number}: {'; '.join(problems)}; give a narrower range with --search")
        return drawn


class Pruned(UserError):
    """A draw was given up before its end."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{GIVEN_UP} {reason}")


def was_pruned(record: RunRecord) -> bool:
    """Whether a draw's record says that it was given up."""
    return record.status == "failed" and record.error.startswith(GIVEN_UP)


def frozen(config: Any) -> Settings:
    """The settings of a configuration as they stand in a `RunSpec`."""
    return tuple(sorted(asdict(config).items()))


@dataclass(frozen=True)
class Sweep:
    """A search: its candidates, draw 0 (the defaults) first, and the runs that take over the chosen settings."""

    candidates: tuple[RunSpec, ...]
    runs: tuple[RunSpec, ...]

    @property
    def label(self) -> str:
        """What is searched for, for people."""
        first = self.runs[0]
        return f"{first.method_label} on {first.block.dataset} · {first.budget}"

    @classmethod
    def over(cls, runs: Iterable[RunSpec], space: Space, draws: int) -> "Sweep":
        """A search of so many draws for the runs of one cell, which differ in their seeds; the first one searches."""
        runs = tuple(runs)

        def candidate(number: int) -> RunSpec:
            (config, *of_source), tuned = space.at(number)
            source_config = of_source[0] if runs[0].source and of_source else runs[0].source_config
            return replace(runs[0], config=config, source_config=source_config, tuned=tuned, draw=number)

        return cls((runs[0], *(candidate(number) for number in range(1, draws))), runs)

    def chosen(self, records: Mapping[str, RunRecord]) -> tuple[RunSpec, ...]:
        """The runs with the settings of the best candidate, the earliest among equals.

        `records` are those of the candidates, by hash. Raises `UserError` where no candidate has a selection value.
        """
        best = first_best(self.scores(records))
        if best is None:
            errors = dict.fromkeys(records[one.hash].error for one in self.candidates if one.hash in records)
            reason = next(filter(None, errors), "nothing is selected in it")
            raise UserError(f"no draw of the search can be chosen: {reason}")
        winner = self.candidates[best]
        settings = {name: getattr(winner, name) for name in ("config", "source_config", "tuned", "draw")}
        return tuple(
            replace(run, **settings, candidates=tuple(one.hash for one in self.candidates)) for run in self.runs
        )

    def scores(self, records: Mapping[str, RunRecord]) -> list[list[float] | None]:
        """Selection score of every candidate, None where it failed."""
        made = (records.get(one.hash) for one in self.candidates)
        return [score_of(record) if record else None for record in made]


def score_of(record: RunRecord) -> list[float] | None:
    """Selection value of a run and what ties are broken by, None where nothing was selected in it."""
    return record.selection.score if record.selection else None


def cost_of(candidates: Iterable[RunRecord]) -> Stage:
    """Sum of what runs cost from scratch; what they share is paid for once, of shares of a training the largest."""
    costs = [one.cost for one in candidates if one.cost]
    shared: dict[str, Stage] = {}
    for key, part in (item for cost in costs for item in cost.shared.items()):
        if key not in shared or part.n_fwd > shared[key].n_fwd:
            shared[key] = part
    parts = [*(stage for cost in costs for stage in cost.stages.values()), *shared.values()]
    return Stage(**asdict(StageCost.total([StageCost(**part.model_dump()) for part in parts])))


def first_best(scores: Iterable[list[float] | None]) -> int | None:
    """Position of the best score, the earliest among equals; None where there is none."""
    known: Iterator[tuple[list[float], int]] = ((score, -i) for i, score in enumerate(scores) if score is not None)
    best = max(known, default=None)
    return None if best is None else -best[1]
