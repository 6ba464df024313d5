"""BARACK: groups of all images from those of some, and GroupDRO on them."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny, predictions
from numpy.typing import NDArray
from stubs import ledger, tiny_task
from toys import net, run_tiny, toy_task
from worstgroup.benchmark.annotations import Attributes, Groups, Held
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Task
from worstgroup.methods import barack, groupdro
from worstgroup.methods.barack import BARACK, Config, joint_scores, likeliest
from worstgroup.methods.groups import predictor
from worstgroup.methods.groups.predictor import AttributeLoss, balanced_weights

pytestmark = pytest.mark.usefixtures("tiny")
TRAIN, VAL = 96, 48
RECIPE = Recipe(batch_size=8)


def true_groups(task: Task, split: Held = "train") -> NDArray[np.int64]:
    """True groups of all images, read past the meter."""
    made = task._lab.store.split(split)
    return Attributes(made.a, (2, 2)).groups(made.y, 2).index


def given(monkeypatch: pytest.MonkeyPatch, logits: NDArray[np.float32]) -> None:
    """A predictor that says this of train."""
    monkeypatch.setattr(barack, "attribute_logits", lambda task, balanced: {"train": logits})


def drawn(method: groupdro.GroupDRO, task: Task, epochs: int = 1) -> torch.Tensor:
    """Images that some epochs are made of."""
    draw = method.make_sampler(task, RECIPE)
    return torch.cat([part for epoch in range(epochs) for part in draw(torch.Generator().manual_seed(epoch))])


# ----------------------------------------------------------------------------------------------- all annotated, or none


@pytest.mark.parametrize("adjustment", ["0", "2"])
def test_with_all_attributes_it_is_groupdro_bit_for_bit(adjustment: str) -> None:
    found, expected = (run_tiny(name, "train+val", adjustment=adjustment) for name in ("barack", "groupdro"))
    assert predictions(found) == predictions(expected)
    assert found.labels == expected.labels
    assert found.cost is not None
    assert not found.cost.shared  # nothing is predicted


def test_the_sampler_is_groupdros() -> None:
    task = toy_task((20, 3, 5, 30))
    found, expected = BARACK(Config()), groupdro.GroupDRO(groupdro.Config())
    for method in (found, expected):
        method.setup(task, net())
    assert torch.equal(drawn(found, task), drawn(expected, task))


def test_a_constant_predictor_makes_groups_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("barack", "val-20")  # no image of train is annotated
    given(monkeypatch, np.tile(np.float32([0, 1, 2, 0]), (TRAIN, 1)))
    monkeypatch.setattr(barack, "likeliest", lambda scores, possible: scores.argmax(1))
    groups = BARACK(Config()).groups(task)
    assert groups.index.tolist() == (4 * task.y("train") + 2).tolist()


# -------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("budget", ["train-10", "train-33"])
def test_known_groups_are_true_and_no_other_one_is_made_up(budget: str) -> None:
    task = tiny_task("barack", budget)
    known = task.annotated("train")
    groups = BARACK(Config()).groups(task)
    assert (groups.num, len(groups.index)) == (8, TRAIN)
    assert np.array_equal(groups.index[known], true_groups(task)[known])
    assert np.array_equal(groups.index // 4, task.y("train"))
    occurring = np.union1d(true_groups(task)[known], true_groups(task, "val"))
    assert set(groups.index) <= set(occurring)


def test_loud_attributes_are_predicted_well() -> None:
    task = tiny_task("barack", "val", recipe__epochs="15")
    right = BARACK(Config()).groups(task).index == true_groups(task)
    assert right.mean() > 0.8, right.mean()


def test_groups_are_restricted_to_those_of_the_annotated_images(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("barack", "train-10")
    logits = np.random.default_rng(0).normal(size=(TRAIN, 4)).astype(np.float32)
    given(monkeypatch, logits)
    y, known, rows = task.y("train"), task.annotated("train"), task.annotated("val")
    annotated = set(true_groups(task)[known]) | set(true_groups(task, "val")[rows])
    score = joint_scores(torch.from_numpy(logits), (2, 2)).numpy()
    best = [max((g for g in annotated if g // 4 == y[i]), key=lambda g: score[i, g % 4]) for i in range(TRAIN)]
    expected = np.array(best)
    expected[known] = true_groups(task)[known]
    assert BARACK(Config()).groups(task).index.tolist() == expected.tolist()


def test_only_possible_values_are_chosen() -> None:
    scores = np.float32([[3, 2, 1], [1, 2, 3], [3, 2, 1], [1, 2, 3]])
    possible = np.array([[True, True, True], [True, True, False], [False, False, True], [False, False, False]])
    assert likeliest(scores, possible).tolist() == [0, 1, 2, 0]


def test_a_class_with_one_annotated_value_is_one_group() -> None:
    scores = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for value in range(4):
        assert (likeliest(scores, np.tile(np.arange(4) == value, (50, 1))) == value).all()
    assert (likeliest(scores, np.zeros((50, 4), bool)) == 0).all()


def test_names_of_values_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    scores, possible = rng.normal(size=(200, 3)).astype(np.float32), rng.random((200, 3)) < 0.8
    possible[:, 0] = True
    name = np.array([2, 0, 1])
    swapped = likeliest(scores[:, np.argsort(name)], possible[:, np.argsort(name)])
    assert np.array_equal(swapped, name[likeliest(scores, possible)])


def test_scores_of_combinations() -> None:
    logits = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    found = joint_scores(logits, (2, 3, 4))
    p, q, r = (part.softmax(1) for part in logits.split([2, 3, 4], 1))  # type: ignore[no-untyped-call]
    for values in np.ndindex(2, 3, 4):
        place = Attributes(np.array([values]), (2, 3, 4)).joint().index[0]
        expected = p[:, values[0]] * q[:, values[1]] * r[:, values[2]]
        torch.testing.assert_close(found[:, place].exp(), expected)
    assert torch.equal(joint_scores(logits, (9,)), logits.log_softmax(1))


def test_groups_are_drawn_equally_often() -> None:
    task = tiny_task("barack", "train-33")
    method = BARACK(Config())
    method.setup(task, net())
    found = method.group.bincount(minlength=8)
    share = method.group[drawn(method, task, 100)].bincount(minlength=8) / (100 * TRAIN)
    assert share.tolist() == pytest.approx(((found > 0) / (found > 0).sum()).tolist(), abs=0.015)


# ------------------------------------------------------------------------------------------------------- the predictor


def test_weights_are_those_of_classes_and_of_groups_in_them() -> None:
    index = np.array([0] * 6 + [1] * 3 + [2] + [5] * 4)  # class 0 has three groups, class 1 one
    y = index // 3
    weights = balanced_weights(y, Groups(index, 6))
    assert weights.tolist() == pytest.approx([1 / 18] * 6 + [1 / 9] * 3 + [1 / 3] + [1 / 4] * 4)
    assert np.bincount(y, weights).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(("balanced", "share"), [(True, [0.25] * 4), (False, [0.5, 0.05, 0.1, 0.35])])
def test_its_draws_are_balanced_or_not(balanced: bool, share: list[float]) -> None:
    task = toy_task((100, 10, 20, 70))
    draw = AttributeLoss(predictor.Config(balanced), 8000).make_sampler(task, RECIPE)
    index = torch.cat(list(draw(torch.Generator().manual_seed(0)))).numpy()
    found = np.bincount(task.groups("train").index[index]) / len(index)
    assert len(index) == 8000
    assert found.tolist() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("budget", ["train-10", "val-20"])
def test_labels_are_billed(budget: str) -> None:
    task = tiny_task("barack", budget)
    train, val = (len(task._annotations.rows(split)) for split in ("train", "val"))  # type: ignore[arg-type]
    BARACK(Config()).groups(task)
    used = ledger(task)
    assert (used["n_train_a"], used["n_val_a_fit"], used["n_y_extra"]) == (2 * train, 2 * val, val)


def test_runs_of_a_block_share_a_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tiny_task("barack", "train-10"), tiny_task("barack", "train-10", adjustment="3")
    expected = BARACK(Config()).groups(first).index
    monkeypatch.setattr(Task, "train_network", None)  # the other one reads what the first has made
    assert np.array_equal(BARACK(Config(adjustment=3.0)).groups(second).index, expected)
    assert ledger(second) == ledger(first)


def test_what_it_costs() -> None:
    record = run_tiny("barack", "train-10")
    assert record.cost is not None
    (key,) = record.cost.shared
    assert key.startswith("predictor:")
    shared, marginal = record.cost.shared[key], record.cost.marginal
    assert (shared.n_fwd, shared.n_fwd_nograd) == (2 * TRAIN, TRAIN + VAL)
    assert marginal.n_fwd == marginal.n_bwd == 2 * 2 * TRAIN
    assert (record.policy, record.source) == ("", "")


def test_pseudo_groups_can_be_balanced_too() -> None:
    plain, balanced = (run_tiny("groupdro", "val-20", predictor__balanced=text) for text in ("false", "true"))
    assert plain.labels is not None
    assert balanced.labels is not None
    assert (plain.labels.n_y_extra, balanced.labels.n_y_extra) == (0, balanced.labels.n_val_a_fit // 2)
    assert predictions(plain) != predictions(balanced)


# ------------------------------------------------------------------------------------------------------------ settings


def test_ranges_of_the_search() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {"adjustment": "{0,1,2,3}"}
    assert Config() == Config(step_size=0.01, adjustment=0.0, absent="ignore")


@pytest.mark.parametrize("key", ["step_size", "adjustment"])
def test_bad_values_are_refused(key: str) -> None:
    says = f"barack.{key} must be at least 0, got -1.0"
    config: dict[str, Any] = {key: -1.0}
    with pytest.raises(UserError, match=says):
        Config(**config)
    with pytest.raises(UserError, match=says):
        plan_tiny("barack", **{f"barack__{key}": "-1"})
