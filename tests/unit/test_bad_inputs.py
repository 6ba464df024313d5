"""Whatever is typed or lies on disk: exit code 2 and one clear sentence, never a traceback, and nothing half-written.

Records have a file of their own, test_fuzz_records.py.
"""

import logging
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from fixtures import hostile
from formats import celeba, embeddings, folder, idx, packed, spawrious, urbancars, waterbirds
from helpers import Call, Result
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from worstgroup.authoring import contract
from worstgroup.benchmark import profiling
from worstgroup.benchmark.archives import unpack
from worstgroup.benchmark.backbone import read_state
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.commands import run
from worstgroup.datasets.idx import read_idx

PLAIN: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],  # an input is as short as it was drawn: shrinking would take minutes
    "suppress_health_check": list(HealthCheck),
}
REFUSED = "exit code 2"
LOG = logging.getLogger(__name__)
FEW, MANY = 30, 500
"""Inputs of an entry in CI, and by hand with -m slow."""
AMOUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
amounts = pytest.mark.parametrize("amount", AMOUNTS)
Check = Callable[..., Result]


def search(amount: int, *drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., str]], None]:
    """Run a function on so many drawn inputs, the same ones every time; it says how each ended. Some must be refused.

    With --log-cli-level=INFO the number of each is shown.
    """

    def run(judge: Callable[..., str]) -> None:
        ended: Counter[str] = Counter()

        def one(inputs: tuple[Any, ...]) -> None:
            ended[judge(*inputs)] += 1

        settings(max_examples=amount, **PLAIN)(given(st.tuples(*drawn))(one))()
        LOG.info("%s", dict(ended))
        assert ended[REFUSED]

    return run


def files(place: Path) -> set[str]:
    """What lies below a folder but for locks and remembered hashes, which hold nothing of a dataset."""
    found = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(("locks/", "data/hashes/"))}


@pytest.fixture
def check(call: Call, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Calls the program in an empty folder and judges what it left: how it ended, what it said, what it wrote."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*arguments: object) -> Result:
        before = files(home) | files(here)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = call(*arguments)
        stray = [w for w in warned if issubclass(w.category, UserWarning | RuntimeWarning | SyntaxWarning)]
        assert [str(w.message) for w in stray if not issubclass(w.category, Image.DecompressionBombWarning)] == []
        assert result.code in (0, 1, 2), result
        assert "Traceback" not in result.out + result.err
        after = files(home) | files(here)
        assert not any(TEMPORARY in name for name in after), after
        if result.code == 2:
            assert_clear(result.err)
            assert after == before
        return result

    return run


def assert_clear(said: str) -> None:
    """One message: lines that say what is wrong, or typer's, with nothing that moves a cursor."""
    lines = said.strip().splitlines()
    if lines[0].startswith("Usage:"):
        assert sum("Error" in line for line in lines) == 1, said
        return
    assert len(said) > 20
    assert all(line.startswith("error: ") and line.isprintable() for line in lines), said
    assert len(set(lines)) == len(lines), said


def ended(result: Result) -> str:
    """How a call ended."""
    return f"exit code {result.code}"


def assert_one(result: Result) -> str:
    """A file that was refused is refused in one sentence; how the call ended."""
    assert result.code in (0, 2), result
    if result.code == 2:
        assert len(result.err.splitlines()) == 1, result.err
        assert result.out == ""
    return ended(result)


# ------------------------------------------------------------------------------------------------------ command line

SLOT = "\N{BULLET}"
COMMANDS = (
    *(
        f"run {SLOT} --dry-run",
        f"run suite.toml --dataset {SLOT} --dry-run",
        f"run suite.toml --seeds {SLOT} --dry-run",
    ),
    *(f"run --dataset {SLOT} --method erm --dry-run", f"run --dataset tiny --method {SLOT} --dry-run"),
    f"run --dataset tiny --method erm --backbone {SLOT} --dry-run",
    f"run --dataset tiny --method erm --weights {SLOT} --dry-run",
    f"run --dataset tiny --method groupdro --budget {SLOT} --dry-run",
    f"run --dataset tiny --method dfr --extra {SLOT} --dry-run",
    f"run --dataset tiny --method groupdro --set {SLOT} --dry-run",
    f"run --dataset tiny --method groupdro --set groupdro.{SLOT}={SLOT} --dry-run",
    f"run --dataset tiny --method groupdro --set recipe.lr={SLOT} --dry-run",
    f"run --dataset tiny --method groupdro --set recipe.epochs={SLOT} --dry-run",
    f"run --dataset tiny --method groupdro --tuning {SLOT} --dry-run",
    f"run --dataset tiny --method groupdro --tuning 2 --search {SLOT} --dry-run",
    f"run --dataset tiny --method groupdro --tuning 2 --search recipe.lr={SLOT} --dry-run",
    f"run --dataset tiny --method erm --shard {SLOT} --dry-run",
    f"run --dataset tiny --method erm --root {SLOT} --dry-run",
    f"run --dataset tiny --method erm --plugin {SLOT} --dry-run",
    f"run --dataset tiny --method erm --jobs {SLOT} --threads {SLOT} --dry-run",
    *(f"tune --dataset {SLOT} --method erm", f"tune --dataset tiny --method {SLOT} --budget {SLOT}"),
    *(f"tune --dataset tiny --method groupdro --draws {SLOT}", f"tune --dataset tiny --method erm --seed {SLOT}"),
    *(f"profile --method {SLOT}", f"profile --dataset {SLOT}", f"profile --size {SLOT}", f"profile --batch {SLOT}"),
    *(f"profile --steps {SLOT}", f"profile --rounds {SLOT}", f"profile --warmup {SLOT}", f"profile --suite {SLOT}"),
    *(f"profile --format {SLOT}", f"profile --output {SLOT}", f"profile --trace {SLOT}", f"profile --backbone {SLOT}"),
    *(f"board {SLOT}", f"board --format {SLOT}", f"board --output {SLOT}", f"board --check {SLOT}"),
    *(f"verify {SLOT}", f"submit {SLOT}", f"submit erm --path {SLOT}", f"submit erm --out {SLOT}"),
    *(f"prepare {SLOT}", f"prepare tiny --root {SLOT}", f"prepare tiny --set {SLOT}", f"prepare folder:{SLOT}"),
    *(f"prepare folder --root {SLOT}", f"prepare embeddings:{SLOT}", f"prepare celeba:{SLOT}/{SLOT}"),
    *(f"show {SLOT}", f"show tiny --images --output {SLOT}", f"show tiny --images --set {SLOT}"),
    *(f"explain {SLOT}", f"explain {SLOT} --split {SLOT}", f"explain x --columns {SLOT}", f"explain x --out {SLOT}"),
    *(f"ls {SLOT}", f"ls methods --plugin {SLOT}", f"cache {SLOT}", f"check {SLOT}", f"{SLOT}", f"{SLOT} {SLOT}"),
    *(f"new-method {SLOT}", f"new-dataset {SLOT}", f"embed --dataset tiny --backbone {SLOT} --output x.npz"),
    f"embed --dataset {SLOT} --backbone tiny_cnn --output {SLOT}",
)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is accepted is not done: searches, measurements and checks end where the work would begin."""

    def stop(*_: object, **__: object) -> Any:
        raise typer.Exit(0)

    monkeypatch.setattr(run, "_search", stop)
    monkeypatch.setattr(profiling, "measure", stop)
    monkeypatch.setattr(contract, "CHECKS", {})


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "amount", [pytest.param(200, id="few"), pytest.param(8 * MANY, id="many", marks=pytest.mark.slow)]
)
def test_arguments(check: Check, amount: int) -> None:
    Path("suite.toml").write_bytes(SUITE)

    @search(amount, st.sampled_from(COMMANDS), hostile.texts(), hostile.texts())
    def judge(command: str, first: str, second: str) -> str:
        values = iter((first, second))
        return ended(check(*(re.sub(SLOT, lambda _: next(values), part) for part in command.split(" "))))


# ------------------------------------------------------------------------------------------------------------ suites

SUITE = b"""summary = "A suite"
seeds = [0, 1]
tuning = 0
settings = { "recipe.epochs" = 2 }

[[blocks]]
dataset = "tiny"
methods = ["erm", "groupdro train+val", "dfr+exmap val-20", "groupdro@class none"]
backbone = ["tiny_cnn"]
settings = { "groupdro.step_size" = 0.1 }
grid = { "recipe.lr" = [0.01, 0.1] }
search = { "recipe.lr" = "10^U(-4,-1)" }
"""
VALUES = (
    *(
        b"0",
        b"-1",
        b"1e999",
        b"nan",
        b"true",
        b'""',
        b'"x"',
        b"[]",
        b"[[]]",
        b"{}",
        b"[0.5]",
        b'["a", 1]',
        b"1979-05-27",
    ),
    *(b"9" * 400, b'"""', b"[", b"=", b"'\\'", b'"\\ud800"', b'"[/x]"', b'"\\u001b[2J"', b'"a\\nb"', b"0x", b"inf"),
)


@amounts
def test_suites(check: Check, amount: int) -> None:
    values = st.builds(_value_replaced, st.integers(0, 60), st.sampled_from(VALUES))

    @search(amount, st.one_of(values, values, hostile.bytes_damages()))
    def judge(damage: hostile.Damage) -> str:
        Path("suite.toml").write_bytes(damage(SUITE))
        return ended(check("run", "suite.toml", "--dry-run"))


def _value_replaced(which: int, value: bytes) -> hostile.Damage:
    """Put another value, or a broken one, where a suite has some value."""

    def change(content: bytes) -> bytes:
        places = list(re.finditer(rb'"[^"]*"|[0-9.]+|\[[^\]]*\]|\{[^}]*\}', content))
        place = places[which % len(places)]
        return content[: place.start()] + value + content[place.end() :]

    return change


# ---------------------------------------------------------------------------------------------------------- datasets


def _celeba(root: Path) -> Path:
    faces = celeba.draw_faces()
    celeba._official(root, faces, celeba.draw_pictures(root / "drawn", faces.names))
    return root


def _celeba_csv(root: Path) -> Path:
    faces = celeba.draw_faces()
    celeba._kaggle(root, faces, celeba.draw_pictures(root / "drawn", faces.names))
    return root


def _celeba_jtt(root: Path) -> Path:
    faces = celeba.draw_faces()
    celeba._jtt(root, faces, celeba.draw_pictures(root / "drawn", faces.names))
    return root


TABLES: dict[str, tuple[str, Callable[[Path], Path], str, str]] = {
    "folder": ("folder", folder.write_folder, "metadata.csv", ","),
    "waterbirds": ("waterbirds", waterbirds.write_release, "metadata.csv", ","),
    "celeba attributes": ("celeba", _celeba, "list_attr_celeba.txt", " "),
    "celeba partition": ("celeba", _celeba, "list_eval_partition.txt", " "),
    "celeba csv": ("celeba", _celeba_csv, "list_attr_celeba.csv", ","),
    "celeba jtt": ("celeba", _celeba_jtt, "*.csv", ","),
}
"""By entry: the dataset, what writes its files, the table among them, and what separates its cells."""


@amounts
@pytest.mark.parametrize("entry", TABLES)
def test_tables(check: Check, tmp_path: Path, entry: str, amount: int) -> None:
    dataset, write, pattern, separator = TABLES[entry]
    root = write(tmp_path / "data")
    path = next(root.rglob(pattern))
    good = path.read_bytes()
    assert check("prepare", dataset, "--root", root).code == 0

    @search(amount, hostile.table_damages(separator))
    def judge(damage: hostile.Damage) -> str:
        path.write_bytes(damage(good))
        return assert_one(check("prepare", dataset, "--root", root))


BINARIES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "npz": ("embeddings", lambda root: embeddings.write_npz(root / "e.npz").parent, "e.npz"),
    "parquet": ("embeddings", lambda root: _parquet(root / "e.parquet").parent, "e.parquet"),
    "safetensors": ("embeddings", lambda root: _safetensors(root / "e.safetensors").parent, "e.safetensors"),
}
"""By entry: the dataset, what writes its files, and the one that is damaged."""


def _parquet(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    arrays = embeddings.draw()
    columns = {f"f{i}": column for i, column in enumerate(arrays.pop("features").T)}
    pd.DataFrame(columns | arrays).to_parquet(path)
    return path


def _safetensors(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    save_file({name: torch.from_numpy(array) for name, array in embeddings.draw().items()}, path)
    return path


@amounts
@pytest.mark.parametrize("entry", BINARIES)
def test_binary_files(check: Check, tmp_path: Path, entry: str, amount: int) -> None:
    dataset, write, name = BINARIES[entry]
    root = write(tmp_path / "data")
    path = root / name
    good = path.read_bytes()
    assert check("prepare", dataset, "--root", root).code == 0

    @search(amount, hostile.bytes_damages())
    def judge(damage: hostile.Damage) -> str:
        path.write_bytes(damage(good))
        return assert_one(check("prepare", dataset, "--root", root))


ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "objects": lambda array: array.astype(object),
    "floats": lambda array: array.astype(float),
    "half": lambda array: array.astype(float) + 0.5,
    "NaN": lambda array: np.where(np.arange(array.size).reshape(array.shape) == 3, np.nan, array),
    "infinite": lambda array: np.where(np.arange(array.size).reshape(array.shape) == 3, np.inf, array),
    "complex": lambda array: array.astype(complex),
    "texts": lambda array: array.astype(str),
    "bytes": lambda array: array.astype("S4"),
    "dates": lambda array: array.astype("i8").astype("M8[s]"),
    "records": lambda array: np.zeros(len(array), [("a", "i4"), ("b", "f4")]),
    "short": lambda array: array[:-1],
    "none": lambda array: array[:0],
    "scalar": lambda array: array.ravel()[0],
    "flat": lambda array: array.ravel(),
    "deep": lambda array: array.reshape(*array.shape, 1, 1),
    "negative": lambda array: -1 - array.astype(np.int64),
    "huge": lambda array: array.astype(np.int64) + 2**62,
    "unsigned": lambda array: array.astype(np.uint64) + np.uint64(2**63),
    "constant": lambda array: array * 0,
    "distinct": lambda array: np.arange(len(array)),
    "wide": lambda array: np.repeat(array.reshape(len(array), -1), 70, axis=1),
    "missing": lambda array: None,
}


@pytest.mark.parametrize("name", ["features", "y", "a", "split"])
def test_arrays_of_embeddings(check: Check, tmp_path: Path, name: str) -> None:
    for change in ARRAYS.values():
        changed = change(embeddings.draw()[name])
        path = embeddings.write_npz(tmp_path / "e.npz", **{name: changed})
        assert_one(check("prepare", "embeddings", "--root", path))


# ---------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of pictures, and the one that is replaced."""
    root = folder.write_folder(tmp_path / "data")
    return root, sorted(root.rglob("*.png"))[0]


@pytest.mark.parametrize("kind", hostile.READABLE)
def test_a_picture_of_another_kind_is_read(check: Check, picture: tuple[Path, Path], kind: str) -> None:
    picture[1].write_bytes(hostile.READABLE[kind])
    result = check("prepare", "folder", "--root", picture[0])
    assert result.code == 0, result.err


@pytest.mark.parametrize("kind", hostile.UNREADABLE)
def test_a_picture_that_is_none_is_refused(check: Check, picture: tuple[Path, Path], kind: str) -> None:
    picture[1].write_bytes(hostile.UNREADABLE[kind])
    result = check("prepare", "folder", "--root", picture[0])
    assert result.code == 2
    assert_one(result)
    assert picture[1].name in result.err


@amounts
def test_damaged_pictures(check: Check, picture: tuple[Path, Path], amount: int) -> None:
    good = [hostile.encoded(Image.effect_noise(hostile.SIZE, 90).convert("RGB"), kind) for kind in ("PNG", "JPEG")]

    @search(amount, st.sampled_from(good), hostile.bytes_damages())
    def judge(content: bytes, damage: hostile.Damage) -> str:
        picture[1].write_bytes(damage(content))
        return assert_one(check("prepare", "folder", "--root", picture[0], "--set", "data.size=8"))


# ------------------------------------------------------------------------------------------------------------- trees

NAMES = (
    "[red]x",
    "=1+1",
    "a b",
    "é",
    "\x1b[2J",
    "a\nb",
    "x" * 200,
    "-rf",
    ".hidden",
    "train",
    "%s",
    "a,b",
    "\udcff",
    "mask",
)


def _strange_folder(at: Path, name: str) -> None:
    (at / name).mkdir(exist_ok=True)


def _strange_picture(at: Path, name: str) -> None:
    folder.draw_picture(at / f"{name}.png")


def _strange_link(at: Path, name: str) -> None:
    (at / f"{name}.jpg").symlink_to("nowhere")


def _file_for_folder(at: Path, name: str) -> None:
    (at / f"{name}.png").mkdir(exist_ok=True)


TREES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "folder": ("folder", folder.write_tree),
    "spawrious": ("spawrious:o2o-easy", lambda root: spawrious.write_spawrious(root, 10).parent),
    "urbancars": ("urbancars", lambda root: urbancars.write_urbancars(root, masks=False).parent),
}


@pytest.mark.parametrize("entry", TREES)
@pytest.mark.parametrize("strange", [_strange_folder, _strange_picture, _strange_link, _file_for_folder])
def test_trees(check: Check, tmp_path: Path, entry: str, strange: Callable[[Path, str], None]) -> None:
    dataset, write = TREES[entry]
    root = write(tmp_path / "data")
    assert check("prepare", dataset, "--root", root).code == 0
    depths = [
        root,
        *(next(path for path in root.rglob("*") if path.is_dir() and _depth(path, root) == d) for d in (1, 2)),
    ]
    for at in depths:
        for name in NAMES:
            strange(at, name)
            assert_one(check("prepare", dataset, "--root", root))
            _remove(at, name)


def _depth(path: Path, root: Path) -> int:
    return len(path.relative_to(root).parts)


def _remove(at: Path, name: str) -> None:
    for path in (at / name, at / f"{name}.png", at / f"{name}.jpg"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


# ------------------------------------------------------------------------------------------- weights, idx and archives


def refusal(read: Callable[[], object]) -> str:
    """What is said against a file, on one line; empty where it is read."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            read()
        except UserError as error:
            said = str(error)
        else:
            said = ""
    assert said.isprintable(), said
    assert [str(w.message) for w in warned if not issubclass(w.category, DeprecationWarning)] == []
    return said


def _weights(folder: Path) -> Iterator[Path]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    torch.save(model.state_dict(), folder / "new.pt")
    torch.save(model.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), folder / "new.safetensors")
    yield from (folder / name for name in ("new.pt", "old.pt", "new.safetensors"))


@amounts
def test_weights(tmp_path: Path, amount: int) -> None:
    for path in _weights(tmp_path):
        good = path.read_bytes()

        @search(3 * amount, hostile.bytes_damages())
        def judge(damage: hostile.Damage, path: Path = path, good: bytes = good) -> str:
            path.write_bytes(damage(good))
            said = refusal(lambda: read_state(path))
            assert not said or said.startswith(f"weights {path}: ")
            assert "weights_only" not in said
            return REFUSED if said else "read"


@amounts
@pytest.mark.parametrize("name", ["labels-idx1-ubyte", "labels-idx1-ubyte.gz", "images-idx3-ubyte"])
def test_idx_files(tmp_path: Path, name: str, amount: int) -> None:
    images, labels = idx.draw_strokes(30)
    path = idx.write_idx(tmp_path / name, images if "images" in name else labels)
    good = path.read_bytes()

    @search(3 * amount, hostile.bytes_damages())
    def judge(damage: hostile.Damage) -> str:
        path.write_bytes(damage(good))
        said = refusal(lambda: read_idx(path))
        assert not said or said.startswith(f"{path}: ")
        return REFUSED if said else "read"


@amounts
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_archives(tmp_path: Path, name: str, amount: int) -> None:
    path, into = packed.write_archive(tmp_path / name), tmp_path / "into"
    good, beside = path.read_bytes(), files(tmp_path)

    @search(3 * amount, hostile.bytes_damages())
    def judge(damage: hostile.Damage) -> str:
        path.write_bytes(damage(good))
        said = refusal(lambda: unpack(path, into, lambda what, done, total: None))
        assert not said or said.startswith(f"{path}: ")
        assert not said or not into.exists()
        assert {file for file in files(tmp_path) if not file.startswith(("into/", "home/"))} == beside
        shutil.rmtree(into, ignore_errors=True)
        return REFUSED if said else "unpacked"
