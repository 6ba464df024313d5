"""Where things lie: locks that all who share a home know by one name, and folders that two make at the same time."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import plan_tiny
from worstgroup.benchmark import artifacts, home, parcels, store
from worstgroup.benchmark.artifacts import artifact, artifact_path, read_meta
from worstgroup.benchmark.cost import StageCost
from worstgroup.benchmark.errors import DiskError
from worstgroup.benchmark.home import TEMPORARY, home_at, lock, locks_home, write_folder
from worstgroup.benchmark.parcels import pack_store, unpack_store

SEAL = "meta.json"


def name_of(at: Path, path: Path) -> str:
    """The lock file of `path` for a process that has its home in `at`."""
    with home_at(at):
        shutil.rmtree(locks_home(), ignore_errors=True)
        with lock(path):
            (made,) = locks_home().iterdir()
    return made.name


def test_a_home_that_is_mounted_in_two_places_has_the_same_locks(tmp_path: Path) -> None:
    here, there = tmp_path / "mnt" / "home", tmp_path / "scratch" / "shared"
    for inside in ("artifacts/erm/0123", "runs/tiny/erm.json"):
        assert name_of(here, here / inside) == name_of(there, there / inside)
    assert name_of(here, here / "artifacts/erm/0123") != name_of(there, there / "artifacts/erm/4567")


def test_a_home_behind_a_link_has_the_same_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    homes = tmp_path / "real", tmp_path / "link", Path("link")
    names = {name_of(at, place / "data" / "x") for at in homes for place in homes}
    assert len(names) == 1


def test_what_lies_outside_of_the_home_is_locked_by_its_whole_path(tmp_path: Path) -> None:
    at = tmp_path / "home"
    names = [name_of(at, place / "data" / "x") for place in (at, tmp_path / "one", tmp_path / "two")]
    assert len(set(names)) == 3


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_folder_that_another_has_finished_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "made"

    def fill(folder: Path) -> None:
        (folder / SEAL).write_text("ours")
        path.mkdir()
        (path / SEAL).write_text("theirs")

    write_folder(path, fill, SEAL)
    assert (path / SEAL).read_text() == "theirs"
    assert [left.name for left in tmp_path.iterdir() if left.name.startswith(TEMPORARY)] == []


@pytest.mark.parametrize("seal", ["", SEAL])
def test_a_folder_of_something_else_is_neither_taken_nor_overwritten(tmp_path: Path, seal: str) -> None:
    path = tmp_path / "made"
    path.mkdir()
    (path / "mine.txt").write_text("mine")
    with pytest.raises(
        DiskError, match=r"cannot write .*made: a folder that is not empty stands there\. Choose another"
    ):
        write_folder(path, lambda folder: (folder / SEAL).touch(), seal)
    assert [left.name for left in tmp_path.rglob("*")] == ["made", "mine.txt"]


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """As soon as a folder is filled, another process whose locks do not reach here has put the same there."""
    met: list[Path] = []

    def write_both(path: Path, fill: Callable[[Path], None], *more: Any) -> None:
        def late(folder: Path) -> None:
            fill(folder)
            shutil.copytree(folder, path)
            met.append(path)

        home.write_folder(path, late, *more)

    for module in (artifacts, parcels, store):
        monkeypatch.setattr(module, "write_folder", write_both)
    return met


def test_an_artifact_made_twice_at_a_time_is_taken(raced: list[Path]) -> None:
    def make(folder: Path) -> StageCost:
        (folder / "weights").write_bytes(b"1")
        return StageCost(n_fwd=3)

    made = artifact("erm", {"of": "all"}, make)
    assert raced == [made.path] == [artifact_path("erm", {"of": "all"})]
    assert read_meta(made.path)["cost"] == made.cost == StageCost(n_fwd=3)
    assert list(made.path.parent.iterdir()) == [made.path]


def test_a_store_made_twice_at_a_time_is_taken(
    raced: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = plan_tiny("erm").stores["tiny"]
    assert built.path in raced
    parcel = pack_store(built, lambda content: content)
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "elsewhere"))
    there = unpack_store(parcel, built, lambda content: content)
    assert raced[-1] == there.path
    assert there.fingerprint == built.fingerprint
