"""What a method may read and what it is billed: annotated images, shared arrays, and no test split."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from numpy.typing import NDArray
from stubs import ledger, make_card, make_task, split_of, tiny_task
from worstgroup.benchmark import fitting, runner
from worstgroup.benchmark.annotations import Annotations, Attributes, Held
from worstgroup.benchmark.cost import CostReport
from worstgroup.benchmark.errors import BudgetExceeded, UserError
from worstgroup.benchmark.lab import Arrays, Lab
from worstgroup.benchmark.planning import Request
from worstgroup.benchmark.planning import plan as make_plan
from worstgroup.benchmark.spec import RunSpec
from worstgroup.benchmark.task import Pool, Task

TRAIN, VAL = split_of((40, 10, 10, 40), make_card()), split_of((20, 5, 5, 20), make_card())
GRANTED = 10
"""Images that `val-20` grants, here and on `tiny`."""


def stub(budget: str, policy: str = "", pool: Pool | None = None) -> Task:
    plain = make_task(TRAIN, VAL, budget=budget, policy=policy)
    return Task(plain.spec, plain._lab, plain._annotations, pool=pool)


def used(task: Task) -> dict[str, int]:
    return {name: n for name, n in ledger(task).items() if n}


# ---------------------------------------------------------------------------------------------------------- attributes


@pytest.mark.parametrize(("budget", "n_train", "n_val"), [("val-20", 0, 10), ("val", 0, 50), ("train-10", 10, 50)])
def test_under_masked_unknown_attributes_are_minus_one(budget: str, n_train: int, n_val: int) -> None:
    task = stub(budget, "masked")
    for split, (_, a), n in (("train", TRAIN, n_train), ("val", VAL, n_val)):
        known = task.annotated(split)  # type: ignore[arg-type]
        assert len(known) == n
        expected = np.full_like(a, -1)
        expected[known] = a[known]
        found = task.attributes(split)  # type: ignore[arg-type]
        assert np.array_equal(found.values, expected)
        assert found.sizes == (2,)
        assert np.array_equal(task.groups(split).index >= 0, np.isin(np.arange(len(a)), known))  # type: ignore[arg-type]
    assert used(task) == {
        name: n for name, n in (("n_train_a", n_train), ("n_val_a_fit", n_val), ("total_a", n_train + n_val)) if n
    }


def test_under_masked_only_what_is_read_is_billed() -> None:
    task = stub("val-20", "masked")
    known = task.annotated("val")
    rows = np.concatenate([known[:3], np.setdiff1d(np.arange(50), known)[:7]])
    assert (task.attributes("val", rows).values >= 0).sum() == 3
    assert used(task) == {"n_val_a_fit": 3, "total_a": 3}


@pytest.mark.parametrize("budget", ["none", "val-20", "train+val"])
def test_where_groups_are_classes_all_images_are_annotated(budget: str) -> None:
    task = stub(budget, "class")
    assert [len(task.annotated(split)) for split in ("train", "val")] == [100, 50]  # type: ignore[arg-type]
    assert task.attributes("val").values.shape == (50, 0)
    assert not used(task)


def test_without_a_policy_only_granted_images_have_attributes() -> None:
    task = stub("val-20")
    known = task.annotated("val")
    assert (len(task.annotated("train")), len(known)) == (0, 10)
    assert np.array_equal(task.attributes("val", known).values, VAL[1][known])
    with pytest.raises(BudgetExceeded, match="of 40 of 50 requested val images for fit"):
        task.attributes("val")
    with pytest.raises(BudgetExceeded):
        task.attributes("train")


def test_a_pool_is_the_train_split_of_its_task() -> None:
    """Its images are counted from 0, rows of train before rows of validation."""
    granted = stub("val-20").annotated("val")
    rows = np.array([3, 50, 99])
    task = stub("val-20", "masked", Pool(rows, granted))
    assert task.size("train") == 13
    assert np.array_equal(task.y("train"), np.concatenate([TRAIN[0][rows], VAL[0][granted]]))
    assert task.annotated("train").tolist() == list(range(3, 13))
    assert np.array_equal(task.attributes("train", task.annotated("train")).values, VAL[1][granted])
    assert task.attributes("train", np.array([12, 0])).values[:, 0].tolist() == [VAL[1][granted[-1], 0], -1]
    assert task.size("val") == 50


def test_a_source_stands_in_for_all_attributes_and_is_asked_once() -> None:
    asked: list[Held] = []

    class Parity:
        def attributes(self, task: Task, split: Held) -> Attributes:
            asked.append(split)
            return Attributes(np.arange(task.size(split))[:, None] % 2, (2,))

    plain = stub("none")
    granted = np.arange(5)
    task = Task(plain.spec, plain._lab, plain._annotations, source=Parity(), pool=Pool(np.arange(100), granted))
    for _ in range(2):
        assert task.attributes("train").values[:, 0].tolist() == [i % 2 for i in [*range(100), *range(5)]]
    assert asked == ["train", "val"]
    assert len(task.annotated("train")) == 105
    assert not used(task)


@pytest.mark.parametrize("budget", ["select-20", "select"])
def test_images_that_only_select_are_kept_for_selecting(budget: str) -> None:
    task = stub(budget, "class")
    seen = task.selector().rows
    fit, select = task.halves(np.arange(50))
    assert (len(fit), len(select)) == (24, 26)
    assert len(np.intersect1d(seen, select)) == min(len(seen), len(select))


def test_every_method_and_backbone_is_granted_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[NDArray[np.int64]] = []

    def noted(spec: RunSpec, lab: Lab, annotations: Annotations) -> fitting.Fitted:
        rows.append(annotations.rows("val"))
        raise UserError("enough")

    monkeypatch.setattr(runner, "fit", noted)
    pairs = [("erm", "tiny_cnn"), ("dfr", "tiny_cnn"), ("erm", "mnist_cnn")]
    plan = make_plan([Request("tiny", method, "val-20", backbone, seeds=(0, 1)) for method, backbone in pairs])
    for planned in plan.runs:
        assert planned.spec is not None
        assert runner.run_spec(planned.spec, plan.stores["tiny"]).error == "enough"
    zero, one = rows[::2], rows[1::2]
    assert all(np.array_equal(zero[0], other) for other in zero)
    assert not np.array_equal(zero[0], one[0])


# ------------------------------------------------------------------------------------------------------ shared arrays


def explained(task: Task) -> Arrays:
    """Reads the shared ERM, its features, and the granted attributes."""
    features = task.features(task.erm(), "val").numpy()
    known = task.annotated("val")
    task.y("val", fit=known)
    return {"norm": np.linalg.norm(features, axis=1), "a": task.attributes("val", known).values}


def never() -> Arrays:
    raise AssertionError("it was made before")


def spent(task: Task) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    """Labels, and passes given the ERM and from scratch."""
    report = CostReport.of(task._lab.clock)
    return ledger(task), [(c.n_fwd, c.n_bwd, c.n_fwd_nograd) for c in (report.marginal, report.scratch)]


def test_who_reads_a_shared_array_pays_like_who_made_it() -> None:
    first, second = (tiny_task("dfr", "val-20") for _ in range(2))
    made = first.cached("demo", {"x": 1}, lambda: explained(first), labelled=True)
    read = second.cached("demo", {"x": 1}, never, labelled=True)
    assert made.keys() == read.keys()
    assert all(np.array_equal(made[name], read[name]) for name in made)
    assert spent(first) == spent(second)
    labels, passes = spent(second)
    assert (labels["n_val_a_fit"], labels["total_a"], labels["n_y_extra"]) == (2 * GRANTED, 2 * GRANTED, GRANTED)
    assert passes == [(0, 0, 48), (192, 192, 48)]
    assert not second._lab.clock.stages
    second.cached("demo", {"x": 1}, never, labelled=True)
    assert spent(first) == spent(second)


def test_costs_and_labels_of_nested_arrays_reach_every_reader() -> None:
    first, second, third = (tiny_task("dfr", "val-20") for _ in range(3))

    def outer(task: Task, make: Callable[[], Arrays]) -> dict[str, NDArray[Any]]:
        return task.cached("outer", None, lambda: {"n": task.cached("inner", None, make, labelled=True)["norm"][:1]})

    with pytest.raises(BudgetExceeded, match="labelled=False"):  # what is read inside counts
        outer(first, lambda: explained(first))
    assert not used(first)
    first.cached("inner", None, lambda: explained(first), labelled=True)
    with pytest.raises(BudgetExceeded, match="labelled=False"):  # also where it lies ready
        outer(second, never)
    inner = lambda task, make: task.cached("inner", None, make, labelled=True)  # noqa: E731
    second.cached("outer", None, lambda: {"n": inner(second, never)["norm"][:1]}, labelled=True)
    third.cached("outer", None, never, labelled=True)
    assert spent(first) == spent(second) == spent(third)


def test_arrays_made_without_labels_are_shared_by_all_budgets_and_refuse_attributes() -> None:
    poor, rich = tiny_task("erm", "none"), tiny_task("dfr", "val")
    features = lambda task: {"f": task.features(task.erm(), "val").numpy()}  # noqa: E731
    made = poor.cached("demo", None, lambda: features(poor))
    assert np.array_equal(rich.cached("demo", None, never)["f"], made["f"])
    for read in (lambda: rich.attributes("val"), lambda: rich.selector()):
        with pytest.raises(BudgetExceeded, match="labelled=False"):
            rich.cached("labels", None, lambda read=read: {"a": read().values})  # type: ignore[misc]
    assert not used(rich)
    assert len(rich.attributes("val").values) == 48  # the refusal ends with the artifact


def test_labelled_arrays_are_not_shared_between_budgets() -> None:
    for budget, n in (("val-5", 4), ("val-20", 10), ("val-20:stripe", 10), ("val", 48)):
        task = tiny_task("dfr", budget)
        found = task.cached("demo", None, lambda task=task: explained(task), labelled=True)  # type: ignore[misc]
        assert found["a"].shape == (n, 1 if ":" in budget else 2)


def test_what_failed_to_be_made_is_neither_billed_nor_kept() -> None:
    task = tiny_task("dfr", "val")

    def fail() -> Arrays:
        task.attributes("val")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        task.cached("demo", None, fail, labelled=True)
    assert not used(task)
    assert not task._lab.clock.stages
    assert task.cached("demo", None, lambda: {"x": np.arange(3)}, labelled=True)["x"].tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------ the test split


@pytest.mark.usefixtures("unguarded")
def test_the_test_split_opens_when_fit_has_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fitting.fit
    tried = []

    def watched(spec: RunSpec, lab: Lab, annotations: Annotations) -> fitting.Fitted:
        fitted = fit(spec, lab, annotations)
        for ask in (lambda: lab.pixels("test"), lambda: lab.outputs(lab.erm_checkpoint(lab.erm(), 1), "test")):
            with pytest.raises(BudgetExceeded, match="the test split is not for methods"):
                ask()
            tried.append(lab)
        return fitted

    monkeypatch.setattr(runner, "fit", watched)
    plan = plan_tiny("erm")
    assert plan.runs[0].spec is not None
    assert runner.run_spec(plan.runs[0].spec, plan.stores["tiny"]).status == "finished"
    assert len(tried) == 2
    assert len(tried[0].pixels("test")) == 48


def test_another_network_has_weights_and_outputs_of_its_own() -> None:
    task = tiny_task("erm")
    model, first, again, other = (
        task._lab.model(),
        task.network(3, "a"),
        task.network(3, "a"),
        task.network(3, "b"),
    )
    assert first.num_classes == 3
    assert model.num_classes == task.num_classes
    weight = [next(net.parameters()) for net in (model, first, again, other)]
    assert torch.equal(weight[1], weight[2])
    assert not any(torch.equal(weight[i], weight[j]) for i, j in ((0, 1), (1, 3), (0, 3)))
