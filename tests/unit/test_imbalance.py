"""Losses against class imbalance: Focal, LDAM, BSoftmax, and CBLoss, which is applied to groups."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import counts
from torch import Tensor
from torch.nn import functional as F
from toys import costing, net, on_logits, toy_task
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.methods import bsoftmax, cbloss, focal, ldam
from worstgroup.methods.blocks.balance import class_counts, mean_one

CELEBA = (71_629, 66_874, 22_880, 1_387)


def logits(*, n: int = 12, classes: int = 2) -> Batch:
    """Random logits that carry a gradient, with as many labels of each class."""
    x = torch.randn(n, classes, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return Batch(x, torch.arange(n) % classes, torch.arange(n))


def zeros(y: list[int], classes: int = 2) -> Batch:
    """Zero logits that carry a gradient."""
    return Batch(torch.zeros(len(y), classes, requires_grad=True), torch.tensor(y), torch.arange(len(y)))


def slope(method: Any, data: Batch) -> Tensor:
    """Gradient of the loss in the logits; fails where it is not finite."""
    (gradient,) = torch.autograd.grad(method.loss(data), data.x)
    assert gradient.isfinite().all()
    return gradient


# --------------------------------------------------------------------------------------------------------------- Focal


@pytest.mark.parametrize(
    ("p", "gamma", "value"),
    [(0.5, 2.0, 0.1732868), (0.5, 0.0, 0.6931472), (0.9, 1.0, 0.1 * 0.1053605), (0.1, 0.5, 0.9**0.5 * 2.3025851)],
)
def test_focal_of_a_probability(p: float, gamma: float, value: float) -> None:
    assert focal.focal(-torch.tensor([p]).log(), gamma).item() == pytest.approx(value, rel=1e-6)
    method = on_logits(focal.Focal(focal.Config(gamma=gamma)), (1, 0, 0, 1))
    assert method.loss(costing([-math.log(p)] * 2, [0, 1])).item() == pytest.approx(value, rel=1e-6)


def test_focal_at_gamma_zero_is_erm() -> None:
    data = logits()
    method = on_logits(focal.Focal(focal.Config(gamma=0.0)), (3, 3, 3, 3))
    assert torch.equal(method.loss(data), F.cross_entropy(data.x, data.y, reduction="none").mean())
    (expected,) = torch.autograd.grad(F.cross_entropy(data.x, data.y), data.x)
    torch.testing.assert_close(slope(method, data), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("margin", [12.0, 17.0, 40.0, 1e4])
def test_focal_slopes_of_certain_images_are_finite(gamma: float, margin: float) -> None:
    """A cross-entropy of exactly 0 would meet the infinite slope of (1 - p)^0.5, and one of 1e4 a p of 0."""
    method = on_logits(focal.Focal(focal.Config(gamma=gamma)), (1, 0, 0, 1))
    x = torch.tensor([[margin, 0.0], [0.0, margin], [margin, 0.0]], requires_grad=True)
    data = Batch(x, torch.tensor([0, 1, 1]), torch.arange(3))
    assert method.loss(data).item() == pytest.approx(margin / 3, rel=1e-4)
    certain, _, wrong = slope(method, data)
    assert certain.abs().max() < 1e-5
    assert wrong.tolist() == pytest.approx([1 / 3, -1 / 3], rel=1e-3)


def test_focal_slope_goes_through_both_factors() -> None:
    data = logits()
    method = on_logits(focal.Focal(focal.Config(gamma=2.0)), (3, 3, 3, 3))
    p = data.x.softmax(1).gather(1, data.y[:, None])
    (expected,) = torch.autograd.grad((-((1 - p) ** 2) * p.log()).mean(), data.x)
    torch.testing.assert_close(slope(method, data), expected)


# ---------------------------------------------------------------------------------------------------------------- LDAM


@pytest.mark.parametrize(
    ("sizes", "margins"),
    [((16, 1), (0.25, 0.5)), ((7, 7), (0.5, 0.5)), ((16, 0, 81), (0.5, 0, 1 / 3)), ((0, 16, 1), (0, 0.25, 0.5))],
)
def test_ldam_margins(sizes: tuple[int, ...], margins: tuple[float, ...]) -> None:
    assert ldam.margins(torch.tensor(sizes).float(), 0.5).tolist() == pytest.approx(margins)


def of_margin(**config: float) -> ldam.LDAM:
    """LDAM on 16 images of class 0 and one of class 1."""
    made: ldam.LDAM = on_logits(ldam.LDAM(ldam.Config(**config)), (16, 0, 0, 1))
    return made


@pytest.mark.parametrize(("y", "loss"), [(1, 15.0000003), (0, 7.5005529)])
def test_ldam_of_zero_logits(y: int, loss: float) -> None:
    assert of_margin().loss(zeros([y])).item() == pytest.approx(loss, abs=1e-6)


def test_ldam_takes_the_margin_from_the_true_class() -> None:
    data, method = logits(), of_margin(scale=10.0)
    lowered = data.x - torch.tensor([[0.25, 0.0], [0.0, 0.5]])[data.y]
    assert method.loss(data).item() == pytest.approx(F.cross_entropy(10 * lowered, data.y).item())
    assert slope(method, data).any()


def test_ldam_without_margin_and_scale_is_erm() -> None:
    data = logits()
    assert torch.equal(of_margin(max_margin=0.0, scale=1.0).loss(data), F.cross_entropy(data.x, data.y))


def test_ldam_without_images_of_a_class() -> None:
    method = on_logits(ldam.LDAM(ldam.Config()), (16, 0, 0, 0, 0, 0, 0, 0, 1), classes=3)
    assert method.margins.tolist() == pytest.approx([0.25, 0, 0.5])
    assert slope(method, zeros([0, 2, 2], classes=3)).any()


# ------------------------------------------------------------------------------------------------------------ BSoftmax


def softmax(sizes: tuple[int, ...], classes: int = 2) -> bsoftmax.BSoftmax:
    made: bsoftmax.BSoftmax = on_logits(bsoftmax.BSoftmax(None), sizes, classes=classes)  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize(("y", "loss"), [(1, 1.3862944), (0, math.log(4 / 3))])
def test_bsoftmax_of_zero_logits(y: int, loss: float) -> None:
    assert softmax((3, 0, 0, 1)).loss(zeros([y])).item() == pytest.approx(loss)


def test_bsoftmax_of_equal_classes_is_erm_to_the_bit() -> None:
    data, method = logits(), softmax((3, 3, 2, 4))
    assert torch.equal(method.loss(data), F.cross_entropy(data.x, data.y))


def test_bsoftmax_adds_the_log_of_the_counts() -> None:
    data, method = logits(), softmax((100, 17, 2, 1))
    expected = F.cross_entropy(data.x + torch.tensor([117.0, 3.0]).log(), data.y)
    assert method.loss(data).item() == pytest.approx(expected.item())


def test_bsoftmax_without_images_of_a_class() -> None:
    method = softmax((2, 0, 0, 0, 0, 0, 0, 0, 6), classes=3)
    data = zeros([0, 2], classes=3)
    assert method.loss(data).item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    assert not slope(method, data)[:, 1].any()


def test_bsoftmax_predicts_by_the_plain_logits() -> None:
    """Only training knows the prior: nothing of the method is left in the network."""
    method = bsoftmax.BSoftmax(None)  # type: ignore[arg-type]
    model = net()
    method.setup(toy_task((30, 0, 0, 1)), model)
    assert method.networks() == {"model": model}
    assert method.model is model
    assert method.state_dict() == {}


# ------------------------------------------------------------------------------------------------------- class counts


def test_hidden_labels_do_not_count() -> None:
    task: Any = toy_task((3, 2, 1, 0))
    assert class_counts(task).tolist() == [5, 1]
    y = task.y("train")
    y[[0, 5]] = -1
    task.y = lambda split: y
    assert class_counts(task).tolist() == [4, 0]


def test_a_class_that_train_lacks_counts_zero() -> None:
    assert class_counts(toy_task((3, 1, 0, 0, 0, 0, 0, 0, 2), classes=3)).tolist() == [4, 0, 2]


# -------------------------------------------------------------------------------------------------------------- CBLoss


def weights(sizes: tuple[int, ...], **config: Any) -> list[float]:
    """Weights of groups with these sizes, of mean 1."""
    n = counts(*sizes)
    found: list[float] = mean_one(cbloss.CBLoss(cbloss.Config(**config)).group_weights(n.clip(min=1)), n).tolist()
    return found


def test_cbloss_on_celeba_in_both_variants() -> None:
    assert weights(CELEBA, one_minus_beta=0.01) == pytest.approx([1, 1, 1, 1], abs=1e-5)
    assert weights(CELEBA, one_minus_beta=0.01, variant="released") == [0, 0, 0, 4]


@pytest.mark.parametrize(("one_minus_beta", "first"), [(0.01, 3_725), (0.001, 37_412)])
def test_where_the_released_variant_drops_groups(one_minus_beta: float, first: int) -> None:
    config: dict[str, Any] = {"one_minus_beta": one_minus_beta, "variant": "released"}
    assert weights((first, 10), **config) == [0, 2]
    kept = weights((first - 1, 10), **config)
    assert kept == pytest.approx(weights((first - 1, 10), one_minus_beta=one_minus_beta))
    assert kept[0] > 0


def test_cbloss_follows_the_formula() -> None:
    n = np.array((3498, 184, 56, 1057))
    expected = (1 - 0.9999) / (1 - 0.9999**n)
    assert weights(tuple(n)) == pytest.approx(expected / expected.mean(), rel=1e-6)


def test_towards_beta_one_it_is_reweight_and_towards_zero_erm() -> None:
    assert weights((3, 1), one_minus_beta=1e-15) == pytest.approx([0.5, 1.5])
    assert weights((300_000, 100_000), one_minus_beta=1e-18) == pytest.approx([0.5, 1.5])
    assert weights((3, 1), one_minus_beta=1 - 1e-9) == pytest.approx([1, 1])


@pytest.mark.parametrize("one_minus_beta", [1e-20, 1e-5, 1e-2, 0.999])
def test_no_weight_of_the_formula_underflows(one_minus_beta: float) -> None:
    found = np.array(weights((1, 10**3, 10**9, 10**12), one_minus_beta=one_minus_beta))
    assert np.isfinite(found).all()
    assert (found > 0).all()
    assert found.mean() == pytest.approx(1)


@pytest.mark.parametrize("variant", ["formula", "released"])
def test_empty_groups_weigh_nothing_but_count(variant: str) -> None:
    assert weights((5, 0, 5), variant=variant) == pytest.approx([1.5, 0, 1.5])


def test_released_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(UserError, match="every group of train gets weight 0"):
        weights((5000, 9000), one_minus_beta=0.01, variant="released")


def test_cbloss_weighs_images_by_their_group() -> None:
    method = on_logits(cbloss.CBLoss(cbloss.Config(one_minus_beta=0.5)), (2, 1, 0, 1))
    assert method.weights.tolist() == pytest.approx([1, 1, 1.5, 1.5])  # groups have 4/3, 2, 0 and 2, times 3/4
    loss = method.loss(costing([1, 2], [0, 1], [0, 3]))
    assert loss.item() == pytest.approx((1 * 1 + 1.5 * 2) / 2)
    by_class = on_logits(cbloss.CBLoss(cbloss.Config()), (2, 2, 1, 3), policy="class")
    assert by_class.weights.tolist() == [1] * 8


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (focal, {"gamma": (0.5, 5.0)}),
        (ldam, {"max_margin": (0.1, 10**-0.1), "scale": (10, 30)}),
        (cbloss, {"one_minus_beta": (1e-5, 1e-2)}),
    ],
)
def test_ranges_of_the_search(module: Any, expected: dict[str, tuple[float, float]]) -> None:
    found = ranges(module.Config)
    assert found.keys() == expected.keys()
    recipe = toy_task((1, 1, 1, 1)).recipe
    for name, (low, high) in expected.items():
        drawn = [float(found[name].draw(np.random.default_rng(seed), recipe)) for seed in range(200)]
        assert low * 0.999 <= min(drawn) < low * 1.1
        assert high * 0.9 < max(drawn) <= high * 1.001


@pytest.mark.parametrize(
    ("method", "key", "value", "says"),
    [
        ("focal", "gamma", -1.0, "focal.gamma must be at least 0, got -1.0"),
        ("ldam", "max_margin", -0.5, "ldam.max_margin must be at least 0, got -0.5"),
        ("ldam", "scale", 0.0, "ldam.scale must be positive, got 0.0"),
        ("cbloss", "one_minus_beta", 0.0, r"cbloss.one_minus_beta must be in \(0, 1\), got 0.0"),
        ("cbloss", "one_minus_beta", 1.0, r"cbloss.one_minus_beta must be in \(0, 1\), got 1.0"),
    ],
)
def test_bad_values_are_refused(method: str, key: str, value: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        {"focal": focal, "ldam": ldam, "cbloss": cbloss}[method].Config(**{key: value})  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=says):
        plan_tiny(method, **{f"{method}__{key}": str(value)})
