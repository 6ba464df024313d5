"""DebiAN: one network splits each class where the other is least fair, and that one learns more from the worse side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch, Sampler
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.spec import Recipe
from ..benchmark.task import Task
from .blocks.environments import membership
from .blocks.precision import wide

EPSILON = 1e-6


@dataclass(frozen=True)
class Config:
    """`balance` lambda weighs that the sides of a class be equally large."""

    balance: Annotated[float, Search("{1,0.1,10}")] = 1.0

    def __post_init__(self) -> None:
        require(self.balance >= 0, f"debian.balance must be at least 0, got {self.balance}")


@method(
    "debian",
    paper="Li et al., Discover and Mitigate Unknown Biases with Debiasing Alternate Networks, ECCV 2022",
    requires=Requires(native="select"),
    config=Config,
)
class DebiAN(Objective[Config]):
    """In every step `min_C mean_i (1 + b_i) CE_i`, b the share of the worse side, then, on another batch,
    `min_D sum_t -log(eps + |P_t+ - P_t-|) - lambda log(eps + 1 - |2 mean b - 1|)`.

    b = sigmoid(D(x)) is an image's share in side + of its class t, P+ and P- the means of the classifier's probability
    of the true class over both sides, with weights b and 1 - b. D has one output, or with more than two classes one for
    each of them. The network that does not learn is in evaluation mode. Both batches are of the recipe's size and come
    from two orders of the images, hence the classifier takes ERM's steps on as many images. Weights lie in [1, 2] and
    are not normalised, as released: on average the classifier's rate is larger than ERM's.

    Deviations: losses of classes are summed whatever their number (there, of more than two, averaged), those that a
    batch lacks are left out (there NaN for two classes); both networks train under the block's recipe; selection by the
    rung (there by accuracy).
    """

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.discoverer = task.network(1 if task.num_classes == 2 else task.num_classes, "discoverer")

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model, "discoverer": self.discoverer}

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        one = super().make_sampler(task, recipe)

        def draw(generator: torch.Generator) -> Sequence[Tensor]:
            return [torch.cat(pair) for pair in zip(one(generator), one(generator), strict=True)]

        return draw

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        first, second = halved(batch)
        losses = []
        for player, part in (("model", first), ("discoverer", second)):
            for name, network in self.networks().items():
                network.train(name == player)
            losses.append(self.loss(part) if player == "model" else self.discoverer_loss(part))
            optimizers[player].zero_grad(set_to_none=True)
            losses[-1].backward()  # type: ignore[no-untyped-call]
            optimizers[player].step()
        return losses[0].detach()

    def loss(self, batch: Batch) -> Tensor:
        """The classifier's."""
        with torch.no_grad():
            b = self.sides(batch)
        logits = self.model(batch.x)
        weights = fair_weights(b, true_class(logits.detach(), batch.y), membership(batch.y, self.model.num_classes))
        return (weights * F.cross_entropy(logits, batch.y, reduction="none")).mean()

    def discoverer_loss(self, batch: Batch) -> Tensor:
        """The discoverer's."""
        with torch.no_grad():
            p = true_class(self.model(batch.x), batch.y)
        return unfairness_loss(self.sides(batch), p, membership(batch.y, self.model.num_classes), self.config.balance)

    def sides(self, batch: Batch) -> Tensor:
        """Share b (B,) of each image in side + of its class."""
        logits = wide(self.discoverer(batch.x)).expand(-1, self.model.num_classes)
        return logits.gather(1, batch.y[:, None])[:, 0].sigmoid()


def halved(batch: Batch) -> tuple[Batch, Batch]:
    """The first and the second half of a batch."""
    parts = zip(*(values.chunk(2) for values in (batch.x, batch.y, batch.index)), strict=True)
    first, second = (Batch(*part) for part in parts)
    return first, second


def true_class(logits: Tensor, y: Tensor) -> Tensor:
    """Probability (B,) of the true class."""
    return wide(logits).softmax(1).gather(1, y[:, None])[:, 0]


def side_means(b: Tensor, p: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """`P_t+` and `P_t-` (K,) of shares and probabilities (B,) and which image is of which class (K, B)."""
    plus, minus = ((member * share * p).sum(1) / ((member * share).sum(1) + EPSILON) for share in (b, 1 - b))
    return plus, minus


def unfairness_loss(b: Tensor, p: Tensor, member: Tensor, balance: float) -> Tensor:
    """The discoverer's loss, summed over the classes in the batch."""
    plus, minus = side_means(b, p, member)
    size = member.sum(1)
    apart = -torch.log(EPSILON + (plus - minus).abs())
    level = -torch.log(1 - (2 * (member * b).sum(1) / size.clamp(min=1) - 1).abs() + EPSILON)
    return ((size > 0) * (apart + balance * level)).sum()


def fair_weights(b: Tensor, p: Tensor, member: Tensor) -> Tensor:
    """Weights (B,): 1 and the image's share in the side of its class on which the classifier is worse."""
    plus, minus = side_means(b, p, member)
    worse = torch.where((plus <= minus)[:, None], b, 1 - b)
    return 1 + (member * worse).sum(0)
