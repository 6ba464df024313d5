"""Recompute every number of a record from its predictions and say how far that was possible."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..benchmark import metrics
from ..benchmark import record as records
from ..benchmark.agreement import agreement
from ..benchmark.annotations import Attributes, Held
from ..benchmark.errors import CorruptFile, UserError, one_line
from ..benchmark.predictions import Arrays, labels_hash
from ..benchmark.record import RunRecord
from ..benchmark.spec import PAPER, PROTOCOL, SplitName
from .verify_dataset import TOTALS, Look, check, look_up, looking_once
from .verify_selection import ledger, selection, superseded, tuning

LEVELS = {
    "failed": "a failed run: nothing to recompute",
    "counts": "published: metrics recomputed from the group counts; the licence keeps predictions and labels",
    "metrics": "metrics recomputed from the group counts; the licence keeps the labels out of the record",
    "answers": "published: group counts recomputed from answers and labels but for train, metrics from the counts",
    "predictions": "group counts recomputed from predictions and labels, metrics from the counts",
}

LONGEST = 2000
"""Characters of a sentence on a record."""
PLACE = re.compile(r"(?P<cell>.+)-s(?P<seed>\d+)-(?P<run>[0-9a-f]{12})")
"""Name of a record's file: method and budget, seed, beginning of the run's hash."""


@dataclass(frozen=True)
class Verdict:
    """What came of one record: the level reached, the fields that differ, and what else a reader should know."""

    path: Path
    level: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.problems


def verify(path: Path, look: Look = look_up) -> Verdict:
    """Check one record file; never raises for a bad record, its problems name the fields.

    `look` finds its dataset, so that many records need not do that anew.
    """
    try:
        record = records.read(path)
        if record.status == "failed":
            return _verdict(path, "failed", _identity(record, path), _notes(record))
        arrays = {} if _kept(record) == "nothing" else records.read_predictions(path, record)
        problems, of_dataset = [*_groups(record), *_arrays(record, arrays), *_stray(record, path)], ""
        old = superseded(record, path)
        if not problems:
            problems += [*_predictions(record, arrays), *_labels(record, arrays)]
            problems += [*_metrics(record), *_agreement(record, arrays)]
            problems += [*selection(record, arrays), *ledger(record), *tuning(record, path, old)]
            differing, of_dataset = check(record, arrays, look(record.dataset))
            problems += differing
        problems += _identity(record, path)
    except (CorruptFile, UserError) as error:
        return _verdict(path, "none", (str(error),))
    except (ArithmeticError, KeyError, ValueError, IndexError, TypeError) as error:
        return _verdict(path, "none", (f"{path.name}: inconsistent: {type(error).__name__}: {error}",))
    return _verdict(path, _level(record), problems, _notes(record, of_dataset, old))


def _verdict(path: Path, level: str, problems: Iterable[str], notes: Iterable[str] = ()) -> Verdict:
    """A verdict each of whose sentences, which quote the record, is one line that a terminal only shows."""
    shown = dict.fromkeys(one_line(problem, LONGEST) for problem in problems)
    return Verdict(path, level, tuple(shown), tuple(one_line(note, LONGEST) for note in notes))


def _level(record: RunRecord) -> str:
    """How far the numbers of a finished record are recomputed."""
    whole = "predictions" if _labelled(record) else "metrics"
    return {"nothing": "counts", "answers": "answers"}.get(_kept(record), whole)


def _notes(record: RunRecord, of_dataset: str = "", old: bool = False) -> Iterator[str]:
    """What is no difference."""
    if old:
        yield "superseded: a draw of the search was made again since and another one chosen, which tables show"
    if record.protocol not in (PROTOCOL, PAPER):
        yield f"of protocol {record.protocol}, today's is {PROTOCOL}: they stand in tables of their own"
    if of_dataset:
        yield of_dataset


def _identity(record: RunRecord, path: Path) -> Iterator[str]:
    """The run's hash is that of its fields; of an edited one, the file's place may tell which field it is."""
    if record.identity_hash() == record.run:
        return
    yield f"run: the identity fields give {record.identity_hash()[:12]}, the record says {record.run[:12]}"
    place, slug = PLACE.fullmatch(path.stem), records.slug
    if place is None or place["run"] != record.run[:12]:  # the file was renamed: its name tells nothing
        return
    backbone, dataset, *_ = (folder.name for folder in path.absolute().parents)
    agrees = {
        "dataset": dataset == slug(record.dataset),
        "backbone": backbone == slug(record.backbone),
        "method": place["cell"].startswith(f"{slug(record.label)}-"),
        "budget": place["cell"].endswith(f"-{slug(record.budget)}"),
        "seed": place["seed"] == str(record.seed),
    }
    for field in agrees:
        if not agrees[field]:
            yield f"{field}: the record says {getattr(record, field)}, its place is {dataset}/{backbone}/{path.name}"


def _groups(record: RunRecord) -> Iterator[str]:
    """One row per (y, a) cell, in index order."""
    for g, (row, (y, *a)) in enumerate(zip(record.groups, np.ndindex(*record.shape), strict=True)):
        if (row.y, row.a) != (y, a):
            yield f"groups.{g}: the record says y={row.y}, a={row.a}, its place is that of y={y}, a={a}"


def _predicted(record: RunRecord) -> tuple[SplitName, ...]:
    """Splits whose predictions lie beside the record: those of train only where its labels may lie there too."""
    if _kept(record) == "nothing":
        return ()
    with_train = record.train_metrics and _kept(record) == "all" and _labelled(record)
    return ("train", "val", "test") if with_train else ("val", "test")


def _kept(record: RunRecord) -> str:
    return record.predictions.kept if record.predictions else "nothing"


def _labelled(record: RunRecord) -> bool:
    return record.predictions is not None and record.predictions.has_labels


def _arrays(record: RunRecord, arrays: Arrays) -> Iterator[str]:
    """Every array is there and has the length of its split; of a published record no other is."""
    counts, published = record.counts(), _kept(record) == "answers"
    known = {f"{name}_source" for name in _with_source(record)}
    for name in _predicted(record):
        n, total = np.size(arrays.get(f"{name}_prediction", ())), counts[TOTALS[name]].sum()
        if not _labelled(record) and n != total:
            yield f"groups: their {TOTALS[name]} sum to {total}, there are {n} predictions"
        wanted = {f"{name}_{part}": shape for part, shape in _wanted(record, name, n).items()}
        known |= wanted.keys()
        for part, shape in wanted.items():
            array = arrays.get(part)
            if array is None:
                yield f"predictions: {part} is missing"
            elif array.shape != shape or array.dtype.kind not in ("f" if part.endswith("logits") else "i"):
                yield f"predictions: {part} has shape {array.shape} and type {array.dtype}"
            elif part.endswith("index") and not np.array_equal(np.sort(array), np.arange(n)):
                yield f"predictions: {part} does not name each of {n} images once"
    for name in _with_source(record):
        n, found = counts[TOTALS[name]].sum(), arrays.get(f"{name}_source", np.empty(()))
        if found.ndim != 2 or len(found) != n or found.dtype.kind != "i" or (found.size and found.min() < 0):
            yield f"predictions: {name}_source is not one row of group values for each of {n} images"
    for part in sorted(arrays.keys() - known) if published else ():
        yield f"predictions: {part} is not kept in a published record"


def _wanted(record: RunRecord, name: SplitName, n: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that a split of n images must have."""
    published = _kept(record) == "answers"
    wanted: dict[str, tuple[int, ...]] = {"prediction": (n,), "index": (n,)}
    if _labelled(record):
        wanted |= {"y": (n,), "a": (n, len(record.attributes))}
        with_unit = name == "test" if published else name != "train"
        wanted |= {"unit": (n,)} if with_unit else {}
    if name != "train" and not published:
        wanted |= {"logits": (n, record.shape[0])}
    return wanted


def _with_source(record: RunRecord) -> list[Held]:
    """Splits on which the groups of the source lie beside the record."""
    return [name for name in record.agreement if _labelled(record) and (name == "val" or _kept(record) == "all")]


def _stray(record: RunRecord, path: Path) -> Iterator[str]:
    """Where nothing is kept, nothing lies there."""
    if _kept(record) == "nothing" and records.predictions_path(path).exists():
        yield "predictions.kept: nothing, but there is a file of predictions"


def _metrics(record: RunRecord) -> Iterator[str]:
    """Metrics and interval from the group counts."""
    counts = record.counts()
    fields: dict[str, SplitName] = {"metrics": "test", "val_metrics": "val"}
    fields |= {"train_metrics": "train"} if record.train_metrics else {}
    for field, name in fields.items():
        correct, total = counts[f"correct_{name}"], counts[TOTALS[name]]
        expected = metrics.evaluate(correct, total, counts["n_train"], record.shape, record.spec_attributes())
        yield from _differences(field, getattr(record, field), expected)
    worst = metrics.worst_group(counts["correct_test"], counts["m_test"])
    low, high = metrics.wilson_interval(int(counts["correct_test"][worst]), int(counts["m_test"][worst]))
    found = record.ci.get("wga", (math.nan, math.nan))
    if not (math.isclose(found[0], low, abs_tol=1e-9) and math.isclose(found[1], high, abs_tol=1e-9)):
        yield f"ci.wga: the record says {found}, the counts give ({low:.6f}, {high:.6f})"


def _differences(field: str, found: metrics.Values, expected: metrics.Values) -> Iterator[str]:
    for name in sorted(found.keys() | expected.keys()):
        a, b = found.get(name), expected.get(name)
        same = a is None and b is None if a is None or b is None else math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
        if name not in found or name not in expected or not same:
            yield f"{field}.{name}: the record says {a}, the counts give {b}"


def _predictions(record: RunRecord, arrays: Arrays) -> Iterator[str]:
    """Predictions are the argmax of finite logits, where these are kept."""
    for name in ("val", "test") if _kept(record) == "all" else ():
        logits = arrays[f"{name}_logits"]
        if not np.isfinite(logits).all():
            yield f"predictions: {name}_logits holds values that are not finite"
        elif not np.array_equal(logits.argmax(1), arrays[f"{name}_prediction"]):
            yield f"predictions: {name}_prediction is not the argmax of {name}_logits"


def _labels(record: RunRecord, arrays: Arrays) -> Iterator[str]:
    """Labels by their hash, group counts from predictions and labels."""
    counts = record.counts()
    for name in _predicted(record) if _labelled(record) else ():
        y, a = arrays[f"{name}_y"].astype(np.int64), arrays[f"{name}_a"].astype(np.int64)
        if record.predictions is None or labels_hash(y, a) != record.predictions.labels_sha256.get(name):
            yield f"predictions.labels_sha256.{name}: the labels are not those the record was written with"
            continue
        group = metrics.group_index(y, a, record.shape)
        correct, total = metrics.group_counts(arrays[f"{name}_prediction"] == y, group, len(record.groups))
        for field, expected in ((f"correct_{name}", correct), (TOTALS[name], total)):
            for g in np.flatnonzero(counts[field] != expected):
                yield f"groups.{g}.{field}: the record says {counts[field][g]}, the predictions give {expected[g]}"


def _agreement(record: RunRecord, arrays: Arrays) -> Iterator[str]:
    """Agreement of the source's groups with the true ones."""
    splits = _with_source(record)
    if _labelled(record) and set(splits) != {
        name.removesuffix("_source") for name in arrays if name.endswith("_source")
    }:
        yield f"agreement: {sorted(splits)} are not the splits whose source groups are stored"
        return
    for name, said in ((name, record.agreement[name]) for name in splits):
        y, a = arrays[f"{name}_y"].astype(np.int64), arrays[f"{name}_a"].astype(np.int64)
        found = Attributes.of(arrays[f"{name}_source"].astype(np.int64))
        yield from _differences(f"agreement.{name}", said, agreement(found, a, y, record.shape))


def verify_all(target: Path) -> list[Verdict]:
    """Verdicts of one record file, or of all records below a folder, in a fixed order."""
    if target.is_file():
        return [verify(target)]
    if not target.is_dir():
        raise UserError(f"{target}: there is no such file or folder")
    look = looking_once()
    return [verify(path, look) for path in records.find(target)]


def orphans(target: Path) -> list[Path]:
    """Prediction files below a folder that no record claims."""
    return [path for path in sorted(target.rglob("*.npz")) if not path.with_suffix(".json").exists()]
