"""Trainings of one run: each has a checkpoint and a bill of its own, whatever its stage is called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stubs import tiny_task
from torch import Tensor
from torch.nn import functional as F
from worstgroup.authoring.contract import judge
from worstgroup.authoring.trial import Bench, killed_after_epochs, killed_after_steps, make, profile, survive
from worstgroup.benchmark import artifacts
from worstgroup.benchmark.annotations import Attributes, Held
from worstgroup.benchmark.artifacts import work_folder
from worstgroup.benchmark.budget import Requires
from worstgroup.benchmark.cost import Clock
from worstgroup.benchmark.data import Batch, augment
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.lab import Arrays
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Predictor, Task

TRAIN, EPOCHS, STEPS = 96, 2, 6
NEEDS_GROUPS = Requires(fit="train", native="train+val", classes="class")


class Smoothed(Objective[Any]):
    """Another objective than ERM's, so that a training that was not made is seen."""

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model(batch.x), batch.y, label_smoothing=0.4)


class Pipeline:
    """A method without settings."""

    def __init__(self, config: Any) -> None:
        self.config = config


class Twice(Pipeline):
    """Two trainings of one stage name, the second one from where the first one ended."""

    def fit(self, task: Task) -> Predictor:
        return task.train(Smoothed(None), start=task.train(Objective(None)).checkpoint)


class Host(Objective[Any]):
    """Asks for groups before its training, the stage `train`, begins; `resample` asks when it has begun."""

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        self.group = torch.from_numpy(task.groups("train").index)

    def loss(self, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.model(batch.x), batch.y, reduction="none")
        return (losses * (1 + self.group[batch.index])).mean()


class Outside(Pipeline):
    """Pseudo-attributes from a network that is trained in the stage `train`."""

    def attributes(self, task: Task, split: Held) -> Attributes:
        return Attributes(self.predicted(task, split)["a"], (2,))

    def predicted(self, task: Task, split: Held) -> Arrays:
        trained = task.train_network(Smoothed(None), task.network(2, "source"), "train")
        logits = task.logits(trained, split)
        return {"a": (logits[:, :1] > logits[:, :1].median()).long().numpy()}


class Inside(Outside):
    """The same, shared by all runs of the block."""

    def predicted(self, task: Task, split: Held) -> Arrays:
        return task.cached("inside", split, lambda: super(Inside, self).predicted(task, split))


class Both(Outside):
    """One network that all runs share, and another one of the run's own."""

    def predicted(self, task: Task, split: Held) -> Arrays:
        shared = task.cached("inside", split, lambda: super(Both, self).predicted(task, split))
        own = super().predicted(task, split)
        return {"a": own["a"] ^ shared["a"]}


@pytest.fixture(autouse=True)
def methods(register: Callable[..., None]) -> None:
    """The methods and sources of this file."""
    register("twice", Twice)
    register("host", Host, NEEDS_GROUPS)
    for cls in (Outside, Inside, Both):
        register(cls.__name__.lower(), cls)


# -------------------------------------------------------------------------------------------- trainings of their own


def test_two_trainings_of_one_stage_are_two() -> None:
    task = tiny_task("erm")
    first, second = task.train(Objective(None)), task.train(Smoothed(None))
    assert first.trajectory is not None
    assert second.trajectory is not None
    assert first.trajectory.epochs[0].train_loss != second.trajectory.epochs[0].train_loss
    weights = [next(found.checkpoint.model.parameters()) for found in (first, second)]
    assert not torch.equal(*weights)
    cost = task._lab.clock.stages["train"]
    assert (cost.n_fwd, cost.n_bwd, cost.n_updates) == (2 * EPOCHS * TRAIN, 2 * EPOCHS * TRAIN, 2 * EPOCHS * STEPS)
    assert {file.name for file in work_folder(task.spec.hash).iterdir()} == {"train.pt", "train-2.pt"}


def test_a_second_attempt_finds_both_checkpoints() -> None:
    costs = []
    for _ in range(2):
        task = tiny_task("erm")
        task.train(Objective(None))
        task.train(Smoothed(None))
        costs.append(task._lab.clock.stages["train"])
    again, straight = costs[1], costs[0]
    assert (again.n_fwd, again.n_updates, again.flops) == (straight.n_fwd, straight.n_updates, straight.flops)


NAMES = ("twice", "twice(+val)", "host+outside", "host+inside", "host+both", "resample+both")


@pytest.mark.parametrize("name", NAMES)
def test_killed_anywhere_it_ends_at_the_same_bytes_and_bill(name: str) -> None:
    verdict = judge(Bench(name), "resume")
    assert verdict.state == "ok", verdict


@pytest.mark.parametrize("steps", [2, 5, 8, 11, 14, 17])
def test_what_another_run_made_meanwhile_is_taken(steps: int) -> None:
    """Killed before or after the shared network was trained, with a second host that trains it in between."""
    with profile():
        straight = make("host+inside")

    def killers() -> Iterator[Any]:
        yield killed_after_steps(steps)
        make("resample+inside")
        yield killed_after_epochs(0)  # that is never

    with profile():
        made = survive(Bench("host+inside"), killers())
    assert straight.differs(made) == ""
    assert made.record.history == straight.record.history
    assert made.cost.scratch.n_fwd == straight.cost.scratch.n_fwd


# ---------------------------------------------------------------------------------------------------------- waiting


def test_waiting_for_another_process_is_not_billed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lock takes an hour by the clock: of an ERM, of features, of an array, and of those nested in an array."""
    hour, waits = 3600.0, [0]
    lock, now = artifacts.lock, Clock._now

    @contextmanager
    def slow(path: Path) -> Iterator[None]:
        waits[0] += 1
        with lock(path):
            yield

    def late(clock: Clock) -> tuple[float, float]:
        wall, busy = now(clock)
        return wall + hour * waits[0], busy + hour * waits[0]

    monkeypatch.setattr(artifacts, "lock", slow)
    monkeypatch.setattr(Clock, "_now", late)
    task = tiny_task("erm")
    with task.stage("work") as cost:
        task.features(task.erm(), "val")
        task.cached("plain", None, lambda: {"x": np.arange(3)})
        task.cached("nested", None, lambda: {"x": task.features(task.erm(1), "train").numpy()})
    assert waits[0] == 5
    assert 0 < cost.wall_s < hour
    costs = [*task._lab.clock.stages.values(), *task._lab.clock.shared.values()]
    assert len(costs) == 6
    assert all(max(c.wall_s, c.device_s, c.eval_s) < hour for c in costs)


# -------------------------------------------------------------------------------------------------- steps and views


class Restarting(Objective[Any]):
    """Takes a new optimiser after every step."""

    def step(self, batch: Batch, optimizers: dict[str, torch.optim.Optimizer]) -> Tensor:
        loss = super().step(batch, optimizers)
        optimizers["model"] = torch.optim.SGD(self.model.parameters(), lr=0.01)
        return loss


class Alternating(Objective[Any]):
    """Every second step changes a player that is not the classifier."""

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        self.other, self.steps = task.network(2, "other"), 0

    def networks(self) -> dict[str, torch.nn.Module]:
        return {"model": self.model, "other": self.other}

    def step(self, batch: Batch, optimizers: dict[str, torch.optim.Optimizer]) -> Tensor:
        self.steps += 1
        player, name = (self.model, "model") if self.steps % 2 else (self.other, "other")
        loss = F.cross_entropy(player(batch.x), batch.y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers[name].step()
        optimizers[name].step()  # twice: a step of training is one update
        return loss.detach()


@pytest.mark.parametrize(("cls", "updates"), [(Restarting, EPOCHS * STEPS), (Alternating, EPOCHS * STEPS // 2)])
def test_updates_of_the_classifier_are_counted_whoever_makes_them(cls: type[Objective[Any]], updates: int) -> None:
    task = tiny_task("erm")
    task.train(cls(None))
    assert task._lab.clock.stages["train"].n_updates == updates


class TwoViews(Objective[Any]):
    """The mean loss of an image and of a randomly flipped one."""

    shapes: set[tuple[int, ...]]

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        self.shapes = set()

    def transform(self, recipe: Recipe, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        flip = augment("flip", generator)
        assert flip is not None
        return lambda x: torch.stack([x, flip(x)], dim=1)

    def loss(self, batch: Batch) -> Tensor:
        self.shapes.add(tuple(batch.x.shape[1:3]))
        logits = self.model(batch.x.flatten(0, 1))
        return F.cross_entropy(logits, batch.y.repeat_interleave(2))


def test_an_objective_may_stack_views() -> None:
    task, plain = tiny_task("erm"), tiny_task("erm")
    objective = TwoViews(None)
    found = task.train(objective)
    assert objective.shapes == {(2, task.card.image[2])}
    assert found.trajectory is not None
    assert np.isfinite([epoch.train_loss for epoch in found.trajectory.epochs]).all()
    assert task._lab.clock.stages["train"].n_fwd == 2 * EPOCHS * TRAIN

    seen = []
    objective.model = lambda x: seen.append(x) or torch.zeros(len(x), 2)  # type: ignore[assignment]
    views = task._seen.pixels("train").batch(
        torch.arange(4), objective.transform(task.recipe, torch.Generator().manual_seed(0))
    )
    objective.loss(views)
    assert torch.equal(
        seen[0].view(4, 2, *views.x.shape[2:])[:, 0], plain._seen.pixels("train").batch(torch.arange(4)).x
    )
