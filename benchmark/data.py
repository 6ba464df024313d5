"""From the uint8 store to normalised batches on the device: gathering, augmentation, samplers.

Evaluation input is bit-equal to torchvision's `ToTensor` + `Normalize` on the stored pixels. Every random draw of an
epoch comes from the generator handed in, so that an epoch can be replayed alone.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .device import all_to_device, one_ahead, to_device
from .pools import ImageSource
from .spec import Recipe
from .store import Split, Splits

__all__ = [
    "Batch",
    "Joined",
    "Pixels",
    "Room",
    "Sampler",
    "Split",
    "Splits",
    "augment",
    "cycled",
    "random_order",
    "stratified",
    "weighted",
]

Labels = np.ndarray[Any, np.dtype[np.int64]]
PixelTransform = Callable[[Tensor], Tensor] | None
DEVICE_SHARE = 0.6
"""Share of a run's part of the device memory that its images may take, those of all splits together."""
LARGE = 2**16
"""Values of an image from which a processor makes evaluation input image by image."""
PIECE = 1024
"""Images that are moved to the device at a time."""
CROP_AREA = (0.7, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10


@dataclass(frozen=True, eq=False)
class Batch:
    """Images `x` (B, C, H, W), labels `y` (B,) and dataset indices `index` (B,), all on the device.

    It carries no attribute: an objective that uses groups asks `task.groups` once and looks them up by `index`.
    """

    x: Tensor
    y: Tensor
    index: Tensor


@dataclass
class Room:
    """Device memory for the images of one run, of which `taken` bytes are in use.

    The device is shared with so many runs, this one among them; what other programs have of it is not to be had.
    """

    sharers: int = 1
    taken: int = 0

    def take(self, size: int, device: torch.device) -> bool:
        """Take so many bytes if there is room for them."""
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, of earlier runs
        part = min(total / self.sharers, free + kept + self.taken)
        fits = self.taken + size <= DEVICE_SHARE * part
        self.taken += size * fits
        return fits


class Pixels:
    """A split's pixels and labels, kept where batches are made: in device memory if it has `room`, else memory-mapped.

    Example i is `images[rows[i]]`, or `images[i]` without `rows`. Images are uint8, or float32 features, which are not
    scaled.
    """

    def __init__(
        self,
        images: ImageSource,
        y: Labels,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        channels_last: bool = False,
        rows: Labels | None = None,
        room: Room | None = None,
    ) -> None:
        with warnings.catch_warnings():  # of what happens on a write to a read-only map; nothing here writes to it
            warnings.simplefilter("ignore", UserWarning)
            self.images = torch.from_numpy(images[:])
        self.rows = None if rows is None else torch.from_numpy(rows)
        if device.type == "cuda" and (room or Room()).take(len(y) * self.images[0].nbytes, device):
            self.images = _moved(self.images, self.rows, device)
            self.rows = None
        self.y = torch.from_numpy(y).to(device)
        self._scale = 255 if self.images.dtype == torch.uint8 else 1
        self.device = device
        self._mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, -1, 1, 1)
        self._plain = not self._mean.any() and bool((self._std == 1).all())
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._large = device.type == "cpu" and math.prod(self.images.shape[1:]) >= LARGE

    def __len__(self) -> int:
        return len(self.y)

    @property
    def resident(self) -> bool:
        """Whether the images lie where batches are made."""
        return self.images.device.type == self.device.type

    def batch(self, index: Tensor, transform: PixelTransform = None) -> Batch:
        """Gather, scale to [0, 1], transform, normalise. `index` is a LongTensor on any device."""
        if self._large:
            steps = (self._scaled, *([] if transform else [self._normalised]))
            x = self._one_by_one(index, steps)
            return Batch(self._normalised(transform(x)) if transform else x, self.y[index], index)
        return self._made(self.gather(index), to_device(index, self.device), transform)

    def _made(self, images: Tensor, index: Tensor, transform: PixelTransform) -> Batch:
        """A batch of stored images (B, h, w, c) that are on the device, and so is their index."""
        x = self._scaled(images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._format))
        return Batch(self._normalised(transform(x) if transform else x), self.y[index], index)

    def epoch(self, batches: Sequence[Tensor], transform: PixelTransform = None) -> Iterator[Batch]:
        """Batches for index batches (B,), in order, each made when it is asked for.

        On a GPU all indices are moved at once. Images that are not there come from pinned memory, on a stream of their
        own, a batch ahead of the one that is worked on.
        """
        if self.device.type == "cpu" or self.resident:
            yield from (self.batch(index, transform) for index in all_to_device(batches, self.device))
            return
        moved = list(zip(batches, all_to_device(batches, self.device), strict=True))
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

        def load(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, torch.cuda.Event]:
            with torch.cuda.stream(stream):
                return self.gather(pair[0]), pair[1], stream.record_event()

        for images, index, copied in one_ahead(moved, load):
            now = torch.cuda.current_stream(self.device)
            now.wait_event(copied)
            images.record_stream(now)  # its memory is not another batch's before this one is done with
            yield self._made(images, index, transform)

    def _one_by_one(self, index: Tensor, steps: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """The same bits, each image finished while the cache holds it: at 224 px 1.2 to 1.7 times as fast."""
        height, width, channels = self.stored(0).shape
        x = torch.empty((len(index), channels, height, width), memory_format=self._format)
        for one, i in zip(x.split(1), index.tolist(), strict=True):  # type: ignore[no-untyped-call]
            one.copy_(self.stored(i).permute(2, 0, 1))
            for step in steps:
                step(one)
        return x

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self._scale == 1 else x.div_(self._scale)

    def _normalised(self, x: Tensor) -> Tensor:
        return x if self._plain else x.sub_(self._mean).div_(self._std)

    def stored(self, i: int) -> Tensor:
        """Stored image (h, w, c) of an example, not copied."""
        return self.images[i if self.rows is None else int(self.rows[i])]

    def gather(self, index: Tensor) -> Tensor:
        """Stored images (B, h, w, c) on the device."""
        index = to_device(index, self.images.device)
        return to_device(self.images[index if self.rows is None else self.rows[index]], self.device)

    def batches(self, size: int) -> Iterator[Batch]:
        """All examples in order, without augmentation."""
        return self.epoch(torch.arange(len(self)).split(size))  # type: ignore[no-untyped-call]


def _moved(images: Tensor, rows: Tensor | None, device: torch.device) -> Tensor:
    """Images, or those in `rows`, on the device; piece by piece, as the host may have no room for all of them."""
    if rows is None:
        return images.to(device)
    moved = torch.empty((len(rows), *images.shape[1:]), dtype=images.dtype, device=device)
    for part, chosen in zip(moved.split(PIECE), rows.split(PIECE), strict=True):  # type: ignore[no-untyped-call]
        part.copy_(images[chosen])
    return moved


class Joined(Pixels):
    """Chosen examples of several splits, one after the other; no pixel is copied.

    `labels` says of each part whether its labels are shown; otherwise they are -1.
    """

    def __init__(
        self, parts: Sequence[tuple[Pixels, np.ndarray[Any, np.dtype[np.int64]]]], labels: Sequence[bool] = ()
    ) -> None:
        first = parts[0][0]
        self._parts = [pixels for pixels, _ in parts]
        self.device, self._mean, self._std = first.device, first._mean, first._std
        self._plain, self._format, self._scale = first._plain, first._format, first._scale
        self._large = first._large
        home = self.device if self.resident else torch.device("cpu")  # where it is decided what is gathered from where
        rows = [torch.from_numpy(rows).to(home) for _, rows in parts]
        self._row = torch.cat(rows)
        self._part = torch.cat([torch.full_like(row, k) for k, row in enumerate(rows)])
        self.y = torch.cat([pixels.y[row.to(self.device)] for (pixels, _), row in zip(parts, rows, strict=True)])
        for k, shown in enumerate(labels):
            self.y[((self._part == k) & (not shown)).to(self.device)] = -1

    @property
    def resident(self) -> bool:
        """Whether the images of all parts lie where batches are made."""
        return all(pixels.resident for pixels in self._parts)

    def stored(self, i: int) -> Tensor:
        """Stored image (h, w, c) of an example, not copied."""
        return self._parts[int(self._part[i])].stored(int(self._row[i]))

    def gather(self, index: Tensor) -> Tensor:
        """Stored images (B, h, w, c) on the device."""
        index = to_device(index, self._row.device)
        row, part = self._row[index], self._part[index]
        if row.device.type == "cuda":
            return self._gather_from_all(row, part)
        found = [pixels.gather(row[part == k]) for k, pixels in enumerate(self._parts)]
        out = torch.empty((len(index), *found[0].shape[1:]), dtype=found[0].dtype, device=self.device)
        for k, images in enumerate(found):
            out[to_device((part == k).nonzero()[:, 0], self.device)] = images
        return out

    def _gather_from_all(self, row: Tensor, part: Tensor) -> Tensor:
        """As many images (B, h, w, c) from every part, of which the right ones stay: to count them would be to wait."""
        images = None
        for k, pixels in enumerate(self._parts):
            if len(pixels):
                own = part == k
                found = pixels.gather(row.where(own, 0))
                images = found if images is None else found.where(own.view(-1, 1, 1, 1), images)
        return torch.empty(0) if images is None else images


def augment(kind: str, generator: torch.Generator) -> Callable[[Tensor], Tensor] | None:
    """The train transform of a recipe on a float batch in [0, 1], drawn from `generator` (a CPU generator)."""
    if kind == "none":
        return None

    def coins(n: int) -> Tensor:
        return torch.rand(n, generator=generator) < 0.5

    def flip(x: Tensor) -> Tensor:
        heads = coins(len(x))
        if x.device.type != "cpu":
            return torch.where(to_device(heads, x.device).view(-1, 1, 1, 1), x.flip(3), x)
        flipped = x.clone()  # a processor mirrors what is to be mirrored; on a GPU the choice would cost a wait
        flipped[heads] = x[heads].flip(3)
        return flipped

    def crop_and_flip(x: Tensor) -> Tensor:
        boxes = crop_boxes(len(x), x.shape[2], x.shape[3], generator)
        return resized_crop(x, *boxes, mirrored=coins(len(x)))

    return flip if kind == "flip" else crop_and_flip


def crop_boxes(
    n: int, height: int, width: int, generator: torch.Generator, share: tuple[float, float] = CROP_AREA
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height, width (n,) of random crops of this `share` of the area, distributed as RandomResizedCrop's.

    Like torchvision's it takes the first of ten candidates that fits; where none does, the last is cut to the image.
    """
    u = torch.rand((2, CROP_TRIES, n), generator=generator)
    area = height * width * (share[0] + u[0] * (share[1] - share[0]))
    low, high = torch.log(torch.tensor(CROP_RATIO))
    ratio = torch.exp(low + u[1] * (high - low))
    w, h = (area * ratio).sqrt().round().clamp(min=1), (area / ratio).sqrt().round().clamp(min=1)
    fits = (w <= width) & (h <= height)
    fits[-1] = True
    first = fits.int().argmax(0, keepdim=True)
    w, h = w.gather(0, first)[0].clamp(max=width), h.gather(0, first)[0].clamp(max=height)
    v = torch.rand((2, n), generator=generator)
    return (v[0] * (height - h + 1)).floor(), (v[1] * (width - w + 1)).floor(), h, w


def resized_crop(
    x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, mirrored: Tensor | None = None
) -> Tensor:
    """Crop each image to its box and resize it back, bilinear; equals PIL's result up to its 8-bit rounding.

    Those that are `mirrored` (n,) are flipped horizontally, at no further cost. Boxes are drawn on the host: they alone
    are moved, and the places that are sampled are worked out where the images are.
    """
    rows, columns = x.shape[2], x.shape[3]
    if x.device.type != "cpu":
        flips = torch.zeros_like(top) if mirrored is None else mirrored.to(top)
        top, left, height, width, flips = to_device(torch.stack([top, left, height, width, flips]), x.device)
        mirrored = None if mirrored is None else flips > 0

    def axis(start: Tensor, length: Tensor, size: int) -> Tensor:
        at = (torch.arange(size, device=x.device) + 0.5) / size
        pixel = (at[None] * length[:, None] - 0.5).clamp(min=0).minimum(length[:, None] - 1) + start[:, None]
        return (2 * pixel + 1) / size - 1

    gx, gy = axis(left, width, columns), axis(top, height, rows)
    if mirrored is not None:
        gx = torch.where(mirrored[:, None], gx.flip(1), gx)
    grid = torch.stack([gx[:, None, :].expand(-1, rows, -1), gy[:, :, None].expand(-1, -1, columns)], dim=-1)
    out, last = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False), torch.channels_last
    return out.contiguous(memory_format=last) if x.is_contiguous(memory_format=last) else out  # sampled, it is NCHW


# ------------------------------------------------------------------------------------------------------- samplers

Sampler = Callable[[torch.Generator], Sequence[Tensor]]
"""Index batches of one epoch, drawn from a generator."""


def random_order(n: int, recipe: Recipe, draws: int | None = None) -> Sampler:
    """Every example once, shuffled (ERM's sampler); with `draws` the first so many of them."""
    return lambda generator: _cut(torch.randperm(n, generator=generator)[:draws], recipe.batch_size)


def cycled(rows: Tensor, n: int, recipe: Recipe) -> Sampler:
    """n draws an epoch from some examples: all `rows` (m,) shuffled, again and again, so that none falls behind."""

    def draw(generator: torch.Generator) -> Sequence[Tensor]:
        rounds = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(-(-n // len(rows)))]
        return _cut(torch.cat(rounds)[:n], recipe.batch_size)

    return draw


def weighted(weights: Tensor, recipe: Recipe, draws: int = 0) -> Sampler:
    """Draws with replacement (by default n), P(i) proportional to `weights` (n,).

    n draws with equal weights fall back to `random_order`.
    """
    n = len(weights)
    if draws in (0, n) and bool((weights == weights[0]).all()):
        return random_order(n, recipe)
    p, draws = weights.double().cpu(), draws or n
    return lambda generator: _cut(torch.multinomial(p, draws, replacement=True, generator=generator), recipe.batch_size)


def stratified(stratum: Tensor, recipe: Recipe) -> Sampler:
    """Batches that hold equally many examples of every stratum (n,), drawn with replacement; n draws an epoch.

    Where the batch size is no multiple of their number, the strata take turns in having one example more.
    """
    members = [(stratum == s).nonzero()[:, 0].cpu() for s in torch.unique(stratum)]

    def draw(generator: torch.Generator) -> Sequence[Tensor]:
        turn = torch.arange(len(stratum)) % len(members)
        order = torch.empty(len(stratum), dtype=torch.long)
        for k, rows in enumerate(members):
            mine = turn == k
            order[mine] = rows[torch.randint(len(rows), (int(mine.sum()),), generator=generator)]
        return _cut(order, recipe.batch_size)

    return draw


def _cut(order: Tensor, size: int) -> Sequence[Tensor]:
    """Batches of `size`; a last batch of one example joins its neighbour, since BatchNorm cannot take it."""
    batches: list[Tensor] = list(order.split(size))  # type: ignore[no-untyped-call]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches
