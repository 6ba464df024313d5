"""The published form of a record: what `leaderboard/results/` holds, small enough to be committed.

It keeps the answers on validation and test with their labels, in the smallest types, but no logits and nothing of
train. Where the licence keeps the labels out of records it keeps no predictions at all: of photographs they tell what
is on them. Everything else that the record says stays as it is.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark import record as records
from ..benchmark.errors import UserError, require
from ..benchmark.home import write_bytes
from ..benchmark.predictions import Arrays, pack
from ..benchmark.record import COUNTING, RunRecord
from .verify import verify
from .verify_dataset import Look, look_up

KEPT = (
    *("val_prediction", "val_y", "val_a", "val_source", "val_index"),
    *("test_prediction", "test_y", "test_a", "test_unit", "test_index"),
)
WIDTH = 320
"""Characters of a line of the JSON; an epoch and a group have one line each."""


def publish(path: Path, target: Path, look: Look = look_up) -> Path:
    """Write the published form of a finished run below `target`, after those of the candidates of its search.

    Returns the place of its record, DATASET/BACKBONE/NAME.json. The same record gives the same bytes. `look` finds its
    dataset. Raises `UserError` for a run that failed, for a record that does not verify, and for a candidate of a
    search none of whose runs is published: on its own it stands in no table.
    """
    record = _checked(path, look)
    require(record.status == "finished", f"{path}: the run failed ({record.error}); only finished runs are published")
    if record.is_candidate and not _belongs(record, target):
        raise UserError(f"{path}: a candidate of a search; publish the run that was chosen, its candidates go with it")
    for place in candidates(path, record):
        _write(place, _checked(place, look), target)
    return _write(path, record, target)


def candidates(path: Path, record: RunRecord) -> list[Path]:
    """The records of the candidates of a run's search, failed ones too: without them nobody can verify the choice."""
    found = (records.find_run(path, run) for run in record.candidates)
    return [place for place in found if place is not None]


def _checked(path: Path, look: Look) -> RunRecord:
    verdict = verify(path, look)
    require(verdict.ok, f"{path}: does not verify, see `worstgroup verify`: {'; '.join(verdict.problems[:1])}")
    return records.read(path)


def _belongs(record: RunRecord, target: Path) -> bool:
    """Whether a published run names this one among its candidates."""
    folder = records.record_path(target, record.spec()).parent
    return any(record.run in records.read(other).candidates for other in records.find(folder))


def _write(path: Path, record: RunRecord, target: Path) -> Path:
    place, file = records.record_path(target, record.spec()), record.predictions
    if file is not None:
        packed = pack(compact(records.read_predictions(path, record))) if file.has_labels else b""
        told = {"kept": "answers", "sha256": hashlib.sha256(packed).hexdigest()}
        if packed:
            write_bytes(records.predictions_path(place), packed)
        else:
            told = {"kept": "nothing", "sha256": ""}
        record = record.model_copy(update={"predictions": file.model_copy(update=told)})
    write_bytes(place, to_json(record))
    return place


def compact(arrays: Arrays) -> Arrays:
    """The arrays that are kept, in their smallest types; those that only count from 0 are read back without a file."""
    kept = {name: smallest(arrays[name]) for name in KEPT if name in arrays}
    return {
        name: values
        for name, values in kept.items()
        if name not in COUNTING or not np.array_equal(values, np.arange(len(values)))
    }


def smallest(values: NDArray[Any]) -> NDArray[Any]:
    """Integers in the smallest signed type that holds them."""
    most = max(int(values.max(initial=0)), ~int(values.min(initial=0)))
    return values.astype(np.min_scalar_type(~most))


def to_json(record: RunRecord) -> bytes:
    """JSON in which every part that fits on a line stands on one, so that a changed row is a changed line."""
    return (_lines(record.model_dump(mode="json"), 0) + "\n").encode()


def _lines(value: Any, depth: int) -> str:
    """A value as text, `depth` levels below the top."""
    flat = json.dumps(value, ensure_ascii=True)
    if (depth and len(flat) <= WIDTH) or not isinstance(value, dict | list) or not value:
        return flat
    indent = " " * (depth + 1)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    keys = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    items = value.values() if isinstance(value, dict) else value
    parts = [f"{indent}{key}{_lines(item, depth + 1)}" for key, item in zip(keys, items, strict=True)]
    return "\n".join([opening, ",\n".join(parts), " " * depth + closing])
