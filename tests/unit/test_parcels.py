"""Stores and records that travel, and the worker that makes a run with them; handles are the things themselves."""

import dataclasses
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny, prediction_files
from worstgroup.benchmark import errands, parcels
from worstgroup.benchmark.errors import CorruptFile, UserError
from worstgroup.benchmark.fingerprint import package_fingerprint
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.benchmark.parcels import gather, local_store, local_weights, pack_store, unpack_store, unpack_weights
from worstgroup.benchmark.planning import Plan, weights_identity
from worstgroup.benchmark.record import RunRecord, find, predictions_path, read
from worstgroup.benchmark.registry import METHODS, load_plugin, plugin_name
from worstgroup.benchmark.runner import finished, lost, run_spec
from worstgroup.benchmark.spec import SPLITS, RunSpec
from worstgroup.benchmark.store import Store

Patch = pytest.MonkeyPatch


def same(handle: Any) -> Any:
    return handle


def only(plan: Plan) -> tuple[RunSpec, Store]:
    (spec,) = (planned.spec for planned in plan.runs)
    assert spec is not None
    return spec, plan.stores["tiny"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: Patch) -> Iterator[Path]:
    """Another home, with which a worker of this very process stands for one on another machine."""
    monkeypatch.setattr(errands, "_OWN_HOME", str(tmp_path / "elsewhere"))
    threads, visible = torch.get_num_threads(), "CUDA_VISIBLE_DEVICES"
    monkeypatch.setenv(visible, "")
    yield tmp_path / "elsewhere"
    torch.set_num_threads(threads)


def order(spec: RunSpec, store: Store, home: Path, **changes: Any) -> errands.Order:
    probe = home / f"{TEMPORARY}probe"
    probe.touch()
    usual = errands.Order(
        spec, store, {}, (), str(home), probe.name, "s", threads=1, on_gpu=False, sharers=1, same_bits=False
    )
    return dataclasses.replace(usual, **changes)


def work(asked: errands.Order, sent: dict[str, Any] | None = None, code: str = "") -> errands.Answer:
    here = os.environ["WORSTGROUP_HOME"]
    try:
        return errands.work(code or package_fingerprint(), pickle.dumps(asked), sent or {}, same)
    finally:
        os.environ["WORSTGROUP_HOME"] = here


def timeless(record: RunRecord) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude={"created", "env", "cost"})


# ---------------------------------------------------------------------------------------------------------- stores


def test_a_store_arrives_bit_for_bit(elsewhere: Path, monkeypatch: Patch) -> None:
    _, store = only(plan_tiny("erm"))
    expected = {name: store.split(name) for name in SPLITS}
    parcel = pack_store(store, same)
    monkeypatch.setenv("WORSTGROUP_HOME", str(elsewhere))
    assert local_store(store) is None
    there = unpack_store(parcel, store, same)
    assert there == local_store(store)
    assert there.path.is_relative_to(elsewhere)
    for name, split in expected.items():
        found = there.split(name)
        assert np.array_equal(found.images, split.images)
        assert np.array_equal(found.y, split.y)
        assert np.array_equal(found.a, split.a)
        assert found.views.keys() == split.views.keys()
    assert not list(elsewhere.rglob(f"{TEMPORARY}*"))


def test_a_pool_of_several_chunks_arrives(elsewhere: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("worstgroup.benchmark.pools.CHUNK_BYTES", 7 * 16 * 16 * 3)
    _, store = only(plan_tiny("erm"))
    parcel = pack_store(store, same)
    assert min(len(chunks) for _, chunks in parcel["pools"].values()) > 1
    images = np.array(store.split("test").images)
    monkeypatch.setenv("WORSTGROUP_HOME", str(elsewhere))
    assert np.array_equal(unpack_store(parcel, store, same).split("test").images, images)


def test_altered_pixels_and_labels_are_refused(elsewhere: Path, monkeypatch: Patch) -> None:
    _, store = only(plan_tiny("erm"))
    parcel = pack_store(store, same)
    key, (manifest, (chunk, *rest)) = next(iter(parcel["pools"].items()))
    monkeypatch.setenv("WORSTGROUP_HOME", str(elsewhere))
    with pytest.raises(CorruptFile, match="not the pixels that were sent"):
        unpack_store({**parcel, "pools": {**parcel["pools"], key: (manifest, [chunk ^ 1, *rest])}}, store, same)
    monkeypatch.setenv("WORSTGROUP_HOME", f"{elsewhere}2")
    swapped = parcel["files"] | {"val.labels.npz": parcel["files"]["test.labels.npz"]}
    with pytest.raises(CorruptFile, match="labels were altered"):
        unpack_store({**parcel, "files": swapped}, store, same)


def test_a_store_too_large_to_send_is_refused(monkeypatch: Patch) -> None:
    _, store = only(plan_tiny("erm"))
    monkeypatch.setattr(parcels, "MOST", 1000)
    with pytest.raises(UserError, match=r"tiny: a node lacks .*worstgroup prepare tiny` on every node"):
        pack_store(store, same)


def test_weights_arrive_under_their_name(tmp_path: Path, elsewhere: Path, monkeypatch: Patch) -> None:
    spec, _ = only(plan_tiny("erm"))
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"weights")
    name, place = weights_identity(str(file))
    block = dataclasses.replace(spec.block, weights=name, weights_file=place)
    assert local_weights(block) == block
    assert local_weights(spec.block) == spec.block
    file.write_bytes(b"others")
    monkeypatch.setenv("WORSTGROUP_HOME", str(elsewhere))
    assert local_weights(block) is None
    there = unpack_weights(b"weights", block)
    assert Path(there.weights_file).read_bytes() == b"weights"
    assert there.key == block.key
    assert local_weights(block) == there
    with pytest.raises(CorruptFile, match="not the weights mine-"):
        unpack_weights(b"others", block)


# --------------------------------------------------------------------------------------------------------- records


@pytest.fixture
def made(tmp_path: Path, monkeypatch: Patch) -> tuple[RunSpec, RunRecord, bytes]:
    """A run that another home has made, with its packed predictions."""
    with monkeypatch.context() as patch:
        patch.setenv("WORSTGROUP_HOME", str(tmp_path / "maker"))
        spec, store = only(plan_tiny("erm"))
        record = run_spec(spec, store)
        (packed,) = prediction_files(tmp_path / "maker" / "runs").values()
    return spec, record, packed


def test_a_record_is_gathered_once(made: tuple[RunSpec, RunRecord, bytes], home: Path) -> None:
    spec, record, packed = made
    assert gather(spec, record.to_json(), packed) == record
    (path,) = find(home / "runs")
    assert read(path) == record == finished(spec)
    assert predictions_path(path).read_bytes() == packed
    later = record.model_copy(update={"created": "2099-01-01T00:00:00+00:00"})
    assert gather(spec, later.to_json(), packed) == record, "a finished record is never overwritten"
    assert read(path) == record


def test_a_failed_record_makes_way_for_a_finished_one(made: tuple[RunSpec, RunRecord, bytes]) -> None:
    spec, record, packed = made
    _, store = only(plan_tiny("erm"))
    failed = lost(spec, store.card, "gone")
    assert (failed.status, failed.error, failed.env) == ("failed", "gone", {})
    assert gather(spec, failed.to_json(), None) == failed
    assert gather(spec, record.to_json(), packed) == record
    assert lost(spec, store.card, "gone") == record == finished(spec)


def test_a_record_that_is_not_its_own_is_refused(made: tuple[RunSpec, RunRecord, bytes], home: Path) -> None:
    spec, record, packed = made
    other, _ = only(plan_tiny("groupdro"))
    edited = record.model_copy(update={"seed": 7})
    for asked, content, predictions, says in (
        (other, record.to_json(), packed, "is of another run"),
        (spec, edited.to_json(), packed, "is of another run"),
        (spec, record.to_json(), packed[:-1], "its own predictions"),
        (spec, record.to_json(), None, "its own predictions"),
        (spec, b'{"schema_version": 1}', packed, "is not valid"),
    ):
        with pytest.raises(CorruptFile, match=says):
            gather(asked, content, predictions)
    assert not list(find(home / "runs"))


# ---------------------------------------------------------------------------------------------------------- worker


def test_a_worker_with_a_home_of_its_own_asks_for_the_store_once(home: Path, elsewhere: Path) -> None:
    spec, store = only(plan_tiny("dfr"))
    asked = order(spec, store, home)
    sent = {errands.STORE: pack_store(store, same)}
    assert work(asked)["lacks"] == [errands.STORE]
    answer = work(asked, sent)
    assert "lacks" not in work(asked), "it has the store now"
    assert not (elsewhere / "runs").exists(), "the node's own records are left alone"
    assert (elsewhere / "artifacts").exists()
    assert not list(elsewhere.rglob(f"{TEMPORARY}*"))
    at_home = run_spec(spec, store)
    away = RunRecord.model_validate_json(answer["record"], strict=True)
    assert timeless(away) == timeless(at_home)
    assert [answer["predictions"]] == list(prediction_files(home / "runs").values())
    assert away.env["session"] != at_home.env["session"]


def test_a_worker_that_sees_the_home_works_in_it(home: Path, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(errands, "_OWN_HOME", "")
    spec, store = only(plan_tiny("erm"))
    asked = order(spec, store, home)
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "another"))
    answer = work(asked)
    assert "record" in answer
    assert read(next(find(home / "runs"))) == RunRecord.model_validate_json(answer["record"])
    assert not (tmp_path / "another").exists()


def test_a_worker_with_other_code_refuses(home: Path, elsewhere: Path) -> None:
    spec, store = only(plan_tiny("erm"))
    assert "install the same version" in work(order(spec, store, home), code="0" * 16)["refused"]
    other = dataclasses.replace(spec, code="0" * 16)
    assert "the method's code differs" in work(order(other, store, home))["refused"]
    gone = dataclasses.replace(spec, method="gone")
    assert "the method's code differs" in work(order(gone, store, home))["refused"]
    assert not elsewhere.exists()


PLUGIN = '''"""A method of the user's."""
from worstgroup import Objective, Requires, method
import torch

@method("mine", paper="", requires=Requires())
class Mine(Objective):
    def loss(self, batch):
        return {factor} * torch.nn.functional.cross_entropy(self.model(batch.x), batch.y)
'''


def test_a_plugin_travels_with_the_run(home: Path, elsewhere: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(factor=2))
    name, text = plugin_name(file), file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(METHODS, "_entries", {entry: METHODS[entry] for entry in METHODS})
        load_plugin(file)
        spec, store = only(plan_tiny("mine"))
    file.unlink()
    del sys.modules[name]
    monkeypatch.setattr(METHODS, "_entries", {entry: METHODS[entry] for entry in METHODS})
    monkeypatch.setattr(errands, "_loaded", {})
    monkeypatch.setattr(errands, "_code", errands.code_now)
    asked = order(spec, store, home, plugins=(errands.Plugin(file, name, text),))
    answer = work(asked, {errands.STORE: pack_store(store, same)})
    assert RunRecord.model_validate_json(answer["record"]).run == spec.hash
    (copy,) = (elsewhere / "plugins").rglob("*.py")
    assert copy.read_bytes() == text
    edited = errands.Plugin(file, name, PLUGIN.format(factor=3).encode())
    assert "it was edited" in work(order(spec, store, home, plugins=(edited,)))["refused"]
