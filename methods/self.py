"""SELF: fine-tune the last layer on the few held-out images where ERM and a regularised ERM disagree most."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.annotations import Indices
from ..benchmark.budget import Requires
from ..benchmark.data import Sampler, weighted
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.spec import Recipe
from ..benchmark.task import Checkpoint, Predictor, Task
from .blocks.retraining import BASES, Base, base_network, head_recipe, pool_and_rest, retrained

Score = Literal["early_stop_disagreement", "dropout_disagreement", "early_stop_misclassification", "misclassification"]
SCORES = ("early_stop_disagreement", "dropout_disagreement", "early_stop_misclassification", "misclassification")
CANDIDATES = 10
"""How many times, equally far apart, the fine-tuned layer is looked at."""


@dataclass(frozen=True)
class Config:
    """`score` of an image: how far ERM is from its early self or from itself under dropout (disagreement), or the loss
    of either (misclassification); `points` are the images with the highest; `early_stop` is the share of training after
    which ERM is early, `dropout` the rate on its features; `lr` and `steps` (a multiple of 10) of the last layer's SGD;
    `base` is the block's ERM (`erm`), or one that draws the classes equally (`class_balanced`)."""

    score: Score = "early_stop_disagreement"
    points: Annotated[int, Search("{500,100,20}")] = 500
    early_stop: Annotated[float, Search("{0.5,0.2,0.1}")] = 0.5
    dropout: Annotated[float, Search("{0.5,0.7,0.9}")] = 0.5
    lr: Annotated[float, Search("{0.01,0.001,0.0001}")] = 1e-2
    steps: int = 250
    base: Base = "erm"

    def __post_init__(self) -> None:
        require(self.score in SCORES, f"self.score must be one of {', '.join(SCORES)}, got {self.score!r}")
        require(self.points >= 1, f"self.points must be at least 1, got {self.points}")
        require(0 < self.early_stop <= 1, f"self.early_stop must be in (0, 1], got {self.early_stop}")
        require(0 <= self.dropout < 1, f"self.dropout must be in [0, 1), got {self.dropout}")
        require(self.lr > 0, f"self.lr must be positive, got {self.lr}")
        whole = self.steps >= 1 and self.steps % CANDIDATES == 0
        require(whole, f"self.steps must be a positive multiple of {CANDIDATES}, got {self.steps}")
        require(self.base in BASES, f"self.base must be one of {', '.join(BASES)}, got {self.base!r}")


@method(
    "self",
    paper="LaBonte et al., Towards Last-layer Retraining for Group Robustness with Fewer Annotations, NeurIPS 2023",
    requires=Requires(native="select", uses_val=True),
    config=Config,
)
class SELF:
    """Network -> scores of half of validation -> the n highest -> its last layer, by SGD on class-balanced batches.

    The disagreement is `KL(p_regularised | p_ERM)`, which needs no label: only the n images' classes are billed. With
    misclassification, the cross-entropy of the network or of its early self, it is those of the half. Equal scores are
    drawn by lot. The other half of validation selects among ten looks at the layer, by the rung. No attribute is fitted
    on. Deviations: dropout falls on the features of a network that is in evaluation mode (there the whole network is in
    training mode, and it is BatchNorm that disagrees); an early class-balanced network is a training of its own; and
    those of CB-LLR, in features, momentum, default network, halves and recipe.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """Network, images, last layer."""
        network = base_network(task, self.config.base)
        pool, rest = pool_and_rest(task)
        chosen = pool[highest(self.scores(task, network, pool), self.config.points, task.rng("self"))]
        recipe = head_recipe(task.recipe, self.config.lr, CANDIDATES)
        return retrained(task, FineTuning(self.config.steps // CANDIDATES), network, (chosen, rest), recipe)

    def scores(self, task: Task, network: Checkpoint, pool: Indices) -> NDArray[np.float32]:
        """How much there is to learn from each image of the pool (m,)."""
        logits = task.logits(network, "val")[pool]
        if self.config.score == "dropout_disagreement":
            with task.seeded("self dropout"), torch.no_grad():
                features = F.dropout(task.features(network, "val")[pool], self.config.dropout)
                other = network.model.head(features.to(task.device)).cpu()
        elif self.config.score == "misclassification":
            other = logits
        else:
            epoch = max(1, round(self.config.early_stop * task.recipe.epochs))
            other = task.logits(base_network(task, self.config.base, epoch), "val")[pool]
        if self.config.score.endswith("disagreement"):
            return divergence(other, logits).numpy()
        y = torch.from_numpy(task.y("val", fit=pool)[pool])
        return F.cross_entropy(other, y, reduction="none").numpy()


class FineTuning(Objective[int]):
    """ERM on batches in which every class is equally likely; the configuration is the number of batches an epoch."""

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        y = torch.from_numpy(task.y("train"))
        return weighted(1 / y.bincount()[y].double(), recipe, draws=self.config * recipe.batch_size)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """`KL(p | q)` (n,) of the classes that logits (n, K) and reference logits predict."""
    log_p, log_q = logits.log_softmax(1), reference.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def highest(scores: NDArray[np.float32], n: int, rng: np.random.Generator) -> Indices:
    """Positions of the n highest scores (of all, if there are fewer), sorted; lots decide between equal ones."""
    order = rng.permutation(len(scores))
    return np.sort(order[np.argsort(-scores[order], kind="stable")[:n]])
