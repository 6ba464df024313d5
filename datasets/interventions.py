"""What datasets that render interventions share: which example takes its shortcut from which."""

import numpy as np
from numpy.typing import NDArray


def donors(y: NDArray[np.int64], random: np.random.RandomState) -> NDArray[np.int64]:
    """For each example (n,) a random one of another class, whose shortcut it is to show (`Split.views`)."""
    chosen = np.empty(len(y), np.int64)
    for label in np.unique(y):
        others = np.flatnonzero(y != label)
        chosen[y == label] = others[random.randint(len(others), size=int((y == label).sum()))]
    return chosen
