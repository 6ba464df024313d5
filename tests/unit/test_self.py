"""SELF: which images it picks, whose labels it pays for, and how the last layer is tuned on them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import ledger, tiny_task
from torch import nn
from torch.nn import functional as F
from toys import run_tiny, same, state_of
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.task import Predictor, Task
from worstgroup.methods.blocks.retraining import ClassBalanced, base_network, head_recipe, pool_and_rest
from worstgroup.methods.self import SCORES, SELF, Config, FineTuning, divergence, highest

pytestmark = pytest.mark.usefixtures("tiny")
TRAIN, VAL, EPOCHS, POOL = 96, 48, 2, 24
RNG = np.random.default_rng


def head_of(predictor: Predictor) -> nn.Linear:
    assert isinstance(predictor.head, nn.Linear)
    return predictor.head


def scores(task: Task, **config: Any) -> Any:
    made = SELF(Config(**config))
    return made.scores(task, base_network(task, made.config.base), pool_and_rest(task)[0])


# ------------------------------------------------------------------------------------------------------ what is picked


def test_the_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]), torch.tensor([[0.25, 0.25, 0.5], [0.9, 0.05, 0.05]])
    expected = [0.5 * np.log(2) + 0.25 * np.log(0.5), 0.0]
    assert divergence(p.log() + 3, q.log() - 1).tolist() == pytest.approx(expected, abs=1e-6)
    assert divergence(q.log(), p.log())[0].item() == pytest.approx(0.25 * np.log(0.5) + 0.5 * np.log(2), abs=1e-6)
    skew = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    assert divergence(skew[0].log(), skew[1].log()).item() == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2))


def test_the_same_model_disagrees_with_itself_nowhere() -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 20
    assert not divergence(logits, logits).any()


def test_the_highest() -> None:
    found = highest(np.array([0.1, 7, 0.3, 5, 6], np.float32), 3, RNG(0))
    assert found.tolist() == [1, 3, 4]
    assert highest(np.array([2, 1], np.float32), 5, RNG(0)).tolist() == [0, 1]


def test_lots_decide_between_equal_scores() -> None:
    tied = np.zeros(100, np.float32)
    first, again, other = (highest(tied, 30, RNG(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, np.arange(30))
    often = np.bincount(np.concatenate([highest(tied, 30, RNG(seed)) for seed in range(300)]), minlength=100)
    assert 60 < often.min() <= often.max() < 125  # 90 each
    tied[7] = 1
    assert all(7 in highest(tied, 1, RNG(seed)) for seed in range(5))


def test_a_network_that_is_not_early_leaves_it_to_lots() -> None:
    task = tiny_task("self")
    found = scores(task, early_stop=1.0)
    assert not found.any()
    assert np.array_equal(highest(found, 6, task.rng("self")), highest(np.zeros(POOL, np.float32), 6, task.rng("self")))


@pytest.mark.parametrize(("share", "epoch"), [(0.1, 1), (0.2, 1), (0.5, 2), (0.8, 3), (1.0, 4)])
@pytest.mark.parametrize("base", ["erm", "class_balanced"])
def test_scores_of_early_stopping(base: Any, share: float, epoch: int) -> None:
    task = tiny_task("self", recipe__epochs="4")
    pool = pool_and_rest(task)[0]
    last, early = (task.logits(base_network(task, base, each), "val")[pool] for each in (None, epoch))
    p, q = early.softmax(1), last.softmax(1)
    expected = (p * (p / q).log()).sum(1)
    found = scores(task, early_stop=share, base=base)
    assert found == pytest.approx(expected.numpy(), abs=1e-5)
    y = torch.from_numpy(task.y("val")[pool])
    wrong = scores(task, score="early_stop_misclassification", early_stop=share, base=base)
    assert np.array_equal(wrong, F.cross_entropy(early, y, reduction="none").numpy())


def test_scores_of_misclassification() -> None:
    task = tiny_task("self")
    pool = pool_and_rest(task)[0]
    logits, y = task.logits(task.erm(), "val")[pool], torch.from_numpy(task.y("val")[pool])
    assert np.array_equal(scores(task, score="misclassification"), F.cross_entropy(logits, y, reduction="none").numpy())


def test_scores_of_dropout() -> None:
    task = tiny_task("self")
    torch.manual_seed(3)
    first, again = (scores(tiny_task("self"), score="dropout_disagreement", dropout=0.7) for _ in "12")
    assert np.array_equal(first, again)
    assert (first > 0).all()
    none = scores(task, score="dropout_disagreement", dropout=0.0)
    assert none == pytest.approx(np.zeros(POOL), abs=1e-6)
    with task.seeded("self dropout"):
        kept = F.dropout(task.features(task.erm(), "val")[pool_and_rest(task)[0]], 0.7)
    other, logits = task.erm().model.head(kept).detach(), task.logits(task.erm(), "val")[pool_and_rest(task)[0]]
    assert first == pytest.approx(divergence(other, logits).numpy(), abs=1e-6)


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("score", "early"), [(score, "early" in score) for score in SCORES])
@pytest.mark.parametrize("budget", ["none", "select"])
def test_disagreement_pays_for_the_picked_images_only(score: str, early: bool, budget: str) -> None:
    record = run_tiny("self", budget, self__score=score, self__points="7", self__steps="10")
    assert record.cost is not None
    assert record.labels is not None
    used = record.labels
    assert (used.n_train_a, used.n_val_a_fit) == (0, 0)
    assert used.n_val_a_select == {"none": 0, "select": 48}[budget]
    assert used.n_y_extra == (7 if score.endswith("disagreement") else POOL)
    marginal, scratch = record.cost.marginal, record.cost.scratch
    assert (marginal.n_fwd, marginal.n_fwd_nograd, marginal.n_head_fits) == (0, VAL * (2 if early else 1), 1)
    assert scratch.n_fwd == EPOCHS * TRAIN


# ---------------------------------------------------------------------------------------------------------- fine-tuning


def test_the_whole_pool_is_cbllr_from_the_networks_head() -> None:
    task = tiny_task("self", recipe__batch_size="12")
    found = SELF(Config(points=POOL, lr=0.1, steps=20)).fit(task)  # 10 epochs of two batches
    pool, rest = pool_and_rest(task)
    recipe = head_recipe(task.recipe, 0.1, 10)
    stream = task.on(np.arange(0), pool, select=rest)
    expected = stream.train_head(ClassBalanced(recipe), task.erm(), "x", recipe=recipe)
    assert same(state_of(head_of(found)), state_of(head_of(expected)))
    assert found.choice == replace(expected.choice, step=None)
    assert not same(state_of(head_of(found)), state_of(task.erm().model.head))


def test_a_step_of_nothing_is_erm() -> None:
    task = tiny_task("self")
    found = SELF(Config(lr=1e-30)).fit(task)
    assert same(state_of(head_of(found)), state_of(task.erm().model.head))
    assert found.checkpoint.key == task.erm().key
    assert found.choice.candidates == 10


@pytest.mark.parametrize("points", [5, 24])
def test_it_takes_its_steps(points: int) -> None:
    task = tiny_task("self")
    SELF(Config(points=points, steps=250)).fit(task)
    assert task._lab.clock.stages["head"].n_updates == 250


def test_batches_are_whole_and_class_balanced() -> None:
    whole = tiny_task("self")
    zeros, ones = (np.flatnonzero(whole.y("val") == label) for label in (0, 1))
    task = whole.on(np.arange(0), np.concatenate([zeros[:9], ones[:2]]))
    batches = list(FineTuning(100).make_sampler(task, task.recipe)(torch.Generator().manual_seed(0)))
    assert [len(index) for index in batches] == [16] * 100
    assert task.y("train")[torch.cat(batches)].mean() == pytest.approx(0.5, abs=0.04)


def test_images_that_select_are_not_tuned_on() -> None:
    task = tiny_task("self", "none")
    SELF(Config(points=POOL, steps=10)).fit(task)
    pool, rest = pool_and_rest(task)
    used = np.flatnonzero(task._annotations._used["val:y"])
    assert np.array_equal(used, pool)
    assert not set(used) & set(rest)
    assert not any(value for name, value in ledger(task).items() if name != "n_y_extra")


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"points": 0}, "self.points must be at least 1, got 0"),
        ({"early_stop": 0.0}, r"self.early_stop must be in \(0, 1\], got 0.0"),
        ({"dropout": 1.0}, r"self.dropout must be in \[0, 1\), got 1.0"),
        ({"lr": 0.0}, "self.lr must be positive, got 0.0"),
        ({"steps": 15}, "self.steps must be a positive multiple of 10, got 15"),
        ({"steps": 0}, "self.steps must be a positive multiple of 10, got 0"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("self", **{f"self__{key}": str(value)})


@pytest.mark.parametrize("name", ["score", "base"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"self\.{name} must be one of .*, got 'x'"):
        Config(**{name: "x"})  # type: ignore[arg-type]


def test_what_is_searched() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {
        "points": "{500,100,20}",
        "early_stop": "{0.5,0.2,0.1}",
        "dropout": "{0.5,0.7,0.9}",
        "lr": "{0.01,0.001,0.0001}",
    }
