"""Helpers that several test files share."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from worstgroup.benchmark.home import runs_home
from worstgroup.benchmark.planning import Plan, Request, plan
from worstgroup.benchmark.predictions import Arrays, pack
from worstgroup.benchmark.record import RunRecord, find, predictions_path, read, read_predictions
from worstgroup.benchmark.registry import DATASETS, load_plugin

TINYSET = Path(__file__).parent / "fixtures" / "tinyset.py"
"""The plugin that registers `tinyvariants`."""
PROGRAM = Path(sys.executable).parent / "worstgroup"
torch.set_num_threads(1)  # on tiny batches several threads only wait for each other


def register_tiny() -> None:
    """Register the variants of `tiny` that only tests need (`tinyvariants`) in this process, once."""
    if "tinyvariants" not in DATASETS:
        load_plugin(TINYSET)


def plan_tiny(*methods: str, seeds: tuple[int, ...] = (0,), budget: str = "", **settings: str) -> Plan:
    """Plan runs of the tiny dataset; a setting's dot is written as two underscores."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    return plan([Request("tiny", method, budget, seeds=seeds, settings=changes) for method in methods])


def predictions(record: RunRecord, names: tuple[str, ...] = ("test_prediction", "test_logits", "val_logits")) -> bytes:
    """Bytes of a run's stored predictions."""
    (path,) = (file for file in find(runs_home()) if read(file).run == record.run)
    arrays = read_predictions(path, record)
    return b"".join(arrays[name].tobytes() for name in names)


def prediction_files(records: Path) -> dict[str, bytes]:
    """Content of all prediction files below a folder, by their place in it."""
    return {str(path.relative_to(records)): path.read_bytes() for path in sorted(records.rglob("*.npz"))}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record's JSON in place, by hand as it were."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(dotted: str, value: object) -> Callable[[dict[str, Any]], None]:
    """A change for `edit`: set the field at `a.0.b`."""

    def change(content: Any) -> None:
        *parents, last = (int(part) if part.isdigit() else part for part in dotted.split("."))
        for part in parents:
            content = content[part]
        content[last] = value

    return change


def repack(path: Path, change: Callable[[Arrays], object], *, honest: bool = False) -> None:
    """Change the arrays beside a record; unless `honest`, correct their hash in it too."""
    arrays = read_predictions(path, read(path))
    change(arrays)
    content = pack(arrays)
    predictions_path(path).write_bytes(content)
    if not honest:
        edit(path, put("predictions.sha256", hashlib.sha256(content).hexdigest()))


def without_train(path: Path) -> None:
    """Rewrite a record as one from before train was predicted."""
    repack(path, lambda arrays: [arrays.pop(name) for name in list(arrays) if name.startswith("train_")])

    def change(content: dict[str, Any]) -> None:
        del content["train_metrics"], content["predictions"]["labels_sha256"]["train"]
        for group in content["groups"]:
            del group["correct_train"]

    edit(path, change)


def places(value: Any, place: str = "") -> Iterator[str]:
    """Dotted places of everything in a JSON value."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            inner = f"{place}.{key}" if place else str(key)
            yield inner
            yield from places(item, inner)


# ------------------------------------------------------------------------------------------------ the command line


@dataclass(frozen=True)
class Result:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


def start(home: Path, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """Start the real program in a process group of its own."""
    return subprocess.Popen(
        [str(PROGRAM), *map(str, arguments)],
        env={**os.environ, "WORSTGROUP_HOME": str(home), "NO_COLOR": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", timeout: float = 120) -> Result:
    """Wait for a started program."""
    out, err = process.communicate(timeout=timeout)
    return Result(process.returncode, out, err)


Call = Callable[..., Result]
"""The fixture `call`: runs the program's `main` in this process."""
