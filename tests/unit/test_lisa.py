"""LISA: who is mixed with whom, and what becomes of labels and losses."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from scipy.stats import chisquare
from stubs import tiny_task
from torch import Tensor, nn
from torch.nn import functional as F
from toys import batch, images, net, run_tiny, same, state_of, toy_task, train
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods import lisa
from worstgroup.methods.lisa import LISA, Config, cutmix, mixup, pairs
from worstgroup.methods.resample import ReSample

pytestmark = pytest.mark.usefixtures("tiny")
both = pytest.mark.parametrize("within_classes", [True, False])
kinds = pytest.mark.parametrize("mix", ["mixup", "cutmix"])
SIZES = (3, 2, 1, 4)


def made(sizes: tuple[int, ...] = SIZES, **config: Any) -> tuple[LISA, Batch]:
    """The objective on a toy network, and a batch of all images."""
    task = toy_task(sizes)
    objective = LISA(Config(**config))
    objective.setup(task, net(norm=False))
    return objective, batch(task)


def share_of(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every first image have this share of its pair."""

    class Fixed:
        def __init__(self, *_: float) -> None: ...

        def sample(self, shape: tuple[int, ...]) -> Tensor:
            return torch.full(shape, value)

    monkeypatch.setattr(lisa, "Beta", Fixed)


def fed(objective: LISA, data: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The images and the soft labels that a loss is taken of."""
    seen: list[Tensor] = []
    objective.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain = F.cross_entropy

    def watched(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return plain(logits, target)

    monkeypatch.setattr(F, "cross_entropy", watched)
    objective.loss(data)
    x, y = seen
    return x, y


# ------------------------------------------------------------------------------------------------------------ the pairs


@both
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (9, 1, 1, 9), (1, 1, 1, 1)])
def test_pairs_share_one_thing_and_differ_in_the_other(sizes: tuple[int, ...], within_classes: bool) -> None:
    group = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    y, a = group // 2, group % 2
    torch.manual_seed(0)
    for _ in range(20):
        first, second = pairs(y, a, within_classes)
        assert torch.equal(first, torch.arange(len(y)))  # every image has a partner
        assert ((y[first] == y[second]) == within_classes).all()
        assert ((a[first] == a[second]) != within_classes).all()


@both
def test_any_number_of_classes_and_attribute_values(within_classes: bool) -> None:
    y, a = torch.arange(60) % 5, torch.arange(60) // 5 % 4
    first, second = pairs(y, a, within_classes)
    same_one, other = (y, a) if within_classes else (a, y)
    assert (same_one[first] == same_one[second]).all()
    assert (other[first] != other[second]).all()


def test_every_partner_is_equally_likely() -> None:
    y, a = torch.zeros(6, dtype=torch.long), torch.tensor([0, 1, 1, 1, 1, 0])
    torch.manual_seed(0)
    drawn = Counter(int(pairs(y, a, True)[1][0]) for _ in range(800))
    assert set(drawn) == {1, 2, 3, 4}
    assert chisquare(list(drawn.values())).pvalue > 0.01


def test_a_class_with_one_attribute_gives_its_places_to_other_pairs() -> None:
    y, a = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1])
    torch.manual_seed(0)
    places = []
    for _ in range(300):
        first, second = pairs(y, a, True)
        assert (y[first] == 1).all()
        assert (a[first] != a[second]).all()
        assert first[3:].tolist() == [3, 4, 5]
        places.append(int(first[0]))
    assert chisquare(list(Counter(places).values())).pvalue > 0.01


@both
@pytest.mark.parametrize(
    ("y", "a"),
    [([0, 0, 1, 1], [0, 0, 1, 1]), ([0, 0, 0], [0, 0, 0]), ([1], [0])],
    ids=["aligned", "one group", "one image"],
)
def test_where_nothing_can_be_mixed_all_stay_as_they_are(y: list[int], a: list[int], within_classes: bool) -> None:
    first, second = pairs(torch.tensor(y), torch.tensor(a), within_classes)
    assert first.tolist() == second.tolist() == list(range(len(y)))


@both
def test_images_without_attributes_stay_unmixed_and_partner_nobody(within_classes: bool) -> None:
    y, a = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1]), torch.tensor([0, 1, -1, 0, 1, -1, -1, -1])
    torch.manual_seed(0)
    for _ in range(20):
        first, second = pairs(y, a, within_classes)
        unknown = a < 0
        assert torch.equal(first, torch.arange(8))
        assert torch.equal(second[unknown], first[unknown])
        assert (a[second[~unknown]] >= 0).all()
        assert (second != first)[~unknown].all()


def test_without_any_attribute_nothing_is_mixed() -> None:
    first, second = pairs(torch.tensor([0, 1, 0, 1]), torch.full((4,), -1), True)
    assert first.tolist() == second.tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- the mix


def test_mixup_is_the_weighted_mean() -> None:
    x, other = images(4, 1), images(4, 2)
    share = torch.tensor([0.0, 0.25, 0.6, 1.0])
    mixed, kept = mixup(x, other, share)
    torch.testing.assert_close(mixed[1], 0.25 * x[1] + 0.75 * other[1])
    torch.testing.assert_close(mixed[2], 0.6 * x[2] + 0.4 * other[2])
    assert torch.equal(mixed[0], other[0])
    assert torch.equal(mixed[3], x[3])
    assert torch.equal(kept, share)


def test_cutmix_pastes_one_box_and_counts_what_is_left() -> None:
    torch.manual_seed(0)
    x, other = torch.zeros(200, 3, 8, 10), torch.ones(200, 3, 8, 10)
    share = torch.rand(200)
    mixed, kept = cutmix(x, other, share)
    pasted = mixed[:, 0].bool()
    assert torch.equal(mixed, pasted[:, None].expand_as(mixed).float())
    torch.testing.assert_close(kept, 1 - pasted.float().mean((1, 2)))
    rows, columns = pasted.any(2), pasted.any(1)
    assert torch.equal(pasted, rows[:, :, None] & columns[:, None])
    for used, size in ((rows, 8), (columns, 10)):
        assert (used.int().diff(dim=1).abs().sum(1) <= 2).all()  # in one piece
        assert (used.sum(1) <= (size * (1 - share).sqrt()).long() // 2 * 2).all()
    whole = rows[:, 0].logical_not() & rows[:, -1].logical_not() & columns[:, 0].logical_not() & ~columns[:, -1]
    assert whole.sum() > 20
    assert torch.equal(rows.sum(1)[whole], ((8 * (1 - share).sqrt()).long() // 2 * 2)[whole])


@pytest.mark.parametrize("size", [(1, 1), (8, 8)])
def test_a_share_of_one_cuts_nothing(size: tuple[int, int]) -> None:
    x, other = torch.zeros(5, 3, *size), torch.ones(5, 3, *size)
    mixed, kept = cutmix(x, other, torch.ones(5))
    assert torch.equal(mixed, x)
    assert kept.tolist() == [1] * 5


# ------------------------------------------------------------------------------------------------------------ the loss


@kinds
def test_mixing_within_classes_leaves_labels_one_hot(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, data = made(p_select=1.0, mix=mix)
    torch.manual_seed(1)
    x, y = fed(objective, data, monkeypatch)
    assert torch.equal(y, F.one_hot(data.y, 2).float())
    assert not torch.equal(x, data.x)


@kinds
def test_mixing_within_attributes_mixes_labels(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, data = made(p_select=0.0, mix=mix)
    share_of(0.7, monkeypatch)
    _, y = fed(objective, data, monkeypatch)
    torch.testing.assert_close(y.sum(1), torch.ones(10))
    if mix == "mixup":
        torch.testing.assert_close(y.gather(1, data.y[:, None])[:, 0], torch.full((10,), 0.7))
    else:
        assert (y.gather(1, data.y[:, None]) >= 0.5).all()


def test_the_soft_loss_is_the_sum_of_two_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, data = made(p_select=0.0)
    share_of(0.3, monkeypatch)
    partner = torch.tensor([5, 5, 5, 6, 7, 0, 3, 4, 3, 4])
    monkeypatch.setattr(lisa, "pairs", lambda y, a, within: (torch.arange(10), partner))
    logits = objective.model(0.3 * data.x + 0.7 * data.x[partner])
    expected = 0.3 * F.cross_entropy(logits, data.y) + 0.7 * F.cross_entropy(logits, data.y[partner])
    assert objective.loss(data).item() == pytest.approx(expected.item(), rel=1e-5)


@kinds
@both
def test_with_shares_of_one_it_is_resample(mix: str, within_classes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, data = made(p_select=float(within_classes), mix=mix)
    share_of(1.0, monkeypatch)
    expected = F.cross_entropy(objective.model(data.x), data.y)
    torch.testing.assert_close(objective.loss(data), expected)
    resample: Objective[Any] = ReSample(None)  # type: ignore[arg-type]
    task = toy_task((60, 4, 9, 50))
    batches = [
        method.make_sampler(task, Recipe(batch_size=16))(torch.Generator().manual_seed(0))
        for method in (objective, resample)
    ]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*batches, strict=True))


@kinds
@both
@pytest.mark.parametrize("sizes", [SIZES, (5, 0, 0, 5), (4, 0, 3, 3), (10, 0, 0, 0)])
def test_losses_and_gradients_are_finite(mix: str, within_classes: bool, sizes: tuple[int, ...]) -> None:
    objective, data = made(sizes, p_select=float(within_classes), mix=mix, alpha=0.1)
    torch.manual_seed(0)
    for _ in range(5):
        loss = objective.loss(data)
        slopes = torch.autograd.grad(loss, list(objective.model.parameters()))
        assert loss.isfinite()
        assert all(slope.isfinite().all() for slope in slopes)
        assert any(slope.any() for slope in slopes)


def test_p_select_is_the_share_of_batches_mixed_within_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, data = made(p_select=0.25)
    kinds: list[bool] = []
    original = lisa.pairs
    monkeypatch.setattr(lisa, "pairs", lambda y, a, within: (kinds.append(within), original(y, a, within))[1])
    objective.model.forward = lambda x: torch.zeros(len(x), 2)  # type: ignore[method-assign]
    torch.manual_seed(0)
    for _ in range(600):
        objective.loss(data)
    assert np.mean(kinds) == pytest.approx(0.25, abs=0.06)


def test_shares_are_drawn_for_each_pair_from_a_beta_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, data = made((250, 250, 250, 250), p_select=0.0, alpha=2.0)
    monkeypatch.setattr(objective.model, "forward", lambda x: torch.zeros(len(x), 2))
    soft: list[Tensor] = []
    monkeypatch.setattr(F, "cross_entropy", lambda logits, target: soft.append(target))
    torch.manual_seed(0)
    objective.loss(data)
    shares = soft[0].gather(1, data.y[:, None])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / 20, abs=0.01)  # of Beta(2, 2)


# ------------------------------------------------------------------------------------------------------------- training


def test_several_attributes_are_one() -> None:
    task = toy_task((1,) * 8, names=("background", "object"))
    objective = LISA(Config())
    objective.setup(task, net())
    assert objective.a.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_under_masked_annotated_images_are_mixed_and_the_others_are_not() -> None:
    task = tiny_task("lisa@masked", "train-33")
    objective = LISA(Config())
    objective.setup(task, task._lab.model())
    assert set(objective.a.tolist()) == {-1, 0, 1, 2, 3}
    y = torch.from_numpy(task.y("train"))
    first, second = pairs(y, objective.a, True)
    unknown = objective.a < 0
    assert torch.equal(first[unknown], unknown.nonzero()[:, 0])
    assert torch.equal(first[unknown], second[unknown])
    assert (first != second)[~unknown].all()
    assert run_tiny("lisa@masked", "val-20").status == "finished"


def test_a_step_trains_on_as_many_images_as_any_others(tmp_path: Path) -> None:
    recipe = Recipe(batch_size=4, epochs=2)
    cost = train(LISA(Config()), toy_task((4, 4, 4, 4)), net(), recipe, tmp_path)
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == (32, 32, 0, 8)


def test_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    recipe = Recipe(batch_size=4, epochs=3)
    ends: list[dict[str, Tensor]] = []
    for name, stops in (("straight", (3,)), ("halted", (1, 3))):
        folder = tmp_path / name
        folder.mkdir()
        for epochs in stops:
            model: nn.Module = net()
            train(LISA(Config()), toy_task((4, 4, 4, 4)), model, replace(recipe, epochs=epochs), folder)  # type: ignore[arg-type]
        ends.append(state_of(model))
    assert same(*ends)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"p_select": 1.5}, r"lisa.p_select must be in \[0, 1\], got 1.5"),
        ({"p_select": -0.1}, r"lisa.p_select must be in \[0, 1\]"),
        ({"alpha": 0.0}, "lisa.alpha must be positive, got 0.0"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("lisa", **{f"lisa__{key}": str(value)})


def test_an_unknown_mix_is_refused() -> None:
    with pytest.raises(UserError, match=r"lisa\.mix must be mixup or cutmix, got 'blend'"):
        Config(mix="blend")  # type: ignore[arg-type]


def test_what_is_searched() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {
        "p_select": "U(0,1)",
        "alpha": "10^U(-1,1)",
        "mix": "{mixup,cutmix}",
    }
