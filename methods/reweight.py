"""ReWeight: ERM with the loss of every image weighted by the inverse of its group's size."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.registry import NoConfig, method
from ..benchmark.task import Task


@method(
    "reweight",
    paper="Idrissi et al., Simple data balancing achieves competitive worst-group-accuracy, CLeaR 2022 (RWG's twin)",
    requires=Requires(fit="train", native="train+val", classes="class"),
)
class ReWeight(Objective[NoConfig]):
    """`mean_i w_{g_i} CE_i` on shuffled images.

    The mean is over the batch and not normalised by the weights, as in SubpopBench, so the effective learning rate
    depends on a batch's composition.
    """

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        groups = task.groups("train")
        weights = inverse_frequency(groups.counts())[groups.index]
        self.weights = torch.from_numpy(weights).float().to(task.device)

    def loss(self, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.model(batch.x), batch.y, reduction="none")
        return (self.weights[batch.index] * losses).mean()


def inverse_frequency(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights proportional to 1/n_g with mean 1 over the G groups; empty groups get 0 (but count in G)."""
    inverse = np.where(counts > 0, 1 / np.maximum(counts, 1), 0.0)
    weights: NDArray[np.float64] = inverse / inverse.sum() * len(counts)
    return weights
