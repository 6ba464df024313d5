"""MMD: features of the same distribution in every environment, by a Gaussian kernel."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.environments import EnvConfig
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from .blocks.environments import EnvironmentObjective, environment_distance, pair_mean


@dataclass(frozen=True)
class Config(EnvConfig):
    """`weight` gamma of the mean squared distance between environments."""

    weight: Annotated[float, Search("10^U(-1,1)")] = 1.0

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"mmd.weight must be at least 0, got {self.weight}")


@method(
    "mmd",
    paper="Li et al., Domain Generalization with Adversarial Feature Learning, CVPR 2018 (its MMD, as in DomainBed)",
    requires=Requires(fit="train", native="train+val", classes="erm", masked=True),
    config=Config,
)
class MMD(EnvironmentObjective[Config]):
    """`mean_e R_e + gamma mean_{e<e'} MMD^2(h_e, h_e')` over the environments in the batch, h the penultimate features.

    Under `@masked` the risk is the mean over all images, the distance is of annotated ones. Deviations: no adversary
    and no autoencoder, as in DomainBed; all environments pass the network together (there apart, each with BatchNorm
    statistics of its own).
    """

    def loss(self, batch: Batch) -> Tensor:
        features, e = self.model.features(batch.x), self.e[batch.index]
        losses = F.cross_entropy(self.model.head(features), batch.y, reduction="none")
        distance = environment_distance(mmd, features, e, self.num_envs)
        return self.risk(losses, batch.index) + self.config.weight * distance


def mmd(features: Tensor, member: Tensor) -> Tensor:
    """Mean MMD^2 (biased, so never negative) over pairs of environments, of features (B, d) and membership (E, B)."""
    mean = member.to(features) / member.sum(1, keepdim=True).clamp(min=1)
    return pair_mean(mean @ kernel(features) @ mean.T, member.any(1))


def kernel(features: Tensor) -> Tensor:
    """`k(u, v) = sum_s exp(-s |u - v|^2)` (B, B) of features (B, d), s from 1e-3 to 1e3 by decade."""
    squares = features.square().sum(1)
    distance = (squares + squares[:, None] - 2 * features @ features.T).clamp(min=0)
    distance.fill_diagonal_(0)  # rounding would make it something, and the largest s that a thousand times as much
    s = torch.logspace(-3, 3, 7, dtype=features.dtype, device=features.device)
    return torch.exp(-s[:, None, None] * distance).sum(0)
