"""MaskTune: what an ERM attends to most is black in the images that it is tuned on."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import tiny_task
from torch import Tensor
from torch.nn import functional as F
from toys import KINDS, images, net, run_tiny, same, state_of, toy_task
from worstgroup.benchmark.backbones import Backbone, GradCam
from worstgroup.benchmark.data import augment
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.planning import Request, plan
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Task
from worstgroup.methods.blocks.grad_cam import predicted_cam
from worstgroup.methods.masktune import Config, Masked, MaskTune, kept, threshold, tuning_recipe

pytestmark = pytest.mark.usefixtures("tiny")
TRAIN, EPOCHS = 96, 2
NOTHING = 1e6
"""A multiplier with which no pixel is masked."""


def hot_spot() -> Tensor:
    """A map (1, 10, 10) with 49 pixels at 0.2, one at 1, and the rest 0."""
    heat = torch.zeros(100)
    heat[10:59], heat[70] = 0.2, 1.0
    return heat.view(1, 10, 10)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------- the threshold


@pytest.mark.parametrize("value", [0.1, 0.3, 1.0, 1e-7])
def test_a_constant_positive_map_is_its_own_threshold(value: float) -> None:
    heat = torch.full((2, 1, 224, 224), value)
    assert torch.equal(threshold(heat, 2.0).float(), heat[:, :, :1, :1])
    assert (heat <= threshold(heat, 2.0)).all()


def test_the_threshold_of_a_hot_spot() -> None:
    assert threshold(hot_spot()[:, None], 2.0).item() == pytest.approx(0.44)
    assert threshold(hot_spot()[:, None], 0.0).item() == pytest.approx(0.216)
    gone = ~kept(hot_spot(), (10, 10), 2.0)
    assert gone.flatten().nonzero().tolist() == [[70]]


def test_maps_have_thresholds_of_their_own() -> None:
    maps = torch.cat([hot_spot(), 3 * hot_spot(), torch.zeros(1, 10, 10)])
    assert threshold(maps[:, None], 2.0).flatten().tolist() == pytest.approx([0.44, 1.32, 0])


def test_the_deviation_is_that_of_the_positive_pixels() -> None:
    heat = torch.rand(4, 1, 7, 9, generator=seeded()) - 0.4
    heat = heat.relu()
    for one, found in zip(heat.numpy(), threshold(heat, 1.5).flatten().tolist(), strict=True):
        positive = one[one > 0]
        assert found == pytest.approx(positive.mean() + 1.5 * positive.std(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ the mask


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.7])
def test_a_map_that_is_the_same_everywhere_masks_nothing(value: float) -> None:
    assert kept(torch.full((2, 3, 3), value), (12, 12), 0.0).all()


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_only_the_shape_of_a_map_counts(scale: float) -> None:
    heat = torch.randn(5, 4, 4, generator=seeded())
    mask = kept(heat, (32, 32), 1.0)
    assert mask.shape == (5, 1, 32, 32)
    assert 0.6 < mask.float().mean() < 0.95
    assert (kept(scale * heat, (32, 32), 1.0) == mask).float().mean() > 0.999


def test_what_is_negative_is_never_masked() -> None:
    heat = torch.tensor([[[-5.0, 0.0], [0.0, 2.0]]])
    gone = ~kept(heat, (2, 2), 0.0)
    assert not gone.any()  # the only positive pixel is the mean of the positive ones
    assert torch.equal(kept(heat, (8, 8), 1.0), kept(heat.relu(), (8, 8), 1.0))


def test_a_map_is_scaled_before_it_is_resized() -> None:
    heat = torch.rand(3, 4, 4, generator=seeded()) + 0.5
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    resized = F.interpolate(((heat - low) / (high - low))[:, None], (16, 16), mode="bilinear", align_corners=False)
    assert torch.equal(kept(heat, (16, 16), 1.0), resized <= threshold(resized, 1.0))


# ---------------------------------------------------------------------------------------------------- the masked images


def masked(task: Task, masking: Sequence[Backbone], **config: Any) -> Masked:
    """The objective, set up."""
    objective = Masked(Config(**config), masking)
    objective.setup(task, task.initial().model)
    return objective


def raw(task: Task) -> Tensor:
    """Train images in [0, 1]."""
    index = torch.arange(task.size("train"))
    return task._lab.pixels("train").gather(index).permute(0, 3, 1, 2) / 255


PLAIN, FLIP = Recipe(augment="none"), Recipe(augment="flip")


def test_hot_pixels_are_black_and_the_others_stay() -> None:
    task = tiny_task("masktune")
    erm, x = task.erm().model.eval(), raw(task)
    _, heat = predicted_cam(erm, torch.cat(list(task.images("train"))))  # as they are seen when features are computed
    mask = kept(heat, (16, 16), 1.0).expand_as(x)
    found = masked(task, [erm], multiplier=1.0).transform(PLAIN, seeded())(x)
    assert 0 < (~mask).float().mean() < 0.4
    assert torch.equal(found[mask], x[mask])
    assert not found[~mask].any()


def test_images_are_masked_before_they_are_augmented() -> None:
    task = tiny_task("masktune")
    objective, x = masked(task, [task.erm().model.eval()], multiplier=1.0), raw(task)
    expected = objective.transform(PLAIN, seeded())(x)
    flip = augment("flip", seeded(3))
    assert flip is not None
    assert torch.equal(objective.transform(FLIP, seeded(3))(x), flip(expected))


def test_later_masks_are_of_what_earlier_ones_left() -> None:
    task = tiny_task("masktune")
    first, second, x = task.erm(epoch=1).model.eval(), task.erm().model.eval(), raw(task)
    once, other, both = (
        masked(task, masking, multiplier=1.0).transform(PLAIN, seeded())
        for masking in ([first], [second], [first, second])
    )
    assert torch.equal(both(x), other(once(x)))
    assert (both(x) == 0).sum() > (once(x) == 0).sum() > (x == 0).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_masks_and_gets_no_gradient(kind: GradCam) -> None:
    task, masking = toy_task((2,) * 4, budget="none"), net(kind).eval()
    objective = Masked(Config(multiplier=0.5), [masking])
    objective.setup(task, net(kind))
    before, x = state_of(masking), images().sigmoid()
    found = objective.transform(PLAIN, seeded())(x)
    assert 0 < (found == 0).float().mean() < 0.7
    assert not found.requires_grad
    assert same(state_of(masking), before)
    assert all(parameter.grad is None for parameter in masking.parameters())


# -------------------------------------------------------------------------------------------------------------- tuning


def test_without_a_mask_it_is_one_more_epoch_of_erm() -> None:
    task = tiny_task("masktune", recipe__augment="flip")
    found = MaskTune(Config(multiplier=NOTHING)).fit(task)
    recipe = replace(task.recipe, epochs=1)
    expected = task.train(Objective(None), stage="plain", recipe=recipe, start=task.erm())
    assert same(state_of(found.checkpoint.model), state_of(expected.checkpoint.model))
    assert not same(
        state_of(MaskTune(Config(multiplier=1.0)).fit(task).checkpoint.model), state_of(found.checkpoint.model)
    )


def test_the_masking_network_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("masktune")
    seen: list[Backbone] = []
    setup = Masked.setup

    def note(self: Masked, task: Task, model: Backbone) -> None:
        seen.extend(self.masking)
        setup(self, task, model)

    monkeypatch.setattr(Masked, "setup", note)
    found = MaskTune(Config()).fit(task)
    assert not same(state_of(found.checkpoint.model), state_of(seen[0]))
    assert same(state_of(seen[0]), state_of(task.erm().model))
    assert not seen[0].training
    assert found.choice.candidates == 1


def test_the_rate_is_the_last_one_unless_set() -> None:
    plain = Recipe(lr=0.3, epochs=10)
    assert tuning_recipe(plain, None) == replace(plain, epochs=1)
    cosine = replace(plain, schedule="cosine")
    assert tuning_recipe(cosine, None).lr == pytest.approx(0.3 * (1 + np.cos(0.9 * np.pi)) / 2)
    assert tuning_recipe(cosine, 0.01) == replace(plain, epochs=1, lr=0.01)
    assert tuning_recipe(replace(cosine, epochs=1), None).lr == 0.3


@pytest.mark.parametrize(("iterations", "masking"), [(1, 1), (3, 1 + 2 + 3)])
def test_what_it_costs_beside_erm(iterations: int, masking: int) -> None:
    record = run_tiny("masktune", iterations=str(iterations))
    assert record.cost is not None
    assert record.labels is not None
    marginal, scratch = record.cost.marginal, record.cost.scratch
    assert marginal.n_fwd == marginal.n_bwd == iterations * TRAIN
    assert marginal.n_fwd_nograd == masking * TRAIN
    assert scratch.n_fwd == (EPOCHS + iterations) * TRAIN
    assert len(record.history) == 1
    assert (record.labels.total_a, record.labels.n_y_extra) == (0, 0)


# ------------------------------------------------------------------------------------------------------------ settings


def test_maps_of_one_pixel_are_refused() -> None:
    with pytest.raises(UserError, match="masktune: maps of mlp3x100 have one pixel for tiny"):
        plan([Request("tiny", "masktune", backbone="mlp3x100")])


def test_ranges_of_the_search() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {
        "multiplier": "{2,1,3}",
        "lr": "{1e-5,1e-4}",
    }


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"multiplier": -1.0}, "masktune.multiplier must be at least 0, got -1.0"),
        ({"lr": 0.0}, "masktune.lr must be positive, got 0.0"),
        ({"iterations": 0}, "masktune.iterations must be 1, 2 or 3, got 0"),
        ({"iterations": 4}, "masktune.iterations must be 1, 2 or 3, got 4"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("masktune", **{f"masktune__{key}": str(value)})
