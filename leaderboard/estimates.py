"""Statistics of rows, computed once per set of records and kept by the index."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isnan
from typing import Any

import numpy as np

from . import statistics
from .entry import Entry, Line
from .index import Index
from .statistics import Estimate, Outcome, Samples
from .table import Difference, GroupResult

WORST = 64
"""Rows whose samples of the worst group are held at a time."""
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Cell:
    """The runs of one row, by seed."""

    entries: tuple[Entry, ...]

    @property
    def line(self) -> Line:
        """What they share."""
        return self.entries[0].line

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Of the runs."""
        return tuple(entry.seed for entry in self.entries)

    @cached_property
    def key(self) -> str:
        """Changes with any of the records."""
        return hashlib.sha256(" ".join(entry.digest for entry in self.entries).encode()).hexdigest()

    @property
    def from_counts(self) -> bool:
        """Whether the answers of some run were kept back."""
        return not all(entry.layout for entry in self.entries)

    def values(self, name: str) -> list[float | None]:
        """A metric of every seed."""
        return [entry.metrics[name] for entry in self.entries]


@dataclass(frozen=True, eq=False)
class _Sampled:
    """Bootstrap samples of a cell: metrics (S, DRAWS), group accuracies (S, DRAWS, G)."""

    metrics: dict[str, Samples]
    groups: Samples


class Estimates:
    """Intervals and paired differences of cells."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._sampled = lru_cache(maxsize=2)(self._sample)  # a row and the ERM that it is compared with
        self._worst = lru_cache(maxsize=WORST)(lambda cell: self._sampled(cell).metrics["wga"])

    def metric(self, cell: Cell, name: str) -> Estimate | None:
        """Mean over seeds with its interval; None where it is not defined for one of them."""
        return estimate(cell.values(name), self._intervals(cell)["metrics"].get(name))

    def groups(self, cell: Cell) -> list[GroupResult]:
        """Accuracy of every true group."""
        line, intervals = cell.line, self._intervals(cell)["groups"]
        results = []
        for g, name in enumerate(line.groups):
            m = line.m_test[g]
            values = [entry.correct[g] / m for entry in cell.entries] if m else []
            results.append(GroupResult(name, line.n_train[g], m, estimate(values, intervals[g]) if m else None))
        return results

    def curve(self, cell: Cell) -> list[list[float | None]]:
        """Validation accuracy by epoch and group, mean over the seeds that came so far."""
        curve: list[list[float | None]] = self._index.kept(f"curve {cell.key}", lambda: self._curve(cell))
        return curve

    def _curve(self, cell: Cell) -> list[list[float | None]]:
        with np.errstate(invalid="ignore", divide="ignore"):
            histories = [np.array(self._index.history(entry)) for entry in cell.entries]
            runs = [history / cell.line.m_val for history in histories if len(history)]
        epochs = [[run[i] for run in runs if i < len(run)] for i in range(max(map(len, runs), default=0))]
        means = [np.mean(epoch, axis=0).tolist() for epoch in epochs]
        return [[None if isnan(value) else round(value, 4) for value in mean] for mean in means]

    def differences(self, cell: Cell, other: Cell) -> dict[str, Difference]:
        """Paired differences of all metrics, over the seeds that both have; empty where there is none."""

        def make() -> dict[str, Any]:
            ours, theirs = self._sampled(cell).metrics, self._sampled(other).metrics
            found = {name: _difference(cell, other, name, ours[name], theirs[name]) for name in ours if name in theirs}
            return {name: difference for name, difference in found.items() if difference}

        kept = self._index.kept(f"differences {cell.key} {other.key}", make)
        return {name: Difference(*values) for name, values in kept.items()}

    def difference(self, cell: Cell, other: Cell) -> Difference | None:
        """Paired difference in worst-group accuracy alone, which is all that many pairs are asked for."""
        kept = self._index.kept(
            f"wga {cell.key} {other.key}",
            lambda: _difference(cell, other, "wga", self._worst(cell), self._worst(other)),
        )
        return Difference(*kept) if kept else None

    def _intervals(self, cell: Cell) -> dict[str, Any]:
        kept: dict[str, Any] = self._index.kept(f"intervals {cell.key}", lambda: self._interval(cell))
        return kept

    def _interval(self, cell: Cell) -> dict[str, Any]:
        sampled = self._sampled(cell)
        metrics = {name: over_seeds(samples) for name, samples in sampled.metrics.items()}
        present = [m > 0 for m in cell.line.m_test]
        groups = [over_seeds(sampled.groups[:, :, g]) if here else None for g, here in enumerate(present)]
        return {"metrics": metrics, "groups": groups}

    def _sample(self, cell: Cell) -> _Sampled:
        line = cell.line
        if cell.from_counts:
            correct = np.array([entry.correct for entry in cell.entries])
            accuracies, shares = statistics.accuracies_from_counts(correct, np.array(line.m_test), cell.key)
        else:
            answers = [self._index.answers(entry) for entry in cell.entries]
            outcome = Outcome.of(cell.seeds, answers, self._index.layout(cell.entries[0].layout))
            weights = statistics.unit_weights(len(outcome.total))
            accuracies, shares = statistics.resampled_accuracies(outcome, weights)
        return _Sampled(statistics.sample_metrics(accuracies, shares, line), accuracies)


def _difference(
    cell: Cell, other: Cell, name: str, ours: Samples, theirs: Samples
) -> tuple[float, float, float] | None:
    """Mean and interval of a metric's difference over common seeds, from its samples (S, DRAWS) of either cell."""
    pairs = [(cell.seeds.index(seed), other.seeds.index(seed)) for seed in cell.seeds if seed in other.seeds]
    values, others = cell.values(name), other.values(name)
    known = [(values[i], others[j]) for i, j in pairs]
    if not pairs or any(a is None or b is None for a, b in known):
        return None
    own, their = (list(rows) for rows in zip(*pairs, strict=True))
    mean = float(np.mean([a - b for a, b in known if a is not None and b is not None]))
    return (mean, *over_seeds(ours[own] - theirs[their]))


def over_seeds(samples: Samples) -> Interval:
    """95 % interval of a metric sampled as (S, DRAWS), over seeds and draws."""
    return statistics.interval(statistics.over_seeds(samples))


def estimate(values: Sequence[float | None], interval: Interval | None = None) -> Estimate | None:
    """Mean, deviation and interval; None where a value is not defined."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not values:
        return None
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
    low, high = interval or (float("nan"), float("nan"))
    return Estimate(float(np.mean(known)), sd, low, high)
