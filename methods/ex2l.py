"""eX2L: a second network learns the shortcut, and the classifier is kept from looking where that one looks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..benchmark.annotations import Attributes, Groups
from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective, make_optimizer
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.spec import Card, Recipe
from ..benchmark.task import Task
from .blocks.grad_cam import grad_cam, map_size
from .blocks.similarity import SIMILARITIES, MapNorm, similarity

FEWEST = 4
"""Pixels of a map; all normalised maps of one pixel are the same. Below 16 there is little to tell them apart by."""


@dataclass(frozen=True)
class Config:
    """`similarity` S of the two maps: mae, mse, rmse, iou, kl, js, jsd, cosine, ncc, ssim or dice; `lambda1` weighs the
    confounder's loss, `lambda2` the similarity; `map_norm` normalises maps that S does not normalise itself.
    `confounder_lr` and `confounder_weight_decay` replace the recipe's for the confounder (None: the recipe's).

    `confounders`: one for the `joint` value of the granted attributes, or one for `each` of them, whose mean S counts.

    `gradient` of S reaches both trunks (`joint`), the classifier's alone (`label`), or none (`static`: the literal
    "detach the heatmap" of the paper, with which S cannot change anything; a control). `sampler` as in ReSample, or
    `random`.
    """

    similarity: str = "mae"
    lambda1: Annotated[float, Search("10^U(-1,2)")] = 1.0
    lambda2: Annotated[float, Search("10^U(-1,2)")] = 1.0
    confounder_lr: Annotated[float | None, Search("10^U(-1,1)", of="lr")] = None
    confounder_weight_decay: Annotated[float | None, Search("10^U(-6,-2)")] = None
    map_norm: MapNorm = "max"
    confounders: Literal["joint", "each"] = "joint"
    gradient: Literal["joint", "label", "static"] = "joint"
    sampler: Literal["uniform_group", "random"] = "uniform_group"

    def __post_init__(self) -> None:
        known = ", ".join(SIMILARITIES)
        require(self.similarity in SIMILARITIES, f"ex2l.similarity must be one of {known}, got {self.similarity!r}")
        for name in ("lambda1", "lambda2", "confounder_weight_decay"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"ex2l.{name} must be at least 0, got {value}")
        lr = self.confounder_lr
        require(lr is None or lr > 0, f"ex2l.confounder_lr must be positive, got {lr}")


@method(
    "ex2l",
    paper="eXplaining to Learn (eX2L): Regularization Using Contrastive Visual Explanation Pairs, arXiv 2605.06368",
    requires=Requires(fit="train", native="train+val", masked=True),
    config=Config,
)
class EX2L(Objective[Config]):
    """`CE(y) + lambda1 sum_j CE_j(a_j) + lambda2 / k sum_j mean_b S(H_b, H_jb)`, with the Grad-CAM maps of y and a_j.

    That is eq. 2-4 for k = 1. The weights of the maps carry no gradient, the maps do. A confounder is a second network
    of the same family; under `@masked` it sees the images only whose attribute is annotated. ReSample is this method
    with lambda2 = 0 or a `static` gradient, bit for bit: a confounder disturbs no draw of the classifier's dropout.

    Deviations: several attributes (the paper has one); selection is the rung's, without early stopping; both networks
    train under the block's recipe unless set otherwise (the paper searches a learning rate and a weight decay for
    each); two-logit heads, whose margin gives the maps of the paper's single logit; maps are normalised in the graph
    and compared at their own resolution (at least 4 pixels; 16 or more are advisable).
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.sampler = config.sampler

    @staticmethod
    def check_model(model: Backbone, card: Card) -> None:
        """Raise `UserError` when the maps of the dataset's images are too small to be compared."""
        rows, columns = map_size(model, card)
        require(
            rows * columns >= FEWEST,
            f"ex2l: {model.name} ends in maps of {rows}x{columns} pixels for {card.name}, too few to compare; "
            "take larger images, or a backbone that shrinks them less",
        )

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        known = _confounding(task.attributes("train"), self.config.confounders)
        names = [f"confounder{j or ''}" for j in range(len(known))]  # the first has the same weights in both readings
        self.confounders = {name: task.network(a.num, name) for name, a in zip(names, known, strict=True)}
        self.a = torch.from_numpy(np.stack([a.index for a in known])).to(task.device)
        """What each confounder learns (k, n), -1 where it is unknown."""
        self.complete = bool((self.a >= 0).all())

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model, **self.confounders}

    def optimizers(self, recipe: Recipe) -> dict[str, Optimizer]:
        lr, decay = self.config.confounder_lr, self.config.confounder_weight_decay
        decay = recipe.weight_decay if decay is None else decay
        other = replace(recipe, lr=lr or recipe.lr, weight_decay=decay)
        return {
            name: make_optimizer(network.parameters(), recipe if name == "model" else other)
            for name, network in self.networks().items()
        }

    def loss(self, batch: Batch) -> Tensor:
        config = self.config
        maps, logits = _parts(self.model, batch.x)
        loss = F.cross_entropy(logits, batch.y)
        with torch.set_grad_enabled(config.gradient != "static"):
            heat = grad_cam(self.model, maps, logits, batch.y)
        # Forked, so that a confounder's dropout leaves the classifier's next masks as they would be without it.
        with torch.random.fork_rng(devices=[batch.x.device] if batch.x.is_cuda else []):
            for confounder, x, u, a in self.annotated(batch, heat):
                other_maps, other_logits = _parts(confounder, x)
                with torch.set_grad_enabled(config.gradient == "joint"):
                    v = grad_cam(confounder, other_maps, other_logits, a)
                alike = similarity(config.similarity, u, v, config.map_norm).mean()
                loss = loss + config.lambda1 * F.cross_entropy(other_logits, a)
                loss = loss + config.lambda2 / len(self.confounders) * alike
        return loss

    def annotated(self, batch: Batch, heat: Tensor) -> Iterator[tuple[Backbone, Tensor, Tensor, Tensor]]:
        """Each confounder with the images, label maps and attribute values (B', ...) that it can learn from, if any."""
        for confounder, values in zip(self.confounders.values(), self.a, strict=True):
            a = values[batch.index]
            if self.complete:  # no copy of the images, no wait for the device
                yield confounder, batch.x, heat, a
            elif len(rows := (a >= 0).nonzero()[:, 0]):
                yield confounder, batch.x[rows], heat[rows], a[rows]


def _confounding(attributes: Attributes, confounders: Literal["joint", "each"]) -> list[Groups]:
    """What the confounders learn: one value of every image for each of them."""
    if confounders == "joint":
        return [attributes.joint()]
    return [Groups(column, size) for column, size in zip(attributes.values.T, attributes.sizes, strict=True)]


def _parts(model: Backbone, x: Tensor) -> tuple[Tensor, Tensor]:
    """Grad-CAM target maps (B, C, H, W) and logits (B, K)."""
    maps: Tensor = model.trunk(x)
    return maps, model.head(model.neck(maps))
