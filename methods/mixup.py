"""Mixup: train on mixtures of two images, with both of their labels."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search


@dataclass(frozen=True)
class Config:
    """`alpha`: the share of the first image is drawn from Beta(alpha, alpha); a small one hardly mixes."""

    alpha: Annotated[float, Search("10^U(-1,1)")] = 0.2

    def __post_init__(self) -> None:
        require(self.alpha > 0, f"mixup.alpha must be positive, got {self.alpha}")


@method(
    "mixup",
    paper="Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018",
    requires=Requires(),
    config=Config,
)
class Mixup(Objective[Config]):
    """`lambda CE(z, y) + (1 - lambda) CE(z, y')`, z the logits of `lambda x + (1 - lambda) x'`.

    Partners are a permutation of the batch and lambda is one for all of it, as in the authors' code and SubpopBench
    (there features are mixed for text; DomainBed mixes across environments). Deviations: the recipe is the block's;
    selection is the rung's.
    """

    def loss(self, batch: Batch) -> Tensor:
        share = drawn_share(self.config.alpha)
        partner = torch.randperm(len(batch.y), device=batch.y.device)
        logits = self.model(mixed(batch.x, share, partner))
        own, other = F.cross_entropy(logits, batch.y), F.cross_entropy(logits, batch.y[partner])
        return share * own + (1 - share) * other


def drawn_share(alpha: float) -> float:
    """A draw of Beta(alpha, alpha) from torch's generator."""
    both = torch.tensor(alpha, dtype=torch.float64)  # in single precision small alphas underflow
    return float(torch.distributions.Beta(both, both).sample())  # on the processor: nothing waits for a device


def mixed(x: Tensor, share: float, partner: Tensor) -> Tensor:
    """`share x_i + (1 - share) x_j` of images (B, C, H, W) with j = partner_i (B,)."""
    return x.lerp(x[partner], 1 - share)
