"""tiny: 192 generated images of 16 x 16 on which a method trains in a blink; `worstgroup check` and the tests use it.

A faint square is the class; a loud stripe and a loud corner are the shortcuts. No group is empty in any split. Train
images are also rendered with the stripe or the corner of an image of the other class.
"""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark.registry import dataset
from ..benchmark.spec import SPLITS, Attribute, Card, Recipe, SplitName
from ..benchmark.store import Split, Splits
from .interventions import donors

SIZE = 16
COUNTS: dict[SplitName, tuple[int, ...]] = {
    "train": (30, 8, 7, 3, 3, 8, 7, 30),
    "val": (12, 5, 5, 2, 2, 5, 5, 12),
    "test": (6, 6, 6, 6, 6, 6, 6, 6),
}


def make_card(name: str, **changes: Any) -> Card:
    """The card under a name, with some of its fields changed."""
    facts: dict[str, Any] = {
        "title": "192 images of 16x16 for `worstgroup check`",
        "classes": ("low", "high"),
        "attributes": (
            Attribute("stripe", ("off", "on"), aligned=(0, 1), train_ratio=0.8),
            Attribute("corner", ("off", "on"), aligned=(0, 1), train_ratio=0.8),
        ),
        "image": (SIZE, SIZE, 3),
        "counts": COUNTS,
        "licence": "Apache-2.0 (drawn by this package)",
        "citation": "none",
        "recipe": Recipe(optimizer="adam", lr=1e-2, batch_size=16, epochs=2),
        "backbone": "tiny_cnn",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "interventions": ("stripe", "corner"),
        "notes": ("Made for checks: two epochs of it teach nothing, and its numbers mean nothing.",),
    }
    return Card(name=name, **(facts | changes))


@dataset("tiny", {"": make_card("tiny")})
class Tiny:
    """The generator; the same pixels under every card."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def source_key(self, root: Path | None) -> str:
        """There is no source but this file; `root` is not used."""
        return "tiny, version 1"

    def load(self, root: Path | None) -> Splits:
        """Draw all splits from one legacy NumPy stream, which is frozen: the same pixels everywhere."""
        random = np.random.RandomState(0)
        views = {name: self.card.interventions if name == "train" else () for name in SPLITS}
        return {name: draw(COUNTS[name], random, views[name]) for name in SPLITS}


def draw(counts: tuple[int, ...], random: np.random.RandomState, views: tuple[str, ...] = ()) -> Split:
    """One split with exactly these group counts (G,), shuffled, and these views of it."""
    cells = np.repeat(list(product((0, 1), repeat=3)), counts, axis=0).astype(np.int64)
    cells = cells[random.permutation(len(cells))]
    noise = random.randint(0, 160, (len(cells), SIZE, SIZE, 3))
    donor = donors(cells[:, 0], np.random.RandomState(1))  # a stream of its own: what is drawn after it stays
    swapped = {name: cells.copy() for name in views}
    for name, shown in swapped.items():
        column = 1 + ("stripe", "corner").index(name)
        shown[:, column] = cells[donor, column]
    return Split(
        paint(noise, cells),
        cells[:, 0],
        cells[:, 1:],
        views={name: paint(noise, shown) for name, shown in swapped.items()},
    )


def paint(noise: NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Images (n, 16, 16, 3) of these cells (n, 3), class, stripe and corner, on their noise."""
    images = noise.copy()
    for image, (y, stripe, corner) in zip(images, cells, strict=True):
        image[6:11, 6:11, 0] += 50 * y
        image[:, 2:4, 1] += 90 * stripe
        image[12:, 12:, 2] += 90 * corner
    return np.clip(images, 0, 255).astype(np.uint8)
