"""CDAN: features from which a discriminator that knows the prediction cannot tell the environment."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..benchmark.budget import Requires
from ..benchmark.registry import method
from .blocks.adversary import AdversarialConfig, AdversarialObjective, Dropout, Width, mlp, validate

LARGEST = 4096
"""Products of features and probabilities up to which all of them are shown to the discriminator."""
RANDOM = 1024
"""Random combinations of the products that are shown instead of more."""
EPSILON = 1e-5
"""Under the entropy's logarithm, as released."""


@dataclass(frozen=True)
class Config(AdversarialConfig):
    """`entropy` lets images weigh the more, the surer their prediction is (CDAN+E). The rest is as of every adversarial
    method, by default as released: `impl` grl with a `ramp` over 10,000 `ramp_steps`, however long the training is, and
    a wider discriminator (`width`) with `dropout`."""

    impl: Literal["alternating", "grl"] = "grl"
    ramp: bool = True
    ramp_steps: int = 10_000
    width: Width = 1024
    dropout: Dropout = 0.5
    entropy: bool = False

    def __post_init__(self) -> None:
        validate("cdan", self)


@method(
    "cdan",
    paper="Long et al., Conditional Adversarial Domain Adaptation, NeurIPS 2018",
    requires=Requires(fit="train", native="train+val", classes="erm", masked=True),
    config=Config,
)
class CDAN(AdversarialObjective[Config]):
    """`CE(z, y) + sum_i w_i CE(D(p (x) h), e)`, p = softmax(z) without gradient, the gradient by h reversed.

    With `entropy` the weights are `1 + exp(-H(p))`, of sum 1 within each environment and divided by the number of
    those, else all are equal. The gradient through H is reversed too, that through the sums is left out (as released):
    predictions become surer. Beyond 4096 products, 1024 random ones: `(R h) * (S p) / sqrt(1024)`, R and S normal.

    Deviations: every image has a class label and there are any number of environments (there one labelled and one
    unlabelled, and one logit with a sigmoid); lambda scales what reaches the classifier alone (there the
    discriminator's own gradient too; the same at 1); the discriminator has torch's initial weights and Adam, and the
    classifier the block's recipe (there SGD with ten times the rate in new layers). Turns (`impl`) and a gradient
    penalty are not in the paper.
    """

    def make_discriminator(self) -> nn.Module:
        products = Products(self.model.feature_dim, self.model.num_classes)
        return ProductDiscriminator(products, mlp(products.size, self.num_envs, self.config))

    def judge(self, features: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        judged: Tensor = self.discriminator(features, logits.detach().softmax(1))
        return judged

    def weights(self, logits: Tensor, y: Tensor, e: Tensor) -> Tensor:
        if not self.config.entropy:
            return super().weights(logits, y, e)
        return environment_balanced(1 + torch.exp(-entropy(logits)), e, self.num_envs)


class Products(nn.Module):
    """`vec(p (x) h)` (B, K d) of features h (B, d) and probabilities p (B, K), or random combinations (B, 1024)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        exact = features * classes <= LARGEST
        self.size = features * classes if exact else RANDOM
        self.of_features: Tensor | None
        self.of_classes: Tensor | None
        self.register_buffer("of_features", None if exact else torch.randn(features, RANDOM))
        self.register_buffer("of_classes", None if exact else torch.randn(classes, RANDOM))

    def forward(self, features: Tensor, p: Tensor) -> Tensor:
        if self.of_features is None or self.of_classes is None:
            return (p[:, :, None] * features[:, None]).flatten(1)
        return (features @ self.of_features) * (p @ self.of_classes) / math.sqrt(RANDOM)


class ProductDiscriminator(nn.Module):
    """Logits (B, E) of features (B, d) and probabilities (B, K), by their products."""

    def __init__(self, products: Products, mlp: nn.Module) -> None:
        super().__init__()
        self.products, self.mlp = products, mlp

    def forward(self, features: Tensor, p: Tensor) -> Tensor:
        judged: Tensor = self.mlp(self.products(features, p))
        return judged


def entropy(logits: Tensor) -> Tensor:
    """Entropy (B,) in nats of the prediction, slightly off for the sake of finite slopes."""
    p = logits.softmax(1)
    return -(p * (p + EPSILON).log()).sum(1)


def environment_balanced(weights: Tensor, e: Tensor, environments: int) -> Tensor:
    """Positive weights (B,) divided by their sum in each environment, and by how many of those there are.

    The sums have no gradient.
    """
    sums = (F.one_hot(e, environments) * weights.detach()[:, None]).sum(0)
    return weights / (sums[e] * (sums > 0).sum())
