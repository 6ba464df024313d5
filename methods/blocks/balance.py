"""Groups and classes that count equally: balanced subsets, weights in the loss, class counts."""

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...benchmark.annotations import Groups
from ...benchmark.backbones import Backbone
from ...benchmark.data import Batch
from ...benchmark.engine import Objective
from ...benchmark.errors import require
from ...benchmark.task import Task

ConfigT = TypeVar("ConfigT")


class GroupWeighted(Objective[ConfigT]):
    """`mean_i w_{g_i} CE_i`, the mean over the batch whatever its weights; a subclass gives those of the groups.

    After `setup`, `weights` (n,) are those of the images trained on.
    """

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        groups = task.groups("train")
        counts = groups.counts()
        weights = mean_one(self.group_weights(counts.clip(min=1)), counts)
        self.weights = torch.from_numpy(weights[groups.index]).float().to(task.device)

    def group_weights(self, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weights (G,) of groups with these sizes, up to a factor; empty ones come with size 1 and get no weight."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.model(batch.x), batch.y, reduction="none")
        return (self.weights[batch.index] * losses).mean()


def mean_one(weights: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Group weights (G,) scaled to mean 1 over the G groups; empty groups get 0 (but count in G)."""
    kept: NDArray[np.float64] = np.where(counts > 0, weights, 0.0)
    total = float(kept.sum())
    require(total > 0, "every group of train gets weight 0, so there is nothing to learn from")
    return kept / total * len(kept)


def class_counts(task: Task) -> Tensor:
    """Train images of each class (K,), float; images whose label is hidden (-1) do not count."""
    y = task.y("train")
    return torch.from_numpy(np.bincount(y[y >= 0], minlength=task.num_classes)).float().to(task.device)


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
