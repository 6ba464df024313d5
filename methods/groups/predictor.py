"""predictor: attributes predicted for all images by a network trained on the granted ones (what @pseudo stands for)."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...benchmark.annotations import Attributes, Groups, Held
from ...benchmark.backbones import Backbone
from ...benchmark.budget import Requires
from ...benchmark.data import Batch, Sampler, weighted
from ...benchmark.engine import Objective
from ...benchmark.registry import source
from ...benchmark.spec import Recipe
from ...benchmark.task import Task


@dataclass(frozen=True)
class Config:
    """`balanced` draws the classes of the annotated images equally often, and within a class its groups, as BARACK
    does; it takes class labels of validation."""

    balanced: bool = False


@source(
    "predictor",
    paper="after Nam et al., Spread Spurious Attribute, ICLR 2022, and Sohoni et al., BARACK, 2022",
    requires=Requires(fit="val", native="val-5"),
    config=Config,
)
class AttributePredictor:
    """One network of the block's family predicts every granted attribute from the image; known values stay as they are.

    It is trained under the block's recipe on all granted images, for as many steps as ERM, from the initial weights of
    the block's pretraining with a head of its own, and its last epoch is kept: nothing is selected, so no image has to
    be held out. Plain cross-entropy, summed over attributes; it is not told the classes, and images are
    not drawn by them unless `balanced`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def attributes(self, task: Task, split: Held) -> Attributes:
        """Predicted attributes of all images of a split, true ones where they are granted."""
        known = task.annotated(split)
        true = task.attributes(split, known)
        logits = torch.from_numpy(attribute_logits(task, self.config.balanced)[split])
        parts = logits.split(true.sizes, dim=1)  # type: ignore[no-untyped-call]
        values = np.stack([part.argmax(1).numpy() for part in parts], axis=1)
        values[known] = true.values
        return Attributes(values, true.sizes)


def attribute_logits(task: Task, balanced: bool) -> dict[str, NDArray[np.float32]]:
    """Logits (n, V) of train and validation: those of each granted attribute's values, one attribute after the other.

    The network is trained once for all runs of the block that have the same attributes.
    """
    return task.cached("predictor", {"balanced": balanced}, lambda: predict(task, balanced), labelled=True)


def predict(task: Task, balanced: bool) -> dict[str, NDArray[np.float32]]:
    """Train the network, and apply it to train and validation."""
    annotated = task.on(task.annotated("train"), task.annotated("val"), labels=balanced)
    objective = AttributeLoss(Config(balanced), task.size("train"))
    num = sum(annotated.attributes("train").sizes)
    trained = annotated.train_network(objective, task.network(num, "predictor"), "predictor")
    return {"train": task.logits(trained, "train").numpy(), "val": task.logits(trained, "val").numpy()}


class AttributeLoss(Objective[Config]):
    """Cross-entropy of every attribute, summed, on so many `draws` an epoch."""

    def __init__(self, config: Config, draws: int) -> None:
        super().__init__(config)
        self.draws = draws

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        known = task.attributes("train")
        self.sizes = known.sizes
        self.values = torch.from_numpy(known.values).to(task.device)

    def loss(self, batch: Batch) -> Tensor:
        parts = self.model(batch.x).split(self.sizes, dim=1)
        values = self.values[batch.index]
        return torch.stack([F.cross_entropy(part, values[:, j]) for j, part in enumerate(parts)]).sum()

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        weights = np.ones(task.size("train"))
        if self.config.balanced:
            weights = balanced_weights(task.y("train"), task.groups("train"))
        return weighted(torch.from_numpy(weights), recipe, draws=self.draws)


def balanced_weights(y: NDArray[np.int64], groups: Groups) -> NDArray[np.float64]:
    """Weights (n,) with which all classes are drawn equally often, and within a class all groups that it has.

    `1 / (G_y n_g)` with G_y groups in class y, and n_g images in group g.
    """
    _, first = np.unique(groups.index, return_index=True)
    groups_of_class = np.bincount(y[first])
    weights: NDArray[np.float64] = 1 / (groups_of_class[y] * groups.counts()[groups.index])
    return weights
