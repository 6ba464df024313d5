"""Masks have exactly the size that was asked for, and edited images are what MaC's formulas say."""

import pytest
import torch
from scipy.stats import chisquare  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F
from worstgroup.methods.blocks.masks import combined, partners, patch_mask, removed, top_mask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int = 0) -> Tensor:
    return torch.randn(6, 3, 8, 10, generator=seeded(seed))


def random_mask(seed: int = 0) -> Tensor:
    return torch.rand(6, 1, 8, 10, generator=seeded(seed)) < 0.4


def channel_mean(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3), keepdim=True)


PARTNER = torch.tensor([3, 4, 5, 0, 0, 2])

# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("size", "share", "pixels"),
    [
        ((224, 224), 15_000 / 224**2, 15_000),
        ((224, 224), 0.299, 15_003),
        ((20, 30), 0.0, 0),
        ((20, 30), 1.0, 600),
        ((20, 30), 0.0025, 2),
        ((28, 28), 0.3, 235),
    ],
)
def test_masks_have_exactly_the_size(size: tuple[int, int], share: float, pixels: int) -> None:
    mask = top_mask(torch.randn(3, 7, 7, generator=seeded()), size, share)
    assert mask.shape == (3, 1, *size)
    assert mask.dtype == torch.bool
    assert mask.sum((1, 2, 3)).tolist() == [pixels] * 3


def test_masks_hold_the_hottest_pixels_of_each_image() -> None:
    heat = torch.randn(4, 7, 7, generator=seeded()) - 5  # negative everywhere: a rectified map would have no ranks
    mask = top_mask(heat, (28, 21), 0.3)[:, 0]
    resized = F.interpolate(heat[:, None], (28, 21), mode="bilinear")[:, 0]
    for one, chosen in zip(resized, mask, strict=True):
        assert one[chosen].min() >= one[~chosen].max()


def test_masks_keep_rows_and_columns_apart() -> None:
    heat = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    mask = top_mask(heat, (4, 8), 2 / 32)
    assert mask[0, 0].nonzero().tolist() == [[0, 6], [0, 7]]


def test_ties_go_to_the_first_pixels() -> None:
    assert top_mask(torch.zeros(2, 3, 3), (4, 5), 0.35).flatten(1).tolist() == [[True] * 7 + [False] * 13] * 2


@pytest.mark.parametrize(("share", "patches"), [(0.299, 15), (0.0, 0), (1.0, 49), (0.3878, 19)])
def test_patches_are_a_seventh_of_the_side(share: float, patches: int) -> None:
    """15 and 19 of 49 are what the successor's early code takes."""
    mask = patch_mask(torch.randn(3, 7, 7, generator=seeded()), (224, 224), share)
    assert mask.shape == (3, 1, 224, 224)
    assert mask.dtype == torch.bool
    assert mask.sum((1, 2, 3)).tolist() == [patches * 32 * 32] * 3
    blocks = mask.float().unfold(2, 32, 32).unfold(3, 32, 32).mean((-2, -1))
    assert set(blocks.flatten().tolist()) <= {0.0, 1.0}


def test_patches_have_the_highest_mean_heat() -> None:
    heat = torch.randn(4, 7, 7, generator=seeded()) - 5
    mask = patch_mask(heat, (28, 28), 10 / 49)
    resized = F.interpolate(heat[:, None], (28, 28), mode="bilinear")
    means = resized.unfold(2, 4, 4).unfold(3, 4, 4).mean((-2, -1)).flatten(1)
    chosen = mask[:, :, ::4, ::4].flatten(1)
    for mean, taken in zip(means, chosen, strict=True):
        assert mean[taken].min() >= mean[~taken].max()
    assert patch_mask(torch.zeros(1, 3, 3), (14, 14), 2 / 49)[0, 0].nonzero().amax(0).tolist() == [1, 3]


@pytest.mark.parametrize("size", [(64, 64), (5, 9), (30, 50)])
def test_patches_of_any_image_cover_about_the_share(size: tuple[int, int]) -> None:
    mask = patch_mask(torch.randn(3, 4, 4, generator=seeded()), size, 0.5)
    assert mask.shape == (3, 1, *size)
    assert ((mask.float().mean((1, 2, 3)) - 0.5).abs() < 0.15).all()


# ------------------------------------------------------------------------------------------------------------- images


def test_images_follow_the_formulas() -> None:
    x, mask = images(), random_mask()
    fill, m = channel_mean(x), mask.float()
    torch.testing.assert_close(removed(x, mask, fill), m * x + (1 - m) * fill)
    expected = m * x + (1 - m) * (1 - m[PARTNER]) * x[PARTNER] + (1 - m) * m[PARTNER] * fill
    torch.testing.assert_close(combined(x, mask, PARTNER, fill), expected)


def test_the_three_weights_sum_to_one() -> None:
    """Where own image, partner and fill agree, nothing changes."""
    same, fill = images()[:1].expand(6, -1, -1, -1), images()[:1]
    assert torch.equal(combined(same, random_mask(), PARTNER, fill), same)
    assert torch.equal(removed(same, random_mask(), fill), same)


def test_masks_of_all_pixels_change_nothing() -> None:
    x, mask = images(), top_mask(torch.randn(6, 4, 4, generator=seeded()), (8, 10), 1.0)
    assert torch.equal(removed(x, mask, channel_mean(x)), x)
    assert torch.equal(combined(x, mask, PARTNER, channel_mean(x)), x)


def test_empty_masks_leave_the_fill_or_the_partner() -> None:
    x, mask = images(), top_mask(torch.randn(6, 4, 4, generator=seeded()), (8, 10), 0.0)
    assert torch.equal(removed(x, mask, channel_mean(x)), channel_mean(x).expand_as(x))
    assert torch.equal(combined(x, mask, PARTNER, channel_mean(x)), x[PARTNER])


def test_partners_with_the_same_mask_leave_no_filled_pixel() -> None:
    x, mask = images(), random_mask()[:1].expand(6, -1, -1, -1)
    made = combined(x, mask, PARTNER, torch.full((1, 3, 1, 1), torch.nan))
    assert torch.equal(made, torch.where(mask, x, x[PARTNER]))


# ------------------------------------------------------------------------------------------------------------ partners


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 0, 1], [1, 0, 1, 0, 1], [5, 2, 2, 9, 5, 5, 0]])
def test_partners_have_another_label(labels: list[int]) -> None:
    y = torch.tensor(labels)
    for seed in range(50):
        drawn = partners(y, seeded(seed))
        assert drawn.dtype == torch.int64
        assert (y[drawn] != y).all()


def test_partners_are_drawn_with_replacement_and_equally_often() -> None:
    y = torch.tensor([0] * 2000 + [1] * 5)
    often = partners(y, seeded())[:2000].bincount()[2000:]
    assert chisquare(often.numpy()).pvalue > 0.01


def test_every_other_class_is_equally_likely_whatever_its_size() -> None:
    y = torch.tensor([0] * 3000 + [1] * 50 + [4] * 5)
    often = y[partners(y, seeded())[:3000]].bincount()
    assert often[[0, 2, 3]].tolist() == [0, 0, 0]
    assert chisquare(often[[1, 4]].numpy()).pvalue > 0.01


@pytest.mark.parametrize("label", [0, 3])
def test_a_batch_of_one_class_is_permuted(label: int) -> None:
    drawn = partners(torch.full((50,), label), seeded())
    assert drawn.sort().values.tolist() == list(range(50))
    assert drawn.tolist() != list(range(50))


def test_partners_come_from_the_generator_or_from_torchs_own() -> None:
    y = torch.arange(40) % 3
    assert torch.equal(partners(y, seeded(1)), partners(y, seeded(1)))
    assert not torch.equal(partners(y, seeded(1)), partners(y, seeded(2)))
    torch.manual_seed(1)
    assert torch.equal(partners(y), partners(y, seeded(1)))
