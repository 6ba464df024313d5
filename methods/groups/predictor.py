"""predictor: attributes predicted for all images by a network trained on the granted ones (what @pseudo stands for)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...benchmark.annotations import Attributes, Held
from ...benchmark.backbones import Backbone
from ...benchmark.budget import Requires
from ...benchmark.data import Batch, Sampler, weighted
from ...benchmark.engine import Objective
from ...benchmark.registry import NoConfig, source
from ...benchmark.spec import Recipe
from ...benchmark.task import Task


@source(
    "predictor",
    paper="after Nam et al., Spread Spurious Attribute, ICLR 2022, and Sohoni et al., BARACK, 2022",
    requires=Requires(fit="val", native="val-5"),
)
class AttributePredictor:
    """One network of the block's family predicts every granted attribute from the image; known values stay as they are.

    It is trained under the block's recipe on all granted images, for as many steps as ERM, from the initial weights of
    the block's pretraining with a head of its own, and its last epoch is kept: nothing is selected, so no image has to
    be held out. Plain cross-entropy, summed over attributes; it is not told the classes.
    """

    def __init__(self, config: NoConfig) -> None:
        self.config = config

    def attributes(self, task: Task, split: Held) -> Attributes:
        """Predicted attributes of all images of a split, true ones where they are granted."""
        known = task.annotated(split)
        true = task.attributes(split, known)
        found = task.cached("predictor", None, lambda: predict(task), labelled=True)
        values = found[split].copy()
        values[known] = true.values
        return Attributes(values, true.sizes)


def predict(task: Task) -> dict[str, NDArray[np.int64]]:
    """Predicted attributes (n, k) of train and validation."""
    annotated = task.on(task.annotated("train"), task.annotated("val"), labels=False)
    objective = AttributeLoss(task.size("train"))
    sizes = annotated.attributes("train").sizes
    trained = annotated.train_network(objective, task.network(sum(sizes), "predictor"), "predictor")

    def predicted(split: Held) -> NDArray[np.int64]:
        logits = task.logits(trained, split).split(sizes, dim=1)  # type: ignore[no-untyped-call]
        return np.stack([part.argmax(1).numpy() for part in logits], axis=1)

    return {"train": predicted("train"), "val": predicted("val")}


class AttributeLoss(Objective[int]):
    """Cross-entropy of every attribute, summed; the configuration is the number of draws an epoch."""

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
        return weighted(torch.ones(task.size("train")), recipe, draws=self.config)
