"""What a record says of its dataset, checked against the dataset itself where it is on this machine."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np

from ..benchmark import metrics
from ..benchmark.errors import UserError
from ..benchmark.planning import find_card
from ..benchmark.predictions import Arrays, labels_hash
from ..benchmark.prepare import asked_for, find_store
from ..benchmark.record import AttributeRow, RunRecord
from ..benchmark.spec import SPLITS, Card, SplitName
from ..benchmark.store import Split

TOTALS: dict[SplitName, str] = {"train": "n_train", "val": "m_val", "test": "m_test"}
"""Field of a group's row that counts the images of a split."""
CHECKED = "dataset fingerprints checked, with labels and images"
UNCHECKED = "dataset fingerprints not checked"
"""Notes, which follow a number of records."""


@dataclass(frozen=True, eq=False)
class Found:
    """A dataset as it is here; without `splits` there is none, and `reason` says why."""

    reason: str = ""
    card: Card | None = None
    fingerprint: str = ""
    splits: dict[SplitName, Split] | None = None
    hashes: dict[SplitName, str] | None = None


Look = Callable[[str], Found]
"""Finds a dataset by the name that records give it."""


def look_up(name: str) -> Found:
    """A dataset as it is here, built if it is a built-in one; nothing is fetched. Never raises for a name."""
    try:
        store = find_store(name)
        if store is None:
            return Found(f"{name} is not here")
        splits = {split: store.split(split) for split in SPLITS}
    except UserError as error:
        return Found(str(error))
    hashes = {split: labels_hash(part.y, part.a) for split, part in splits.items()}
    return Found("", store.card, store.fingerprint, splits, hashes)


def looking_once() -> Look:
    """`look_up` that looks every name up once, for many records at a time."""
    return cache(look_up)


def check(record: RunRecord, arrays: Arrays, found: Found) -> tuple[list[str], str]:
    """What differs from the dataset, and a note of whether it could be looked at."""
    if found.card is None or found.splits is None or found.hashes is None:
        return [], f"{UNCHECKED}: {found.reason}"
    if record.fingerprint != found.fingerprint:
        if _is_own(record.dataset):
            return [], f"{UNCHECKED}: other files of {record.dataset} are here"
        return [f"fingerprint: the record says {record.fingerprint}, {record.dataset} has {found.fingerprint}"], ""
    problems = list(_meaning(record, found.card))
    for name, split in found.splits.items() if not problems else ():
        problems += _totals(record, name, split)
        hashes = record.predictions.labels_sha256 if record.predictions else {}
        if hashes.get(name, found.hashes[name]) != found.hashes[name]:  # train's is not in records from before
            problems.append(f"predictions.labels_sha256.{name}: not that of the labels of {record.dataset}")
        problems += _images(arrays, name, split, record.dataset)
    return problems, CHECKED


def _is_own(name: str) -> bool:
    """Whether a dataset's name stands for a user's own files, of which there may be others; their card has no class."""
    options = name.partition("[")[2].rstrip("]").split(",")
    return "custom" in options or not find_card(asked_for(name)[0])[1].classes


def _meaning(record: RunRecord, card: Card) -> Iterator[str]:
    """Classes, attributes, and whether the licence lets labels lie in records."""
    if tuple(record.classes) != card.classes:
        yield f"classes: the record says {record.classes}, {record.dataset} has {list(card.classes)}"
    expected = [AttributeRow(**asdict(attribute)) for attribute in card.attributes]
    if len(record.attributes) != len(expected):
        yield f"attributes: the record says {len(record.attributes)}, {record.dataset} has {len(expected)}"
        return
    for j, (said, own) in enumerate(zip(record.attributes, expected, strict=True)):
        for field in AttributeRow.model_fields:
            if getattr(said, field) != getattr(own, field):
                found = f"{record.dataset} has {getattr(own, field)}"
                yield f"attributes.{j}.{field}: the record says {getattr(said, field)}, {found}"
    if record.predictions and record.predictions.has_labels != card.share_labels:
        allows = "lets records have labels" if card.share_labels else "keeps labels out of records"
        yield f"predictions.has_labels: {record.predictions.has_labels}, the licence of {record.dataset} {allows}"


def _totals(record: RunRecord, name: SplitName, split: Split) -> Iterator[str]:
    """Images of each group."""
    group = metrics.group_index(split.y, split.a, record.shape)
    said, there = record.counts()[TOTALS[name]], np.bincount(group, minlength=len(record.groups))
    for g in np.flatnonzero(said != there):
        yield f"groups.{g}.{TOTALS[name]}: the record says {said[g]}, {record.dataset} has {there[g]}"


def _images(arrays: Arrays, name: SplitName, split: Split, dataset: str) -> Iterator[str]:
    """Every image of a split stands in the arrays once, with its own labels and unit."""
    if f"{name}_index" not in arrays:
        return
    index = arrays[f"{name}_index"]
    if not np.array_equal(np.sort(index), np.arange(len(split))):
        yield f"predictions: {name}_index is not that of the {len(split)} images of {dataset}"
        return
    for part, own in (("y", split.y), ("a", split.a), ("unit", split.units())):
        said = arrays.get(f"{name}_{part}")
        if said is not None and not np.array_equal(said, own[index]):
            first = np.flatnonzero((said != own[index]).reshape(len(own), -1).any(axis=1))[:1]
            yield f"predictions: {name}_{part} is not that of {dataset}, first at example {first.tolist()}"
