"""Last layers retrained on one half of validation by class labels and selected by the other."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ...benchmark.annotations import Indices
from ...benchmark.engine import Objective
from ...benchmark.spec import Recipe
from ...benchmark.task import Checkpoint, Predictor, Task

Base = Literal["erm", "class_balanced"]
BASES = ("erm", "class_balanced")
Halves = tuple[Indices, Indices]
"""Images of validation to train on, and those to select by."""


class ClassBalanced(Objective[Recipe]):
    """ERM on batches in which every class is equally likely, under the schedule of the whole recipe it is given."""

    sampler = "class"

    def lr_factor(self, recipe: Recipe, epoch: float) -> float:
        return super().lr_factor(self.config, epoch)


def base_network(task: Task, base: Base, epoch: int | None = None) -> Checkpoint:
    """The block's ERM, or one with class-balanced batches: after its last epoch, or after an earlier one (from 1).

    All runs of the block share it; an early class-balanced one is a training of its own.
    """
    if base == "erm":
        return task.erm(epoch)
    epochs = epoch or task.recipe.epochs

    def make() -> Checkpoint:
        recipe = replace(task.recipe, epochs=epochs)
        return task.train_network(ClassBalanced(task.recipe), task.initial().model, "erm-cb", recipe=recipe)

    return task.shared_network("erm-cb", epochs, make)


def pool_and_rest(task: Task) -> Halves:
    """Validation in two; images with attributes select, as far as there is room for them."""
    return task.halves(np.arange(task.size("val")), attributes=False)


def head_recipe(recipe: Recipe, lr: float, epochs: int) -> Recipe:
    """SGD with momentum 0.9 at a constant rate; batches and weight decay are the recipe's."""
    return replace(recipe, optimizer="sgd", lr=lr, momentum=0.9, epochs=epochs, schedule="constant")


def retrained(
    task: Task, objective: Objective[Any], network: Checkpoint, halves: Halves, recipe: Recipe, *, fresh: bool = False
) -> Predictor:
    """The network with its last layer trained on images of validation and selected by the others.

    The class labels of the first are billed. The choice is recorded as one of candidates: a record's history is of
    epochs chosen by all images that the budget lets see, and here some of them were trained on.
    """
    rows, rest = halves
    found = task.on(rows[:0], rows, select=rest).train_head(objective, network, recipe=recipe, fresh=fresh)
    return replace(found, choice=replace(found.choice, step=None), trajectory=None)
