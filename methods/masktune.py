"""MaskTune: fine-tune an ERM for an epoch on images whose pixels that it attends to most are black."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.backbones import Backbone, normalization
from ..benchmark.budget import Requires
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.spec import Card, Recipe
from ..benchmark.task import Predictor, Task
from .blocks.grad_cam import map_size, predicted_cam
from .blocks.masks import removed


@dataclass(frozen=True)
class Config:
    """A pixel is masked above `mean + multiplier * std` of the positive part of its image's map (`multiplier`); `lr` of
    the fine-tuning (None: that of the recipe's last epoch, at its start), which is constant; `iterations` of masking
    and fine-tuning, each of which masks what its predecessors left."""

    multiplier: Annotated[float, Search("{2,1,3}")] = 2.0
    lr: Annotated[float | None, Search("{1e-5,1e-4}")] = None  # None itself is draw 0
    iterations: int = 1

    def __post_init__(self) -> None:
        require(self.multiplier >= 0, f"masktune.multiplier must be at least 0, got {self.multiplier}")
        require(self.lr is None or self.lr > 0, f"masktune.lr must be positive, got {self.lr}")
        require(1 <= self.iterations <= 3, f"masktune.iterations must be 1, 2 or 3, got {self.iterations}")


@method(
    "masktune",
    paper="Asgari et al., MaskTune: Mitigating Spurious Correlations by Forcing to Explore, NeurIPS 2022",
    requires=Requires(native="none"),
    config=Config,
)
class MaskTune:
    """Shared ERM -> XGrad-CAM of its predicted class -> images without what is hottest -> one epoch of ERM on them.

    All layers learn, from masked images alone, which are black (raw 0) where they are masked and are augmented after
    that. Masks are made on the way, of the very images that are masked: nothing is stored, and the i-th iteration is
    billed i forward passes an image for them. Deviations: the masking ERM is the block's last epoch, chosen by no label
    (there the one of best validation accuracy); the optimiser starts anew (there its state is kept); maps are those of
    the stored image under its evaluation transform (the released masks are shifted against the images); no image is
    compressed again; the block's recipe and its pretraining (the released Waterbirds script starts from nothing);
    selection by the rung, among the epochs of the last iteration, hence of one. Not offered: abstaining where the two
    models disagree.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @staticmethod
    def check_model(model: Backbone, card: Card) -> None:
        """Raise `UserError` where a map has one pixel, which is never hotter than the rest."""
        require(map_size(model, card) != (1, 1), f"masktune: maps of {model.name} have one pixel for {card.name}")

    def fit(self, task: Task) -> Predictor:
        """ERM, then mask and tune."""
        recipe = tuning_recipe(task.recipe, self.config.lr)
        start, masking = task.erm(), list[Backbone]()
        for _ in range(self.config.iterations):
            masking.append(start.model.eval())
            tuned = task.train(Masked(self.config, masking), stage="masked", recipe=recipe, start=start)
            start = tuned.checkpoint
        return tuned


class Masked(Objective[Config]):
    """ERM on images that were masked by each of some networks in turn."""

    def __init__(self, config: Config, masking: Sequence[Backbone]) -> None:
        super().__init__(config)
        self.masking = tuple(masking)

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        mean, std = normalization(model, task.card)
        self.mean, self.std = (torch.tensor(part, device=task.device).view(1, -1, 1, 1) for part in (mean, std))

    def transform(self, recipe: Recipe, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        augmented = super().transform(recipe, generator)

        def masked(x: Tensor) -> Tensor:
            for model in self.masking:
                _, heat = predicted_cam(model, (x - self.mean) / self.std)
                x = removed(x, kept(heat, (x.shape[2], x.shape[3]), self.config.multiplier), x.new_zeros(()))
            return augmented(x) if augmented else x

        return masked


def tuning_recipe(recipe: Recipe, lr: float | None) -> Recipe:
    """One epoch at a constant rate, by default the one that the recipe's last epoch starts with."""
    last = recipe.lr * Objective(None).lr_factor(recipe, recipe.epochs - 1)
    return replace(recipe, epochs=1, schedule="constant", lr=lr or last)


def kept(heat: Tensor, size: tuple[int, int], multiplier: float) -> Tensor:
    """True (B, 1, H, W) on the pixels that stay: those up to the threshold of their map `heat` (B, h, w).

    Its positive part is scaled to [0, 1] and resized, bilinear. A map that is the same everywhere masks nothing.
    """
    positive = heat.relu()
    low, high = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
    scaled = (positive - low) / (high - low).clamp(min=torch.finfo(heat.dtype).tiny)
    resized = F.interpolate(scaled[:, None], size, mode="bilinear", align_corners=False)
    return resized <= threshold(resized, multiplier)


def threshold(heat: Tensor, multiplier: float) -> Tensor:
    """`mean + multiplier * std` (B, 1, 1, 1) of the positive pixels of maps (B, 1, H, W) that are nowhere negative.

    The deviation is the population's. In float64, in which the mean of equal pixels is that pixel.
    """
    exact, positive = heat.double(), heat > 0
    count = positive.sum((2, 3), keepdim=True).clamp(min=1)
    mean = exact.sum((2, 3), keepdim=True) / count
    variance = ((exact - mean) ** 2 * positive).sum((2, 3), keepdim=True) / count
    return mean + multiplier * variance.sqrt()
