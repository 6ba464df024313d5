"""Barlow Twins: a network trained without labels, on two views of every image (the first stage of ClusterFix).

Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021. Size of the embedding, batch
and learning rate are those of Capitani et al., ClusterFix, WACV 2024.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...benchmark.backbones import Backbone
from ...benchmark.data import Batch, Sampler, random_order
from ...benchmark.engine import Objective
from ...benchmark.spec import Recipe
from ...benchmark.task import Checkpoint, Task
from .views import two_views

WIDTH = 1024
"""Dimension of the embedding, and of the projector's hidden layers."""
OFF_DIAGONAL = 0.0051
BATCH, WEIGHT_DECAY, WARM_UP = 256, 1e-6, 10
"""Images a step, and the SGD's settings; its rate rises over that many epochs and stays."""


def barlow_twins(task: Task, epochs: int, lr: float) -> Checkpoint:
    """A network trained on the images of train for so many epochs (0: the recipe's), once for all runs of the block.

    It starts from the block's initial weights, and its head keeps them. ClusterFix leaves open epochs, projector,
    views, momentum, weight decay and the weight off the diagonal: these are Barlow Twins' own, but for the epochs, and
    the warm-up without which SGD diverges at this rate. Deviations from Barlow Twins: SGD (there LARS, with cosine
    decay), whole batches only, since the loss of a small rest would depend on its size, and views as in `views`.
    """

    def make() -> Checkpoint:
        own = task.recipe
        recipe = replace(
            own,
            optimizer="sgd",
            lr=lr,
            momentum=0.9,
            weight_decay=WEIGHT_DECAY,
            batch_size=min(BATCH, task.size("train")),
            epochs=epochs or own.epochs,
            schedule="constant",
        )
        return task.train_network(BarlowTwins(None), task.initial().model, "ssl", recipe=recipe)

    return task.shared_network("barlow_twins", {"epochs": epochs, "lr": lr}, make)


class BarlowTwins(Objective[None]):
    """`sum_i (1 - C_ii)^2 + 0.0051 sum_{i != j} C_ij^2`, C the correlations of two views' embeddings over the batch."""

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        with task.seeded("barlow twins"):
            self.projector = projector(model.feature_dim, WIDTH).to(task.device)

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model, "projector": self.projector}

    def lr_factor(self, recipe: Recipe, epoch: float) -> float:
        return min(1.0, epoch / WARM_UP)

    def transform(self, recipe: Recipe, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        return two_views(generator)

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        batches = random_order(task.size("train"), recipe)
        return lambda generator: [index for index in batches(generator) if len(index) >= recipe.batch_size]

    def loss(self, batch: Batch) -> Tensor:
        # View by view, since BatchNorm in the trunk is to see one kind of image at a time.
        first, second = (self.projector(self.model.features(view)) for view in batch.x.unbind(1))
        return redundancy(first, second, OFF_DIAGONAL)


def projector(features: int, width: int) -> nn.Sequential:
    """Three linear layers without bias, with BatchNorm and ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise((features, width, width, width)):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


def redundancy(first: Tensor, second: Tensor, off_diagonal: float) -> Tensor:
    """`sum_i (1 - C_ii)^2 + off_diagonal sum_{i != j} C_ij^2` of embeddings (B, D), in float32.

    C (D, D) are the correlations of their dimensions: `C_ij = mean_b z_bi z'_bj`, standardised over the batch.
    """
    with torch.autocast(first.device.type, enabled=False):
        z, other = (F.batch_norm(part.float(), None, None, training=True) for part in (first, second))
        correlations = z.T @ other / len(z)
    diagonal = correlations.diagonal()
    apart = correlations.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + off_diagonal * apart
