"""george: clusters of ERM's features within each class, which find the subclasses that it treats differently."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from ...benchmark.annotations import Attributes, Held
from ...benchmark.budget import Requires
from ...benchmark.errors import require
from ...benchmark.registry import source
from ...benchmark.search import Search
from ...benchmark.spec import Card, Recipe
from ...benchmark.task import Checkpoint, Task
from ..blocks.mixtures import Partition, Values, fit_mixture, overcluster
from ..blocks.reduction import (
    Points,
    Reducer,
    fit_pca,
    fit_umap,
    hardness,
    require_umap,
    residual,
    transform,
    unit_length,
)

NEIGHBOURS = 10
"""UMAP's, as published, with a `min_dist` of 0."""


@dataclass(frozen=True)
class Config:
    """`reduction` of a class's features: distance from the decision boundary (`hardness`), `pca`, `umap` (needs the
    extra) or `none`, the last three of features of length 1 (`normalise`); `components` kept (0: 1 of hardness, else
    2), of hardness all but the first by UMAP of what is orthogonal to the boundary; `clusterer`, a Gaussian mixture
    (`gmm`) or `kmeans`; `clusters` of each class (0: 2 to 10 by the silhouette); `factor` by which every cluster is
    split again where that pays (1: none is; 5 as published); `fit_on` the images of `train`, whose clusters those of
    validation are assigned to, or of the `split` whose attributes are asked for, with clusters of its own."""

    reduction: Annotated[Literal["hardness", "none", "pca", "umap"], Search("{hardness,umap}")] = "hardness"
    clusterer: Annotated[Literal["gmm", "kmeans"], Search("{gmm,kmeans}")] = "gmm"
    clusters: int = 0
    components: int = 0
    normalise: bool = True
    factor: int = 1
    fit_on: Literal["train", "split"] = "train"

    def __post_init__(self) -> None:
        require(self.clusters >= 0, f"george.clusters must be at least 0, got {self.clusters}")
        require(self.components >= 0, f"george.components must be at least 0, got {self.components}")
        require(self.factor >= 1, f"george.factor must be at least 1, got {self.factor}")

    def check(self, recipe: Recipe, card: Card) -> None:
        """Raise `UserError` where UMAP is asked for and missing."""
        if self.reduction == "umap" or (self.reduction == "hardness" and self.components > 1):
            require_umap()


@source(
    "george",
    paper="Sohoni et al., No Subclass Left Behind: Fine-Grained Robustness in Coarse-Grained Classification Problems, "
    "NeurIPS 2020",
    requires=Requires(native="none"),
    config=Config,
)
class George:
    """Features of the block's ERM, class by class -> fewer dimensions -> clusters; class and cluster make a group.

    No attribute label goes in. The defaults are what the code has for Waterbirds: a mixture of hardness alone, found on
    train, to which validation is assigned. `reduction=none`, `clusterer=kmeans` and `factor=5` are its CelebA,
    `reduction=umap` and `factor=5` its MNIST, and `dfr+george` with `reduction=umap` and `fit_on=split` is the ExMap
    paper's GEORGE(DFR). A part of a cluster that is split again stays if its silhouette is positive and higher than
    before, its mean loss no lower than its cluster's, and it has 25 images in train, 0.5 % of the class, and 25 in
    validation; the others are one cluster again. Of clusters found on validation the numbers are validation's alone.
    Where clusters are found on validation, or its images are counted, its class labels are billed.

    Deviations: the ERM is its last epoch and the block's for all datasets (there selected by re-weighted validation
    accuracy, which takes group labels, or for CelebA a network without ERM); what the host selects by follows the rung
    (there the worst cluster, for Waterbirds re-weighted too); hardness of more than two classes, which the code does
    not have, is the distance from the nearest boundary of the class; silhouettes are among 10,000 images at most; a
    class has fewer clusters than images, and of ten images or fewer principal components in place of UMAP. GroupDRO and
    DFR keep their own settings (there `groupdro.adjustment=2` for Waterbirds, 3 for CelebA; `dfr.n_min=5`).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def attributes(self, task: Task, split: Held) -> Attributes:
        """Cluster of every image of a split within its class, as one pseudo-attribute."""
        identity = {**asdict(self.config), "split": split}
        cluster = task.cached("partition", identity, lambda: {"cluster": self.clusters(task, split)})["cluster"]
        return Attributes(cluster[:, None], (int(cluster.max()) + 1,))

    def clusters(self, task: Task, split: Held) -> NDArray[np.int64]:
        """Cluster (n,) of every image of a split."""
        fitted: Held = split if self.config.fit_on == "split" else "train"
        held: Held | None = "val" if self.config.factor > 1 and fitted == "train" else None
        erm, seed = task.erm(), int(task.rng("george").integers(2**31))
        y = {part: task.y(part, fit=part in (fitted, held)) for part in (fitted, split, held) if part}
        features = {part: task.features(erm, part).numpy() for part in y}
        losses = example_losses(task, erm, fitted) if self.config.factor > 1 else np.zeros(len(y[fitted]))
        cluster = np.zeros(len(y[split]), np.int64)
        for label in np.unique(y[split]):
            of = {part: features[part][y[part] == label] for part in y}
            if len(of[fitted]) > 1:
                reduce = reducer(self.config, of[fitted], erm.model.head, label, seed)
                others = reduce(of[held]) if held else None
                partition = self.partition(reduce(of[fitted]), losses[y[fitted] == label], others, seed)
                cluster[y[split] == label] = partition.predict(reduce(of[split]))
        return cluster

    def partition(self, points: Points, losses: Values, held: Points | None, seed: int) -> Partition:
        """Clusters of the points (n, D) of one class, with its losses (n,) and its points of validation."""
        config = self.config
        found = fit_mixture(points, config.clusters, config.clusterer, seed)
        if config.factor == 1:
            return found
        return overcluster(found, points, losses, held, config.factor, config.clusterer, seed)


def example_losses(task: Task, checkpoint: Checkpoint, split: Held) -> Values:
    """Cross-entropy (n,) of every image of a split."""
    losses = F.cross_entropy(task.logits(checkpoint, split), torch.from_numpy(task.y(split)), reduction="none")
    return losses.double().numpy()


def reducer(config: Config, features: Points, head: nn.Linear, label: int, seed: int) -> Reducer:
    """What maps features (m, d) of class `label` to points (m, D), fitted on some of them; `head` is the classifier."""
    weight, bias = head.weight.numpy(force=True), head.bias.numpy(force=True)
    if config.reduction == "hardness":
        if config.components < 2:
            return lambda x: hardness(x, weight, bias, label)
        rest = embedding(residual(features, weight), config.components - 1, seed)
        return lambda x: np.hstack([hardness(x, weight, bias, label), rest(residual(x, weight))])
    scaled = unit_length if config.normalise else np.asarray
    if config.reduction == "none":
        return scaled
    inner = (embedding if config.reduction == "umap" else fit_pca)(scaled(features), config.components or 2, seed)
    return lambda x: inner(scaled(x))


def embedding(points: Points, components: int, seed: int) -> Reducer:
    """UMAP of points (n, D), or where they are too few for it their principal components."""
    if len(points) <= max(NEIGHBOURS, components + 1):
        return fit_pca(points, components, seed)
    return transform(fit_umap(points, NEIGHBOURS, seed, components, min_dist=0))
