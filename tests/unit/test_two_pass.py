"""Runs that train on validation images: half of them select first, then the model is fitted on all of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import edit, plan_tiny, put
from numpy.typing import NDArray
from stubs import ledger, make_card, make_task, split_of, tiny_task
from worstgroup.benchmark import engine, fitting, runner
from worstgroup.benchmark.engine import Training, Trajectory
from worstgroup.benchmark.errors import BudgetExceeded, UserError
from worstgroup.benchmark.planning import Request
from worstgroup.benchmark.planning import plan as make_plan
from worstgroup.benchmark.record import RunRecord, predictions_path, record_path
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import RunSpec
from worstgroup.benchmark.task import Choice, Decision, Decisions, Task
from worstgroup.leaderboard.verify import Verdict, verify
from worstgroup.leaderboard.verify_dataset import CHECKED

pytestmark = pytest.mark.usefixtures("tiny")

TRAIN, EPOCHS = 96, 4


def planned(method: str, budget: str) -> tuple[RunSpec, Callable[..., RunRecord]]:
    """A run's specification, and what makes the run."""
    plan = plan_tiny(method, budget=budget, recipe__epochs=str(EPOCHS))
    spec, store = plan.runs[0].spec, plan.stores["tiny"]
    assert spec is not None
    return spec, lambda **options: run_spec(spec, store, **options)


def made(method: str, budget: str) -> tuple[RunRecord, Path]:
    """A finished record, and where it lies."""
    spec, run = planned(method, budget)
    record = run()
    assert record.status == "finished", record.error
    return record, record_path(runner.runs_home(), spec)


@pytest.fixture
def watched(unguarded: None, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Task], list[Training]]:
    """Tasks and trainings of the runs that follow."""
    tasks: list[Task] = []
    trainings: list[Training] = []
    call, fit = fitting._call, engine.fit

    def noted_call(spec: RunSpec, task: Task) -> Any:
        tasks.append(task)
        return call(spec, task)

    def noted_fit(objective: Any, model: Any, sampler: Any, training: Training) -> Trajectory:
        trainings.append(training)
        return fit(objective, model, sampler, training)

    monkeypatch.setattr(fitting, "_call", noted_call)
    monkeypatch.setattr(engine, "fit", noted_fit)
    return tasks, trainings


def test_the_model_is_fitted_on_all_granted_images_for_as_long_as_one_half_chose(
    watched: tuple[list[Task], list[Training]],
) -> None:
    record, path = made("erm(+val)", "val-20")
    (first, second), (search, final) = watched
    granted = tiny_task("erm", "val-20").annotated("val")
    assert first._seen.pool is not None
    assert second._seen.pool is not None
    assert first._select is not None
    assert not set(first._seen.pool.val) & set(first._select)
    assert np.array_equal(np.union1d(first._seen.pool.val, first._select), granted)
    assert np.array_equal(second._seen.pool.val, granted)
    assert (len(first._seen.pool.val), len(first._select), len(granted)) == (4, 6, 10)

    step = record.selection and record.selection.step
    assert step == 2  # not the last: there is something to cut short
    assert (search.stop, len(search.train), search.stage) == (EPOCHS, TRAIN + 4, "search:train")
    assert (final.stop, len(final.train), final.stage) == (step, TRAIN + 10, "train")
    assert final.selector is None
    assert final.recipe == search.recipe  # and with it the horizon of the schedule
    assert (len(record.search), len(record.history)) == (EPOCHS, step)
    assert record.selection is not None
    assert sum(record.selection.seen) == 6
    assert record.labels is not None
    assert record.labels.n_y_extra == 10
    assert (record.labels.n_val_a_fit, record.labels.n_val_a_select, record.labels.total_a) == (0, 12, 12)
    assert verify(path).problems == ()


@pytest.mark.parametrize(
    ("method", "budget", "labels", "extra"),
    [
        ("groupdro@subset", "val", (0, 96, 48, 96), 48),
        ("groupdro@subset", "train-33", (64, 0, 96, 160), 0),
        ("dann@masked", "val-20", (0, 20, 12, 20), 10),
        ("groupdro", "val-20", (0, 20, 20, 20), 0),
        ("groupdro(+val)", "val-20", (0, 20, 12, 20), 10),
        ("groupdro@class(+val)", "val-20", (0, 0, 12, 12), 10),
        ("resample(+val)", "train+val", (192, 96, 48, 288), 48),
        ("jtt(+val)", "val:stripe", (0, 0, 24, 24), 48),
    ],
)
def test_labels_of_runs_on_some_attributes(method: str, budget: str, labels: tuple[int, ...], extra: int) -> None:
    record, path = made(method, budget)
    used = record.labels
    assert used is not None
    assert (used.n_train_a, used.n_val_a_fit, used.n_val_a_select, used.total_a) == labels
    assert used.n_y_extra == extra
    assert bool(record.search) == bool(extra)
    assert verify(path).problems == ()


def test_both_passes_are_billed() -> None:
    cost = made("groupdro(+val)", "train+val")[0].cost
    assert cost is not None
    passes = {name: stage.n_fwd for name, stage in cost.stages.items()}
    step = passes["train"] // (TRAIN + 48)
    assert passes == {"search:train": EPOCHS * (TRAIN + 24), "train": step * (TRAIN + 48)}
    assert cost.scratch.n_fwd == sum(passes.values())


@pytest.mark.parametrize(("stage", "epoch"), [("search:train", 3), ("train", 1)])
def test_a_run_killed_in_either_pass_goes_on_to_the_same_bits(stage: str, epoch: int) -> None:
    def kill(name: str, done: int, epochs: int) -> None:
        if (name, done) == (stage, epoch):
            raise KeyboardInterrupt

    spec, run = planned("groupdro(+val)", "val-20")
    path = record_path(runner.runs_home(), spec)
    straight, before = run(), predictions_path(path).read_bytes()
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(progress=kill)
    again = run()
    assert predictions_path(path).read_bytes() == before
    assert (again.search, again.history, again.selection) == (straight.search, straight.history, straight.selection)
    assert again.labels == straight.labels
    assert again.cost is not None
    assert straight.cost is not None
    assert again.cost.scratch.n_fwd == straight.cost.scratch.n_fwd


# ------------------------------------------------------------------------------------------------ replayed decisions


def refused() -> Iterator[NDArray[np.int64]]:
    raise AssertionError("a replayed decision looks at no prediction")
    yield


def test_replayed_decisions_come_in_order_and_read_nothing() -> None:
    split = split_of((5, 5, 5, 5), make_card())
    plain = make_task(split, split, budget="val")
    made = [(3, Choice("val-wga-smoothed", 0.7, None, 5)), (0, Choice("val-wga-smoothed", 0.9, None, 2))]
    task = Task(
        plain.spec, plain._lab, plain._annotations, decisions=Decisions([Decision("choose", *pair) for pair in made])
    )
    assert [task.choose(refused()), task.choose(refused())] == made
    with pytest.raises(UserError, match="the second fit comes to 'choose', where the first one did not"):
        task.choose(refused())
    with pytest.raises(UserError, match="all it may choose was chosen before"):
        task.selector()
    assert not any(ledger(task).values())


def test_a_decision_is_replayed_where_it_was_made() -> None:
    plain = tiny_task("erm", "val")
    made = [Decision("head", 2, Choice("val-wga-smoothed"))]
    task = Task(plain.spec, plain._lab, plain._annotations, decisions=Decisions(made))
    with pytest.raises(UserError, match="the second fit comes to 'train'"):
        task.train(engine.Objective(None))


def test_a_replayed_training_stops_at_the_decided_epoch() -> None:
    plain = tiny_task("erm", "val", recipe__epochs="3")
    choice = Choice("val-wga-smoothed", 0.25, 2, 3)
    task = Task(plain.spec, plain._lab, plain._annotations, decisions=Decisions([Decision("train", 2, choice)]))
    predictor = task.train(engine.Objective(None))
    assert predictor.trajectory is not None
    assert (predictor.choice, len(predictor.trajectory.epochs)) == (choice, 2)
    assert not any(ledger(task).values())


def test_what_it_selects_by_is_within_the_grant() -> None:
    """The engine itself asks the same metered view as a method does."""
    plain = tiny_task("erm", "val-20")
    wide = Task(plain.spec, plain._lab, plain._annotations, select=np.arange(48))
    assert np.array_equal(wide.selector().rows, plain.annotated("val"))
    with pytest.raises(BudgetExceeded):
        wide._annotations.attributes("val", "select")


# ---------------------------------------------------------------------------------------------------------- forgeries


def moved(content: dict[str, Any]) -> None:
    """Count one image as seen that was fitted on."""
    seen, groups = content["selection"]["seen"], content["groups"]
    free = next(g for g, n in enumerate(seen) if n < groups[g]["m_val"])
    seen[free] += 1


FORGERIES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("more images seen", put("selection.seen", [12, 5, 5, 2, 2, 5, 5, 12]), "selection.seen"),
    ("all granted images seen", put("selection.seen", [3, 2, 0, 0, 1, 2, 1, 1]), "selection.seen"),
    ("no image seen", put("selection.seen", [0] * 8), "selection.seen"),
    ("one image more seen", moved, "selection.seen"),
    ("cells missing", put("selection.seen", [3, 3]), "selection.seen"),
    ("more right than seen", put("search.0.correct_seen", [12, 5, 5, 2, 2, 5, 5, 12]), "search"),
    ("another epoch", put("selection.step", 1), "history"),
    ("an epoch of the fit left out", lambda content: content["history"].pop(), "history"),
    ("an epoch of the fit made up", lambda content: content["history"].append(content["history"][-1]), "history"),
    ("the search cut off", lambda content: content["search"].clear(), "selection.seen"),
    (
        "the best epoch of the search cut off",
        lambda content: content["search"].__delitem__(slice(1, None)),
        "selection",
    ),
    ("the fit's last epoch", put("history.1.correct_val", [0] * 8), "history.1.correct_val"),
    ("extra images denied", put("extra", ""), "run"),
    ("a setting of the source", put("source_config.clusters", 3), "run"),
]


def test_forged_searches_are_named() -> None:
    _, path = made("erm(+val)", "val-20")
    original = path.read_text()
    assert json.loads(original)["selection"]["seen"] == [2, 1, 0, 0, 1, 2, 0, 0]
    for case, change, field in FORGERIES:
        path.write_text(original)
        edit(path, change)
        problems = verify(path).problems
        assert any(problem.startswith(field) for problem in problems), (case, problems)


def test_forged_images_of_a_share_are_named() -> None:
    """Without a search the granted images are known, so that every count of them is checked."""
    _, path = made("groupdro@class", "val-5")
    original = path.read_text()
    assert verify(path).problems == ()
    step = json.loads(original)["selection"]["step"]
    for dotted in ("selection.seen", f"history.{step - 1}.correct_seen"):
        for g in range(8):
            path.write_text(original)
            edit(path, lambda content, g=g, dotted=dotted: shift(content, dotted, g))  # type: ignore[misc]
            assert any(problem.startswith(dotted.split(".")[0]) for problem in verify(path).problems), (dotted, g)


def test_without_labels_the_number_of_images_seen_is_bounded() -> None:
    plan = make_plan([Request("tinyvariants:secret", "erm", "val-20", seeds=(0,), extra="val")])
    assert plan.runs[0].spec is not None
    run_spec(plan.runs[0].spec, plan.stores["tinyvariants:secret"])
    path = record_path(runner.runs_home(), plan.runs[0].spec)
    assert verify(path) == Verdict(path, "metrics", (), (CHECKED,))
    edit(path, put("selection.seen", [3, 2, 0, 0, 1, 2, 1, 1]))
    assert any("10 images, budget val-20 grants 10" in problem for problem in verify(path).problems)


def shift(content: dict[str, Any], dotted: str, g: int) -> None:
    """Add one to a count in a list."""
    value: Any = content
    for part in dotted.split("."):
        value = value[int(part) if part.isdigit() else part]
    value[g] += 1
