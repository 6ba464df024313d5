"""CDANN: DANN's players, of whom one knows the class."""

import math
from typing import Any

import pytest
import torch
from helpers import plan_tiny
from torch import Tensor, nn
from torch.nn import functional as F
from toys import batch, net, run_tiny, same, state_of, toy_task
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods import dann
from worstgroup.methods.cdann import CDANN, ClassDiscriminator, Config, class_balanced

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)
SGD = Recipe(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.01, batch_size=4)


def made(sizes: tuple[int, ...] = SIZES, *, classes: int = 2, norm: bool = False, **config: Any) -> tuple[CDANN, Batch]:
    """The objective on a toy network, and a batch of all images, which are independent without `norm`."""
    task = toy_task(sizes, classes=classes)
    objective = CDANN(Config(**config))
    objective.setup(task, net(classes=classes, norm=norm))
    return objective, batch(task)


def parts(objective: CDANN) -> ClassDiscriminator:
    """The discriminator, by its type."""
    assert isinstance(objective.discriminator, ClassDiscriminator)
    return objective.discriminator


# ------------------------------------------------------------------------------------------------------------- weights


def test_classes_weigh_the_same() -> None:
    assert class_balanced(torch.tensor([0, 0, 1]), 2).tolist() == [0.25, 0.25, 0.5]


@pytest.mark.parametrize(("y", "expected"), [([0, 0, 1], [1 / 6, 1 / 6, 1 / 3]), ([2], [1 / 3]), ([1, 1], [1 / 6] * 2)])
def test_a_class_that_is_missing_counts_too(y: list[int], expected: list[float]) -> None:
    assert class_balanced(torch.tensor(y), 3).tolist() == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("impl", ["alternating", "grl"])
@pytest.mark.parametrize("grad_penalty", [0.0, 0.5])
def test_the_loss_by_hand(impl: str, grad_penalty: float) -> None:
    objective, data = made(impl=impl, weight=0.3, grad_penalty=grad_penalty)
    discriminator = parts(objective)
    features = objective.model.features(data.x)
    inputs = features + torch.stack([discriminator.embedding.weight[y] for y in data.y])
    losses = F.cross_entropy(discriminator.mlp(inputs), objective.e, reduction="none")
    (slope,) = torch.autograd.grad(losses.sum(), inputs, retain_graph=True)
    adversary = (losses[data.y == 0].mean() + losses[data.y == 1].mean()) / 2
    adversary = adversary + grad_penalty * slope.square().sum(1).mean()
    cross_entropy = F.cross_entropy(objective.model(data.x), data.y)
    expected = cross_entropy + adversary if impl == "grl" else cross_entropy - 0.3 * adversary
    assert objective.loss(data).item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.discriminator_loss(data).item() == pytest.approx(adversary.item(), rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_constant_discriminator_confuses_nothing(classes: int) -> None:
    objective, data = made((1,) * classes**2, classes=classes, grad_penalty=1.0)
    for parameter in parts(objective).mlp[-1].parameters():  # type: ignore[index]
        nn.init.zeros_(parameter)
    features = objective.model.features(data.x)
    adversary = objective.confusion(features, objective.model.head(features), data)
    assert adversary.item() == pytest.approx(math.log(classes))
    slopes = torch.autograd.grad(adversary, list(objective.model.trunk.parameters()))
    assert not any(slope.any() for slope in slopes)


def test_reversed_gradient() -> None:
    objective, data = made(impl="grl", weight=0.3)
    trunk = list(objective.model.trunk.parameters())
    features = objective.model.features(data.x)
    ordinary = torch.autograd.grad(objective.confusion(features, objective.model.head(features), data), trunk)
    of_classes = torch.autograd.grad(F.cross_entropy(objective.model(data.x), data.y), trunk)
    found = torch.autograd.grad(objective.loss(data), trunk)
    assert ordinary[0].abs().max() > 1e-4
    for slope, plain, other in zip(found, of_classes, ordinary, strict=True):
        torch.testing.assert_close(slope, plain - 0.3 * other)


@pytest.mark.parametrize("impl", ["alternating", "grl"])
def test_with_weight_zero_the_classifiers_step_is_erms(impl: str) -> None:
    objective, data = made(norm=True, impl=impl, weight=0.0)
    erm: Objective[None] = Objective(None)
    erm.setup(toy_task(SIZES), net())
    for method in (objective, erm):
        method.step(data, method.optimizers(SGD))
    assert same(state_of(objective.model), state_of(erm.model))


@pytest.mark.parametrize("impl", ["alternating", "grl"])
def test_that_knows_nothing_of_the_class_and_sees_balanced_ones_it_is_dann(impl: str) -> None:
    objective, data = made((2, 3, 4, 1), impl=impl)
    other = dann.DANN(dann.Config(impl=impl))  # type: ignore[arg-type]
    other.setup(toy_task((2, 3, 4, 1)), objective.model)
    nn.init.zeros_(parts(objective).embedding.weight)
    parts(objective).mlp.load_state_dict(other.discriminator.state_dict())
    assert objective.loss(data).item() == pytest.approx(other.loss(data).item())
    assert objective.discriminator_loss(data).item() == pytest.approx(other.discriminator_loss(data).item())


def test_a_batch_without_a_class() -> None:
    objective, data = made((2, 2, 1, 0, 0, 0, 1, 1, 2), classes=3, grad_penalty=1.0)
    some = torch.arange(5)
    data = Batch(data.x[some], data.y[some], some)
    assert data.y.tolist() == [0] * 5
    optimizers = objective.optimizers(SGD)
    for _ in range(4):
        assert objective.step(data, optimizers).isfinite()
    for network in objective.networks().values():
        assert all(value.isfinite().all() for value in state_of(network).values())


# ---------------------------------------------------------------------------------------------------------- the players


def moved(objective: CDANN, data: Batch, optimizers: dict[str, Any]) -> set[str]:
    """Names of the parameters that a step changes."""
    networks = nn.ModuleDict(objective.networks())
    before = {name: value.detach().clone() for name, value in networks.named_parameters()}
    objective.step(data, optimizers)
    return {name for name, value in networks.named_parameters() if not torch.equal(value, before[name])}


def test_the_embedding_is_the_discriminators() -> None:
    objective, data = made()
    optimizers = objective.optimizers(SGD)
    first, second = (moved(objective, data, optimizers) for _ in range(2))
    assert {name.split(".")[0] for name in first} == {"model"}
    assert "discriminator.embedding.weight" in second
    assert {name.split(".")[0] for name in second} == {"discriminator"}
    assert isinstance(optimizers["discriminator"], torch.optim.Adam)


def test_it_is_the_true_class_that_is_embedded() -> None:
    objective, data = made()
    other = Batch(data.x, 1 - data.y, data.index)

    def judged(data: Batch) -> Tensor:
        features = objective.model.features(data.x)
        return objective.judge(features, objective.model.head(features), data.y)

    assert not torch.allclose(judged(data), judged(other))
    nn.init.normal_(objective.model.head.weight)
    torch.testing.assert_close(judged(data), parts(objective)(objective.model.features(data.x), data.y))


def test_unannotated_images_do_not_count() -> None:
    objective, data = made(grad_penalty=1.0)
    known = torch.tensor([1, 2, 3, 6, 7, 8, 9])
    alone = objective.discriminator_loss(Batch(data.x[known], data.y[known], known)).item()
    objective.e[[0, 4, 5]] = -1
    objective.masked = True
    assert objective.discriminator_loss(data).item() == pytest.approx(alone)


@pytest.mark.parametrize("impl", ["alternating", "grl"])
def test_it_runs_where_few_images_have_attributes(impl: str) -> None:
    assert run_tiny("cdann@masked", "val-20", cdann__impl=impl).labels.n_train_a == 0


def test_cost() -> None:
    """96 images, 2 epochs, in sixteens: half of the steps are the classifier's, or all of them."""
    for impl, passes in {"alternating": (96, 96, 96, 6), "grl": (192, 192, 0, 12)}.items():
        record = run_tiny("cdann", cdann__impl=impl)
        assert record.cost is not None
        cost = record.cost.scratch
        assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == passes


def test_bad_values_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"cdann\.disc_steps must be at least 1, got 0"):
        plan_tiny("cdann", cdann__disc_steps="0")
    with pytest.raises(UserError, match=r"cdann\.impl"):
        plan_tiny("cdann", cdann__impl="both")
