"""Objectives over training environments: where an image comes from, and batches that hold all of them equally."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ...benchmark.backbones import Backbone
from ...benchmark.data import Sampler, stratified
from ...benchmark.engine import Objective
from ...benchmark.environments import EnvConfig
from ...benchmark.spec import Recipe
from ...benchmark.task import Task
from .precision import wide

ConfigT = TypeVar("ConfigT", bound=EnvConfig)


class EnvironmentObjective(Objective[ConfigT]):
    """An objective that compares environments.

    After `setup`, `e` (n,) is the environment of each image trained on, -1 where it is unknown (under `@masked`, or for
    added validation images), and `num_envs` how many there are. Batches hold equally many images of each environment
    (DomainBed's sampler, with the recipe's batch size in total); where some are unknown, each class equally likely.
    """

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        environments = task.environments(self.config.env)
        self.e, self.num_envs = torch.from_numpy(environments.index).to(task.device), environments.num
        self.masked = bool((self.e < 0).any())

    def risk(self, losses: Tensor, index: Tensor) -> Tensor:
        """Mean over environments of their mean loss, of the losses (B,) of images `index`; where the environments of
        some images are unknown the plain mean of all.
        """
        return losses.mean() if self.masked else environment_mean(losses, self.e[index])

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        if self.masked:
            self.sampler = "class"
            return super().make_sampler(task, recipe)
        return stratified(self.e.cpu(), recipe)


def membership(e: Tensor, num: int) -> Tensor:
    """Which images of a batch are of which of `num` environments, True or False (num, B); e (B,) may hold -1."""
    return e == torch.arange(num, device=e.device)[:, None]


def environment_mean(losses: Tensor, e: Tensor) -> Tensor:
    """Mean over the environments e (B,) in a batch of their mean loss, of losses (B,)."""
    weights = 1 / (e == e[:, None]).sum(1).to(losses)
    return (weights * losses).sum() / weights.sum()


def pair_mean(products: Tensor, present: Tensor) -> Tensor:
    """Mean of `|v_e - v_e'|^2` over pairs of environments, given the inner products (num, num) of the v.

    Pairs are made of those that are `present` (num,); without a pair it is 0.
    """
    squares = products.diag()
    pairs = (present & present[:, None]).triu(1)
    return (pairs * (squares + squares[:, None] - 2 * products)).sum() / pairs.sum().clamp(min=1)


def environment_distance(distance: Callable[[Tensor, Tensor], Tensor], features: Tensor, e: Tensor, num: int) -> Tensor:
    """`distance(features, membership)` of features (B, d), in float32 or wider whatever the precision of training.

    Distances are small differences of large sums.
    """
    with torch.autocast(features.device.type, enabled=False):
        return distance(wide(features), membership(e, num))
