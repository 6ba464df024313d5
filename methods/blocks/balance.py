"""Group-balanced subsets."""

import numpy as np
from numpy.typing import NDArray

from ...benchmark.annotations import Groups


def balanced_subset(groups: Groups, rng: np.random.Generator, n_min: int = 0) -> NDArray[np.int64]:
    """Positions of equally many examples of every non-empty group, drawn without replacement, sorted.

    The size is that of the smallest group with more than `n_min` members; smaller groups enter whole.
    """
    counts = groups.counts()
    eligible = counts[counts > n_min]
    size = int(eligible.min() if len(eligible) else counts[counts > 0].min())
    present, first = np.unique(groups.index, return_index=True)
    order = present[first.argsort()]  # by first appearance: the draw does not depend on how groups are numbered
    drawn = [rng.permutation(np.flatnonzero(groups.index == g))[:size] for g in order]
    return np.sort(np.concatenate(drawn))
