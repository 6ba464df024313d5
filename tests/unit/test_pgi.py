"""PGI: how classes are split, and the penalty that makes predictions agree across the split."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from numpy.typing import NDArray
from stubs import ledger, make_card, tiny_task
from torch import Tensor, nn
from torch.nn import functional as F
from toys import batch, net, run_tiny, same, state_of, toy_task, train
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods import pgi
from worstgroup.methods.blocks.partition import costlier, instability, network, partition, scale_slopes
from worstgroup.methods.pgi import PGI, Config, Invariant, divergence, side_balanced

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)
SIDE = np.array([0, 1, 0, 1, 0, 0, 1, 1, 0, 0], bool)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(side: NDArray[np.bool_] = SIDE, **config: Any) -> tuple[Invariant, Batch]:
    """The objective on a toy network without BatchNorm, and a batch of all ten images; no ramp."""
    task = toy_task(SIZES, norm=False)
    objective = Invariant(Config(**{"ramp_epochs": 0, **config}), side)
    objective.setup(task, net(norm=False))
    objective.make_sampler(task, Recipe(batch_size=4, epochs=3))
    return objective, batch(task)


# --------------------------------------------------------------------------------------------------------- the penalty


def two_sides(hard: list[float], easy: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, labels and sides of two images of class 0."""
    return torch.tensor([hard, easy]), torch.tensor([0, 0]), torch.tensor([1, 0])


def test_divergence_of_the_papers_means() -> None:
    """KL((.5, .5) || (.9, .1)) = 0.5108, which the released code divides by the number of classes."""
    found = divergence(*two_sides([0.5, 0.5], [0.9, 0.1])).item()
    assert found == pytest.approx(0.5 * math.log(0.5 / 0.9) / 2 + 0.5 * math.log(0.5 / 0.1) / 2)
    assert (2 * found, found) == (pytest.approx(0.5108, abs=1e-4), pytest.approx(0.2554, abs=1e-4))


def test_the_costlier_side_comes_first() -> None:
    assert divergence(*two_sides([0.9, 0.1], [0.5, 0.5])).item() == pytest.approx(0.3681 / 2, abs=1e-4)


def test_equal_means_do_not_diverge() -> None:
    """Whatever the images' own predictions are."""
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.6, 0.4], [0.8, 0.2]])
    assert divergence(p, torch.zeros(4, dtype=torch.long), torch.tensor([1, 1, 0, 0])).item() == pytest.approx(
        0, abs=1e-6
    )


def test_classes_are_summed_and_those_without_a_side_are_left_out() -> None:
    p = torch.randn(9, 4, generator=generator()).softmax(1)
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])  # class 1 is on one side, class 3 is missing
    side = torch.tensor([1, 0, 0, 0, 0, 1, 1, 0, 1])
    expected = 0.0
    for label in (0, 2):
        hard, easy = (p[(y == label) & (side == s)].mean(0) for s in (1, 0))
        expected += (hard * (hard / easy).log()).sum().item() / 4
    assert divergence(p, y, side).item() == pytest.approx(expected)


def test_sure_predictions_give_finite_values_and_gradients() -> None:
    logits = torch.tensor([[500.0, 0.0], [0.0, 500.0], [500.0, 0.0]], requires_grad=True)
    value = divergence(logits.softmax(1), torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1]))
    (slope,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert slope.isfinite().all()


def test_the_penalty_teaches_the_extractor_and_not_the_head() -> None:
    with_penalty, data = made(weight=3.0)
    without, _ = made(weight=0.0)
    slopes = []
    for objective in (with_penalty, without):
        objective.loss(data).backward()  # type: ignore[no-untyped-call]
        slopes.append({name: value.grad for name, value in objective.model.named_parameters()})
    assert all(torch.equal(slopes[0][name], slopes[1][name]) for name in ("head.weight", "head.bias"))
    features = without.model.features(data.x)
    predictions = without.model.head(features).softmax(1)
    penalty = divergence(predictions, data.y, torch.from_numpy(SIDE).long())
    (of_penalty,) = torch.autograd.grad(penalty, without.model.trunk[0].weight)  # type: ignore[index]
    assert of_penalty.any()
    torch.testing.assert_close(slopes[0]["trunk.0.weight"], slopes[1]["trunk.0.weight"] + 3 * of_penalty)


# ------------------------------------------------------------------------------------------------------------ the risk


def test_without_a_penalty_it_is_erm_balanced_by_side() -> None:
    objective, data = made(weight=0.0)
    losses, side = F.cross_entropy(objective.model(data.x), data.y, reduction="none"), torch.from_numpy(SIDE)
    expected = (losses[side].mean() + losses[~side].mean()) / 2
    assert objective.loss(data).item() == pytest.approx(expected.item())


def test_a_side_without_images_has_no_risk() -> None:
    assert side_balanced(torch.tensor([1.0, 3.0]), torch.tensor([1, 1])).item() == pytest.approx(1)
    assert side_balanced(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([1, 0, 0])).item() == pytest.approx(2.5)


def test_sides_of_equal_size_make_it_erm() -> None:
    losses = torch.rand(8, generator=generator())
    assert side_balanced(losses, torch.arange(8) % 2).item() == pytest.approx(losses.mean().item())


@pytest.mark.parametrize(("ramp_epochs", "strengths"), [(0, [1, 1, 1, 1]), (1, [0, 1 / 3, 2 / 3, 1, 1])])
def test_the_penalty_grows_over_its_epochs(ramp_epochs: int, strengths: list[float]) -> None:
    """Three batches an epoch."""
    objective, data = made(weight=10.0, ramp_epochs=ramp_epochs)
    plain, full = (made(weight=weight)[0].loss(data).item() for weight in (0.0, 10.0))
    for strength in strengths:
        assert objective.loss(data).item() == pytest.approx(plain + strength * (full - plain), rel=1e-5)


def test_how_far_it_has_grown_survives_a_restart() -> None:
    first, data = made(ramp_epochs=1)
    second, _ = made(ramp_epochs=1)
    for _ in range(2):
        first.loss(data)
    second.load_state_dict(first.state_dict())
    assert second.loss(data).item() == first.loss(data).item()


# ----------------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("classes", [2, 5])
def test_slopes_are_those_of_the_loss_by_factors_on_the_logits(classes: int) -> None:
    logits, y = torch.randn(6, classes, generator=generator()), torch.arange(6) % classes
    s = torch.ones(6, classes, requires_grad=True)
    (expected,) = torch.autograd.grad(F.cross_entropy(s * logits, y, reduction="sum"), s)
    torch.testing.assert_close(scale_slopes(logits, y), expected)


def test_instability_of_its_formula() -> None:
    logits, y = torch.randn(6, 3, generator=generator()), torch.arange(6) % 3
    alpha, losses = torch.rand(6, generator=generator()), F.cross_entropy(logits, y, reduction="none")
    expected = 0.0
    for weights in (alpha, 1 - alpha):
        s = torch.ones(1, 3, requires_grad=True)
        risk = (weights * F.cross_entropy(s * logits, y, reduction="none")).sum() / weights.sum()
        (slope,) = torch.autograd.grad(risk, s)
        expected += (risk + 10 * slope.square().sum()).item() / 2
    assert instability(alpha, losses, scale_slopes(logits, y), 10.0).item() == pytest.approx(expected, rel=1e-5)


def test_sides_are_numbered_by_their_losses() -> None:
    side, losses = torch.tensor([True, False, True]), torch.tensor([1.0, 5.0, 2.0])
    assert costlier(side, losses).tolist() == costlier(~side, losses).tolist() == [False, True, False]
    for value in (True, False):
        assert not costlier(torch.full((3,), value), losses).any()


def test_layers_of_the_networks() -> None:
    torch.manual_seed(0)
    net = network(10)
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(64, 10), (32, 64), (21, 32), (1, 21)]
    assert [layer.bias is None for layer in linear] == [False, False, False, True]
    assert sum(isinstance(layer, nn.LayerNorm) for layer in net) == 3
    for layer in linear:
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.05)


def two_kinds(n: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, logits and labels of two classes, a tenth of whose images look, and are taken, for the other class."""
    y, hard = torch.arange(n) % 2, torch.arange(n) % 20 >= 18
    said = torch.where(hard, 1 - y, y)
    features = 2 * F.one_hot(said, 8) + 0.3 * torch.randn(n, 8, generator=generator())
    return features, 2.0 * (2 * F.one_hot(said, 2) - 1), y, hard


@pytest.mark.parametrize("kappa", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_images_that_rely_on_something_else_are_split_off(kappa: float, seed: int) -> None:
    features, logits, y, hard = two_kinds()
    torch.manual_seed(seed)
    side = partition(features, logits, y, kappa)
    assert (side == hard).float().mean() > 0.9
    assert side[hard].float().mean() > 0.9


def test_a_class_of_one_image_and_missing_classes_are_no_trouble() -> None:
    logits = torch.randn(5, 4, generator=generator())
    side = partition(torch.randn(5, 3, generator=generator()), logits, torch.tensor([0, 0, 0, 0, 2]), 0.1)
    assert side.dtype == torch.bool
    assert not side[4]


# ------------------------------------------------------------------------------------------------------------ training


def test_the_rest_of_the_epochs_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("pgi", "none")
    seen: list[Any] = []
    monkeypatch.setattr(task, "train", lambda objective, **options: seen.append((objective, options)))
    PGI(Config()).fit(task)
    ((objective, options),) = seen
    assert (options["stage"], options["recipe"]) == ("second", replace(task.recipe, epochs=1))
    assert same(state_of(options["start"].model), state_of(task.erm(1).model))
    assert objective.side.shape == (96,)
    assert not any(ledger(task).values())
    monkeypatch.setattr(pgi, "partition", None)  # the split is shared by the runs of a block
    other = tiny_task("pgi", "none", pgi__weight="1")
    monkeypatch.setattr(other, "train", lambda objective, **options: seen.append((objective, options)))
    PGI(Config(weight=1.0)).fit(other)
    assert torch.equal(seen[1][0].side, objective.side)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_schedule_goes_on(schedule: Any) -> None:
    recipe = Recipe(epochs=5, schedule=schedule)
    objective, _ = made()
    erm = super(Invariant, objective)
    for epoch in (0.0, 0.5, 3.9):
        assert objective.lr_factor(replace(recipe, epochs=4), epoch) == erm.lr_factor(recipe, epoch + 1)


def test_both_parts_take_the_steps_of_one_erm() -> None:
    record = run_tiny("pgi")
    assert record.cost is not None
    assert record.labels is not None
    marginal, scratch, n = record.cost.marginal, record.cost.scratch, 96
    assert (marginal.n_fwd, marginal.n_bwd, marginal.n_fwd_nograd, marginal.n_updates) == (n, n, n, n // 16)
    assert (scratch.n_fwd, scratch.n_updates) == (2 * n, 2 * n // 16)
    assert (record.labels.n_train_a, record.labels.n_val_a_fit, record.labels.n_y_extra) == (0, 0, 0)


def test_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for name, stops in (("straight", (3,)), ("halted", (1, 3))):
        (tmp_path / name).mkdir()
        for epochs in stops:
            model, objective = net(), Invariant(Config(ramp_epochs=2), SIDE)
            train(objective, toy_task(SIZES), model, Recipe(batch_size=4, epochs=epochs), tmp_path / name)
        ends.append(state_of(model))
    assert same(*ends)


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", ["weight", "kappa", "ramp_epochs"])
def test_bad_values_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"pgi.{name} must be at least 0, got -1"):
        Config(**{name: -1})
    with pytest.raises(UserError, match=f"pgi.{name} must be at least 0, got -1"):
        plan_tiny("pgi", **{f"pgi__{name}": "-1"})


def test_an_epoch_must_be_left_after_the_split() -> None:
    with pytest.raises(UserError, match="pgi needs at least 2 epochs, the first before its split, got 1"):
        plan_tiny("pgi", recipe__epochs="1")
    Config().check(Recipe(epochs=2), make_card())


def test_what_is_searched() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {
        "weight": "{50,10,1,100}",
        "kappa": "{0.1,10,0.001}",
        "ramp_epochs": "{5,1}",
    }
