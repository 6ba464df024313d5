"""What steps are held against: what the device can do, a bare PyTorch loop, and the loop that papers' code has.

All of it is measured on the spot, with the run's precision, layout and batch.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from . import engine
from .backbones import build_backbone
from .data import CROP_AREA, CROP_RATIO, augment
from .device import compile_trunk, kernels
from .errors import UserError
from .machine import cores
from .spec import Recipe
from .steps import Stopwatch

MATMUL = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices that are multiplied."""
COPIED = {"cuda": 2**30, "cpu": 2**27}
"""Bytes that are copied: far more than a cache holds."""
REPEATS = 7
PICTURE = (500, 375)
"""Width and height of the pictures that the reference loop decodes: about those of Waterbirds."""
QUALITY = 90
DISTINCT = 16
PREFETCHED = 2
"""Batches that each loader worker makes in advance: PyTorch's default."""


# -------------------------------------------------------------------------------------------------------- roofline


@dataclass(frozen=True)
class Roofline:
    """The most that the device was seen to do: FLOP/s of a matrix product, bytes/s of a copy (read and written).

    On a CPU per second of process CPU time, as steps are timed: it is what one core does.
    """

    flops_per_s: float
    bytes_per_s: float

    @property
    def balance(self) -> float:
        """FLOPs per byte below which the memory is the limit."""
        return self.flops_per_s / self.bytes_per_s


def measure_roofline(device: torch.device, precision: str, *, matmul: int = 0, copied: int = 0) -> Roofline:
    """The best of some repeats in the precision of a recipe."""
    side = matmul or MATMUL[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(copied or COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with kernels(precision, device):
        multiply = _fastest(lambda: torch.mm(a, b, out=product), device)
        copy = _fastest(lambda: target.copy_(source), device)
    return Roofline(2 * side**3 / multiply, 2 * source.nbytes / copy)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    work()
    watch = Stopwatch(device)
    for _ in range(REPEATS):
        with watch.lap():
            work()
    return float(watch.seconds().min())


# ----------------------------------------------------------------------------------------------------------- loops


@dataclass(frozen=True)
class Throughput:
    """Train images per second of wall time: of the engine's loop, of a bare one, and of the reference pattern."""

    engine: float
    bare: float
    reference: float
    workers: int


def bare_loop(images: Tensor, backbone: str, recipe: Recipe, device: torch.device, *, steps: int, warmup: int) -> float:
    """Images per second of the shortest loop that does ERM's arithmetic on images (n, h, w, c), uint8, on the device.

    Same network, precision, kernels, layout, augmentation and optimiser as the engine's; nothing is counted or checked.
    """
    images, (height, width) = images.to(device), images.shape[1:3]
    model = build_backbone(backbone, num_classes=2, image=(height, width)).to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.compile:
        compile_trunk(model.trunk)
    optimizer = engine.make_optimizer(model.parameters(), recipe)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    transform = augment(recipe.augment, torch.Generator())
    y = torch.arange(len(images), device=device) % 2

    def step() -> int:
        index = torch.randint(len(images), (recipe.batch_size,), device=device)
        x = images[index].permute(0, 3, 1, 2).to(torch.float32, memory_format=layout).div_(255)
        x = (transform(x) if transform else x).sub_(0.5).div_(0.25)
        optimizer.zero_grad(set_to_none=True)
        with engine.autocast(recipe, device):
            loss = F.cross_entropy(model(x), y[index])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return len(x)

    with kernels(recipe.precision, device):
        return _rate(step, steps, warmup, device)


def reference_loop(
    files: Sequence[Path], size: int, backbone: str, batch: int, workers: int, device: torch.device, steps: int
) -> float:
    """Images per second of the loop that most released code has: a DataLoader whose workers decode pictures with PIL
    at every access, fp32 as PyTorch has it by itself (on a GPU convolutions in TF32), NCHW, no compilation. The
    batches that workers make in advance are not timed: they say nothing of how fast those make more.
    """
    warmup = 2 + PREFETCHED * workers
    steps = max(steps, 2 * PREFETCHED * workers)
    model = build_backbone(backbone, num_classes=2, image=(size, size)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    crop = transforms.RandomResizedCrop(size, CROP_AREA, CROP_RATIO)
    end = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
    pictures = _Files(
        [files[i % len(files)] for i in range((warmup + steps) * batch)],
        transforms.Compose([crop, transforms.RandomHorizontalFlip(), *end]),
    )
    loader = DataLoader(
        pictures,
        batch,
        shuffle=True,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)

    def step() -> int:
        x, y = (part.to(device) for part in next(batches))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return len(x)

    return _rate(step, steps, warmup, device)


def _rate(step: Callable[[], int], steps: int, warmup: int, device: torch.device) -> float:
    """Images per wall second of `steps` calls, each of which says how many images it took, after `warmup` of them."""

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(warmup):
        step()
    start = wait()
    images = sum(step() for _ in range(steps))
    return images / (wait() - start)


class _Files(Dataset[tuple[Tensor, int]]):
    """Pictures in files, decoded when asked for; the label of every second one is 1."""

    def __init__(self, files: Sequence[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with Image.open(self.files[i]) as picture:
            return self.transform(picture.convert("RGB")), i % 2


def write_pictures(folder: Path, count: int, picture: tuple[int, int] = PICTURE) -> list[Path]:
    """JPEG files with the detail of photographs, coarse shapes under fine grain: they take as long to decode."""
    width, height = picture
    random = np.random.RandomState(0)
    files = [folder / f"{i:04d}.jpg" for i in range(count)]
    for file in files:
        coarse = Image.fromarray(random.randint(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            picture, Image.Resampling.BICUBIC
        )
        grain = random.randint(-12, 13, (height, width, 1))
        Image.fromarray(np.clip(np.asarray(coarse, np.int64) + grain, 0, 255).astype(np.uint8)).save(
            file, quality=QUALITY
        )
    return files


def measure_loops(
    ours: float,
    images: Tensor,
    backbone: str,
    recipe: Recipe,
    device: torch.device,
    *,
    steps: int,
    warmup: int,
    picture: tuple[int, int] = PICTURE,
) -> Throughput:
    """The engine's images per second beside those of a bare loop, on the images (n, h, w, c) that it trained on, and of
    the reference pattern at the same size and batch, with a worker per core; raises `UserError` where none may start.
    """
    workers = cores()
    bare = bare_loop(images, backbone, recipe, device, steps=steps, warmup=warmup)
    with TemporaryDirectory(prefix="worstgroup-profile-") as folder:
        files = write_pictures(Path(folder), DISTINCT, picture)
        size, batch = images.shape[1], recipe.batch_size
        try:
            reference = reference_loop(files, size, backbone, batch, workers, device, max(2, steps // 5))
        except (RuntimeError, OSError) as error:
            raise UserError(f"the reference loop with {workers} loader workers failed: {error}") from error
    return Throughput(ours, bare, reference, workers)
