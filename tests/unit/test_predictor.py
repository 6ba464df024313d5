"""The source behind @pseudo: a network trained on the granted attributes predicts those of all images."""

import numpy as np
import pytest
from helpers import plan_tiny
from numpy.typing import NDArray
from stubs import ledger, tiny_task
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.task import Task

pytestmark = pytest.mark.usefixtures("tiny")

LONG = {"recipe__epochs": "30"}


def truth(task: Task, split: str) -> NDArray[np.int64]:
    a: NDArray[np.int64] = task._lab.store.split(split).a  # type: ignore[arg-type]
    return a


@pytest.mark.parametrize("budget", ["val", "val-20", "train-10"])
def test_granted_values_stay_true_and_all_granted_labels_are_billed_once(budget: str) -> None:
    task, plain = tiny_task("groupdro", budget), tiny_task("erm", budget)
    known = {split: plain._annotations.rows(split) for split in ("train", "val")}  # type: ignore[arg-type]
    for split, rows in known.items():
        found = task.attributes(split)  # type: ignore[arg-type]
        assert found.sizes == (2, 2)
        assert found.values.shape == truth(task, split).shape
        assert set(np.unique(found.values)) <= {0, 1}
        assert np.array_equal(found.values[rows], truth(task, split)[rows])
    used = ledger(task)
    assert (used["n_train_a"], used["n_val_a_fit"]) == (2 * len(known["train"]), 2 * len(known["val"]))
    assert used["total_a"] == 2 * (len(known["train"]) + len(known["val"]))
    assert used["n_y_extra"] == 0  # it is not told the classes


def test_loud_attributes_are_predicted_well_for_images_without_any() -> None:
    task = tiny_task("groupdro", "val", **LONG)
    right = (task.attributes("train").values == truth(task, "train")).mean(axis=0)
    assert (right > 0.9).all(), right
    assert np.array_equal(task.groups("train").index >= 0, np.ones(96, bool))


def test_one_granted_attribute_is_predicted_alone() -> None:
    task = tiny_task("groupdro", "val:corner", **LONG)
    found = task.attributes("train")
    assert found.sizes == (2,)
    assert (found.values[:, 0] == truth(task, "train")[:, 1]).mean() > 0.9
    assert ledger(task)["total_a"] == 48


def test_it_is_deterministic_and_shared_by_the_methods_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny_task("groupdro", "val-20")
    found = first.attributes("train").values
    monkeypatch.setattr(Task, "train_network", None)  # the others read what the first has made
    for method in ("resample", "reweight", "dann"):
        other = tiny_task(method, "val-20")
        assert np.array_equal(other.attributes("train").values, found)
        assert ledger(other) == ledger(first)
        ours, theirs = ({key: c.n_fwd for key, c in task._lab.clock.shared.items()} for task in (first, other))
        assert ours == theirs == {next(iter(ours)): 96 * 2}


def test_predictions_are_the_same_bits_when_made_again(home: object, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny_task("groupdro", "val-20").attributes("train").values
    monkeypatch.setenv("WORSTGROUP_HOME", f"{home}-2")
    assert np.array_equal(tiny_task("groupdro", "val-20").attributes("train").values, first)


def test_its_training_is_part_of_what_the_run_costs_by_itself() -> None:
    plan = plan_tiny("groupdro", budget="val-20")
    assert plan.runs[0].spec is not None
    record = run_spec(plan.runs[0].spec, plan.stores["tiny"])
    assert (record.policy, record.source, record.label) == ("pseudo", "predictor", "groupdro@pseudo")
    assert record.cost is not None
    (key,) = record.cost.shared
    assert key.startswith("predictor:")
    shared = record.cost.shared[key]
    assert (shared.n_fwd, shared.n_fwd_nograd) == (2 * 96, 96 + 48)
    assert record.cost.marginal.n_fwd == record.cost.scratch.n_fwd == 4 * 96
