"""CORAL: the distance of moments by its numbers, in both variants, and environments of a few images."""

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
from worstgroup.methods.coral import CORAL, Config, Variant, coral

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)
VARIANTS: tuple[Variant, ...] = ("domainbed", "deep")
both = pytest.mark.parametrize("variant", VARIANTS)


def features(*sizes: int, d: int = 5) -> Tensor:
    """Random features of environments of these sizes, with a large mean as after a ReLU."""
    generator = torch.Generator().manual_seed(len(sizes))
    return 3 + torch.randn(sum(sizes), d, dtype=torch.float64, generator=generator)


def member(*sizes: int) -> Tensor:
    """Membership of environments that follow each other in a batch."""
    return membership(torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)), len(sizes))


def pairwise(u: Tensor, v: Tensor, variant: Variant) -> Tensor:
    """Distance of two environments by its definition."""
    difference = u.T.cov() - v.T.cov()
    if variant == "deep":
        return difference.square().sum() / (4 * u.shape[1] ** 2)
    return (u.mean(0) - v.mean(0)).square().mean() + difference.square().mean()


# --------------------------------------------------------------------------------------------------------- the distance


def test_two_images_each() -> None:
    h, who = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), member(2, 2)
    assert coral(h, who).item() == pytest.approx(3)
    assert coral(h, who, "deep").item() == pytest.approx(0.5)


@both
def test_the_same_images_are_at_no_distance(variant: Variant) -> None:
    assert coral(features(6).repeat(2, 1), member(6, 6), variant).item() == pytest.approx(0, abs=1e-12)
    h = features(16, d=512).float().repeat(2, 1)
    assert coral(h, member(16, 16), variant).item() == pytest.approx(0, abs=1e-5)


@both
@pytest.mark.parametrize("sizes", [(4, 4), (2, 6), (9, 12), (3, 5, 2)])
def test_mean_over_pairs_of_environments(variant: Variant, sizes: tuple[int, ...]) -> None:
    h = features(*sizes).requires_grad_()
    expected = torch.stack([pairwise(u, v, variant) for u, v in combinations(h.split(sizes), 2)]).mean()  # type: ignore[no-untyped-call]
    found = coral(h, member(*sizes), variant)
    torch.testing.assert_close(found, expected)
    (a,), (b,) = (torch.autograd.grad(value, h) for value in (found, expected))
    torch.testing.assert_close(a, b)


@both
def test_many_features_in_float32(variant: Variant) -> None:
    h = features(16, 16, d=512)
    expected = pairwise(h[:16], h[16:], variant).item()
    assert coral(h.float(), member(16, 16), variant).item() == pytest.approx(expected, rel=1e-4)


def test_a_shift_changes_the_means_only() -> None:
    h, who = features(4, 6), member(4, 6)
    shifted = torch.cat([h[:4], h[4:] + 2])
    torch.testing.assert_close(coral(shifted, who, "deep"), coral(h, who, "deep"))
    change = (h[:4].mean(0) - h[4:].mean(0) - 2).square().mean() - (h[:4].mean(0) - h[4:].mean(0)).square().mean()
    torch.testing.assert_close(coral(shifted, who) - coral(h, who), change)


@both
def test_neither_order_nor_names_matter(variant: Variant) -> None:
    h, who = features(4, 5, 3), member(4, 5, 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for other in ((h[order], who[:, order]), (h, who[[2, 0, 1]]), (h, torch.cat([who, torch.zeros_like(who[:2])]))):
        torch.testing.assert_close(coral(*other, variant), coral(h, who, variant))


@both
@pytest.mark.parametrize("sizes", [(4,), (4, 0), (0, 1)])
def test_one_environment_is_at_no_distance(variant: Variant, sizes: tuple[int, ...]) -> None:
    h = features(sum(sizes)).requires_grad_()
    distance = coral(h, member(*sizes), variant)
    assert distance.item() == 0
    assert not torch.autograd.grad(distance, h)[0].any()


@pytest.mark.parametrize("sizes", [(1, 4), (1, 1), (1, 4, 3)])
def test_one_image_has_a_mean_but_no_covariance(sizes: tuple[int, ...]) -> None:
    h = features(*sizes).requires_grad_()
    parts = h.split(sizes)  # type: ignore[no-untyped-call]
    means = torch.stack([(u.mean(0) - v.mean(0)).square().mean() for u, v in combinations(parts, 2)]).mean()
    pairs = [pairwise(u, v, "deep") for u, v in combinations(parts, 2) if min(len(u), len(v)) > 1]
    covariances = torch.stack(pairs).mean() if pairs else h.new_zeros(())
    torch.testing.assert_close(coral(h, member(*sizes), "deep"), covariances)
    found = coral(h, member(*sizes))
    torch.testing.assert_close(found, means + 4 * covariances)
    assert torch.autograd.grad(found, h)[0].isfinite().all()


# ------------------------------------------------------------------------------------------------------------- the loss


def made(sizes: tuple[int, ...] = SIZES, **config: Any) -> tuple[CORAL, Batch]:
    """The objective on a toy network, and a batch of all images."""
    task = toy_task(sizes)
    objective = CORAL(Config(**config))
    objective.setup(task, net(norm=False))
    return objective, batch(task)


@both
def test_risk_and_weighted_distance(variant: Variant) -> None:
    objective, data = made(weight=1e4, variant=variant)
    h = objective.model.features(data.x)
    losses = F.cross_entropy(objective.model.head(h), data.y, reduction="none")
    parts = [objective.e == number for number in range(2)]
    distance = pairwise(*(h[part] for part in parts), variant)
    assert distance > 1e-6
    expected = torch.stack([losses[part].mean() for part in parts]).mean() + 1e4 * distance
    torch.testing.assert_close(objective.loss(data), expected, rtol=1e-4, atol=0)
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


@both
def test_unannotated_images_have_a_risk_but_no_moments(variant: Variant) -> None:
    objective, data = made(weight=20.0, variant=variant)
    h = objective.model.features(data.x)
    distance = pairwise(h[[1, 2]], h[[3, 6, 7, 8, 9]], variant)
    objective.e[[0, 4, 5]], objective.masked = -1, True
    erm = F.cross_entropy(objective.model(data.x), data.y)
    torch.testing.assert_close(objective.loss(data), erm + 20 * distance)
    objective.e[:] = -1
    torch.testing.assert_close(objective.loss(data), erm)


def test_the_distance_costs_no_pass(tmp_path: Path) -> None:
    cost = train(CORAL(Config()), toy_task((4, 4, 4, 4)), net(), Recipe(batch_size=4, epochs=2), tmp_path)
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == (32, 32, 0, 8)


def test_settings() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {"weight": "10^U(-1,1)"}
    for make in (lambda: Config(weight=-1.0), lambda: plan_tiny("coral", coral__weight="-1.0")):
        with pytest.raises(UserError, match=r"coral.weight must be at least 0, got -1.0"):
            make()
    with pytest.raises(UserError, match="variant"):
        plan_tiny("coral", coral__variant="wide")
