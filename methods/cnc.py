"""CnC: pull together images of a class that an ERM tells apart, push apart images of other classes that it confuses."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch, Sampler, random_order
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.spec import Card, Recipe
from ..benchmark.task import Predictor, Task


@dataclass(frozen=True)
class Config:
    """`first_epochs` T is the length of the first run; `weight` w of the contrastive loss, against that of the
    cross-entropy, and its temperature `tau`; a contrastive set holds `num_anchor` anchors, `num_positive` positives,
    `num_negative` negatives, and `num_negative_easy` negatives of the first positive."""

    # The ranges are ours: the sources give none.
    first_epochs: Annotated[int, Search("U(0.2,0.8)", of="epochs")] = 1
    weight: Annotated[float, Search("U(0,1)")] = 0.75
    tau: Annotated[float, Search("10^U(-2,0)")] = 0.1
    num_anchor: int = 4
    num_positive: int = 4
    num_negative: int = 4
    num_negative_easy: int = 4

    def __post_init__(self) -> None:
        for name in ("first_epochs", "num_anchor", "num_positive", "num_negative", "num_negative_easy"):
            require(getattr(self, name) >= 1, f"cnc.{name} must be at least 1, got {getattr(self, name)}")
        require(0 <= self.weight <= 1, f"cnc.weight must be in [0, 1], got {self.weight}")
        require(self.tau > 0, f"cnc.tau must be positive, got {self.tau}")

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Sizes of a set's parts, in their order."""
        return self.num_anchor, self.num_positive, self.num_negative, self.num_negative_easy

    def check(self, recipe: Recipe, card: Card) -> None:
        """Raise `UserError` unless the first run fits into the recipe, and a contrastive set into a batch."""
        most, size, batch = recipe.epochs, sum(self.parts), recipe.batch_size
        require(self.first_epochs <= most, f"cnc.first_epochs must be at most the recipe's {most} epochs")
        require(size <= batch, f"cnc: a set of {size} images exceeds the batch of {batch}; lower cnc.num_anchor etc.")


@method(
    "cnc",
    paper="Zhang et al., Correct-N-Contrast: A Contrastive Approach for Improving Robustness to Spurious Correlations, "
    "ICML 2022",
    requires=Requires(native="select"),
    config=Config,
)
class CnC:
    """ERM for T epochs -> predictions p -> a new network under `(1 - w) CE + w (l1 + l2)` on contrastive sets.

    A set of class c has anchors (y = c = p), positives (y = c, p != c), negatives (y != c, p = c), and easy negatives:
    images that the first run gets right in the class that it takes the first positive for. l1 contrasts the first
    anchor with positives and negatives, l2 the first positive with anchors and easy negatives, by the cosine of their
    features; the cross-entropy is that of all four parts. Classes take turns, parts are drawn with replacement. Where a
    class has no errors of the kind, any of its images is a positive, any image of the others a negative. A pretrained
    network trains in evaluation mode, as released: its BatchNorm keeps its statistics. One that starts from nothing has
    none worth keeping and trains as usual.

    Deviations: the first run is regularised by its length, being a prefix of the shared ERM that is billed as T of its
    epochs (there weight decay too); a set has 16 images (there 68 or more) and a batch as many whole sets as fit the
    recipe's batch size, so that all methods take the same steps on as many images (there 32 sets a step, one set for
    each anchor an epoch); each image passes once, for all of its losses (there about twice); the classifier's gradient
    is cleared in every step (there at the start of an epoch by default); the block's recipe; selection by the rung.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """Both runs."""
        first = task.erm(epoch=self.config.first_epochs)
        predicted = task.logits(first, "train").argmax(1)
        y = torch.from_numpy(task.y("train"))
        right = predicted == y
        require(bool(right.any()), "cnc: the first run gets every training image wrong: there are no anchors")
        require(not right.all(), "cnc: the first run makes no training error to contrast with; lower first_epochs")
        return task.train(Contrast(self.config, y, predicted), stage="second")


class Contrast(Objective[Config]):
    """The second run, on contrastive sets of the first one's predictions (n,)."""

    def __init__(self, config: Config, y: Tensor, predicted: Tensor) -> None:
        super().__init__(config)
        self.slices = slices(y, predicted)
        self.predicted = predicted

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.pretrained = task.spec.block.weights != "none"

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        parts, size = self.config.parts, sum(self.config.parts)
        batches_of_erm = random_order(task.size("train"), recipe)

        def draw(generator: torch.Generator) -> list[Tensor]:
            fit = [max(1, len(batch) // size) for batch in batches_of_erm(generator)]
            sets = contrastive_sets(self.slices, self.predicted, parts, sum(fit), generator)
            return [some.flatten() for some in sets.split(fit)]  # type: ignore[no-untyped-call]

        return draw

    def loss(self, batch: Batch) -> Tensor:
        if self.pretrained:
            self.model.eval()  # the engine has put everything into training mode
        features = self.model.features(batch.x)
        cross_entropy = F.cross_entropy(self.model.head(features), batch.y)
        sets = F.normalize(features.float(), eps=1e-8).view(-1, sum(self.config.parts), features.shape[1])
        anchors, positives, negatives, easy = sets.split(self.config.parts, dim=1)  # type: ignore[no-untyped-call]
        sides = contrastive_loss(anchors[:, 0], positives, negatives, self.config.tau) + contrastive_loss(
            positives[:, 0], anchors, easy, self.config.tau
        )
        return (1 - self.config.weight) * cross_entropy + self.config.weight * sides


def contrastive_loss(anchor: Tensor, positives: Tensor, negatives: Tensor, tau: float) -> Tensor:
    """`-mean_p log(e^(s_ap / tau) / (sum_n e^(s_an / tau) + sum_p' e^(s_ap' / tau)))`, mean over S sets.

    Of unit vectors (S, d), (S, M, d) and (S, N, d); s is their product, taken in float32 also where autocast is on.
    """
    near, far = ((anchor[:, None] * others).sum(2) / tau for others in (positives, negatives))
    return (torch.cat([near, far], 1).logsumexp(1) - near.mean(1)).mean()


class Slice(NamedTuple):
    """What the sets of a class are drawn from: places (m,) of its anchors, positives and negatives in the train set."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor


def slices(y: Tensor, predicted: Tensor) -> dict[int, Slice]:
    """By class, for the classes of which the first run gets an image right; from labels and predictions (n,)."""
    found = {}
    for label in torch.unique(y[predicted == y]).tolist():
        own, taken = y == label, predicted == label
        wrong, mistaken = own & ~taken, taken & ~own
        masks = own & taken, wrong if wrong.any() else own, mistaken if mistaken.any() else ~own
        found[label] = Slice(*(mask.nonzero()[:, 0] for mask in masks))
    return found


def contrastive_sets(
    slices: dict[int, Slice], predicted: Tensor, parts: tuple[int, int, int, int], num: int, generator: torch.Generator
) -> Tensor:
    """Random sets (num, sum(parts)): places of anchors, positives, negatives and easy negatives in the train set.

    In every round each class has its turn once. Where no image is right in the class that the first positive is taken
    for, its easy negatives are negatives of the anchors.
    """

    def drawn(pool: Tensor, *shape: int) -> Tensor:
        return pool[torch.randint(len(pool), shape, generator=generator)]

    turns = torch.rand(-(-num // len(slices)), len(slices), generator=generator).argsort(1).flatten()[:num]
    sets = torch.empty(num, sum(parts), dtype=torch.long)
    for turn, (label, own) in enumerate(slices.items()):
        mine = (turns == turn).nonzero()[:, 0]
        chosen = [drawn(pool, len(mine), size) for pool, size in zip(own, parts, strict=False)]
        taken_for = predicted[chosen[1][:, 0]]
        easy = torch.empty(len(mine), parts[3], dtype=torch.long)
        for other in torch.unique(taken_for).tolist():
            rows = (taken_for == other).nonzero()[:, 0]
            right = other != label and other in slices
            easy[rows] = drawn(slices[other].anchors if right else own.negatives, len(rows), parts[3])
        sets[mine] = torch.cat([*chosen, easy], 1)
    return sets
