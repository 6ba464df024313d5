"""Groups of a source: how they agree with the true ones, selection by them, and what a record tells of both."""

from pathlib import Path

import numpy as np
import pytest
from helpers import plan_tiny
from worstgroup.benchmark import record as records
from worstgroup.benchmark.agreement import agreement
from worstgroup.benchmark.annotations import Attributes
from worstgroup.benchmark.home import runs_home
from worstgroup.benchmark.record import RunRecord, record_path
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.selection import CRITERIA, PSEUDO_WGA
from worstgroup.leaderboard import aggregate, render
from worstgroup.leaderboard.verify import verify

SHAPE = (2, 2)
Y = np.repeat([0, 1], 40)
A = np.tile(np.repeat([0, 1], [30, 10]), 2)[:, None]


def of(values: np.ndarray) -> dict[str, float | None]:
    return agreement(Attributes(values[:, None], (int(values.max()) + 1,)), A, Y, SHAPE)


def make(method: str, budget: str = "") -> tuple[Path, RunRecord]:
    planned = plan_tiny(method, seeds=(0,), budget=budget)
    (run,) = planned.runs
    assert run.spec is not None, run.reason
    record = run_spec(run.spec, planned.stores["tiny"])
    assert record.status == "finished", record.error
    return record_path(runs_home(), run.spec), record


def test_the_true_partition_under_other_names_agrees_fully() -> None:
    assert of(np.array([7, 3])[A[:, 0]]) == pytest.approx({"ami": 1, "worst_recall": 1, "groups": 4})


def test_one_group_for_all_recalls_the_majority_only() -> None:
    assert of(np.zeros(80, np.int64)) == pytest.approx({"ami": 0, "worst_recall": 0, "groups": 2})


def test_recall_counts_the_images_in_groups_that_stand_for_theirs() -> None:
    found = A[:, 0].copy()
    found[30:33] = 0  # three of ten images of the small group of class 0 lie with the large one
    assert of(found)["worst_recall"] == pytest.approx(0.7)


def test_a_finer_partition_loses_no_recall() -> None:
    values = of(A[:, 0] * 2 + np.arange(80) % 2)
    assert values["worst_recall"] == 1
    assert values["ami"] is not None
    assert 0.3 < values["ami"] < 1


def test_chance_is_taken_off() -> None:
    found = np.random.default_rng(0).integers(0, 2, 80)
    assert abs(of(found)["ami"] or 0) < 0.1


@pytest.mark.usefixtures("tiny")
def test_oracle_is_the_host_itself_and_agrees_fully() -> None:
    (_, plain), (path, oracle) = make("dfr"), make("dfr+oracle")
    assert oracle.metrics == plain.metrics
    assert oracle.labels == plain.labels
    assert oracle.agreement["val"]["ami"] == pytest.approx(1)
    assert verify(path).ok, verify(path).problems


@pytest.mark.usefixtures("tiny")
def test_class_as_a_source_is_the_policy_class() -> None:
    (_, policy), (path, source) = make("dfr@class", "none"), make("dfr+class", "none")
    assert source.metrics == policy.metrics
    assert source.agreement["val"]["worst_recall"] == 0
    assert verify(path).ok, verify(path).problems


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", ["jtt+exmap", "erm+class"])
def test_a_method_without_groups_is_selected_by_those_of_its_source(method: str) -> None:
    path, record = make(method)
    assert record.selection is not None
    assert record.selection.criterion == PSEUDO_WGA
    assert record.labels is not None
    assert record.labels.total_a == 0
    assert verify(path).ok, verify(path).problems


@pytest.mark.usefixtures("tiny")
def test_selecting_by_the_source_class_is_selecting_by_the_worst_class() -> None:
    (_, plain), (_, source) = make("erm"), make("erm+class")
    assert source.selection is not None
    assert plain.selection is not None
    assert source.selection.step == plain.selection.step
    assert source.metrics == plain.metrics


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("field", ["agreement", "source"])
def test_a_forged_agreement_is_found(field: str) -> None:
    path, record = make("dfr+exmap")
    if field == "agreement":
        forged = {"val": {**record.agreement["val"], "ami": 0.99}}
        path.write_bytes(record.model_copy(update={"agreement": forged}).to_json())
        expected = "agreement.val.ami"
    else:
        path.write_bytes(record.model_copy(update={"agreement": {}}).to_json())
        expected = "agreement: []"
    assert any(problem.startswith(expected) for problem in verify(path).problems)


@pytest.mark.usefixtures("tiny")
def test_a_forged_selection_by_a_source_is_found() -> None:
    path, record = make("jtt+exmap")
    assert record.selection is not None
    seen = [count + 1 for count in record.selection.seen]
    path.write_bytes(
        record.model_copy(update={"selection": record.selection.model_copy(update={"seen": seen})}).to_json()
    )
    assert any(problem.startswith("selection.seen") for problem in verify(path).problems)


@pytest.mark.usefixtures("tiny")
def test_tables_show_the_agreement_where_there_is_a_source() -> None:
    found = [make(name)[0] for name in ("erm", "dfr+exmap")]
    (table,) = aggregate.build(aggregate.collect(found))
    assert {row.method: set(row.agreement) for row in table.rows} == {
        "erm": set(),
        "dfr+exmap": {"ami", "worst_recall"},
    }
    assert "worst recall" in render.to_markdown([table])
    assert "source_ami" in render.to_csv([table])
    (plain,) = aggregate.build(aggregate.collect(found[:1]))
    assert "worst recall" not in render.to_markdown([plain])


@pytest.mark.usefixtures("tiny")
def test_records_from_before_agreement_was_told_are_read() -> None:
    path, _ = make("erm")
    assert records.read(path).agreement == {}


def test_no_paper_may_select_by_a_source_that_is_not_there() -> None:
    assert [name for name, criterion in CRITERIA.items() if criterion.of_source] == [PSEUDO_WGA]
