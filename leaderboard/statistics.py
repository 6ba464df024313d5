"""Intervals: a hierarchical bootstrap over seeds and test units, paired between methods.

Resampled units are the independent objects of the test set (an image, or a digit drawn four times). All methods of a
table are resampled with the same draws, so differences are paired; the draws are fixed, so the same records give the
same numbers everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..benchmark import metrics
from ..benchmark.record import Arrays, RunRecord
from ..benchmark.spec import derive_seed

DRAWS = 2000
Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its standard deviation (None for one seed) and a 95 % interval."""

    mean: float
    sd: float | None
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """Per seed, correct answers by test unit and group (U, G), and the examples there are (U, G)."""

    seeds: tuple[int, ...]
    correct: NDArray[np.float32]
    total: NDArray[np.float32]

    @classmethod
    def of(cls, records: Sequence[RunRecord], arrays: Sequence[Arrays]) -> "Outcome":
        """Tabulate the test predictions of one cell, one record per seed."""
        tables = []
        for record, data in zip(records, arrays, strict=True):
            group = metrics.group_index(data["test_y"], data["test_a"], record.shape)
            unit = np.unique(data["test_unit"], return_inverse=True)[1]
            shape = (int(unit.max()) + 1, int(np.prod(record.shape)))
            total, correct = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
            np.add.at(total, (unit, group), 1)
            np.add.at(correct, (unit, group), data["test_prediction"] == data["test_y"])
            tables.append((correct, total))
        return cls(tuple(r.seed for r in records), np.stack([t[0] for t in tables]), tables[0][1])

    def select(self, seeds: Sequence[int]) -> "Outcome":
        """The same for some of the seeds, in the given order."""
        return Outcome(tuple(seeds), self.correct[[self.seeds.index(seed) for seed in seeds]], self.total)


@lru_cache(maxsize=1)
def unit_weights(units: int) -> NDArray[np.float32]:
    """Multinomial resampling weights (DRAWS, units) of the test units, the same in every call."""
    rng = np.random.Generator(np.random.PCG64(derive_seed("bootstrap", "units", units)))
    return rng.multinomial(units, np.full(units, 1 / units), size=DRAWS).astype(np.float32)


def seed_choices(seeds: int) -> NDArray[np.int64]:
    """Seeds drawn with replacement (DRAWS, seeds), the same in every call."""
    rng = np.random.Generator(np.random.PCG64(derive_seed("bootstrap", "seeds", seeds)))
    return rng.integers(seeds, size=(DRAWS, seeds))


def resampled_accuracies(outcome: Outcome, weights: NDArray[np.float32]) -> Samples:
    """Group accuracies (S, DRAWS, G) under the resampling weights; NaN where a group was not drawn."""
    total = weights @ outcome.total
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([(weights @ correct) / total for correct in outcome.correct]).astype(np.float64)


def over_seeds(samples: Samples) -> Samples:
    """Mean over resampled seeds (DRAWS,) of a metric sampled as (S, DRAWS)."""
    choices = seed_choices(len(samples))
    means: Samples = samples[choices, np.arange(DRAWS)[:, None]].mean(1)
    return means


def interval(samples: Samples) -> tuple[float, float]:
    """95 % percentile interval."""
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return float(low), float(high)


def linear_metrics(record: RunRecord) -> dict[str, Samples]:
    """Metrics that are linear in the group accuracies, as coefficients (G,).

    Each is read off the metric itself, evaluated on accuracy 1 in one group and 0 in the others.
    """
    counts = record.counts()
    present = np.flatnonzero(counts["m_test"] > 0)
    coefficients: dict[str, Samples] = {}
    for g in present:
        one = np.zeros(len(counts["m_test"]), dtype=np.int64)
        one[g] = 1
        total = (counts["m_test"] > 0).astype(np.int64)
        values = metrics.evaluate(one, total, counts["n_train"], record.shape, record.spec_attributes())
        for name, value in values.items():
            if (name.startswith("gap_") or name in ("acc_group", "acc_adj")) and value is not None:
                coefficients.setdefault(name, np.zeros(len(one)))[g] = value
    return coefficients


def sample_metrics(outcome: Outcome, weights: NDArray[np.float32], record: RunRecord) -> dict[str, Samples]:
    """Samples (S, DRAWS) of the worst-group accuracy, the share of correct images, and every linear metric."""
    accuracies = resampled_accuracies(outcome, weights)
    drawn = weights @ outcome.total.sum(axis=1)
    shares = np.stack([(weights @ correct.sum(axis=1)) / drawn for correct in outcome.correct]).astype(np.float64)
    samples = {"wga": np.nanmin(accuracies, axis=2), "acc_mean": shares}
    for name, coefficients in linear_metrics(record).items():
        samples[name] = np.where(coefficients != 0, accuracies, 0) @ coefficients
    return samples
