"""CB-LLR, and what it shares with SELF: the network, the half of validation, the optimiser of the last layer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import ledger, tiny_task
from torch import nn
from toys import run_tiny, same, state_of
from worstgroup.benchmark.budget import RUNGS, Budget
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.home import runs_home
from worstgroup.benchmark.record import find
from worstgroup.benchmark.registry import METHODS
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Predictor, Task
from worstgroup.leaderboard.verify import verify
from worstgroup.methods.blocks.retraining import ClassBalanced, base_network, head_recipe, pool_and_rest
from worstgroup.methods.cbllr import CBLLR, Config

pytestmark = pytest.mark.usefixtures("tiny")
TRAIN, VAL, EPOCHS = 96, 48, 2


def head_of(predictor: Predictor) -> nn.Linear:
    assert isinstance(predictor.head, nn.Linear)
    return predictor.head


# --------------------------------------------------------------------------------------------------------------- halves


def granted(task: Task) -> set[int]:
    return set(task._annotations.rows("val", "select").tolist())


def test_halves_are_disjoint_whole_and_of_equal_classes() -> None:
    task = tiny_task("cbllr")
    pool, rest = pool_and_rest(task)
    assert np.array_equal(np.union1d(pool, rest), np.arange(VAL))
    assert (len(pool), len(rest)) == (24, 24)
    y = task.y("val")
    assert np.array_equal(np.bincount(y[pool]), np.bincount(y[rest]))


@pytest.mark.parametrize("budget", ["select-20", "val-5", "val-20"])
def test_all_images_with_attributes_select(budget: str) -> None:
    task = tiny_task("cbllr", budget)
    pool, rest = pool_and_rest(task)
    assert granted(task) <= set(rest.tolist())
    assert len(pool) == 24
    seen = task.on(np.arange(0), pool, select=rest).selector().rows
    assert set(seen.tolist()) == granted(task)


def test_where_all_or_none_have_attributes_the_halves_are_the_same() -> None:
    pools = [pool_and_rest(tiny_task("cbllr", budget))[0] for budget in ("none", "select", "val")]
    assert all(np.array_equal(pools[0], pool) for pool in pools)


def test_halves_for_attributes_do_not_prefer_images_with_attributes() -> None:
    task = tiny_task("dfr", "val-20")
    assert granted(task) & set(task.halves(np.arange(VAL))[0].tolist())


# -------------------------------------------------------------------------------------------------------------- network


def test_the_networks() -> None:
    task = tiny_task("cbllr")
    assert base_network(task, "erm").key == task.erm().key
    assert base_network(task, "erm", 1).key == task.erm(1).key


def test_the_class_balanced_network_is_trained_once_for_all() -> None:
    first, second = tiny_task("cbllr"), tiny_task("self", lr="0.3")
    found = [base_network(task, "class_balanced") for task in (first, second)]
    assert found[0].key == found[1].key
    assert same(*(state_of(network.model) for network in found))
    bills = [
        [part.n_fwd for key, part in task._lab.clock.shared.items() if key.startswith("erm-cb:")]
        for task in (first, second)
    ]
    assert bills == [[EPOCHS * TRAIN]] * 2
    assert not any(ledger(first).values())


def test_the_class_balanced_network_is_that_of_its_objective() -> None:
    task = tiny_task("cbllr", recipe__schedule="cosine")
    shared = base_network(task, "class_balanced")
    own = task.train_network(ClassBalanced(task.recipe), task.initial().model, "own")
    assert same(state_of(shared.model), state_of(own.model))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_an_early_network_is_on_its_way_to_the_last(schedule: Any) -> None:
    """Its learning rate falls as that of the whole training does."""
    recipe = Recipe(epochs=10, schedule=schedule)
    early, whole = ClassBalanced(recipe), Objective(None)
    for epoch in (0.0, 0.5, 3.0, 4.75):
        assert early.lr_factor(replace(recipe, epochs=5), epoch) == whole.lr_factor(recipe, epoch)
    task = tiny_task("cbllr")
    assert base_network(task, "class_balanced", 1).key != base_network(task, "class_balanced").key


# --------------------------------------------------------------------------------------------------------------- CB-LLR


@pytest.mark.parametrize("base", ["erm", "class_balanced"])
def test_it_is_a_fresh_head_on_class_balanced_features_of_one_half(base: Any) -> None:
    task, config = tiny_task("cbllr"), Config(lr=0.05, epochs=4, base=base)
    found = CBLLR(config).fit(task)
    pool, rest = pool_and_rest(task)
    recipe = replace(task.recipe, optimizer="sgd", lr=0.05, momentum=0.9, epochs=4, schedule="constant")
    objective: Objective[None] = Objective(None)
    objective.sampler = "class"
    network = base_network(task, base)
    expected = task.on(np.arange(0), pool, select=rest).train_head(objective, network, "x", recipe=recipe, fresh=True)
    assert found.checkpoint.key == network.key
    assert same(state_of(head_of(found)), state_of(head_of(expected)))
    assert found.choice == replace(expected.choice, step=None)
    assert found.choice.candidates == 4
    assert found.trajectory is None  # a record's history would be counted on images trained on


def test_its_optimiser() -> None:
    block = Recipe(optimizer="adam", lr=1e-4, momentum=0.0, weight_decay=0.1, batch_size=7, epochs=3, schedule="cosine")
    assert head_recipe(block, 0.3, 9) == replace(
        block, optimizer="sgd", lr=0.3, momentum=0.9, epochs=9, schedule="constant"
    )


def test_on_a_balanced_half_the_sampler_is_random() -> None:
    task = tiny_task("cbllr")
    pool, rest = pool_and_rest(task)
    half = task.on(np.arange(0), pool, select=rest)
    draws = [
        torch.cat(list(made.make_sampler(half, task.recipe)(torch.Generator().manual_seed(0))))
        for made in (ClassBalanced(task.recipe), Objective(None))
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize(("budget", "select"), [("none", 0), ("select", 48), ("val-20", 20)])
def test_cost_and_labels(budget: str, select: int) -> None:
    record = run_tiny("cbllr", budget, cbllr__epochs="3")
    assert record.cost is not None
    assert record.labels is not None
    marginal, scratch = record.cost.marginal, record.cost.scratch
    assert (marginal.n_fwd, marginal.n_fwd_nograd, marginal.n_head_fits) == (0, VAL, 1)
    assert scratch.n_fwd == EPOCHS * TRAIN
    used = record.labels
    assert (used.n_train_a, used.n_val_a_fit, used.n_val_a_select, used.n_y_extra) == (0, 0, select, 24)


@pytest.mark.parametrize("method", ["cbllr", "self"])
@pytest.mark.parametrize("budget", ["none", "select", "val-20"])
def test_its_record_can_be_verified(method: str, budget: str) -> None:
    run_tiny(method, budget)
    (path,) = find(runs_home())
    assert verify(path).problems == ()


@pytest.mark.parametrize("method", ["cbllr", "self"])
def test_added_validation_images_do_not_apply(method: str) -> None:
    for rung in RUNGS:
        policy = METHODS[method].requires.resolve(Budget(rung), extra=True)
        reason = "it trains on validation images anyway, so extra val does not apply"
        assert (policy.tag, policy.reason) == ("n/a", reason)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"lr": 0.0}, "cbllr.lr must be positive, got 0.0"),
        ({"epochs": 0}, "cbllr.epochs must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("cbllr", **{f"cbllr__{key}": str(value)})


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"cbllr\.base must be one of erm, class_balanced, got 'groups'"):
        Config(base="groups")  # type: ignore[arg-type]


def test_what_is_searched() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {"lr": "{0.003,0.001,0.01}"}
