"""Records: written whole, read back the same, and refused by the name of the field that is wrong."""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import edit, plan_tiny, put, without_train
from worstgroup.benchmark import record as records
from worstgroup.benchmark.budget import Budget
from worstgroup.benchmark.errors import CorruptFile
from worstgroup.benchmark.home import TEMPORARY, runs_home
from worstgroup.benchmark.planning import Request, plan
from worstgroup.benchmark.predictions import pack
from worstgroup.benchmark.record import RunRecord, find, predictions_path, read, read_predictions, record_path
from worstgroup.benchmark.runner import run_spec

Pick = Callable[[str], Path]


# -------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("method", ["erm", "groupdro", "dfr"])
def test_a_record_survives_writing_and_reading(pick: Pick, tmp_path: Path, method: str) -> None:
    path = pick(method)
    record, arrays = read(path), read_predictions(path, read(path))
    copy = tmp_path / "deep" / "copy.json"
    records.write(copy, record, pack(arrays))
    assert read(copy) == record
    assert copy.read_bytes() == path.read_bytes()
    assert predictions_path(copy).read_bytes() == predictions_path(path).read_bytes()
    again = read_predictions(copy, record)
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)


def test_the_record_says_what_the_design_promises(pick: Pick) -> None:
    record = read(pick("groupdro"))
    assert (record.schema_version, record.status, record.error) == (1, "finished", "")
    assert (record.dataset, record.backbone, record.method, record.budget, record.seed) == (
        "tiny",
        "tiny_cnn",
        "groupdro",
        "train+val",
        0,
    )
    assert record.run == record.identity_hash()
    assert [(group.y, *group.a) for group in record.groups] == list(np.ndindex(2, 2, 2))
    assert [group.n_train for group in record.groups] == [30, 8, 7, 3, 3, 8, 7, 30]
    assert record.labels is not None
    assert (record.labels.n_train_a, record.labels.n_val_a_select, record.labels.total_a) == (2 * 96, 2 * 48, 2 * 144)
    assert len(record.history) == 2
    assert json.loads(record.to_json())["cost"]["scratch"]["n_fwd"] == 192
    assert {"device", "threads", "session", "versions"} <= record.env.keys()


def test_predictions_hold_everything_that_is_recomputed(pick: Pick) -> None:
    path = pick("erm")
    arrays = read_predictions(path, read(path))
    for name in ("val", "test"):
        assert arrays[f"{name}_logits"].shape == (48, 2)
        assert np.array_equal(arrays[f"{name}_logits"].argmax(1), arrays[f"{name}_prediction"])
        assert np.array_equal(arrays[f"{name}_index"], np.arange(48))
        assert arrays[f"{name}_a"].shape == (48, 2)
        assert arrays[f"{name}_y"].shape == arrays[f"{name}_unit"].shape == (48,)
    assert sorted(name for name in arrays if name.startswith("train_")) == [
        f"train_{part}" for part in ("a", "index", "prediction", "y")
    ]
    assert np.array_equal(arrays["train_index"], np.arange(96))
    assert {arrays[f"train_{part}"].dtype for part in ("prediction", "y", "a")} == {np.dtype(np.int16)}


@pytest.mark.parametrize("method", ["erm", "groupdro", "dfr"])
def test_the_selected_model_is_scored_on_train_too(pick: Pick, method: str) -> None:
    path = pick(method)
    record, arrays = read(path), read_predictions(path, read(path))
    right = arrays["train_prediction"] == arrays["train_y"]
    for group in record.groups:
        inside = (arrays["train_y"] == group.y) & (arrays["train_a"] == group.a).all(1)
        assert (group.n_train, group.correct_train) == (inside.sum(), right[inside].sum())
    assert record.train_metrics.keys() == record.metrics.keys()
    assert record.train_metrics["acc_mean"] == record.train_metrics["acc_adj"] == pytest.approx(right.mean())
    assert record.train_metrics["wga"] == min((g.correct_train or 0) / g.n_train for g in record.groups)


def test_no_method_pays_for_predicting_train(pick: Pick) -> None:
    """DFR refits on validation features: those of train are made for its evaluation alone."""
    cost = read(pick("dfr")).cost
    assert cost is not None
    assert [key.partition(":")[0] for key in cost.shared] == ["erm", "features"]
    assert cost.marginal.n_fwd_nograd == 48
    assert cost.stages.keys() == {"head"}


def test_a_record_from_before_train_was_predicted_is_read(pick: Pick) -> None:
    path = pick("erm")
    before = read(path)
    without_train(path)
    record = read(path)
    assert (record.train_metrics, {group.correct_train for group in record.groups}) == ({}, {None})
    assert record.counts().keys() == before.counts().keys() - {"correct_train"}
    assert (record.metrics, record.run) == (before.metrics, record.identity_hash())


@pytest.mark.usefixtures("tiny")
def test_a_licence_can_keep_the_labels_out() -> None:
    made = plan([Request("tinyvariants:secret", "erm", seeds=(0,))])
    assert made.runs[0].spec is not None
    record = run_spec(made.runs[0].spec, made.stores["tinyvariants:secret"])
    assert record.predictions is not None
    assert not record.predictions.has_labels
    assert record.train_metrics["wga"] is not None
    (path,) = find(runs_home())
    # none of train: the predictions of a model that learned the labels by heart are the labels
    assert sorted(read_predictions(path, record)) == [
        f"{name}_{part}" for name in ("test", "val") for part in ("index", "logits", "prediction")
    ]


def test_pack_is_byte_deterministic() -> None:
    a = {"b": np.arange(5000, dtype=np.int16), "a": np.ones((3, 4), np.float32)}
    strided = {"a": np.asfortranarray(np.ones((3, 4), np.float32)), "b": np.repeat(a["b"], 2)[::2]}
    assert pack(a) == pack(strided)
    with np.load(io.BytesIO(pack(a))) as read_back:
        assert read_back.files == ["a", "b"]
        assert np.array_equal(read_back["b"], a["b"])
    assert len(pack(a)) < a["b"].nbytes
    with zipfile.ZipFile(io.BytesIO(pack(a))) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_objects_are_not_packed() -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        pack({"a": np.array([object()])})


# ------------------------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize("dataset", ["celeba:Blond_Hair/Male", "../odd name", "a/../../../b", "..", "x\n|y"])
@pytest.mark.parametrize("budget", ["none", "val:stripe,corner", "train+val"])
def test_a_path_is_readable_and_stays_below_its_folder(dataset: str, budget: str) -> None:
    spec = plan_tiny("groupdro").runs[0].spec
    assert spec is not None
    spec = replace(spec, block=replace(spec.block, dataset=dataset), budget=Budget.parse(budget))
    path = record_path(Path("/runs"), spec)
    assert path.parents[2] == Path("/runs")
    assert ".." not in path.parts
    assert re.fullmatch(r"[\w.+@/-]+", str(path))
    assert path.name.startswith("groupdro-")
    assert path.name.endswith(f"-s0-{spec.hash[:12]}.json")


def test_every_difference_in_identity_is_another_path() -> None:
    plans = [
        plan_tiny("erm", "dfr", seeds=(0, 1)),
        plan_tiny("erm", budget="select"),
        plan_tiny("erm", recipe__lr="0.1"),
        plan_tiny("dfr", refits="3"),
    ]
    paths = [record_path(Path(), planned.spec) for plan in plans for planned in plan.runs if planned.spec]
    assert len(set(paths)) == len(paths) == 7


def test_find_leaves_out_files_in_the_making(runs: Path) -> None:
    before = list(find(runs))
    assert len(before) == 6
    assert before == sorted(before)
    (before[0].parent / f"{TEMPORARY}x.json").write_text("{")
    assert list(find(runs)) == before


# ------------------------------------------------------------------------------------------------------ bad records


def test_a_good_record_that_is_edited_to_the_same_is_read(pick: Pick) -> None:
    path = pick("erm")
    before = read(path)
    edit(path, lambda content: None)
    assert read(path) == before


FIELDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "older schema": (put("schema_version", 0), "schema_version"),
    "newer schema": (put("schema_version", 2), "schema_version"),
    "unknown field": (put("accuracy", 1.0), "accuracy"),
    "unknown field below": (put("groups.3.note", "x"), "groups.3.note"),
    "missing field": (lambda content: content.pop("dataset"), "dataset"),
    "missing field below": (lambda content: content["groups"][2].pop("m_test"), "groups.2.m_test"),
    "parent folder in the dataset": (put("dataset", "../../etc"), "dataset"),
    "parent folder in the method": (put("method", "a/../../b"), "method"),
    "markup in the method": (put("method", "<script>alert(1)</script>"), "method"),
    "table syntax in the method": (put("method", "erm | 100"), "method"),
    "new line in the backbone": (put("backbone", "resnet18\n"), "backbone"),
    "markup in the attribute": (put("attributes.0.name", "[red]x[/]"), "attributes.0.name"),
    "status": (put("status", "great"), "status"),
    "policy": (put("policy", "own"), "policy"),
    "run": (put("run", "xyz"), "run"),
    "seed": (put("seed", "zero"), "seed"),
    "fraction of a count": (put("groups.0.m_test", 1.5), "groups.0.m_test"),
    "negative count": (put("groups.1.correct_test", -1), "groups.1.correct_test"),
    "train answers of one group": (put("groups.3.correct_train", None), "groups.3.correct_train"),
    "train metrics without their counts": (put("train_metrics", {}), "groups.0.correct_train"),
    "interval beyond 1": (put("ci.wga.1", 1.2), "ci.wga.1"),
    "text for a metric": (put("metrics.wga", "high"), "metrics.wga"),
    "list for an object": (put("selection", []), "selection"),
    "hash of the predictions": (put("predictions.sha256", "no"), "predictions.sha256"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_wrong_field_is_named(pick: Pick, case: str) -> None:
    path = pick("erm")
    change, field = FIELDS[case]
    edit(path, change)
    with pytest.raises(CorruptFile) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: {field}: ")
    assert "\n" not in str(error.value)


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "not JSON": lambda old: b"method: erm",
    "truncated": lambda old: old[: len(old) // 2],
    "binary": lambda old: bytes(range(256)),
    "a list": lambda old: b"[]",
    "a number": lambda old: b"3",
    "too deep": lambda old: old.replace(b'"config": {}', b'"config": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "NaN": lambda old: json.dumps({**json.loads(old), "seed": float("nan")}).encode(),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_record_is_named(pick: Pick, case: str) -> None:
    path = pick("erm")
    path.write_bytes(FILES[case](path.read_bytes()))
    with pytest.raises(CorruptFile) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"gone\.json: cannot be read: No such file"):
        read(tmp_path / "gone.json")


@pytest.mark.parametrize("part", ["metrics", "selection", "labels", "groups", "ci", "predictions"])
def test_a_finished_record_lacks_nothing(pick: Pick, part: str) -> None:
    path = pick("erm")
    edit(path, lambda content: content.pop(part))
    with pytest.raises(CorruptFile, match=part):
        read(path)


def test_a_failed_record_needs_no_results(pick: Pick, tmp_path: Path) -> None:
    content = json.loads(pick("erm").read_text())
    for part in ("metrics", "val_metrics", "selection", "labels", "groups", "history", "ci", "cost", "predictions"):
        del content[part]
    path = tmp_path / "failed.json"
    path.write_text(json.dumps({**content, "status": "failed", "error": "the loss is not finite"}))
    assert read(path).error == "the loss is not finite"


# --------------------------------------------------------------------------------------------------- bad predictions


def forge(path: Path, content: bytes) -> RunRecord:
    """Replace the predictions and correct their hash, as one who submits a made-up record would."""
    predictions_path(path).write_bytes(content)
    edit(path, put("predictions.sha256", hashlib.sha256(content).hexdigest()))
    return read(path)


def test_missing_predictions_are_named(pick: Pick) -> None:
    path = pick("erm")
    predictions_path(path).unlink()
    with pytest.raises(CorruptFile, match=r"\.npz: cannot be read: No such file"):
        read_predictions(path, read(path))


@pytest.mark.parametrize("damage", [lambda old: old[:-1], lambda old: old + b" ", lambda old: b""])
def test_altered_predictions_are_named(pick: Pick, damage: Callable[[bytes], bytes]) -> None:
    path = pick("erm")
    file = predictions_path(path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptFile, match=r"\.npz: predictions\.sha256"):
        read_predictions(path, read(path))


def zipped(name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def bent(content: bytes) -> bytes:
    """A compressed archive with a few bytes of its data overwritten."""
    return content[:60] + bytes(10) + content[70:]


FORGERIES = {
    "empty": b"",
    "no archive": b"hello",
    "a bare array": npy(np.arange(3)),
    "a pickle": npy(np.array([{}]), allow_pickle=True),
    "a pickle in the archive": zipped("val_y.npy", npy(np.array([{}]), allow_pickle=True)),
    "half an array": zipped("val_y.npy", npy(np.arange(100))[:-80]),
    "a header alone": zipped("val_y.npy", b"\x93NUMPY\x01\x00"),
    "an array that would not fit": zipped(
        "val_y.npy", npy(np.zeros(3)).replace(b"(3,), }" + b" " * 12, b"(9999999999999,), }")
    ),
    "broken compression": bent(pack({"val_y": np.random.default_rng(0).integers(0, 9, 500)})),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_predictions_are_named(pick: Pick, case: str) -> None:
    path = pick("erm")
    record = forge(path, FORGERIES[case])
    with pytest.raises(CorruptFile, match=r"\.npz: cannot be read"):
        read_predictions(path, record)
