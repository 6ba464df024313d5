from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from stubs import counts, examples, ledger, make_card, make_task, split_of
from worstgroup.benchmark.annotations import Groups
from worstgroup.benchmark.budget import RUNGS
from worstgroup.benchmark.errors import BudgetExceeded
from worstgroup.benchmark.metrics import Counts
from worstgroup.benchmark.selection import CRITERIA, Selector, smoothed_worst_group

SHAPE = (2, 2)
TOTAL = counts(40, 10, 10, 40)


def candidates(table: Sequence[Sequence[int]], total: Counts) -> list[NDArray[np.int64]]:
    """Predictions with these correct answers per group."""
    return [examples(counts(*correct), total, SHAPE)["prediction"] for correct in table]


def selector(name: str, total: Counts) -> Selector:
    data = examples(total, total, SHAPE)
    groups = Groups(data["group"], 4) if CRITERIA[name].needs_groups else Groups(data["y"], 2)
    return Selector(CRITERIA[name], np.arange(len(data["y"])), data["y"], groups)


# ----------------------------------------------------------------------------------------------- smoothed accuracies


@pytest.mark.parametrize(
    ("correct", "total", "value"), [(0, 0, 0.5), (9, 10, 0.8333), (0, 1, 1 / 3), (10, 10, 11 / 12)]
)
def test_smoothed_accuracy_of_one_group(correct: int, total: int, value: float) -> None:
    assert smoothed_worst_group(counts(correct), counts(total)) == pytest.approx(value, abs=5e-5)


def test_an_unseen_cell_drops_out_unless_all_others_are_better() -> None:
    assert smoothed_worst_group(counts(9, 0, 3), counts(10, 0, 10)) == pytest.approx(4 / 12)
    assert smoothed_worst_group(counts(9, 0, 8), counts(10, 0, 10)) == 0.5


def test_behind_an_unseen_cell_the_group_mean_decides() -> None:
    total = counts(40, 0, 10, 40)
    choose = selector("val-wga-smoothed", total)
    best, score = choose.best(candidates([(30, 0, 8, 30), (36, 0, 9, 36), (38, 0, 6, 38)], total))
    assert best == 1
    assert list(score) == pytest.approx([0.5, 0.9])


def test_smoothing_prefers_evidence() -> None:
    """0 of 1 right tells less against a model than 6 of 20 do."""
    total = counts(1, 40, 20, 40)
    table = [(0, 40, 20, 40), (1, 40, 6, 40)]
    assert selector("val-wga", total).best(candidates(table, total))[0] == 1
    assert selector("val-wga-smoothed", total).best(candidates(table, total))[0] == 0


# -------------------------------------------------------------------------------------------------------- criteria

GROUP_BALANCED = (32, 8, 8, 32)  # wga 0.80, mean 0.80, recalls 0.80 0.80
ACCURATE = (40, 6, 5, 40)  # wga 0.50, mean 0.91, recalls 0.92 0.90
LOPSIDED = (34, 7, 6, 39)  # wga 0.60, mean 0.86, recalls 0.82 0.90


@pytest.mark.parametrize(
    ("name", "table", "winner", "score"),
    [
        ("val-wga", [ACCURATE, GROUP_BALANCED, LOPSIDED], 1, (0.8, 0.8)),
        ("val-wga-smoothed", [ACCURATE, GROUP_BALANCED, LOPSIDED], 1, (9 / 12, 0.8)),
        ("val-wga-avg", [ACCURATE, GROUP_BALANCED, LOPSIDED], 1, (0.8,)),
        ("val-wga-avg", [(40, 8, 7, 40), GROUP_BALANCED], 0, ((0.7 + 0.95) / 2,)),
        ("val-worst-class", [GROUP_BALANCED, LOPSIDED, ACCURATE], 2, (0.9, 0.91)),
        ("val-balanced", [GROUP_BALANCED, ACCURATE, LOPSIDED], 1, (0.91,)),
        ("val-mean", [GROUP_BALANCED, LOPSIDED, ACCURATE], 2, (0.91,)),
    ],
)
def test_winner(name: str, table: list[tuple[int, ...]], winner: int, score: tuple[float, ...]) -> None:
    best, found = selector(name, TOTAL).best(candidates(table, TOTAL))
    assert best == winner
    assert list(found) == pytest.approx(list(score))


def test_mean_weighs_images_and_balanced_weighs_classes() -> None:
    total = counts(80, 0, 0, 20)
    table = [(80, 0, 0, 10), (60, 0, 0, 20)]  # mean 0.90 0.80, recalls 1 0.5, 0.75 1
    assert selector("val-mean", total).best(candidates(table, total))[0] == 0
    assert selector("val-balanced", total).best(candidates(table, total))[0] == 1


@pytest.mark.parametrize("name", ["val-wga", "val-wga-smoothed"])
def test_a_tie_goes_to_the_higher_group_mean(name: str) -> None:
    table = [(20, 5, 5, 20), (20, 9, 5, 20), (40, 5, 5, 20)]
    assert selector(name, TOTAL).best(candidates(table, TOTAL))[0] == 2


def test_a_worst_class_tie_goes_to_the_higher_class_mean() -> None:
    table = [(40, 10, 5, 20), (20, 5, 5, 20), (20, 5, 10, 40)]
    assert selector("val-worst-class", TOTAL).best(candidates(table, TOTAL))[0] == 0


@pytest.mark.parametrize("name", CRITERIA)
def test_among_equals_the_earliest_wins(name: str) -> None:
    worse, best = (10, 2, 2, 10), (30, 8, 8, 30)
    assert selector(name, TOTAL).best(candidates([worse, best, best, worse, best], TOTAL))[0] == 1


# ------------------------------------------------------------------------------------- what a rung's rule may read


@pytest.mark.parametrize("rung", RUNGS)
def test_a_rung_selects_by_groups_only_if_it_grants_them(rung: str) -> None:
    assert CRITERIA[RUNGS[rung].criterion].needs_groups == (RUNGS[rung].val > 0)


def test_selection_at_none_reads_no_attribute() -> None:
    val = split_of((40, 10, 10, 40), make_card())
    task = make_task(val, val, budget="none")
    choose = task.selector()
    assert (choose.criterion.name, choose.groups.num) == ("val-worst-class", 2)
    assert not any(ledger(task).values())
    with pytest.raises(BudgetExceeded):
        task.groups("val")


def test_selection_at_none_is_invariant_to_permuting_attributes() -> None:
    y, a = split_of((40, 10, 10, 40), make_card())
    rng = np.random.default_rng(0)
    predictions = np.where(rng.random(len(y)) < 0.8, y, 1 - y)
    scores = {
        make_task((y, a), (y, attribute), budget="none").selector()(predictions)
        for attribute in (a, 1 - a, rng.permutation(a))
    }
    assert len(scores) == 1


@pytest.mark.parametrize("rung", ["select", "val", "train+val"])
def test_selection_by_groups_bills_the_images_it_reads(rung: str) -> None:
    val = split_of((40, 10, 10, 40), make_card())
    task = make_task(val, val, budget=rung)
    choose = task.selector(np.arange(30))
    assert choose.rows.tolist() == list(range(30))
    assert len(choose.truth) == len(choose.groups.index) == 30
    assert {name: n for name, n in ledger(task).items() if n} == {"n_val_a_select": 30, "total_a": 30}


@pytest.mark.parametrize("rung", ["select-5", "select-20", "val-5", "val-20"])
def test_selection_looks_at_the_granted_images_alone(rung: str) -> None:
    val = split_of((40, 10, 10, 40), make_card())
    task = make_task(val, val, budget=rung)
    choose = task.selector()
    n = {5: 5, 20: 20}[int(rung.partition("-")[2])]
    assert len(choose.rows) == n
    assert np.array_equal(choose.groups.index, 2 * val[0][choose.rows] + val[1][choose.rows, 0])
    predictions = np.random.default_rng(0).integers(0, 2, 100)
    elsewhere = np.where(np.isin(np.arange(100), choose.rows), predictions, 1 - predictions)
    assert choose(predictions) == choose(elsewhere)
    assert {name: n for name, n in ledger(task).items() if n} == {"n_val_a_select": n, "total_a": n}
    assert np.array_equal(task.selector(np.arange(50)).rows, choose.rows[choose.rows < 50])


def test_choose_tells_criterion_value_and_candidates() -> None:
    val = split_of((40, 10, 10, 40), make_card())
    task = make_task(val, val, budget="select")
    best, choice = task.choose(candidates([ACCURATE, GROUP_BALANCED], TOTAL))
    assert best == 1
    assert (choice.criterion, choice.value, choice.step, choice.candidates) == ("val-wga", 0.8, None, 2)
