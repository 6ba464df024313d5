"""Trainings beside the usual one: cut short, without validation, with a schedule or players of their own."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stubs import tiny_task
from torch import Tensor, nn
from torch.optim import Optimizer
from worstgroup.benchmark import engine
from worstgroup.benchmark.backbones import Backbone
from worstgroup.benchmark.cost import StageCost
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective, Trajectory
from worstgroup.benchmark.lab import Checkpoint
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Task

pytestmark = pytest.mark.usefixtures("tiny")

TRAIN, STEPS = 96, 6


class Watched(Objective[None]):
    """Notes the learning rate of every step."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rates: list[float] = []

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        self.rates.append(next(iter(optimizers.values())).param_groups[0]["lr"])
        return super().step(batch, optimizers)


class Halving(Watched):
    """A schedule of its own."""

    def lr_factor(self, recipe: Recipe, epoch: float) -> float:
        return 0.5 ** int(epoch)


class Alternating(Watched):
    """A critic's step after every `turns` - 1 of the classifier."""

    turns = 3

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.critic = nn.Linear(model.feature_dim, 2)

    def networks(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "model": self.model}  # the classifier need not come first

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        self.rates.append(0.0)
        if len(self.rates) % self.turns:
            return self.move(self.loss(batch), optimizers["model"])
        features = self.model.features(batch.x).detach()
        return self.move(nn.functional.cross_entropy(self.critic(features), batch.y), optimizers["critic"])

    def move(self, loss: Tensor, optimizer: Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()


class Head(Watched):
    """Trains the last layer only."""

    def networks(self) -> dict[str, nn.Module]:
        return {"head": self.model.head}


def fit(
    state: Path,
    objective: Objective[Any] | None = None,
    epochs: int = 4,
    options: dict[str, Any] | None = None,
    **s: str,
) -> tuple[Trajectory, dict[str, Tensor], StageCost]:
    """Trajectory, weights and cost of a training under a recipe of so many epochs."""
    task = tiny_task("erm", recipe__epochs=str(epochs), **s)
    made, model = objective or Objective(None), task._lab.model()
    made.setup(task, model)
    training = task._lab.training("train", state, **(options or {}))
    trajectory = engine.fit(made, model, made.make_sampler(task, training.recipe), training)
    return trajectory, model.state_dict(), task._lab.clock.stages["train"]


# --------------------------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("stop", [1, 3])
def test_a_training_that_stops_early_is_the_beginning_of_the_whole_one(tmp_path: Path, stop: int) -> None:
    seen: dict[int, dict[str, Tensor]] = {}

    def keep(epoch: int, model: nn.Module) -> None:
        seen[epoch] = {name: value.clone() for name, value in model.state_dict().items()}

    cosine = {"recipe__schedule": "cosine", "recipe__augment": "flip"}
    whole, short = Watched(), Watched()
    long_run, _, _ = fit(tmp_path / "whole.pt", whole, options={"keep": keep}, **cosine)
    trajectory, weights, cost = fit(tmp_path / "short.pt", short, options={"stop": stop}, **cosine)
    assert (len(trajectory.epochs), trajectory.step) == (stop, stop)
    assert short.rates == whole.rates[: stop * STEPS]  # the horizon of the schedule stays
    assert short.rates[-1] < short.rates[0]
    assert all(torch.equal(value, seen[stop][name]) for name, value in weights.items())
    assert [e.train_loss for e in trajectory.epochs] == [e.train_loss for e in long_run.epochs[:stop]]
    assert (cost.n_fwd, cost.n_updates) == (stop * TRAIN, stop * STEPS)


# --------------------------------------------------------------------------------------------------------- validation


def test_without_validation_nothing_is_evaluated_and_the_last_epoch_kept(tmp_path: Path) -> None:
    plain, weights, _ = fit(tmp_path / "plain.pt")
    blind, same, cost = fit(tmp_path / "blind.pt", options={"val": None})
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert (blind.step, blind.score) == (4, None)
    assert [e.train_loss for e in blind.epochs] == [e.train_loss for e in plain.epochs]
    assert all(math.isnan(e.val_loss) and len(e.predictions) == 0 for e in blind.epochs)
    assert cost.n_fwd_nograd == 0


def test_a_training_without_validation_resumes_to_the_same_bits(tmp_path: Path) -> None:
    _, straight, _ = fit(tmp_path / "straight.pt", options={"val": None})
    fit(tmp_path / "cut.pt", options={"val": None, "stop": 2})
    trajectory, resumed, cost = fit(tmp_path / "cut.pt", options={"val": None})
    assert len(trajectory.epochs) == 4
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    assert cost.n_updates == 4 * STEPS


def test_a_network_beside_the_classifier_is_neither_evaluated_nor_selected() -> None:
    task = tiny_task("erm", "val")
    model = task.network(2, "second")
    before = next(model.parameters()).clone()
    checkpoint = task.train_network(Objective(None), model, "second")
    assert checkpoint.model is model
    assert checkpoint.key is None
    assert not torch.equal(before, next(model.parameters()))
    assert task.decisions.made == []
    assert task._annotations.ledger().total_a == 0
    assert task._lab.clock.stages["second"].n_fwd == 2 * TRAIN


# ---------------------------------------------------------------------------------------------------- rates and counts


def test_an_objective_can_bring_its_own_schedule(tmp_path: Path) -> None:
    halving = Halving()
    fit(tmp_path / "state.pt", halving, recipe__schedule="cosine", recipe__lr="0.01")
    assert halving.rates == np.repeat([0.01, 0.005, 0.0025, 0.00125], STEPS).tolist()


def test_the_horizon_is_that_of_the_recipe_a_training_is_given() -> None:
    task = tiny_task("erm")
    objective = Watched()
    recipe = replace(task.recipe, epochs=3, schedule="cosine", lr=0.02, batch_size=32)
    predictor = task.train(objective, recipe=recipe, stage="own")
    steps = 3 * (TRAIN // 32)
    assert objective.rates == pytest.approx([0.01 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)])
    assert predictor.trajectory is not None
    assert len(predictor.trajectory.epochs) == predictor.choice.candidates == 3


@pytest.mark.parametrize("turns", [2, 3])
def test_only_steps_of_the_classifier_are_updates(tmp_path: Path, turns: int) -> None:
    objective = Alternating()
    objective.turns = turns
    _, _, cost = fit(tmp_path / "state.pt", objective)
    assert len(objective.rates) == 4 * STEPS
    assert cost.n_updates == 4 * STEPS - 4 * STEPS // turns


def test_steps_of_a_part_of_the_classifier_are_updates(tmp_path: Path) -> None:
    assert fit(tmp_path / "state.pt", Head())[2].n_updates == 4 * STEPS


def test_a_training_starts_from_the_checkpoint_it_is_given() -> None:
    task = tiny_task("erm")
    start = task.network(2, "elsewhere")
    frozen: Callable[[], Objective[None]] = lambda: Objective(None)  # noqa: E731
    recipe = replace(task.recipe, lr=1e-12, epochs=1)
    moved, initial = (
        task.train(frozen(), stage, recipe=recipe, start=given).checkpoint.model
        for stage, given in (("a", Checkpoint(start)), ("b", None))
    )
    first = lambda model: next(model.trunk.parameters())  # noqa: E731
    assert torch.allclose(first(moved), first(start), atol=1e-6)
    assert not torch.allclose(first(moved), first(initial), atol=1e-3)
