"""Selections belong to the run: not to what runs share, and not to a second fit; and what a stream of a task is."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from numpy.typing import NDArray
from stubs import ledger, make_card, make_task, split_of, tiny_task
from torch import Tensor
from torch.nn import functional as F
from worstgroup.benchmark.annotations import Indices
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.lab import Arrays
from worstgroup.benchmark.record import RunRecord
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.task import Pool, Predictor, Task

TRAIN, VAL, EPOCHS = 96, 48, 2
Register = Callable[..., None]
Fit = Callable[[Task], Predictor]


def method(fit: Fit) -> type[Any]:
    """A method without settings that fits so."""

    class Method:
        def __init__(self, config: Any) -> None:
            self.config = config

        def fit(self, task: Task) -> Predictor:
            return fit(task)

    Method.__module__ = __name__
    return Method


def run(name: str, budget: str = "") -> RunRecord:
    """The record of a run of seed 0, failed or not."""
    plan = plan_tiny(name, budget=budget)
    assert plan.runs[0].spec is not None
    return run_spec(plan.runs[0].spec, plan.stores["tiny"])


def candidates(task: Task) -> list[NDArray[np.int64]]:
    """Two predictions to choose from."""
    return [np.zeros(task.size("val"), np.int64), task.y("val")]


# --------------------------------------------------------------------------------------------- in what runs share


CHOOSERS: dict[str, Callable[[Task], object]] = {
    "train": lambda task: task.train(Objective(None)),
    "choose": lambda task: task.choose(candidates(task)),
    "select_erm": lambda task: task.select_erm(),
    "select_erm of a stream": lambda task: task.on(np.arange(80), np.arange(0), select=np.arange(48)).select_erm(),
}


@pytest.mark.parametrize("budget", ["none", "val"])
@pytest.mark.parametrize("chooser", CHOOSERS)
def test_what_runs_share_selects_nothing(chooser: str, budget: str) -> None:
    task = tiny_task("erm", budget)
    read: list[object] = []

    def make() -> Arrays:
        read.append(CHOOSERS[chooser](task))
        return {}

    for labelled in (False, True):
        with pytest.raises(UserError, match=r"a selection belongs to the run: move it out of task\.cached"):
            task.cached("demo", None, make, labelled=labelled)
    assert (read, task.decisions.made) == ([], [])
    assert ledger(task)["total_a"] == 0
    CHOOSERS[chooser](task)  # the refusal ends with what was to be shared


def test_what_runs_share_may_train_networks() -> None:
    task = tiny_task("erm")
    stream = task.on(np.arange(80), np.arange(0))

    def make() -> Arrays:
        trained = stream.train_network(Objective(None), task.network(2, "other"), "other")
        return {"logits": task.logits(trained, "val").numpy()}

    assert task.cached("demo", None, make)["logits"].shape == (VAL, 2)


# ------------------------------------------------------------------------------------------------ in a second fit


def fits(times: list[int], extra: int) -> Fit:
    """Chooses twice in the first fit and so many times more or fewer in the second."""

    def fit(task: Task) -> Predictor:
        times.append(0)
        for _ in range(2 + extra * (len(times) - 1)):
            task.choose(candidates(task))
            times[-1] += 1
        return task.train(Objective(None))

    return fit


def test_as_many_selections_in_the_second_fit_pass(register: Register) -> None:
    times: list[int] = []
    register("probe", method(fits(times, 0)))
    record = run("probe(+val)", "val")
    assert (record.status, times) == ("finished", [2, 2]), record.error


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (1, "the second fit comes to 'choose', where the first one did not: fit must always do the same"),
        (-1, "the second fit comes to 'train', where the first one did not: fit must always do the same"),
    ],
)
def test_another_selection_in_the_second_fit_fails(register: Register, extra: int, says: str) -> None:
    times: list[int] = []
    register("probe", method(fits(times, extra)))
    record = run("probe(+val)", "val")
    assert (record.status, record.error) == ("failed", says)
    assert len(times) == 2


def test_a_selection_left_out_of_the_second_fit_fails(register: Register) -> None:
    calls: list[Task] = []

    def fit(task: Task) -> Predictor:
        calls.append(task)
        predictor = task.train(Objective(None))
        if len(calls) == 1:
            task.choose(candidates(task))
        return predictor

    register("probe", method(fit))
    record = run("probe(+val)", "val")
    assert record.status == "failed"
    assert record.error == "probe: the second fit made fewer selections than the first: it must do the same"


def test_the_rule_is_not_to_be_had_in_the_second_fit(register: Register) -> None:
    calls: list[Task] = []

    def fit(task: Task) -> Predictor:
        calls.append(task)
        predictor = task.train(Objective(None))
        task.selector().best(candidates(task))
        return predictor

    register("probe", method(fit))
    record = run("probe(+val)", "val")
    assert (len(calls), record.status) == (2, "failed")
    assert record.error == "this fit is on the images that were selected by: all it may choose was chosen before"
    assert run("probe", "val").status == "finished"


def test_a_stream_of_the_second_fit_replays_too(register: Register) -> None:
    """The decision of a stream is one of its task, wherever the stream trains."""
    tasks: list[Task] = []

    def fit(task: Task) -> Predictor:
        tasks.append(task)
        rows = np.arange(80)
        return task.on(rows, np.arange(0), select=np.arange(VAL)).train(Objective(None))

    register("probe", method(fit))
    record = run("probe(+val)", "val")
    assert record.status == "finished", record.error
    first, second = tasks
    assert [decision.place for decision in first.decisions.made] == ["train"]
    assert second.decisions.made == []
    assert record.selection is not None
    assert len(record.history) == record.selection.step == first.decisions.made[0].position


# ---------------------------------------------------------------------------------------------------------- streams


class Watching(Objective[Any]):
    """Notes the labels of every image it was shown, by index; those of images without a label are left out."""

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        self.seen: dict[int, int] = {}

    def loss(self, batch: Batch) -> Tensor:
        self.seen.update(zip(batch.index.tolist(), batch.y.tolist(), strict=True))
        known = batch.y >= 0
        logits = self.model(batch.x)
        return F.cross_entropy(logits[known], batch.y[known]) if known.any() else logits.sum() * 0


def trained(task: Task) -> list[int]:
    """Labels (n,) of the images that a network was shown in one training, in the task's order."""
    objective = Watching(None)
    task.train_network(objective, task.network(2, "watching"), "watching")
    return [objective.seen[i] for i in range(task.size("train"))]


ROWS: Indices = np.array([5, 40, 2, 95])
HELD: Indices = np.array([7, 3, 47])


def test_without_images_to_select_by_no_classifier_is_trained() -> None:
    task = tiny_task("erm", "val")
    for stream in (task.on(ROWS, HELD), task.on(np.arange(80), np.arange(0), labels=False)):
        for choose in (lambda: stream.train(Objective(None)), stream.select_erm, lambda: stream.choose([])):  # noqa: B023
            with pytest.raises(UserError, match="budget val: there is no image to select by"):
                choose()
    assert task.decisions.made == []
    assert not task._lab.clock.stages


def test_a_stream_trains_on_its_rows_and_selects_by_its_own() -> None:
    """As AFR does: a classifier on 80 % of train, which is selected by some images of validation."""
    task = tiny_task("erm", "val")
    some = np.sort(task.rng("part").permutation(TRAIN)[:76])
    stream = task.on(some, np.arange(0), select=np.arange(10, 30))
    assert np.array_equal(stream.y("train"), task.y("train")[some])
    assert stream.selector().rows.tolist() == [*range(10, 30)]
    predictor = stream.train(Objective(None))
    cost = task._lab.clock.stages["train"]
    assert cost.n_fwd == EPOCHS * 76
    (decision,) = task.decisions.made
    assert (decision.place, decision.choice) == ("train", predictor.choice)
    assert predictor.trajectory is not None
    assert decision.position == predictor.trajectory.step
    assert (predictor.choice.criterion, predictor.choice.candidates) == ("val-wga-smoothed", EPOCHS)
    assert ledger(task) == {
        "n_train_a": 0,
        "n_val_a_fit": 0,
        "n_val_a_select": 40,
        "n_env": 0,
        "n_y_extra": 0,
        "total_a": 40,
        "n_rendered": 0,
    }


@pytest.mark.parametrize(("labels", "billed"), [(True, 3), (False, 0)])
def test_labels_of_validation_rows_are_billed_or_kept_away(labels: bool, billed: int) -> None:
    task = tiny_task("erm")
    stream = task.on(ROWS, HELD, labels=labels)
    held = task.y("val")[HELD].tolist() if labels else [-1] * 3
    expected = [*task.y("train")[ROWS].tolist(), *held]
    assert stream.y("train").tolist() == expected
    assert trained(stream) == expected
    assert ledger(task)["n_y_extra"] == billed
    assert task.y("val").min() == 0  # the split itself keeps its labels
    assert stream.y("val").min() == 0


def test_a_stream_of_unlabelled_images_alone() -> None:
    task = tiny_task("erm")
    stream = task.on(np.arange(0), np.arange(VAL), labels=False)
    assert (stream.size("train"), stream.size("val")) == (VAL, VAL)
    assert trained(stream) == [-1] * VAL
    assert task._lab.clock.stages["watching"].n_fwd == EPOCHS * VAL
    shown, own = (torch.cat(list(part)) for part in (stream.images("train"), task.images("val")))
    assert torch.equal(shown, own)
    assert not any(ledger(task).values())


# ------------------------------------------------------------------------------------------------- rows of a pool


SIZES = (40, 10, 10, 40)


def pooled(budget: str, val: Indices) -> Task:
    train, held = split_of(SIZES, make_card()), split_of((20, 5, 5, 20), make_card())
    plain = make_task(train, held, budget=budget)
    return Task(plain.spec, plain._lab, plain._annotations, pool=Pool(np.array([60, 3, 45, 99]), val))


@pytest.mark.parametrize("rows", [[5, 0, 6, 2], [3, 2, 1, 0], [6, 5, 4], [1, 1, 5, 1], [4]])
def test_attributes_of_some_rows_of_a_pool_come_as_asked(rows: list[int]) -> None:
    task = pooled("train+val", np.array([49, 0, 22]))
    (_, train), (_, val) = split_of(SIZES, make_card()), split_of((20, 5, 5, 20), make_card())
    everything = np.concatenate([train[[60, 3, 45, 99], 0], val[[49, 0, 22], 0]])
    assert task.attributes("train", np.array(rows)).values[:, 0].tolist() == everything[rows].tolist()
    of_train = len({row for row in rows if row < 4})
    of_val = len({row for row in rows if row >= 4})
    used = ledger(task)
    assert (used["n_train_a"], used["n_val_a_fit"], used["total_a"]) == (of_train, of_val, of_train + of_val)


def test_rows_of_a_pool_that_are_granted_can_be_read_beside_others() -> None:
    """What is not asked for need not be granted."""
    granted = pooled("val-20", np.arange(1)).annotated("val")
    task = pooled("val-20", granted)
    assert task.attributes("train", np.array([8, 4])).values.shape == (2, 1)
    assert (ledger(task)["n_train_a"], ledger(task)["n_val_a_fit"]) == (0, 2)
    assert task.attributes("train", np.arange(0)).values.shape == (0, 1)
    with pytest.raises(UserError, match="1 of 1 requested train images"):
        task.attributes("train", np.array([4, 0]))
