"""DANN: two players, in turn or at once, each of whom moves only its own weights."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import tiny_task
from torch import Tensor, nn
from torch.nn import functional as F
from toys import batch, net, run_tiny, same, state_of, toy_task, train
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Task
from worstgroup.methods.blocks.adversary import mlp, ramp, reverse
from worstgroup.methods.dann import DANN, Config

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)
SGD = Recipe(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.01, batch_size=4)


def made(*, norm: bool = True, **config: Any) -> tuple[DANN, Batch]:
    """The objective on a toy network, and a batch of all ten images."""
    task = toy_task(SIZES)
    objective = DANN(Config(**config))
    objective.setup(task, net(norm=norm))
    return objective, batch(task)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, without statistics."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


# ----------------------------------------------------------------------------------------------------------- the losses


def constant(objective: DANN) -> None:
    """Let the discriminator say the same of everything."""
    nn.init.zeros_(objective.discriminator[-1].weight)  # type: ignore[index]
    nn.init.zeros_(objective.discriminator[-1].bias)  # type: ignore[index]


@pytest.mark.parametrize(("names", "environments"), [(("background",), 2), (("background", "object"), 4)])
def test_a_constant_discriminator_confuses_nothing(names: tuple[str, ...], environments: int) -> None:
    task = toy_task((1,) * 2 * environments, names=names)
    objective = DANN(Config(grad_penalty=1.0))
    objective.setup(task, net())
    constant(objective)
    features = objective.model.features(batch(task).x)
    adversary = objective.confusion(features, objective.model.head(features), batch(task))
    assert adversary.item() == pytest.approx(math.log(environments))
    slopes = torch.autograd.grad(adversary, list(objective.model.trunk.parameters()))
    assert not any(slope.any() for slope in slopes)


def test_one_environment_leaves_nothing_to_tell() -> None:
    task = toy_task((3, 0, 4, 0))
    objective = DANN(Config(impl="grl", grad_penalty=1.0))
    objective.setup(task, net(norm=False))
    objective.e, objective.num_envs = torch.zeros_like(objective.e), 1
    objective.discriminator = objective.make_discriminator()
    assert objective.discriminator_loss(batch(task)).item() == 0
    optimizers = objective.optimizers(SGD)
    for _ in range(2):
        assert math.isfinite(objective.step(batch(task), optimizers))
    assert all(value.isfinite().all() for value in state_of(objective.model).values())


def test_the_two_losses() -> None:
    objective, data = made(norm=False, weight=0.3)
    features = objective.model.features(data.x)
    cross_entropy = F.cross_entropy(objective.model(data.x), data.y)
    of_environments = F.cross_entropy(objective.discriminator(features), objective.e)
    assert objective.e.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1, 1]
    assert objective.loss(data).item() == pytest.approx((cross_entropy - 0.3 * of_environments).item())
    assert objective.discriminator_loss(data).item() == pytest.approx(of_environments.item())


def linear(objective: DANN) -> nn.Linear:
    """Make the discriminator linear."""
    layer = nn.Linear(6, 2)
    objective.discriminator = nn.Sequential(layer)
    return layer


def test_gradient_penalty_of_a_linear_discriminator() -> None:
    """d CE_i / d h_i = W^T (p_i - e_i), and the penalty is the mean squared length of that."""
    objective, data = made(norm=False, grad_penalty=0.5, weight=2.0)
    layer = linear(objective)
    features = objective.model.features(data.x).detach()
    wrong = layer(features).softmax(1) - F.one_hot(objective.e, 2)
    penalty = (wrong @ layer.weight).square().sum(1).mean()
    expected = F.cross_entropy(layer(features), objective.e) + 0.5 * penalty
    assert penalty > 0.01
    assert objective.discriminator_loss(data).item() == pytest.approx(expected.item())
    cross_entropy = F.cross_entropy(objective.model(data.x), data.y)
    assert objective.loss(data).item() == pytest.approx((cross_entropy - 2.0 * expected).item())
    # and it is differentiable in what each player moves
    (of_discriminator,) = torch.autograd.grad(expected, layer.weight)
    (found,) = torch.autograd.grad(objective.discriminator_loss(data), layer.weight)
    torch.testing.assert_close(found, of_discriminator)


def test_gradient_penalty_reaches_the_trunk() -> None:
    plain, data = made(norm=False)
    penalised, _ = made(norm=False, grad_penalty=10.0)
    same_head = [objective.loss(data) for objective in (plain, penalised)]
    (a,), (b,) = (
        torch.autograd.grad(loss, next(objective.model.trunk.parameters()))
        for loss, objective in zip(same_head, (plain, penalised), strict=True)
    )
    assert not torch.allclose(a, b)


# ---------------------------------------------------------------------------------------------------------- the players


def test_with_weight_zero_the_classifiers_step_is_erms() -> None:
    objective, data = made(weight=0.0)
    erm: Objective[None] = Objective(None)
    erm.setup(toy_task(SIZES), net())
    for method in (objective, erm):
        optimizers = method.optimizers(SGD)
        for _ in range(3):
            method.step(data, optimizers)
            if method is objective:
                statistics = state_of(objective.model)
                method.step(data, optimizers)  # the discriminator's turn, which leaves its mark on BatchNorm only
                objective.model.load_state_dict(statistics)
    assert same(state_of(objective.model), state_of(erm.model))


@pytest.mark.parametrize("grad_penalty", [0.0, 1.0])
def test_each_player_moves_its_own_weights(grad_penalty: float) -> None:
    objective, data = made(disc_steps=1, grad_penalty=grad_penalty, disc_weight_decay=0.1)
    optimizers = objective.optimizers(SGD)
    for turn in ("model", "discriminator", "model", "discriminator"):
        before = {name: weights(network) for name, network in objective.networks().items()}
        objective.step(data, optimizers)
        moved = {name for name, network in objective.networks().items() if not same(before[name], weights(network))}
        assert moved == {turn}


def test_the_discriminators_turn_moves_batchnorm_statistics_too() -> None:
    """As in DomainBed: the features it sees are those of a network in training."""
    objective, data = made()
    objective.steps = 1
    before = state_of(objective.model)
    objective.step(data, objective.optimizers(SGD))
    changed = {name for name, value in state_of(objective.model).items() if not torch.equal(value, before[name])}
    assert changed == {"trunk.1.running_mean", "trunk.1.running_var", "trunk.1.num_batches_tracked"}


def turns(objective: DANN, data: Batch, number: int) -> str:
    optimizers = objective.optimizers(SGD)
    order = ""
    for _ in range(number):
        before = weights(objective.model)
        objective.step(data, optimizers)
        order += "d" if same(before, weights(objective.model)) else "c"
    return order


@pytest.mark.parametrize(("disc_steps", "order"), [(1, "cdcdcd"), (2, "dcddcddc"), (3, "ddcdddcdddc")])
def test_order_of_the_players(disc_steps: int, order: str) -> None:
    assert turns(*made(disc_steps=disc_steps), len(order)) == order


def test_whose_turn_it_is_survives_a_restart() -> None:
    first, data = made(disc_steps=3)
    assert turns(first, data, 2) == "dd"
    second, _ = made(disc_steps=3)
    second.load_state_dict(first.state_dict())
    assert turns(second, data, 5) == turns(first, data, 5) == "cdddc"


def test_the_discriminator_learns_and_the_classifier_unlearns() -> None:
    """Each player's step lowers its own loss."""
    objective, data = made(norm=False, weight=5.0, disc_lr=1e-4)
    optimizers = objective.optimizers(replace(SGD, lr=1e-3))
    for step in range(20):
        objective.steps = step
        loss = objective.discriminator_loss if step % 2 else objective.loss
        before = loss(data).item()
        objective.step(data, optimizers)
        assert loss(data).item() < before


# ------------------------------------------------------------------------------------------- images without environment


def forget(objective: DANN, rows: list[int]) -> None:
    """As under `@masked`: these images have no known environment."""
    objective.e[rows] = -1
    objective.masked = True


def test_what_is_unknown_is_found_once() -> None:
    """Where all is known no step has to look."""
    assert not made()[0].masked
    task = tiny_task("dann@masked", "val-20")
    objective = DANN(Config())
    objective.setup(task, task.network(task.num_classes, "test"))
    assert objective.masked
    assert (objective.e < 0).any()


@pytest.mark.parametrize("grad_penalty", [0.0, 1.0])
def test_unannotated_images_reach_no_discriminator(grad_penalty: float) -> None:
    objective, data = made(norm=False, grad_penalty=grad_penalty)
    known = torch.tensor([1, 2, 3, 6, 7, 8, 9])
    alone = objective.discriminator_loss(Batch(data.x[known], data.y[known], known)).item()
    forget(objective, [0, 4, 5])
    assert objective.discriminator_loss(data).item() == pytest.approx(alone)
    cross_entropy = F.cross_entropy(objective.model(data.x), data.y).item()
    assert objective.loss(data).item() == pytest.approx(cross_entropy - alone)


def test_a_batch_without_annotated_images_works() -> None:
    objective, data = made()
    forget(objective, list(range(10)))
    optimizers = objective.optimizers(SGD)
    before = {name: weights(network) for name, network in objective.networks().items()}
    assert objective.step(data, optimizers).item() > 0  # the classes' cross-entropy
    assert objective.step(data, optimizers).item() == 0
    assert same(before["discriminator"], weights(objective.discriminator))
    assert not same(before["model"], weights(objective.model))


@pytest.mark.parametrize("impl", ["alternating", "grl"])
def test_it_runs_where_few_images_have_attributes(impl: str) -> None:
    assert run_tiny("dann@masked", "val-20", dann__impl=impl).labels.n_train_a == 0


# -------------------------------------------------------------------------------------------------------- both at once


def slopes(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter, zero where the loss does not depend on it."""
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(value) if slope is None else slope
        for (name, value), slope in zip(parameters.items(), found, strict=True)
    }


def test_reversal_changes_no_bit_and_turns_the_gradient() -> None:
    x = torch.tensor([1e-30, -3.7, 1e30, 0.0, 1 / 3], requires_grad=True)
    assert torch.equal(reverse(x, 0.7), x)
    (slope,) = torch.autograd.grad((reverse(x, 0.7) * torch.arange(5.0)).sum(), x)
    torch.testing.assert_close(slope, -0.7 * torch.arange(5.0))


@pytest.mark.parametrize("grad_penalty", [0.0, 2.0])
def test_reversed_gradient(grad_penalty: float) -> None:
    """The classifier gets -lambda times the gradient of what the discriminator minimises, which has the plain one."""
    objective, data = made(norm=False, impl="grl", weight=0.3, grad_penalty=grad_penalty)
    features = objective.model.features(data.x)
    cross_entropy = F.cross_entropy(objective.model(data.x), data.y)
    adversary = objective.confusion(features, objective.model.head(features), data)
    loss = objective.loss(data)
    assert loss.item() == pytest.approx((cross_entropy + adversary).item())
    of_classes, ordinary = slopes(cross_entropy, objective.model), slopes(adversary, objective.model)
    assert ordinary["trunk.0.weight"].abs().max() > 1e-4
    for name, found in slopes(loss, objective.model).items():
        torch.testing.assert_close(found, of_classes[name] - 0.3 * ordinary[name], rtol=1e-4, atol=1e-7)
    expected = slopes(adversary, objective.discriminator)
    for name, found in slopes(loss, objective.discriminator).items():
        torch.testing.assert_close(found, expected[name])


def test_both_forms_move_the_classifier_alike() -> None:
    """A classifier's turn and a reversed step have the same gradient in it."""
    turns, data = made(norm=False, weight=0.7)
    at_once, _ = made(norm=False, weight=0.7, impl="grl")
    a, b = (slopes(objective.loss(data), objective.model) for objective in (turns, at_once))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name])


def test_reversed_with_weight_zero_the_step_is_erms() -> None:
    objective, data = made(weight=0.0, impl="grl")
    erm: Objective[None] = Objective(None)
    erm.setup(toy_task(SIZES), net())
    untrained = state_of(objective.discriminator)
    for method in (objective, erm):
        optimizers = method.optimizers(SGD)
        for _ in range(3):
            method.step(data, optimizers)
    assert same(state_of(objective.model), state_of(erm.model))
    assert not same(untrained, state_of(objective.discriminator))  # which learns all the same


def test_in_a_reversed_step_both_move() -> None:
    objective, data = made(impl="grl", disc_steps=4)
    optimizers = objective.optimizers(SGD)
    for _ in range(2):
        before = {name: weights(network) for name, network in objective.networks().items()}
        objective.step(data, optimizers)
        assert not any(same(before[name], weights(network)) for name, network in objective.networks().items())


# ----------------------------------------------------------------------------------------------------------- the ramp


def test_values_of_the_ramp() -> None:
    assert ramp(0.0) == 0.0
    assert ramp(0.1) == pytest.approx(math.tanh(0.5))
    assert ramp(1.0) == ramp(7.0) == pytest.approx(0.99990920426)


@pytest.mark.parametrize("impl", ["alternating", "grl"])
def test_lambda_grows_over_the_training(impl: str) -> None:
    """3 epochs of 3 batches: 10 images in fours."""
    objective, data = made(impl=impl, weight=2.0, ramp=True)
    recipe = replace(SGD, epochs=3)
    objective.make_sampler(toy_task(SIZES), recipe)
    assert objective.horizon == 9
    optimizers, seen = objective.optimizers(recipe), []
    for _ in range(4):
        seen.append(objective.strength())
        objective.step(data, optimizers)
    assert seen == [2 * ramp(step / 9) for step in range(4)]
    other, _ = made(impl=impl, weight=2.0, ramp=True)
    other.load_state_dict(objective.state_dict())
    other.make_sampler(toy_task(SIZES), recipe)
    assert other.strength() == objective.strength() == 2 * ramp(4 / 9)


def test_lambda_grows_over_as_many_steps_as_asked() -> None:
    objective, _ = made(ramp=True, ramp_steps=50)
    objective.make_sampler(toy_task(SIZES), SGD)
    objective.steps = 20
    assert objective.strength() == ramp(0.4)


def test_without_a_ramp_lambda_is_constant() -> None:
    assert made(weight=0.4)[0].strength() == made(weight=0.4, impl="grl")[0].strength() == 0.4


# -------------------------------------------------------------------------------------------------------------- batches


def environments(task: Task, recipe: Recipe, unknown: int = 0) -> list[list[int]]:
    """How many images of each environment the batches of an epoch hold."""
    objective = DANN(Config())
    objective.setup(task, net())
    e = objective.e.clone()
    objective.e[:unknown], objective.masked = -1, bool(unknown)
    batches = objective.make_sampler(task, recipe)(torch.Generator().manual_seed(0))
    assert sum(map(len, batches)) == task.size("train")
    return [e[index].bincount(minlength=2).tolist() for index in batches]


def test_batches_hold_equally_many_images_of_each_environment() -> None:
    task = toy_task((90, 4, 20, 6))
    assert environments(task, Recipe(batch_size=12)) == [[6, 6]] * 10
    uneven = np.array(environments(task, Recipe(batch_size=15)))
    assert uneven.sum(1).tolist() == [15] * 8
    assert uneven.sum(0).tolist() == [60, 60]


def test_batches_are_balanced_by_class_where_environments_are_unknown() -> None:
    task = toy_task((90, 10, 10, 90))
    drawn = np.sum(environments(task, Recipe(batch_size=20), unknown=50), axis=0)
    assert drawn.sum() == 200
    assert drawn.tolist() == pytest.approx([100, 100], abs=30)


# ----------------------------------------------------------------------------------------------------------------- cost


def test_half_of_the_passes_train_the_classifier() -> None:
    record = run_tiny("dann")
    assert record.cost is not None
    images, epochs, batch_size = 96, 2, 16
    cost = record.cost.scratch
    assert cost.n_fwd == cost.n_fwd_nograd == cost.n_bwd == images * epochs // 2
    assert cost.n_updates == images * epochs // batch_size // 2


def test_reversed_all_of_them_do() -> None:
    record = run_tiny("dann", dann__impl="grl", dann__ramp="true")
    assert record.cost is not None
    cost = record.cost.scratch
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == (192, 192, 0, 12)


def test_a_gradient_penalty_costs_no_pass_through_the_trunk(tmp_path: Path) -> None:
    recipe = Recipe(batch_size=4, epochs=2)
    cost = train(DANN(Config(grad_penalty=1.0, disc_steps=3)), toy_task((4, 4, 4, 4)), net(), recipe, tmp_path)
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == (8, 8, 24, 2)


# ------------------------------------------------------------------------------------------------------- discriminator


def test_layers_of_the_discriminator() -> None:
    made = mlp(6, 4, Config(width=16, depth=4, dropout=0.2))
    assert [tuple(layer.weight.shape) for layer in made if isinstance(layer, nn.Linear)] == [
        (16, 6),
        (16, 16),
        (16, 16),
        (4, 16),
    ]
    assert [type(layer).__name__ for layer in made] == ["Linear", "Dropout", "ReLU"] * 3 + ["Linear"]
    assert {layer.p for layer in made if isinstance(layer, nn.Dropout)} == {0.2}


def test_optimisers_are_the_recipes_and_adam() -> None:
    objective, _ = made(disc_weight_decay=0.2, beta1=0.0)
    optimizers = objective.optimizers(SGD)
    assert isinstance(optimizers["model"], torch.optim.SGD)
    assert optimizers["model"].defaults["lr"] == 0.1
    (group,) = optimizers["discriminator"].param_groups
    assert isinstance(optimizers["discriminator"], torch.optim.Adam)
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.0, 0.9), 0.2)
    assert made(disc_lr=0.03)[0].optimizers(SGD)["discriminator"].defaults["lr"] == 0.03


def test_the_first_discriminator_is_the_same_in_every_run_and_disturbs_no_draw() -> None:
    torch.manual_seed(3)
    first, _ = made()
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    second, _ = made(weight=7.0)
    assert same(state_of(first.discriminator), state_of(second.discriminator))
    other = DANN(Config())
    other.setup(toy_task(SIZES, seed=1), net())
    assert not same(state_of(first.discriminator), state_of(other.discriminator))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"weight": -1.0}, "dann.weight must be at least 0, got -1.0"),
        ({"grad_penalty": -1.0}, "dann.grad_penalty must be at least 0"),
        ({"disc_weight_decay": -1.0}, "dann.disc_weight_decay must be at least 0"),
        ({"disc_steps": 0}, "dann.disc_steps must be at least 1, got 0"),
        ({"width": 0}, "dann.width must be at least 1"),
        ({"ramp_steps": -1}, "dann.ramp_steps must be at least 0, got -1"),
        ({"disc_lr": 0.0}, "dann.disc_lr must be positive, got 0.0"),
        ({"depth": 1}, "dann.depth must be at least 2, got 1"),
        ({"beta1": 1.0}, r"dann.beta1 must be in \[0, 1\), got 1.0"),
        ({"dropout": 1.0}, r"dann.dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("dann", **{f"dann__{key}": str(value)})
