"""exmap: clusters of explanation heatmaps, which tell images apart by what the model looks at."""

from dataclasses import asdict, dataclass
from itertools import chain
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ...benchmark.annotations import Attributes, Held
from ...benchmark.backbones import Backbone
from ...benchmark.budget import Requires
from ...benchmark.errors import require
from ...benchmark.registry import source
from ...benchmark.search import Search
from ...benchmark.spec import Card
from ...benchmark.task import Task
from ..blocks.clustering import default_neighbours, eigengap, kmeans, knn_graph, merged, normalised, spectral
from ..blocks.explainers import Explainer, prepared, require_maps
from ..blocks.reduction import fit_umap, require_umap

SIDE = 112
"""Heatmaps are compared at this side at most, the paper's for Waterbirds."""
VALUES = 2**21
"""Pixel values of a batch that is explained, 13 images of 224 px: LRP keeps a gigabyte of a ResNet-18's maps for it."""


@dataclass(frozen=True)
class Config:
    """`explainer` makes the heatmaps (see `blocks/explainers.py`); `side` in pixels at which they are compared (0: the
    image's own, at most 112); `clustering` by the spectrum of the neighbour graph, by `kmeans` on the maps, or by
    k-means on two dimensions of `umap`; `clusters` (0: from the eigengap, else 8); `scope` clusters all images together
    (`global`) or every class by itself (`local`); a cluster of fewer than `merge` images joins the one with the
    nearest mean (0: none does)."""

    explainer: Explainer = "lrp"
    side: int = 0
    clustering: Annotated[Literal["spectral", "kmeans", "umap"], Search("{spectral,kmeans}")] = "spectral"
    clusters: int = 0
    scope: Annotated[Literal["global", "local"], Search("{global,local}")] = "global"
    merge: int = 0

    def __post_init__(self) -> None:
        for name in ("side", "clusters", "merge"):
            require(getattr(self, name) >= 0, f"exmap.{name} must be at least 0, got {getattr(self, name)}")


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
    for all datasets (there 112, 56, 28 or 20 pixels), and clustered by the spectrum for all (there CelebA by UMAP and
    k-means). CelebA as released is `exmap.side=20 exmap.clustering=umap`. Other explainers than LRP, and merging, are
    ours.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def check_model(self, model: Backbone, card: Card) -> None:
        """Raise `UserError` for a backbone that the explainer cannot explain, or where UMAP is missing."""
        height, width, channels = card.image
        require_maps(self.config.explainer, model, torch.zeros(1, channels, height, width))
        if self.config.clustering == "umap":
            require_umap()

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
        points = heatmaps(task, split, self.config.explainer, self.side(task))
        y = task.y(split) if self.config.scope == "local" else np.zeros(len(points), np.int64)
        seed = int(task.rng("exmap").integers(2**31))
        cluster = np.zeros(len(points), np.int64)
        for label in np.unique(y):
            cluster[y == label] = self.partition(points[y == label], seed)
        return cluster

    def partition(self, points: NDArray[np.float32], seed: int) -> NDArray[np.int64]:
        """Cluster of each heatmap (n, D); of two heatmaps or one, each is a cluster."""
        if len(points) < 3:
            return np.arange(len(points))
        neighbours, k = default_neighbours(len(points)), min(self.config.clusters, len(points))
        if self.config.clustering == "spectral":
            graph = knn_graph(points, neighbours)
            labels = spectral(graph, k or eigengap(graph))
        else:
            reduced = points if self.config.clustering == "kmeans" else fit_umap(points, neighbours, seed).embedding_
            labels = kmeans(reduced, k or min(8, len(points)), seed)
        return merged(points, labels, self.config.merge)


def heatmaps(task: Task, split: Held, explainer: Explainer, side: int) -> NDArray[np.float32]:
    """Normalised heatmaps (n, C * side * side) of a split's images by the block's ERM, computed once."""

    def make() -> dict[str, NDArray[np.float32]]:
        batches = task.images(split, max(1, VALUES // int(np.prod(task.card.image))))
        first = next(batches)
        explain = prepared(explainer, task.erm().model, first[:1])
        return {"points": np.concatenate([normalised(explain(x), side) for x in chain([first], batches)])}

    return task.cached("heatmaps", {"explainer": explainer, "split": split, "side": side}, make)["points"]
