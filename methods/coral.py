"""CORAL: features of the same mean and covariance in every environment."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from torch import Tensor
from torch.nn import functional as F

from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.environments import EnvConfig
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from .blocks.environments import EnvironmentObjective, environment_distance, pair_mean

Variant = Literal["domainbed", "deep"]


@dataclass(frozen=True)
class Config(EnvConfig):
    """`weight` gamma of the mean distance between environments. `variant` of the distance: mean squared difference of
    means and of covariances (`domainbed`), or the paper's, of covariances alone and a quarter of that (`deep`).
    """

    weight: Annotated[float, Search("10^U(-1,1)")] = 1.0
    variant: Variant = "domainbed"

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"coral.weight must be at least 0, got {self.weight}")


@method(
    "coral",
    paper="Sun and Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV 2016 Workshops",
    requires=Requires(fit="train", native="train+val", classes="erm", masked=True),
    config=Config,
)
class CORAL(EnvironmentObjective[Config]):
    """`mean_e R_e + gamma mean_{e<e'} d(h_e, h_e')` over the environments in the batch, h the penultimate features.

    With k features the distance is `|mu - mu'|^2 / k + |C - C'|_F^2 / k^2`, as in DomainBed; the paper's, `deep`, is
    `|C - C'|_F^2 / (4 k^2)`. An environment with one image in the batch has no covariance and counts in the means only.
    Under `@masked` the risk is the mean over all images, the distance is of annotated ones. Deviations: features
    instead of the paper's logits, as in DomainBed; all environments pass the network together (there apart, each with
    BatchNorm statistics of its own).
    """

    def loss(self, batch: Batch) -> Tensor:
        features, e = self.model.features(batch.x), self.e[batch.index]
        losses = F.cross_entropy(self.model.head(features), batch.y, reduction="none")
        distance = environment_distance(partial(coral, variant=self.config.variant), features, e, self.num_envs)
        return self.risk(losses, batch.index) + self.config.weight * distance


def coral(features: Tensor, member: Tensor, variant: Variant = "domainbed") -> Tensor:
    """Mean distance of moments over pairs of environments, of features (B, k) and membership (E, B).

    No matrix of k x k is built: with `C = sum_i h_i h_i^T / (n - 1)` of centred features,
    `<C, C'> = sum_ij (h_i . h_j)^2 / ((n - 1) (n' - 1))`.
    """
    member, k = member.to(features), features.shape[1]
    size = member.sum(1, keepdim=True)
    means = member @ features / size.clamp(min=1)
    centred = features - member.T @ means
    share = member / (size - 1).clamp(min=1)
    products = share @ (centred @ centred.T).square() @ share.T
    covariances = pair_mean(products, size[:, 0] > 1) / k**2
    return covariances / 4 if variant == "deep" else pair_mean(means @ means.T, size[:, 0] > 0) / k + covariances
