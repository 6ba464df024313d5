"""Objectives over training environments: where an image comes from, and batches that hold all of them equally."""

from typing import TypeVar

import torch
from torch import Tensor

from ...benchmark.backbones import Backbone
from ...benchmark.data import Sampler, stratified
from ...benchmark.engine import Objective
from ...benchmark.environments import EnvConfig
from ...benchmark.spec import Recipe
from ...benchmark.task import Task

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

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        if (self.e < 0).any():
            self.sampler = "class"
            return super().make_sampler(task, recipe)
        return stratified(self.e.cpu(), recipe)


def members(e: Tensor) -> list[Tensor]:
    """Positions in a batch of the images of each environment that it holds, by its number; e (B,) may hold -1."""
    return [(e == number).nonzero()[:, 0] for number in torch.unique(e[e >= 0])]


def environment_mean(losses: Tensor, e: Tensor) -> Tensor:
    """Mean over environments of their mean loss, of losses (B,); where an environment is unknown the plain mean."""
    if (e < 0).any():
        return losses.mean()
    return torch.stack([losses[rows].mean() for rows in members(e)]).mean()
