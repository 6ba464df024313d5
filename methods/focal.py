"""Focal: cross-entropy in which what is already classified well counts less."""

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

TINY = 1e-8
"""Smallest `1 - p_y`: at 0 the slope of a power below 1 is infinite."""


@dataclass(frozen=True)
class Config:
    """`gamma` is the power of `1 - p_y`; at 0 every image counts alike."""

    gamma: Annotated[float, Search("10^U(-0.30103,0.69897)")] = 1.0  # 0.5 * 10^U(0,1)

    def __post_init__(self) -> None:
        require(self.gamma >= 0, f"focal.gamma must be at least 0, got {self.gamma}")


@method(
    "focal",
    paper="Lin et al., Focal Loss for Dense Object Detection, ICCV 2017 (the multi-class form of SubpopBench)",
    requires=Requires(),
    config=Config,
)
class Focal(Objective[Config]):
    """`mean (1 - p_y)^gamma CE` on shuffled images, differentiated through both factors.

    Deviations: no weight by class (alpha in the paper), as in SubpopBench; the recipe is the block's; selection is the
    rung's.
    """

    def loss(self, batch: Batch) -> Tensor:
        return focal(F.cross_entropy(self.model(batch.x), batch.y, reduction="none"), self.config.gamma).mean()


def focal(losses: Tensor, gamma: float) -> Tensor:
    """`(1 - p)^gamma * CE` of cross-entropies (B,) = -log p; finite values and slopes down to 0."""
    return (-torch.expm1(-losses)).clamp(min=TINY) ** gamma * losses
