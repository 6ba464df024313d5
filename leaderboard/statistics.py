"""Intervals: a hierarchical bootstrap over seeds and test units, paired between methods.

Resampled units are the independent objects of the test set (an image, or a digit drawn four times). All methods of a
table are resampled with the same draws, so differences are paired; the draws are fixed, so the same records give the
same numbers everywhere. Where a licence keeps the answers out of the records, group counts are resampled instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..benchmark import metrics
from ..benchmark.spec import derive_seed
from .entry import Layout, Line

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
    """Per seed, correct answers by test unit and group (S, U, G), and the images there are (U, G)."""

    seeds: tuple[int, ...]
    correct: NDArray[np.float32]
    total: NDArray[np.float32]

    @classmethod
    def of(cls, seeds: Sequence[int], answers: Sequence[NDArray[np.bool_]], layout: Layout) -> "Outcome":
        """Tabulate which test images (M,) the runs of one row got right, one run per seed."""
        tables = [layout.table(correct) for correct in answers]
        return cls(tuple(seeds), np.stack(tables), layout.table(np.ones(len(layout.group), dtype=bool)))


@lru_cache(maxsize=1)
def unit_weights(units: int) -> NDArray[np.float32]:
    """Multinomial resampling weights (DRAWS, units) of the test units, the same in every call."""
    rng = np.random.Generator(np.random.PCG64(derive_seed("bootstrap", "units", units)))
    return rng.multinomial(units, np.full(units, 1 / units), size=DRAWS).astype(np.float32)


@lru_cache(maxsize=4)
def seed_weights(seeds: int) -> NDArray[np.float64]:
    """Shares (DRAWS, seeds) of the seeds among as many drawn with replacement, the same in every call."""
    rng = np.random.Generator(np.random.PCG64(derive_seed("bootstrap", "seeds", seeds)))
    choices = rng.integers(seeds, size=(DRAWS, seeds))
    return np.stack([(choices == seed).sum(1) for seed in range(seeds)], axis=1) / seeds


def resampled_accuracies(outcome: Outcome, weights: NDArray[np.float32]) -> tuple[Samples, Samples]:
    """Group accuracies (S, DRAWS, G) and shares of correct images (S, DRAWS) under the resampling weights.

    An accuracy is NaN where its group was not drawn. All sums are of whole numbers below 2^24, so they are the same on
    every machine.
    """
    total = weights @ outcome.total
    seeds, units, groups = outcome.correct.shape
    drawn = weights @ outcome.correct.transpose(1, 0, 2).reshape(units, seeds * groups)
    correct = drawn.reshape(len(weights), seeds, groups).transpose(1, 0, 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracies = (correct / total).astype(np.float64)
    return accuracies, (correct.sum(2) / total.sum(1)).astype(np.float64)


def accuracies_from_counts(
    correct: NDArray[np.int64], total: NDArray[np.int64], stream: str
) -> tuple[Samples, Samples]:
    """The same from group counts (S, G) and (G,), where it is not known which images were answered correctly.

    Counts are binomial; all seeds of a row share their draws, as if they had failed on the same images, and rows with
    different `stream`s share none: both make intervals wider than those from the answers.
    """
    from scipy.stats import binom  # half a second that few tables need

    rng = np.random.Generator(np.random.PCG64(derive_seed("bootstrap", "counts", stream)))
    quantiles = rng.random((DRAWS, len(total)))
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = binom.ppf(quantiles, total, np.clip(correct / total, 0, 1)[:, None])
        accuracies: Samples = np.where(total > 0, drawn / total, np.nan)
    return accuracies, np.nansum(accuracies * total, axis=2) / total.sum()


def over_seeds(samples: Samples) -> Samples:
    """Mean over resampled seeds (DRAWS,) of a metric sampled as (S, DRAWS)."""
    means: Samples = np.einsum("ds,sd->d", seed_weights(len(samples)), samples)
    return means


def interval(samples: Samples) -> tuple[float, float]:
    """95 % percentile interval."""
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return float(low), float(high)


def linear_metrics(line: Line) -> dict[str, Samples]:
    """Metrics that are linear in the group accuracies, as coefficients (G,).

    Each is read off the metric itself, evaluated on accuracy 1 in one group and 0 in the others.
    """
    m_test, n_train = np.array(line.m_test), np.array(line.n_train)
    coefficients: dict[str, Samples] = {}
    for g in np.flatnonzero(m_test > 0):
        one = np.zeros(len(m_test), dtype=np.int64)
        one[g] = 1
        values = metrics.evaluate(one, (m_test > 0).astype(np.int64), n_train, line.shape, line.attributes)
        for name, value in values.items():
            if (name.startswith("gap_") or name in ("acc_group", "acc_adj")) and value is not None:
                coefficients.setdefault(name, np.zeros(len(one)))[g] = value
    return coefficients


def sample_metrics(accuracies: Samples, shares: Samples, line: Line) -> dict[str, Samples]:
    """Samples (S, DRAWS) of the worst-group accuracy, the share of correct images, and every linear metric."""
    samples = {"wga": np.nanmin(accuracies, axis=2), "acc_mean": shares}
    linear = linear_metrics(line)
    if not np.isnan(accuracies).any():
        together = accuracies @ np.stack(list(linear.values()), axis=1)
        return samples | {name: together[:, :, i] for i, name in enumerate(linear)}
    for name, coefficients in linear.items():  # a metric that needs a group which was not drawn is NaN
        samples[name] = np.where(coefficients != 0, accuracies, 0) @ coefficients
    return samples
