"""LfF: who is hard for the biased network relative to the other one, is what the other one learns from."""

import math
from dataclasses import replace
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
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods.lff import Config, LfF, gce, relative_difficulty, remembered

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)


def made(**config: Any) -> tuple[LfF, Batch]:
    """The objective on toy networks without BatchNorm, and a batch of all ten images."""
    task = toy_task(SIZES, budget="select", norm=False)
    objective = LfF(Config(**config))
    objective.setup(task, net(norm=False))
    return objective, batch(task)


def part(data: Batch, *index: int) -> Batch:
    """Some images of a batch of all."""
    rows = torch.tensor(index)
    return Batch(data.x[rows], data.y[rows], data.index[rows])


def cross_entropies(objective: LfF, data: Batch) -> Tensor:
    """Losses (2, B) of the biased and the debiased network."""
    with torch.no_grad():
        return torch.stack(
            [
                F.cross_entropy(network(data.x), data.y, reduction="none")
                for network in (objective.biased, objective.model)
            ]
        )


# ------------------------------------------------------------------------------------- generalised cross-entropy


@pytest.mark.parametrize("q", [0.05, 0.7, 1.0])
def test_gce_and_its_gradient(q: float) -> None:
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    y = torch.arange(6) % 3
    p = z.softmax(1).gather(1, y[:, None])[:, 0].detach()
    torch.testing.assert_close(gce(z, y, q), (1 - p**q) / q)
    (found,) = torch.autograd.grad(gce(z, y, q).sum(), z)
    (of_ce,) = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), z)
    torch.testing.assert_close(found, (p**q)[:, None] * of_ce)


def test_gce_goes_to_the_cross_entropy() -> None:
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 4
    torch.testing.assert_close(gce(z, y, 1e-6), F.cross_entropy(z, y, reduction="none"), rtol=1e-5, atol=1e-6)


def test_gce_at_q_one_is_the_chance_of_an_error() -> None:
    assert gce(torch.tensor([[math.log(3), 0.0]]), torch.tensor([0]), 1.0).item() == pytest.approx(0.25)


@pytest.mark.parametrize(("margin", "value"), [(1e4, 0.0), (100.0, 0.0), (-100.0, 1 / 0.7), (-1e4, 1 / 0.7)])
def test_gce_is_finite_for_sure_and_for_impossible_labels(margin: float, value: float) -> None:
    z = torch.tensor([[margin, 0.0]], requires_grad=True)
    loss = gce(z, torch.tensor([0]), 0.7)
    (slope,) = torch.autograd.grad(loss.sum(), z)
    assert loss.item() == pytest.approx(value, abs=1e-7)
    assert slope.abs().max() < 1e-20


# -------------------------------------------------------------------------------------------------------------- memory


def test_the_first_loss_is_taken_whole_and_later_ones_by_part() -> None:
    memory = remembered(torch.full((2, 3), -1.0), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 0.7)
    assert memory.tolist() == [[1, 2, 3], [4, 5, 6]]
    memory = remembered(memory, torch.tensor([[0.0, 2.0, 13.0], [4.0, 0.0, 0.0]]), 0.7)
    assert memory.flatten().tolist() == pytest.approx([0.7, 2, 6, 4, 3.5, 4.2])


def test_a_loss_of_zero_is_remembered() -> None:
    """A confident network makes it in float32; the next loss is then not the first."""
    seen = remembered(torch.full((2, 1), -1.0), torch.zeros(2, 1), 0.7)
    assert remembered(seen, torch.full((2, 1), 5.0), 0.7).flatten().tolist() == pytest.approx([1.5, 1.5])


@pytest.mark.parametrize("ema", [0.0, 0.7, 0.99])
def test_constant_losses_are_remembered_as_they_are(ema: float) -> None:
    losses = torch.tensor([[0.3, 2.0], [1.5, 0.01]])
    memory = torch.full((2, 2), -1.0)
    for _ in range(20):
        memory = remembered(memory, losses, ema)
    torch.testing.assert_close(memory, losses)


def test_a_loss_is_remembered_by_network_and_image() -> None:
    objective, data = made(ema=0.6)
    seen = part(data, 7, 0, 2)
    losses = cross_entropies(objective, seen)
    objective.loss(seen)
    assert torch.equal(objective.memory[:, [7, 0, 2]], losses)
    assert (objective.memory[:, [1, 3, 4, 5, 6, 8, 9]] == -1).all()
    again = part(data, 2, 3)
    objective.loss(replace(again, x=2 * again.x))
    later = cross_entropies(objective, replace(again, x=2 * again.x))
    torch.testing.assert_close(objective.memory[:, 2], 0.6 * losses[:, 2] + 0.4 * later[:, 0])
    assert torch.equal(objective.memory[:, 3], later[:, 1])
    assert not objective.memory.requires_grad


def test_memory_survives_a_restart() -> None:
    first, data = made()
    optimizers = first.optimizers(Recipe(lr=0.01))
    first.step(part(data, 0, 3, 7), optimizers)
    second, _ = made()
    for name, network in second.networks().items():
        network.load_state_dict(first.networks()[name].state_dict())
    assert second.loss(part(data, 3, 7, 8)).item() != first.loss(part(data, 3, 7, 8)).item()
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert second.loss(part(data, 1, 3, 7)).item() == first.loss(part(data, 1, 3, 7)).item()
    assert torch.equal(second.memory, first.memory)


# ------------------------------------------------------------------------------------------------------------- weights


def test_weights_of_the_papers_formula() -> None:
    """Class 0: B (0.2, 2.0) over 2.0, D (0.4, 0.5) over 0.5."""
    memory = torch.tensor([[0.2, 2.0, 7.0], [0.4, 0.5, 9.0]])
    weights = relative_difficulty(memory, torch.tensor([0, 0, 1]), torch.tensor([0, 1]), 2)
    assert weights.tolist() == pytest.approx([1 / 9, 0.5], abs=1e-6)


def test_the_largest_loss_of_a_class_is_over_all_its_images() -> None:
    """Also of those that are not in the batch; other classes and unseen images (0) do not matter."""
    y = torch.tensor([0, 0, 1, 0, 1])
    memory = torch.tensor([[1.0, 4.0, 90.0, 0.0, 3.0], [1.0, 2.0, 80.0, 0.0, 5.0]])
    (weight,) = relative_difficulty(memory, y, torch.tensor([0]), 2).tolist()
    assert weight == pytest.approx((1 / 4) / (1 / 4 + 1 / 2))
    memory[0, 1] = 1.0  # it follows the present memory, and is no running maximum
    assert relative_difficulty(memory, y, torch.tensor([0]), 2).item() == pytest.approx(1 / (1 + 1 / 2))


def test_equal_networks_give_every_image_half_the_weight() -> None:
    objective, data = made()
    objective.biased.load_state_dict(objective.model.state_dict())
    losses = cross_entropies(objective, data)
    loss = objective.loss(data)
    assert relative_difficulty(
        objective.memory, objective.y, data.index, objective.model.num_classes
    ).tolist() == pytest.approx([0.5] * 10)
    expected = gce(objective.biased(data.x), data.y, 0.7).mean() + losses[1].mean() / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_are_finite_where_both_networks_are_perfect() -> None:
    weights = relative_difficulty(torch.zeros(2, 4), torch.tensor([0, 0, 1, 1]), torch.arange(4), 2)
    assert weights.tolist() == [0] * 4


@pytest.mark.parametrize("classes", [2, 3])
def test_each_network_has_its_own_gradients(classes: int) -> None:
    """The biased one those of GCE alone, the debiased one those of constant weights."""
    task = toy_task((2,) * classes**2, classes=classes, budget="select", norm=False)
    objective = LfF(Config())
    objective.setup(task, net(classes=classes, norm=False))
    data = batch(task)
    assert objective.biased.num_classes == classes
    assert not same(state_of(objective.biased), state_of(objective.model))
    networks = (objective.biased, objective.model)
    loss = objective.loss(data)
    found = [torch.autograd.grad(loss, list(network.parameters()), retain_graph=True) for network in networks]
    weights = relative_difficulty(objective.memory, objective.y, data.index, objective.model.num_classes)
    expected = (
        gce(objective.biased(data.x), data.y, 0.7).mean(),
        (weights * F.cross_entropy(objective.model(data.x), data.y, reduction="none")).mean(),
    )
    assert loss.item() == pytest.approx(sum(value.item() for value in expected))
    for value, network, slopes in zip(expected, networks, found, strict=True):
        torch.testing.assert_close(slopes, torch.autograd.grad(value, list(network.parameters())))


# --------------------------------------------------------------------------------------------------------------- whole


def test_it_passes_every_image_twice_and_reads_no_attribute() -> None:
    record = run_tiny("lff")
    assert record.cost is not None
    assert record.labels is not None
    images, epochs, batch_size = 96, 2, 16
    cost = record.cost.scratch
    assert cost.n_fwd == cost.n_bwd == 2 * images * epochs
    assert (cost.n_fwd_nograd, cost.n_updates) == (0, images * epochs // batch_size)
    assert record.labels.n_train_a == 0


def test_an_epoch_visits_every_image(tmp_path: Path) -> None:
    objective = LfF(Config())
    train(objective, toy_task((5, 5, 4, 3), budget="select"), net(), Recipe(batch_size=4, epochs=1), tmp_path)
    assert (objective.memory > 0).all()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"q": 0.0}, r"lff.q must be in \(0, 1\], got 0.0"),
        ({"q": 1.5}, r"lff.q must be in \(0, 1\], got 1.5"),
        ({"ema": 1.0}, r"lff.ema must be in \[0, 1\), got 1.0"),
        ({"ema": -0.1}, r"lff.ema must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_values_are_refused(config: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("lff", **{f"lff__{key}": str(value)})
