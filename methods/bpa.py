"""BPA: weigh images by the size and the loss of their cluster, among clusters of each class's ERM features."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.annotations import Indices
from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.task import Predictor, Task
from .blocks.class_clusters import Clustering, numbered, per_class_clusters
from .blocks.cluster_weights import ClusterWeights, mean_one

EXPONENT = 0.05
"""Of the released rule: weights u become u exp(0.05 u)."""


@dataclass(frozen=True)
class Config:
    """`clusters` K in every class; `momentum` m of the clusters' weights; `rule` is the paper's, or that of the
    `released` code, which has no momentum but weights that grow faster than the loss."""

    clusters: Annotated[int, Search("{8,4,16}")] = 8
    momentum: Annotated[float, Search("{0.3,0.1,1}")] = 0.3
    rule: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        require(self.clusters >= 1, f"bpa.clusters must be at least 1, got {self.clusters}")
        require(0 < self.momentum <= 1, f"bpa.momentum must be in (0, 1], got {self.momentum}")
        require(self.rule in ("paper", "released"), f"bpa.rule must be paper or released, got {self.rule!r}")


@method(
    "bpa",
    paper="Seo et al., Unsupervised Learning of Debiased Representations with Pseudo-Attributes, CVPR 2022",
    requires=Requires(native="select"),
    config=Config,
)
class BPA:
    """Shared ERM -> K clusters of each class's features -> ERM with weights that follow `mean loss_k / N_k`.

    Weights are divided by their mean in the batch. They follow the last losses of all images, every ten steps, once
    every image has one; until then they are 1 / N_k. In the released code the moving average has no effect (what it
    should remember is overwritten first); `released` does as that code does: the weights u are those of the last losses
    alone, and become u exp(0.05 u).

    Deviations: clusters as in the source `clusters`; under `released` nothing is updated at the end of an epoch beside
    the tenth steps; the block's recipe (there Adam, 100 epochs); selection by the rung (there group labels of
    validation).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """ERM and its clusters, then the weighted training from the block's initial weights."""
        cluster = per_class_clusters(task, Clustering(self.config.clusters, "erm"))
        return task.train(Reweighted(self.config, numbered(task.y("train"), cluster)), stage="second")


class Reweighted(Objective[Config]):
    """`mean_i w_i CE_i`, w_i the weight of the image's cluster, with mean 1 in the batch."""

    def __init__(self, config: Config, partition: Indices) -> None:
        super().__init__(config)
        self.partition = partition

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        momentum = self.config.momentum if self.config.rule == "paper" else 1.0
        self.weights = ClusterWeights(torch.from_numpy(self.partition).to(task.device), momentum=momentum)

    def loss(self, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.model(batch.x), batch.y, reduction="none")
        weights = self.weights.of(batch.index)
        self.weights.remember(batch.index, losses)
        return ((weights if self.config.rule == "paper" else sharpened(weights)) * losses).mean()

    def state_dict(self) -> dict[str, Any]:
        return self.weights.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights.load_state_dict(state)


def sharpened(weights: Tensor) -> Tensor:
    """Weights `u exp(0.05 u)` (B,) with mean 1, of weights u with mean 1 (released code)."""
    return mean_one(weights * torch.exp(EXPONENT * weights))
