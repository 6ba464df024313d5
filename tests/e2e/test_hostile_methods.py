"""Methods that look for labels beyond their budget get none, and a run that opened any file of them fails."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import Result, finish, start
from numpy.typing import NDArray
from worstgroup.benchmark.home import home_at
from worstgroup.benchmark.planning import Request, plan
from worstgroup.benchmark.record import RunRecord, find, read
from worstgroup.benchmark.spec import SPLITS

PLUGIN = Path(__file__).parents[1] / "fixtures" / "hostile_methods.py"
METHODS = ("peek-memory", "peek-model", "peek-files")


@pytest.fixture(scope="module")
def loot(finished_home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """What the hostile methods took at budget `none` from a home that other runs filled, and how theirs ended."""
    folder = tmp_path_factory.mktemp("loot")
    home = Path(shutil.copytree(finished_home, folder / "home"))
    asked = ("--dataset", "tiny", "--method", ",".join(METHODS), "--budget", "none", "--seeds", "0", "--jobs", "1")
    program = start(home, "run", *asked, "--plugin", PLUGIN, LOOT=str(folder))
    result = finish(program)
    return folder, result


def record(folder: Path, name: str) -> RunRecord:
    (found,) = (one for one in map(read, find(folder / "home" / "runs")) if one.method == name)
    return found


@pytest.fixture(scope="module")
def secrets(loot: tuple[Path, Result]) -> dict[str, NDArray[np.int64]]:
    """What no method may know at `none`: attributes of train, all of validation's and all labels of test."""
    with home_at(loot[0] / "home"):
        store = plan([Request("tiny", "erm", "none", seeds=(0,))]).stores["tiny"]
        splits = {name: store.split(name) for name in SPLITS}
    found = {f"{name} {j}": split.a[:, j] for name, split in splits.items() for j in range(2)}
    return {**found, "test y": splits["test"].y}


def tells(array: NDArray[np.int64], secret: NDArray[np.int64]) -> bool:
    """Whether some column of an array divides the images as the secret does."""
    columns = array.reshape(len(array), -1).T if len(array) == len(secret) else []
    pairs = (set(zip(column.tolist(), secret.tolist(), strict=True)) for column in columns)
    return any(len({a for a, _ in pair}) == len(pair) for pair in pairs if 1 < len(pair) < len(secret))


@pytest.mark.parametrize("name", ["memory", "model-1", "model-2", "model-3"])
def test_nothing_in_the_process_tells(
    loot: tuple[Path, Result], secrets: dict[str, NDArray[np.int64]], name: str
) -> None:
    with np.load(loot[0] / f"{name}.npz") as taken:
        arrays = list(taken.values())
    assert any(len(array) == 96 for array in arrays)  # it did dig: class labels of train are everyone's
    assert {what for what, secret in secrets.items() for array in arrays if tells(array, secret)} == set()


def test_what_tells_is_recognised(secrets: dict[str, NDArray[np.int64]]) -> None:
    a, b = secrets["test 0"], secrets["test 1"]
    assert tells(1 - a, a)
    assert tells(np.stack([b, a], axis=1), a)
    assert tells(2 * a + b, a)
    assert not tells(b, a)
    assert not tells(np.zeros_like(a), a)
    assert not tells(np.arange(len(a)), a)


def test_a_method_that_only_digs_gains_nothing(loot: tuple[Path, Result]) -> None:
    for made in (record(loot[0], name) for name in METHODS[:2]):
        assert made.status == "finished", made.error
        assert made.labels is not None
        assert made.labels.total_a == 0


def test_every_file_is_refused(loot: tuple[Path, Result]) -> None:
    outcome = json.loads((loot[0] / "files.json").read_text())
    assert len(outcome) == 27
    refusal = "BudgetExceeded: the method reached past its task for"
    assert {way: said for way, said in outcome.items() if not said.startswith(refusal)} == {}


def test_a_run_that_opened_one_fails_though_its_method_kept_quiet(loot: tuple[Path, Result]) -> None:
    failed = record(loot[0], "peek-files")
    assert failed.status == "failed"
    assert "val.labels.npz: labels come from task.groups(split)" in failed.error
    assert loot[1].code == 1
    assert "1 of 3 runs failed" in loot[1].err
