"""Which images a rung grants: how many, that they are nested and stratified, and drawn by class alone."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from stubs import make_card, split_of
from worstgroup.benchmark.annotations import Annotations, Attributes, grant_by_class, granted, halves
from worstgroup.benchmark.budget import RUNGS, Budget
from worstgroup.benchmark.spec import Card

Counts = tuple[int, ...]
WATERBIRDS, CELEBA, URBANCARS = (933, 266), (16811, 3056), (500, 500)
FEW = ("val-1", "val-5", "val-20", "val")


def labels(counts: Counts, seed: int = 0) -> NDArray[np.int64]:
    """Shuffled class labels with these counts."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def view(card: Card, y: NDArray[np.int64], a: NDArray[np.int64], budget: str, seed: int = 0) -> Annotations:
    return Annotations(card, {"train": y, "val": y}, {"train": a, "val": a}, Budget.parse(budget), seed)


# -------------------------------------------------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("counts", "k", "expected"),
    [
        (WATERBIRDS, 1, (12, 60, 240, 1199)),
        (CELEBA, 1, (199, 993, 3973, 19867)),
        (URBANCARS, 2, (20, 100, 400, 2000)),
    ],
)
def test_labels_of_the_specification(counts: Counts, k: int, expected: Counts) -> None:
    card, y = make_card(["background", "object"][:k]), labels(counts)
    for rung, n in zip(FEW, expected, strict=True):
        for name in (rung, rung.replace("val", "select")):
            annotations = view(card, y, np.zeros((len(y), k), np.int64), name)
            annotations.attributes("val", "select", annotations.rows("val", "select"))
            assert annotations.ledger().total_a == annotations.ledger().n_val_a_select == n


def test_a_budget_of_one_attribute_grants_the_same_images() -> None:
    card, y = make_card(["background", "object"]), labels(URBANCARS)
    a = np.zeros((len(y), 2), np.int64)
    both, one = (view(card, y, a, budget).rows("val") for budget in ("val-5", "val-5:object"))
    assert np.array_equal(both, one)


def test_a_share_of_train_is_drawn_apart_from_validation() -> None:
    y = labels((400, 600))
    annotations = view(make_card(), y, np.zeros((1000, 1), np.int64), "train-10")
    assert len(annotations.rows("train")) == 100
    assert len(annotations.rows("val")) == 1000
    assert len(annotations.rows("train", "select")) == 0
    assert not np.array_equal(granted(y, 0.1, "toy", 0, "train"), granted(y, 0.1, "toy", 0, "val"))


def test_the_size_of_a_grant_follows_from_class_counts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.integers(0, rng.choice([3, 30, 300]), rng.integers(1, 6))
        counts[rng.integers(len(counts))] += 1
        y = labels(tuple(counts))
        share = float(rng.choice([0, 0.01, 0.05, 0.1, 0.2, 0.33, 1]))
        rows = granted(y, share, "toy", 0, "val")
        assert len(rows) == grant_by_class(counts, share).sum() == len(set(rows.tolist())), (counts, share)
        if share:
            of_each = np.bincount(y[rows], minlength=len(counts))
            assert (of_each >= np.minimum(counts, 2)).all(), (counts, share)
        assert len(rows) >= round(share * len(y))


@pytest.mark.parametrize(
    ("counts", "share", "n"),
    [((500, 500), 0.01, 10), ((50, 50), 0.01, 4), ((2, 2), 0.01, 4), ((1, 1), 0.01, 2), ((9980, 20), 0.01, 102)],
)
def test_a_grant_holds_two_of_every_class(counts: Counts, share: float, n: int) -> None:
    """Where the share would give a rare class none, the two come on top."""
    assert grant_by_class(np.array(counts), share).sum() == n


# ----------------------------------------------------------------------------------------------------- which images


@pytest.mark.parametrize("counts", [WATERBIRDS, URBANCARS, (7, 40, 90)])
@pytest.mark.parametrize("seed", [0, 1])
def test_poorer_grants_are_part_of_richer_ones(counts: Counts, seed: int) -> None:
    y = labels(counts)
    grants = [set(granted(y, RUNGS[rung].val, "toy", seed, "val").tolist()) for rung in FEW]
    assert all(poor <= rich for poor, rich in pairwise(grants))
    assert grants[-1] == set(range(len(y)))


@pytest.mark.parametrize("counts", [(3000, 1000), (1000, 10), (500, 500), (600, 300, 100), (900, *(10,) * 10)])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.33])
def test_a_share_of_every_class_is_granted(counts: Counts, share: float) -> None:
    wanted = np.maximum(share * np.array(counts), 2)
    assert np.abs(grant_by_class(np.array(counts), share) - wanted).max() <= (1 if len(counts) < 4 else 9)


def test_the_draw_is_random_within_a_class() -> None:
    y = labels((400, 400))
    first, second = (granted(y, 0.2, "toy", seed, "val") for seed in (0, 1))
    assert len(np.intersect1d(first, second)) < 80
    assert abs(first[first < 400].mean() - 200) < 50


def test_grants_do_not_depend_on_attributes() -> None:
    card = make_card()
    y, a = split_of((80, 20, 10, 90), card)
    rows = [view(card, y, values, "val-20").rows("val") for values in (a, 1 - a, a[::-1], np.zeros_like(a))]
    assert all(np.array_equal(rows[0], other) for other in rows)


def test_grants_change_with_seed_and_dataset_only() -> None:
    y = labels(WATERBIRDS)
    first = granted(y, 0.05, "toy", 0, "val")
    assert np.array_equal(first, granted(y, 0.05, "toy", 0, "val"))
    assert not np.array_equal(first, granted(y, 0.05, "toy", 1, "val"))
    assert not np.array_equal(first, granted(y, 0.05, "other", 0, "val"))


# ----------------------------------------------------------------------------------------------------------- halves


@pytest.mark.parametrize("counts", [(30, 10), (31, 11), (2, 2), (1, 5), (7, 8, 9)])
def test_halves_are_stratified_disjoint_and_whole(counts: Counts) -> None:
    y = labels(counts)
    rows = np.sort(np.random.default_rng(2).choice(1000, len(y), replace=False))
    fit, select = halves(rows, y, np.random.default_rng(0))
    assert np.array_equal(np.sort(np.concatenate([fit, select])), rows)
    assert np.array_equal(fit, np.sort(fit))
    of_fit = np.bincount(y[np.isin(rows, fit)], minlength=len(counts))
    assert of_fit.tolist() == [n // 2 for n in counts]  # where a class is odd the image more selects


@pytest.mark.parametrize("marked", [0, 3, 10, 25])
def test_marked_rows_go_to_the_second_half_first(marked: int) -> None:
    y, rows = labels((20, 20)), np.arange(40)
    last = np.isin(rows, np.random.default_rng(3).choice(40, marked, replace=False))
    fit, select = halves(rows, y, np.random.default_rng(0), last)
    for label in (0, 1):
        n = int(last[y == label].sum())
        assert last[select][y[select] == label].sum() == min(n, 10)
        assert last[fit][y[fit] == label].sum() == max(n - 10, 0)


# ------------------------------------------------------------------------------------------------------- attributes

PAIR = Attributes(np.array([[0, 2], [1, 0], [-1, 1], [1, -1], [-1, -1]]), (2, 3))


def test_the_joint_attribute_is_unknown_where_any_is() -> None:
    joint = PAIR.joint()
    assert joint.index.tolist() == [2, 3, -1, -1, -1]
    assert joint.num == 6
    assert joint.counts().tolist() == [0, 0, 1, 1, 0, 0]


def test_groups_are_class_major() -> None:
    groups = PAIR.groups(np.array([1, 0, 0, 1, 1]), 2)
    assert groups.index.tolist() == [8, 3, -1, -1, -1]
    assert groups.num == 12


def test_without_attributes_groups_are_classes() -> None:
    none, y = Attributes.none(4), np.array([2, 0, 1, 2])
    assert none.groups(y, 3).index.tolist() == y.tolist()
    assert none.groups(y, 3).num == 3
    assert (none.joint().index.tolist(), none.joint().num) == ([0] * 4, 1)


def test_joined_attributes_keep_order_and_take_the_larger_sizes() -> None:
    """A source may find three clusters in one split and five in another."""
    more = Attributes(np.array([[1, 4]]), (2, 5))
    joined = Attributes.join([PAIR, more])
    assert joined.sizes == (2, 5)
    assert np.array_equal(joined.values, np.concatenate([PAIR.values, more.values]))
    assert Attributes.join([Attributes.none(2), Attributes.none(3)]).values.shape == (5, 0)


def test_attributes_of_some_images_keep_their_order() -> None:
    some = PAIR.at(np.array([3, 0]))
    assert (some.values.tolist(), some.sizes) == ([[1, -1], [0, 2]], (2, 3))
