"""Shared artifacts: made once, billed once, named when damaged, and pruned."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from worstgroup.benchmark import engine
from worstgroup.benchmark.artifacts import Artifact, artifact, save_tensors
from worstgroup.benchmark.cache import contents, prune_artifacts
from worstgroup.benchmark.cost import Clock, StageCost
from worstgroup.benchmark.errors import CorruptFile, UserError
from worstgroup.benchmark.home import TEMPORARY, artifacts_home, data_home, lock, locks_home
from worstgroup.benchmark.lab import Checkpoint, Lab
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import SplitName
from worstgroup.benchmark.store import Split, Store

TRAIN, VAL, EPOCHS = 96, 48, 2


def fill(folder: Path) -> StageCost:
    save_tensors(folder / "weights.safetensors", {"w": torch.arange(1000.0)})
    np.save(folder / "features.npy", np.arange(1000.0))
    (folder / "notes.json").write_text("[1, 2]")
    return StageCost(wall_s=1.5, n_fwd=7)


def make(makes: list[Path] | None = None, identity: object = "x") -> Artifact:
    def noted(folder: Path) -> StageCost:
        if makes is not None:
            makes.append(folder)
        return fill(folder)

    return artifact("demo", identity, noted)


def laboratory(clock: Clock) -> Lab:
    plan = plan_tiny("erm")
    spec = plan.runs[0].spec
    assert spec is not None
    return Lab(spec.block, plan.stores["tiny"], torch.device("cpu"), clock, lambda *_: None)


def test_loading_pixels_is_billed_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(torch.device("cpu"))
    lab = laboratory(clock)
    split = lab.store.split

    def slow(store: Store, name: SplitName) -> Split:
        time.sleep(0.5)
        return split(name)

    monkeypatch.setattr(Store, "split", slow)
    with clock.stage("features") as cost:
        assert len(lab.pixels("val")) == VAL
    assert cost.wall_s < 0.4


# ------------------------------------------------------------------------------------------------------------ making


def test_an_artifact_is_made_once_and_keeps_its_cost() -> None:
    makes: list[Path] = []
    first, second = make(makes), make(makes)
    assert len(makes) == 1
    assert first == second
    assert second.cost == StageCost(wall_s=1.5, n_fwd=7)
    assert torch.equal(second.tensors("weights")["w"], torch.arange(1000.0))
    assert np.array_equal(second.array("features"), np.arange(1000.0))
    assert second.json("notes") == [1, 2]


def test_another_identity_is_another_artifact() -> None:
    paths = {make(identity=identity).path for identity in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2, "b": 2}, "x")}
    assert len(paths) == 3  # the order of keys does not matter
    assert artifact("other", "x", fill).path not in paths


def test_state_dicts_with_strided_and_shared_tensors_survive(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"strided": base.t(), "slice": base[:, 1:], "same": base, "again": base, "scalar": torch.tensor(3)}
    save_tensors(tmp_path / "t.safetensors", tensors)
    read = Artifact("demo", "k", tmp_path, StageCost()).tensors("t")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_make_leaves_nothing_behind(error: type[BaseException]) -> None:
    def fail(folder: Path) -> StageCost:
        fill(folder)
        raise error

    with pytest.raises(error):
        artifact("demo", "x", fail)
    assert list((artifacts_home() / "demo").iterdir()) == []
    assert make().cost.n_fwd == 7


def test_a_folder_without_meta_is_made_again() -> None:
    makes: list[Path] = []
    (make(makes).path / "meta.json").unlink()
    make(makes)
    assert len(makes) == 2


def test_threads_that_want_the_same_artifact_make_it_once() -> None:
    makes: list[Path] = []

    def slow(folder: Path) -> StageCost:
        makes.append(folder)
        time.sleep(0.1)
        return fill(folder)

    threads = [threading.Thread(target=artifact, args=("demo", "x", slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makes) == 1


def test_processes_that_want_the_same_artifact_make_it_once(tmp_path: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from worstgroup.benchmark.artifacts import artifact
from worstgroup.benchmark.cost import StageCost

def make(folder):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write(f"{{os.getpid()}}\\n")
    time.sleep(1)
    (folder / "content").write_text("whole")
    return StageCost(n_fwd=3)

Path({str(tmp_path)!r}, f"ready-{{os.getpid()}}").touch()
while len(list(Path({str(tmp_path)!r}).glob("ready-*"))) < 2:
    time.sleep(0.01)
made = artifact("demo", "shared", make)
assert (made.path / "content").read_text() == "whole" and made.cost.n_fwd == 3
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------ damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"<html>no such page</html>" * 20),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "zipped": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
}
READERS: dict[str, Callable[[Artifact], object]] = {
    "weights.safetensors": lambda made: made.tensors("weights"),
    "features.npy": lambda made: made.array("features"),
    "notes.json": lambda made: made.json("notes"),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named(name: str, damage: str) -> None:
    made = make()
    DAMAGES.get(damage, Path.unlink)(made.path / name)
    with pytest.raises(CorruptFile) as error:
        READERS[name](made)
    assert str(made.path / name) in str(error.value)
    assert "delete the folder" in str(error.value)


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        meta = json.loads(path.read_text())
        change(meta)
        path.write_text(json.dumps(meta))

    return damage


META_DAMAGES: dict[str, Callable[[Path], object]] = DAMAGES | {
    "a list": lambda path: path.write_text("[]"),
    "no cost": rewrite(lambda meta: meta.pop("cost")),
    "a foreign cost": rewrite(lambda meta: meta["cost"].update(other=1)),
    "no number": rewrite(lambda meta: meta.update(cost=3)),
}


@pytest.mark.parametrize("damage", META_DAMAGES)
def test_damaged_meta_is_named(damage: str) -> None:
    path = make().path / "meta.json"
    META_DAMAGES[damage](path)
    with pytest.raises(CorruptFile) as error:
        make()
    assert str(path) in str(error.value)


def test_deleting_the_folder_mends_it() -> None:
    path = make().path
    truncate(path / "meta.json")
    with pytest.raises(CorruptFile):
        make()
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    assert make().cost.n_fwd == 7


# ----------------------------------------------------------------------------------------------------------- billing


def test_the_shared_training_runs_once_and_is_billed_to_every_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[str] = []
    fit = engine.fit

    def counted(objective, model, sampler, training):  # type: ignore[no-untyped-def]
        fits.append(training.stage)
        return fit(objective, model, sampler, training)

    monkeypatch.setattr(engine, "fit", counted)
    plan = plan_tiny("erm", "dfr", "jtt")
    costs = {}
    for planned in plan.runs:
        assert planned.spec is not None
        record = run_spec(planned.spec, plan.stores["tiny"])
        assert record.status == "finished", record.error
        costs[record.method] = json.loads(record.to_json())["cost"]
    assert fits == ["erm", "second"]
    keys = {name: [key for key in cost["shared"] if key.startswith("erm:")] for name, cost in costs.items()}
    assert keys["erm"] == keys["dfr"] == keys["jtt"]
    assert len(keys["erm"]) == 1
    passes = {name: (cost["marginal"]["n_fwd"], cost["scratch"]["n_fwd"]) for name, cost in costs.items()}
    assert passes["erm"] == passes["dfr"] == (0, TRAIN * EPOCHS)
    assert passes["jtt"] == (TRAIN * EPOCHS, TRAIN * EPOCHS + TRAIN)  # its first run is one of the two epochs
    assert costs["dfr"]["marginal"]["n_fwd_nograd"] == VAL
    assert costs["jtt"]["marginal"]["n_fwd_nograd"] == TRAIN


def test_one_run_bills_a_shared_artifact_once() -> None:
    clock = Clock(torch.device("cpu"))
    lab = laboratory(clock)
    for _ in range(3):
        checkpoint = lab.erm_checkpoint(lab.erm(), EPOCHS)
        lab.outputs(checkpoint, "val")
    assert sorted(cost.n_fwd for cost in clock.shared.values()) == [0, TRAIN * EPOCHS]
    assert sorted(cost.n_fwd_nograd for cost in clock.shared.values()) == [0, VAL]
    assert clock.stages == {}  # the making is billed through the artifact, not again


@pytest.mark.parametrize("epochs", [(1, 2), (2, 1)])
def test_of_two_epochs_of_the_shared_training_the_later_is_billed(epochs: tuple[int, int]) -> None:
    clock = Clock(torch.device("cpu"))
    lab = laboratory(clock)
    for epoch in epochs:
        lab.erm_checkpoint(lab.erm(), epoch)
    assert [cost.n_fwd for cost in clock.shared.values()] == [2 * TRAIN]


@pytest.mark.parametrize(("images", "epochs"), [(1800, 15), (4795, 30), (50_000, 29)])
def test_a_share_of_the_epochs_is_a_whole_number_of_passes(images: int, epochs: int) -> None:
    whole = StageCost(n_fwd=images * epochs, peak_mem_mib=7)
    shares = [whole.scaled(epoch / epochs) for epoch in range(1, epochs + 1)]
    assert [share.n_fwd for share in shares] == [images * epoch for epoch in range(1, epochs + 1)]
    assert {share.peak_mem_mib for share in shares} == {7}


def test_cached_outputs_are_those_computed_anew() -> None:
    lab = laboratory(Clock(torch.device("cpu")))
    checkpoint = lab.erm_checkpoint(lab.erm(), EPOCHS)
    fresh = lab.outputs(Checkpoint(checkpoint.model), "val")
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(fresh, lab.outputs(checkpoint, "val"), strict=True))


def test_predicting_the_test_split_is_nobodys_cost() -> None:
    clock = Clock(torch.device("cpu"))
    lab = laboratory(clock)
    checkpoint = lab.erm_checkpoint(lab.erm(), EPOCHS)
    before = dict(clock.shared)
    lab.test_is_open = True
    lab.outputs(checkpoint, "test")
    assert clock.shared == before
    assert clock.stages == {}


# ----------------------------------------------------------------------------------------------------------- pruning


@pytest.fixture
def worked() -> dict[str, tuple[int, int]]:
    """A home after a run; what `contents` says of it."""
    plan = plan_tiny("dfr")
    spec = plan.runs[0].spec
    assert spec is not None
    assert run_spec(spec, plan.stores["tiny"]).status == "finished"
    return {name: (count, size) for name, count, size in contents()}


def test_pruning_removes_artifacts_and_leftovers_and_keeps_runs_and_data(
    home: Path, worked: dict[str, tuple[int, int]]
) -> None:
    for leftover in (data_home() / "store" / f"{TEMPORARY}x", home / "runs" / "tiny" / f"{TEMPORARY}y.json"):
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_bytes(bytes(100))
    artifacts = sum(size for name, (_, size) in worked.items() if name.startswith("artifacts/"))
    assert worked["artifacts/erm"][0] == EPOCHS + 3  # an epoch a file, losses, predictions, meta
    assert prune_artifacts() == artifacts + 200
    after = {name: (count, size) for name, count, size in contents()}
    assert after == {name: value for name, value in worked.items() if not name.startswith("artifacts/")}
    assert after["runs"][0] == 2
    assert not list(home.rglob(f"{TEMPORARY}*"))
    assert prune_artifacts() == 0


def test_runs_are_repeated_to_the_same_bits_after_pruning(home: Path, worked: dict[str, tuple[int, int]]) -> None:
    (path,) = (home / "runs").rglob("*.npz")
    before = path.read_bytes()
    prune_artifacts()
    path.unlink()
    plan = plan_tiny("dfr")
    assert plan.runs[0].spec is not None
    run_spec(plan.runs[0].spec, plan.stores["tiny"])
    assert path.read_bytes() == before


def test_pruning_refuses_while_another_is_at_work(home: Path, worked: dict[str, tuple[int, int]]) -> None:
    before = sorted(home.rglob("*"))
    with lock(artifacts_home() / "erm" / "x"), pytest.raises(UserError, match="at work"):
        prune_artifacts()
    assert [path for path in sorted(home.rglob("*")) if path.parent != locks_home()] == [
        path for path in before if path.parent != locks_home()
    ]
    assert prune_artifacts() > 0


def test_pruning_an_empty_home_frees_nothing() -> None:
    assert prune_artifacts() == 0
    assert {name: count for name, count, _ in contents()} == {
        **dict.fromkeys(("runs", "data/store", "data/pixels"), 0),
        "board index": 0,
    }
