"""ReWeight: the loss of an image weighted by the size of its group."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from numpy.typing import NDArray
from stubs import counts
from torch.nn import functional as F
from toys import costing, on_logits
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.registry import METHODS
from worstgroup.methods.blocks.balance import mean_one
from worstgroup.methods.reweight import Config, ReWeight


def made(sizes: tuple[int, ...], policy: str = "", **config: Any) -> ReWeight:
    """ReWeight on a train split with these group sizes."""
    method: ReWeight = on_logits(ReWeight(Config(**config)), sizes, policy)
    return method


def weights(sizes: tuple[int, ...], **config: Any) -> NDArray[np.float64]:
    """Weights of groups with these sizes, of mean 1."""
    n = counts(*sizes)
    return mean_one(ReWeight(Config(**config)).group_weights(n.clip(min=1)), n)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((3, 1), (0.5, 1.5)), ((5, 5), (1, 1)), ((3, 0, 1), (0.75, 0, 2.25)), ((1, 1, 1, 1), (1, 1, 1, 1))],
)
def test_inverse_frequencies(sizes: tuple[int, ...], expected: tuple[float, ...]) -> None:
    """Empty groups get 0, but count in the factor G."""
    assert weights(sizes).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((9, 1), (0.5, 1.5)), ((5, 5), (1, 1)), ((9, 0, 1), (0.75, 0, 2.25)), ((1, 4, 16), (12 / 7, 6 / 7, 3 / 7))],
)
def test_inverse_roots_of_frequencies(sizes: tuple[int, ...], expected: tuple[float, ...]) -> None:
    assert weights(sizes, kind="sqrt").tolist() == pytest.approx(expected)


def test_a_batch_does_not_normalise() -> None:
    method = made((3, 0, 0, 1), policy="class")
    assert method.weights.tolist() == [0.5, 0.5, 0.5, 1.5]
    assert method.loss(costing([1, 1], [0, 0])).item() == pytest.approx(0.5)
    assert method.loss(costing([1, 2], [0, 1], [1, 3])).item() == pytest.approx((0.5 * 1 + 1.5 * 2) / 2)


def test_weights_are_looked_up_by_the_index_of_an_image() -> None:
    method = made((3, 1, 0, 1))
    assert method.weights.tolist() == pytest.approx([4 / 7, 4 / 7, 4 / 7, 12 / 7, 12 / 7])
    assert method.loss(costing([1, 3], [0, 1], [3, 4])).item() == pytest.approx(12 / 7 * 2)


@pytest.mark.parametrize("kind", ["inverse", "sqrt"])
def test_on_equal_groups_it_is_erm(kind: str) -> None:
    method = made((2, 2, 2, 2), kind=kind)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    data = Batch(x, torch.arange(8) // 4, torch.arange(8))
    assert method.loss(data).item() == pytest.approx(F.cross_entropy(x, data.y).item())


@pytest.mark.parametrize(("sizes", "factor"), [((3, 1), 0.75), ((3498, 184, 56, 1057), None), ((7, 7, 7, 7), 1.0)])
def test_expected_loss(sizes: tuple[int, ...], factor: float | None) -> None:
    """`G^2 / (N sum 1/n_j)` times the group-balanced mean."""
    n, groups = np.array(sizes), len(sizes)
    mean_loss = np.random.default_rng(0).uniform(0.1, 2, groups)
    expected = groups**2 / (n.sum() * (1 / n).sum())
    assert factor is None or expected == pytest.approx(factor)
    assert (n * weights(sizes) * mean_loss).sum() / n.sum() == pytest.approx(expected * mean_loss.mean())


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(UserError, match="every group of train gets weight 0, so there is nothing to learn from"):
        mean_one(np.zeros(2), counts(3, 4))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"reweight\.kind"):
        plan_tiny("reweight", reweight__kind="cubic")


def test_the_readmes_example_has_its_name_to_itself() -> None:
    assert "sqrt-reweight" not in METHODS
