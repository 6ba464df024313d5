"""Pictures in files as an image source: decoded with PIL, transformed as torchvision does, by a pool of threads."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import CorruptFile, UserError
from .home import data_home, write_bytes
from .machine import cores
from .spec import Card, Transform, digest

Draw = Callable[..., Image.Image]
"""A pure function of opened pictures (one, or one and its masks) to one RGB picture.

With `details`, the i-th of them is its last argument. Its name is part of the pixels' identity: a function that draws
something else gets another name.
"""


def plain(picture: Image.Image) -> Image.Image:
    """The picture in RGB, whatever its mode."""
    return picture.convert("RGB")


class Pictures:
    """Decoded pictures of files, each a uint8 (h, w, 3) after the transform.

    `files` (n) are paths (as text they cost less: half a second for 200,000), or tuples of a path and those of its
    masks for `draw`; `details` (n) are plain values for it, such as an outline. `where(i)` says how the i-th is named
    in messages, e.g. by its row in a table.
    """

    def __init__(
        self,
        files: Sequence[str | Path | tuple[str | Path, ...]],
        transform: Transform,
        *,
        draw: Draw = plain,
        details: Sequence[Any] | None = None,
        where: Callable[[int], str] = lambda i: "",
    ) -> None:
        self.files = [item if isinstance(item, tuple) else (item,) for item in files]
        parse(transform.steps)  # a mistyped step is no fault of the files
        self.transform, self.draw, self.details, self.where = transform, draw, details, where

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: slice) -> NDArray[np.uint8]:
        rows = range(len(self))[index]
        pixels = np.empty((len(rows), *self.transform.image, 3), np.uint8)

        def read(at: int) -> None:
            pixels[at] = self._read(rows[at])

        with ThreadPoolExecutor(cores()) as threads:  # PIL decodes and resizes without the interpreter's lock
            for _ in threads.map(read, range(len(rows))):
                pass
        return pixels

    @cached_property
    def key(self) -> str:
        """Identity of the pixels: content of the files, transform and way of drawing.

        Hashing all files is remembered by their paths, sizes and times of change; raises `CorruptFile` for a missing
        one.
        """
        stats = map(self._stat, range(len(self)))  # threads would take longer to hand over than to ask
        seen = data_home() / "hashes" / digest([str(Path.cwd()), *stats])[:24]
        try:
            content = seen.read_text()
        except OSError:
            with ThreadPoolExecutor(cores()) as threads:
                content = digest(list(threads.map(self._hash, range(len(self)))))
            write_bytes(seen, content.encode())
        drawn = f"{self.draw.__module__.rpartition('.')[2]}.{self.draw.__name__}"
        details = None if self.details is None else list(self.details)
        return digest(["pictures", self.transform.steps, self.transform.image, drawn, details, content])

    def _name(self, i: int, path: Path | str) -> str:
        where = self.where(i)
        return f"{path}{f' ({where})' if where else ''}"

    def _stat(self, i: int) -> str:
        try:
            return "\0".join([f"{path} {(s := os.stat(path)).st_size} {s.st_mtime_ns}" for path in self.files[i]])
        except OSError as error:
            raise self._unreadable(i, error) from error

    def _hash(self, i: int) -> list[str]:
        try:
            return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.files[i]]
        except OSError as error:
            raise self._unreadable(i, error) from error

    def _unreadable(self, i: int, error: OSError) -> CorruptFile:
        return CorruptFile(f"{self._name(i, error.filename)}: cannot be read: {error.strerror or error}")

    def _read(self, i: int) -> NDArray[np.uint8]:
        try:
            opened: list[Any] = [_open(path) for path in self.files[i]]
            detail = [] if self.details is None else [self.details[i]]
            picture = apply(self.transform, self.draw(*opened, *detail))
        except OSError as error:
            if error.filename:
                raise self._unreadable(i, error) from error
            raise CorruptFile(f"{self._name(i, self.files[i][0])}: cannot be decoded: {error}") from error
        except Exception as error:  # on damaged files decoders raise a dozen types
            message = f"{type(error).__name__}: {error}"
            raise CorruptFile(f"{self._name(i, self.files[i][0])}: cannot be decoded: {message}") from error
        if picture.size != self.transform.image[::-1]:
            height, width = self.transform.image
            found = f"{picture.size[1]}x{picture.size[0]} px, expected {height}x{width}"
            raise CorruptFile(
                f"{self._name(i, self.files[i][0])}: is {found} after '{self.transform.steps or 'no step'}'"
            )
        return np.asarray(picture)


def _open(path: str | Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        if picture.mode == "P":  # as RGB it is the same without, and PIL says nothing about it
            picture.info.pop("transparency", None)
        return picture


# -------------------------------------------------------------------------------------------------------- transforms


def apply(transform: Transform, picture: Image.Image) -> Image.Image:
    """Run the steps; bit-equal to torchvision's `Resize` and `CenterCrop` on PIL pictures, which do the work."""
    from torchvision.transforms import functional as F

    steps = {"resize": F.resize, "crop": F.center_crop}
    for name, size in parse(transform.steps):
        picture = steps[name](picture, size)
    return picture


_STEP = re.compile(r"(resize|crop) +([1-9][0-9]*(?:x[1-9][0-9]*)?)")


def parse(steps: str) -> list[tuple[str, list[int]]]:
    """`resize 256x256, crop 224x224` as `[("resize", [256, 256]), ("crop", [224, 224])]`; raises `UserError`."""
    parts = []
    for step in filter(None, map(str.strip, steps.split(","))):
        found = _STEP.fullmatch(step)
        if found is None:
            raise UserError(f"transform step {step!r}: write `resize HxW`, `resize SIDE` or `crop HxW`")
        parts.append((found[1], [int(side) for side in found[2].split("x")]))
    return parts


def scaled(transform: Transform, side: int) -> Transform:
    """The transform with its sizes scaled, so that the shorter side of what comes out is `side` pixels.

    What is cropped before any resize shows the same part of the picture at every size.
    """
    factor = side / min(transform.image)
    steps = parse(transform.steps)
    first = next((i for i, (name, _) in enumerate(steps) if name == "resize"), len(steps))

    def scale(numbers: Iterable[int]) -> list[int]:
        return [max(1, round(n * factor)) for n in numbers]

    height, width = scale(transform.image)
    later = [(name, scale(size)) for name, size in steps[first:]]
    if not later or (later[-1][0] == "resize" and len(later[-1][1]) == 1):  # whose long side would be off by a pixel
        later[-1:] = [("resize", [height, width])]
    text = ", ".join(f"{name} {'x'.join(map(str, size))}" for name, size in [*steps[:first], *later])
    return Transform(text, (height, width))


def with_pixels(card: Card, transform: str = "", size: int = 0) -> Card:
    """The card with another of its transforms or another image size (of the shorter side, in pixels).

    The card's name says so: `celeba[wilds,64px]`. Raises `UserError` where it has no such transform.
    """
    if not (transform or size):
        return card
    if not card.transforms:
        raise UserError(f"{card.name} has no data.transform and no data.size: its pixels are not read from pictures")
    usual = card.transform or next(iter(card.transforms))
    name = transform or usual
    if name not in card.transforms:
        offer = ", ".join(card.transforms)
        raise UserError(f"{card.name} has no transform {name!r}: give data.transform one of {offer}")
    if size and not 8 <= size <= 1024:
        raise UserError(f"data.size must be from 8 to 1024 pixels, got {size}")
    chosen = card.transforms[name]
    if name != usual:
        card = replace(card, name=card.called(name))
    if size and size != min(chosen.image):
        chosen = scaled(chosen, size)
        card = replace(card, name=card.called(f"{size}px"))
    image = (*chosen.image, card.image[2])
    return replace(card, transforms={**card.transforms, name: chosen}, transform=name, image=image)
