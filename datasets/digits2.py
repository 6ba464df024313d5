"""digits2: real handwritten digits with two planted shortcuts, embedded, deterministic, no download.

Scikit-learn's 1,797 digits (8 x 8) are drawn at 32 x 32 on one of two backgrounds with one of two objects beside them.
The class is whether the digit is at least 5; in train each shortcut agrees with the class on a share `align` of the
images, independently. Every test digit is drawn on both backgrounds with both objects: gaps compare the same digits.
Train images are also rendered with the background or the object of an image of the other class.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark.registry import dataset
from ..benchmark.spec import SPLITS, Attribute, Card, Recipe, digest
from ..benchmark.store import Split, Splits
from .interventions import donors

SIZE = 32
PARAMS: dict[str, Any] = {
    "version": 1,
    "seed": 2,
    "digits": {"train": 900, "val": 450, "test": 447},
    "align": {"train": 0.83, "val": 0.83, "test": None},
    "copies": 2,
    "stroke": 0.55,
    "noise": 0.06,
    "shift": 3,
}
"""Parameters of the generator. `digits` are disjoint; a split with `align` draws every digit `copies` times, each time
with fresh shortcuts, one without draws it once in every cell. Chosen once, so that plain training is neither perfect
nor at zero in its worst group."""

Image = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Layers:
    """What pictures are the sum of, each (n, 32, 32, 3) or (n, 32, 32, 1); shortcuts are called as in the card."""

    background: Image
    digit: Image
    object: Image
    noise: Image

    def pictures(self) -> NDArray[np.uint8]:
        """The sum, in 0 to 255."""
        picture = self.background + self.digit + self.object + self.noise
        return np.clip(np.rint(255 * picture), 0, 255).astype(np.uint8)

    def silhouettes(self) -> NDArray[np.uint8]:
        """White where the digit is drawn, black elsewhere."""
        return np.repeat(np.where(self.digit > 0, 255, 0).astype(np.uint8)[..., :1], 3, axis=3)

    def intervened(self, name: str, donor: NDArray[np.int64]) -> "Layers":
        """The same pictures, each with this layer of its donor (n,)."""
        return replace(self, **{name: getattr(self, name)[donor]})


def _card(name: str, title: str, params: dict[str, Any], val: tuple[int, ...]) -> Card:
    ratio = params["align"]["train"]
    return Card(
        name=name,
        title=title,
        classes=("digit<5", "digit>=5"),
        attributes=(
            Attribute("background", ("rows", "columns"), aligned=(0, 1), train_ratio=ratio),
            Attribute("object", ("cross", "ring"), aligned=(0, 1), train_ratio=ratio),
        ),
        image=(SIZE, SIZE, 3),
        counts={
            "train": (616, 130, 132, 26, 28, 109, 123, 636),
            "val": val,
            "test": (221, 221, 221, 221, 226, 226, 226, 226),
        },
        licence="BSD-3-Clause (scikit-learn's copy of the UCI Optical Recognition of Handwritten Digits, CC BY 4.0)",
        citation="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
        recipe=Recipe(optimizer="adam", lr=2e-3, weight_decay=1e-4, batch_size=64, epochs=15),
        backbone="tiny_cnn",
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        interventions=("background", "object"),
        notes=(
            "Test digits appear four times each, once per background and object; intervals resample digits.",
            "Made for development: effects are planted, absolute numbers mean nothing outside it.",
        ),
        params=params,
    )


CARD = _card(
    "digits2",
    "Digits with two shortcuts, validation biased like train",
    PARAMS,
    val=(313, 58, 72, 13, 13, 60, 56, 315),
)
BALVAL = _card(
    "digits2:balval",
    "Digits with two shortcuts, balanced validation",
    {**PARAMS, "align": {**PARAMS["align"], "val": None}},
    val=(228, 228, 228, 228, 222, 222, 222, 222),
)


MASK = _card(
    "digits2:mask",
    "Where the digits are: test pictures are white on the digit's strokes; no test set",
    {**PARAMS, "silhouette": True},
    val=CARD.counts["val"],
)


@dataset("digits2", {"": CARD, "balval": BALVAL, "mask": MASK})
class Digits2:
    """The generator behind the card's parameters."""

    def __init__(self, card: Card) -> None:
        self.card, self.params = card, card.params

    def source_key(self, root: Path | None) -> str:
        """The parameters are the source; `root` is not used."""
        return digest(self.params)

    def load(self, root: Path | None) -> Splits:
        """Draw all splits. Legacy NumPy streams, which are frozen, make the same pixels everywhere."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        params = self.params
        order = np.random.RandomState(params["seed"]).permutation(len(bunch.target))
        splits: Splits = {}
        start = 0
        for number, name in enumerate(SPLITS):
            chosen = order[start : start + params["digits"][name]]
            start += len(chosen)
            random = np.random.RandomState([params["seed"], number])  # a stream each: variants share their test split
            if params["align"][name] is None:
                cells = np.array(list(product((0, 1), repeat=2)))
                unit, a = np.repeat(chosen, len(cells)), np.tile(cells, (len(chosen), 1))
            else:
                unit = np.tile(chosen, params["copies"])
                y = bunch.target[unit] >= 5
                aligned = random.rand(len(unit), 2) < params["align"][name]
                a = np.where(aligned, y[:, None], ~y[:, None]).astype(np.int64)
            y = (bunch.target[unit] >= 5).astype(np.int64)
            layers = draw(bunch.images[unit] / 16, a, random, params)
            views = {
                attribute: layers.intervened(attribute, donors(y, random)).pictures()
                for attribute in (self.card.interventions if name == "train" else ())
            }
            pictures = layers.silhouettes() if name == "test" and "silhouette" in params else layers.pictures()
            splits[name] = Split(pictures, y, a, unit, views=views)
        return splits


def draw(digits: Image, a: NDArray[np.int64], random: np.random.RandomState, params: dict[str, Any]) -> Layers:
    """Draw digits (n, 8, 8) in [0, 1] with attributes (n, 2)."""
    n = len(digits)
    background, (digit, thing, noise) = np.empty((n, SIZE, SIZE, 3)), np.zeros((3, n, SIZE, SIZE, 1))
    for i, (strokes, values) in enumerate(zip(digits, a, strict=True)):
        tone = 0.35 + 0.1 * random.rand(3)
        background[i] = tone + 0.10 * _stripes(int(values[0]), random.randint(4))[:, :, None]
        top, left = 4 + random.randint(-params["shift"], params["shift"] + 1, size=2)
        digit[i, top : top + 24, left : left + 24] = params["stroke"] * np.kron(strokes, np.ones((3, 3)))[:, :, None]
        row, column = (0, SIZE - 7)[random.randint(2)], (0, SIZE - 7)[random.randint(2)]
        thing[i, row : row + 7, column : column + 7] = 0.35 * _OBJECTS[int(values[1])][:, :, None]
        noise[i] = params["noise"] * random.randn(SIZE, SIZE, 1)
    return Layers(background, digit, thing, noise)


def _stripes(direction: int, phase: int) -> Image:
    """Stripes of period 4 along rows (0) or columns (1), values -1 and 1."""
    line = np.where((np.arange(SIZE) + phase) % 4 < 2, 1.0, -1.0)
    field = np.broadcast_to(line[:, None], (SIZE, SIZE))
    return field if direction == 0 else field.T


def _cross() -> Image:
    shape = np.zeros((7, 7))
    shape[3, :] = shape[:, 3] = 1
    return shape


def _ring() -> Image:
    shape = np.ones((7, 7))
    shape[2:5, 2:5] = 0
    shape[[0, 0, -1, -1], [0, -1, 0, -1]] = 0
    return shape


_OBJECTS = (_cross(), _ring())
