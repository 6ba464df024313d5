"""`verify` passes on what a run wrote, names what was edited, and answers whatever it is given."""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Call, edit, places, put, repack, without_train
from worstgroup.benchmark.planning import Request, plan
from worstgroup.benchmark.predictions import Arrays
from worstgroup.benchmark.record import find, predictions_path, read
from worstgroup.benchmark.runner import run_spec
from worstgroup.leaderboard.verify import Verdict, orphans, verify, verify_all
from worstgroup.leaderboard.verify_dataset import CHECKED

Pick = Callable[[str], Path]


def assert_named(verdict: Verdict, field: str) -> None:
    assert not verdict.ok
    assert any(problem.startswith(field) for problem in verdict.problems), verdict.problems


# ------------------------------------------------------------------------------------------------------- honest runs


@pytest.mark.parametrize("method", ["erm", "groupdro", "dfr"])
def test_a_real_run_passes(pick: Pick, method: str) -> None:
    assert verify(pick(method)) == Verdict(pick(method), "predictions", (), (CHECKED,))


def test_all_runs_below_a_folder_are_judged(runs: Path) -> None:
    verdicts = verify_all(runs)
    assert [verdict.path for verdict in verdicts] == list(find(runs))
    assert len(verdicts) == 6
    assert all(verdict.ok for verdict in verdicts)


@pytest.mark.parametrize("method", ["erm", "dfr"])
def test_a_run_from_before_train_was_predicted_passes(pick: Pick, method: str) -> None:
    path = pick(method)
    without_train(path)
    assert verify(path) == Verdict(path, "predictions", (), (CHECKED,))
    edit(path, add("metrics.wga", 0.01))
    assert_named(verify(path), "metrics.wga")


@pytest.mark.usefixtures("tiny")
def test_without_labels_the_metrics_are_verified(home: Path) -> None:
    made = plan([Request("tinyvariants:secret", "groupdro", seeds=(0,))])
    assert made.runs[0].spec is not None
    run_spec(made.runs[0].spec, made.stores["tinyvariants:secret"])
    (path,) = find(home / "runs")
    assert verify(path) == Verdict(path, "metrics", (), (CHECKED,))
    edit(path, put("metrics.wga", 0.99))
    assert_named(verify(path), "metrics.wga")
    edit(path, add("groups.0.correct_train", -1))
    assert_named(verify(path), "train_metrics.")


def test_a_failed_run_has_its_own_level(pick: Pick) -> None:
    path = pick("erm")
    edit(path, put("status", "failed"))
    assert verify(path) == Verdict(path, "failed", ())
    edit(path, put("seed", 7))
    assert_named(verify(path), "run")


# -------------------------------------------------------------------------------------------------------- forgeries


def add(dotted: str, amount: float) -> Callable[[dict[str, Any]], None]:
    """A change for `edit`: add to the number at `a.0.b`."""

    def change(content: Any) -> None:
        value = content
        for part in dotted.split("."):
            value = value[int(part) if part.isdigit() else part]
        put(dotted, value + amount)(content)

    return change


def in_history(epoch: int) -> Callable[[dict[str, Any]], None]:
    """Move one correct answer of an epoch (0-based, from the selected one) from one group to another."""

    def change(content: dict[str, Any]) -> None:
        counts = content["history"][content["selection"]["step"] - 1 - epoch]["correct_val"]
        counts[0], counts[7] = counts[0] - 1, counts[7] + 1

    return change


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "worst-group accuracy": ("groupdro", add("metrics.wga", 0.01), "metrics.wga"),
    "adjusted accuracy": ("groupdro", add("metrics.acc_adj", -0.01), "metrics.acc_adj"),
    "a tiny step": ("groupdro", add("metrics.acc_mean", 1e-6), "metrics.acc_mean"),
    "a gap": ("groupdro", put("metrics.gap_stripe", None), "metrics.gap_stripe"),
    "a metric left out": ("groupdro", lambda content: content["metrics"].pop("gap_all"), "metrics.gap_all"),
    "a metric made up": ("groupdro", put("metrics.fairness", 1.0), "metrics.fairness"),
    "a validation metric": ("groupdro", add("val_metrics.wga", 0.1), "val_metrics.wga"),
    "a train metric": ("groupdro", add("train_metrics.wga", 0.1), "train_metrics.wga"),
    "correct train answers": ("groupdro", add("groups.2.correct_train", -1), "groups.2.correct_train"),
    "correct train answers of a refitted head": ("dfr", add("groups.2.correct_train", -1), "groups.2.correct_train"),
    "train answers left out": ("groupdro", put("train_metrics", {}), "{path}: groups.0.correct_train"),
    "train answers of a group left out": (
        "groupdro",
        put("groups.6.correct_train", None),
        "{path}: groups.6.correct_train",
    ),
    "correct test answers": ("groupdro", add("groups.3.correct_test", 1), "groups.3.correct_test"),
    "correct validation answers": ("groupdro", add("groups.0.correct_val", -1), "groups.0.correct_val"),
    "test images": ("groupdro", add("groups.5.m_test", 1), "groups.5.m_test"),
    "train images": ("groupdro", add("groups.2.n_train", 50), "groups.2.n_train"),
    "weights of the train images": ("groupdro", add("groups.2.n_train", 50), "metrics.acc_adj"),
    "class of a group": ("groupdro", put("groups.0.y", 1), "groups.0"),
    "attributes of a group": ("groupdro", put("groups.0.a", [1, 1]), "groups.0"),
    "interval": ("groupdro", put("ci.wga.1", 1.0), "ci.wga"),
    "labels in all": ("groupdro", put("labels.total_a", 0), "labels.total_a"),
    "more labels than granted": ("erm", put("labels.n_train_a", 5), "labels.n_train_a"),
    "labels on a rung without": ("erm", put("labels.n_val_a_select", 2), "labels.n_val_a_select"),
    "value of the selection": ("groupdro", put("selection.value", 0.999), "selection.value"),
    "no value of the selection": ("groupdro", put("selection.value", None), "selection.value"),
    "step of the selection": ("groupdro", add("selection.step", -5), "selection.step"),
    "rule of the selection": ("groupdro", put("selection.criterion", "test-wga"), "selection.criterion"),
    "history of the selected epoch": ("groupdro", in_history(0), "history"),
    "history cut off": ("groupdro", lambda content: content["history"].clear(), "selection.step"),
    "seed": ("groupdro", put("seed", 5), "run"),
    "setting": ("groupdro", put("config.step_size", 0.5), "run"),
    "setting of the recipe": ("groupdro", put("recipe.lr", 0.5), "run"),
    "budget": ("groupdro", put("budget", "select"), "run"),
    "dataset": ("groupdro", put("dataset", "waterbirds"), "run"),
    "data": ("groupdro", put("fingerprint", "0" * 16), "run"),
    "method": ("groupdro", put("method", "mine"), "run"),
    "policy": ("groupdro", put("policy", "class"), "run"),
    "code": ("groupdro", put("code", "0" * 16), "run"),
    "protocol": ("groupdro", put("protocol", "wg0"), "run"),
    "aligned values": ("groupdro", put("attributes.0.aligned", [1, 0]), "metrics.gap_stripe"),
    "declared ratio": ("groupdro", put("attributes.0.train_ratio", 0.5), "metrics.id_acc"),
    "hash of the labels": ("groupdro", put("predictions.labels_sha256.test", "0" * 64), "predictions.labels_sha256"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_field_is_named(pick: Pick, case: str) -> None:
    method, change, field = EDITS[case]
    path = pick(method)
    edit(path, change)
    assert_named(verify(path), field.format(path=path))


def test_an_epoch_that_would_have_been_chosen_is_found(pick: Pick) -> None:
    """The selected epoch must be the best of the history under the rung's rule."""
    path = pick("groupdro")

    def change(content: dict[str, Any]) -> None:
        other = content["history"][-content["selection"]["step"] % 2]
        other["correct_val"] = [group["m_val"] for group in content["groups"]]

    edit(path, change)
    assert read(path).history[0] != read(path).history[1]
    assert not verify(path).ok


def leaves(value: Any, place: str = "") -> Iterator[str]:
    """Dotted places of all numbers in a JSON value."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place


@pytest.mark.parametrize("part", ["metrics", "val_metrics", "train_metrics", "ci", "groups", "labels"])
def test_every_number_of_a_part_counts(pick: Pick, part: str) -> None:
    path = pick("groupdro")
    original = path.read_text()
    passed = []
    for place in leaves({part: json.loads(original)[part]}):
        path.write_text(original)
        edit(path, add(place, 0.001 if part.endswith("metrics") or part == "ci" else 1))
        if verify(path).ok:
            passed.append(place)
    # what nothing in the record can contradict: labels that no budget bounds, or that the budget would have granted
    assert set(passed) <= {"labels.n_env", "labels.n_y_extra", "labels.n_rendered", "labels.n_val_a_fit"}


def test_what_a_foreign_record_says_is_shown_on_one_line(pick: Pick, call: Call) -> None:
    """Names of metrics and arrays, texts and the file's own name come from whoever wrote them."""
    path = pick("groupdro")
    edit(path, put("metrics", json.loads(path.read_text())["metrics"] | {"\x1b]0;pwned\x07\nall well": 1.0}))
    edit(path, put("weights", "\x1b[2J"))
    repack(pick("dfr"), lambda arrays: arrays.update({"\x1b[2J_source": arrays["val_y"]}))
    problems = [problem for name in ("groupdro", "dfr") for problem in verify(pick(name)).problems]
    assert any("pwned" in problem for problem in problems)
    assert any("_source" in problem or "splits" in problem for problem in problems), problems
    assert all(problem.isprintable() for problem in problems)
    odd = path.with_name("\x1b[2J\n9 records, 0 with differences.json")
    path.rename(odd)
    predictions_path(path).rename(predictions_path(odd))
    predictions_path(pick("erm")).rename(path.with_name("\x1b[2J.npz"))
    done = call("verify")
    assert done.code == 1
    assert "pwned" in done.err
    assert all(line.isprintable() for line in [*done.err.splitlines(), *done.out.splitlines()])
    assert not any(line.startswith("9 records") for line in done.err.splitlines())


# ------------------------------------------------------------------------------------------------------- predictions


def test_changed_predictions_are_named(pick: Pick) -> None:
    path = pick("groupdro")
    repack(path, lambda arrays: arrays["test_logits"].__setitem__((0, 0), 99), honest=True)
    assert_named(verify(path), f"{predictions_path(path)}: predictions.sha256")


def test_missing_predictions_are_named(pick: Pick) -> None:
    path = pick("groupdro")
    predictions_path(path).unlink()
    assert_named(verify(path), f"{predictions_path(path)}: cannot be read")


def flip_one(name: str) -> Callable[[Arrays], None]:
    """Answer one more image correctly (its logits too, where there are any)."""

    def change(arrays: Arrays) -> None:
        wrong = int(np.flatnonzero(arrays[f"{name}_prediction"] != arrays[f"{name}_y"])[0])
        arrays[f"{name}_prediction"][wrong] ^= 1
        if name != "train":
            arrays[f"{name}_logits"][wrong] = arrays[f"{name}_logits"][wrong][::-1]

    return change


def drop(name: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.pop(name)  # type: ignore[return-value]


FORGED: dict[str, tuple[Callable[[Arrays], object], str]] = {
    "one more right on test": (flip_one("test"), "groups."),
    "one more right on validation": (flip_one("val"), "groups."),
    "one more right on train": (flip_one("train"), "groups."),
    "train predictions turned over": (lambda a: a["train_prediction"].__ixor__(1), "groups.0.correct_train"),
    "train labels": (lambda a: a["train_y"].__ixor__(1), "predictions.labels_sha256.train"),
    "train attributes": (lambda a: a["train_a"].__ixor__(1), "predictions.labels_sha256.train"),
    "prediction against its logits": (lambda a: a["test_prediction"].__ixor__(1), "predictions: test_prediction"),
    "labels": (lambda a: a["test_y"].__ixor__(1), "predictions.labels_sha256.test"),
    "attributes": (lambda a: a["val_a"].__ixor__(1), "predictions.labels_sha256.val"),
    "logits that are not finite": (lambda a: a["val_logits"].__imul__(np.nan), "predictions: val_logits"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_predictions_are_named(pick: Pick, case: str) -> None:
    change, field = FORGED[case]
    path = pick("groupdro")
    repack(path, change)
    assert_named(verify(path), field)


def test_predictions_without_a_record_are_found(pick: Pick, runs: Path) -> None:
    assert orphans(runs) == []
    path = pick("erm")
    path.unlink()
    assert orphans(runs) == [predictions_path(path)]


# ----------------------------------------------------------------------------------------------------- never raises


def quietly(path: Path) -> Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return verify(path)


NASTY: list[Any] = [None, -1, 0, 1, 10**30, 1e308, "", "x", "..", [], {}, [[]], True, ["\x00"], {"a": 1}]


@pytest.mark.parametrize("value", NASTY, ids=repr)
@pytest.mark.parametrize("method", ["groupdro", "dfr"])
def test_nothing_in_a_record_makes_it_raise(pick: Pick, method: str, value: Any) -> None:
    path = pick(method)
    original = json.loads(path.read_text())
    for place in places(original):
        if place.startswith(("env.", "cost.")) or ".versions" in place:
            continue  # facts of the moment, which nothing reads back
        content = copy.deepcopy(original)
        put(place, value)(content)
        path.write_text(json.dumps(content))
        try:
            quietly(path)
        except Exception as error:
            pytest.fail(f"{place} = {value!r}: {type(error).__name__}: {error}")


ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "empty": lambda array: array[:0],
    "shorter": lambda array: array[:-1],
    "longer": lambda array: np.concatenate([array, array]),
    "a scalar": lambda array: np.array(1),
    "another axis": lambda array: array[None],
    "text": lambda array: np.full(array.shape, "x"),
    "bytes": lambda array: np.full(array.shape, b"x"),
    "structured": lambda array: np.zeros(array.shape, [("a", "i4")]),
    "dates": lambda array: np.zeros(array.shape, "datetime64[s]"),
    "NaN": lambda array: np.full(array.shape, np.nan),
    "far away": lambda array: np.full(array.shape, 10**9),
    "negative": lambda array: np.full(array.shape, -1),
    "booleans": lambda array: np.ones(array.shape, bool),
}
NAMES = (
    *("test_prediction", "test_logits", "test_y", "val_a", "val_logits", "val_prediction"),
    *("train_prediction", "train_y", "train_a"),
)


@pytest.mark.parametrize("kind", ARRAYS)
def test_nothing_in_the_predictions_makes_it_raise(pick: Pick, kind: str) -> None:
    path = pick("groupdro")
    record, content = path.read_bytes(), predictions_path(path).read_bytes()
    for name in NAMES:
        path.write_bytes(record)
        predictions_path(path).write_bytes(content)
        repack(path, lambda arrays, name=name: arrays.update({name: ARRAYS[kind](arrays[name])}))  # type: ignore[misc]
        assert not quietly(path).ok, name


@pytest.mark.parametrize(
    "name",
    [
        *("test_logits", "test_prediction", "val_y", "val_a", "test_unit", "test_index"),
        *("train_prediction", "train_y", "train_a", "train_index"),
    ],
)
def test_a_missing_array_is_named(pick: Pick, name: str) -> None:
    path = pick("groupdro")
    repack(path, drop(name))
    verdict = verify(path)
    assert not verdict.ok
    assert name in verdict.problems[0]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a": 1}', b"null"])
def test_no_file_makes_it_raise(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert not verify(path).ok
    assert str(path) in verify(path).problems[0]


def test_neither_folder_nor_nothing_makes_it_raise(tmp_path: Path) -> None:
    assert not verify(tmp_path).ok
    assert not verify(tmp_path / "gone.json").ok


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x05\x06" + bytes(18)])
def test_no_forged_archive_makes_it_raise(pick: Pick, content: bytes) -> None:
    path = pick("groupdro")
    predictions_path(path).write_bytes(content)
    edit(path, put("predictions.sha256", hashlib.sha256(content).hexdigest()))
    assert not verify(path).ok
