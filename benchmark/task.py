"""`Task`: everything a method may touch. No test split, attributes only within the budget, every stage billed."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import engine
from .annotations import Annotations, Groups, Held, Indices
from .artifacts import work_folder
from .cost import StageCost
from .lab import Checkpoint, Lab
from .selection import CRITERIA, Score, Selector
from .spec import Card, Recipe, RunSpec, derive_seed

__all__ = ["Checkpoint", "Choice", "Predictor", "Task"]


@dataclass(frozen=True)
class Choice:
    """How a model was selected: criterion and value, the epoch if it was one, and how many candidates stood."""

    criterion: str
    value: float | None = None
    step: int | None = None
    candidates: int = 1


@dataclass(frozen=True, eq=False)
class Predictor:
    """What `fit` returns: a checkpoint, maybe another head on its features, how it was chosen, and its training."""

    checkpoint: Checkpoint
    choice: Choice
    head: nn.Module | None = None
    trajectory: engine.Trajectory | None = None


class Task:
    """One run as its method sees it. There is no test split here, and no attribute beyond the budget."""

    def __init__(self, spec: RunSpec, lab: Lab, annotations: Annotations) -> None:
        self.spec = spec
        self._lab = lab
        self._annotations = annotations

    @property
    def card(self) -> Card:
        """The dataset's card."""
        return self._lab.store.card

    @property
    def recipe(self) -> Recipe:
        """How this block trains."""
        return self._lab.recipe

    @property
    def device(self) -> torch.device:
        """Where models and batches live."""
        return self._lab.device

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.card.classes)

    def size(self, split: Held) -> int:
        """Number of images."""
        return len(self._lab.pixels(split))

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of its own for every purpose; the same for every method of the block."""
        return np.random.default_rng(derive_seed(*self.spec.block.stream, purpose))

    # ------------------------------------------------------------------------------------------------------ labels

    def y(self, split: Held, *, fit: bool = False) -> NDArray[np.int64]:
        """Class labels (n,). Say `fit=True` when validation labels go into fitting: they are billed as extra labels."""
        labels = self._lab.pixels(split).y.cpu().numpy()
        if fit and split == "val":
            self._annotations.bill_labels(np.arange(len(labels)))
        return labels

    def groups(self, split: Held, indices: Indices | None = None) -> Groups:
        """Groups of the images, to fit on: the only door to attributes.

        The run decides what groups are: true ones within the budget, or classes under the policy `@class`.
        Raises `BudgetExceeded` when true groups are not granted.
        """
        if self.spec.policy == "class":
            y = self.y(split)
            return Groups(y if indices is None else y[indices], self.num_classes)
        return self._annotations.groups(split, "fit", indices)

    def selector(self, indices: Indices | None = None) -> Selector:
        """The rung's selection rule on validation images (all of them, or those of `indices`); bills what it reads."""
        criterion = CRITERIA[self.spec.budget.grant.criterion]
        y = self.y("val") if indices is None else self.y("val")[indices]
        groups = (
            self._annotations.groups("val", "select", indices)
            if criterion.needs_groups
            else Groups(y, self.num_classes)
        )
        return Selector(criterion, y, groups)

    # ------------------------------------------------------------------------------------------------------ stages

    def stage(self, name: str) -> AbstractContextManager[StageCost]:
        """Bill a piece of work of the method's own, e.g. `with task.stage("head") as cost: cost.n_head_fits += 1`."""
        return self._lab.clock.stage(name)

    def train(self, objective: engine.Objective[Any], stage: str = "train", epochs: int | None = None) -> Predictor:
        """Train a fresh backbone on the objective and select its epoch by the rung's rule."""
        lab = self._lab
        model = lab.model()
        objective.setup(self, model)
        training = lab.training(
            stage, work_folder(self.spec.hash) / f"{stage}.pt", epochs=epochs, selector=self.selector()
        )
        trajectory = engine.fit(objective, model, objective.make_sampler(self, self.recipe), training)
        choice = self._choice(trajectory.score, trajectory.step, len(trajectory.epochs))
        return Predictor(Checkpoint(model), choice, trajectory=trajectory)

    def erm(self, epoch: int | None = None) -> Checkpoint:
        """The block's shared ERM, by default after its last epoch: chosen by no label."""
        return self._lab.erm_checkpoint(self._lab.erm(), epoch or self.recipe.epochs)

    def select_erm(self) -> Predictor:
        """The shared ERM trajectory with its epoch selected by the rung's rule."""
        erm = self._lab.erm()
        predictions = erm.array("predictions")
        best, score = self.selector().best(predictions)
        epochs = [
            engine.Epoch(train, val, seen) for (train, val), seen in zip(erm.array("losses"), predictions, strict=True)
        ]
        checkpoint = self._lab.erm_checkpoint(erm, best + 1, billed=len(predictions))  # choosing needs all epochs
        choice = self._choice(score, best + 1, len(epochs))
        return Predictor(checkpoint, choice, trajectory=engine.Trajectory(epochs, best + 1, score))

    def features(self, checkpoint: Checkpoint, split: Held) -> Tensor:
        """Penultimate features (n, d), float32 on the CPU, under the evaluation transform."""
        return self._lab.outputs(checkpoint, split)[0]

    def logits(self, checkpoint: Checkpoint, split: Held) -> Tensor:
        """Logits (n, K), float32 on the CPU, under the evaluation transform."""
        return self._lab.outputs(checkpoint, split)[1]

    def choose(
        self, predictions: Iterable[NDArray[np.integer[Any]]], indices: Indices | None = None
    ) -> tuple[int, Choice]:
        """Position of the best of several validation predictions by the rung's rule, and the record of the choice."""
        candidates = list(predictions)
        best, score = self.selector(indices).best(candidates)
        return best, self._choice(score, None, len(candidates))

    def _choice(self, score: Score | None, step: int | None, candidates: int) -> Choice:
        return Choice(self.spec.budget.grant.criterion, score[0] if score else None, step, candidates)

    def halves(self) -> tuple[Indices, Indices]:
        """Validation split in two, stratified by y: one to fit on, one to select on (spec 10.2)."""
        rng = self.rng("halves")
        y = self.y("val")
        fit = []
        for label in range(self.num_classes):
            members = rng.permutation(np.flatnonzero(y == label))
            fit.append(members[: len(members) // 2])
        chosen = np.sort(np.concatenate(fit))
        return chosen, np.setdiff1d(np.arange(len(y)), chosen)
