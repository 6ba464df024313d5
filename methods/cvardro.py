"""CVaRDRO: minimise the mean loss of the worst share of every batch."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search


@dataclass(frozen=True)
class Config:
    """`alpha` is the share of a batch that counts: 1 is ERM, one over the batch size or less its largest loss."""

    alpha: Annotated[float, Search("10^U(-2,0)")] = 0.1

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1, f"cvardro.alpha must be in (0, 1], got {self.alpha}")


@method(
    "cvardro",
    paper="Levy et al., Large-Scale Methods for Distributionally Robust Optimization, NeurIPS 2020",
    requires=Requires(),
    config=Config,
)
class CVaRDRO(Objective[Config]):
    """`min_eta eta + mean (CE - eta)_+ / alpha` on every batch of shuffled images, with its exact minimiser.

    As in the authors' fast-dro and in SubpopBench, a batch stands for all of train, of whose CVaR its own is a biased
    estimate. Deviations: the recipe is the block's; selection is the rung's.
    """

    def loss(self, batch: Batch) -> Tensor:
        return cvar(F.cross_entropy(self.model(batch.x), batch.y, reduction="none"), self.config.alpha)


def cvar(losses: Tensor, alpha: float) -> Tensor:
    """Mean of the largest `alpha * B` of the losses (B,), the last of them by a fraction; the largest if below one."""
    share = alpha * len(losses)
    weights = (share - torch.arange(len(losses), device=losses.device)).clamp(0, 1)  # their sum is the share
    return (weights * losses.sort(descending=True, stable=True).values).sum() / share
