"""CBLoss: ERM with the loss of every image weighted by the inverse of its group's effective number of images."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from ..benchmark.budget import Requires
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from .blocks.balance import GroupWeighted


@dataclass(frozen=True)
class Config:
    """`one_minus_beta` is 1 - beta: towards 1 groups are weighted alike, towards 0 by the inverse of their size.

    `variant`: `released` gives weight 0 to groups whose beta^n is lost in rounding (below 5.6e-17), as SubpopBench does
    (at beta = 0.99 from 3,725 images on); `formula` keeps them.
    """

    one_minus_beta: Annotated[float, Search("10^U(-5,-2)")] = 1e-4
    variant: Literal["formula", "released"] = "formula"

    def __post_init__(self) -> None:
        value = self.one_minus_beta
        require(0 < value < 1, f"cbloss.one_minus_beta must be in (0, 1), got {value}")


@method(
    "cbloss",
    paper="Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019 (groups for classes)",
    requires=Requires(fit="train", native="train+val", classes="class"),
    config=Config,
)
class CBLoss(GroupWeighted[Config]):
    """`mean_i w_{g_i} CE_i` with `w_g` proportional to `(1 - beta) / (1 - beta^n_g)`, on shuffled images.

    Groups stand for the paper's classes, as in SubpopBench; `cbloss@class` is the paper's. The mean is over the batch
    and not normalised by the weights. Deviations: the recipe is the block's; selection is the rung's; by default large
    groups keep their weight (see `variant`).
    """

    def group_weights(self, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        log_power = sizes * np.log1p(-self.config.one_minus_beta)
        weights: NDArray[np.float64] = self.config.one_minus_beta / -np.expm1(log_power)
        if self.config.variant == "released":
            weights[1 - np.exp(log_power) == 1] = 0
        return weights
