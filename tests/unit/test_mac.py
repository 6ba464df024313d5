"""MaC: only the head learns, from images edited by what the frozen ERM looks at."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plan_tiny
from stubs import tiny_task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from toys import KINDS, batch, net, run_tiny, same, state_of, toy_task, train
from worstgroup.benchmark.backbones import Backbone, GradCam
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods import mac
from worstgroup.methods.blocks.grad_cam import predicted_cam, xgrad_cam
from worstgroup.methods.blocks.masks import combined, patch_mask, removed, top_mask
from worstgroup.methods.mac import Config, Head, MaC

pytestmark = pytest.mark.usefixtures("tiny")
kinds = pytest.mark.parametrize("kind", KINDS)
CLASSES = 3


def made(kind: GradCam = "closed", **config: Any) -> tuple[Head, Backbone, Batch]:
    """The objective on a toy network of three classes, that network as it was before, and a batch of 18 images."""
    task = toy_task((2,) * 9, classes=CLASSES, budget="select", kind=kind)
    objective, erm = Head(Config(**config)), trained(kind)
    objective.setup(task, trained(kind))
    return objective, erm.eval(), batch(task)


def trained(kind: GradCam) -> Backbone:
    """A toy network whose BatchNorm statistics are not those of the first day."""
    model = net(kind, CLASSES, "erm")
    norm = model.trunk[1]  # type: ignore[index]
    norm.running_mean.fill_(0.1)
    norm.running_var.fill_(0.7)
    return model


def features(erm: Backbone, x: Tensor) -> Tensor:
    with torch.no_grad():
        return erm.features(x)


def heat(erm: Backbone, x: Tensor) -> Tensor:
    """XGrad-CAM maps of the predictions of ERM."""
    maps = erm.trunk(x).detach().requires_grad_()
    logits = erm.head(erm.neck(maps))
    return xgrad_cam(erm, maps, logits, logits.argmax(1))


# ------------------------------------------------------------------------------------------------------------ the loss


@kinds
def test_without_edited_images_it_is_plain_head_retraining(kind: GradCam) -> None:
    objective, erm, data = made(kind, alpha=0.0, beta=0.0)
    assert objective.loss(data).item() == F.cross_entropy(objective.model.head(features(erm, data.x)), data.y).item()


@kinds
def test_a_mask_of_all_pixels_repeats_the_loss(kind: GradCam) -> None:
    objective, erm, data = made(kind, alpha=2.0, beta=3.0, share=1.0)
    plain = F.cross_entropy(objective.model.head(features(erm, data.x)), data.y).item()
    assert objective.loss(data).item() == pytest.approx((1 + 2 + 3) * plain)


@kinds
def test_the_loss_is_the_sum_of_three_terms(kind: GradCam, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, erm, data = made(kind, alpha=0.5, beta=2.0, share=0.3)
    head = objective.model.head
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))  # masks must not come from this one
    other = (data.y + 1) % CLASSES
    partner = torch.stack([(data.y == y).nonzero()[0, 0] for y in other])
    monkeypatch.setattr(mac, "partners", lambda y: partner)
    mask, fill = top_mask(heat(erm, data.x), (8, 8), 0.3), data.x.mean((0, 2, 3), keepdim=True)
    assert mask.sum((1, 2, 3)).tolist() == [19] * 18
    terms = [data.x, removed(data.x, mask, fill), combined(data.x, mask, partner, fill)]
    expected = [F.cross_entropy(head(features(erm, x)), data.y).item() for x in terms]
    assert len({round(value, 4) for value in expected}) == 3
    assert objective.loss(data).item() == pytest.approx(expected[0] + 0.5 * expected[1] + 2.0 * expected[2], rel=1e-5)


@kinds
def test_masks_follow_the_frozen_head(kind: GradCam) -> None:
    objective, erm, data = made(kind)
    expected = heat(erm, data.x)
    _, before = predicted_cam(objective.erm, data.x)
    nn.init.normal_(objective.model.head.weight)
    _, after = predicted_cam(objective.erm, data.x)
    assert torch.equal(before, after)
    torch.testing.assert_close(before, expected.detach())
    assert not before.requires_grad


@kinds
def test_features_do_not_depend_on_the_rest_of_the_batch(kind: GradCam) -> None:
    objective, erm, data = made(kind)
    whole, maps = predicted_cam(objective.erm, data.x)
    few, few_maps = predicted_cam(objective.erm, data.x[3:5])
    torch.testing.assert_close(few, whole[3:5])
    torch.testing.assert_close(few_maps, maps[3:5])
    torch.testing.assert_close(whole, features(erm, data.x))


@kinds
def test_only_the_head_has_gradients(kind: GradCam) -> None:
    objective, _, data = made(kind)
    objective.loss(data).backward()  # type: ignore[no-untyped-call]
    assert objective.model.head.weight.grad is not None
    frozen = [*objective.model.trunk.parameters(), *objective.model.neck.parameters(), *objective.erm.head.parameters()]
    assert all(parameter.grad is None for parameter in frozen)


@kinds
def test_masks_can_be_of_patches(kind: GradCam) -> None:
    objective, erm, data = made(kind, alpha=2.0, beta=0.0, share=0.3, mask="patch32")
    mask, fill = patch_mask(heat(erm, data.x), (8, 8), 0.3), data.x.mean((0, 2, 3), keepdim=True)
    head = objective.model.head
    nn.init.normal_(head.weight)
    parts = [F.cross_entropy(head(features(erm, x)), data.y) for x in (data.x, removed(data.x, mask, fill))]
    torch.testing.assert_close(objective.loss(data), parts[0] + 2 * parts[1])


def test_without_edited_images_no_map_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, _, data = made(alpha=0.0, beta=0.0)
    monkeypatch.setattr(mac, "predicted_cam", None)
    objective.loss(data)


def test_an_empty_mask_leaves_a_constant_and_the_partner(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, erm, data = made(alpha=2.0, beta=3.0, share=0.0)
    partner = torch.stack([(data.y == y).nonzero()[0, 0] for y in (data.y + 1) % CLASSES])
    monkeypatch.setattr(mac, "partners", lambda y: partner)
    head = objective.model.head
    nn.init.normal_(head.weight)
    constant = data.x.mean((0, 2, 3), keepdim=True).expand_as(data.x)
    terms = [F.cross_entropy(head(features(erm, x)), data.y) for x in (data.x, constant, data.x[partner])]
    torch.testing.assert_close(objective.loss(data), terms[0] + 2 * terms[1] + 3 * terms[2])


def test_a_batch_of_one_class_works() -> None:
    objective, _, data = made()
    same_class = data.y == 1
    assert objective.loss(Batch(data.x[same_class], data.y[same_class], data.index[same_class])).isfinite()


# ----------------------------------------------------------------------------------------- BatchNorm in training mode


def adapting(kind: GradCam = "closed", **config: Any) -> tuple[Head, Backbone, Batch]:
    """As `made`, with the networks in the modes that the engine gives them."""
    objective, erm, data = made(kind, bn="train", **config)
    # What the task builds for the maps is another network before it takes ERM's state.
    for network in objective.networks().values():
        network.train()
    return objective, erm, data


@kinds
def test_all_images_are_normalised_together(kind: GradCam, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, erm, data = adapting(kind, alpha=0.5, beta=2.0, share=0.3)
    head = objective.model.head
    nn.init.normal_(head.weight)
    partner = torch.stack([(data.y == y).nonzero()[0, 0] for y in (data.y + 1) % CLASSES])
    monkeypatch.setattr(mac, "partners", lambda y: partner)
    mask, fill = top_mask(heat(erm, data.x), (8, 8), 0.3), data.x.mean((0, 2, 3), keepdim=True)
    images = torch.cat([data.x, removed(data.x, mask, fill), combined(data.x, mask, partner, fill)])
    norm = erm.trunk[1]  # type: ignore[index]
    norm.train()
    logits = head(features(erm, images)).chunk(3)
    terms = [F.cross_entropy(part, data.y) for part in logits]
    torch.testing.assert_close(objective.loss(data), terms[0] + 0.5 * terms[1] + 2 * terms[2])
    after = objective.model.trunk[1]  # type: ignore[index]
    torch.testing.assert_close(after.running_mean, norm.running_mean)
    assert not torch.equal(after.running_mean, trained(kind).trunk[1].running_mean)  # type: ignore[index]


@kinds
def test_maps_are_those_of_statistics_that_stay(kind: GradCam) -> None:
    objective, erm, data = adapting(kind)
    _, before = predicted_cam(objective.erm, data.x)
    torch.testing.assert_close(before, heat(erm, data.x).detach())
    objective.loss(data)
    assert torch.equal(predicted_cam(objective.erm, data.x)[1], before)


def test_dropout_stays_off() -> None:
    objective, _, data = adapting("head", alpha=0.0, beta=0.0)
    assert torch.equal(objective.loss(data), objective.loss(data))
    assert sum(layer.training for layer in objective.model.modules()) == 2  # BatchNorm and head


def test_a_network_without_norms_is_not_copied() -> None:
    task = toy_task((2,) * 9, classes=CLASSES, budget="select")
    objective = Head(Config(bn="train"))
    model = net("closed", CLASSES, "erm", norm=False)
    objective.setup(task, model)
    assert objective.erm.trunk is model.trunk
    assert list(objective.networks()) == ["head"]


def test_statistics_adapt_and_weights_do_not(tmp_path: Path) -> None:
    model, before = trained("closed"), state_of(trained("closed"))
    recipe = Recipe(optimizer="adam", lr=0.01, weight_decay=0.0, batch_size=6, epochs=2)
    cost = train(Head(Config(bn="train")), toy_task((2,) * 9, classes=CLASSES), model, recipe, tmp_path)
    changed = {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}
    statistics = {"trunk.1.running_mean", "trunk.1.running_var", "trunk.1.num_batches_tracked"}
    assert changed == {"head.weight", "head.bias"} | statistics
    assert cost.n_fwd_nograd == 3 * 18 * 2  # and those of the maps, by a network that this meter does not know


def test_what_adapting_costs() -> None:
    record = run_tiny("mac", mac__bn="train", mac__epochs="2")
    assert record.cost is not None
    marginal = record.cost.marginal
    assert (marginal.n_fwd, marginal.n_bwd, marginal.n_fwd_nograd) == (0, 0, 4 * 96 * 2)


class Killed(Head):
    """Dies in its third epoch of three batches."""

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 8:
            raise KeyboardInterrupt
        return super().step(batch, optimizers)


def test_statistics_survive_a_kill(tmp_path: Path) -> None:
    recipe = Recipe(optimizer="adam", lr=0.01, weight_decay=0.0, batch_size=6, epochs=4)
    task, config = toy_task((2,) * 9, classes=CLASSES), Config(bn="train")
    (tmp_path / "other").mkdir()
    whole, resumed = trained("closed"), trained("closed")
    train(Head(config), task, whole, recipe, tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        train(Killed(config), task, trained("closed"), recipe, tmp_path)
    train(Head(config), task, resumed, recipe, tmp_path)
    assert same(state_of(whole), state_of(resumed))


# ------------------------------------------------------------------------------------------------------------- the head


def test_the_head_starts_from_xavier_with_zero_bias() -> None:
    task = toy_task((2,) * 4)
    wide = Backbone("wide", nn.Identity(), nn.Flatten(1), nn.Linear(2000, 10), grad_cam="closed")
    Head(Config()).setup(task, wide)
    bound = (6 / 2010) ** 0.5
    assert not wide.head.bias.any()
    assert 0.99 * bound < wide.head.weight.abs().max() <= bound
    assert wide.head.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_the_first_head_is_the_same_in_every_run_and_disturbs_no_draw() -> None:
    def head(seed: int, **config: Any) -> Tensor:
        objective = Head(Config(**config))
        objective.setup(toy_task((2,) * 9, classes=CLASSES, seed=seed), trained("closed"))
        return objective.model.head.weight

    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = head(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(head(0, alpha=7.0, lr=0.1), first)
    assert not torch.equal(head(1), first)


@pytest.mark.parametrize("balanced", [False, True])
def test_the_sampler_is_a_setting(balanced: bool) -> None:
    task, objective = toy_task((300, 0, 0, 20)), Head(Config(balanced=balanced))
    objective.setup(task, net())
    drawn = torch.cat(list(objective.make_sampler(task, Recipe())(torch.Generator().manual_seed(0))))
    of_class_one = int((drawn >= 300).sum())
    assert len(drawn) == 320
    assert 120 < of_class_one < 200 if balanced else of_class_one == 20


# ------------------------------------------------------------------------------------------------------------- training


class Watched(Head):
    """Notes the learning rate of every step."""

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        self.rates = [*getattr(self, "rates", ()), optimizers["head"].param_groups[0]["lr"]]
        return super().step(batch, optimizers)


@kinds
def test_training_changes_the_head_alone(kind: GradCam, tmp_path: Path) -> None:
    model, before = trained(kind), state_of(trained(kind))
    objective = Watched(Config(lr=0.01))
    recipe = Recipe(optimizer="adam", lr=0.01, weight_decay=0.0, batch_size=6, epochs=11)
    cost = train(objective, toy_task((2,) * 9, classes=CLASSES), model, recipe, tmp_path)
    after = state_of(model)
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert objective.rates == [0.01] * 15 + [0.005] * 15 + [0.0025] * 3
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd) == (0, 0, 3 * 18 * 11)
    assert cost.n_updates == 3 * 11


def test_it_starts_from_erm_and_leaves_trunk_and_neck() -> None:
    task = tiny_task("mac", mac__epochs="2")
    erm = task.erm().model
    predictor = MaC(Config(epochs=2)).fit(task)
    found = predictor.checkpoint.model
    assert same(state_of(found.trunk), state_of(erm.trunk))
    assert same(state_of(found.neck), state_of(erm.neck))
    assert not torch.equal(found.head.weight, erm.head.weight)
    assert predictor.trajectory is not None
    assert len(predictor.trajectory.epochs) == 2


def test_the_head_has_a_recipe_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("mac", recipe__augment="flip", recipe__optimizer="sgd", recipe__schedule="cosine")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(task, "train", lambda objective, **options: seen.update(options))
    MaC(Config()).fit(task)
    recipe = replace(task.recipe, optimizer="adam", lr=5e-3, weight_decay=0.0, batch_size=32, epochs=10)
    assert seen["recipe"] == replace(recipe, schedule="constant")
    assert seen["recipe"].augment == "flip"
    assert seen["start"].key.endswith(f"/{task.recipe.epochs}")  # ERM's last epoch


@pytest.mark.parametrize(("beta", "forwards"), [(3, 3), (0, 2)])
def test_what_it_costs_beside_erm(beta: int, forwards: int) -> None:
    record = run_tiny("mac", mac__beta=str(beta), mac__epochs="3")
    assert record.cost is not None
    assert record.labels is not None
    images, epochs = 96, 2
    marginal, scratch = record.cost.marginal, record.cost.scratch
    assert (marginal.n_fwd, marginal.n_bwd, marginal.n_fwd_nograd) == (0, 0, forwards * images * 3)
    assert scratch.n_fwd == scratch.n_bwd == images * epochs
    assert marginal.n_updates == images // 32 * 3
    assert record.labels.n_train_a == 0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"alpha": -1.0}, "mac.alpha must be at least 0, got -1.0"),
        ({"beta": -1.0}, "mac.beta must be at least 0, got -1.0"),
        ({"share": 1.1}, r"mac.share must be in \[0, 1\], got 1.1"),
        ({"epochs": 0}, "mac.epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "mac.lr must be positive, got 0.0"),
        ({"batch_size": 1}, "mac.batch_size must be at least 2, got 1"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("mac", **{f"mac__{key}": str(value)})
