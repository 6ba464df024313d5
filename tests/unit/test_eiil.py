"""EIIL: environments that violate invariance most, in closed form and as Adam finds them."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny, predictions
from stubs import ledger, tiny_task
from torch import Tensor
from torch.nn import functional as F
from toys import run_tiny
from worstgroup.benchmark.annotations import Held
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.methods.groups import eiil, errors
from worstgroup.methods.groups.eiil import EIIL, Config, by_adam, derivatives, shares, violation, violation_slope

pytestmark = pytest.mark.usefixtures("tiny")
HELD: tuple[Held, Held] = ("train", "val")
both = pytest.mark.parametrize("split", HELD)


def reference(n: int, classes: int = 2, margin: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits (n, K) that are often right, and labels (n,)."""
    generator = torch.Generator().manual_seed(n)
    y = torch.randint(classes, (n,), generator=generator)
    return 2 * torch.randn(n, classes, generator=generator) + margin * F.one_hot(y, classes), y


def wrong(logits: Tensor, y: Tensor) -> Tensor:
    return logits.argmax(1) != y


def normal(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_they_are_those_of_the_loss_by_a_factor_on_the_logits(classes: int) -> None:
    logits, y = reference(20, classes)
    s = torch.ones(20, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(F.cross_entropy(s[:, None] * logits.double(), y, reduction="sum"), s)
    torch.testing.assert_close(derivatives(logits, y), expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_with_two_classes_they_are_positive_where_the_prediction_is_wrong(scale: float) -> None:
    """The errors of JTT, however sure the reference is (spec: test 25.10)."""
    logits, y = reference(5000)
    assert torch.equal(derivatives(scale * logits + 7, y) > 0, wrong(logits, y))


def test_a_tie_is_no_violation() -> None:
    assert derivatives(torch.full((2, 2), 3.0), torch.tensor([0, 1])).tolist() == [0, 0]


@pytest.mark.parametrize("classes", [3, 10])
def test_with_more_classes_they_are_positive_where_the_expected_logit_exceeds_that_of_the_label(classes: int) -> None:
    logits, y = reference(2000, classes)
    found = derivatives(logits, y) > 0
    expected = (logits.softmax(1) * logits).sum(1) > logits.gather(1, y[:, None])[:, 0]
    assert (found == expected).all()
    assert not (found & ~wrong(logits, y)).any()  # a part of the errors
    assert 0 < found.sum() < wrong(logits, y).sum()


# ---------------------------------------------------------------------------------------------------------- violation


def test_violation_of_its_formula() -> None:
    g, y = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0]), torch.tensor([0, 0, 0, 1, 1])
    q = torch.tensor([1.0, 0.5, 0.0, 0.25, 1.0])
    first = ((1 - 1) / 3, (0.75 - 1) / 2)
    second = ((0 - 1 + 0.5) / 3, 2.25 / 2)
    expected = sum(value**2 for value in (*first, *second)) / 2
    assert violation(q, shares(g, y)).item() == pytest.approx(expected)


def test_environments_can_be_swapped() -> None:
    logits, y = reference(100, 3)
    share, q = shares(derivatives(logits, y), y), normal(100).double().sigmoid()
    assert violation(q, share).item() == pytest.approx(violation(1 - q, share).item(), rel=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_closed_form_violates_invariance_most(classes: int) -> None:
    """Of all splits of ten images, and of soft ones."""
    logits, y = reference(10, classes)
    g = derivatives(logits, y)
    share, best = shares(g, y), violation((g > 0).double(), shares(g, y)).item()
    hard = torch.tensor(list(product((0.0, 1.0), repeat=10)), dtype=torch.float64)
    soft = torch.rand(500, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert best == pytest.approx(max(violation(q, share).item() for q in hard), rel=1e-12)
    assert all(violation(q, share).item() < best for q in soft)


# --------------------------------------------------------------------------------------------------------------- Adam


def test_the_slope_is_that_of_the_violation() -> None:
    logits, y = reference(50, 3)
    share, w = shares(derivatives(logits, y), y), normal(50).double().requires_grad_()
    (expected,) = torch.autograd.grad(violation(w.sigmoid(), share), w)
    torch.testing.assert_close(violation_slope(w.sigmoid(), share), expected)


def test_adam_agrees_on_a_thousand_images() -> None:
    logits, y = reference(1000)
    g = derivatives(logits, y)
    assert torch.equal(by_adam(g.float(), y, normal(1000)), wrong(logits, y))


def test_adam_stalls_where_gradients_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As released: below its epsilon every image stays on the side where it started."""
    monkeypatch.setattr(eiil, "STEPS", 1500)
    g, y, start = torch.tensor([1.0, -1.0]).repeat(50), torch.zeros(100, dtype=torch.long), 0.5 * normal(100)
    assert torch.equal(by_adam(g, y, start), g > 0)
    tiny = by_adam(1e-9 * g, y, start)
    assert torch.equal(tiny, start > 0) or torch.equal(tiny, start < 0)


def test_adams_environments_are_numbered_by_their_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eiil, "STEPS", 0)
    g, y = torch.tensor([2.0, -1.0, -3.0, 1.0]), torch.tensor([0, 0, 1, 1])
    assert by_adam(g, y, torch.tensor([1.0, -1.0, 1.0, -1.0])).tolist() == [True, False, False, True]
    assert by_adam(g, y, torch.tensor([-1.0, 1.0, -1.0, 1.0])).tolist() == [True, False, False, True]


# ------------------------------------------------------------------------------------------------------------- source


def fixed(monkeypatch: pytest.MonkeyPatch, errors: list[int]) -> Any:
    """A task whose reference is wrong about these images only."""
    task = tiny_task("groupdro+eiil")

    def logits(reference: Any, split: Held) -> Tensor:
        said = task.y(split).copy()
        said[errors] = 1 - said[errors]
        return 3 * F.one_hot(torch.from_numpy(said), 2).float()

    monkeypatch.setattr(task, "logits", logits)
    return task


@both
def test_one_error_of_a_perfect_reference_is_an_environment(split: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    found = EIIL(Config()).attributes(fixed(monkeypatch, [5]), split)
    assert found.sizes == (2,)
    assert np.flatnonzero(found.values[:, 0]).tolist() == [5]


@both
@pytest.mark.parametrize("solver", ["closed", "adam"])
@pytest.mark.parametrize("share", [0, 1])
def test_an_empty_environment_is_refused(split: Held, solver: Any, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task = fixed(monkeypatch, list(range(share * tiny_task("erm").size(split))))
    with pytest.raises(UserError, match=f"eiil: on {split} the reference is right, or wrong, about all images"):
        EIIL(Config(solver=solver)).attributes(task, split)


@both
@pytest.mark.parametrize("epoch", [1, 2])
def test_with_two_classes_the_environments_are_right_and_wrong(split: Held, epoch: int) -> None:
    task = tiny_task("groupdro+eiil")
    found = EIIL(Config(reference_epochs=epoch)).attributes(task, split)
    expected = errors.Errors(errors.Config(first_epochs=epoch)).attributes(task, split)
    assert np.array_equal(found.values, expected.values)
    assert not any(ledger(task).values())


def test_adams_environments_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eiil, "STEPS", 20)
    first, second = tiny_task("groupdro+eiil"), tiny_task("dfr+eiil")
    for task in (first, second):
        task._source = EIIL(Config(solver="adam"))
    train, val = (first.attributes(split).values for split in HELD)
    assert (len(train), len(val)) == (96, 48)
    monkeypatch.setattr(eiil, "by_adam", None)
    again = [second.attributes(split).values for split in HELD]
    assert np.array_equal(again[0], train)
    assert np.array_equal(again[1], val)
    assert not any(ledger(second).values())


def test_the_row_of_the_papers_is_groupdro_on_the_errors() -> None:
    first, second = run_tiny("groupdro+eiil"), run_tiny("groupdro+errors")
    assert predictions(first) == predictions(second)
    assert first.cost is not None
    assert (first.cost.marginal.n_fwd, first.cost.marginal.n_fwd_nograd, first.cost.scratch.n_fwd) == (192, 96, 288)


def test_the_original_learner_compares_the_two_environments() -> None:
    assert run_tiny("irm+eiil").status == "finished"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"reference_epochs": 0}, "eiil.reference_epochs must be at least 1, got 0"),
        ({"reference_epochs": 3}, "eiil.reference_epochs must be at most the recipe's 2 epochs, got 3"),
        ({"solver": "sgd"}, "eiil.solver"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("groupdro+eiil", **{f"eiil__{key}": str(value)})
    if config != {"reference_epochs": 3}:
        with pytest.raises(UserError, match=says):
            Config(**config)


def test_what_is_searched() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {"reference_epochs": "{1,2,5}"}
