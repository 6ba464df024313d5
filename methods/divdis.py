"""DivDis: several heads that agree on train and disagree on validation images; a few labels say which one to trust."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from ..benchmark.budget import Requires
from ..benchmark.data import Batch, Sampler, random_order
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.spec import Recipe
from ..benchmark.task import Predictor, Task

SMALLEST = 1e-12
"""Probabilities enter logarithms as this at least."""


@dataclass(frozen=True)
class Config:
    """`heads` H on one backbone; `lambda1` weighs their mutual information on validation images, `lambda2` how far
    their predictions there are from what they predict on train; `queries` N validation images whose labels choose the
    head; `joint_batches` passes images of train and of validation together, so that BatchNorm sees both at once."""

    heads: Annotated[int, Search("{2,4}")] = 2
    lambda1: Annotated[float, Search("{10,0.1,1,100}")] = 10.0
    lambda2: Annotated[float, Search("{10,1}")] = 10.0
    queries: Annotated[int, Search("{16,64}")] = 16
    joint_batches: bool = False

    def __post_init__(self) -> None:
        for name, least in {"heads": 1, "lambda1": 0, "lambda2": 0, "queries": 1}.items():
            require(getattr(self, name) >= least, f"divdis.{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def uses_targets(self) -> bool:
        """Whether the loss has a term of validation images."""
        return self.lambda2 > 0 or (self.lambda1 > 0 and self.heads > 1)


@method(
    "divdis",
    paper="Lee et al., Diversify and Disambiguate: Out-of-Distribution Robustness via Disagreement, ICLR 2023",
    requires=Requires(native="none", uses_val=True),
    config=Config,
)
class DivDis:
    """`mean_h CE_h(S) + lambda1 mean_{h<h'} MI(h, h'; T) + lambda2 mean_h KL(p_h(T) || p(S))` -> heads -> one of them.

    S are train images; T are as many validation images, without labels and under the same augmentation. MI is that of
    two heads' predictions over the batch, p_h(T) the mean prediction of a head, p(S) that of all heads, without a
    gradient. The first head starts as ERM's, so that H = 1 without lambda2 is ERM; where no term needs T, none passes.

    Where the rung's rule counts classes, it chooses among the heads by the N validation images on which they differ
    most; their labels are billed. Where it counts groups, it looks at all that the rung grants, as for every method,
    and no image is queried.

    Deviations: queries are from validation (the released code asks for labels of the split that it reports) and choose
    by the rung's rule (there accuracy); an epoch has ERM's steps, each with as many train images as ERM's; the last
    epoch is kept, since a rule that selects an epoch needs one prediction and there are H; the block's recipe. p(S) is
    the predicted marginal, as released (in the paper that of the labels). There are two heads, as in every stored log
    (the code's default is 4).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """Diversify, then disambiguate."""
        config, sizes = self.config, (task.size("train"), task.size("val"))
        model = task.initial().model
        with task.seeded("divdis heads"):
            model.head = with_more_heads(model.head, config.heads)
        both = task.on(np.arange(sizes[0]), np.arange(sizes[1]), labels=False)
        trained = both.train_network(Diverse(config, sizes[0]), model, "heads")

        logits = task.logits(trained, "val").view(sizes[1], config.heads, -1)
        rows, criterion = None, task.selector().criterion
        if not (criterion.needs_groups or criterion.of_source):
            rows = most_disputed(logits.softmax(2), config.queries)
            task.y("val", fit=rows)
        chosen, choice = task.choose(list(logits.argmax(2).numpy().T), rows)
        return Predictor(trained, choice, one_head(model.head, chosen, task.num_classes))


class Diverse(Objective[Config]):
    """The loss of H heads on batches whose first half are train images and whose second half validation images."""

    def __init__(self, config: Config, num_train: int) -> None:
        super().__init__(config)
        self.num_train = num_train

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        source = random_order(self.num_train, recipe)
        return with_targets(source, self.num_train, task.size("train")) if self.config.uses_targets else source

    def loss(self, batch: Batch) -> Tensor:
        config = self.config
        if not config.uses_targets:
            return self.cross_entropy(self.logits(batch.x), batch.y)
        if config.joint_batches:
            z, targets = self.logits(batch.x).chunk(2)
        else:
            z, targets = (self.logits(x) for x in batch.x.chunk(2))
        p, q = z.softmax(2), targets.softmax(2)
        loss = self.cross_entropy(z, batch.y[: len(z)])
        loss = loss + config.lambda1 * mutual_information(q)
        return loss + config.lambda2 * divergence(q.mean(0), p.detach().mean((0, 1)))

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, H, K) of images (B, C, H', W'), in float32."""
        logits: Tensor = self.model(x).float()
        return logits.view(len(x), self.config.heads, -1)

    def cross_entropy(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean over the images and their heads."""
        return F.cross_entropy(z.flatten(0, 1), y.repeat_interleave(self.config.heads))


def with_targets(source: Sampler, num_train: int, num: int) -> Sampler:
    """Batches of `source`, each with as many of the images from `num_train` to `num`, which are shuffled anew when all
    of them have been drawn.
    """

    def draw(generator: torch.Generator) -> list[Tensor]:
        batches = list(source(generator))
        rounds = -(-sum(map(len, batches)) // (num - num_train))
        order = torch.cat([torch.randperm(num - num_train, generator=generator) for _ in range(rounds)]) + num_train
        targets = order[: sum(map(len, batches))].split([len(batch) for batch in batches])  # type: ignore[no-untyped-call]
        return [torch.cat(pair) for pair in zip(batches, targets, strict=True)]

    return draw


def mutual_information(p: Tensor) -> Tensor:
    """`sum_uv J_uv log(J_uv / (p_u p'_v))` of the predictions p (B, H, K) of two heads, mean over all pairs; J is the
    mean over the batch of their outer products. Without a pair it is 0.
    """
    first, second = torch.triu_indices(p.shape[1], p.shape[1], 1, device=p.device)
    joint = (p[:, first, :, None] * p[:, second, None, :]).mean(0)
    mean = p.mean(0)
    apart = mean[first, :, None] * mean[second, None, :]
    information = (joint * (_log(joint) - _log(apart))).sum((1, 2))
    return information.sum() / max(1, len(first))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p_h || q)` of distributions p (H, K) from q (K,), mean over h."""
    return (p * (_log(p) - _log(q))).sum(1).mean()


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=SMALLEST).log()


def most_disputed(p: Tensor, num: int) -> NDArray[np.int64]:
    """Images with the largest `sum_{h<h'} |p_h - p_h'|` of the heads' predictions p (n, H, K), the first among equals;
    sorted.
    """
    first, second = torch.triu_indices(p.shape[1], p.shape[1], 1)
    disputed = (p[:, first] - p[:, second]).abs().sum((1, 2))
    rows: NDArray[np.int64] = disputed.argsort(descending=True, stable=True)[:num].sort().values.numpy()
    return rows


def with_more_heads(head: nn.Linear, num: int) -> nn.Linear:
    """A layer of `num` heads one after the other: `head`, and others drawn as a linear layer is."""
    heads = nn.Linear(head.in_features, num * head.out_features).to(head.weight.device)
    with torch.no_grad():
        heads.weight[: head.out_features] = head.weight
        heads.bias[: head.out_features] = head.bias
    return heads


def one_head(heads: nn.Linear, position: int, num_classes: int) -> nn.Linear:
    """One of several heads, on the CPU."""
    head: nn.Linear = skip_init(nn.Linear, heads.in_features, num_classes)  # type: ignore[no-untyped-call]
    rows = slice(position * num_classes, (position + 1) * num_classes)
    head.load_state_dict({"weight": heads.weight[rows], "bias": heads.bias[rows]})
    return head
