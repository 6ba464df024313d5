"""The published form of a record is small, tells the same, and a falsified one is found."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import edit, put, repack
from worstgroup.benchmark import metrics
from worstgroup.benchmark.errors import CorruptFile, UserError
from worstgroup.benchmark.planning import Request, plan
from worstgroup.benchmark.predictions import Arrays, pack
from worstgroup.benchmark.record import find, predictions_path, read, read_predictions, record_path
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import PROTOCOL
from worstgroup.leaderboard import aggregate, verify_dataset
from worstgroup.leaderboard.published import compact, publish, smallest
from worstgroup.leaderboard.render import to_csv
from worstgroup.leaderboard.verify import Verdict, verify, verify_all
from worstgroup.leaderboard.verify_dataset import CHECKED, UNCHECKED, look_up

Pick = Callable[[str], Path]


@pytest.fixture
def published(pick: Pick, tmp_path: Path) -> Path:
    """The published form of a GroupDRO run."""
    return publish(pick("groupdro"), tmp_path / "results")


def assert_named(verdict: Verdict, field: str) -> None:
    assert any(problem.startswith(field) for problem in verdict.problems), verdict.problems


# ---------------------------------------------------------------------------------------------------------- its form


def test_it_keeps_answers_and_labels_only(pick: Pick, published: Path, tmp_path: Path) -> None:
    before, after = read(pick("groupdro")), read(published)
    assert published.relative_to(tmp_path / "results") == pick("groupdro").relative_to(pick("groupdro").parents[2])
    same = {"predictions"}
    assert after.model_dump(exclude=same) == before.model_dump(exclude=same)
    assert after.predictions is not None
    assert after.predictions.kept == "answers"
    with np.load(predictions_path(published)) as stored:
        parts = ("prediction", "y", "a")
        assert set(stored.files) == {f"{split}_{part}" for split in ("val", "test") for part in parts}
        assert {stored[name].dtype for name in stored.files} == {np.dtype(np.int8)}
    whole, small = read_predictions(pick("groupdro"), before), read_predictions(published, after)
    for name, values in small.items():
        np.testing.assert_array_equal(values, whole[name])  # index and unit, which are not stored, among them
    assert small.keys() >= {"val_index", "test_index", "test_unit"}


def test_it_is_small_and_every_row_has_a_line(pick: Pick, published: Path) -> None:
    for file, whole in (
        (published, pick("groupdro")),
        (predictions_path(published), predictions_path(pick("groupdro"))),
    ):
        assert file.stat().st_size < whole.stat().st_size
    lines = published.read_text().splitlines()
    assert sum(line.startswith('  {"y": ') for line in lines) == 8
    assert max(map(len, lines)) < 400
    assert json.loads(published.read_text()) == read(published).model_dump(mode="json")


def test_the_same_record_gives_the_same_bytes(pick: Pick, published: Path, tmp_path: Path) -> None:
    files = [published, predictions_path(published)]
    before = [file.read_bytes() for file in files]
    assert publish(pick("groupdro"), tmp_path / "results") == published
    assert [file.read_bytes() for file in files] == before
    assert publish(published, tmp_path / "results") == published  # of a published record itself, too
    assert [file.read_bytes() for file in files] == before


def test_the_leaderboard_of_published_records_is_the_same(runs: Path, tmp_path: Path) -> None:
    for path in find(runs):
        publish(path, tmp_path / "results")
    boards = [to_csv(aggregate.build(aggregate.collect(find(place)))) for place in (runs, tmp_path / "results")]
    assert boards[0] == boards[1]
    assert {verdict.level for verdict in verify_all(tmp_path / "results")} == {"answers"}


@pytest.mark.parametrize(
    ("values", "kind"), [([0, 127], "int8"), ([-128], "int8"), ([128], "int16"), ([-129], "int16"), ([70000], "int32")]
)
def test_smallest_types(values: list[int], kind: str) -> None:
    small = smallest(np.array(values, np.int64))
    assert small.dtype == kind
    assert small.tolist() == values


def test_an_order_of_its_own_is_kept() -> None:
    arrays = {"test_prediction": np.zeros(4, np.int16), "test_unit": np.array([0, 0, 1, 1]), "test_index": np.arange(4)}
    assert set(compact(arrays)) == {"test_prediction", "test_unit"}
    assert set(compact(arrays | {"test_index": np.arange(4)[::-1]})) == {"test_prediction", "test_unit", "test_index"}


@pytest.mark.usefixtures("tiny")
def test_where_the_licence_keeps_labels_there_are_no_predictions(home: Path, tmp_path: Path) -> None:
    made = plan([Request("tinyvariants:secret", "erm", seeds=(0,))])
    assert made.runs[0].spec is not None
    run_spec(made.runs[0].spec, made.stores["tinyvariants:secret"])
    (path,) = find(home / "runs")
    place = publish(path, tmp_path / "results")
    assert [file.name for file in sorted((tmp_path / "results").rglob("*.*"))] == [place.name]
    assert verify(place) == Verdict(place, "counts", (), (CHECKED,))
    with pytest.raises(CorruptFile, match="its predictions are not published"):
        read_predictions(place, read(place))
    (table,) = aggregate.build(aggregate.collect([place]))
    assert [row.method for row in table.rows] == ["erm"]
    edit(place, put("groups.0.m_test", 1000))
    assert_named(verify(place), "metrics.")
    publish(path, tmp_path / "results")
    predictions_path(place).write_bytes(predictions_path(path).read_bytes())
    assert_named(verify(place), "predictions.kept")


# ------------------------------------------------------------------------------------------------------ what it refuses


def test_a_record_that_does_not_verify_is_refused(pick: Pick, tmp_path: Path) -> None:
    edit(pick("dfr"), put("metrics.wga", 0.99))
    with pytest.raises(UserError, match=r"dfr-.*: does not verify.* metrics.wga: the record says 0.99"):
        publish(pick("dfr"), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_failed_run_is_refused(pick: Pick, tmp_path: Path) -> None:
    edit(pick("erm"), lambda content: content.update(status="failed", error="no luck"))
    with pytest.raises(UserError, match=r"the run failed \(no luck\)"):
        publish(pick("erm"), tmp_path / "results")


def test_candidates_go_with_the_run_that_was_chosen(home: Path, tmp_path: Path) -> None:
    """A failed draw among them: without it nobody could verify the choice."""
    request = Request("tiny", "groupdro", seeds=(0, 1), settings={"recipe.epochs": "1"}, tuning=3)
    made = plan([request])
    (sweep,) = made.sweeps
    records = {spec.hash: run_spec(spec, made.stores["tiny"]) for spec in sweep.candidates}
    lost = sweep.candidates[1]
    edit(record_path(home / "runs", lost), lambda c: c.update(status="failed", error="lost", selection=None, cost=None))
    records[lost.hash] = read(record_path(home / "runs", lost))
    specs = sweep.chosen(records)
    for spec in specs:
        assert run_spec(spec, made.stores["tiny"]).status == "finished"
    results = tmp_path / "results"
    stray = record_path(home / "runs", sweep.candidates[2])
    with pytest.raises(UserError, match="publish the run that was chosen"):
        publish(stray, results)
    publish(record_path(home / "runs", specs[1]), results)
    assert {read(path).run for path in find(results)} == {specs[1].hash, *(spec.hash for spec in sweep.candidates)}
    assert {verdict.level for verdict in verify_all(results)} == {"answers", "failed"}
    assert all(verdict.ok for verdict in verify_all(results))
    publish(stray, results)  # now the run that it belongs to is there


# ----------------------------------------------------------------------------------------------------- falsified copies


def flipped(arrays: Arrays) -> None:
    """One more test image answered correctly."""
    wrong = int(np.flatnonzero(arrays["test_prediction"] != arrays["test_y"])[0])
    arrays["test_prediction"][wrong] ^= 1


def rewrite(path: Path, change: Callable[[Arrays], object]) -> None:
    """Change what a published file holds, and its SHA-256 in the record."""
    arrays = compact(read_predictions(path, read(path)))
    change(arrays)
    content = pack(arrays)
    predictions_path(path).write_bytes(content)
    edit(path, put("predictions.sha256", hashlib.sha256(content).hexdigest()))


def less(*names: str) -> Callable[[dict[str, Any]], None]:
    """Take two labels away from fields of the ledger."""

    def change(content: dict[str, Any]) -> None:
        for name in names:
            content["labels"][name] -= 2

    return change


def other_step(content: dict[str, Any]) -> None:
    """Of two epochs the other one."""
    content["selection"]["step"] = 3 - content["selection"]["step"]


FALSIFIED: dict[str, tuple[Callable[[Path], object], str]] = {
    "metrics": (lambda path: edit(path, put("metrics.acc_adj", 0.99)), "metrics.acc_adj"),
    "interval": (lambda path: edit(path, put("ci.wga.0", 0.5)), "ci.wga"),
    "counts": (lambda path: edit(path, put("groups.3.correct_test", 1)), "groups.3.correct_test"),
    "images of train": (lambda path: edit(path, put("groups.3.n_train", 1)), "metrics."),
    "predictions": (lambda path: rewrite(path, flipped), "groups."),
    "predictions, not their sum": (lambda path: predictions_path(path).write_bytes(b"PK"), "{npz}: predictions.sha256"),
    "labels": (lambda path: rewrite(path, lambda a: a["test_y"].__ixor__(1)), "predictions.labels_sha256.test"),
    "foreign index": (
        lambda path: rewrite(path, lambda a: a.update(test_index=np.arange(1, 1 + len(a["test_y"])))),
        "predictions: test_index",
    ),
    "more than is published": (
        lambda path: rewrite(path, lambda a: a.update(train_y=np.zeros(3, np.int8))),
        "predictions: train_y",
    ),
    "budget": (lambda path: edit(path, put("budget", "val")), "budget"),
    "seed": (lambda path: edit(path, put("seed", 7)), "seed"),
    "method": (lambda path: edit(path, put("method", "mine")), "method"),
    "dataset": (lambda path: edit(path, put("dataset", "digits2")), "dataset"),
    "protocol": (lambda path: edit(path, put("protocol", "wg0")), "run"),
    "fingerprint": (lambda path: edit(path, put("fingerprint", "0" * 16)), "fingerprint"),
    "step of the selection": (lambda path: edit(path, other_step), "selection.step"),
    "labels selected by": (lambda path: edit(path, less("n_val_a_select", "total_a")), "labels.n_val_a_select"),
    "labels of train": (lambda path: edit(path, less("n_train_a")), "labels.total_a"),
}


@pytest.mark.parametrize("case", FALSIFIED)
def test_a_falsified_copy_is_found(published: Path, case: str) -> None:
    falsify, field = FALSIFIED[case]
    assert verify(published).ok
    falsify(published)
    assert_named(verify(published), field.format(npz=predictions_path(published)))


def carefully(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Edit a record, its hash and its name with it."""
    edit(path, change)
    edit(path, put("run", read(path).identity_hash()))
    place = record_path(path.parents[2], read(path).spec())
    place.parent.mkdir(parents=True, exist_ok=True)
    predictions_path(path).rename(predictions_path(place))
    return path.rename(place)


CAREFUL: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a poorer budget": (put("budget", "none"), "selection.criterion"),
    "a rung without train": (put("budget", "val"), "labels.n_train_a"),
    "other data": (put("fingerprint", "0" * 16), "fingerprint"),
    "other aligned values": (put("attributes.0.train_ratio", 0.5), "attributes.0.train_ratio"),
    "another class": (put("classes.0", "lowest"), "classes"),
}


@pytest.mark.parametrize("case", CAREFUL)
def test_a_copy_falsified_with_care_is_found(published: Path, case: str) -> None:
    change, field = CAREFUL[case]
    assert_named(verify(carefully(published, change)), field)


def test_train_images_made_up_consistently_are_found_by_the_dataset(published: Path) -> None:
    """Nothing in a published record contradicts them: its train labels are not there."""
    record = read(published)
    rows = [group.model_copy(update={"n_train": group.n_train + 5}) for group in record.groups]
    changed = record.model_copy(update={"groups": rows})
    counts, shape, attributes = changed.counts(), record.shape, record.spec_attributes()
    edit(published, put("groups", [row.model_dump() for row in rows]))
    fields = {"metrics": ("test", "m_test"), "val_metrics": ("val", "m_val"), "train_metrics": ("train", "n_train")}
    for field, (split, total) in fields.items():
        made = metrics.evaluate(counts[f"correct_{split}"], counts[total], counts["n_train"], shape, attributes)
        edit(published, put(field, made))
    problems = verify(published).problems
    assert len(problems) == 8
    assert all(problem.startswith(f"groups.{g}.n_train") for g, problem in enumerate(problems)), problems


def test_hidden_predictions_are_found(published: Path) -> None:
    """The licence of the dataset lets them be seen."""
    predictions_path(published).unlink()
    edit(published, lambda c: c["predictions"].update(kept="nothing", has_labels=False, sha256=""))
    assert_named(verify(published), "predictions.has_labels")


@pytest.mark.parametrize(
    "change", [{"kept": "nothing"}, {"sha256": ""}, {"kept": "answers", "has_labels": False}, {"kept": "some"}]
)
def test_what_is_kept_must_agree_with_the_file(published: Path, change: dict[str, object]) -> None:
    edit(published, lambda content: content["predictions"].update(change))
    with pytest.raises(CorruptFile, match="predictions"):
        read(published)


# ----------------------------------------------------------------------------------------------------- notes of verify


def test_a_protocol_of_another_version_is_no_difference(published: Path) -> None:
    notes = verify(carefully(published, put("protocol", "wg0"))).notes
    assert notes[0] == f"of protocol wg0, today's is {PROTOCOL}: they stand in tables of their own"
    assert notes[1:] == (CHECKED,)


def test_a_dataset_that_is_not_here_is_no_difference(published: Path) -> None:
    place = carefully(published, put("dataset", "waterbirds[112px,custom]"))
    verdict = verify(place)
    assert verdict == Verdict(place, "answers", (), (f"{UNCHECKED}: waterbirds[112px,custom] is not here",))
    place = carefully(place, put("dataset", "nowhere"))
    assert verify(place).notes[0].startswith(f"{UNCHECKED}: unknown dataset 'nowhere'")


def test_other_files_of_ones_own_are_no_difference(published: Path) -> None:
    found = replace(look_up("tiny"), fingerprint="0" * 16)
    assert_named(verify(published, lambda name: found), "fingerprint")
    place = carefully(published, put("dataset", "waterbirds[custom]"))
    assert verify(place, lambda name: found).notes == (f"{UNCHECKED}: other files of waterbirds[custom] are here",)


def test_units_and_labels_are_compared_with_the_dataset(pick: Pick) -> None:
    repack(pick("erm"), lambda arrays: arrays["test_unit"].__setitem__(3, 0))
    assert_named(verify(pick("erm")), "predictions: test_unit is not that of tiny, first at example [3]")
    repack(pick("dfr"), lambda arrays: arrays["val_index"].__setitem__(3, 0))
    assert_named(verify(pick("dfr")), "predictions: val_index does not name each of")


@pytest.mark.parametrize("version", [2, 17])
def test_a_record_of_a_newer_schema_says_so(published: Path, version: int) -> None:
    edit(published, lambda content: content.update(schema_version=version, more={}))
    says = f"{published}: schema_version: written by a newer version, schema {version}; update worstgroup"
    assert verify(published).problems == (says,)
    edit(published, put("schema_version", 0))
    assert verify(published).problems == (f"{published}: schema_version: Input should be 1",)


def test_a_dataset_is_looked_up_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(verify_dataset, "find_store", lambda name: asked.append(name))
    assert {verdict.notes for verdict in verify_all(runs)} == {(f"{UNCHECKED}: tiny is not here",)}
    assert asked == ["tiny"]
