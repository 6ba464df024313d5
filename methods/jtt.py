"""JTT: train again, with the images that an early ERM got wrong drawn more often."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..benchmark.budget import Requires
from ..benchmark.data import Sampler, weighted
from ..benchmark.engine import Objective
from ..benchmark.errors import UserError, require
from ..benchmark.registry import method
from ..benchmark.spec import Card, Recipe
from ..benchmark.task import Predictor, Task
from .blocks.first_run import misclassified, require_epochs


@dataclass(frozen=True)
class Config:
    """`first_epochs` T is the length of the identification run; `upweight` lambda is an error's total weight."""

    first_epochs: int = 1
    upweight: float = 50.0

    def __post_init__(self) -> None:
        require(self.first_epochs >= 1, f"jtt.first_epochs must be at least 1, got {self.first_epochs}")
        require(self.upweight > 0, f"jtt.upweight must be positive, got {self.upweight}")

    def check(self, recipe: Recipe, card: Card) -> None:
        """Raise `UserError` unless the first run fits into the recipe."""
        require_epochs("jtt.first_epochs", self.first_epochs, recipe)


@method(
    "jtt",
    paper="Liu et al., Just Train Twice: Improving Group Robustness without Training Group Information, ICML 2021",
    requires=Requires(native="select"),
    config=Config,
)
class JTT:
    """ERM for T epochs -> error set E -> ERM from the same initial weights with the images of E weighted by lambda.

    Deviations: errors are recomputed in evaluation mode after T epochs (the released code logs them while training);
    lambda is the total weight (there lambda + 1); an epoch stays n draws with P(i) proportional to the weights, so that
    all methods take the same steps (there an epoch grows by lambda |E|); the recipe is the block's for both runs, hence
    the first run is a prefix of the shared ERM and is billed as T of its epochs.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """Both runs."""
        first = task.erm(epoch=self.config.first_epochs)
        errors = misclassified(task, first, "train")
        return task.train(Upweighted(error_weights(errors, self.config.upweight)), stage="second")


class Upweighted(Objective[NDArray[np.float64]]):
    """ERM on images drawn in proportion to given weights (n,)."""

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        return weighted(torch.from_numpy(self.config), recipe)


def error_weights(errors: NDArray[np.bool_], upweight: float) -> NDArray[np.float64]:
    """Weight `upweight` for errors, 1 for the rest; raises `UserError` when there is no error to upweight."""
    if not errors.any():
        raise UserError(
            "jtt: the first run makes no training error, so there is nothing to upweight; lower first_epochs"
        )
    return np.where(errors, upweight, 1.0)
