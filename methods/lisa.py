"""LISA: mix images of one class and different attributes, or of one attribute and different classes."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.device import to_device
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.task import Task


@dataclass(frozen=True)
class Config:
    """`p_select` is the probability that a batch mixes within classes, else it mixes within attributes; the shares of
    two images are drawn from Beta(`alpha`, `alpha`); `mix` blends them (`mixup`) or pastes a box of one into the other
    (`cutmix`)."""

    p_select: Annotated[float, Search("U(0,1)")] = 0.5
    alpha: Annotated[float, Search("10^U(-1,1)")] = 2.0
    mix: Annotated[Literal["mixup", "cutmix"], Search("{mixup,cutmix}")] = "mixup"

    def __post_init__(self) -> None:
        require(0 <= self.p_select <= 1, f"lisa.p_select must be in [0, 1], got {self.p_select}")
        require(self.alpha > 0, f"lisa.alpha must be positive, got {self.alpha}")
        require(self.mix in ("mixup", "cutmix"), f"lisa.mix must be mixup or cutmix, got {self.mix!r}")


@method(
    "lisa",
    paper="Yao et al., Improving Out-of-Distribution Robustness via Selective Augmentation, ICML 2022",
    requires=Requires(fit="train", native="train+val", masked=True),
    config=Config,
)
class LISA(Objective[Config]):
    """`CE(f(l x_i + (1 - l) x_j), l y_i + (1 - l) y_j)` with y_i = y_j and a_i != a_j, or a_i = a_j and y_i != y_j.

    Any number of classes and of attributes, whose joint value is a. Deviations: partners come from the same batch of
    group-balanced images, as in SubpopBench, so that a step trains on as many images as every other method's (the
    released code draws a batch for each of its four groups, trains on half of the images it drew, and ends an epoch
    with the smallest group); an image without a possible partner gives its place to another pair of the batch, and
    stays as it is where there is none; CutMix too has a box and an alpha of each pair's own (there one box per batch,
    and GroupDRO's alpha); the block's recipe; selection by the rung. Under `@masked` images whose attributes are
    unknown stay unmixed.
    """

    sampler = "uniform_group"

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.a = torch.from_numpy(task.attributes("train").joint().index).to(task.device)

    def loss(self, batch: Batch) -> Tensor:
        within_classes = torch.rand(()).item() < self.config.p_select  # drawn on the processor: nothing waits
        first, second = pairs(batch.y, self.a[batch.index], within_classes)
        share = to_device(Beta(self.config.alpha, self.config.alpha).sample((len(first),)), batch.x.device)
        blend = mixup if self.config.mix == "mixup" else cutmix
        x, share = blend(batch.x[first], batch.x[second], share)
        y = F.one_hot(batch.y, self.model.num_classes).to(x)
        return F.cross_entropy(self.model(x), y[second].lerp(y[first], share[:, None]))


def pairs(y: Tensor, a: Tensor, within_classes: bool) -> tuple[Tensor, Tensor]:
    """Positions (B,), (B,) of the images to be mixed: same y and different a, or same a and different y.

    Each image is the first one of a pair if it has a partner, who is a random one. The place of an image without goes
    to a random other pair; where there is none, and where a is unknown (-1), the image is paired with itself.
    """
    same, other = (y, a) if within_classes else (a, y)
    known = a >= 0
    possible = (same[:, None] == same) & (other[:, None] != other) & known[:, None] & known
    paired = possible.any(1)
    itself = torch.arange(len(y), device=y.device)
    first = torch.where(paired | ~known | ~paired.any(), itself, _random(paired.expand_as(possible)))
    return first, torch.where(paired[first], _random(possible[first]), first)


def _random(possible: Tensor) -> Tensor:
    """Position (B,) of a random True in every row of (B, M); any where there is none."""
    return torch.where(possible, torch.rand(possible.shape, device=possible.device), -1.0).argmax(1)


def mixup(x: Tensor, other: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """`l x + (1 - l) x'` of images (B, C, H, W) and the shares l (B,); exact where both are the same."""
    return other.lerp(x, share[:, None, None, None]), share


def cutmix(x: Tensor, other: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """x with a box of x' whose area is 1 - l, cut off at the borders, and the shares (B,) that are left of x.

    Its centre is anywhere; sides are rounded down to an even number of pixels, as in the released CutMix.
    """
    inside = torch.ones(1, device=x.device, dtype=torch.bool)
    for dim, size in ((2, x.shape[2]), (3, x.shape[3])):
        half = (size * (1 - share).sqrt()).long() // 2
        centre = torch.randint(size, (len(x),), device=x.device)
        at = torch.arange(size, device=x.device)
        within = (at >= (centre - half)[:, None]) & (at < (centre + half)[:, None])
        inside = inside & within.view(len(x), 1, *((size, 1) if dim == 2 else (1, size)))
    return torch.where(inside, other, x), 1 - inside.float().mean((1, 2, 3))
