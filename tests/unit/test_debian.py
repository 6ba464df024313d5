"""DebiAN: a discoverer splits classes unfairly, and the classifier learns more from the side that it serves worse."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plan_tiny
from torch import Tensor, nn
from torch.nn import functional as F
from toys import batch, net, run_tiny, same, state_of, toy_task, train
from worstgroup.benchmark.data import Batch, random_order
from worstgroup.benchmark.engine import Objective, make_optimizer
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods.blocks.environments import membership
from worstgroup.methods.debian import Config, DebiAN, fair_weights, halved, side_means, true_class, unfairness_loss

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)
SGD = Recipe(optimizer="sgd", lr=0.1)
ONE = torch.ones(1, 2, dtype=torch.bool)
"""Two images of one class."""


def made(norm: bool = True, classes: int = 2, **config: Any) -> tuple[DebiAN, Batch]:
    """The objective on toy networks, and a batch of all images."""
    sizes = SIZES if classes == 2 else (2,) * classes**2
    task = toy_task(sizes, classes=classes, norm=norm)
    objective = DebiAN(Config(**config))
    objective.setup(task, net(classes=classes, norm=norm))
    return objective, batch(task)


def undecided(objective: DebiAN) -> DebiAN:
    """With a discoverer whose shares are 1/2."""
    nn.init.zeros_(objective.discoverer.head.weight)
    nn.init.zeros_(objective.discoverer.head.bias)
    return objective


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


# ---------------------------------------------------------------------------------------------------- discoverer's loss


def test_losses_of_the_papers_formula() -> None:
    b, p = torch.tensor([1.0, 0.0]), torch.tensor([0.9, 0.3])
    assert unfairness_loss(b, p, ONE, 0.0).item() == pytest.approx(-math.log(0.6), abs=1e-5)  # 0.5108
    assert unfairness_loss(b, p, ONE, 1.0).item() == pytest.approx(-math.log(0.6), abs=1e-5)  # the sides are equal


def test_one_side_for_all_costs_most() -> None:
    b, p = torch.ones(2), torch.tensor([0.9, 0.3])
    level = unfairness_loss(b, p, ONE, 1.0) - unfairness_loss(b, p, ONE, 0.0)
    assert level.item() == pytest.approx(-math.log(1e-6), rel=1e-6)


def test_undecided_shares_have_equal_means() -> None:
    b, p = torch.full((2,), 0.5), torch.tensor([0.9, 0.3])
    plus, minus = side_means(b, p, ONE)
    assert plus.item() == minus.item() == pytest.approx(0.6, abs=1e-5)
    assert unfairness_loss(b, p, ONE, 0.0).item() == pytest.approx(-math.log(1e-6), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_classes_are_summed_and_missing_ones_left_out(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    b, p = torch.rand(12, generator=generator), torch.rand(12, generator=generator)
    y, expected = torch.arange(12) % classes, 0.0
    for label in range(classes):
        own, other = b[y == label], 1 - b[y == label]
        plus, minus = ((part * p[y == label]).sum() / (part.sum() + 1e-6) for part in (own, other))
        expected -= math.log(1e-6 + abs(plus - minus))
        expected -= 0.3 * math.log(1e-6 + 1 - abs(own.mean() - other.mean()))
    assert unfairness_loss(b, p, membership(y, classes + 2), 0.3).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_extreme_shares_and_missing_classes_give_finite_gradients(share: float) -> None:
    b = torch.full((4,), share, requires_grad=True)
    loss = unfairness_loss(b, torch.tensor([0.0, 1.0, 0.5, 0.5]), membership(torch.tensor([0, 0, 2, 2]), 4), 1.0)
    (slope,) = torch.autograd.grad(loss, b)
    assert loss.isfinite()
    assert slope.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- the weights


def test_the_worse_side_weighs_more() -> None:
    p, member = torch.tensor([0.9, 0.3, 0.2, 0.8]), membership(torch.tensor([0, 0, 1, 1]), 2)
    assert fair_weights(torch.tensor([1.0, 0.0, 1.0, 0.0]), p, member).tolist() == [1, 2, 2, 1]
    soft = fair_weights(torch.tensor([0.7, 0.2, 0.7, 0.2]), p, member)
    assert soft.tolist() == pytest.approx([1.3, 1.8, 1.7, 1.2])


def test_which_side_is_called_plus_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    b, p = torch.rand(9, generator=generator), torch.rand(9, generator=generator)
    member = membership(torch.arange(9) % 3, 3)
    found = fair_weights(b, p, member)
    torch.testing.assert_close(found, fair_weights(1 - b, p, member))
    assert ((found >= 1) & (found <= 2)).all()


def test_shares_are_not_changed_in_place() -> None:
    b = torch.tensor([0.7, 0.2])
    fair_weights(b, torch.tensor([0.9, 0.3]), ONE)
    assert b.tolist() == pytest.approx([0.7, 0.2])


@pytest.mark.parametrize("classes", [2, 3])
def test_undecided_it_is_erm_at_one_and_a_half_times_the_loss(classes: int) -> None:
    """Step for step (spec: test 25.9)."""
    objective, data = made(classes=classes)
    erm = net(classes=classes)
    half = halved(data)[0]
    optimizers, plain = objective.optimizers(SGD), make_optimizer(erm.parameters(), SGD)
    optimizers["discoverer"] = torch.optim.SGD(objective.discoverer.parameters(), lr=0.0)
    undecided(objective)
    for _ in range(3):
        loss = 1.5 * F.cross_entropy(erm(half.x), half.y)
        plain.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        plain.step()
        assert objective.step(data, optimizers).item() == pytest.approx(loss.item(), rel=1e-5)
    for name, value in state_of(objective.model).items():
        torch.testing.assert_close(value, state_of(erm)[name])


# ---------------------------------------------------------------------------------------------------------- the players


@pytest.mark.parametrize(("classes", "outputs"), [(2, 1), (3, 3)])
def test_outputs_of_the_discoverer(classes: int, outputs: int) -> None:
    objective, data = made(classes=classes, norm=False)
    assert objective.discoverer.num_classes == outputs
    logits = objective.discoverer(data.x)
    own = logits[:, 0] if outputs == 1 else logits.gather(1, data.y[:, None])[:, 0]
    torch.testing.assert_close(objective.sides(data), own.sigmoid())


@pytest.mark.parametrize("classes", [2, 3])
def test_each_loss_teaches_its_own_network(classes: int) -> None:
    objective, data = made(classes=classes, norm=False)
    for loss, learner, other in (
        (objective.loss(data), objective.model, objective.discoverer),
        (objective.discoverer_loss(data), objective.discoverer, objective.model),
    ):
        found = torch.autograd.grad(loss, [*learner.parameters(), *other.parameters()], allow_unused=True)
        mine = len(list(learner.parameters()))
        assert all(value is not None for value in found[:mine])
        assert all(value is None for value in found[mine:])


def test_the_classifiers_weights_carry_no_gradient() -> None:
    objective, data = made(norm=False)
    logits = objective.model(data.x)
    member = membership(data.y, 2)
    fixed = fair_weights(objective.sides(data), true_class(logits, data.y), member).detach()
    expected = (fixed * F.cross_entropy(logits, data.y, reduction="none")).mean()
    loss, head = objective.loss(data), objective.model.head.weight
    assert loss.item() == pytest.approx(expected.item())
    torch.testing.assert_close(torch.autograd.grad(loss, head), torch.autograd.grad(expected, head))


def test_a_step_moves_both_each_on_its_batch_and_the_other_is_evaluated() -> None:
    objective, data = made()
    optimizers = objective.optimizers(SGD)
    for number in (1, 2):
        before = {name: weights(network) for name, network in objective.networks().items()}
        objective.step(data, optimizers)
        for name, network in objective.networks().items():
            assert not same(before[name], weights(network))
            assert state_of(network)["trunk.1.num_batches_tracked"] == number  # its own batch only


def test_the_discoverer_judges_the_classifier_that_has_just_moved() -> None:
    objective, data = made(norm=False)
    twin, _ = made(norm=False)
    objective.step(data, objective.optimizers(SGD))
    first, second = halved(data)
    optimizers = twin.optimizers(SGD)
    for name, loss in (("model", lambda: twin.loss(first)), ("discoverer", lambda: twin.discoverer_loss(second))):
        optimizers[name].zero_grad()
        loss().backward()
        optimizers[name].step()
    for name, network in twin.networks().items():
        assert same(state_of(network), state_of(objective.networks()[name]))


def test_the_discoverer_learns_to_be_unfair() -> None:
    objective, data = made(norm=False)
    optimizers = objective.optimizers(Recipe(optimizer="sgd", lr=1e-3))
    optimizers["model"] = torch.optim.SGD(objective.model.parameters(), lr=0.0)
    second = halved(data)[1]
    for _ in range(10):
        before = objective.discoverer_loss(second).item()
        objective.step(data, optimizers)
        assert objective.discoverer_loss(second).item() < before


# ---------------------------------------------------------------------------------------------------------- the batches


@pytest.mark.parametrize("batch_size", [3, 4, 5, 10, 16])
def test_two_orders_with_the_batches_of_erm(batch_size: int) -> None:
    task, recipe = toy_task(SIZES), Recipe(batch_size=batch_size)
    batches = DebiAN(Config()).make_sampler(task, recipe)(torch.Generator().manual_seed(0))
    erm = random_order(10, recipe)(torch.Generator().manual_seed(0))
    orders = [torch.cat(parts) for parts in zip(*(index.chunk(2) for index in batches), strict=True)]
    assert torch.equal(orders[0], torch.cat(list(erm)))
    assert [len(index) for index in batches] == [2 * len(index) for index in erm]
    assert all(torch.equal(order.sort().values, torch.arange(10)) for order in orders)
    assert not torch.equal(*orders)


def test_the_classifier_takes_the_steps_of_erm_on_as_many_images() -> None:
    record = run_tiny("debian")
    assert record.cost is not None
    assert record.labels is not None
    images, epochs, batch_size = 96, 2, 16
    cost = record.cost.scratch
    assert cost.n_fwd == cost.n_bwd == cost.n_fwd_nograd == 2 * images * epochs  # each player: one to learn, one to see
    assert cost.n_updates == images * epochs // batch_size
    assert (record.labels.n_train_a, record.labels.n_val_a_fit, record.labels.n_y_extra) == (0, 0, 0)


def test_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for name, stops in (("straight", (3,)), ("halted", (1, 3))):
        (tmp_path / name).mkdir()
        for epochs in stops:
            objective: Objective[Any] = DebiAN(Config())
            train(objective, toy_task(SIZES), net(), Recipe(batch_size=4, epochs=epochs), tmp_path / name)
        ends.append([state_of(network) for network in objective.networks().values()])
    assert all(same(a, b) for a, b in zip(*ends, strict=True))


def test_bad_values_are_refused() -> None:
    with pytest.raises(UserError, match=r"debian\.balance must be at least 0, got -1"):
        Config(balance=-1.0)
    with pytest.raises(UserError, match=r"debian\.balance must be at least 0, got -1"):
        plan_tiny("debian", debian__balance="-1")


def test_what_is_searched() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {"balance": "{1,0.1,10}"}
