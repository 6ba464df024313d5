"""Label smoothing, from a package of its own, with a dataset and a backbone to go with it."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F
from worstgroup import (
    Attribute,
    Batch,
    Card,
    Objective,
    Recipe,
    Requires,
    Split,
    Splits,
    UserError,
    backbone,
    dataset,
    method,
)
from worstgroup.benchmark.backbones import Backbone, Request

COUNTS = {"train": (12, 4, 4, 12), "val": (6, 2, 2, 6), "test": (5, 5, 5, 5)}


@dataclass(frozen=True)
class Config:
    """`smoothing` is the share of every target that is spread over all classes."""

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise UserError(f"example-smooth.smoothing must be in [0, 1), got {self.smoothing}")


@method("example-smooth", paper="Szegedy et al., CVPR 2016", requires=Requires(), config=Config)
class Smooth(Objective[Config]):
    """Cross-entropy with smoothed targets."""

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.model(batch.x), batch.y, label_smoothing=self.config.smoothing)


@backbone("example_conv")
def conv(request: Request) -> Backbone:
    """One convolution, pooled."""
    request.check()
    trunk = nn.Sequential(nn.Conv2d(request.in_channels, 8, 3, 2, 1), nn.ReLU())
    neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    return Backbone(request.name, trunk, neck, nn.Linear(8, request.num_classes), grad_cam="closed")


CARD = Card(
    name="example-noise",
    title="Noise with a bright row for the class and a bright column for the shortcut",
    classes=("left", "right"),
    attributes=(Attribute("column", ("off", "on"), aligned=(0, 1)),),
    image=(8, 8, 1),
    counts=COUNTS,  # type: ignore[arg-type]
    licence="Apache-2.0",
    citation="none",
    recipe=Recipe(optimizer="adam", lr=1e-2, batch_size=16, epochs=2),
    backbone="example_conv",
    mean=(0.5,),
    std=(0.25,),
)


@dataset("example-noise", {"": CARD})
class Noise:
    """The generator."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def source_key(self, root: Path | None) -> str:
        return "example-noise, version 1"

    def load(self, root: Path | None) -> Splits:
        random = np.random.RandomState(0)
        splits = {}
        for name, counts in COUNTS.items():
            cells = np.repeat(list(product((0, 1), repeat=2)), counts, axis=0).astype(np.int64)
            images = random.randint(0, 100, (len(cells), 8, 8, 1)).astype(np.uint8)
            images[:, 2] += (60 * cells[:, 0, None, None]).astype(np.uint8)
            images[:, :, 5] += (90 * cells[:, 1, None, None]).astype(np.uint8)
            splits[name] = Split(images, cells[:, 0], cells[:, 1:])
        return splits  # type: ignore[return-value]
