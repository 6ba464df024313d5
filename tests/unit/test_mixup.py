"""Mixup: mixtures of the images of a batch, with the labels of both."""

from typing import Any

import pytest
import torch
from helpers import plan_tiny
from scipy.stats import beta, kstest  # type: ignore[import-untyped]
from torch.nn import functional as F
from toys import batch, net, on_logits, toy_task, train
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods import mixup
from worstgroup.methods.mixup import Config, Mixup, drawn_share, mixed


def data() -> Batch:
    """Ten pairs of logits with labels of both classes."""
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(10) // 5, torch.arange(10))


def of_share(share: float, monkeypatch: pytest.MonkeyPatch) -> Mixup:
    """Mixup whose lambda is always this."""
    monkeypatch.setattr(mixup, "drawn_share", lambda alpha: share)
    made: Mixup = on_logits(Mixup(Config()), (5, 0, 0, 5))
    return made


def test_a_share_of_one_is_erm_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    method = of_share(1.0, monkeypatch)
    assert torch.equal(method.loss(data()), F.cross_entropy(data().x, data().y))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_it_is_the_cross_entropy_of_soft_labels(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    method, plain = of_share(share, monkeypatch), data()
    torch.manual_seed(5)
    found = method.loss(plain)
    torch.manual_seed(5)
    partner = torch.randperm(10)
    one_hot = F.one_hot(plain.y, 2).float()
    x, target = (share * of + (1 - share) * of[partner] for of in (plain.x, one_hot))
    assert found.item() == pytest.approx(F.cross_entropy(x, target).item())


def test_mixtures() -> None:
    x = torch.tensor([[0.0, 8.0], [4.0, 0.0], [10.0, 10.0]])
    assert mixed(x, 0.75, torch.tensor([1, 0, 2])).tolist() == [[1.0, 6.0], [3.0, 2.0], [10.0, 10.0]]
    assert torch.equal(mixed(x, 1.0, torch.tensor([1, 2, 0])), x)
    assert torch.equal(mixed(x, 0.0, torch.tensor([1, 2, 0])), x[[1, 2, 0]])


def test_one_share_and_one_permutation_for_a_batch() -> None:
    method, seen = on_logits(Mixup(Config(alpha=1.0)), (5, 0, 0, 5)), []
    method.model = lambda x: (seen.append(x), x)[1]
    torch.manual_seed(5)
    method.loss(data())
    torch.manual_seed(5)
    share, partner = drawn_share(1.0), torch.randperm(10)
    (mixture,) = seen  # one forward pass
    assert 0.05 < share < 0.95
    assert torch.equal(mixture, mixed(data().x, share, partner))


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 10.0])
def test_shares_are_drawn_from_the_beta_distribution(alpha: float) -> None:
    torch.manual_seed(0)
    drawn = [drawn_share(alpha) for _ in range(1000)]
    assert kstest(drawn, beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [1e-3, 1e3])
def test_extreme_shares_are_numbers(alpha: float) -> None:
    torch.manual_seed(0)
    assert all(0 <= drawn_share(alpha) <= 1 for _ in range(200))


def test_draws_are_those_of_torchs_generator() -> None:
    task = toy_task((3, 2, 1, 4))
    losses = []
    for seed in (0, 0, 1):
        method = Mixup(Config())
        method.setup(task, net())
        torch.manual_seed(seed)
        losses.append(method.loss(batch(task)).item())
    assert losses[0] == losses[1] != losses[2]


def test_a_batch_of_one_is_erms() -> None:
    method, one = on_logits(Mixup(Config()), (5, 0, 0, 5)), data()
    alone = Batch(one.x[:1], one.y[:1], one.index[:1])
    assert method.loss(alone).item() == pytest.approx(F.cross_entropy(alone.x, alone.y).item())


def test_one_pass_an_image(tmp_path: Any) -> None:
    cost = train(Mixup(Config()), toy_task((4, 4, 4, 4)), net(), Recipe(batch_size=4, epochs=2), tmp_path)
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == (32, 32, 0, 8)


def test_bad_values_are_refused() -> None:
    with pytest.raises(UserError, match=r"mixup\.alpha must be positive, got 0\.0"):
        Config(alpha=0.0)
    with pytest.raises(UserError, match=r"mixup\.alpha must be positive, got -1\.0"):
        plan_tiny("mixup", mixup__alpha="-1")
