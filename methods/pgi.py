"""PGI: predictions that are the same, on average over a class, on both sides of a split that is inferred."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch, Sampler
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.spec import Card, Recipe
from ..benchmark.task import Checkpoint, Predictor, Task
from .blocks.environments import membership
from .blocks.partition import partition
from .blocks.precision import wide

FIRST = 1
"""Epochs of ERM before the split."""
EPSILON = 1e-12
"""Smallest mean probability, as released."""


@dataclass(frozen=True)
class Config:
    """`weight` lambda of the penalty, which grows from 0 over the first `ramp_epochs` U after the split (0: it does not
    have to grow); `kappa` of the gradients in what the split maximises."""

    weight: Annotated[float, Search("{50,10,1,100}")] = 50.0
    kappa: Annotated[float, Search("{0.1,10,0.001}")] = 0.1
    ramp_epochs: Annotated[int, Search("{5,1}")] = 5

    def __post_init__(self) -> None:
        for name in ("weight", "kappa", "ramp_epochs"):
            require(getattr(self, name) >= 0, f"pgi.{name} must be at least 0, got {getattr(self, name)}")

    def check(self, recipe: Recipe, card: Card) -> None:
        """Raise `UserError` unless there is an epoch left after the split."""
        require(recipe.epochs > FIRST, f"pgi needs at least 2 epochs, the first before its split, got {recipe.epochs}")


@method(
    "pgi",
    paper="Ahmed et al., Systematic Generalisation with Group Invariant Predictions, ICLR 2021",
    requires=Requires(native="select"),
    config=Config,
)
class PGI:
    """An epoch of ERM -> a split of every class -> `(R_0 + R_1) / 2 + lambda_t sum_c KL(p_c1 || p_c0) / K`.

    R are the mean cross-entropies of the two sides, p_cb the mean prediction for the batch's images of class c on side
    b, 1 being the side of the larger loss. The penalty teaches trunk and neck, not the head; a class without images on
    one of its sides has none, a side without any image no risk. The split maximises the class's risks and how they
    would change with the logits' scale, by a network on the features that the first epoch left.

    As released, KL is divided by the number of classes. Deviations: the first epoch is the shared ERM's, billed as one
    of its epochs, after which the optimiser starts anew and the recipe's schedule goes on (there one training); batches
    are those of epochs (there drawn independently); layer norms of the split's networks scale too; a class that is left
    in one piece lies on side 0 (there on either); the epoch is selected by the rung among those after the split.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """An epoch, the split, and the other epochs."""
        first = task.erm(epoch=FIRST)
        side = task.cached("split", {"kappa": self.config.kappa}, lambda: split(task, first, self.config.kappa))["side"]
        recipe = replace(task.recipe, epochs=task.recipe.epochs - FIRST)
        return task.train(Invariant(self.config, side), stage="second", recipe=recipe, start=first)


def split(task: Task, first: Checkpoint, kappa: float) -> dict[str, NDArray[np.bool_]]:
    """Side of each train image (n,)."""
    features, logits = task.features(first, "train"), task.logits(first, "train")
    with task.seeded("pgi split"):
        return {"side": partition(features, logits, torch.from_numpy(task.y("train")), kappa).numpy()}


class Invariant(Objective[Config]):
    """Training after the split, given the side of each train image (n,)."""

    def __init__(self, config: Config, side: NDArray[np.bool_]) -> None:
        super().__init__(config)
        self.side = torch.from_numpy(side.astype(np.int64))

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.side = self.side.to(task.device)
        self.steps = 0

    def lr_factor(self, recipe: Recipe, epoch: float) -> float:
        return super().lr_factor(replace(recipe, epochs=recipe.epochs + FIRST), epoch + FIRST)

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        sampler = super().make_sampler(task, recipe)
        self.ramp_steps = self.config.ramp_epochs * len(sampler(torch.Generator()))
        return sampler

    def loss(self, batch: Batch) -> Tensor:
        features, side = self.model.features(batch.x), self.side[batch.index]
        losses = F.cross_entropy(self.model.head(features), batch.y, reduction="none")
        fixed = {name: value.detach() for name, value in self.model.head.named_parameters()}
        predictions = wide(functional_call(self.model.head, fixed, features)).softmax(1)
        strength = self.config.weight * (min(1.0, self.steps / self.ramp_steps) if self.ramp_steps else 1.0)
        self.steps += 1
        return side_balanced(losses, side) + strength * divergence(predictions, batch.y, side)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def side_balanced(losses: Tensor, side: Tensor) -> Tensor:
    """Half the sum of the sides' mean losses, of losses and sides (B,); that of an empty side is 0."""
    member = membership(side, 2)
    return ((member * losses).sum(1) / member.sum(1).clamp(min=1)).sum() / 2


def divergence(p: Tensor, y: Tensor, side: Tensor) -> Tensor:
    """`sum_c KL(p_c1 || p_c0) / K`, p_cb the mean of predictions p (B, K) over images of class c on side b.

    Over the classes that have images on both sides.
    """
    classes = p.shape[1]
    member = membership(2 * y + side, 2 * classes)
    means = member.to(p) @ p / member.sum(1, keepdim=True).clamp(min=1)
    easy, hard = means.clamp(EPSILON, 1 - EPSILON).view(classes, 2, classes).unbind(1)
    both = member.any(1).view(classes, 2).all(1)
    return torch.where(both, (hard * (hard / easy).log()).mean(1), 0.0).sum()
