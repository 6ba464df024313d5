"""How well the groups of a source agree with the true ones: for information, computed after fitting."""

import numpy as np
from numpy.typing import NDArray

from .annotations import Attributes
from .metrics import Values


def agreement(found: Attributes, a: NDArray[np.int64], y: NDArray[np.int64], shape: tuple[int, ...]) -> Values:
    """Agreement of found attributes (n, m) with true ones (n, k), within the classes; `shape` is (K, S_1 .. S_k).

    `ami`: mutual information of found and true attribute, adjusted for chance (1: the same partition, 0: no relation),
    mean over the classes' images. `worst_recall`: every found group stands for the true group that most of its images
    belong to; of the true group that is recalled worst, the share of images that lie in groups standing for it.
    `groups`: found groups that have images.
    """
    from sklearn.metrics import adjusted_mutual_info_score  # half a second, for the few runs that have a source

    guess, truth = found.joint().index, Attributes(a, shape[1:]).joint().index
    ami, groups, recalls = 0.0, 0, []
    for label in np.unique(y):
        own, true = guess[y == label], truth[y == label]
        ami += len(own) / len(y) * float(adjusted_mutual_info_score(true, own))
        _, own = np.unique(own, return_inverse=True)
        table = np.zeros((own.max() + 1, truth.max() + 1), np.int64)
        np.add.at(table, (own, true), 1)
        stands_for, counts = table.argmax(1), table.sum(0)
        groups += len(table)
        recalls += [table[stands_for == g, g].sum() / counts[g] for g in np.flatnonzero(counts)]
    return {"ami": ami, "worst_recall": float(min(recalls)), "groups": float(groups)}
