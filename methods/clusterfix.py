"""ClusterFix: weigh images by how hard their cluster is, also to tell from the other clusters of its class."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..benchmark.annotations import Indices
from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.task import Checkpoint, Predictor, Task
from .blocks.class_clusters import Clustering, Init, numbered, per_class_clusters
from .blocks.cluster_weights import ClusterWeights


@dataclass(frozen=True)
class Config(Clustering):
    """`gamma` weighs the loss of the cluster classifiers against that of the classes, in the training and in how hard
    a cluster is (the paper's lambda too); `momentum` m of the clusters' weights; `rule`: they follow a cluster's loss
    over its size (`eq8`), or its loss alone, as in Algorithm 1 (`alg1`); `cap` bounds them at so many times their mean
    (0: not; 100 keeps clusters of a few images in check). `init` is the network that is clustered and then trained."""

    init: Annotated[Init, Search("{pretrained,ssl}")] = "pretrained"
    gamma: Annotated[float, Search("{0.5,0.01,0.1,1,10,50}")] = 0.5
    momentum: float = 0.3
    rule: Literal["eq8", "alg1"] = "eq8"
    cap: float = 0.0

    name: ClassVar[str] = "clusterfix"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma >= 0, f"clusterfix.gamma must be at least 0, got {self.gamma}")
        require(0 < self.momentum <= 1, f"clusterfix.momentum must be in (0, 1], got {self.momentum}")
        require(self.rule in ("eq8", "alg1"), f"clusterfix.rule must be eq8 or alg1, got {self.rule!r}")
        require(self.cap == 0 or self.cap >= 1, f"clusterfix.cap must be 0 or at least 1, got {self.cap}")


@method(
    "clusterfix",
    paper="Capitani et al., ClusterFix: A Cluster-Based Debiasing Approach without Protected-Group Supervision, "
    "WACV 2024",
    requires=Requires(native="select"),
    config=Config,
)
class ClusterFix:
    """A network -> K clusters of each class's features -> `sum_i alpha_i CE_i + gamma mean_i CE'_i` from that network.

    CE is the class's loss, CE' that of telling the image's cluster from the others of its class, by a linear classifier
    of the same features for each class. `omega_k <- (1 - m) omega_k + m s_k / N_k`, with s_k the mean of CE + gamma CE'
    over cluster k (eq. 8), and alpha_i is the omega of the image's cluster over its sum in the batch, without a
    gradient. With gamma = 0 it is BPA's rule. Clusters stay as they are throughout.

    Where the paper contradicts itself: gamma of eq. 8-9 and lambda of Algorithm 1 are one setting; omega follows losses
    without weights (in Algorithm 1 they already hold omega); the task's loss is a sum, as alpha sums to 1, and that of
    the clusters a mean (Algorithm 1 divides the first by the batch size too, eq. 6 sums the second); clusters are those
    of a class (section 3.2), not of all images. `alg1` keeps of Algorithm 1 that s_k is not divided by N_k; omega is 1
    at first then. Where it is silent, as in BPA's released code: s_k is the mean of the images' last losses, omega
    moves every ten steps, and stays 1 / N_k until all images have a loss. Both heads are new; that of the classes is
    the one that the block starts with.

    The paper takes `ssl` and gamma 0.5 for CelebA, `pretrained` and 0.01 for Waterbirds, `erm` and 50 for CM-10.

    Deviations: any number of classes (there two); the network trained without labels sees the images of the block's own
    dataset, so that two targets of CelebA have one each; the block's recipe (there Adam, 100 epochs); selection by the
    rung (there group labels of validation).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """The network, its clusters, and the joint training."""
        cluster = per_class_clusters(task, self.config)
        start = with_new_head(task, self.config.network(task))
        return task.train(Joint(self.config, numbered(task.y("train"), cluster)), start=start)


def with_new_head(task: Task, checkpoint: Checkpoint) -> Checkpoint:
    """Trunk and neck of a network under the head that the block starts with."""
    fresh = task.initial()
    fresh.model.trunk.load_state_dict(checkpoint.model.trunk.state_dict())
    fresh.model.neck.load_state_dict(checkpoint.model.neck.state_dict())
    return Checkpoint(fresh.model)


class Joint(Objective[Config]):
    """The classes' weighted loss, and gamma times that of the clusters."""

    def __init__(self, config: Config, partition: Indices) -> None:
        super().__init__(config)
        self.partition = partition

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.cluster = torch.from_numpy(self.partition).to(task.device)
        num = int(self.partition.max()) + 1
        with task.seeded("clusterfix"):
            self.auxiliary = nn.Linear(model.feature_dim, num).to(task.device)
        self.class_of = torch.empty(num, dtype=torch.long, device=task.device)
        self.class_of[self.cluster] = torch.from_numpy(task.y("train")).to(task.device)
        """Class (G,) of every cluster."""
        self.weights = ClusterWeights(
            self.cluster, momentum=self.config.momentum, by_size=self.config.rule == "eq8", cap=self.config.cap
        )

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model, "auxiliary": self.auxiliary}

    def loss(self, batch: Batch) -> Tensor:
        features = self.model.features(batch.x)
        of_class = F.cross_entropy(self.model.head(features), batch.y, reduction="none")
        cluster = self.cluster[batch.index]
        of_cluster = cluster_losses(self.auxiliary(features), batch.y, cluster, self.class_of)
        weights = self.weights.of(batch.index)
        self.weights.remember(batch.index, of_class + self.config.gamma * of_cluster)
        return (weights * of_class).mean() + self.config.gamma * of_cluster.mean()

    def state_dict(self) -> dict[str, Any]:
        return self.weights.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights.load_state_dict(state)


def cluster_losses(logits: Tensor, y: Tensor, cluster: Tensor, class_of: Tensor) -> Tensor:
    """Cross-entropy (B,) of each image's cluster among those of its class y, of logits (B, G) for all clusters.

    Columns of one class are that class's classifier; `class_of` (G,) says whose they are.
    """
    return F.cross_entropy(logits.masked_fill(class_of != y[:, None], -torch.inf), cluster, reduction="none")
