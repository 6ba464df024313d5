"""A bad record is named in one line and left out; the table of the others is as if it were not there."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Call, edit, put, repack
from worstgroup.benchmark import metrics
from worstgroup.benchmark.predictions import Arrays
from worstgroup.benchmark.record import find, predictions_path, read

Pick = Callable[[str], Path]
FORMATS = ("table", "md", "csv", "latex", "json", "html")


def recount(path: Path) -> None:
    """Give a record one more test image, answered rightly, and the metrics of that."""
    for field in ("m_test", "correct_test"):
        edit(path, put(f"groups.0.{field}", json.loads(path.read_text())["groups"][0][field] + 1))
    record = read(path)
    counts = record.counts()
    test = counts["correct_test"], counts["m_test"]
    worst = metrics.worst_group(*test)
    values = metrics.evaluate(*test, counts["n_train"], record.shape, record.spec_attributes())
    edit(path, put("metrics", values))
    edit(path, put("ci.wga", metrics.wilson_interval(int(test[0][worst]), int(test[1][worst]))))


def swap(arrays: Arrays) -> None:
    """As of another test set: what images show is told in another order."""
    arrays["test_unit"] = np.roll(arrays["test_unit"], 1)


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def bend(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Change the bytes of the predictions."""
    return lambda path: predictions_path(path).write_bytes(change(predictions_path(path).read_bytes()))


def edited(dotted: str, value: Any) -> Callable[[Path], object]:
    return lambda path: edit(path, put(dotted, value))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN for a metric": (edited("metrics.wga", float("nan")), "metrics.wga: "),
    "NaN for a metric of train": (edited("train_metrics.acc_mean", float("nan")), "train_metrics.acc_mean: "),
    "NaN for a count": (edited("groups.0.m_test", float("nan")), "groups.0.m_test: "),
    "infinite seconds": (edited("cost.scratch.device_s", float("inf")), "cost.scratch.device_s: "),
    "counts unlike the predictions": (recount, "groups.m_test: "),
    "metrics unlike the counts": (edited("metrics.acc_mean", 0.123), "metrics.acc_mean: "),
    "metrics of train unlike the counts": (edited("train_metrics.wga", 0.123), "train_metrics.wga: "),
    "metrics of validation unlike the counts": (edited("val_metrics.wga", 0.123), "val_metrics.wga: "),
    "a metric of its own": (edited("metrics.gap_mine", 0.5), "metrics.gap_mine: "),
    "an epoch with other groups": (edited("history.0.correct_val", [1, 2]), "history.0.correct_val: "),
    "more right answers than images in an epoch": (edited("history.0.correct_val.0", 999), "history.0.correct_val: "),
    "another test set": (lambda path: repack(path, swap), "a name in it, is not that of the other runs"),
    "other names of the classes": (edited("classes", ["left", "right"]), "a name in it, is not that of the other runs"),
    "a newer version": (edited("schema_version", 2), "schema_version: written by a newer version, schema 2"),
    "an edited identity": (edited("seed", 7), "run: "),
    "a type of its own in the recipe": (edited("recipe.lr", "0.001"), "recipe.lr: "),
    "a name of many characters": (edited("weights", "w" * 10_000), "weights: "),
    "a setting of many characters": (edited("config.absent", "w" * 10_000), "config: "),
    "a key that rewrites the terminal": (edited("\x1b[2J\nleft out: nothing", 1), "left out: nothing: "),
    "empty": (lambda path: path.write_bytes(b""), "Invalid JSON"),
    "deep": (lambda path: path.write_bytes(b"[" * 100_000), "Invalid JSON"),
    "invalid UTF-8": (lambda path: path.write_bytes(path.read_bytes().replace(b"tiny", b"t\xffny")), "Invalid JSON"),
    "a folder": (replace_by(Path.mkdir), "cannot be read: not a file"),
    "a pipe": (replace_by(os.mkfifo), "cannot be read: not a file"),
    "a device without end": (replace_by(lambda path: path.symlink_to("/dev/zero")), "cannot be read: not a file"),
    "a link to itself": (replace_by(lambda path: path.symlink_to(path)), "cannot be read: "),
    "a link to nothing": (replace_by(lambda path: path.symlink_to(path / "x")), "cannot be read: "),
    "no predictions": (lambda path: predictions_path(path).unlink(), "cannot be read: No such file"),
    "truncated predictions": (bend(lambda old: old[:-20]), "predictions.sha256: "),
    "flipped predictions": (bend(lambda old: old[:99] + bytes([old[99] ^ 1]) + old[100:]), "predictions.sha256: "),
    "predictions of another run": (
        lambda path: shutil.copy(next(path.parent.glob("erm-*.npz")), predictions_path(path)),
        "predictions.sha256: ",
    ),
}


def boards(call: Call) -> dict[str, str]:
    """What the board prints in every format; nothing may be said beside it."""
    results = {name: call("board", "--format", name) for name in FORMATS}
    assert {(result.code, result.err) for result in results.values()} == {(0, "")}
    return {name: result.out for name, result in results.items()}


def assert_left_out(call: Call, expected: dict[str, str], *says: str) -> None:
    """One line names a record, and every format is as expected."""
    for name in FORMATS:
        result = call("board", "--format", name)
        assert result.code == 0
        assert result.err.startswith("left out: ")
        assert result.err.count("\n") == 1
        assert result.err[:-1].isprintable()
        assert all(text in result.err for text in says), result.err
        assert result.out == expected[name]


@pytest.mark.parametrize("case", BAD)
def test_it_is_named_and_left_out(call: Call, pick: Pick, tmp_path: Path, case: str) -> None:
    path = pick("groupdro")
    aside = tmp_path / "aside"
    aside.mkdir()
    kept = [Path(shutil.move(file, aside)) for file in (path, predictions_path(path))]
    expected = boards(call)
    for file in kept:
        shutil.move(file, path.parent)
    change, says = BAD[case]
    change(path)
    assert_left_out(call, expected, path.stem, says)


def test_a_copy_under_another_name_counts_once(call: Call, pick: Pick) -> None:
    expected, path = boards(call), pick("erm")
    for file in (path, predictions_path(path)):
        shutil.copy(file, file.with_name(f"zz-copy{file.suffix}"))
    assert_left_out(call, expected, "zz-copy.json", f"is there already, as {path}")


def test_a_file_that_one_may_not_read(call: Call, pick: Pick) -> None:
    path = pick("groupdro")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot be read: Permission denied" in call("board").err


def test_a_name_that_is_no_text(call: Call, pick: Pick) -> None:
    """A file's name is bytes; a sound record is read whatever it is called, and a bad one is named."""
    expected, path = boards(call), pick("groupdro")
    place = Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff\n.json"))
    try:
        path.rename(place)
    except OSError:
        pytest.skip("this disk takes no such name")
    predictions_path(path).rename(predictions_path(place))
    assert boards(call) == expected
    place.write_text("{")
    result = call("board")
    assert (result.code, result.err.count("\n")) == (0, 1)
    assert result.err.startswith("left out: ")


def test_many_bad_ones_are_named_one_by_one(call: Call, runs: Path) -> None:
    for path in find(runs):
        path.write_text("{")
    result = call("board", "--format", "md")
    assert (result.code, result.out) == (0, "No finished run yet.\n")
    assert [line.startswith("left out: ") for line in result.err.splitlines()] == [True] * 6
