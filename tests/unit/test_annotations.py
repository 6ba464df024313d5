import re
from typing import get_args

import numpy as np
import pytest
from stubs import ledger, make_card, make_task, split_of, tiny_task
from worstgroup.benchmark.annotations import Annotations, Held, Purpose
from worstgroup.benchmark.budget import RUNGS, Budget
from worstgroup.benchmark.errors import BudgetExceeded, UnknownName, UserError

CARD = make_card(["background", "object"])
N_TRAIN, N_VAL = 80, 24
TRAIN, VAL = split_of([10] * 8, CARD), split_of([3] * 8, CARD)

DOORS: list[tuple[Held, Purpose]] = [("train", "fit"), ("train", "select"), ("val", "fit"), ("val", "select")]
TRAIN_FIT, TRAIN_SELECT, VAL_FIT, VAL_SELECT = DOORS
GRANTED: dict[str, dict[tuple[Held, Purpose], int]] = {
    "none": {},
    "select-1": {VAL_SELECT: 4},  # two of each class
    "select-5": {VAL_SELECT: 4},
    "select-20": {VAL_SELECT: 5},
    "select": {VAL_SELECT: 24},
    "val-1": {VAL_FIT: 4, VAL_SELECT: 4},
    "val-5": {VAL_FIT: 4, VAL_SELECT: 4},
    "val-20": {VAL_FIT: 5, VAL_SELECT: 5},
    "val": {VAL_FIT: 24, VAL_SELECT: 24},
    "train-1": {TRAIN_FIT: 4, VAL_FIT: 24, VAL_SELECT: 24},
    "train-10": {TRAIN_FIT: 8, VAL_FIT: 24, VAL_SELECT: 24},
    "train-33": {TRAIN_FIT: 26, VAL_FIT: 24, VAL_SELECT: 24},
    "train+val": {TRAIN_FIT: 80, VAL_FIT: 24, VAL_SELECT: 24},
}
"""How many images each door of a rung opens for."""


def view(budget: str) -> Annotations:
    return Annotations(
        CARD, {"train": TRAIN[0], "val": VAL[0]}, {"train": TRAIN[1], "val": VAL[1]}, Budget.parse(budget)
    )


def used(annotations: Annotations) -> dict[str, int]:
    return {name: n for name, n in vars(annotations.ledger()).items() if n}


# ---------------------------------------------------------------------------------------------------- the metered view


@pytest.mark.parametrize("door", DOORS, ids="-".join)
@pytest.mark.parametrize("rung", RUNGS)
def test_doors_of_every_rung(rung: str, door: tuple[Held, Purpose]) -> None:
    annotations, everything = view(rung), {"train": N_TRAIN, "val": N_VAL}[door[0]]
    rows = annotations.rows(*door)
    assert len(rows) == GRANTED[rung].get(door, 0)
    if len(rows) < everything:
        n = everything - len(rows)
        says = rf"budget {re.escape(rung)} .* of {n} of {everything} requested {door[0]} images for {door[1]}"
        with pytest.raises(BudgetExceeded, match=says):
            annotations.attributes(*door)
        with pytest.raises(BudgetExceeded):
            annotations.attributes(*door, np.setdiff1d(np.arange(everything), rows)[:1])
    assert not used(annotations)
    if len(rows):
        found = annotations.attributes(*door, rows)
        assert found.sizes == (2, 2)
        assert np.array_equal(found.values, {"train": TRAIN, "val": VAL}[door[0]][1][rows])


@pytest.mark.parametrize("purpose", get_args(Purpose))
def test_there_is_no_door_to_test(purpose: Purpose) -> None:
    with pytest.raises(KeyError, match="test"):
        view("train+val").attributes("test", purpose)  # type: ignore[arg-type]


@pytest.mark.parametrize("ask", ["attributes", "groups", "y", "annotated"])
def test_a_task_has_no_door_to_test(ask: str) -> None:
    with pytest.raises(BudgetExceeded, match="the test split is not for methods"):
        getattr(tiny_task("groupdro"), ask)("test")


def test_the_ladder_is_the_one_of_the_specification() -> None:
    assert list(RUNGS) == list(GRANTED)
    few = [f"{rung}-{share}" for rung, shares in (("select", (1, 5, 20)), ("train", (1, 10, 33))) for share in shares]
    assert {name for name, rung in RUNGS.items() if rung.optional} == {*few, "val-1"}
    for name, rung in RUNGS.items():
        assert {TRAIN_FIT: bool(rung.train), TRAIN_SELECT: False, VAL_FIT: rung.val_fit, VAL_SELECT: rung.val > 0} == {
            door: door in GRANTED[name] for door in DOORS
        }


CRITERIA_OF_RUNGS = {"val-worst-class": ["none"], "val-wga": ["select", "train-1", "train-10", "train-33", "train+val"]}


@pytest.mark.parametrize("rung", RUNGS)
def test_where_few_images_are_seen_or_half_are_fitted_on_selection_is_smoothed(rung: str) -> None:
    named = [name for name, rungs in CRITERIA_OF_RUNGS.items() if rung in rungs]
    assert [RUNGS[rung].criterion] == (named or ["val-wga-smoothed"])


def test_groups_are_the_true_cells() -> None:
    groups = view("train+val").attributes("train", "fit").groups(TRAIN[0], 2)
    assert np.array_equal(groups.index, np.repeat(np.arange(8), 10))
    assert groups.counts().tolist() == [10] * 8


def test_groups_of_some_images_keep_their_order_and_all_cells() -> None:
    rows = np.array([23, 0, 4])
    groups = view("val").attributes("val", "fit", rows).groups(VAL[0][rows], 2)
    assert groups.index.tolist() == [7, 0, 1]
    assert groups.counts().tolist() == [1, 1, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("budget", "index"), [("val:background", [0, 0, 1, 1, 2, 2, 3, 3]), ("val:object", [0, 1, 0, 1, 2, 3, 2, 3])]
)
def test_a_grant_of_one_attribute_pools_the_other(budget: str, index: list[int]) -> None:
    annotations = view(budget)
    attributes = annotations.attributes("val", "fit")
    groups = attributes.groups(VAL[0], 2)
    assert attributes.sizes == (2,)
    assert np.array_equal(groups.index, np.repeat(index, 3))
    assert groups.num == 4


def test_attributes_stand_in_the_order_of_the_card() -> None:
    assert Budget.parse("val:object,background").columns(CARD) == Budget.parse("val").columns(CARD) == (0, 1)


# ---------------------------------------------------------------------------------------------------------- the ledger


@pytest.mark.parametrize(("budget", "k"), [("val", 2), ("val:background,object", 2), ("val:object", 1)])
def test_an_image_costs_one_label_per_granted_attribute(budget: str, k: int) -> None:
    annotations = view(budget)
    annotations.attributes("val", "select")
    assert used(annotations) == {"n_val_a_select": k * N_VAL, "total_a": k * N_VAL}


def test_fitting_and_selecting_on_an_image_costs_once_in_total() -> None:
    annotations = view("val:object")
    annotations.attributes("val", "fit", np.arange(0, 16))
    annotations.attributes("val", "select", np.arange(12, 24))
    assert used(annotations) == {"n_val_a_fit": 16, "n_val_a_select": 12, "total_a": 24}


def test_asking_again_is_free() -> None:
    annotations = view("val:object")
    for _ in range(3):
        annotations.attributes("val", "fit", np.arange(5))
    annotations.attributes("val", "fit", np.array([4, 4, 5]))
    assert used(annotations) == {"n_val_a_fit": 6, "total_a": 6}


def test_full_ledger_of_the_richest_rung() -> None:
    annotations = view("train+val")
    for door in GRANTED["train+val"]:
        annotations.attributes(*door)
    assert used(annotations) == {
        "n_train_a": 2 * N_TRAIN,
        "n_val_a_fit": 2 * N_VAL,
        "n_val_a_select": 2 * N_VAL,
        "total_a": 2 * (N_TRAIN + N_VAL),
    }


def test_class_labels_of_validation_are_extra_when_fitted_on() -> None:
    annotations = view("none")
    annotations.bill_labels(np.arange(10))
    annotations.bill_labels(np.arange(5, 12))
    assert used(annotations) == {"n_y_extra": 12}


def test_a_task_bills_class_labels_only_for_fitting_on_validation() -> None:
    task = make_task(TRAIN, VAL, card=CARD, budget="none")
    task.y("train", fit=True)
    task.y("val")
    assert not any(ledger(task).values())
    task.y("val", fit=np.array([3, 5]))
    assert ledger(task)["n_y_extra"] == 2
    task.y("val", fit=True)
    assert ledger(task)["n_y_extra"] == N_VAL


@pytest.mark.parametrize("split", ["train", "val"])
def test_under_class_a_task_hands_out_classes_and_bills_nothing(split: Held) -> None:
    task = make_task(TRAIN, VAL, card=CARD, budget="none", policy="class")
    groups = task.groups(split)
    assert np.array_equal(groups.index, task.y(split))
    assert groups.num == 2
    some = task.groups(split, np.array([0, 23]))
    assert np.array_equal(some.index, task.y(split)[[0, 23]])
    assert not any(ledger(task).values())


# -------------------------------------------------------------------------------------------------- budgets as typed


@pytest.mark.parametrize("text", [*RUNGS, "val:background", "val-20:object", "train+val:background,object"])
def test_a_budget_is_printed_as_it_is_typed(text: str) -> None:
    assert str(Budget.parse(text)) == text


def test_budget_parts() -> None:
    assert Budget.parse("val:object") == Budget("val", ("object",))
    assert [Budget(rung).order for rung in RUNGS] == list(range(13))
    assert Budget("val").grant is RUNGS["val"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vall", "unknown budget 'vall'. Did you mean val?"),
        ("train-val", r"unknown budget 'train-val'. Did you mean train\+val"),
        ("", "unknown budget ''. Known: none, select"),
        (":object", "unknown budget ''"),
        ("val:", "budget 'val:' ends in a colon: write 'val', or val:ATTRIBUTE"),
        ("val:,", "ends in a colon"),
    ],
)
def test_a_budget_that_is_none(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Budget.parse(text)


def test_an_unknown_attribute_offers_the_closest() -> None:
    with pytest.raises(UnknownName, match=r"unknown attribute of toy 'objekt'. Did you mean object\?"):
        Budget.parse("val:background,objekt").columns(CARD)


@pytest.mark.parametrize("text", ["val:object,background", "val:object,object"])
def test_a_budget_has_one_name(text: str) -> None:
    plain = {"val:object,background": "val:background,object", "val:object,object": "val:object"}
    assert Budget.parse(text) == Budget.parse(plain[text])


def test_a_rung_that_grants_nothing_names_no_attribute() -> None:
    with pytest.raises(UserError, match="none grants no attribute"):
        Budget.parse("none:object")
