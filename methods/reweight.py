"""ReWeight: ERM with the loss of every image weighted by the inverse of its group's size."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..benchmark.budget import Requires
from ..benchmark.registry import method
from .blocks.balance import GroupWeighted


@dataclass(frozen=True)
class Config:
    """`kind`: weights are one over a group's size (`inverse`), or over its square root (`sqrt`)."""

    kind: Literal["inverse", "sqrt"] = "inverse"


@method(
    "reweight",
    paper="Idrissi et al., Simple data balancing achieves competitive worst-group-accuracy, CLeaR 2022 (RWG's twin)",
    requires=Requires(fit="train", native="train+val", classes="class"),
    config=Config,
)
class ReWeight(GroupWeighted[Config]):
    """`mean_i w_{g_i} CE_i` on shuffled images; with `kind=sqrt` SubpopBench's SqrtReWeight.

    The mean is over the batch and not normalised by the weights, as in SubpopBench, so the effective learning rate
    depends on a batch's composition. Deviations: the recipe is the block's; selection is the rung's.
    """

    def group_weights(self, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        weights: NDArray[np.float64] = 1 / (sizes if self.config.kind == "inverse" else np.sqrt(sizes))
        return weights
