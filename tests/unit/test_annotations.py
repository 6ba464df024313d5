from typing import get_args

import numpy as np
import pytest
from stubs import ledger, make_card, make_task, split_of
from worstgroup.benchmark.annotations import Annotations, Held, Purpose
from worstgroup.benchmark.errors import BudgetExceeded, UnknownName, UserError
from worstgroup.benchmark.registry import METHODS
from worstgroup.benchmark.spec import RUNGS, Budget, Policy, Requires

CARD = make_card(["background", "object"])
N_TRAIN, N_VAL = 80, 24
TRAIN, VAL = split_of([10] * 8, CARD), split_of([3] * 8, CARD)

DOORS: list[tuple[Held, Purpose]] = [("train", "fit"), ("train", "select"), ("val", "fit"), ("val", "select")]
GRANTED: dict[str, set[tuple[Held, Purpose]]] = {
    "none": set(),
    "select": {("val", "select")},
    "val": {("val", "fit"), ("val", "select")},
    "train+val": {("train", "fit"), ("val", "fit"), ("val", "select")},
}


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
    annotations = view(rung)
    if door in GRANTED[rung]:
        assert annotations.groups(*door).num == 8
    else:
        with pytest.raises(
            BudgetExceeded, match=rf"budget {RUNGS[rung].name.replace('+', '.')} .* {door[0]} for {door[1]}"
        ):
            annotations.groups(*door)
        assert not used(annotations)


@pytest.mark.parametrize("purpose", get_args(Purpose))
def test_there_is_no_door_to_test(purpose: Purpose) -> None:
    with pytest.raises(BudgetExceeded, match="test"):
        view("train+val").groups("test", purpose)  # type: ignore[arg-type]


def test_the_ladder_is_the_one_of_the_specification() -> None:
    assert list(RUNGS) == ["none", "select", "val", "train+val"]
    for name, rung in RUNGS.items():
        doors = {("train", "fit"): rung.train, ("val", "fit"): rung.val_fit, ("val", "select"): rung.val_select}
        assert {door for door, open_ in doors.items() if open_} == GRANTED[name]


def test_groups_are_the_true_cells() -> None:
    groups = view("train+val").groups("train", "fit")
    assert np.array_equal(groups.index, np.repeat(np.arange(8), 10))
    assert groups.counts().tolist() == [10] * 8


def test_groups_of_some_images_keep_their_order_and_all_cells() -> None:
    groups = view("val").groups("val", "fit", np.array([23, 0, 4]))
    assert groups.index.tolist() == [7, 0, 1]
    assert groups.counts().tolist() == [1, 1, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("budget", "index"), [("val:background", [0, 0, 1, 1, 2, 2, 3, 3]), ("val:object", [0, 1, 0, 1, 2, 3, 2, 3])]
)
def test_a_grant_of_one_attribute_pools_the_other(budget: str, index: list[int]) -> None:
    annotations = view(budget)
    groups = annotations.groups("val", "fit")
    assert annotations.shape == (2, 2)
    assert np.array_equal(groups.index, np.repeat(index, 3))
    assert groups.num == 4


def test_attributes_stand_in_the_order_of_the_card() -> None:
    assert Budget.parse("val:object,background").columns(CARD) == Budget.parse("val").columns(CARD) == (0, 1)


# ---------------------------------------------------------------------------------------------------------- the ledger


@pytest.mark.parametrize(("budget", "k"), [("val", 2), ("val:background,object", 2), ("val:object", 1)])
def test_an_image_costs_one_label_per_granted_attribute(budget: str, k: int) -> None:
    annotations = view(budget)
    annotations.groups("val", "select")
    assert used(annotations) == {"n_val_a_select": k * N_VAL, "total_a": k * N_VAL}


def test_fitting_and_selecting_on_an_image_costs_once_in_total() -> None:
    annotations = view("val:object")
    annotations.groups("val", "fit", np.arange(0, 16))
    annotations.groups("val", "select", np.arange(12, 24))
    assert used(annotations) == {"n_val_a_fit": 16, "n_val_a_select": 12, "total_a": 24}


def test_asking_again_is_free() -> None:
    annotations = view("val:object")
    for _ in range(3):
        annotations.groups("val", "fit", np.arange(5))
    annotations.groups("val", "fit", np.array([4, 4, 5]))
    assert used(annotations) == {"n_val_a_fit": 6, "total_a": 6}


def test_full_ledger_of_the_richest_rung() -> None:
    annotations = view("train+val")
    for door in GRANTED["train+val"]:
        annotations.groups(*door)
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


# ------------------------------------------------------------------------------------------------ methods and budgets

NATIVE, CLASS, CARRIED = Policy(""), Policy("class"), Policy("carried")
needs_train = Policy("n/a", "needs train+val")
erm_at_select = ("erm", "select", NATIVE)


@pytest.mark.parametrize(
    ("method", "rung", "policy"),
    [
        ("erm", "none", NATIVE),
        erm_at_select,
        ("erm", "val", CARRIED),
        ("erm", "train+val", CARRIED),
        ("jtt", "none", NATIVE),
        ("jtt", "select", NATIVE),
        ("jtt", "val", CARRIED),
        ("jtt", "train+val", CARRIED),
        ("dfr", "none", CLASS),
        ("dfr", "select", CLASS),
        ("dfr", "val", NATIVE),
        ("dfr", "train+val", CARRIED),
        *(
            case
            for method in ("groupdro", "resample", "reweight")
            for case in (
                (method, "none", CLASS),
                (method, "select", CLASS),
                (method, "val", needs_train),
                (method, "train+val", NATIVE),
            )
        ),
    ],
)
def test_table_of_methods_and_rungs(method: str, rung: str, policy: Policy) -> None:
    assert METHODS[method].requires.resolve(Budget(rung)) == policy


@pytest.mark.parametrize(
    ("fit", "rung", "reason"),
    [
        ("val", "none", "needs val"),
        ("val", "select", "needs val"),
        ("train", "none", "needs train+val"),
        ("train", "select", "needs train+val"),
        ("train", "val", "needs train+val"),
    ],
)
def test_without_a_fallback_a_method_that_needs_more_does_not_run(fit: str, rung: str, reason: str) -> None:
    requires = Requires(fit=fit, native="train+val")  # type: ignore[arg-type]
    assert requires.resolve(Budget(rung)) == Policy("n/a", reason)


@pytest.mark.parametrize("rung", RUNGS)
def test_class_can_be_asked_for_at_every_rung(rung: str) -> None:
    assert METHODS["dfr"].requires.resolve(Budget(rung), "class") == CLASS
    assert METHODS["groupdro"].requires.resolve(Budget(rung), "class") == CLASS


@pytest.mark.parametrize("method", ["erm", "jtt"])
def test_class_does_not_apply_to_a_method_without_groups(method: str) -> None:
    policy = METHODS[method].requires.resolve(Budget("none"), "class")
    assert policy == Policy("n/a", "it uses no groups, so @class does not apply to it")


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_native_at_its_native_rung(name: str) -> None:
    requires = METHODS[name].requires
    assert requires.resolve(Budget.parse(requires.native)) == NATIVE


# -------------------------------------------------------------------------------------------------- budgets as typed


@pytest.mark.parametrize("text", [*RUNGS, "val:background", "train+val:background,object"])
def test_a_budget_is_printed_as_it_is_typed(text: str) -> None:
    assert str(Budget.parse(text)) == text


def test_budget_parts() -> None:
    assert Budget.parse("val:object") == Budget("val", ("object",))
    assert [Budget(rung).order for rung in RUNGS] == [0, 1, 2, 3]
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
