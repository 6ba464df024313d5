"""Stand-ins that several unit tests share: a card, a run's specification, tasks without and with engine and images."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast, get_args

import numpy as np
import torch
from helpers import plan_tiny
from numpy.typing import NDArray
from worstgroup.benchmark.annotations import Annotations, Held
from worstgroup.benchmark.budget import Budget
from worstgroup.benchmark.cost import Clock
from worstgroup.benchmark.data import Pixels
from worstgroup.benchmark.lab import Lab, Progress
from worstgroup.benchmark.metrics import Counts
from worstgroup.benchmark.registry import SOURCES
from worstgroup.benchmark.spec import Attribute, Block, Card, Recipe, RunSpec
from worstgroup.benchmark.task import Task

CPU = torch.device("cpu")
Labels = tuple[NDArray[np.int64], NDArray[np.int64]]
"""`y` (n,) and `a` (n, k) of a split."""


def make_attributes(names: Sequence[str], classes: int = 2, ratio: float | None = None) -> tuple[Attribute, ...]:
    """Attributes with one value for each class, aligned in order."""
    values = tuple(str(i) for i in range(classes))
    return tuple(Attribute(name, values, tuple(range(classes)), ratio) for name in names)


def make_card(names: Sequence[str] = ("background",), classes: int = 2) -> Card:
    """A card without images whose attributes have as many values as there are classes."""
    return Card(
        name="toy",
        title="Toy",
        classes=tuple(f"class {i}" for i in range(classes)),
        attributes=make_attributes(names, classes),
        image=(1, 1, 1),
        counts={},
        licence="none",
        citation="none",
        recipe=Recipe(batch_size=8, epochs=3),
        backbone="tiny_cnn",
        mean=(0.0,),
        std=(1.0,),
    )


def make_spec(budget: str = "train+val", policy: str = "", seed: int = 0) -> RunSpec:
    """The specification of a run on the toy card."""
    block = Block("toy", "0" * 12, "tiny_cnn", "none", make_card().recipe, seed)
    return RunSpec(block, "method", "", policy, (), Budget.parse(budget), "0" * 16)


def split_of(counts: Sequence[int], card: Card) -> Labels:
    """Labels of a split with these group counts (G,), group after group."""
    y, *a = np.unravel_index(np.repeat(np.arange(card.num_groups), counts), card.shape)
    return y.astype(np.int64), np.stack(a, axis=1).astype(np.int64)


def make_task(
    train: Labels,
    val: Labels,
    *,
    card: Card | None = None,
    budget: str = "train+val",
    policy: str = "",
    seed: int = 0,
    env: dict[Held, NDArray[np.int64]] | None = None,
) -> Task:
    """A real task over 1x1 black images; it cannot train. Its annotations are metered as in a run.

    `env` has environments of the dataset's own by split; the card names them.
    """
    card = card or make_card()
    labels: dict[Held, Labels] = {"train": train, "val": val}
    pixels = {
        split: Pixels(np.zeros((len(y), 1, 1, 1), np.uint8), y, card.mean, card.std, CPU)
        for split, (y, _) in labels.items()
    }
    lab = SimpleNamespace(
        store=SimpleNamespace(card=card),
        recipe=card.recipe,
        device=CPU,
        clock=Clock(CPU),
        pixels=pixels.__getitem__,
        sharing=False,
    )
    spec = make_spec(budget, policy, seed)
    y, a = ({split: pair[part] for split, pair in labels.items()} for part in (0, 1))
    return Task(replace(spec), cast(Lab, lab), Annotations(card, y, a, spec.budget, env=env))


def quiet(stage: str, epoch: int, epochs: int) -> None:
    """Progress that nobody is told."""


def tiny_task(method: str, budget: str = "", progress: Progress = quiet, **settings: str) -> Task:
    """The task of a run on the dataset `tiny`, with lab, clock and metered annotations of its own: it can train."""
    plan = plan_tiny(method, budget=budget, **settings)
    spec, store = plan.runs[0].spec, plan.stores["tiny"]
    assert spec is not None
    splits = {name: store.split(name) for name in get_args(Held)}
    y, a = ({name: getattr(split, part) for name, split in splits.items()} for part in "ya")
    source = SOURCES[spec.source].make() if spec.source else None
    lab = Lab(spec.block, store, CPU, Clock(CPU), progress)
    return Task(spec, lab, Annotations(store.card, y, a, spec.budget, spec.block.seed), source=source)


def ledger(task: Task) -> dict[str, int]:
    """Annotations that a task has used."""
    return cast(dict[str, int], vars(task._annotations.ledger()))


def counts(*values: int) -> Counts:
    """Group counts as an array."""
    return np.array(values, dtype=np.int64)


def examples(correct: Counts, total: Counts, shape: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Truth `y`, attributes `a` and `prediction` of examples that have these group counts, group after group."""
    group = np.repeat(np.arange(len(total)), total)
    y, *a = np.unravel_index(group, tuple(shape))
    right = np.concatenate([np.arange(n) < c for c, n in zip(correct, total, strict=True)])
    return {
        "y": y,
        "a": np.stack(a, axis=1) if a else np.zeros((len(y), 0), np.int64),
        "prediction": np.where(right, y, (y + 1) % shape[0]),
        "group": group,
    }
