"""Barlow Twins: its loss, its two views, and the network that all runs of a block share."""

import math
from typing import Any

import pytest
import torch
from stubs import ledger, tiny_task
from torch import Tensor
from torchvision.transforms.v2 import functional as reference
from toys import images, net, same, state_of, toy_task
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Task
from worstgroup.methods.blocks import views
from worstgroup.methods.blocks.barlow_twins import BarlowTwins, barlow_twins, projector, redundancy

pytestmark = pytest.mark.usefixtures("tiny")
WEIGHT = 0.0051


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A projector that trains in a blink."""
    monkeypatch.setattr("worstgroup.methods.blocks.barlow_twins.WIDTH", 32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(n: int = 64, d: int = 8) -> Tensor:
    """Embeddings (n, d) whose dimensions do not correlate."""
    z = torch.randn(n, d + 1, generator=generator(), dtype=torch.float64)
    z[:, 0] = 1  # the others become orthogonal to it, so their mean is 0
    return torch.linalg.qr(z)[0][:, 1:] * n**0.5


def pictures(n: int = 6, channels: int = 3, side: int = 24) -> Tensor:
    return torch.rand(n, channels, side, side + 4, generator=generator())


def factor(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value)


# ------------------------------------------------------------------------------------------------------------ the loss


def test_equal_views_without_redundancy_lose_nothing() -> None:
    assert redundancy(embeddings(), embeddings(), WEIGHT).item() == pytest.approx(0, abs=1e-6)


def test_opposite_views_lose_four_a_dimension() -> None:
    assert redundancy(embeddings(), -embeddings(), WEIGHT).item() == pytest.approx(4 * 8, rel=1e-4)


def test_a_derangement_of_dimensions_loses_both_terms() -> None:
    z = embeddings()
    loss = redundancy(z, z.roll(3, 1), WEIGHT).item()
    assert loss == pytest.approx(8 + WEIGHT * 8, rel=1e-4)
    assert redundancy(z, z.roll(3, 1), 0.0).item() == pytest.approx(8, rel=1e-4)


def test_scale_and_shift_of_a_dimension_do_not_matter() -> None:
    z, other = (torch.randn(32, 5, generator=generator(seed)) for seed in (1, 2))
    scale, shift = torch.tensor([0.5, 2.0, 10.0, 1.0, 3.0]), torch.tensor([5.0, -1.0, 0.0, 2.0, 7.0])
    torch.testing.assert_close(redundancy(z * scale + shift, other, 0.1), redundancy(z, other, 0.1), rtol=1e-3, atol=0)


def test_the_loss_is_that_of_its_formula() -> None:
    z, other = (torch.randn(16, 4, generator=generator(seed), dtype=torch.float64) for seed in (1, 2))
    expected = 0.0
    for i in range(4):
        for j in range(4):
            c = torch.corrcoef(torch.stack([z[:, i], other[:, j]]))[0, 1].item()
            expected += (1 - c) ** 2 if i == j else 0.3 * c**2
    assert redundancy(z, other, 0.3).item() == pytest.approx(expected, rel=1e-4)


def test_a_dimension_that_does_not_vary_has_finite_gradients() -> None:
    z = torch.randn(8, 3, generator=generator())
    z[:, 1] = 2.0
    z.requires_grad_()
    (slope,) = torch.autograd.grad(redundancy(z, torch.ones(8, 3), WEIGHT), z)
    assert slope.isfinite().all()


def test_correlations_are_taken_in_float32_under_autocast() -> None:
    z, other = (torch.randn(32, 5, generator=generator(seed)) for seed in (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        inside = redundancy(z, other, WEIGHT)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, redundancy(z, other, WEIGHT))


def test_the_projector() -> None:
    layers = [type(layer).__name__ for layer in projector(6, 16)]
    assert layers == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    linear = [layer for layer in projector(6, 16) if isinstance(layer, torch.nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(16, 6), (16, 16), (16, 16)]
    assert all(layer.bias is None for layer in linear)


# ----------------------------------------------------------------------------------------------------------- the views


@pytest.mark.parametrize("value", [0.6, 1.0, 1.4])
def test_colour_changes_are_torchvisions(value: float) -> None:
    x = pictures()
    torch.testing.assert_close(views.brightened(x, factor(value)), reference.adjust_brightness(x, value))
    torch.testing.assert_close(views.contrasted(x, factor(value)), reference.adjust_contrast(x, value))
    torch.testing.assert_close(views.saturated(x, factor(value)), reference.adjust_saturation(x, value))
    torch.testing.assert_close(views.grey(x), reference.rgb_to_grayscale(x))


@pytest.mark.parametrize("turns", [-0.1, -0.02, 0.0, 0.1, 0.4])
def test_hue_is_torchvisions(turns: float) -> None:
    x = pictures()
    torch.testing.assert_close(views.turned(x, factor(turns)), reference.adjust_hue(x, turns), rtol=0, atol=1e-5)


def test_hue_of_grey_pixels_stays() -> None:
    x = torch.tensor([0.0, 0.3, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    torch.testing.assert_close(views.turned(x, factor(0.3)), x)


def test_each_image_has_a_factor_of_its_own() -> None:
    x, each = pictures(3), torch.tensor([0.7, 1.0, 1.3]).view(3, 1, 1, 1)
    for change in (views.brightened, views.contrasted, views.saturated, views.turned):
        alone = torch.cat([change(x[i : i + 1], each[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(change(x, each), alone)


@pytest.mark.parametrize("sigma", [0.05, 0.8, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    x = pictures()
    found = views.blur(x, torch.full((6,), sigma), reach=6)
    torch.testing.assert_close(found, reference.gaussian_blur(x, [13, 13], [sigma, sigma]), rtol=0, atol=1e-5)


def test_blur_is_in_proportion_to_the_image() -> None:
    small, large = pictures(4, side=14), pictures(4, side=224)
    changes = [(views.blurred(x, generator()) - x).abs().mean() for x in (small, large)]
    assert changes[0] < 0.05 < changes[1]


def test_solarised_values_are_inverted_from_128_on() -> None:
    x = torch.tensor([0, 127, 128, 255]) / 255
    assert (255 * views.solarised(x)).round().tolist() == [0, 127, 127, 0]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_two_views_of_any_channels(channels: int) -> None:
    x = pictures(40, channels)
    before = x.clone()
    found = views.two_views(generator())(x)
    assert found.shape == (40, 2, channels, 24, 28)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6
    assert torch.equal(x, before)
    assert not torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found, views.two_views(generator())(x))
    assert not torch.equal(found, views.two_views(generator(1))(x))


def test_as_many_images_are_changed_as_the_chance_says() -> None:
    x = torch.zeros(4000, 1, 1, 1)
    for chance in (0.0, 0.2, 1.0):
        changed = views.some(x, chance, lambda chosen: chosen + 1, generator()).mean().item()
        assert changed == pytest.approx(chance, abs=0.03)


def test_views_keep_their_colours_apart_from_what_jitter_may_do() -> None:
    """In two of ten views nothing is left of the colours."""
    found = views.two_views(generator())(pictures(400, side=8)).flatten(0, 1)
    without_colour = (found.amax(1) - found.amin(1)).amax((1, 2)) < 1e-5
    assert without_colour.float().mean().item() == pytest.approx(0.2, abs=0.04)


# -------------------------------------------------------------------------------------------------------- the training


def made() -> tuple[BarlowTwins, Batch]:
    objective = BarlowTwins(None)
    objective.setup(toy_task((3, 2, 1, 4)), net())
    x = torch.stack([images(10), images(10, seed=2)], 1)
    return objective, Batch(x, torch.zeros(10, dtype=torch.long), torch.arange(10))


def test_the_views_pass_one_after_the_other() -> None:
    objective, data = made()
    loss = objective.loss(data)
    model, head = net(), objective.projector
    first, second = (head(model.features(data.x[:, i])) for i in (0, 1))
    torch.testing.assert_close(loss, redundancy(first, second, WEIGHT))


def test_the_head_does_not_learn_and_all_else_does() -> None:
    objective, data = made()
    objective.loss(data).backward()  # type: ignore[no-untyped-call]
    names = {name for name, value in objective.model.named_parameters() if value.grad is None}
    assert names == {"head.weight", "head.bias"}
    assert all(value.grad is not None for value in objective.projector.parameters())


def test_the_rate_rises_for_ten_epochs_and_stays() -> None:
    objective, recipe = BarlowTwins(None), Recipe()
    assert [objective.lr_factor(recipe, epoch) for epoch in (0, 2.5, 10, 99)] == [0, 0.25, 1, 1]


@pytest.mark.parametrize(("size", "batches"), [(5, [5, 5]), (10, [10]), (7, [7]), (3, [3, 3, 4])])
def test_batches_are_whole(size: int, batches: list[int]) -> None:
    sampler = BarlowTwins(None).make_sampler(toy_task((3, 2, 1, 4)), Recipe(batch_size=size))
    assert [len(index) for index in sampler(generator())] == batches


def test_it_is_trained_once_for_all_runs_and_billed_to_each(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tiny_task("clusterfix"), tiny_task("bpa")
    first = barlow_twins(tasks[0], 3, 0.01)
    monkeypatch.setattr(Task, "train_network", None)
    second = barlow_twins(tasks[1], 3, 0.01)
    assert same(state_of(first.model), state_of(second.model))
    assert first.key == second.key
    assert not same(state_of(first.model), state_of(tasks[0].initial().model))
    for task in tasks:
        (cost,) = task._lab.clock.shared.values()
        assert (cost.n_fwd, cost.n_bwd, cost.n_updates) == (2 * 96 * 3, 2 * 96 * 3, 3)  # two views, one batch an epoch
        assert not any(ledger(task).values())


@pytest.mark.parametrize("settings", [(2, 0.01), (3, 0.02)])
def test_other_settings_are_another_network(settings: tuple[int, float]) -> None:
    task = tiny_task("clusterfix")
    assert barlow_twins(task, *settings).key != barlow_twins(task, 3, 0.01).key


def test_by_default_it_trains_for_as_many_epochs_as_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    task = tiny_task("clusterfix", recipe__batch_size="8", recipe__patience="2")

    def train_network(task: Task, objective: Any, model: Any, stage: str, *, recipe: Recipe) -> Any:
        seen.append(recipe)
        return task.initial()

    monkeypatch.setattr(Task, "train_network", train_network)
    barlow_twins(task, 0, 0.6)
    (recipe,) = seen
    assert (recipe.optimizer, recipe.lr, recipe.momentum, recipe.schedule) == ("sgd", 0.6, 0.9, "constant")
    assert (recipe.batch_size, recipe.epochs, recipe.weight_decay) == (96, task.recipe.epochs, 1e-6)


def test_training_lowers_the_loss() -> None:
    objective, data = made()
    optimizers = objective.optimizers(Recipe(lr=1e-3, momentum=0.0, weight_decay=0.0))
    losses = [objective.step(data, optimizers).item() for _ in range(8)]
    assert all(math.isfinite(value) for value in losses)
    assert losses[-1] < losses[0]
