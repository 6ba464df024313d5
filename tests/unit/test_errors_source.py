"""The source `errors`: what an early ERM gets wrong, as a group."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import ledger, tiny_task
from torch.nn import functional as F
from toys import run_tiny
from worstgroup.benchmark.annotations import Held
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.methods.groups.errors import Config, Errors
from worstgroup.methods.jtt import error_weights

pytestmark = pytest.mark.usefixtures("tiny")
both = pytest.mark.parametrize("split", ["train", "val"])


@both
@pytest.mark.parametrize("epoch", [1, 2])
def test_errors_are_those_of_the_shared_erm_after_so_many_epochs(split: Held, epoch: int) -> None:
    task = tiny_task("groupdro+errors")
    found = Errors(Config(first_epochs=epoch)).attributes(task, split)
    wrong = task.logits(task.erm(epoch), split).argmax(1).numpy() != task.y(split)
    assert found.sizes == (2,)
    assert found.values.shape == (task.size(split), 1)
    assert np.array_equal(found.values[:, 0] == 1, wrong)
    assert not any(ledger(task).values())


def test_groups_are_of_class_and_error_and_the_errors_are_those_that_jtt_weights() -> None:
    task = tiny_task("groupdro+errors")
    groups = task.groups("train")
    assert groups.num == 4
    assert np.array_equal(groups.index // 2, task.y("train"))
    wrong = task.logits(task.erm(1), "train").argmax(1).numpy() != task.y("train")
    assert np.array_equal(np.where(groups.index % 2, 7.0, 1.0), error_weights(wrong, 7.0))


@both
def test_a_first_run_without_errors_is_refused(split: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("groupdro+errors")
    monkeypatch.setattr(task, "logits", lambda first, part: F.one_hot(torch.from_numpy(task.y(part)), 2).float())
    with pytest.raises(UserError, match=f"errors: the first run makes no error on {split}.*lower errors.first_epochs"):
        Errors(Config()).attributes(task, split)


def test_they_cost_a_prefix_of_erm_and_a_pass_over_train() -> None:
    record = run_tiny("groupdro+errors")
    assert record.cost is not None
    assert record.labels is not None
    images, epochs = 96, 2
    assert (record.cost.marginal.n_fwd, record.cost.marginal.n_fwd_nograd) == (images * epochs, images)
    assert record.cost.scratch.n_fwd == images * epochs + images
    assert record.labels.total_a == 0


def test_a_host_without_groups_selects_by_them() -> None:
    record = run_tiny("erm+errors")
    assert record.selection is not None
    assert record.selection.criterion == "val-pseudo-wga"
    assert record.labels is not None
    assert record.labels.total_a == 0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"first_epochs": 0}, "errors.first_epochs must be at least 1, got 0"),
        ({"first_epochs": 3}, "errors.first_epochs must be at most the recipe's 2 epochs, got 3"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("groupdro+errors", **{f"errors__{key}": str(value)})


def test_what_is_searched() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {"first_epochs": "{1,5,10}"}
