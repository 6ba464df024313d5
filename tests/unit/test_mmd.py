"""MMD: the distance of distributions by its numbers, and environments of a few images."""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plan_tiny
from torch import Tensor
from torch.nn import functional as F
from toys import batch, net, toy_task, train
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods.blocks.environments import environment_mean, membership
from worstgroup.methods.mmd import MMD, Config, kernel, mmd

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)


def features(*sizes: int, d: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random features of environments of these sizes, far apart in the first and near in the last."""
    generator = torch.Generator().manual_seed(len(sizes))
    scale = torch.logspace(0.5, -2, sum(sizes), dtype=dtype)[:, None]
    return scale * torch.randn(sum(sizes), d, dtype=dtype, generator=generator)


def member(*sizes: int) -> Tensor:
    """Membership of environments that follow each other in a batch."""
    return membership(torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)), len(sizes))


def pairwise(u: Tensor, v: Tensor) -> Tensor:
    """MMD^2 of two environments by its definition."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        distances = (a[:, None] - b).square().sum(2)
        return sum((torch.exp(-(10.0**s) * distances) for s in range(-3, 4)), torch.zeros_like(distances)).mean()

    return mean_kernel(u, u) + mean_kernel(v, v) - 2 * mean_kernel(u, v)


# --------------------------------------------------------------------------------------------------------- the distance


def test_zero_and_one() -> None:
    expected = 14 - 2 * sum(math.exp(-(10.0**s)) for s in range(-3, 4))
    assert expected == pytest.approx(7.4763748, abs=1e-7)
    assert mmd(torch.tensor([[0.0], [1.0]]), member(1, 1)).item() == pytest.approx(expected, rel=1e-6)


def test_the_same_images_are_at_no_distance() -> None:
    h = features(6).repeat(2, 1)
    assert mmd(h, member(6, 6)).item() == pytest.approx(0, abs=1e-12)
    h = features(6, d=512, dtype=torch.float32).repeat(2, 1)
    assert mmd(h, member(6, 6)).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("sizes", [(4, 4), (1, 6), (3, 5, 2), (1, 1, 1, 1)])
def test_mean_over_pairs_of_environments(sizes: tuple[int, ...]) -> None:
    h = features(*sizes).requires_grad_()
    expected = torch.stack([pairwise(u, v) for u, v in combinations(h.split(sizes), 2)]).mean()  # type: ignore[no-untyped-call]
    found = mmd(h, member(*sizes))
    torch.testing.assert_close(found, expected)
    assert found > 0.01
    (a,), (b,) = (torch.autograd.grad(value, h) for value in (found, expected))
    torch.testing.assert_close(a, b)


def test_neither_order_nor_names_matter() -> None:
    h, who = features(4, 5, 3), member(4, 5, 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mmd(h[order], who[:, order]), mmd(h, who))
    torch.testing.assert_close(mmd(h, who[[2, 0, 1]]), mmd(h, who))
    torch.testing.assert_close(mmd(h, torch.cat([who, torch.zeros_like(who[:2])])), mmd(h, who))


def test_an_image_is_at_no_distance_from_itself() -> None:
    """Whatever rounding says of features this large, where the narrowest kernel sees a thousandth."""
    h = 100 * torch.randn(16, 2048, generator=torch.Generator().manual_seed(0))
    assert kernel(h).diag().tolist() == [7.0] * 16
    assert kernel(h).min() >= 0


@pytest.mark.parametrize("sizes", [(4,), (4, 0), (0, 1)])
def test_one_environment_is_at_no_distance(sizes: tuple[int, ...]) -> None:
    h = features(sum(sizes)).requires_grad_()
    distance = mmd(h, member(*sizes))
    assert distance.item() == 0
    assert not torch.autograd.grad(distance, h)[0].any()


def test_images_that_are_alike_have_finite_gradients() -> None:
    h = torch.zeros(6, 4, requires_grad=True)
    assert torch.autograd.grad(mmd(h, member(3, 3)), h)[0].isfinite().all()
    h = torch.full((6, 4), 1e6, requires_grad=True)
    assert torch.autograd.grad(mmd(h, member(1, 5)), h)[0].isfinite().all()


# ------------------------------------------------------------------------------------------------------------- the loss


def made(sizes: tuple[int, ...] = SIZES, **config: Any) -> tuple[MMD, Batch]:
    """The objective on a toy network, and a batch of all images."""
    task = toy_task(sizes)
    objective = MMD(Config(**config))
    objective.setup(task, net(norm=False))
    return objective, batch(task)


def test_risk_and_weighted_distance() -> None:
    objective, data = made(weight=0.3)
    h = objective.model.features(data.x)
    losses = F.cross_entropy(objective.model.head(h), data.y, reduction="none")
    parts = [objective.e == number for number in range(2)]
    distance = pairwise(*(h[part] for part in parts))
    assert distance > 0.01
    expected = torch.stack([losses[part].mean() for part in parts]).mean() + 0.3 * distance
    torch.testing.assert_close(objective.loss(data), expected)
    torch.testing.assert_close(made(weight=0.0)[0].loss(data), environment_mean(losses, objective.e))


@pytest.mark.parametrize("rows", [[0, 1, 2], [0]])
def test_a_batch_of_one_environment_is_erms(rows: list[int]) -> None:
    objective, data = made(weight=10.0)
    part = Batch(data.x[rows], data.y[rows], data.index[rows])
    loss, erm = objective.loss(part), F.cross_entropy(objective.model(part.x), part.y)
    torch.testing.assert_close(loss, erm)
    parameters = list(objective.model.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(erm, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_unannotated_images_have_a_risk_but_no_distribution() -> None:
    objective, data = made(weight=2.0)
    h = objective.model.features(data.x)
    distance = pairwise(h[[1, 2]], h[[3, 6, 7, 8, 9]])
    objective.e[[0, 4, 5]], objective.masked = -1, True
    erm = F.cross_entropy(objective.model(data.x), data.y)
    torch.testing.assert_close(objective.loss(data), erm + 2 * distance)
    objective.e[:] = -1
    torch.testing.assert_close(objective.loss(data), erm)


def test_the_distance_costs_no_pass(tmp_path: Path) -> None:
    cost = train(MMD(Config()), toy_task((4, 4, 4, 4)), net(), Recipe(batch_size=4, epochs=2), tmp_path)
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == (32, 32, 0, 8)


def test_settings() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {"weight": "10^U(-1,1)"}
    for make in (lambda: Config(weight=-1.0), lambda: plan_tiny("mmd", mmd__weight="-1.0")):
        with pytest.raises(UserError, match=r"mmd.weight must be at least 0, got -1.0"):
            make()
