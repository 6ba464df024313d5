"""clusters: per-class clusters of a network's features, the pseudo-attributes of BPA and ClusterFix."""

from dataclasses import dataclass

from ...benchmark.annotations import Attributes, Held
from ...benchmark.budget import Requires
from ...benchmark.registry import source
from ...benchmark.task import Task
from ..blocks.class_clusters import Clustering, joined_clusters, per_class_clusters


@dataclass(frozen=True)
class Config(Clustering):
    """As BPA clusters, or ClusterFix."""


@source(
    "clusters",
    paper="Seo et al., Unsupervised Learning of Debiased Representations with Pseudo-Attributes, CVPR 2022",
    requires=Requires(native="none"),
    config=Config,
)
class ClassClusters:
    """k-means of each class's features, scaled to unit length -> class and cluster make a pseudo-group.

    No attribute label goes in. It is called after what it makes, since `bpa` is the method that reweights them.
    Deviations from BPA: the best of ten Euclidean k-means of unit vectors (there one run, by the cosine of points and
    means); features of the block's evaluation transform. Papers cluster train only; here a validation image joins the
    nearest cluster of its class.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def attributes(self, task: Task, split: Held) -> Attributes:
        """Cluster of every image of a split within its class, as one pseudo-attribute."""
        number = (per_class_clusters if split == "train" else joined_clusters)(task, self.config)
        return Attributes(number[:, None], (self.config.clusters,))
