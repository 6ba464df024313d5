"""LLE: a classifier for each known kind of shift, mixed by a network that tells which shift it sees."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch, Sampler, random_order
from ..benchmark.engine import Objective
from ..benchmark.registry import NoConfig, method
from ..benchmark.spec import Recipe
from ..benchmark.task import Predictor, Task


@method(
    "lle",
    paper="Li et al., A Whac-A-Mole Dilemma: Shortcuts Come in Multiples Where Mitigating One Amplifies Others, "
    "CVPR 2023",
    requires=Requires(rendered=True),
)
class LLE:
    """`CE(head_s(phi), y) + CE(D(phi), s)`, end to end; predicts with `sum_s softmax(D(phi))_s head_s(phi)` (logits).

    Shift s = 0 are the images as they are, s = j those whose j-th shortcut is another class's. An epoch is as many
    draws without replacement from all of them together as there are images, so it has the steps of ERM.

    It fits on no attribute, but whoever can render such images knows what the shortcuts are: they are counted beside
    the labels. Deviations: an intervention is rendered once, with all else kept (the released code composes anew in
    every epoch, and takes the other shortcut from another image of the same class); the first head starts as the
    block's (there all start anew); the block's recipe, selection by the rung.
    """

    def __init__(self, config: NoConfig) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """One training on images and interventions."""
        pool, shift = task.with_interventions()
        return pool.train(Ensemble(shift))


class Ensemble(Objective[NDArray[np.int64]]):
    """The training; its configuration is the shift (m,) of each image."""

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.shift = torch.from_numpy(self.config).to(task.device)
        with task.seeded("shifts"):
            self.mixture = Mixture(model.head, int(self.config.max()) + 1).to(task.device)
        model.register_module("head", self.mixture)  # evaluation, selection and prediction are then by the mixture

    def loss(self, batch: Batch) -> Tensor:
        features, shift = self.model.features(batch.x), self.shift[batch.index]
        return ensemble_loss(self.mixture.each(features), self.mixture.shift(features), batch.y, shift)

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        return random_order(len(self.config), recipe, draws=int((self.config == 0).sum()))


class Mixture(nn.Module):
    """A linear head for each of `num` shifts, the first of which is given, and a predictor of the shift."""

    def __init__(self, head: nn.Linear, num: int) -> None:
        super().__init__()
        fresh = (nn.Linear(head.in_features, head.out_features) for _ in range(num - 1))
        self.heads = nn.ModuleList([head, *fresh])
        self.shift = nn.Linear(head.in_features, num)

    def each(self, features: Tensor) -> Tensor:
        """Logits (B, D, K) of every head for features (B, d)."""
        return torch.stack([head(features) for head in self.heads], dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K), mixed."""
        return mixed(self.each(features), self.shift(features))


def mixed(logits: Tensor, shift_logits: Tensor) -> Tensor:
    """Mean (B, K) of the heads' logits (B, D, K), each weighted by the probability of its shift, logits (B, D)."""
    return (shift_logits.softmax(1)[:, :, None] * logits).sum(1)


def ensemble_loss(logits: Tensor, shift_logits: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    """Cross-entropy of the head of each image's own shift (B,) alone, plus that of predicting the shift."""
    own = logits[torch.arange(len(y), device=y.device), shift]
    return F.cross_entropy(own, y) + F.cross_entropy(shift_logits, shift)
