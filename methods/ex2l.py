"""eX2L: a second network learns the shortcut, and the classifier is kept from looking where that one looks."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.spec import Card
from ..benchmark.task import Task
from .blocks.grad_cam import grad_cam
from .blocks.similarity import SIMILARITIES, MapNorm, similarity

FEWEST = 4
"""Pixels of a map; all normalised maps of one pixel are the same. Below 16 there is little to tell them apart by."""


@dataclass(frozen=True)
class Config:
    """`similarity` S of the two maps: mae, mse, rmse, iou, kl, js, jsd, cosine, ncc, ssim or dice; `lambda1` weighs the
    confounder's loss, `lambda2` the similarity; `map_norm` normalises maps that S does not normalise itself.

    `gradient` of S reaches both trunks (`joint`), the classifier's alone (`label`), or none (`static`: the literal
    "detach the heatmap" of the paper, with which S cannot change anything; a control). `sampler` as in ReSample, or
    `random`.
    """

    similarity: str = "mae"
    lambda1: float = 1.0
    lambda2: float = 1.0
    map_norm: MapNorm = "max"
    gradient: Literal["joint", "label", "static"] = "joint"
    sampler: Literal["uniform_group", "random"] = "uniform_group"

    def __post_init__(self) -> None:
        known = ", ".join(SIMILARITIES)
        require(self.similarity in SIMILARITIES, f"ex2l.similarity must be one of {known}, got {self.similarity!r}")
        require(self.lambda1 >= 0, f"ex2l.lambda1 must be at least 0, got {self.lambda1}")
        require(self.lambda2 >= 0, f"ex2l.lambda2 must be at least 0, got {self.lambda2}")


@method(
    "ex2l",
    paper="eXplaining to Learn (eX2L): Regularization Using Contrastive Visual Explanation Pairs, arXiv 2605.06368",
    requires=Requires(fit="train", native="train+val", masked=True),
    config=Config,
)
class EX2L(Objective[Config]):
    """`CE(y) + lambda1 CE_confounder(a) + lambda2 mean_b S(H_b, H'_b)`, with the Grad-CAM maps of y and a (eq. 2-4).

    The weights of the maps carry no gradient, the maps do. The confounder is a second network of the same family on the
    joint value of the granted attributes; under `@masked` it sees the annotated images only. Both train under the
    block's recipe. Deviations: selection is the rung's; two-logit heads, whose margin gives the maps of the paper's
    single logit; maps are normalised in the graph and compared at their own resolution (at least 4 pixels; 16 or more
    are advisable). ReSample is this method with lambda2 = 0, bit for bit where the network has no dropout.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.sampler = config.sampler

    @staticmethod
    @torch.no_grad()
    def check_model(model: Backbone, card: Card) -> None:
        """Raise `UserError` when the maps of the dataset's images are too small to be compared."""
        height, width, channels = card.image
        maps = model.eval().trunk(torch.zeros(1, channels, height, width))
        rows, columns = maps.shape[2:]
        require(
            rows * columns >= FEWEST,
            f"ex2l: {model.name} ends in maps of {rows}x{columns} pixels for {card.name}, too few to compare; "
            "take larger images, or a backbone that shrinks them less",
        )

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        joint = task.attributes("train").joint()
        self.confounder = task.network(joint.num, "confounder")
        self.a = torch.from_numpy(joint.index).to(task.device)

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model, "confounder": self.confounder}

    def loss(self, batch: Batch) -> Tensor:
        maps, logits = _parts(self.model, batch.x)
        a = self.a[batch.index]
        known = (a >= 0).nonzero()[:, 0]
        loss = F.cross_entropy(logits, batch.y)
        if not len(known):
            return loss
        other_maps, other_logits = _parts(self.confounder, batch.x[known])
        loss = loss + self.config.lambda1 * F.cross_entropy(other_logits, a[known])
        u = grad_cam(self.model, maps, logits, batch.y)[known]
        v = grad_cam(self.confounder, other_maps, other_logits, a[known])
        if self.config.gradient != "joint":
            v = v.detach()
        if self.config.gradient == "static":
            u = u.detach()
        return loss + self.config.lambda2 * similarity(self.config.similarity, u, v, self.config.map_norm).mean()


def _parts(model: Backbone, x: Tensor) -> tuple[Tensor, Tensor]:
    """Grad-CAM target maps (B, C, H, W) and logits (B, K)."""
    maps: Tensor = model.trunk(x)
    return maps, model.head(model.neck(maps))
