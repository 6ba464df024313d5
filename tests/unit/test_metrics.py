from itertools import product

import numpy as np
import pytest
from stubs import counts, examples, make_attributes
from worstgroup.benchmark import metrics
from worstgroup.benchmark.metrics import Counts, Values
from worstgroup.benchmark.spec import Attribute

Pattern = tuple[int, ...]
TRAIN = counts(3498, 184, 56, 1057)
TEST = counts(2255, 2255, 642, 642)
PLACE = make_attributes(["place"])

SHORTCUTS = make_attributes(["bg", "co"], ratio=0.95)
CELLS = (2, 2, 2)
URBANCARS_TRAIN = counts(3610, 190, 190, 10, 10, 190, 190, 3610)
URBANCARS_TEST = counts(*[125] * 8)


def close(value: float | None, to: float) -> bool:
    return value == pytest.approx(to, abs=5e-7)


def by_pattern(values: dict[Pattern, int], shape: tuple[int, ...]) -> Counts:
    """A count for every cell from its alignment pattern, for attributes aligned in order."""
    return counts(*(values[tuple(int(v == y) for v in a)] for y, *a in np.ndindex(*shape)))


# ------------------------------------------------------------------------------------------- the averages differ


def test_averages_of_the_waterbirds_example() -> None:
    correct = counts(223245, 180400, 48150, 60990)  # 0.99, 0.80, 0.75, 0.95 of 100 times the official counts
    values = metrics.evaluate(correct, 100 * TEST, TRAIN, (2, 2), PLACE)
    assert close(values["acc_adj"], 0.971089)
    assert close(values["acc_mean"], 0.885028)
    assert close(values["acc_group"], 0.8725)
    assert close(values["wga"], 0.75)
    assert close(values["gap"], 0.885028 - 0.75)
    assert close(values["worst_class"], 0.85)
    assert close(values["acc_class"], (0.895 + 0.85) / 2)
    assert metrics.worst_group(correct, 100 * TEST) == 2


def test_constant_predictor_on_waterbirds() -> None:
    values = metrics.evaluate(counts(2255, 2255, 0, 0), TEST, TRAIN, (2, 2), PLACE)
    assert values["wga"] == values["worst_class"] == 0
    assert values["acc_class"] == 0.5
    assert values["acc_mean"] == 4510 / 5794 == pytest.approx(0.7784, abs=5e-5)
    assert values["acc_adj"] == 3682 / 4795 == pytest.approx(0.7679, abs=5e-5)


def random_split(seed: int) -> tuple[Counts, Counts, Counts]:
    rng = np.random.default_rng(seed)
    total, train = rng.integers(1, 50, 8), rng.integers(1, 500, 8)
    return rng.integers(0, total + 1), total, train


@pytest.mark.parametrize("seed", range(20))
def test_no_average_is_below_the_worst_group(seed: int) -> None:
    correct, total, train = random_split(seed)
    values = metrics.evaluate(correct, total, train, CELLS, SHORTCUTS)
    uneven = len(set(correct / total)) > 1
    for name in ("acc_group", "acc_mean", "acc_adj"):
        value, wga = values[name], values["wga"]
        assert value is not None
        assert wga is not None
        assert value > wga if uneven else value == pytest.approx(wga)
    assert uneven


def test_averages_equal_the_worst_group_when_all_groups_are_equal() -> None:
    total = counts(4, 8, 20, 400)
    values = metrics.evaluate(total * 3 // 4, total, counts(1, 20, 3, 4), (2, 2), PLACE)
    for name in ("acc_group", "acc_mean", "acc_adj", "acc_class", "worst_class"):
        assert values[name] == values["wga"] == 0.75


@pytest.mark.parametrize("seed", range(20))
def test_adjusted_equals_mean_when_test_is_distributed_like_train(seed: int) -> None:
    correct, total, _ = random_split(seed)
    assert metrics.adjusted_accuracy(correct, total, 7 * total) == pytest.approx(metrics.mean_accuracy(correct, total))


@pytest.mark.parametrize("seed", range(5))
def test_renaming_classes_and_values_changes_no_metric(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape, classes, values = (3, 3, 2), rng.permutation(3), [rng.permutation(3), rng.permutation(2)]
    attributes = [
        Attribute("bg", ("0", "1", "2"), (0, 1, 2), 0.8),
        Attribute("co", ("0", "1"), (0, 1, 1), 0.9),
    ]
    renamed = [
        Attribute(old.name, old.values, tuple(int(new[old.aligned[y]]) for y in np.argsort(classes)), old.train_ratio)
        for old, new in zip(attributes, values, strict=True)
    ]
    tables = [rng.integers(0, 20, shape), rng.integers(20, 30, shape), rng.integers(1, 99, shape)]
    moved = [np.empty_like(table) for table in tables]
    for old, new in zip(tables, moved, strict=True):
        new[np.ix_(classes, *values)] = old
    correct, total, train = (table.ravel() for table in tables)
    before = metrics.evaluate(correct, total, train, shape, attributes)
    correct, total, train = (table.ravel() for table in moved)
    after = metrics.evaluate(correct, total, train, shape, renamed)
    assert after == pytest.approx(before, abs=1e-12)


# ---------------------------------------------------------------------------------------------------- Whac-A-Mole


def test_whac_a_mole_example() -> None:
    accuracy: dict[Pattern, int] = {(1, 1): 98, (0, 1): 85, (1, 0): 80, (0, 0): 30}
    values = metrics.evaluate(by_pattern(accuracy, CELLS), counts(*[100] * 8), URBANCARS_TRAIN, CELLS, SHORTCUTS)
    assert close(values["id_acc"], 0.963575)
    assert close(values["gap_bg"], -0.113575)
    assert close(values["gap_co"], -0.163575)
    assert close(values["gap_all"], -0.663575)


def test_weights_of_two_shortcuts() -> None:
    weights = metrics.alignment_weights(URBANCARS_TRAIN, CELLS, SHORTCUTS)
    assert weights == pytest.approx({(1, 1): 0.9025, (0, 1): 0.0475, (1, 0): 0.0475, (0, 0): 0.0025})


def test_empirical_weights_of_urbancars_equal_the_product() -> None:
    undeclared = make_attributes(["bg", "co"])
    half = (SHORTCUTS[0], undeclared[1])
    product_weights = metrics.alignment_weights(URBANCARS_TRAIN, CELLS, SHORTCUTS)
    for attributes in (undeclared, half):
        assert metrics.alignment_weights(URBANCARS_TRAIN, CELLS, attributes) == pytest.approx(product_weights)


def test_empirical_weights_are_train_frequencies() -> None:
    weights = metrics.alignment_weights(counts(6, 1, 2, 3), (2, 2), make_attributes(["bg"]))
    assert weights == {(1,): 0.75, (0,): 0.25}


def test_three_shortcuts() -> None:
    shape = (2, 2, 2, 2)
    attributes = [Attribute(name, ("0", "1"), (0, 1), ratio) for name, ratio in (("a", 0.95), ("b", 0.9), ("c", 0.8))]
    accuracy = {v: 3 + sum(v) for v in product((0, 1), repeat=3)}
    total = counts(*[6] * 16)
    values = metrics.evaluate(by_pattern(accuracy, shape), total, total, shape, attributes)
    assert sum(metrics.alignment_weights(total, shape, attributes).values()) == pytest.approx(1)
    assert close(values["id_acc"], 0.9416667)
    for name in "abc":
        assert close(values[f"gap_{name}"], -0.1083333)
    assert close(values["gap_all"], -0.4416667)


def test_one_shortcut_has_the_minority_gap_only() -> None:
    values = metrics.evaluate(
        counts(9, 4, 4, 9), counts(*[10] * 4), counts(9, 1, 1, 9), (2, 2), make_attributes(["bg"], ratio=0.9)
    )
    assert values["id_acc"] == pytest.approx(0.9 * 0.9 + 0.1 * 0.4)
    assert values["gap_bg"] == pytest.approx(0.4 - 0.85)
    assert "gap_all" not in values


def test_background_predictor_on_urbancars() -> None:
    correct = 125 * by_pattern({(1, 1): 1, (1, 0): 1, (0, 1): 0, (0, 0): 0}, CELLS)
    values = metrics.evaluate(correct, URBANCARS_TEST, URBANCARS_TRAIN, CELLS, SHORTCUTS)
    assert close(values["id_acc"], 0.95)
    assert close(values["gap_bg"], -0.95)
    assert close(values["gap_co"], 0.05)
    assert close(values["gap_all"], -0.95)
    assert values["wga"] == 0


def test_cells_of_a_pattern_count_equally_whatever_their_size() -> None:
    accuracy = metrics.alignment_accuracy(counts(10, 0, 5, 90), counts(10, 1, 10, 100), (2, 2), make_attributes(["bg"]))
    assert accuracy == {(1,): 0.95, (0,): 0.25}


def test_with_more_classes_an_unaligned_attribute_takes_all_other_values() -> None:
    correct = counts(9, 1, 2, 3, 9, 4, 5, 6, 9)
    attributes = make_attributes(["color"], classes=3)
    assert metrics.alignment_accuracy(correct, counts(*[10] * 9), (3, 3), attributes) == pytest.approx(
        {(1,): 0.9, (0,): 0.35}
    )
    empty = counts(10, 10, 10, 10, 10, 10, 10, 0, 10)  # the cell with 6 correct
    assert metrics.alignment_accuracy(np.minimum(correct, empty), empty, (3, 3), attributes) == pytest.approx(
        {(1,): 0.9, (0,): 0.3}
    )


def test_a_pattern_without_test_images_leaves_what_needs_it_undefined() -> None:
    weights: dict[Pattern, float] = {(1, 1): 0.5, (1, 0): 0.5, (0, 1): 0.0, (0, 0): 0.0}
    seen: dict[Pattern, float] = {(1, 1): 0.9, (1, 0): 0.7}
    values = metrics.whac_a_mole(seen, weights, ["bg", "co"])
    assert values == pytest.approx({"id_acc": 0.8, "gap_bg": None, "gap_co": -0.1, "gap_all": None})
    assert set(metrics.whac_a_mole({(1, 1): 0.9}, weights, ["bg", "co"]).values()) == {None}


# -------------------------------------------------------------------------------------- empty and unseen groups


def test_an_empty_group_is_left_out() -> None:
    values = metrics.evaluate(counts(8, 0, 3, 4), counts(10, 0, 5, 5), counts(9, 0, 1, 9), (2, 2), PLACE)
    assert values["wga"] == 0.6
    assert values["acc_group"] == pytest.approx((0.8 + 0.6 + 0.8) / 3)
    assert values["acc_adj"] == pytest.approx((9 * 0.8 + 1 * 0.6 + 9 * 0.8) / 19)
    assert values["gap_place"] is not None
    assert metrics.worst_group(counts(8, 0, 3, 4), counts(10, 0, 5, 5)) == 2


def test_train_counts_of_a_group_without_test_images_do_not_weigh() -> None:
    assert metrics.adjusted_accuracy(counts(8, 0, 3, 4), counts(10, 0, 5, 5), counts(9, 7, 1, 9)) == pytest.approx(
        (9 * 0.8 + 1 * 0.6 + 9 * 0.8) / 19
    )


def test_an_empty_class_is_left_out() -> None:
    values = metrics.evaluate(counts(1, 2, 0, 0), counts(2, 2, 0, 0), counts(1, 1, 1, 1), (2, 2), PLACE)
    assert values["acc_class"] == values["worst_class"] == 0.75
    assert np.isnan(metrics.class_recalls(counts(1, 2, 0, 0), counts(2, 2, 0, 0), 2)[1])


def test_a_group_that_training_never_saw_leaves_train_weighted_metrics_undefined() -> None:
    correct, total = counts(8, 1, 3, 4), counts(10, 2, 5, 5)
    values = metrics.evaluate(correct, total, counts(9, 0, 1, 9), (2, 2), make_attributes(["place"], ratio=0.9))
    undefined: Values = dict.fromkeys(("acc_adj", "id_acc", "gap_place"))
    assert {name: values[name] for name in undefined} == undefined
    assert {name for name, value in values.items() if value is None} == set(undefined)
    assert values["wga"] == 0.5


# ------------------------------------------------------------------------------------------------ groups, intervals


def test_group_index_is_mixed_radix_with_the_class_first() -> None:
    y, bg, co = (axis.ravel() for axis in np.indices(CELLS))
    assert metrics.group_index(y, np.c_[bg, co], CELLS).tolist() == (4 * y + 2 * bg + co).tolist()
    assert metrics.group_index(np.array([2]), np.array([[1]]), (3, 5)).tolist() == [11]


def test_group_counts_keep_empty_groups() -> None:
    total, correct = counts(3, 0, 2, 0), counts(1, 0, 2, 0)
    data = examples(correct, total, (2, 2))
    found = metrics.group_counts(data["prediction"] == data["y"], data["group"], 4)
    assert np.array_equal(found, (correct, total))


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(153, 180, 79.1, 89.5), (0, 10, 0.0, 27.8), (10, 10, 72.2, 100.0), (5, 10, 23.7, 76.3)],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert [round(100 * end, 1) for end in metrics.wilson_interval(correct, total)] == [low, high]
