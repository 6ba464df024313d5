"""Fitting: a run's method, called with its task, and the logits of what it returns.

The test split opens when the method has returned, and its labels are not read here at all.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from . import engine
from .annotations import Annotations, Attributes, Held, halves
from .choices import Decisions
from .errors import UserError, require
from .lab import Lab
from .registry import METHODS, SOURCES
from .seen import Pool
from .selection import Selector
from .spec import SPLITS, RunSpec, SplitName, derive_seed
from .store import Split, Store
from .task import Predictor, Task

Logits = dict[SplitName, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What fitting left: the predictor, the rule its epoch was chosen by (None where no epoch was chosen), what the
    group source answered by split, and the training that the epoch was chosen in, where that was another one.
    """

    predictor: Predictor
    selector: Selector | None
    found: dict[Held, Attributes]
    search: engine.Trajectory | None = None


def annotations_of(spec: RunSpec, store: Store) -> Annotations:
    """The attributes of what the run fits and selects on, behind the door of its budget."""
    held: dict[Held, Split] = {"train": store.split("train"), "val": store.split("val")}
    y, a = ({name: getattr(split, part) for name, split in held.items()} for part in ("y", "a"))
    env = {name: split.env for name, split in held.items() if split.env is not None}
    return Annotations(store.card, y, a, spec.budget, spec.block.seed, env)


def fit(spec: RunSpec, lab: Lab, annotations: Annotations) -> Fitted:
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
        return Fitted(predictor, task.selector() if predictor.trajectory else None, task.found)

    y = lab.pixels("val").y.cpu().numpy()[granted]
    fit, select = halves(granted, y, np.random.default_rng(derive_seed(*spec.block.stream, "halves")))
    first = Task(spec, lab, annotations, source=source, pool=Pool(some, fit), select=select, prefix="search:")
    searched = _call(spec, first)
    decisions = Decisions(first.decisions.made)
    second = Task(spec, lab, annotations, source=source, pool=Pool(some, granted), decisions=decisions)
    predictor = _call(spec, second)
    require(
        not decisions.left, f"{spec.method}: the second fit made fewer selections than the first: it must do the same"
    )
    annotations.bill_labels(granted)
    selector = first.selector() if searched.trajectory else None
    return Fitted(predictor, selector, second.found, searched.trajectory)


def _call(spec: RunSpec, task: Task) -> Predictor:
    method = METHODS[spec.method].make(spec.config)
    predictor = task.train(method) if isinstance(method, engine.Objective) else method.fit(task)
    if not isinstance(predictor, Predictor):
        raise UserError(f"{spec.method}: fit(task) must return a Predictor, it returned {type(predictor).__name__}")
    return predictor


def predict(lab: Lab, predictor: Predictor) -> Logits:
    """Logits (n, K) of every split, the test split's among them: nothing is fitted from here on."""
    lab.test_is_open = True
    return {split: _logits(lab, predictor, split) for split in SPLITS}


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
