"""CDAN: a discriminator that sees features and prediction multiplied, and an adversary with a ramp."""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from helpers import plan_tiny
from torch import Tensor, nn
from torch.nn import functional as F
from toys import batch, net, run_tiny, same, state_of, toy_task
from worstgroup.benchmark.backbones import Backbone
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods import dann
from worstgroup.methods.blocks.adversary import ramp
from worstgroup.methods.cdan import CDAN, Config, ProductDiscriminator, Products, entropy, environment_balanced

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)
SGD = Recipe(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.01, batch_size=4)
PLAIN: dict[str, Any] = {"ramp": False, "dropout": 0.0, "width": 32}
"""A constant lambda, and no dropout, so that every call gives the same."""


def made(model: Backbone | None = None, **config: Any) -> tuple[CDAN, Batch]:
    """The objective on a toy network without BatchNorm, and a batch of all ten images."""
    task = toy_task(SIZES)
    objective = CDAN(Config(**{**PLAIN, **config}))
    objective.setup(task, model or net(norm=False))
    return objective, batch(task)


def confusion(objective: CDAN, data: Batch) -> Tensor:
    """What the discriminator minimises, with its graph."""
    features = objective.model.features(data.x)
    return objective.confusion(features, objective.model.head(features), data)


def slopes(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter, zero where the loss does not depend on it."""
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(value) if slope is None else slope
        for (name, value), slope in zip(parameters.items(), found, strict=True)
    }


# ------------------------------------------------------------------------------------------------------------ products


def test_all_products_where_they_are_few() -> None:
    h, p = torch.randn(3, 4), torch.rand(3, 2)
    products = Products(4, 2)
    assert (products.size, products.state_dict()) == (8, {})
    torch.testing.assert_close(products(h, p), torch.stack([torch.kron(p[i], h[i]) for i in range(3)]))


def test_of_many_products_random_combinations_with_the_same_geometry() -> None:
    """4096 is the last number that is few; the expected inner product is that of all products."""
    assert Products(2048, 2).size == 4096
    torch.manual_seed(0)
    products = Products(2049, 2)
    assert products.size == 1024
    assert list(products.parameters()) == []
    assert {name: tuple(value.shape) for name, value in products.state_dict().items()} == {
        "of_features": (2049, 1024),
        "of_classes": (2, 1024),
    }
    h, p = F.normalize(torch.randn(2, 2049)), torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    shown = products(h, p)
    torch.testing.assert_close(shown @ shown.T, (h @ h.T) * (p @ p.T), atol=0.15, rtol=0)


def test_random_matrices_are_the_runs_own_and_survive_a_restart() -> None:
    def wide(seed: int = 0) -> CDAN:
        model = net(norm=False)
        model.neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(6, 2049))
        model.head, model.feature_dim = nn.Linear(2049, 2), 2049
        objective = CDAN(Config(**PLAIN))
        objective.setup(toy_task(SIZES, seed=seed), model)
        return objective

    first, second, other = wide(), wide(), wide(seed=1)
    assert same(state_of(first.discriminator), state_of(second.discriminator))
    name = "products.of_features"
    assert not torch.equal(first.discriminator.state_dict()[name], other.discriminator.state_dict()[name])
    other.discriminator.load_state_dict(first.discriminator.state_dict())
    assert same(state_of(first.discriminator), state_of(other.discriminator))
    trained = {id(p) for group in first.optimizers(SGD)["discriminator"].param_groups for p in group["params"]}
    assert trained == {id(p) for p in first.discriminator.parameters()}
    assert math.isfinite(first.step(batch(toy_task(SIZES)), first.optimizers(SGD)))


def test_the_discriminator_sees_products_and_gives_the_prediction_no_gradient() -> None:
    objective, data = made()
    assert isinstance(objective.discriminator, ProductDiscriminator)
    features = objective.model.features(data.x)
    p = objective.model.head(features).softmax(1).detach()
    judged = objective.discriminator.mlp((p[:, :, None] * features[:, None]).flatten(1))
    adversary = confusion(objective, data)
    assert adversary.item() == pytest.approx(F.cross_entropy(judged, objective.e).item())
    by_hand = slopes(F.cross_entropy(judged, objective.e), objective.model)
    for name, found in slopes(adversary, objective.model).items():
        torch.testing.assert_close(found, by_hand[name])
    assert not by_hand["head.weight"].any()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("impl", ["grl", "alternating"])
def test_with_one_class_it_is_dann(impl: Literal["grl", "alternating"], with_entropy: bool) -> None:
    """The prediction is then 1, and its entropy the same everywhere; environments are balanced in this batch."""
    model = net(norm=False, classes=1)
    objective, data = made(model, impl=impl, entropy=with_entropy, weight=0.6)
    other = dann.DANN(dann.Config(impl=impl, weight=0.6, width=32))
    other.setup(toy_task(SIZES), model)
    assert same(
        state_of(other.discriminator),
        dict(zip(state_of(other.discriminator), state_of(objective.discriminator).values(), strict=True)),
    )
    rows = torch.tensor([0, 1, 2, 3, 4, 6])
    data = Batch(data.x[rows], torch.zeros_like(rows), rows)
    assert objective.e[rows].tolist() == [0, 0, 0, 1, 1, 1]
    a, b = objective.loss(data), other.loss(data)
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    expected = slopes(b, model)
    for name, found in slopes(a, model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- entropy


def test_entropy() -> None:
    assert entropy(torch.zeros(1, 4)).item() == pytest.approx(math.log(4), abs=1e-4)
    z = torch.tensor([[math.log(3), 0.0]])
    p = torch.tensor([0.75, 0.25])
    assert entropy(z).item() == pytest.approx(-(p * (p + 1e-5).log()).sum().item())


@pytest.mark.parametrize("margin", [100.0, 1e4, 1e30])
def test_entropy_of_sure_predictions_has_finite_slopes(margin: float) -> None:
    z = torch.tensor([[margin, 0.0]], requires_grad=True)
    h = entropy(z)
    (slope,) = torch.autograd.grad(h.sum(), z)
    assert h.item() == pytest.approx(0, abs=2e-5)
    assert slope.isfinite().all()


def test_weights_have_sum_one_in_each_environment() -> None:
    e = torch.tensor([0, 0, 0, 2, 2, 1])
    found = environment_balanced(torch.tensor([1.0, 1.0, 2.0, 2.0, 1.0, 7.0]), e, 3)
    expected = torch.tensor([1 / 4, 1 / 4, 1 / 2, 2 / 3, 1 / 3, 1.0]) / 3
    torch.testing.assert_close(found, expected)
    without = environment_balanced(torch.ones(4), torch.tensor([0, 2, 2, 2]), 5)  # two of five environments
    torch.testing.assert_close(without, torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]))


def test_their_sums_have_no_gradient() -> None:
    w = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    e = torch.tensor([0, 0, 1])
    (slope,) = torch.autograd.grad((environment_balanced(w, e, 2) * torch.tensor([5.0, 6.0, 7.0])).sum(), w)
    torch.testing.assert_close(slope, torch.tensor([5 / 8, 6 / 8, 7 / 4]))


def test_the_loss_with_entropy_by_hand() -> None:
    objective, data = made(entropy=True)
    torch.manual_seed(0)
    nn.init.normal_(objective.model.head.weight, std=3)
    features = objective.model.features(data.x)
    p = objective.model.head(features).softmax(1)
    weights = 1 + torch.exp((p * (p + 1e-5).log()).sum(1))
    assert weights.std() > 0.01
    losses = F.cross_entropy(objective.judge(features, p.log(), data.y), objective.e, reduction="none")
    halves = [(weights * losses)[objective.e == e].sum() / weights[objective.e == e].sum() for e in (0, 1)]
    assert confusion(objective, data).item() == pytest.approx(sum(halves).item() / 2, rel=1e-5)


def test_without_entropy_all_images_weigh_the_same() -> None:
    objective, data = made()
    assert objective.weights(torch.randn(10, 2), data.y, objective.e).tolist() == pytest.approx([0.1] * 10)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_reversed_gradient(with_entropy: bool) -> None:
    """Of features and, with entropy, of logits; the classifier's head gets the latter alone."""
    objective, data = made(entropy=with_entropy, weight=0.3)
    ordinary = slopes(confusion(objective, data), objective.model)
    of_classes = slopes(F.cross_entropy(objective.model(data.x), data.y), objective.model)
    assert ordinary["trunk.0.weight"].abs().max() > 1e-4
    assert bool(ordinary["head.weight"].any()) == with_entropy
    for name, found in slopes(objective.loss(data), objective.model).items():
        torch.testing.assert_close(found, of_classes[name] - 0.3 * ordinary[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_constant_discriminator(with_entropy: bool) -> None:
    """ln E. Without entropy it moves nothing; with it, as released, predictions become surer all the same."""
    objective, data = made(entropy=with_entropy, grad_penalty=1.0)
    for parameter in objective.discriminator.mlp[-1].parameters():  # type: ignore[index]
        nn.init.zeros_(parameter)
    adversary = confusion(objective, data)
    assert adversary.item() == pytest.approx(math.log(2))
    found = slopes(adversary, objective.model)
    assert any(slope.any() for slope in found.values()) == with_entropy
    if with_entropy:
        before = entropy(objective.model(data.x)).mean().item()
        with torch.no_grad():
            for name, value in objective.model.named_parameters():
                value += 0.1 * found[name]  # the reversed step
        assert entropy(objective.model(data.x)).mean().item() < before


# ------------------------------------------------------------------------------------------------------------ training


def test_defaults_are_as_released() -> None:
    config = Config()
    assert (config.impl, config.weight, config.ramp, config.ramp_steps) == ("grl", 1.0, True, 10_000)
    assert (config.width, config.depth, config.dropout) == (1024, 3, 0.5)


def test_lambda_grows_over_10000_steps_however_long_the_training_is() -> None:
    objective, data = made(ramp=True, weight=2.0)
    objective.make_sampler(toy_task(SIZES), SGD)
    assert objective.strength() == 0
    optimizers = objective.optimizers(SGD)
    for _ in range(3):
        objective.step(data, optimizers)
    assert objective.strength() == 2 * ramp(3 / 10_000)
    objective.steps = 20_000
    assert objective.strength() == pytest.approx(2, abs=2e-4)
    short, _ = made(ramp=True, ramp_steps=0)
    short.make_sampler(toy_task(SIZES), replace(SGD, epochs=5))
    assert short.horizon == 15  # 10 images in fours


def test_the_first_step_is_erms() -> None:
    objective, data = made(ramp=True, entropy=True, grad_penalty=1.0)
    objective.make_sampler(toy_task(SIZES), SGD)
    erm: Objective[None] = Objective(None)
    erm.setup(toy_task(SIZES), net(norm=False))
    untrained = state_of(objective.discriminator)
    for method in (objective, erm):
        method.step(data, method.optimizers(SGD))
    assert same(state_of(objective.model), state_of(erm.model))
    assert not same(untrained, state_of(objective.discriminator))


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("rows", [[0], [0, 1, 2], [3]])
def test_small_batches_of_one_environment(with_entropy: bool, rows: list[int]) -> None:
    objective, data = made(entropy=with_entropy)
    index = torch.tensor(rows)
    data = Batch(data.x[index], data.y[index], index)
    optimizers = objective.optimizers(SGD)
    for _ in range(3):
        assert objective.step(data, optimizers).isfinite()
    assert all(value.isfinite().all() for value in state_of(objective.model).values())


@pytest.mark.parametrize("with_entropy", ["false", "true"])
def test_it_runs_where_few_images_have_attributes(with_entropy: str) -> None:
    assert run_tiny("cdan@masked", "val-20", cdan__entropy=with_entropy).labels.n_train_a == 0


def test_cost() -> None:
    """96 images, 2 epochs, in sixteens: every step trains the classifier."""
    record = run_tiny("cdan")
    assert record.cost is not None
    cost = record.cost.scratch
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == (192, 192, 0, 12)


def test_bad_values_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"cdan\.ramp_steps must be at least 0, got -5"):
        plan_tiny("cdan", cdan__ramp_steps="-5")
    with pytest.raises(UserError, match=r"cdan\.dropout"):
        plan_tiny("cdan", cdan__dropout="1")
