"""Small networks, images and tasks on which an objective can be tried, by hand or in the real engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from helpers import plan_tiny
from stubs import CPU, Labels, make_card, make_task, split_of
from torch import nn
from worstgroup.benchmark import engine
from worstgroup.benchmark.backbones import Backbone, GradCam
from worstgroup.benchmark.cost import Clock, StageCost
from worstgroup.benchmark.data import Batch, Pixels
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.record import RunRecord
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import Recipe, derive_seed
from worstgroup.benchmark.task import Task

LOGITS = cast(Backbone, nn.Identity())
"""A model whose logits are its input."""
KINDS: tuple[GradCam, ...] = ("closed", "layernorm", "head")
SIDE = 8
NO_VAL: Labels = (np.zeros(0, np.int64), np.zeros((0, 1), np.int64))


def net(kind: GradCam = "closed", classes: int = 2, purpose: str = "", norm: bool = True) -> Backbone:
    """A backbone of each kind with 6 maps of 4 x 4 pixels; `norm` puts a BatchNorm in its trunk, and dropout in a
    neck of kind `head`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(kind, classes, purpose))
        trunk = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU())
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
        neck = {
            "closed": lambda: nn.Sequential(*pool),
            "layernorm": lambda: nn.Sequential(*pool, nn.LayerNorm(6)),
            "head": lambda: nn.Sequential(nn.Flatten(1), nn.Linear(96, 6), nn.ReLU(), nn.Dropout(0.5 if norm else 0.0)),
        }[kind]()
        return Backbone("toy", trunk, neck, nn.Linear(6, classes), grad_cam=kind)


def images(n: int = 8, seed: int = 1) -> torch.Tensor:
    """Images (n, 3, 8, 8)."""
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def toy_task(
    sizes: tuple[int, ...],
    *,
    classes: int = 2,
    names: tuple[str, ...] = ("background",),
    budget: str = "train+val",
    kind: GradCam = "closed",
    norm: bool = True,
    seed: int = 0,
) -> Task:
    """A task on a train split with these group sizes (G,) which builds toy networks; it cannot train."""
    card = make_card(names, classes)
    no_val = NO_VAL[0], np.zeros((0, len(names)), np.int64)
    task = make_task(split_of(sizes, card), no_val, card=card, budget=budget, seed=seed)
    cast(Any, task)._lab.model = lambda num, purpose: net(kind, num, purpose, norm)
    return task


def batch(task: Task, index: list[int] | None = None) -> Batch:
    """Random images with the labels of these (by default all) train images."""
    rows = torch.arange(task.size("train")) if index is None else torch.tensor(index)
    return Batch(images(task.size("train"))[rows], torch.from_numpy(task.y("train"))[rows], rows)


def costing(losses: Sequence[float], y: Sequence[int], index: Sequence[int] | None = None) -> Batch:
    """A batch for `LOGITS`: two logits for each image that give it this cross-entropy."""
    label = torch.tensor(y)
    other = torch.tensor(losses, dtype=torch.float64).expm1().log().float()
    x = torch.zeros(len(y), 2).scatter_(1, 1 - label[:, None], other[:, None])
    return Batch(x, label, torch.arange(len(y)) if index is None else torch.tensor(index))


def on_logits(objective: Any, sizes: Sequence[int], policy: str = "", classes: int = 2) -> Any:
    """The objective, set up for `LOGITS` on a train split with these group sizes (G,)."""
    card = make_card(classes=classes)
    objective.setup(make_task(split_of(sizes, card), NO_VAL, card=card, policy=policy), LOGITS)
    return objective


def train(objective: Objective[Any], task: Task, model: Backbone, recipe: Recipe, state: Path) -> StageCost:
    """Set the objective up and train it in the real engine on random images with the task's labels."""
    objective.setup(task, model)
    y = task.y("train")
    pixels = np.random.default_rng(0).integers(0, 256, (len(y), SIDE, SIDE, 3)).astype(np.uint8)
    train = Pixels(pixels, y, (0.5,) * 3, (0.25,) * 3, CPU)
    clock = Clock(CPU)
    clock.meter(model, model.trunk, images(1))
    training = engine.Training(
        train, None, recipe, recipe.epochs, "toy", seed=("toy", 0), clock=clock, state=state / "toy.pt"
    )
    engine.fit(objective, model, objective.make_sampler(task, recipe), training)
    return clock.stages["toy"]


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of its parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two states agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# ------------------------------------------------------------------------------------------------- the dataset `tiny`


def run_tiny(method: str, budget: str = "", **settings: str) -> RunRecord:
    """The record of a finished run of seed 0."""
    plan = plan_tiny(method, budget=budget, **settings)
    (planned,) = plan.runs
    assert planned.spec is not None, planned.reason
    record = run_spec(planned.spec, plan.stores["tiny"])
    assert record.status == "finished", record.error
    return record
