"""What disks, memory and clocks do to a run: every damage is found by a checksum and named, and nothing is lost."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from crashes import content, differing
from helpers import Call, plan_tiny
from worstgroup.benchmark import artifacts, cache, home, provenance, runner
from worstgroup.benchmark.artifacts import load_state
from worstgroup.benchmark.budget import Requires
from worstgroup.benchmark.errors import CorruptFile, DiskError
from worstgroup.benchmark.home import ABANDONED, TEMPORARY, lock, locks_home, write_bytes
from worstgroup.benchmark.planning import Plan
from worstgroup.benchmark.record import RunRecord, find, read
from worstgroup.benchmark.runner import run_spec
from worstgroup.leaderboard.aggregate import board
from worstgroup.leaderboard.verify import verify

METHODS = ("erm", "jtt", "dfr")
FLIPS = 6
"""Places in a file at which a bit is turned, one after another."""


def make(plan: Plan | None = None) -> dict[str, RunRecord]:
    """Run a plan, by default of all methods on `tiny`; records by method."""
    plan = plan or plan_tiny(*METHODS)
    return {one.spec.method: run_spec(one.spec, plan.stores["tiny"]) for one in plan.runs if one.spec}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with finished runs and their artifacts; copy it to damage it."""
    folder = tmp_path_factory.mktemp("whole") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORSTGROUP_HOME", str(folder))
        assert {record.status for record in make().values()} == {"finished"}
    return folder


@pytest.fixture
def worked(whole: Path, home: Path) -> Path:
    """That home, as this test's own, without its records: they are to be made again from the rest."""
    shutil.copytree(whole, home)
    shutil.rmtree(home / "runs")
    return home


def flip(path: Path, at: int) -> None:
    """Turn one bit of one byte, and leave the time of change."""
    status, damaged = path.stat(), bytearray(path.read_bytes())
    damaged[at] ^= 1 << at % 8
    path.write_bytes(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def flipped(path: Path, times: int = FLIPS) -> Iterator[int]:
    """Damage a file at one drawn place after another, each alone."""
    whole = path.read_bytes()
    for at in np.random.default_rng(len(whole)).integers(0, len(whole), times):
        flip(path, int(at))
        yield int(at)
        path.write_bytes(whole)


# ---------------------------------------------------------------------------------------------------------- artifacts

ARTIFACTS = (
    "erm/*/epoch_0002.safetensors",
    "erm/*/predictions.npy",
    "features/*/features.npy",
    "features/*/logits.npy",
)


@pytest.mark.parametrize("damage", ["one bit", "truncated", "gone"])
@pytest.mark.parametrize("pattern", ARTIFACTS)
def test_a_damaged_artifact_is_named_and_made_again(worked: Path, whole: Path, pattern: str, damage: str) -> None:
    path = sorted((worked / "artifacts").glob(pattern))[0]
    harms: dict[str, Callable[[Path], object]] = {
        "one bit": lambda file: flip(file, file.stat().st_size * 3 // 4),
        "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
        "gone": Path.unlink,
    }
    harms[damage](path)
    failed = [record for record in make().values() if record.status == "failed"]
    assert failed, "nobody noticed"
    said = f"{path} is damaged; delete the folder {path.parent}, it is made again."
    assert {record.error for record in failed} == {said}
    shutil.rmtree(path.parent)
    make()
    assert differing(content(worked), content(whole)) == []


@pytest.mark.parametrize("pattern", ARTIFACTS)
def test_every_bit_of_an_artifact_is_covered(worked: Path, pattern: str) -> None:
    path = sorted((worked / "artifacts").glob(pattern))[0]
    made = artifacts.Artifact("", "", path.parent, artifacts.StageCost(), artifacts.read_meta(path.parent)["files"])
    reader = made.tensors if path.suffix == ".safetensors" else made.array
    for at in flipped(path, 40):
        with pytest.raises(CorruptFile, match=path.name):
            reader(path.stem)
        assert at >= 0
    assert len(reader(path.stem))


def test_damaged_facts_of_an_artifact_are_never_billed(worked: Path) -> None:
    """Whatever bit of its description turns: it is named, or nothing has changed."""
    (path,) = (worked / "artifacts/erm").glob("*/meta.json")
    expected = artifacts.read_meta(path.parent)
    named = 0
    for _ in flipped(path, 150):
        try:
            found = artifacts.read_meta(path.parent)
        except CorruptFile as error:
            named += str(path) in str(error)
            continue
        assert found["cost"] == expected["cost"]
        assert found["files"] == expected["files"]
    assert named > 100


def test_a_damaged_checkpoint_starts_anew(worked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full state of a training that was killed: whatever bit of it turns, it is not gone on from."""
    monkeypatch.setattr(runner, "drop_work", lambda name: None)
    plan = plan_tiny("groupdro")
    make(plan)
    assert plan.runs[0].spec
    (path,) = artifacts.work_folder(plan.runs[0].spec.hash).glob("*.pt")
    expected = load_state(path)
    assert expected is not None
    refused = 0
    for _ in flipped(path, 60):
        found = load_state(path)
        refused += found is None
        if found is not None:  # a bit of a name or a date that nobody reads
            assert_same(found, expected)
    assert refused > 40


def assert_same(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


@pytest.mark.usefixtures("unguarded")
def test_damaged_weights_of_an_epoch_do_not_become_an_artifact(
    worked: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared training was killed after its last epoch, then a bit of what it kept turned."""
    shutil.rmtree(worked / "artifacts")
    real = artifacts.write_folder

    def killed(path: Path, fill: Callable[[Path], None], seal: str) -> None:
        real(path, fill, seal)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            make()
    shutil.rmtree(worked / "artifacts/erm")
    (path,) = (worked / "artifacts/work").glob("*/epoch_0001.safetensors")
    flip(path, path.stat().st_size - 5)
    assert make(plan_tiny("erm"))["erm"].error == (
        f"{path} is damaged; delete the folder {path.parent}, it is made again."
    )
    shutil.rmtree(path.parent)
    make()
    assert differing(content(worked), content(whole)) == []


# ------------------------------------------------------------------------------------------------------------- stores

STORES = ("pixels/*/images.npy", "pixels/*/pool.json", "store/*/train.labels.npz", "store/*/manifest.json")


@pytest.mark.parametrize("pattern", STORES)
def test_a_damaged_store_is_named_or_changes_nothing(worked: Path, whole: Path, call: Call, pattern: str) -> None:
    """By `run` itself, which trains on no pixel that it has not checked; a name or a date in a file changes nothing."""
    expected, named = content(whole), 0
    path = next(path for path in sorted((worked / "data").glob(pattern)) if is_used(path))
    for _ in flipped(path):
        done = call("run", "--dataset", "tiny", "--method", "erm,dfr", "--seeds", "0", "--jobs", "1")
        assert "Traceback" not in done.err
        if done.code:
            assert str(path.parent) in done.err
            assert "delete the folder, it is rebuilt" in done.err
            named += 1
        right = {place: known for place, known in content(worked).items() if known == expected.get(place)}
        wrong = [read(file) for file in find(worked / "runs") if str(file.relative_to(worked)) not in right]
        assert {record.status for record in wrong} <= {"failed"}
        shutil.rmtree(worked / "runs", ignore_errors=True)
    assert named


def is_used(path: Path) -> bool:
    """Whether plain training looks at it; nobody asked for the pixels of a view."""
    stores = plan_tiny("erm").stores
    return path.parent.parent.name == "store" or path.parent.name == stores["tiny"].pools["train"]


def test_altered_pixels_are_seen_by_a_run_and_mended_by_a_rebuild(worked: Path, whole: Path, call: Call) -> None:
    plan = plan_tiny(*METHODS)
    pool = worked / "data/pixels" / plan.stores["tiny"].pools["train"]
    assert make(plan)["erm"].status == "finished"  # checked once
    flip(pool / "images.npy", 5000)
    shutil.rmtree(worked / "runs")
    errors = {record.error for record in make().values()}
    assert errors == {f"{pool / 'images.npy'}: images 0 to 96 were altered; delete the folder, it is rebuilt."}
    shutil.rmtree(pool)
    make()
    assert differing(content(worked), content(whole)) == []


# ------------------------------------------------------------------------------------------------------------- records


def test_altered_predictions_are_left_out_and_named(call: Call, runs: Path) -> None:
    path = sorted(runs.rglob("groupdro-*.npz"))[0]
    for _ in flipped(path, 3):
        for command in ("board", "verify"):
            done = call(command)
            assert str(path) in done.out + done.err
            assert "predictions.sha256" in done.out + done.err
    assert call("verify").code == 0


def test_who_waited_for_a_run_that_failed_does_not_fail_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[float] = []

    def fail(*_: object) -> None:
        tries.append(time.monotonic())
        time.sleep(0.5)
        raise ValueError("no luck")

    plan = plan_tiny("erm")
    monkeypatch.setattr(runner, "execute", fail)
    records: list[RunRecord] = []
    waiting = [threading.Thread(target=lambda: records.extend(make(plan).values())) for _ in range(4)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    assert [record.error[:19] for record in records] == ["ValueError: no luck"] * 4
    assert len(tries) == 1
    make(plan)
    assert len(tries) == 2  # a later command tries again


# -------------------------------------------------------------------------------------------------------------- memory


class Hungry:
    """Trains until memory runs out."""

    error: Exception | None = MemoryError()

    def __init__(self, config: object) -> None:
        pass

    def fit(self, task):  # type: ignore[no-untyped-def]
        from worstgroup.benchmark.engine import Objective

        class Eats(Objective[None]):
            def step(self, batch, optimizers):  # type: ignore[no-untyped-def]
                if Hungry.error:
                    raise Hungry.error
                return super().step(batch, optimizers)

        return task.train(Eats(None))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3.00 GiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_is_a_failed_run_with_its_reason(
    error: Exception, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    register("hungry", Hungry, Requires(native="none"))
    monkeypatch.setattr(Hungry, "error", error)
    plan = plan_tiny("hungry", "erm")
    records = make(plan)
    assert records["hungry"].status == "failed"
    assert records["hungry"].error.startswith("out of memory: take fewer --jobs")
    assert str(error) in records["hungry"].error
    assert "test_faults.py" in records["hungry"].error
    assert records["erm"].status == "finished"
    monkeypatch.setattr(Hungry, "error", None)
    assert make(plan)["hungry"].status == "finished"


# --------------------------------------------------------------------------------------------------------------- clocks


def test_a_clock_that_goes_backwards(whole: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at it is an hour earlier than the last one, and so are the times of files."""
    ticks = iter(range(10**6))
    start = time.time()

    class Backwards(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "datetime":
            return datetime(2020, 1, 1, tzinfo=UTC) - timedelta(hours=next(ticks))

    replace = Path.replace

    def replaced(self: Path, target: Path) -> Path:
        earlier = start - 3600 * next(ticks)
        os.utime(self, (earlier, earlier))
        return replace(self, target)

    monkeypatch.setattr(time, "time", lambda: start - 3600 * next(ticks))
    monkeypatch.setattr(provenance, "datetime", Backwards)
    monkeypatch.setattr(Path, "replace", replaced)
    records = make()
    assert differing(content(home), content(whole)) == []
    for record in records.values():
        assert record.cost
        assert min(record.cost.scratch.wall_s, record.cost.scratch.device_s, record.cost.marginal.wall_s) >= 0
    created = [records[method].created for method in METHODS]
    assert created == sorted(created, reverse=True)
    assert [verify(path).problems for path in find(home / "runs")] == [()] * len(METHODS)
    before, problems = board(find(home / "runs"))
    assert problems == []
    again = {method: record.to_json() for method, record in make().items()}
    assert again == {method: record.to_json() for method, record in records.items()}  # read, not made again
    path = next(find(home / "runs"))
    path.write_text(path.read_text().replace('"device": "', '"device": "older '))
    os.utime(path, (1, 1))
    assert "older" in str(board(find(home / "runs"))[0])
    assert "older" not in str(before)


# --------------------------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "no file may be that large here"),
        (errno.EIO, "the disk has failed"),
    ],
)
def test_a_disk_that_refuses_ends_the_command_and_is_no_failed_run(
    number: int, says: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(DiskError, match=says):
            make()
    assert list(find(home / "runs")) == []
    assert not list(home.rglob(f"{TEMPORARY}*"))
    assert {record.status for record in make().values()} == {"finished"}


def test_leftovers_beside_a_file_of_the_users_go_with_its_next_writing(tmp_path: Path, home: Path) -> None:
    """Where no `cache --prune` looks: those of the same file that nobody has touched for an hour."""
    path, old = tmp_path / "board [1].md", time.time() - ABANDONED - 60
    names = {
        name: tmp_path / f"{TEMPORARY}{name}" for name in ("board [1].md-1-aa", "board [1].md-2-bb", "other.md-3-cc")
    }
    for leftover in names.values():
        leftover.write_text("half")
        os.utime(leftover, (old, old))
    os.utime(names["board [1].md-2-bb"])
    write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert [name for name, leftover in names.items() if leftover.exists()] == ["board [1].md-2-bb", "other.md-3-cc"]


def test_a_folder_that_is_being_deleted_is_not_taken_for_whole(worked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (worked / "artifacts/erm").iterdir()

    def killed(place: Path) -> None:
        (place / "epoch_0001.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(home.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            home.remove_folder(path)
    assert [place.name.startswith(TEMPORARY) for place in (worked / "artifacts/erm").iterdir()] == [True]
    cache.prune_artifacts()
    assert not list((worked / "artifacts").iterdir())


def test_locks_of_the_dead_hold_nothing(worked: Path) -> None:
    """A lock is the kernel's, not the file's: files of processes that are gone neither block nor count as at work."""
    for file in locks_home().iterdir():
        file.write_text("12345\n")
    with lock(worked / "anything"):
        pass
    make()
    assert cache.prune_artifacts() > 0


def test_what_lies_there_is_told_while_others_write_and_delete(worked: Path) -> None:
    stop = threading.Event()
    folder = worked / "artifacts/busy"

    def churn() -> None:
        while not stop.is_set():
            (folder / "deep").mkdir(parents=True, exist_ok=True)
            for i in range(20):
                (folder / "deep" / str(i)).write_bytes(b"x")
            shutil.rmtree(folder)

    busy = threading.Thread(target=churn)
    busy.start()
    try:
        for _ in range(100):
            told = {name: size for name, _, size in cache.contents()}
            assert told["artifacts/erm"] > 0
    finally:
        stop.set()
        busy.join()
