"""GroupDRO: minimise the loss under exponentiated-gradient weights over groups."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
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
    """`step_size` is eta; `adjustment` C adds C/sqrt(n_g) to every group's loss; `absent` groups keep their weight
    and contribute no loss (`ignore`, as released) or are left out of the batch's weights (`renorm`)."""

    step_size: float = 0.01
    adjustment: float = 0.0
    absent: Literal["ignore", "renorm"] = "ignore"

    def __post_init__(self) -> None:
        require(self.step_size >= 0, f"groupdro.step_size must be at least 0, got {self.step_size}")
        require(self.adjustment >= 0, f"groupdro.adjustment must be at least 0, got {self.adjustment}")


@method(
    "groupdro",
    paper="Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, ICLR 2020",
    requires=Requires(fit="train", native="train+val", classes="class"),
    config=Config,
)
class GroupDRO(Objective[Config]):
    """Per batch: `q_g <- q_g exp(eta * loss_g)`, normalised, then the loss is `sum_g q_g loss_g` with the new q.

    Deviation: the recipe is the block's, not the paper's strong weight decay; selection is the rung's.
    """

    sampler = "uniform_group"

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        groups = task.groups("train")
        self.group = torch.from_numpy(groups.index).to(task.device)
        sizes = torch.from_numpy(groups.counts()).to(task.device)
        self.shift = self.config.adjustment / sizes.clamp(min=1).float().sqrt()
        self.q = (sizes > 0).float() / (sizes > 0).sum()  # a group without images would only ever gain weight

    def loss(self, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.model(batch.x), batch.y, reduction="none")
        group_loss, present = group_means(losses, self.group[batch.index], len(self.q))
        self.q = updated(self.q, group_loss.detach() + self.shift, self.config.step_size)
        weights = self.q * present / (self.q * present).sum() if self.config.absent == "renorm" else self.q
        return (weights * (group_loss + self.shift)).sum()

    def state_dict(self) -> dict[str, Any]:
        return {"q": self.q}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.q = state["q"].to(self.q.device)


def group_means(losses: Tensor, group: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Mean loss (num,) of each group in the batch, 0 where it is absent, and which groups are present (num,)."""
    count = torch.zeros(num, device=losses.device).index_add(0, group, torch.ones_like(losses))
    total = torch.zeros(num, device=losses.device).index_add(0, group, losses.float())
    return total / count.clamp(min=1), count > 0


def updated(q: Tensor, group_loss: Tensor, step_size: float) -> Tensor:
    """Exponentiated-gradient step on the group weights (num,)."""
    return torch.softmax(q.log() + step_size * group_loss, dim=0)
