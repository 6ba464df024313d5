"""CVaRDRO: the mean of the worst share of a batch."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F
from toys import costing, on_logits
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.methods.cvardro import Config, CVaRDRO, cvar

TEN = torch.tensor([0.3, 2.0, 0.1, 5.0, 0.7, 1.5, 0.2, 3.0, 0.9, 1.1])


@pytest.mark.parametrize(
    ("alpha", "value"),
    [
        (1.0, 1.48),
        (0.1, 5.0),
        (0.01, 5.0),
        (0.2, 4.0),
        (0.25, (5 + 3 + 0.5 * 2) / 2.5),
        (0.95, (14.8 - 0.5 * 0.1) / 9.5),
    ],
)
def test_mean_of_the_worst_share(alpha: float, value: float) -> None:
    assert cvar(TEN, alpha).item() == pytest.approx(value)


@pytest.mark.parametrize("alpha", [0.03, 0.1, 0.37, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("n", [1, 7, 32])
def test_it_is_the_minimum_over_eta(alpha: float, n: int) -> None:
    losses = np.random.default_rng(n).exponential(size=n)

    def dual(eta: float) -> float:
        return float(eta + np.maximum(losses - eta, 0).mean() / alpha)

    found = minimize_scalar(dual, bounds=(0, losses.max()), method="bounded", options={"xatol": 1e-10})
    at_kinks = min(dual(eta) for eta in (0.0, *losses))
    assert cvar(torch.from_numpy(losses), alpha).item() == pytest.approx(min(found.fun, at_kinks), rel=1e-6)


def slope(losses: Tensor, alpha: float) -> list[float]:
    leaf = losses.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cvar(leaf, alpha), leaf)
    return [round(value, 6) for value in gradient.tolist()]


@pytest.mark.parametrize(
    ("alpha", "weights"),
    [
        (1.0, [0.25, 0.25, 0.25, 0.25]),
        (0.5, [0.5, 0, 0.5, 0]),
        (0.625, [0.4, 0.2, 0.4, 0]),  # two and a half of the four
        (0.1, [0, 0, 1, 0]),
    ],
)
def test_only_the_worst_are_learnt_from(alpha: float, weights: list[float]) -> None:
    assert slope(torch.tensor([2.0, 1.0, 3.0, 0.0]), alpha) == pytest.approx(weights)


def test_of_equal_losses_the_first_count() -> None:
    assert slope(torch.ones(5), 0.3) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=1e-6)


def test_with_alpha_one_it_is_erm() -> None:
    method = on_logits(CVaRDRO(Config(alpha=1.0)), (4, 2, 2, 4))
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    data = Batch(x, torch.arange(12) // 6, torch.arange(12))
    erm = F.cross_entropy(x, data.y)
    assert method.loss(data).item() == pytest.approx(erm.item())
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (method.loss(data), erm)))


def test_loss_of_a_batch() -> None:
    method = on_logits(CVaRDRO(Config(alpha=0.5)), (3, 1, 1, 3))
    assert method.loss(costing([1, 4, 2, 3], [0, 0, 1, 1])).item() == pytest.approx(3.5)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.01])
def test_bad_values_are_refused(alpha: float) -> None:
    says = rf"cvardro.alpha must be in \(0, 1\], got {alpha}"
    made: Any = Config
    with pytest.raises(UserError, match=says):
        made(alpha=alpha)
    with pytest.raises(UserError, match=says):
        plan_tiny("cvardro", cvardro__alpha=str(alpha))
