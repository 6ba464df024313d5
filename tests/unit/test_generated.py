"""The generated dataset that steps are timed on."""

import numpy as np
import pytest
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.planning import find_card, make_dataset
from worstgroup.benchmark.store import check_counts
from worstgroup.datasets.generated import draw


@pytest.mark.parametrize(("name", "images"), [("generated:8x40", 40), ("generated:33x101", 100), ("generated:64", 512)])
def test_every_size_has_its_counts_and_no_empty_group(name: str, images: int) -> None:
    dataset, card = make_dataset(name)
    splits = dataset.load(None)
    check_counts(card, splits)
    assert sum(card.counts["train"]) == images
    assert all(min(counts) > 0 for counts in card.counts.values())
    assert splits["train"].images.shape[1:] == card.image


@pytest.mark.parametrize("variant", ["", "7", "64x39", "064", "64x", "x64", "-64", "64px", "99999"])
def test_other_variants_are_refused(variant: str) -> None:
    with pytest.raises(UserError, match="generated"):
        find_card(f"generated:{variant}")


def test_class_and_shortcut_are_where_they_are_said_to_be() -> None:
    split = draw((50, 50, 50, 50), 16, np.random.RandomState(0))
    images = np.asarray(split.images, dtype=float)
    middle = images[:, 6:10, 6:10, 0].mean((1, 2))
    corner = images[:, 12:, 12:, 2].mean((1, 2))
    for part, label, step in ((middle, split.y, 50), (corner, split.a[:, 0], 90)):
        assert part[label == 1].mean() - part[label == 0].mean() == pytest.approx(step, abs=6)
    rest = images[:, :6, :, 1].mean((1, 2))
    assert rest[split.y == 1].mean() == pytest.approx(rest[split.y == 0].mean(), abs=3)


def test_the_same_pixels_every_time() -> None:
    first, second = (make_dataset("generated:16")[0].load(None) for _ in range(2))
    assert all(np.array_equal(first[name].images, second[name].images) for name in first)
