"""exmap: clusters of explanation heatmaps, which tell images apart by what the model looks at."""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...benchmark.annotations import Attributes, Held
from ...benchmark.backbones import Backbone
from ...benchmark.budget import Requires
from ...benchmark.errors import require
from ...benchmark.registry import source
from ...benchmark.spec import Card
from ...benchmark.task import Task
from ..blocks.clustering import default_neighbours, eigengap, kmeans, knn_graph, normalised, spectral
from ..blocks.lrp import explain, require_explainable

SIDE = 112
"""Heatmaps are compared at this side at most, the paper's for Waterbirds."""


@dataclass(frozen=True)
class Config:
    """`side` in pixels at which heatmaps are compared (0: the image's own, at most 112); `clustering` by the spectrum
    of the neighbour graph or by `kmeans` on the maps; `clusters` (0: from the eigengap, for kmeans 8); `scope` clusters
    all images together (`global`) or every class by itself (`local`)."""

    side: int = 0
    clustering: Literal["spectral", "kmeans"] = "spectral"
    clusters: int = 0
    scope: Literal["global", "local"] = "global"

    def __post_init__(self) -> None:
        require(self.side >= 0, f"exmap.side must be at least 0, got {self.side}")
        require(self.clusters >= 0, f"exmap.clusters must be at least 0, got {self.clusters}")


@source(
    "exmap",
    paper="Chakraborty et al., ExMap: Leveraging Explainability Heatmaps for Unsupervised Group Robustness, CVPR 2024",
    requires=Requires(native="none"),
    config=Config,
)
class ExMap:
    """LRP maps of the block's ERM for its predicted classes -> clusters; class and cluster make a pseudo-group.

    No attribute label goes in. Deviations: the ERM is its last epoch (the released code picks UrbanCars' with group
    labels of validation); what the host selects by follows the rung (there pseudo-groups); as a host DFR keeps its own
    settings (there groups of up to five images do not shrink the others: `dfr.n_min=5`); maps are compared at one side
    for all datasets (there 112, 56, 28 or 20 pixels); UMAP before k-means, its choice for CelebA, is not offered.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @staticmethod
    def check_model(model: Backbone, card: Card) -> None:
        """Raise `UserError` for a backbone that relevance cannot be propagated through."""
        require_explainable(model)

    def attributes(self, task: Task, split: Held) -> Attributes:
        """Cluster of every image of a split, as one pseudo-attribute."""
        identity = {**asdict(self.config), "side": self.side(task), "split": split}
        cluster = task.cached("partition", identity, lambda: {"cluster": self.clusters(task, split)})["cluster"]
        return Attributes(cluster[:, None], (int(cluster.max()) + 1,))

    def side(self, task: Task) -> int:
        """Side in pixels at which heatmaps are compared."""
        return self.config.side or min(*task.card.image[:2], SIDE)

    def clusters(self, task: Task, split: Held) -> NDArray[np.int64]:
        """Cluster (n,) of every image: one clustering of all, or one of each class."""
        points = heatmaps(task, split, self.side(task))
        y = task.y(split) if self.config.scope == "local" else np.zeros(len(points), np.int64)
        seed = int(task.rng("exmap").integers(2**31))
        cluster = np.zeros(len(points), np.int64)
        for label in np.unique(y):
            cluster[y == label] = self.partition(points[y == label], seed)
        return cluster

    def partition(self, points: NDArray[np.float32], seed: int) -> NDArray[np.int64]:
        """Cluster of each heatmap (n, D)."""
        if self.config.clustering == "kmeans":
            return kmeans(points, self.config.clusters or 8, seed)
        graph = knn_graph(points, default_neighbours(len(points)))
        return spectral(graph, self.config.clusters or eigengap(graph), seed)


def heatmaps(task: Task, split: Held, side: int) -> NDArray[np.float32]:
    """Normalised LRP maps (n, C * side * side) of a split's images by the block's ERM, computed once."""

    def make() -> dict[str, NDArray[np.float32]]:
        model = task.erm().model
        return {"points": np.concatenate([normalised(explain(model, x), side) for x in task.images(split)])}

    return task.cached("heatmaps", {"split": split, "side": side}, make)["points"]
