"""Clusters of every class by itself, by the features of a network: the pseudo-attributes of BPA and ClusterFix.

Seo et al., Unsupervised Learning of Debiased Representations with Pseudo-Attributes, CVPR 2022; Capitani et al.,
ClusterFix: A Cluster-Based Debiasing Approach without Protected-Group Supervision, WACV 2024.
"""

import warnings
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from torch.nn import functional as F

from ...benchmark.annotations import Held
from ...benchmark.errors import require
from ...benchmark.search import Search
from ...benchmark.spec import Card, Recipe
from ...benchmark.task import Checkpoint, Task
from .barlow_twins import barlow_twins
from .clustering import Labels, Points, kmeans

Init = Literal["erm", "pretrained", "ssl"]
Clusters = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Clustering:
    """`clusters` K in every class, of the features of the network `init`: the block's ERM after its last epoch (`erm`),
    its initial weights (`pretrained`), or one trained without labels, by Barlow Twins (`ssl`), for `ssl_epochs` (0: the
    recipe's) at the rate `ssl_lr` (the paper's is for a ResNet-18; small networks want less, e.g. 0.006)."""

    clusters: Annotated[int, Search("{8,4,16}")] = 8
    init: Init = "erm"
    ssl_epochs: int = 0
    ssl_lr: float = 0.6

    name: ClassVar[str] = "clusters"
    """Of the entry whose settings these are."""

    def __post_init__(self) -> None:
        known = ", ".join(get_args(Init))
        require(self.clusters >= 1, f"{self.name}.clusters must be at least 1, got {self.clusters}")
        require(self.init in get_args(Init), f"{self.name}.init must be one of {known}, got {self.init!r}")
        require(self.ssl_epochs >= 0, f"{self.name}.ssl_epochs must be at least 0, got {self.ssl_epochs}")
        require(self.ssl_lr > 0, f"{self.name}.ssl_lr must be positive, got {self.ssl_lr}")

    def check(self, recipe: Recipe, card: Card) -> None:
        """Raise `UserError` where two views are wanted of features, which are no images."""
        images = min(card.image[:2]) > 1
        require(images or self.init != "ssl", f"{self.name}.init: {card.name} has no images; take erm or pretrained")

    def network(self, task: Task) -> Checkpoint:
        """The network whose features are clustered."""
        if self.init == "ssl":
            return barlow_twins(task, self.ssl_epochs, self.ssl_lr)
        return task.erm() if self.init == "erm" else task.initial()

    def identity(self, split: Held) -> list[str | int | float]:
        """All that the clusters of a split depend on."""
        own: list[str | int | float] = [split, self.clusters, self.init]
        return [*own, self.ssl_epochs, self.ssl_lr] if self.init == "ssl" else own


def per_class_clusters(task: Task, settings: Clustering) -> Labels:
    """Cluster (n,) of every image of train, numbered from 0 within its class; computed once for all runs of a block."""

    def make() -> Clusters:
        points = directions(task, settings.network(task), "train")
        seed = int(task.rng("class clusters").integers(2**31))
        return {"cluster": partition(points, task.y("train"), settings.clusters, seed)}

    return task.cached("class_clusters", settings.identity("train"), make)["cluster"]


def joined_clusters(task: Task, settings: Clustering) -> Labels:
    """Cluster (n_val,) of every image of validation: the nearest of its class in train, by their means."""

    def make() -> Clusters:
        network, cluster = settings.network(task), per_class_clusters(task, settings)
        train, val = directions(task, network, "train"), directions(task, network, "val")
        return {"cluster": nearest(val, task.y("val"), train, task.y("train"), cluster)}

    return task.cached("class_clusters", settings.identity("val"), make)["cluster"]


def directions(task: Task, model: Checkpoint, split: Held) -> Points:
    """Features (n, d) as unit vectors: their squared distances are twice their cosine distances."""
    points: Points = F.normalize(task.features(model, split), dim=1).numpy()
    return points


def partition(points: Points, y: Labels, k: int, seed: int) -> Labels:
    """k-means of each class: clusters (n,) numbered within the class, fewer than k where it has fewer points."""
    cluster = np.zeros(len(points), np.int64)
    for label in np.unique(y):
        own = points[y == label]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of copies: then there are fewer clusters
            cluster[y == label] = kmeans(own, min(k, len(own)), seed)
    return cluster


def nearest(points: Points, y: Labels, members: Points, label: Labels, cluster: Labels) -> Labels:
    """Cluster of each point (n, d) among those of its class y, given the members (m, d), their label and cluster.

    It is the one with the nearest mean; a class without members has cluster 0.
    """
    found = np.zeros(len(points), np.int64)
    for own in np.intersect1d(y, label):
        here = label == own
        means = np.stack([members[here & (cluster == c)].mean(0) for c in range(cluster[here].max() + 1)])
        found[y == own] = (np.square(means).sum(1) - 2 * points[y == own] @ means.T).argmin(1)
    return found


def numbered(y: Labels, cluster: Labels) -> Labels:
    """Pairs of class and cluster (n,), numbered from 0 without a gap, class by class."""
    numbers: Labels = np.unique(y * (cluster.max() + 1) + cluster, return_inverse=True)[1].reshape(-1)
    return numbers
