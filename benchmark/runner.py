"""Runs: a `RunSpec` becomes a `RunRecord`; finished runs are skipped, failed ones are recorded and the rest goes on."""

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import determinism, guard, record, scoring
from .artifacts import drop_work
from .cost import Clock
from .device import pick_device, plain_kernels
from .errors import CorruptFile, DiskError, NonFiniteLoss, UserError, require
from .fitting import Fitted, Logits, annotations_of, fit, predict
from .home import lock, runs_home
from .lab import Lab, Progress, Watch
from .planning import Request, plan
from .provenance import SESSION, facts
from .record import RunRecord
from .spec import Card, RunSpec
from .store import Store
from .task import Predictor
from .tuning import cost_of, score_of, was_pruned


def finished(spec: RunSpec, runs: Path | None = None) -> RunRecord | None:
    """The finished record of a run, or None; raises `CorruptFile` for one that cannot be read.

    A record that tells of its search what the candidates no longer say is none: it is to be told anew.
    """
    path = record.record_path(runs or runs_home(), spec)
    found = _made(path)
    return found if found and found.tuning == (_tuning(path, spec) or found.tuning) else None


def _made(path: Path) -> RunRecord | None:
    if not path.exists() or not record.predictions_path(path).exists():
        return None
    try:
        found = record.read(path)
    except CorruptFile as error:
        raise CorruptFile(f"{error}. To have this run made again, delete that file") from error
    return found if found.status == "finished" else None


def run_spec(
    spec: RunSpec,
    store: Store,
    progress: Progress = lambda stage, epoch, epochs: None,
    session: str = SESSION,
    watch: Watch = lambda value: None,
    sharers: int = 1,
    runs: Path | None = None,
) -> RunRecord:
    """Make one run and write its record; a second process that wants the same run waits and reads it.

    `sharers` are the worker processes on its device, itself among them, for the record: its seconds are theirs too. A
    non-finite loss, a method's own refusal or a crash in it give a record with status `failed`. `runs` is the folder
    of records, where it is not the home's.
    """
    path = record.record_path(runs or runs_home(), spec)
    before = _stamp(path)
    with lock(path):
        done = finished(spec, runs) or (_failed(path) if _stamp(path) != before else None)
        if done is not None:
            return done
        known, clock = facts(spec, store.card, session, sharers), Clock(pick_device())
        try:
            known["tuning"] = _tuning(path, spec)
            require(not spec.candidates or known["tuning"], f"{spec.label}: candidates of its search are not there")
            with determinism.noted(known["env"]):
                result, packed = _adopted(known, path, spec) or execute(spec, store, known, clock, progress, watch)
        except DiskError:
            raise
        except Exception as error:  # a method's bug must not end the suite
            failure = {"status": "failed", "error": _explain(error), "cost": scoring.cost(clock)}
            result, packed = RunRecord.model_validate(known | failure), None
        record.write(path, result, packed)
        drop_work(spec.hash)
    return result


def _stamp(path: Path) -> int:
    """When a record was written, 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _failed(path: Path) -> RunRecord | None:
    """The record of a failed run: where another process has just made it, it would only fail again."""
    found = record.read(path)
    return found if found.status == "failed" else None


def _tuning(path: Path, spec: RunSpec) -> record.Tuning | None:
    """How the candidates did that a run was chosen among; None without a search, or where one of them is missing."""
    found = [record.find_run(path, run) for run in spec.candidates]
    made = [record.read(place) for place in found if place is not None]
    if not made or len(made) < len(found):
        return None
    pruned = [draw for draw, one in enumerate(made) if was_pruned(one)]
    return record.Tuning(scores=[score_of(one) for one in made], pruned=pruned, cost=cost_of(made))


def adopts(spec: RunSpec) -> bool:
    """Whether a run need not be made, since it was: as a candidate of its search, or before that was told anew."""
    path = record.record_path(runs_home(), spec)
    return any(_made(place) is not None for place in _twins(path, spec))


def _twins(path: Path, spec: RunSpec) -> tuple[Path, ...]:
    """Where the same run may lie: as it was before its search was told anew, or as a candidate of that."""
    twin = record.record_path(path.parents[2], replace(spec, candidates=()))
    return (path, twin) if spec.candidates else ()


def _adopted(known: dict[str, Any], path: Path, spec: RunSpec) -> tuple[RunRecord, bytes] | None:
    """The same run as a candidate of its search has made, or as it was made before its search was told anew."""
    own = ("created", "run", "candidates", "tuning")
    for place in _twins(path, spec):
        if (made := _made(place)) is not None:
            told = made.model_copy(update={name: known[name] for name in own})
            return told, record.predictions_path(place).read_bytes()
    return None


def lost(spec: RunSpec, card: Card, reason: str) -> RunRecord:
    """The record of a run that never came back, from no one knows where; it is written unless the run is finished."""
    path = record.record_path(runs_home(), spec)
    known = facts(spec, card, SESSION, 1) | {"env": {}, "status": "failed", "error": reason}
    with lock(path):
        done = finished(spec)
        if done is None:
            record.write(path, result := RunRecord.model_validate(known), None)
    return done or result


def _explain(error: Exception) -> str:
    """What a failed run's record says: the message, and for an unforeseen error its type and place."""
    if isinstance(error, UserError | NonFiniteLoss):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    told = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    return f"out of memory: take fewer --jobs, or a smaller recipe.batch_size. {told}" if _is_memory(error) else told


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out, on whatever device; torch has no type of its own for that of the machine."""
    text = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in text
        or "STATUS_ALLOC_FAILED" in text
    )


def execute(
    spec: RunSpec, store: Store, known: dict[str, Any], clock: Clock, progress: Progress, watch: Watch
) -> tuple[RunRecord, bytes]:
    """Fit, then predict every split, then score; `known` are the record's fields known beforehand (`facts`).

    Labels of the test split are read for the first time after the method's model has predicted it. Outside the engine's
    loops all is single precision, whatever the recipe's is within.
    """
    with plain_kernels(clock.device):
        lab = Lab(spec.block, store, clock.device, clock, progress, watch, known["env"]["sharers"])
        annotations = annotations_of(spec, store)

        def answer() -> tuple[Fitted, Logits]:
            fitted = fit(spec, lab, annotations)
            return fitted, predict(lab, fitted.predictor)

        fitted, logits = guard.watched(answer)
    return scoring.score(known, store, fitted, annotations, clock, logits)


def refit(spec: RunSpec, store: Store, progress: Progress = lambda stage, epoch, epochs: None) -> tuple[Lab, Predictor]:
    """Make a run's model again, for a look at it, with all splits open; nothing is recorded.

    On the same machine and with the same code and threads it is the very model that the record tells of.
    """
    device = pick_device()
    with plain_kernels(device):
        lab = Lab(spec.block, store, device, Clock(device), progress)
        annotations = annotations_of(spec, store)
        predictor = guard.watched(lambda: fit(spec, lab, annotations)).predictor
    drop_work(spec.hash)
    lab.test_is_open = True
    return lab, predictor


def run(
    dataset: str,
    method: str,
    *,
    budget: str = "",
    backbone: str = "",
    weights: str = "",
    seed: int = 0,
    extra: str = "",
    root: str | Path | None = None,
    **settings: Any,
) -> RunRecord:
    """Make one run (or read it, if it is finished) and return its record.

    `settings` are configuration keys of the method, e.g. `run("digits2", "groupdro", step_size=0.1)`.
    """
    texts = {key: str(value) for key, value in settings.items()}
    request = Request(dataset, method, budget, backbone, weights, (seed,), texts, extra)
    made = plan([request], Path(root) if root else None)
    planned = made.runs[0]
    if planned.spec is None:
        raise UserError(f"{planned.label}: {planned.reason}")
    return run_spec(planned.spec, made.stores[planned.spec.block.dataset])
