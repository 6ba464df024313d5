"""The groups that a run's source found: what they show, and which true groups they hold."""

from pathlib import Path

import numpy as np

from ..benchmark import record
from ..benchmark.annotations import Attributes
from ..benchmark.errors import require
from ..benchmark.spec import SplitName
from ..methods.blocks.explainers import Explainer
from .gallery import draw_rows
from .look import Look


def report(look: Look, found: Path, picture: Path, explainer: Explainer, columns: int) -> list[dict[str, object]]:
    """Write a PNG with a row for each found group, and return a line for each: its images of every true group.

    The groups are those stored with the record at `found`, of validation where the source was asked for it.
    """
    told, card = look.record, look.store.card
    require(bool(told.source), f"{told.label} has no group source: nothing was found; look at one such as dfr+exmap")
    require(bool(told.agreement), f"{told.label}: its record does not hold the groups that its source found")
    split: SplitName = "val" if "val" in told.agreement else "train"
    clusters = Attributes.of(record.read_predictions(found, told)[f"{split}_source"].astype(np.int64))
    own = clusters.groups(look.split(split).y, len(card.classes)).index
    true, names = look.groups(split), card.group_names()
    per_class = int(np.prod(clusters.sizes))
    rows = {
        f"{card.classes[g // per_class]}, cluster {g % per_class}": np.flatnonzero(own == g) for g in np.unique(own)
    }
    draw_rows(look, picture, explainer, split, rows, columns, f"groups of {told.source} on {card.name}")
    return [
        {"group": name, "images": len(members)}
        | dict(zip(names, np.bincount(true[members], minlength=len(names)).tolist(), strict=True))
        for name, members in rows.items()
    ]
