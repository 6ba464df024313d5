"""Damaged and made-up records: refused by name or shown as they are, never a crash, and no false number shown."""

import copy
import dataclasses
import hashlib
import io
import json
import math
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import edit, put, repack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worstgroup.benchmark import record as records
from worstgroup.benchmark.errors import CorruptFile
from worstgroup.benchmark.predictions import Arrays
from worstgroup.benchmark.record import predictions_path
from worstgroup.leaderboard import entry as entries
from worstgroup.leaderboard.entry import Draw, Read
from worstgroup.leaderboard.verify import verify

FREE: dict[str, set[str]] = {
    "created": {"created"},
    "env": {"device", "session"},
    "cost": {"marginal_s", "scratch_s"},
    "tuning": {"search_s"},
    "labels": {"labels", "rendered"},
    "agreement": {"agreement"},
    "selection": {"step"},
    "classes": {"line.classes"},
    "attributes": {"line.attributes"},
    "predictions": {"answers", "layout"},
    "history": {"history"},
    "groups": set(),
    "search": set(),
    "error": set(),
    "backbone_code": set(),
}
"""What may change in a record that is still read, and what of its entry may change with it: facts of the moment, what
only `verify` can recompute (labels, agreement, epoch, curves), the names of classes and values, which the board holds
against those of the block's other runs, and whether its answers are used. `groups` are their y and a, which no table
shows; `backbone_code` is empty or absent alike."""
ROUNDING = 1e-9
"""What a metric may be off by."""
PLAIN = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def sample(finished_home: Path, tmp_path_factory: pytest.TempPathFactory) -> "Sample":
    """A real record in a folder of its own."""
    (origin,) = (finished_home / "runs").rglob("groupdro-*-s0-*.json")
    return Sample(tmp_path_factory.mktemp("fuzz") / origin.name, origin)


class Sample:
    """A record that is written damaged, read, and compared with what it was."""

    def __init__(self, path: Path, origin: Path) -> None:
        self.path = path
        self.text, self.packed = origin.read_bytes(), predictions_path(origin).read_bytes()
        self.content = json.loads(self.text)
        self.write()
        self.record, self.read = records.read(path), entries.read(path)

    def write(self, text: bytes | None = None, packed: bytes | None = None) -> None:
        self.path.write_bytes(self.text if text is None else text)
        predictions_path(self.path).write_bytes(self.packed if packed is None else packed)

    def attempt(self) -> Read | Draw | str:
        """What is read, or the sentence by which it is refused; a warning of NumPy's would be a stray line."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                return entries.read(self.path)
            except CorruptFile as error:
                return str(error)

    def judge(self) -> bool:
        """Whether the record is accepted; what it then shows must be what the original shows, but for `FREE`."""
        found = self.attempt()
        if isinstance(found, str):
            assert found.startswith(str(self.path.with_suffix("")))
            assert found.isprintable()
            assert len(found) < 2000
            return False
        record = records.read(self.path)
        if isinstance(found, Draw):  # in no table
            assert record.status == "failed" or record.is_candidate
            return True
        changed = different(dict(self.record), dict(record))
        assert changed <= FREE.keys()
        assert record.identity_hash() == self.record.identity_hash() == record.run
        assert shown_otherwise(self.read, found) <= set().union(*(FREE[name] for name in changed))
        return True


def shown_otherwise(before: Read | Draw, after: Read) -> set[str]:
    """Names of what differs between two entries."""
    assert isinstance(before, Read)
    facts, line = different(vars_of(before.entry), vars_of(after.entry)), set()
    if "line" in facts:
        line = {f"line.{name}" for name in different(vars_of(before.entry.line), vars_of(after.entry.line))}
    history = {"history"} if before.history != after.history else set()
    return (facts - {"path", "digest", "line"}) | line | history


def vars_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def different(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name))}


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal but for the rounding of numbers that are not counts."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)
    if isinstance(a, dict) and isinstance(b, dict):
        return not different(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


# --------------------------------------------------------------------------------------------------------- mutations

Change = tuple[str, int, int, Any]
Damage = tuple[str, int, int, bytes]

HARD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**40, 2**40 + 1, 2**63, 2**64, -(2**64), 10**30, 10**400),
    *(0.5, 1.0, -0.5, 1.5, 1e-12, 1e308, math.nan, math.inf, -math.inf),
    *(
        "",
        "0",
        "1.0",
        "NaN",
        "none",
        "\x00",
        "\ud800",
        "\U0001f600",
        "a\u202eb",
        "x" * 600,
        "x" * 100_000,
        "../..",
        "<b>",
    ),
    *([], [[]], {}, {"": 0}, {"a": {"b": []}}, [0] * 3, [None], "erm", "val", "failed", "answers", "nothing"),
]
values = st.one_of(
    st.sampled_from(HARD), st.sampled_from(HARD), st.integers(), st.floats(), st.text(st.characters(), max_size=8)
)
change: st.SearchStrategy[Change] = st.tuples(
    st.sampled_from(["replace", "replace", "delete", "duplicate", "retype", "move", "step", "rename", "deepen"]),
    st.integers(0, 2**20),
    st.integers(0, 2**20),
    values,
)
damage: st.SearchStrategy[Damage] = st.tuples(
    st.sampled_from(["flip", "truncate", "insert", "cut", "repeat", "overwrite"]),
    st.integers(0, 2**20),
    st.integers(0, 2**12),
    st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff\xfe", b"\xc0\x80", b'"', b"]}", b"9" * 20])),
)


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Holder and key of everything in a JSON value."""
    found, open_ = [], [tree]
    while open_:
        holder = open_.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                open_.append(holder[key])
    return found


def mutate(tree: Any, what: str, where: int, other: int, value: Any) -> None:
    """Change one node of a JSON value."""
    places = nodes(tree)
    if not places:
        return
    holder, key = places[where % len(places)]
    giver, name = places[other % len(places)]
    old = holder[key]
    if what == "replace":
        holder[key] = copy.deepcopy(value)
    elif what == "delete":
        del holder[key]
    elif what == "duplicate" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(old))
    elif what == "duplicate":
        holder[f"{key}2"] = copy.deepcopy(old)
    elif what == "retype":
        holder[key] = {int: str, str: list, float: str, list: json.dumps, dict: list}.get(type(old), str)(old)
    elif what == "move":
        holder[key] = copy.deepcopy(giver[name])
    elif what == "step" and isinstance(old, int | float):
        holder[key] = old + (other % 7 - 3) * (1 if isinstance(old, int) else 0.01)
    elif what == "rename" and isinstance(holder, dict):
        holder[str(value)] = holder.pop(key)
    elif what == "deepen":
        for _ in range(other % 300):
            old = [old] if other % 2 else {"a": old}
        holder[key] = old


def hit(content: bytes, what: str, where: int, length: int, new: bytes) -> bytes:
    """Damage bytes."""
    at = where % (len(content) + 1)
    head, tail = content[:at], content[at:]
    return {
        "flip": head + bytes([tail[0] ^ (1 << length % 8)]) + tail[1:] if tail else head,
        "truncate": head,
        "insert": head + new + tail,
        "cut": head + tail[length:],
        "repeat": head + tail[:length] * 2 + tail[length:],
        "overwrite": head + new + tail[len(new) :],
    }[what]


def mutated(sample: Sample, changes: list[Change]) -> bytes:
    tree = copy.deepcopy(sample.content)
    for each in changes:
        mutate(tree, *each)
    return json.dumps(tree).encode()


def fuzz(test: Callable[..., None], strategy: st.SearchStrategy[Any], examples: int) -> None:
    """Call a test with many values."""
    settings(max_examples=examples, **PLAIN)(given(strategy)(test))()  # type: ignore[arg-type]


def fuzz_json(sample: Sample, examples: int) -> None:
    def test(changes: list[Change]) -> None:
        sample.write(mutated(sample, changes))
        sample.judge()

    fuzz(test, st.lists(change, min_size=1, max_size=3), examples)


def fuzz_bytes(sample: Sample, examples: int) -> None:
    def test(damages: list[Damage]) -> None:
        text = sample.text
        for each in damages:
            text = hit(text, *each)
        sample.write(text)
        sample.judge()

    fuzz(test, st.lists(damage, min_size=1, max_size=2), examples)


def fuzz_predictions(sample: Sample, examples: int) -> None:
    """With the hash that the record was written with every change is refused; with a new one numbers must add up."""

    def test(damages: list[Damage], rehash: bool) -> None:
        packed = sample.packed
        for each in damages:
            packed = hit(packed, *each)
        sample.write(packed=packed)
        if rehash:
            edit(sample.path, put("predictions.sha256", hashlib.sha256(packed).hexdigest()))
        accepted = sample.judge()
        assert rehash or accepted == (packed == sample.packed)

    fuzz(lambda both: test(*both), st.tuples(st.lists(damage, min_size=1, max_size=2), st.booleans()), examples)


# ------------------------------------------------------------------------------------------------------------- tests


def test_the_untouched_record_is_accepted(sample: Sample) -> None:
    sample.write()
    assert sample.judge()


def test_changed_json(sample: Sample) -> None:
    fuzz_json(sample, 7_000)


def test_damaged_bytes(sample: Sample) -> None:
    fuzz_bytes(sample, 2_500)


def test_damaged_predictions(sample: Sample) -> None:
    fuzz_predictions(sample, 1_500)


def test_the_fuzzing_reaches_what_is_shown(sample: Sample) -> None:
    """Some mutants must be accepted and some must fall to each check, or the tests above would say nothing."""
    seen: set[str] = set()

    def test(changes: list[Change]) -> None:
        sample.write(mutated(sample, changes))
        found = sample.attempt()
        seen.add(
            found.partition(".json: ")[2].partition(":")[0].partition(".")[0] if isinstance(found, str) else "read"
        )

    fuzz(test, st.lists(change, min_size=1, max_size=1), 800)
    assert seen >= {"read", "run", "groups", "metrics", "val_metrics", "train_metrics", "ci", "history", "cost"}


def refused(sample: Sample, says: str) -> None:
    found = sample.attempt()
    assert isinstance(found, str)
    assert says in found


def test_no_room_is_made_for_what_a_file_only_claims(sample: Sample) -> None:
    """A few bytes that claim gigabytes, in the archive and in an array."""
    archive, array = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("test_y.npy", b"")
    bomb = archive.getvalue()
    at = bomb.index(b"PK\x01\x02") + 24  # the uncompressed size in the directory
    np.save(array, np.zeros(3))
    claim = array.getvalue().replace(b"(3,), }" + b" " * 9, b"(999999999,), }\x20"[:16])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("test_y.npy", claim)
    tracemalloc.start()
    try:
        for packed in (bomb[:at] + b"\xff\xff\xff\xfe" + bomb[at + 4 :], archive.getvalue()):
            sample.write(packed=packed)
            edit(sample.path, put("predictions.sha256", hashlib.sha256(packed).hexdigest()))
            refused(sample, ".npz: cannot be read: ValueError: ")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_attributes_that_would_make_too_many_patterns(sample: Sample) -> None:
    tree = copy.deepcopy(sample.content)
    tree["attributes"] += [{"name": f"a{i}", "values": ["x"], "aligned": [0, 0], "train_ratio": 0.5} for i in range(60)]
    sample.write(json.dumps(tree).encode())
    refused(sample, "attributes: ")


def test_answers_of_another_shape(sample: Sample) -> None:
    """NumPy would stretch a single unit over all images."""

    def one_unit(arrays: Arrays) -> None:
        arrays["test_unit"] = arrays["test_unit"][:1]

    sample.write()
    repack(sample.path, one_unit)
    refused(sample, "test_unit has shape (1,)")


@pytest.mark.slow
def test_many_more(sample: Sample) -> None:
    fuzz_json(sample, 140_000)
    fuzz_bytes(sample, 40_000)
    fuzz_predictions(sample, 20_000)


def test_verify_answers_to_everything(sample: Sample) -> None:
    def test(changes: list[Change]) -> None:
        sample.write(mutated(sample, changes))
        verdict = verify(sample.path)
        assert verdict.path == sample.path
        assert all(verdict.problems)

    fuzz(test, st.lists(change, min_size=1, max_size=2), 300)
