"""CDANN: features from which a discriminator that knows the class cannot tell the environment."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..benchmark.budget import Requires
from ..benchmark.registry import method
from .blocks.adversary import AdversarialConfig, AdversarialObjective, mlp, validate


@dataclass(frozen=True)
class Config(AdversarialConfig):
    """As of every adversarial method."""

    def __post_init__(self) -> None:
        validate("cdann", self)


@method(
    "cdann",
    paper="Li et al., Deep Domain Generalization via Conditional Invariant Adversarial Networks, ECCV 2018 "
    "(as in DomainBed; what eX2L calls CDAN)",
    requires=Requires(fit="train", native="train+val", classes="erm", masked=True),
    config=Config,
)
class CDANN(AdversarialObjective[Config]):
    """DANN whose discriminator sees `h + Emb(y)`, with a loss in which all classes weigh the same.

    The embedding (K, d) of the true class is the discriminator's: its optimiser trains it. The weight of image i is
    `1 / (n_{y_i} K)`, n_y images of class y being in the batch (annotated ones under `@masked`). Deviations: those of
    DANN; K is the number of classes also where the last of them are missing from a batch (DomainBed counts up to the
    largest label there).
    """

    def make_discriminator(self) -> nn.Module:
        embedding = nn.Embedding(self.model.num_classes, self.model.feature_dim)
        return ClassDiscriminator(embedding, mlp(self.model.feature_dim, self.num_envs, self.config))

    def judge(self, features: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        judged: Tensor = self.discriminator(features, y)
        return judged

    def weights(self, logits: Tensor, y: Tensor, e: Tensor) -> Tensor:
        return class_balanced(y, self.model.num_classes)


class ClassDiscriminator(nn.Module):
    """Logits (B, E) `mlp(h + Emb(y))` of features h (B, d) and labels y (B,)."""

    def __init__(self, embedding: nn.Embedding, mlp: nn.Module) -> None:
        super().__init__()
        self.embedding, self.mlp = embedding, mlp

    def forward(self, features: Tensor, y: Tensor) -> Tensor:
        judged: Tensor = self.mlp(features + self.embedding(y))
        return judged


def class_balanced(y: Tensor, num_classes: int) -> Tensor:
    """`1 / (n_{y_i} K)` (B,) of labels y (B,), n_y their counts: the sum is the share of classes that are present."""
    counts = F.one_hot(y, num_classes).sum(0)  # bincount would wait for the device
    return 1 / (num_classes * counts[y])
