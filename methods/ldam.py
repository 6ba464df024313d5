"""LDAM: cross-entropy with a margin that is larger for rarer classes."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor
from torch.nn import functional as F

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.task import Task
from .blocks.balance import class_counts


@dataclass(frozen=True)
class Config:
    """`max_margin` is the margin of the rarest class; `scale` s multiplies the logits in training."""

    max_margin: Annotated[float, Search("10^U(-1,-0.1)")] = 0.5
    scale: Annotated[float, Search("{10,30}")] = 30.0

    def __post_init__(self) -> None:
        require(self.max_margin >= 0, f"ldam.max_margin must be at least 0, got {self.max_margin}")
        require(self.scale > 0, f"ldam.scale must be positive, got {self.scale}")


@method(
    "ldam",
    paper="Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019",
    requires=Requires(),
    config=Config,
)
class LDAM(Objective[Config]):
    """`CE(s (z - m_y 1_y), y)` with margins `m_c` proportional to `n_c^(-1/4)`, on shuffled images.

    Deviations, both as in SubpopBench: no deferred re-weighting, and logits of the plain head (in the paper cosines of
    features and weights); the recipe is the block's; selection is the rung's. Where classes are equally large, the
    margins are the same but do not vanish. Recorded logits are the plain z, s times less confident than was trained.
    """

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.margins = margins(class_counts(task), self.config.max_margin)

    def loss(self, batch: Batch) -> Tensor:
        margin = F.one_hot(batch.y, len(self.margins)) * self.margins
        return F.cross_entropy(self.config.scale * (self.model(batch.x) - margin), batch.y)


def margins(counts: Tensor, largest: float) -> Tensor:
    """Margins (K,) of classes with these counts (K,), `largest` for the rarest that has an image; 0 where none is."""
    relative = counts.clamp(min=1) ** -0.25 * (counts > 0)
    return largest * relative / relative.max()
