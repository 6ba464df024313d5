"""What the leaderboard keeps of a record: the line it belongs to, its numbers, and which test images it got right.

Reading a record checks that its numbers follow from its group counts, and those of the test set from its predictions;
everything else is what `verify` is for.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark import metrics
from ..benchmark import record as records
from ..benchmark.errors import CorruptFile, one_line
from ..benchmark.metrics import Values
from ..benchmark.predictions import Arrays
from ..benchmark.record import RunRecord
from ..benchmark.spec import SPLITS, Attribute, SplitName

MEANS = ("acc_adj", "acc_mean", "acc_group")
HELD = {"wga_train": "train_metrics", "wga_val": "val_metrics"}
"""Worst-group accuracy on the splits that are not test, and the field of a record that has it."""
AGREEMENT = ("ami", "worst_recall")
"""How a source's groups agree with the true ones."""
SCORED = {"train": ("train_metrics", "n_train"), "val": ("val_metrics", "m_val"), "test": ("metrics", "m_test")}
"""Fields of a record that have a split's metrics and the images of its groups."""


@dataclass(frozen=True)
class Line:
    """What the runs of one row share, whatever their seed and the version of their method's code."""

    protocol: str
    dataset: str
    fingerprint: str
    backbone: str
    weights: str
    recipe: dict[str, Any]
    label: str
    method: str
    source: str
    budget: str
    policy: str
    settings: dict[str, Any]
    """Settings of the method, those of its source as typed, `SOURCE.KEY`, and a paper's rule of selection."""
    tuned: dict[str, Any]
    draw: int
    candidates: tuple[str, ...]
    classes: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    n_train: tuple[int, ...]
    m_val: tuple[int, ...]
    m_test: tuple[int, ...]

    @classmethod
    def of(cls, record: RunRecord) -> "Line":
        """The line of a record."""
        of_source = {f"{record.source}.{key}": value for key, value in record.source_config.items()}
        rule = {"selection": record.criterion} if record.criterion else {}
        return cls(
            protocol=record.protocol,
            dataset=record.dataset,
            fingerprint=record.fingerprint,
            backbone=record.backbone,
            weights=record.weights,
            recipe=record.recipe,
            label=record.label,
            method=record.method,
            source=record.source,
            budget=record.budget,
            policy=record.policy,
            settings=record.config | of_source | rule,
            tuned=record.tuned,
            draw=record.draw,
            candidates=tuple(record.candidates),
            classes=tuple(record.classes),
            attributes=tuple(record.spec_attributes()),
            n_train=tuple(group.n_train for group in record.groups),
            m_val=tuple(group.m_val for group in record.groups),
            m_test=tuple(group.m_test for group in record.groups),
        )

    @classmethod
    def from_json(cls, text: str) -> "Line":
        """The line that `to_json` wrote."""
        fields = json.loads(text)
        fields["attributes"] = tuple(
            Attribute(**attribute | {"values": tuple(attribute["values"]), "aligned": tuple(attribute["aligned"])})
            for attribute in fields["attributes"]
        )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
        }
        return cls(**values)

    def to_json(self) -> str:
        """Canonical text: equal lines have the same."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(fields, default=vars, sort_keys=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, S_1 .. S_k)."""
        return (len(self.classes), *(len(attribute.values) for attribute in self.attributes))

    @cached_property
    def groups(self) -> list[str]:
        """Names of the groups in index order: `landbird/water`."""
        names = [self.classes, *(attribute.values for attribute in self.attributes)]
        return ["/".join(part[i] for part, i in zip(names, cell, strict=True)) for cell in np.ndindex(*self.shape)]


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished run."""

    path: str
    digest: str
    """Of the record's file; what is derived from it is kept under this name."""
    line: Line
    run: str
    asked: str
    """What was asked for, whatever the code: the run's hash without the fingerprints of that."""
    created: str
    code: str
    backbone_code: str
    seed: int
    metrics: Values
    held: Values
    correct: list[int]
    """Test images answered correctly, per group."""
    wilson: tuple[float, float]
    """95 % interval of the worst group, given which group that is."""
    labels: int
    rendered: int
    agreement: Values
    device: str
    session: str
    marginal_s: float | None
    scratch_s: float | None
    search_s: float | None
    step: int | None
    answers: str = ""
    """Digest of what it answered; empty where the licence keeps labels out of the record."""
    layout: str = ""
    """Digest of the test set's groups and units."""

    @classmethod
    def from_json(cls, path: str, line: Line, text: str) -> "Entry":
        """The entry that `to_json` wrote; many of them share their words."""
        facts = json.loads(text, object_pairs_hook=_shared)
        return cls(path=path, line=line, **facts | {"wilson": tuple(facts["wilson"])})

    def to_json(self) -> str:
        """All but its path and line."""
        names = (field.name for field in dataclasses.fields(self) if field.name not in ("path", "line"))
        return json.dumps({name: getattr(self, name) for name in names})


def _shared(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary whose words are kept once."""
    return {sys.intern(key): sys.intern(value) if isinstance(value, str) else value for key, value in pairs}


@dataclass(frozen=True, slots=True)
class Draw:
    """A run that stands in no table, since it failed or is one of a search's draws: it tells what a search tried."""

    run: str
    asked: str

    @classmethod
    def of(cls, record: RunRecord) -> "Draw":
        """The draw of a record."""
        return cls(record.identity_hash(), _asked(record))

    @classmethod
    def from_json(cls, text: str) -> "Draw":
        """The draw that `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Both fields."""
        return json.dumps({"run": self.run, "asked": self.asked})


@dataclass(frozen=True, eq=False)
class Layout:
    """Of every test image (M,) the group, and the independent unit that it shows; `shape` is (units, groups)."""

    unit: NDArray[np.int64]
    group: NDArray[np.int64]
    shape: tuple[int, int]

    @classmethod
    def of(cls, arrays: Arrays, shape: tuple[int, ...]) -> "Layout":
        """That of a record's predictions; `shape` is (K, S_1 .. S_k); raises what NumPy does where they do not fit."""
        n = len(arrays["test_y"])
        for name, wanted in {"y": (n,), "a": (n, len(shape) - 1), "unit": (n,), "prediction": (n,)}.items():
            array = arrays[f"test_{name}"]
            if array.shape != wanted or array.dtype.kind not in "iu":
                raise ValueError(f"test_{name} has shape {array.shape} and type {array.dtype}")
        group = metrics.group_index(arrays["test_y"].astype(np.int64), arrays["test_a"].astype(np.int64), shape)
        units, unit = np.unique(arrays["test_unit"], return_inverse=True)
        return cls(unit.astype(np.int64), group, (len(units), math.prod(shape)))

    def table(self, counted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Images (U, G) among those `counted` (M,)."""
        cells = np.bincount((self.unit * self.shape[1] + self.group)[counted], minlength=math.prod(self.shape))
        return cells.reshape(self.shape).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Read:
    """A record as read: its entry, what it got right in every epoch, the test images it got right (M,) and the test
    set that these are of."""

    entry: Entry
    history: list[list[int]]
    """Validation images answered correctly, by epoch and group."""
    correct: NDArray[np.bool_] | None = None
    layout: Layout | None = None


def read(path: Path) -> Read | Draw:
    """What is in a record file; raises `CorruptFile` for a record whose numbers do not follow from each other."""
    record = records.read(path)
    if record.status != "finished" or record.is_candidate:
        return Draw.of(record)
    if record.identity_hash() != record.run:
        raise CorruptFile(f"{path}: run: the identity fields give {record.identity_hash()[:12]}, not {record.run[:12]}")
    try:
        for problem in _problems(record):
            raise CorruptFile(f"{path}: {problem}")
    except (ArithmeticError, KeyError, ValueError, IndexError, TypeError) as error:
        raise CorruptFile(f"{path}: groups: {type(error).__name__}: {error}") from error
    entry, history = _entry(path, record), [epoch.correct_val for epoch in record.history]
    if record.predictions is None or not record.predictions.has_labels:
        return Read(entry, history)
    arrays = records.read_predictions(path, record, "test_")
    try:
        layout = Layout.of(arrays, record.shape)
        correct = arrays["test_prediction"] == arrays["test_y"]
        total = layout.table(np.ones(len(correct), dtype=bool)).sum(0)
        found = layout.table(correct).sum(0)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise CorruptFile(f"{path}: predictions: {type(error).__name__}: {one_line(str(error))}") from error
    for name, expected in (("m_test", total), ("correct_test", found)):
        if (record.counts()[name] != expected).any():
            raise CorruptFile(f"{path}: groups.{name}: {record.counts()[name].tolist()}, not what was predicted")
    test_set = hashlib.sha256(layout.unit.tobytes() + layout.group.tobytes()).hexdigest()
    entry = dataclasses.replace(entry, answers=record.predictions.sha256, layout=test_set)
    return Read(entry, history, correct, layout)


def _problems(record: RunRecord) -> Iterator[str]:
    """Group counts that cannot be, and metrics and an interval that do not follow from them."""
    counts = record.counts()
    for split in SPLITS:
        field, images = SCORED[split]
        if split == "train" and not record.train_metrics:
            continue
        if not counts[images].any() or (counts[f"correct_{split}"] > counts[images]).any():
            yield f"groups.correct_{split}: more right answers than images, or no image"
            return
        yield from _differing(field, getattr(record, field), _expected(record, counts, split))
    worst = metrics.worst_group(counts["correct_test"], counts["m_test"])
    interval = metrics.wilson_interval(int(counts["correct_test"][worst]), int(counts["m_test"][worst]))
    if not np.allclose(record.ci["wga"], interval, rtol=0, atol=1e-9):
        yield f"ci.wga: {record.ci['wga']}, the counts give {interval}"
    for i, epoch in enumerate(record.history):
        right = np.array(epoch.correct_val)
        if right.shape != counts["m_val"].shape or (right > counts["m_val"]).any():
            yield f"history.{i}.correct_val: does not fit the validation images of the groups"


def _expected(record: RunRecord, counts: dict[str, NDArray[np.int64]], split: SplitName) -> Values:
    """A split's metrics as its counts give them."""
    right, images = counts[f"correct_{split}"], counts[SCORED[split][1]]
    return metrics.evaluate(right, images, counts["n_train"], record.shape, record.spec_attributes())


def _differing(field: str, said: Values, expected: Values) -> Iterator[str]:
    for name in [*expected, *(said.keys() - expected.keys())]:
        if name not in said or name not in expected:
            yield f"{field}.{one_line(name)}: {'missing' if name in expected else 'is no metric of this dataset'}"
            continue
        a, b = said[name], expected[name]
        if (a is None) != (b is None) or not math.isclose(a or 0, b or 0, rel_tol=1e-9, abs_tol=1e-9):
            yield f"{field}.{name}: {a}, the counts give {b}"


def _entry(path: Path, record: RunRecord) -> Entry:
    agreement = record.agreement.get("train", record.agreement.get("val", {}))
    labels, cost, chosen = record.labels, record.cost, record.selection
    return Entry(
        path=str(path),
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        line=Line.of(record),
        run=record.run,
        asked=_asked(record),
        created=record.created,
        code=record.code,
        backbone_code=record.backbone_code,
        seed=record.seed,
        metrics=record.metrics,
        held={name: getattr(record, part).get("wga") for name, part in HELD.items()},
        correct=[group.correct_test for group in record.groups],
        wilson=record.ci["wga"],
        labels=labels.total_a if labels else 0,
        rendered=labels.n_rendered if labels else 0,
        agreement={name: agreement[name] for name in AGREEMENT if name in agreement},
        device=one_line(str(record.env.get("device", "unknown"))),
        session=str(record.env.get("session", "")),
        marginal_s=cost.marginal.device_s if cost else None,
        scratch_s=cost.scratch.device_s if cost else None,
        search_s=record.tuning.cost.device_s if record.tuning else None,
        step=chosen.step if chosen else None,
    )


def _asked(record: RunRecord) -> str:
    spec = record.spec()
    block = dataclasses.replace(spec.block, backbone_code="")
    return dataclasses.replace(spec, block=block, code="").hash
