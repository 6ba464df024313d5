"""SUBG, SUBY and RWY: equal groups by throwing images away, equal classes by drawing them equally often."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare  # type: ignore[import-untyped]
from stubs import Labels, make_card, make_task, split_of
from torch import Tensor
from toys import NO_VAL, run_tiny
from worstgroup.benchmark.data import cycled
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.registry import NoConfig
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Task
from worstgroup.methods.resample import ReSample
from worstgroup.methods.rwy import RWY
from worstgroup.methods.subg import SUBG
from worstgroup.methods.suby import SUBY

WATERBIRDS = (3498, 184, 56, 1057)
RECIPE = Recipe(batch_size=32)
BALANCERS = (SUBG, SUBY, ReSample, RWY)


def made(
    sizes: tuple[int, ...], budget: str = "train+val", policy: str = "", seed: int = 0, mixed: bool = True
) -> Task:
    """A task with these group sizes (G,), its images in random order."""
    y, a = split_of(sizes, make_card())
    order = np.random.default_rng(9).permutation(len(y)) if mixed else np.arange(len(y))
    train: Labels = y[order], a[order]
    return make_task(train, NO_VAL, budget=budget, policy=policy, seed=seed)


def batches(cls: type[Objective[Any]], task: Task, epoch: int = 0) -> list[Tensor]:
    """Batches of an epoch."""
    return list(cls(NoConfig()).make_sampler(task, RECIPE)(torch.Generator().manual_seed(epoch)))


def drawn(cls: type[Objective[Any]], task: Task, epochs: int = 1) -> Tensor:
    return torch.cat([index for epoch in range(epochs) for index in batches(cls, task, epoch)])


# ---------------------------------------------------------------------------------------------------------- subsampling


def test_every_group_is_cut_to_the_smallest() -> None:
    task = made(WATERBIRDS)
    subset = drawn(SUBG, task).unique().numpy()
    assert len(subset) == 224
    assert np.bincount(task.groups("train").index[subset]).tolist() == [56] * 4


def test_every_class_is_cut_to_the_smallest_by_no_attribute() -> None:
    task = made(WATERBIRDS, budget="none")
    subset = drawn(SUBY, task).unique().numpy()
    assert np.bincount(task.y("train")[subset]).tolist() == [1113] * 2


def test_empty_groups_count_for_nothing() -> None:
    task = made((30, 0, 7, 9))
    subset = drawn(SUBG, task).unique().numpy()
    assert np.bincount(task.groups("train").index[subset]).tolist() == [7, 0, 7, 7]


@pytest.mark.parametrize("cls", [SUBG, SUBY])
def test_steps_are_those_of_erm(cls: type[Objective[Any]]) -> None:
    task = made(WATERBIRDS)
    lengths = [[len(index) for index in batches(other, task)] for other in (cls, Objective)]
    assert lengths[0] == lengths[1]


def test_no_image_of_the_subset_falls_behind() -> None:
    often = drawn(SUBG, made(WATERBIRDS)).bincount()
    assert set(often.tolist()) == {0, sum(WATERBIRDS) // 224, sum(WATERBIRDS) // 224 + 1}


def test_epochs_differ_in_order_alone() -> None:
    task = made(WATERBIRDS)
    first, second = (torch.cat(batches(SUBG, task, epoch)) for epoch in (0, 1))
    assert torch.equal(first.unique(), second.unique())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("cls", [SUBG, SUBY])
def test_the_subset_is_drawn_anew_for_every_seed_alone(cls: type[Objective[Any]]) -> None:
    first, again, other = (drawn(cls, made(WATERBIRDS, seed=seed)).unique() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_attributes_subg_is_suby() -> None:
    by_class, suby = made(WATERBIRDS, "none", "class"), made(WATERBIRDS, "none")
    assert torch.equal(drawn(SUBG, by_class, 2), drawn(SUBY, suby, 2))


def test_a_cycle_is_all_rows_in_a_new_order() -> None:
    rows = torch.tensor([3, 5, 8, 13])
    batches = cycled(rows, 10, replace(RECIPE, batch_size=4))(torch.Generator().manual_seed(0))
    assert [len(index) for index in batches] == [4, 4, 2]
    assert [sorted(index.tolist()) for index in batches[:2]] == [rows.tolist()] * 2
    assert len(set(batches[2].tolist()) & set(rows.tolist())) == 2
    assert not torch.equal(batches[0], batches[1])


# ------------------------------------------------------------------------------------------------------------ balancing


def test_rwy_draws_classes_uniformly_and_images_within_a_class() -> None:
    task = made(WATERBIRDS, budget="none", mixed=False)
    found = drawn(RWY, task, 4)
    assert len(found) == 4 * sum(WATERBIRDS)
    y, often = task.y("train"), found.bincount(minlength=sum(WATERBIRDS)).numpy()
    assert chisquare(np.bincount(y[found.numpy()])).pvalue > 0.01
    assert all(chisquare(often[y == label]).pvalue > 0.01 for label in (0, 1))


def test_with_equal_weights_groups_are_equally_frequent_in_expectation() -> None:
    task = made(WATERBIRDS)
    for cls in (SUBG, ReSample):
        share = np.bincount(task.groups("train").index[drawn(cls, task, 8).numpy()]) / (8 * sum(WATERBIRDS))
        assert share == pytest.approx(np.full(4, 0.25), abs=0.01)


@pytest.mark.parametrize("cls", BALANCERS)
def test_on_balanced_data_it_has_the_batches_of_erm(cls: type[Objective[Any]]) -> None:
    task = made((40, 40, 40, 40))
    for epoch in (0, 1):
        pairs = zip(batches(cls, task, epoch), batches(Objective, task, epoch), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("cls", BALANCERS)
def test_the_loss_is_plain_cross_entropy(cls: type[Objective[Any]]) -> None:
    assert (cls.loss, cls.step, cls.setup) == (Objective.loss, Objective.step, Objective.setup)


@pytest.mark.parametrize(
    ("method", "budget", "labels"), [("subg", "train+val", 192), ("suby", "select", 0), ("rwy", "none", 0)]
)
def test_cost_and_labels(method: str, budget: str, labels: int) -> None:
    record, images, epochs = run_tiny(method, budget), 96, 2
    assert record.cost is not None
    assert record.labels is not None
    scratch = record.cost.scratch
    assert (scratch.n_fwd, scratch.n_bwd, scratch.n_updates) == (
        images * epochs,
        images * epochs,
        images // 16 * epochs,
    )
    assert record.labels.n_train_a == labels
