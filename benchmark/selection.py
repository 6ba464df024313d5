"""Model selection: criteria on validation predictions, each a tuple to maximise (value, then tie-breakers).

Between equal candidates the earlier one wins. Criteria that start from groups need validation attributes; the others
need class labels only (spec: metrics and protocol, sections 7 and 10.2).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import metrics
from .annotations import Groups

Score = tuple[float, ...]

PSEUDO_WGA = "val-pseudo-wga"
"""How a method that fits on no groups selects when it is composed with a source of them."""


def smoothed_worst_group(correct: metrics.Counts, total: metrics.Counts) -> float:
    """Minimum of (correct + 1) / (n + 2) over all cells; an unseen cell scores 0.5 for every candidate."""
    return float(((correct + 1) / (total + 2)).min())


def _wga(correct: metrics.Counts, total: metrics.Counts) -> Score:
    return metrics.worst_group_accuracy(correct, total), metrics.group_mean_accuracy(correct, total)


def _smoothed(correct: metrics.Counts, total: metrics.Counts) -> Score:
    return smoothed_worst_group(correct, total), metrics.group_mean_accuracy(correct, total)


def _wga_avg(correct: metrics.Counts, total: metrics.Counts) -> Score:
    return ((metrics.worst_group_accuracy(correct, total) + metrics.mean_accuracy(correct, total)) / 2,)


def _mean(correct: metrics.Counts, total: metrics.Counts) -> Score:
    return (metrics.mean_accuracy(correct, total),)


@dataclass(frozen=True)
class Criterion:
    """A selection rule: whether it counts over true groups (`needs_groups`), over those of the run's group source
    (`of_source`) or over classes, and the score of the counts.
    """

    name: str
    needs_groups: bool
    score: Callable[[metrics.Counts, metrics.Counts], Score]
    of_source: bool = False


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("val-wga", True, _wga),
        Criterion("val-wga-smoothed", True, _smoothed),
        Criterion("val-wga-avg", True, _wga_avg),
        Criterion("val-worst-class", False, _wga),
        Criterion("val-balanced", False, lambda c, t: (metrics.group_mean_accuracy(c, t),)),
        Criterion("val-mean", False, _mean),
        Criterion(PSEUDO_WGA, False, _wga, of_source=True),
    )
}


def first_best(scores: Sequence[Score]) -> int:
    """Position of the best score, the earliest among equals."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


@dataclass(frozen=True, eq=False)
class Selector:
    """A criterion bound to some validation examples: their positions `rows` (m,), labels and groups (or classes)."""

    criterion: Criterion
    rows: NDArray[np.int64]
    truth: NDArray[np.int64]
    groups: Groups

    def counts(self, predictions: NDArray[np.integer]) -> tuple[metrics.Counts, metrics.Counts]:
        """Correct and total examples per group, from the predicted classes of all of validation (n,)."""
        return metrics.group_counts(predictions[self.rows] == self.truth, self.groups.index, self.groups.num)

    def __call__(self, predictions: NDArray[np.integer]) -> Score:
        """Score of the predicted classes of all of validation (n,); larger is better."""
        return self.criterion.score(*self.counts(predictions))

    def best(self, candidates: Iterable[NDArray[np.integer]]) -> tuple[int, Score]:
        """Position and score of the best candidate, the earliest among equals."""
        scores = [self(predictions) for predictions in candidates]
        best = first_best(scores)
        return best, scores[best]
