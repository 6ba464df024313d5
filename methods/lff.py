"""LfF: a network that is made to love shortcuts tells which images the other one should learn from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.task import Task


@dataclass(frozen=True)
class Config:
    """`q` of the generalised cross-entropy that biases the first network; `ema` is how much of a loss is remembered."""

    q: float = 0.7
    ema: float = 0.7

    def __post_init__(self) -> None:
        require(0 < self.q <= 1, f"lff.q must be in (0, 1], got {self.q}")
        require(0 <= self.ema < 1, f"lff.ema must be in [0, 1), got {self.ema}")


@method(
    "lff",
    paper="Nam et al., Learning from Failure: Training Debiased Classifier from Biased Classifier, NeurIPS 2020",
    requires=Requires(native="select"),
    config=Config,
)
class LfF(Objective[Config]):
    """`mean GCE_q(f_B) + mean W_i CE(f_D)`, W_i the share of f_B in the two networks' remembered losses of image i.

    Remembered losses are moving averages by image, divided by the largest of the image's class. Deviations: the exact
    gradient of the generalised cross-entropy (the released code multiplies it by q), both networks trained end to end
    (there all but the classifier is frozen in ResNets), the block's recipe, selection by the rung.
    """

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.biased = task.network(task.num_classes, "biased")
        self.y = torch.from_numpy(task.y("train")).to(task.device)
        self.memory = torch.full((2, task.size("train")), -1.0, device=task.device)
        """Remembered losses (2, n) of the biased and the debiased network, -1 where an image has not been seen."""

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model, "biased": self.biased}

    def loss(self, batch: Batch) -> Tensor:
        biased, debiased = self.biased(batch.x), self.model(batch.x)
        losses = torch.stack([F.cross_entropy(z, batch.y, reduction="none") for z in (biased, debiased)])
        self.memory[:, batch.index] = remembered(self.memory[:, batch.index], losses.detach(), self.config.ema)
        weights = relative_difficulty(self.memory, self.y, batch.index, self.model.num_classes)
        return gce(biased, batch.y, self.config.q).mean() + (weights * losses[1]).mean()

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory = state["memory"].to(self.memory.device)


def gce(logits: Tensor, y: Tensor, q: float) -> Tensor:
    """Generalised cross-entropy `(1 - p_y^q) / q` (B,); its gradient is `p_y^q` times that of the cross-entropy."""
    return -torch.expm1(-q * F.cross_entropy(logits, y, reduction="none")) / q


def remembered(before: Tensor, losses: Tensor, ema: float) -> Tensor:
    """Moving average of losses; the first one is taken whole."""
    return torch.where(before < 0, losses, ema * before + (1 - ema) * losses)


def relative_difficulty(memory: Tensor, y: Tensor, index: Tensor, num_classes: int) -> Tensor:
    """`W_i` (B,) of some images from the remembered losses (2, n) of all, each divided by its class's largest."""
    top = memory.new_zeros(2, num_classes).scatter_reduce(1, y.expand(2, -1), memory, "amax")
    relative = memory[:, index] / top[:, y[index]].clamp(min=1e-12)
    return relative[0] / (relative.sum(0) + 1e-8)
