"""GroupDRO: weights over groups that grow with their loss."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from numpy.typing import NDArray
from torch.nn import functional as F
from toys import batch, costing, net, on_logits, same, state_of, toy_task, train
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods.groupdro import Config, GroupDRO


def dro(sizes: Sequence[int] = (1, 0, 0, 1), **config: Any) -> GroupDRO:
    """GroupDRO on classes 0 and 1 (`@class`), so that there are two groups."""
    made: GroupDRO = on_logits(GroupDRO(Config(**config)), sizes, policy="class")
    return made


def of_groups(sizes: Sequence[int], **config: Any) -> GroupDRO:
    """GroupDRO on the four groups of two classes and two values of an attribute."""
    made: GroupDRO = on_logits(GroupDRO(Config(**config)), sizes)
    return made


def weights(method: GroupDRO) -> list[float]:
    """The groups' weights q."""
    q: list[float] = method.log_q.exp().tolist()
    return q


# ---------------------------------------------------------------------------------------------------------- one update


@pytest.mark.parametrize(
    ("eta", "q", "loss"),
    [
        (math.log(2), (1 / 3, 2 / 3), 5 / 3),
        (0.01, (0.4975, 0.5025), 1.5025),
        (0.0, (0.5, 0.5), 1.5),
        (1e4, (0.0, 1.0), 2.0),
    ],
)
def test_weighs_losses_one_and_two(eta: float, q: tuple[float, float], loss: float) -> None:
    method = dro(step_size=eta)
    assert method.loss(costing([1, 2], [0, 1])).item() == pytest.approx(loss, abs=5e-6)
    assert weights(method) == pytest.approx(q, abs=5e-6)


def test_takes_the_mean_loss_of_each_group() -> None:
    method = dro((3, 0, 0, 1), step_size=0.0)
    assert method.loss(costing([1, 2, 6, 5], [0, 0, 0, 1])).item() == pytest.approx((3 + 5) / 2)


def test_reads_the_group_of_an_image_by_its_index() -> None:
    method = of_groups((2, 1, 1, 2), step_size=1.0)
    assert method.group.tolist() == [0, 0, 1, 2, 3, 3]
    assert weights(method) == pytest.approx([0.25] * 4)
    method.loss(costing([1, 1], [0, 1], [2, 5]))
    grown = 1 / (2 + 2 * math.e) * np.array([1, math.e, 1, math.e])
    assert weights(method) == pytest.approx(grown)


def test_weights_have_no_gradient() -> None:
    method = dro(step_size=1.0)
    data = costing([1, 2], [0, 1])
    data.x.requires_grad_()
    (gradient,) = torch.autograd.grad(method.loss(data), data.x)
    expected = torch.tensor(weights(method))[:, None] * (data.x.softmax(1) - torch.eye(2)[data.y])
    assert torch.allclose(gradient, expected)
    assert not method.log_q.requires_grad


def test_at_eta_zero_on_balanced_classes_it_is_erm() -> None:
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    data = Batch(x, torch.arange(12) // 6, torch.arange(12))
    assert torch.allclose(dro((3, 3, 3, 3), step_size=0.0).loss(data), F.cross_entropy(x, data.y))


# ---------------------------------------------------------------------------------------------------------- adjustment


def test_adjustment_is_added_to_each_group() -> None:
    method = dro((4, 0, 0, 1), adjustment=1.0, step_size=0.0)
    assert method.shift.tolist() == [0.5, 1.0]
    assert method.loss(costing([1, 2], [0, 1], [0, 4])).item() == pytest.approx((1.5 + 3) / 2)


def test_adjustment_enters_the_weights() -> None:
    method = dro((4, 0, 0, 1), adjustment=1.0, step_size=math.log(4))
    method.loss(costing([1, 1], [0, 1], [0, 4]))
    assert weights(method) == pytest.approx([1 / 3, 2 / 3])


# ------------------------------------------------------------------------------------------------------- absent groups


@pytest.mark.parametrize(("absent", "loss"), [("ignore", 2 / 3), ("renorm", 1.0)])
def test_an_absent_group(absent: Literal["ignore", "renorm"], loss: float) -> None:
    """q = (1/2 * 2, 1/2 * 1), normalised; the absent group's loss is 0."""
    method = dro((2, 0, 0, 1), step_size=math.log(2), absent=absent)
    assert method.loss(costing([1, 1], [0, 0])).item() == pytest.approx(loss)
    assert weights(method) == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(("absent", "loss"), [("ignore", (1.5 + 1.0) / 2), ("renorm", 1.5)])
def test_an_absent_group_and_an_adjustment(absent: Literal["ignore", "renorm"], loss: float) -> None:
    method = dro((4, 0, 0, 1), adjustment=1.0, step_size=0.0, absent=absent)
    assert method.loss(costing([1], [0])).item() == pytest.approx(loss)


@pytest.mark.parametrize("absent", ["ignore", "renorm"])
@pytest.mark.parametrize("present", [0, 3])
def test_a_batch_of_one_group(absent: str, present: int) -> None:
    """Also when that group's weight would round to 0: values and slopes are finite."""
    method = of_groups((1, 1, 1, 1), step_size=1e3, adjustment=1.0, absent=absent)
    method.loss(costing([0.1, 3], [0, 1], [0, 2]))
    data = costing([2.0], [present // 2], [present])
    data.x.requires_grad_()
    loss = method.loss(data)
    (gradient,) = torch.autograd.grad(loss, data.x)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert absent == "ignore" or loss.item() == pytest.approx(3.0)


def test_a_group_that_train_lacks_gets_no_weight() -> None:
    method = of_groups((100, 0, 100, 100), adjustment=5.0, step_size=1.0)
    assert weights(method) == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    for _ in range(20):
        loss = method.loss(costing([1, 1, 1], [0, 1, 1], [0, 100, 200]))
        assert loss.item() == pytest.approx(1 + 5 / math.sqrt(100))
    assert weights(method) == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


# ---------------------------------------------------------------------------------------------------------- many steps

SIZES = (40, 9, 4, 25)
FIRST = np.cumsum((0, *SIZES[:3]))
"""A train image of each group."""


def sequence(steps: int = 60) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Groups that batches hold one image of, and the losses of these."""
    rng = np.random.default_rng(0)
    held = [rng.permutation(4)[: rng.integers(1, 5)] for _ in range(steps)]
    return [(groups, rng.uniform(0.1, 3, len(groups))) for groups in held]


def losses_of(method: GroupDRO, steps: list[tuple[NDArray[np.int64], NDArray[np.float64]]]) -> list[float]:
    """The reported losses over a sequence."""
    return [method.loss(costing(list(loss), list(g // 2), list(FIRST[g]))).item() for g, loss in steps]


def released(steps: Any, eta: float, adjustment: float, skip: bool = False) -> list[float]:
    """group_DRO's update, written out: absent groups have loss 0 and an adjustment, unless they are skipped."""
    q, found = np.full(4, 0.25), []
    for groups, losses in steps:
        counted = np.isin(np.arange(4), groups) if skip else np.ones(4, bool)
        of_group = adjustment / np.sqrt(SIZES)
        of_group[groups] += losses
        q = q * np.exp(eta * of_group * counted)
        q /= q.sum()
        found.append(float((q * of_group * counted).sum()))
    return found


@pytest.mark.parametrize(("eta", "adjustment"), [(0.01, 0.0), (0.3, 0.0), (0.01, 1.0), (0.3, 2.0)])
def test_losses_over_many_steps_are_the_released_ones(eta: float, adjustment: float) -> None:
    steps = sequence()
    found = losses_of(of_groups(SIZES, step_size=eta, adjustment=adjustment), steps)
    assert found == pytest.approx(released(steps, eta, adjustment), rel=1e-4)
    skipped = np.subtract(found, released(steps, eta, adjustment, skip=True))
    assert (np.abs(skipped).max() > 0.1) == (adjustment > 0)


def test_the_start_at_one_gives_the_same_weights() -> None:
    """SubpopBench's q starts at 1, is normalised after the first update, and only present groups' are updated."""
    steps, eta = sequence(), 0.3
    method = of_groups(SIZES, step_size=eta)
    q = np.ones(4)
    for groups, losses in steps:
        q[groups] *= np.exp(eta * losses)
        q /= q.sum()
        assert losses_of(method, [(groups, losses)]) == pytest.approx([q[groups] @ losses], rel=1e-4)
        assert weights(method) == pytest.approx(q, rel=1e-4)


def test_a_weight_comes_back_from_below_rounding() -> None:
    method = dro(step_size=1.0)
    for _ in range(20):
        method.loss(costing([0.1, 10], [0, 1]))
    assert weights(method) == [0, 1]  # exp(-198)
    for _ in range(20):
        method.loss(costing([10, 0.1], [0, 1]))
    assert weights(method) == pytest.approx([0.5, 0.5], abs=1e-4)


def test_state_survives_a_restart() -> None:
    steps = [costing(pair, [0, 1]) for pair in ([1.0, 2.0], [0.5, 3.0], [2.0, 2.0])]
    whole, first, second = (dro(step_size=0.5) for _ in range(3))
    losses = [whole.loss(step).item() for step in steps]
    first.loss(steps[0])
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert [second.loss(step).item() for step in steps[1:]] == losses[1:]
    assert torch.equal(second.log_q, whole.log_q)


def test_one_pass_an_image(tmp_path: Any) -> None:
    cost = train(GroupDRO(Config()), toy_task((8, 4, 2, 2)), net(), Recipe(batch_size=4, epochs=2), tmp_path)
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == (32, 32, 0, 8)


def test_a_step_moves_the_network_by_the_weighted_loss() -> None:
    task, recipe = toy_task((2, 2, 2, 2)), Recipe(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    method, plain = GroupDRO(Config(step_size=0.0)), net()
    method.setup(task, net())
    data = batch(task)
    method.step(data, method.optimizers(recipe))
    F.cross_entropy(plain(data.x), data.y).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    moved, expected = state_of(method.model), state_of(plain)
    assert not same(moved, state_of(net()))
    for name, value in expected.items():
        torch.testing.assert_close(moved[name], value)


# ------------------------------------------------------------------------------------------------------------ settings


def test_ranges_of_the_search() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {
        "step_size": "10^U(-3,-1)",
        "adjustment": "{0,1,2,3,4,5}",
    }


@pytest.mark.parametrize("key", ["step_size", "adjustment"])
def test_bad_values_are_refused(key: str) -> None:
    says = f"groupdro.{key} must be at least 0, got -1.0"
    with pytest.raises(UserError, match=says):
        Config(**{key: -1.0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=says):
        plan_tiny("groupdro", **{f"groupdro__{key}": "-1"})
