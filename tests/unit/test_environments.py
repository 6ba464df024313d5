"""Environments: what they are, what they cost, and means over them and over pairs of them."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from numpy.typing import NDArray
from stubs import ledger, make_card, make_task, split_of
from torch import Tensor
from worstgroup.benchmark.budget import Budget, Policy, Requires
from worstgroup.benchmark.environments import EnvConfig, EnvDefinition
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.registry import METHODS
from worstgroup.benchmark.task import Pool, Task
from worstgroup.methods.blocks.environments import (
    environment_distance,
    environment_mean,
    membership,
    pair_mean,
)

CARD = replace(make_card(), environments=("first", "second", "third"))
TRAIN, VAL = split_of((3, 2, 1, 4), CARD), split_of((1, 1, 1, 1), CARD)
NATIVE = np.array([0, 1, 2, 2, 1, 0, 0, 1, 2, 2])


def task(budget: str = "train+val", policy: str = "") -> Task:
    """Ten images to train on, of three environments of the dataset's own."""
    return make_task(TRAIN, VAL, card=CARD, budget=budget, policy=policy, env={"train": NATIVE})


def pooled(plain: Task, train: list[int], val: list[int]) -> Task:
    """The same run on these rows of train and validation."""
    return Task(plain.spec, plain._lab, plain._annotations, pool=Pool(np.array(train), np.array(val)))


def used(made: Task) -> dict[str, int]:
    return {name: n for name, n in ledger(made).items() if n}


# ------------------------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize(
    ("definition", "index", "num"),
    [("native", NATIVE, 3), ("attribute", TRAIN[1][:, 0], 2), ("group", 2 * TRAIN[0] + TRAIN[1][:, 0], 4)],
)
def test_environments_of_the_images_trained_on(definition: EnvDefinition, index: NDArray[np.int64], num: int) -> None:
    made = task()
    environments = made.environments(definition)
    assert environments.index.tolist() == index.tolist()
    assert environments.num == num
    assert used(made) == ({"n_env": 10} if definition == "native" else {"n_train_a": 10, "total_a": 10})


def test_several_attributes_make_an_environment_together() -> None:
    card = make_card(("background", "object"))
    made = make_task(split_of((1,) * 8, card), split_of((1,) * 8, card), card=card)
    assert made.environments("attribute").index.tolist() == [0, 1, 2, 3] * 2
    assert made.environments("attribute").num == 4
    assert made.environments("group").index.tolist() == list(range(8))


@pytest.mark.parametrize("budget", ["none", "val-20"])
def test_native_environments_need_no_grant(budget: str) -> None:
    made = task(budget)
    assert made.environments("native").index.tolist() == NATIVE.tolist()
    assert used(made) == {"n_env": 10}


def test_environments_of_added_validation_images_are_their_attributes_or_unknown() -> None:
    made = pooled(task(), [2, 9], [0, 3])
    assert made.environments("native").index.tolist() == [2, 2, -1, -1]
    assert made.environments("attribute").index.tolist() == [0, 1, 0, 1]
    assert made.environments("group").index.tolist() == [0, 3, 0, 3]


@pytest.mark.parametrize("definition", ["attribute", "group"])
def test_under_masked_environments_of_images_without_attributes_are_unknown(definition: EnvDefinition) -> None:
    made = task("val-20", "masked")
    assert set(made.environments(definition).index) == {-1}
    assert (pooled(made, [0, 1], made.annotated("val").tolist()).environments(definition).index[2:] >= 0).all()


def test_with_native_environments_no_attribute_is_needed() -> None:
    declared = Requires(fit="train", native="train+val", classes="erm", masked=True)
    native = EnvConfig(env="native").requires(declared)
    assert [native.resolve(Budget(rung)) for rung in ("none", "select")] == [Policy(""), Policy("")]
    assert native.resolve(Budget("train+val")) == Policy("carried")
    assert native.resolve(Budget("none"), "class").tag == "n/a"  # not ERM: there are environments to match
    for env in ("attribute", "group"):
        assert EnvConfig(env=env).requires(declared) == declared  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["coral", "irm", "mmd"])
def test_native_environments_are_refused_where_there_are_none(method: str, tiny: None) -> None:
    with pytest.raises(UserError, match="env=native: tiny comes without training environments"):
        plan_tiny(method, **{f"{method}__env": "native"})
    METHODS[method].config(env="native").check(CARD.recipe, CARD)


# ------------------------------------------------------------------------------------------------------------ means


def test_members_of_the_environments_in_a_batch() -> None:
    e = torch.tensor([2, -1, 0, 2, 0])
    assert membership(e, 4).nonzero().tolist() == [[0, 2], [0, 4], [2, 0], [2, 3]]
    assert not membership(torch.full((3,), -1), 2).any()


def test_every_environment_weighs_the_same() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0, 7.0], dtype=torch.float64, requires_grad=True)
    mean = environment_mean(losses, torch.tensor([0, 0, 0, 3, 1]))
    assert mean.item() == (2 + 10 + 7) / 3
    (gradient,) = torch.autograd.grad(mean, losses)
    assert gradient.tolist() == pytest.approx([1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 3], abs=1e-15)


def test_the_plain_mean_where_an_environment_is_alone() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0], requires_grad=True)
    mean = environment_mean(losses, torch.tensor([2] * 4))
    assert mean.item() == 4.0
    assert torch.autograd.grad(mean, losses)[0].tolist() == [0.25] * 4


# ------------------------------------------------------------------------------------------------------------ pairs


def vectors(num: int = 4) -> Tensor:
    return torch.randn(num, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 2, 3), (1, 2)])
def test_mean_squared_distance_over_the_pairs_present(present: tuple[int, ...]) -> None:
    v = vectors()
    expected = torch.stack([(v[a] - v[b]).square().sum() for a, b in combinations(present, 2)]).mean()
    mask = torch.isin(torch.arange(4), torch.tensor(present))
    torch.testing.assert_close(pair_mean(v @ v.T, mask), expected)


@pytest.mark.parametrize("present", [(), (2,)])
def test_without_a_pair_the_distance_is_nothing(present: tuple[int, ...]) -> None:
    v = vectors().requires_grad_()
    distance = pair_mean(v @ v.T, torch.isin(torch.arange(4), torch.tensor(present)))
    assert distance.item() == 0
    assert not torch.autograd.grad(distance, v)[0].any()


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_distances_are_taken_in_full_precision(dtype: torch.dtype, wide: torch.dtype) -> None:
    def product(features: Tensor, member: Tensor) -> Tensor:
        assert member.tolist() == [[True, False], [False, True]]
        return features @ features.T

    features = torch.ones(2, 3, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert environment_distance(product, features, torch.tensor([0, 1]), 2).dtype == wide
