"""Scoring: a fitted method's logits become a record, beside its packed predictions."""

import hashlib
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import engine, metrics, record
from .agreement import agreement
from .annotations import Annotations
from .cost import Clock, CostReport
from .fitting import Fitted, Logits
from .predictions import Arrays, labels_hash, pack
from .record import RunRecord
from .selection import Selector
from .spec import SPLITS, Card, SplitName
from .store import Split, Store


def score(
    known: dict[str, Any], store: Store, fitted: Fitted, annotations: Annotations, clock: Clock, logits: Logits
) -> tuple[RunRecord, bytes]:
    """Everything about a finished run in one record, and its packed predictions; `known` are the fields from before."""
    card = store.card
    splits = {name: store.split(name) for name in SPLITS}
    group = {name: metrics.group_index(split.y, split.a, card.shape) for name, split in splits.items()}
    predictions = {name: values.argmax(1).astype(np.int16) for name, values in logits.items()}
    counts = {
        name: metrics.group_counts(predictions[name] == splits[name].y, group[name], card.num_groups) for name in SPLITS
    }
    n_train = counts["train"][1]
    packed = pack(_arrays(card, splits, fitted, logits, predictions))
    worst = metrics.worst_group(*counts["test"])
    predictor, selector = fitted.predictor, fitted.selector

    def history(trajectory: engine.Trajectory | None, selector: Selector | None) -> list[record.EpochRow]:
        return _history(trajectory, selector, splits["val"].y, group["val"], card.num_groups)

    seen = selector.groups.counts().tolist() if selector else []
    result = RunRecord(
        **known,
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
        cost=cost(clock),
        predictions=record.PredictionFile(
            sha256=hashlib.sha256(packed).hexdigest(),
            labels_sha256={name: labels_hash(splits[name].y, splits[name].a) for name in SPLITS},
            has_labels=card.share_labels,
        ),
    )
    return result, packed


def _arrays(
    card: Card,
    splits: dict[SplitName, Split],
    fitted: Fitted,
    logits: Logits,
    predictions: dict[SplitName, NDArray[np.int16]],
) -> Arrays:
    """What the file of predictions holds, by name; no label where the dataset's licence keeps them."""
    arrays: Arrays = {}
    for name, split in splits.items():
        if name == "train" and not card.share_labels:
            continue  # of a model that learned them by heart the predictions are the labels
        arrays |= {f"{name}_prediction": predictions[name]}
        arrays |= {f"{name}_index": np.arange(len(predictions[name]), dtype=np.int32)}
        if card.share_labels:
            arrays |= {f"{name}_y": split.y.astype(np.int16), f"{name}_a": split.a.astype(np.int16)}
        if name != "train":  # whose logits would be most of the file, and whose units nothing resamples
            arrays |= {f"{name}_logits": logits[name]}
            arrays |= {f"{name}_unit": split.units().astype(np.int32)} if card.share_labels else {}
    if card.share_labels:
        arrays |= {f"{name}_source": found.values.astype(np.int16) for name, found in fitted.found.items()}
    return arrays


def cost(clock: Clock) -> record.Cost:
    """What the run has cost up to now."""
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
