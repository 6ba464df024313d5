"""Runs: a `RunSpec` becomes a `RunRecord`; finished runs are skipped, failed ones are recorded and the rest goes on."""

import hashlib
import os
import platform
import secrets
import traceback
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import determinism, engine, guard, metrics, record
from .agreement import agreement
from .annotations import Annotations, Attributes, Held, halves
from .artifacts import drop_work
from .cost import Clock, CostReport
from .device import kernel_options
from .errors import DiskError, NonFiniteLoss, UserError, require
from .home import lock, runs_home
from .lab import Lab, Progress, Watch
from .planning import Request, plan
from .predictions import Arrays, labels_hash, pack
from .record import RunRecord
from .registry import METHODS, SOURCES
from .selection import Selector
from .spec import SPLITS, Card, RunSpec, SplitName, derive_seed
from .store import Split, Store
from .task import Pool, Predictor, Task
from .tuning import cost_of, score_of, was_pruned

SESSION = secrets.token_hex(6)
"""Identifies this invocation: costs are compared within one."""


def pick_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    found = record.read(path)
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
        facts, clock = _facts(spec, store.card, session, sharers), Clock(pick_device())
        try:
            facts["tuning"] = _tuning(path, spec)
            require(not spec.candidates or facts["tuning"], f"{spec.label}: candidates of its search are not there")
            with determinism.noted(facts["env"]):
                result, packed = _adopted(facts, path, spec) or execute(spec, store, facts, clock, progress, watch)
        except DiskError:
            raise
        except Exception as error:  # a method's bug must not end the suite
            failure = {"status": "failed", "error": _explain(error), "cost": _cost(clock)}
            result, packed = RunRecord.model_validate(facts | failure), None
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


def _adopted(facts: dict[str, Any], path: Path, spec: RunSpec) -> tuple[RunRecord, bytes] | None:
    """The same run as a candidate of its search has made, or as it was made before its search was told anew."""
    own = ("created", "run", "candidates", "tuning")
    for place in _twins(path, spec):
        if (made := _made(place)) is not None:
            told = made.model_copy(update={name: facts[name] for name in own})
            return told, record.predictions_path(place).read_bytes()
    return None


def lost(spec: RunSpec, card: Card, reason: str) -> RunRecord:
    """The record of a run that never came back, from no one knows where; it is written unless the run is finished."""
    path = record.record_path(runs_home(), spec)
    facts = _facts(spec, card, SESSION, 1) | {"env": {}, "status": "failed", "error": reason}
    with lock(path):
        done = finished(spec)
        if done is None:
            record.write(path, result := RunRecord.model_validate(facts), None)
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
    spec: RunSpec, store: Store, facts: dict[str, Any], clock: Clock, progress: Progress, watch: Watch
) -> tuple[RunRecord, bytes]:
    """Fit, then predict every split, then score; `facts` are the record's fields known beforehand.

    Labels of the test split are read for the first time after the method's model has predicted it.
    """
    lab = Lab(spec.block, store, clock.device, clock, progress, watch)
    annotations = _annotations(spec, store)

    def answer() -> tuple[_Fitted, dict[SplitName, NDArray[np.float32]]]:
        fitted = _fit(spec, lab, annotations)
        lab.test_is_open = True
        return fitted, {name: _logits(lab, fitted.predictor, name) for name in SPLITS}

    fitted, logits = guard.watched(answer)
    return _record(facts, store, fitted, annotations, clock, logits)


def refit(spec: RunSpec, store: Store, progress: Progress = lambda stage, epoch, epochs: None) -> tuple[Lab, Predictor]:
    """Make a run's model again, for a look at it, with all splits open; nothing is recorded.

    On the same machine and with the same code and threads it is the very model that the record tells of.
    """
    lab = Lab(spec.block, store, pick_device(), Clock(pick_device()), progress)
    annotations = _annotations(spec, store)
    predictor = guard.watched(lambda: _fit(spec, lab, annotations)).predictor
    drop_work(spec.hash)
    lab.test_is_open = True
    return lab, predictor


def _annotations(spec: RunSpec, store: Store) -> Annotations:
    held: dict[Held, Split] = {"train": store.split("train"), "val": store.split("val")}
    y, a = ({name: getattr(split, part) for name, split in held.items()} for part in ("y", "a"))
    env = {name: split.env for name, split in held.items() if split.env is not None}
    return Annotations(store.card, y, a, spec.budget, spec.block.seed, env)


@dataclass(frozen=True, eq=False)
class _Fitted:
    """What fitting left: the predictor, the rule its epoch was chosen by (None where no epoch was chosen), what the
    group source answered by split, and the training that the epoch was chosen in, where that was another one.
    """

    predictor: Predictor
    selector: Selector | None
    found: dict[Held, Attributes]
    search: engine.Trajectory | None = None


def _fit(spec: RunSpec, lab: Lab, annotations: Annotations) -> _Fitted:
    """Fit once; where the run trains on validation images twice, since no image may select what it was fitted on.

    The first fit holds half of the granted validation images out and selects by them; the second one is on all of them,
    with the decisions of the first (spec: metrics and protocol, section 10.2).
    """
    source = SOURCES[spec.source].make(spec.source_config) if spec.source else None
    granted = annotations.rows("val")
    every = np.arange(len(lab.pixels("train")))
    some = annotations.rows("train") if spec.policy == "subset" else every
    borrowed = spec.extra or (spec.policy in ("subset", "masked") and spec.budget.grant.train == 0)
    if not borrowed:
        pool = Pool(some, granted[:0]) if spec.policy == "subset" else None
        task = Task(spec, lab, annotations, source=source, pool=pool)
        predictor = _call(spec, task)
        return _Fitted(predictor, task.selector() if predictor.trajectory else None, task.found)

    y = lab.pixels("val").y.cpu().numpy()[granted]
    fit, select = halves(granted, y, np.random.default_rng(derive_seed(*spec.block.stream, "halves")))
    first = Task(spec, lab, annotations, source=source, pool=Pool(some, fit), select=select, prefix="search:")
    searched = _call(spec, first)
    replayed = list(first.decisions)
    second = Task(spec, lab, annotations, source=source, pool=Pool(some, granted), replayed=replayed)
    predictor = _call(spec, second)
    require(not replayed, f"{spec.method}: the second fit made fewer selections than the first: it must do the same")
    annotations.bill_labels(granted)
    selector = first.selector() if searched.trajectory else None
    return _Fitted(predictor, selector, second.found, searched.trajectory)


def _call(spec: RunSpec, task: Task) -> Predictor:
    method = METHODS[spec.method].make(spec.config)
    predictor = task.train(method) if isinstance(method, engine.Objective) else method.fit(task)
    if not isinstance(predictor, Predictor):
        raise UserError(f"{spec.method}: fit(task) must return a Predictor, it returned {type(predictor).__name__}")
    return predictor


def _logits(lab: Lab, predictor: Predictor, split: SplitName) -> NDArray[np.float32]:
    """Logits (n, K) of a split, off every clock: no method pays for features that only evaluation asks for."""
    with lab.clock.apart(), lab.clock.stage("predict"), torch.no_grad():
        if predictor.head is None:
            model = predictor.checkpoint.model
            outputs = engine.predict(model, model, lab.pixels(split), lab.recipe)
        else:
            outputs = predictor.head(lab.outputs(predictor.checkpoint, split)[0])
    logits: NDArray[np.float32] = outputs.numpy().astype(np.float32)
    if not np.isfinite(logits).all():
        raise UserError(f"the {split} logits are not finite")
    return logits


# --------------------------------------------------------------------------------------------------------- records


def _facts(spec: RunSpec, card: Card, session: str, sharers: int) -> dict[str, Any]:
    """What the record says before anything has run."""
    block = spec.block
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": spec.hash,
        "protocol": spec.protocol,
        "dataset": block.dataset,
        "fingerprint": block.fingerprint,
        "backbone": block.backbone,
        "weights": block.weights,
        "backbone_code": block.backbone_code,
        "method": spec.method,
        "source": spec.source,
        "policy": spec.policy,
        "config": dict(spec.config),
        "source_config": dict(spec.source_config),
        "extra": spec.extra,
        "budget": str(spec.budget),
        "recipe": asdict(block.recipe),
        "criterion": spec.criterion,
        "tuned": dict(spec.tuned),
        "draw": spec.draw,
        "candidates": list(spec.candidates),
        "seed": block.seed,
        "code": spec.code,
        "classes": list(card.classes),
        "attributes": [record.AttributeRow(**asdict(attribute)) for attribute in card.attributes],
        "env": environment(session, sharers) | kernel_options(block.recipe.precision, pick_device()),
    }


def device_name() -> str:
    """What the device calls itself."""
    device = pick_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def environment(session: str, sharers: int = 1) -> dict[str, Any]:
    """Device and versions that a result was made with, how many worker processes shared the device, and how far the
    same bits are to be had there again.
    """
    device = pick_device()
    on_gpu = device.type == "cuda"
    cudnn = torch.backends.cudnn.version() if on_gpu else None  # type: ignore[no-untyped-call]
    libraries = {"cuda": torch.version.cuda, "cudnn": cudnn} if on_gpu else {}
    packages = ("worstgroup", "torch", "torchvision", "numpy", "scikit-learn", "pillow")
    return {
        "device": device_name(),
        "device_type": device.type,
        "sharers": sharers,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.system().lower(),
        "versions": {package: version(package) for package in packages} | libraries,
        "session": session,
        **determinism.facts(device),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _record(
    facts: dict[str, Any],
    store: Store,
    fitted: _Fitted,
    annotations: Annotations,
    clock: Clock,
    logits: dict[SplitName, NDArray[np.float32]],
) -> tuple[RunRecord, bytes]:
    """Score the predictions and put everything about the run into one record, beside its packed predictions."""
    card = store.card
    splits = {name: store.split(name) for name in SPLITS}
    group = {name: metrics.group_index(split.y, split.a, card.shape) for name, split in splits.items()}
    predictions = {name: values.argmax(1).astype(np.int16) for name, values in logits.items()}
    counts = {
        name: metrics.group_counts(predictions[name] == splits[name].y, group[name], card.num_groups) for name in logits
    }
    n_train = counts["train"][1]
    arrays: Arrays = {}
    for name in logits:
        if name == "train" and not card.share_labels:
            continue  # of a model that learned them by heart the predictions are the labels
        arrays |= {f"{name}_prediction": predictions[name]}
        arrays |= {f"{name}_index": np.arange(len(predictions[name]), dtype=np.int32)}
        if card.share_labels:
            labels = {"y": splits[name].y.astype(np.int16), "a": splits[name].a.astype(np.int16)}
            arrays |= {f"{name}_{key}": value for key, value in labels.items()}
        if name != "train":  # whose logits would be most of the file, and whose units nothing resamples
            arrays |= {f"{name}_logits": logits[name]}
            arrays |= {f"{name}_unit": splits[name].units().astype(np.int32)} if card.share_labels else {}
    if card.share_labels:
        arrays |= {f"{name}_source": found.values.astype(np.int16) for name, found in fitted.found.items()}
    packed = pack(arrays)
    worst = metrics.worst_group(*counts["test"])
    predictor, selector = fitted.predictor, fitted.selector

    def history(trajectory: engine.Trajectory | None, selector: Selector | None) -> list[record.EpochRow]:
        return _history(trajectory, selector, splits["val"].y, group["val"], card.num_groups)

    seen = selector.groups.counts().tolist() if selector else []
    result = RunRecord(
        **facts,
        status="finished",
        selection=record.Selection(**asdict(predictor.choice), seen=seen),
        labels=record.Ledger(**asdict(annotations.ledger())),
        groups=group_rows(card, counts["train"], counts["val"], counts["test"]),
        history=history(predictor.trajectory, None if fitted.search else selector),
        search=history(fitted.search, selector),
        metrics=metrics.evaluate(*counts["test"], n_train, card.shape, card.attributes),
        val_metrics=metrics.evaluate(*counts["val"], n_train, card.shape, card.attributes),
        train_metrics=metrics.evaluate(*counts["train"], n_train, card.shape, card.attributes),
        agreement={
            name: agreement(found, splits[name].a, splits[name].y, card.shape) for name, found in fitted.found.items()
        },
        ci={"wga": metrics.wilson_interval(int(counts["test"][0][worst]), int(counts["test"][1][worst]))},
        cost=_cost(clock),
        predictions=record.PredictionFile(
            sha256=hashlib.sha256(packed).hexdigest(),
            labels_sha256={name: labels_hash(splits[name].y, splits[name].a) for name in SPLITS},
            has_labels=card.share_labels,
        ),
    )
    return result, packed


def _cost(clock: Clock) -> record.Cost:
    return record.Cost.model_validate(CostReport.of(clock).to_dict())


def _history(
    trajectory: engine.Trajectory | None,
    selector: Selector | None,
    y: NDArray[np.int64],
    group: NDArray[np.int64],
    num_groups: int,
) -> list[record.EpochRow]:
    """Epochs of a training, counted on all of validation and on the images selected by (none without a selector)."""
    return [
        record.EpochRow(
            train_loss=epoch.train_loss,
            val_loss=epoch.val_loss,
            correct_val=metrics.group_counts(epoch.predictions == y, group, num_groups)[0].tolist(),
            correct_seen=selector.counts(epoch.predictions)[0].tolist() if selector else [],
        )
        for epoch in (trajectory.epochs if trajectory else ())
    ]


def group_rows(
    card: Card,
    train: tuple[metrics.Counts, metrics.Counts],
    val: tuple[metrics.Counts, metrics.Counts],
    test: tuple[metrics.Counts, metrics.Counts],
) -> list[record.GroupRow]:
    """Counts of every group, in index order."""
    return [
        record.GroupRow(
            y=y,
            a=list(a),
            n_train=int(train[1][g]),
            correct_train=int(train[0][g]),
            m_val=int(val[1][g]),
            correct_val=int(val[0][g]),
            m_test=int(test[1][g]),
            correct_test=int(test[0][g]),
        )
        for g, (y, *a) in enumerate(np.ndindex(*card.shape))
    ]


# ------------------------------------------------------------------------------------------------------ Python API


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
