"""IRM: the penalty in closed form, how it sets in, and environments of a few images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plan_tiny
from torch import Tensor
from torch.nn import functional as F
from toys import batch, net, run_tiny, same, state_of, toy_task, train
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods.blocks.environments import membership
from worstgroup.methods.irm import IRM, Config, Estimator, penalty, slopes

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)
SGD = Recipe(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01, batch_size=4)
ADAM = Recipe(optimizer="adam", lr=0.1, batch_size=4)
ESTIMATORS: tuple[Estimator, ...] = ("split", "full")
both = pytest.mark.parametrize("estimator", ESTIMATORS)


def made(sizes: tuple[int, ...] = SIZES, **config: Any) -> tuple[IRM, Batch]:
    """The objective on a toy network, and a batch of all images."""
    task = toy_task(sizes)
    objective = IRM(Config(**config))
    objective.setup(task, net(norm=False))
    return objective, batch(task)


def of(objective: IRM, data: Batch, rows: list[int]) -> Batch:
    """Some images of a batch."""
    return Batch(data.x[rows], data.y[rows], data.index[rows])


def derivative(logits: Tensor, y: Tensor) -> Tensor:
    """Of the mean cross-entropy of scaled logits, by autograd; it can be differentiated again."""
    scale = torch.ones((), dtype=logits.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cross_entropy(scale * logits, y), scale, create_graph=True)
    return slope


def by_double_backward(logits: Tensor, y: Tensor, e: Tensor, estimator: Estimator) -> Tensor:
    """The penalty as it is usually computed, environment by environment."""
    total = logits.new_zeros(())
    for number in e.unique():
        z, label = logits[e == number], y[e == number]
        if estimator == "full":
            total = total + derivative(z, label).square()
        elif len(z) > 1:
            total = total + derivative(z[::2], label[::2]) * derivative(z[1::2], label[1::2])
    return total / len(e.unique())


# ---------------------------------------------------------------------------------------------------------- the penalty


def test_two_images() -> None:
    z = torch.tensor([[0.0, 2.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    y, member = torch.tensor([1, 0]), torch.ones(1, 2, dtype=torch.bool)
    found = slopes(z, y)
    assert found.tolist() == pytest.approx([-0.2384058, 1.7615942], abs=1e-7)
    assert penalty(found, member, "split").item() == pytest.approx(-0.4199743, abs=1e-7)
    full = penalty(found, member, "full")
    assert full.item() == pytest.approx(0.5800257, abs=1e-7)
    (gradient,) = torch.autograd.grad(full, z)
    assert gradient.flatten().tolist() == pytest.approx([-0.0691, 0.0691, -0.8307, 0.8307], abs=1e-4)


@both
@pytest.mark.parametrize("classes", [2, 5])
def test_closed_form_is_double_backward(estimator: Estimator, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    z = (3 * torch.randn(13, classes, dtype=torch.float64, generator=generator)).requires_grad_()
    y = torch.randint(classes, (13,), generator=generator)
    e = torch.tensor([0, 2, 0, 0, 2, 2, 4, 2, 0, 0, 2, 5, 5])  # 4 has one image, 1 and 3 none
    found = penalty(slopes(z, y), membership(e, 6), estimator)
    expected = by_double_backward(z, y, e, estimator)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    (a,), (b,) = (torch.autograd.grad(value, z) for value in (found, expected))
    assert torch.allclose(a, b, rtol=0, atol=1e-10)


@both
def test_large_logits_are_finite(estimator: Estimator) -> None:
    z = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, -1e4]], requires_grad=True)
    value = penalty(slopes(z, torch.tensor([0, 0, 1])), torch.ones(1, 3, dtype=torch.bool), estimator)
    assert value.isfinite()
    assert torch.autograd.grad(value, z)[0].isfinite().all()


def test_slopes_of_bfloat16_logits_keep_float32() -> None:
    z, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.tensor([0, 1, 2] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = slopes(z, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, slopes(z.float(), y))


def test_an_environment_of_one_image_has_no_split_penalty_but_counts() -> None:
    found, member = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([[True, True, False], [False, False, True]])
    assert penalty(found, member, "split").item() == 2 * 3 / 2
    assert penalty(found, member, "full").item() == (2.5**2 + 5**2) / 2


# ------------------------------------------------------------------------------------------------------------- the loss


@both
def test_mean_over_environments_of_risk_and_penalty(estimator: Estimator) -> None:
    objective, data = made(weight=0.7, anneal_steps=0, estimator=estimator)
    logits = objective.model(data.x)
    parts = [objective.e == number for number in range(2)]
    risk = torch.stack([F.cross_entropy(logits[part], data.y[part]) for part in parts]).mean()
    expected = risk + 0.7 * by_double_backward(logits, data.y, objective.e, estimator)
    torch.testing.assert_close(objective.loss(data), expected)
    assert risk.item() != pytest.approx(F.cross_entropy(logits, data.y).item())


def test_the_loss_can_be_negative() -> None:
    objective, data = made((0, 2, 0, 0), weight=1e4, anneal_steps=0)
    objective.model.head.weight.data.zero_()
    objective.model.head.bias.data = torch.tensor([0.0, 2.0])
    assert objective.loss(Batch(data.x, torch.tensor([1, 0]), data.index)).item() < -4000


@both
def test_one_environment_keeps_its_penalty(estimator: Estimator) -> None:
    objective, data = made((4, 0, 4, 0), weight=300.0, anneal_steps=0, estimator=estimator)
    logits = objective.model(data.x)
    extra = objective.loss(data) - F.cross_entropy(logits, data.y)
    torch.testing.assert_close(extra, 300 * by_double_backward(logits, data.y, objective.e, estimator))
    assert extra.abs() > 0.01


@both
@pytest.mark.parametrize("rows", [[0], [0, 1, 2], [0, 3], [0, 1, 3]])
def test_small_batches_have_finite_gradients(estimator: Estimator, rows: list[int]) -> None:
    objective, data = made(anneal_steps=0, estimator=estimator)
    loss = objective.loss(of(objective, data, rows))
    gradients = torch.autograd.grad(loss, list(objective.model.parameters()))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@both
def test_unannotated_images_have_a_risk_but_no_penalty(estimator: Estimator) -> None:
    objective, data = made(weight=5.0, anneal_steps=0, estimator=estimator)
    known = [1, 2, 3, 6, 7, 8, 9]
    logits = objective.model(data.x)
    extra = by_double_backward(logits[known], data.y[known], objective.e[known], estimator)
    objective.e[[0, 4, 5]], objective.masked = -1, True
    torch.testing.assert_close(objective.loss(data), F.cross_entropy(logits, data.y) + 5 * extra)
    objective.e[:] = -1
    torch.testing.assert_close(objective.loss(data), F.cross_entropy(logits, data.y))


# ------------------------------------------------------------------------------------------------------------ annealing


def test_weight_is_one_until_annealing_is_over() -> None:
    objective, data = made(weight=100.0, anneal_steps=3)
    optimizers = objective.optimizers(SGD)
    for weight in (1, 1, 1, 100, 100):
        logits = objective.model(data.x)
        extra = by_double_backward(logits, data.y, objective.e, "split")
        parts = [F.cross_entropy(logits[objective.e == number], data.y[objective.e == number]) for number in range(2)]
        loss = objective.step(data, optimizers)
        torch.testing.assert_close(loss, (torch.stack(parts).mean() + weight * extra).detach())


@pytest.mark.parametrize("recipe", [SGD, ADAM], ids=lambda recipe: recipe.optimizer)
def test_the_optimiser_forgets_once(recipe: Recipe) -> None:
    """Exactly as if a new one were made at that step and never again."""
    objective, data = made(anneal_steps=2)
    twin, _ = made(anneal_steps=10**6)
    optimizers, others = objective.optimizers(recipe), twin.optimizers(recipe)
    for step in range(6):
        if step == 2:
            assert not same(state_of(objective.model), state_of(made()[0].model))
            others = twin.optimizers(recipe)
            twin.config = objective.config
            twin.steps = 3  # past the moment at which it would forget by itself
        objective.step(data, optimizers)
        twin.step(data, others)
        assert same(state_of(objective.model), state_of(twin.model)), step


def test_momentum_would_make_a_difference() -> None:
    """Otherwise the test above shows nothing."""
    objective, data = made(anneal_steps=2, weight=1.0)
    keeper, _ = made(anneal_steps=10**6, weight=1.0)
    for method in (objective, keeper):
        optimizers = method.optimizers(SGD)
        for _ in range(3):
            method.step(data, optimizers)
    assert not same(state_of(objective.model), state_of(keeper.model))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_the_schedule_survives_a_restart(stop: int) -> None:
    """Before, at and after the step at which the optimiser forgets."""
    whole, data = made(anneal_steps=2)
    optimizers = whole.optimizers(ADAM)
    for _ in range(5):
        whole.step(data, optimizers)
    first, _ = made(anneal_steps=2)
    optimizers = first.optimizers(ADAM)
    for _ in range(stop):
        first.step(data, optimizers)
    second, _ = made(anneal_steps=2)
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    restored = second.optimizers(ADAM)
    restored["model"].load_state_dict(optimizers["model"].state_dict())
    for _ in range(5 - stop):
        second.step(data, restored)
    assert same(state_of(second.model), state_of(whole.model))


def test_a_second_fit_starts_the_schedule_anew() -> None:
    objective, data = made(anneal_steps=2)
    objective.step(data, objective.optimizers(SGD))
    objective.setup(toy_task(SIZES), net(norm=False))
    assert objective.steps == 0


# ---------------------------------------------------------------------------------------------------- cost and settings


def test_the_penalty_costs_no_pass(tmp_path: Path) -> None:
    cost = train(IRM(Config(anneal_steps=2)), toy_task((4, 4, 4, 4)), net(), Recipe(batch_size=4, epochs=2), tmp_path)
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == (32, 32, 0, 8)


def test_it_runs_with_settings_as_typed() -> None:
    record = run_tiny("irm", irm__anneal_steps="4", irm__estimator="full", irm__env="group", irm__weight="3")
    assert record.config == {"env": "group", "weight": 3.0, "anneal_steps": 4, "estimator": "full"}


def test_search_ranges() -> None:
    texts = {name: search.text for name, search in ranges(Config).items()}
    assert texts == {"weight": "10^U(-1,5)", "anneal_steps": "10^U(0,4)"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"weight": -1.0}, "irm.weight must be at least 0, got -1.0"),
        ({"anneal_steps": -1}, "irm.anneal_steps must be at least 0, got -1"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("irm", **{f"irm__{key}": str(value)})


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(UserError, match="estimator"):
        plan_tiny("irm", irm__estimator="half")
