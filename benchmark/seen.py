"""The images that a run sees: its train images may be some of train, some of validation, and rendered views."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .annotations import Held, Indices
from .data import Joined, Pixels
from .lab import Checkpoint, Lab
from .spec import digest


@dataclass(frozen=True, eq=False)
class Pool:
    """Images that a run trains on: rows of train, then rows of validation, those maybe without class labels (-1), then
    the rows of train again in each of the `views`.
    """

    train: Indices
    val: Indices
    labels: bool = True
    views: tuple[str, ...] = ()

    def parts(self) -> list[tuple[Held, Indices]]:
        """Splits that have rows in it, and the rows."""
        both: list[tuple[Held, Indices]] = [("train", self.train), ("val", self.val)]
        return [(split, rows) for split, rows in both if len(rows)]


class Seen:
    """Where the images of both splits lie: those of train in the `pool`, if there is one."""

    def __init__(self, lab: Lab, pool: Pool | None) -> None:
        self.pool, self._lab = pool, lab

    @property
    def key(self) -> str:
        """What tells this run's train images from those of the block's other runs; empty for the split as it is."""
        if self.pool is None:
            return ""
        return digest([*(rows.tolist() for _, rows in self.pool.parts()), *self.pool.views])

    def rows(self, split: Held) -> list[tuple[Held, Indices]]:
        """Splits of the dataset, and rows of them, that make up a split; rendered views are not among them."""
        if split == "train" and self.pool is not None:
            return self.pool.parts()
        return [(split, np.arange(len(self._lab.pixels(split))))]

    def find(self, split: Held, places: Indices) -> list[tuple[Held, Indices, Indices]]:
        """Where images of a split, by their places in it, lie: split of the dataset, rows there, and which of `places`
        these are. Raises `IndexError`.
        """
        found, start = [], 0
        for part, own in self.rows(split):
            which = np.flatnonzero((places >= start) & (places < start + len(own)))
            found.append((part, own[places[which] - start], which))
            start += len(own)
        if sum(len(which) for _, _, which in found) < len(places):
            raise IndexError(f"rows from {places.min()} to {places.max()} of a split of {start} images")
        return found

    def pixels(self, split: Held) -> Pixels:
        """Images and labels."""
        if split == "val" or self.pool is None:
            return self._lab.pixels(split)
        parts = [(self._lab.pixels(part), rows) for part, rows in self.pool.parts()]
        parts += [(self._lab.pixels("train", view), self.pool.train) for view in self.pool.views]
        shown = [part == "train" or self.pool.labels for part, _ in self.pool.parts()]
        return Joined(parts, labels=[*shown, *(True for _ in self.pool.views)])

    def outputs(self, checkpoint: Checkpoint, split: Held) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and logits of each part of a split."""
        for part, rows in self.rows(split):
            features, logits = self._lab.outputs(checkpoint, part)
            yield features[rows], logits[rows]
        if split == "train" and self.pool is not None:
            for view in self.pool.views:
                features, logits = self._lab.outputs(checkpoint, "train", view)
                yield features[self.pool.train], logits[self.pool.train]
