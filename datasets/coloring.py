"""What the coloured variants of MNIST and Fashion-MNIST share: painting, holding out validation, cards."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark.spec import Card, digest
from .idx import MNIST, Family


def family_card(name: str, family: Family, paper: str, **facts: Any) -> Card:
    """A card of this family's pictures with pixels in [0, 1] as they are; `facts` are its other fields."""
    channels = facts["image"][2]
    notes = facts.pop("notes")
    if family is not MNIST:
        notes = (f"No paper has it: MNIST's recipe and seeds on the pictures of {family.title}.", *notes)
    return Card(
        name=name,
        licence=f"{family.licence}; the colours are drawn here",
        citation=f"{paper}. {family.citation}",
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        sources=family.sources,
        fetch_unasked=True,
        share_labels=True,
        notes=notes,
        **facts,
    )


def paint(digits: NDArray[np.uint8], channel: NDArray[np.int64], channels: int = 3) -> NDArray[np.uint8]:
    """Put each grey picture (n, h, w) into one channel of a picture (n, h, w, channels) whose other ones are zero."""
    images = np.zeros((*digits.shape, channels), np.uint8)
    images[np.arange(len(digits)), :, :, channel] = digits
    return images


class Tinted:
    """Grey pictures (n, h, w), each times a colour (3) in [0, 1]; painted when a slice of them is asked for."""

    def __init__(self, grey: NDArray[np.uint8], tints: NDArray[np.float64]) -> None:
        self.grey, self.tints = grey, tints

    def __len__(self) -> int:
        return len(self.grey)

    def __getitem__(self, index: slice) -> NDArray[np.uint8]:
        """Pictures (m, h, w, 3), rounded down as a cast to uint8 does."""
        grey, tints = self.grey[index], self.tints[index]
        images = np.empty((*grey.shape, 3), np.uint8)
        np.multiply(grey[..., None], tints[:, None, None], out=images, dtype=np.float32, casting="unsafe")
        return images


class Enlarged:
    """Pictures (n, h, w, c) with every pixel repeated `factor` times along both sides when a slice is asked for."""

    def __init__(self, images: NDArray[np.uint8], factor: int) -> None:
        self.images, self.factor = images, factor
        self.key = digest([hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(), images.shape, factor])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice) -> NDArray[np.uint8]:
        """Pictures (m, factor h, factor w, c)."""
        return self.images[index].repeat(self.factor, axis=1).repeat(self.factor, axis=2)


def hold_out(strata: NDArray[np.int64], share: float, random: np.random.RandomState) -> NDArray[np.bool_]:
    """Mask (n,) of the examples drawn for validation: this share of each stratum, none of the negative ones.

    Which are drawn depends only on how many examples a stratum has, so that counts can be known without the files.
    """
    held = np.zeros(len(strata), np.bool_)
    for stratum in np.unique(strata[strata >= 0]):
        rows = random.permutation(np.flatnonzero(strata == stratum))
        held[rows[: round(share * len(rows))]] = True
    return held
