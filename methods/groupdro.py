"""GroupDRO: minimise the loss under exponentiated-gradient weights over groups."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.annotations import Groups
from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.task import Task


@dataclass(frozen=True)
class Config:
    """`step_size` is eta; `adjustment` C adds C/sqrt(n_g) to every group's loss. Groups that a batch lacks (`absent`)
    count with a loss of 0 and their adjustment (`ignore`, as released), or are left out of the batch's loss, whose
    weights are then renormalised (`renorm`)."""

    step_size: Annotated[float, Search("10^U(-3,-1)")] = 0.01
    adjustment: Annotated[float, Search("{0,1,2,3,4,5}")] = 0.0
    absent: Literal["ignore", "renorm"] = "ignore"

    def __post_init__(self) -> None:
        validate("groupdro", self)


def validate(method: str, config: Config) -> None:
    """Raise `UserError` for values that cannot be meant; `method` is the prefix of their keys."""
    for name in ("step_size", "adjustment"):
        require(getattr(config, name) >= 0, f"{method}.{name} must be at least 0, got {getattr(config, name)}")


@method(
    "groupdro",
    paper="Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, ICLR 2020",
    requires=Requires(fit="train", native="train+val", classes="class"),
    config=Config,
)
class GroupDRO(Objective[Config]):
    """Per batch: `q_g <- q_g exp(eta * loss_g)`, normalised, then the loss is `sum_g q_g loss_g` with the new q.

    Groups are drawn equally often, as in the paper (at random in SubpopBench). Deviations: the recipe is the block's,
    not the paper's strong weight decay; selection is the rung's; a group without a train image has no weight (there it
    keeps 1/G, which shrinks the loss); q is kept as a logarithm, so that a weight can return from what would round to
    0. Of the released options, automatic adjustment is not included, because it fits on the losses of validation
    groups, whose labels are there to select by, nor is `btl`, which is another objective: a CVaR over groups.
    """

    sampler = "uniform_group"

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        groups = self.groups(task)
        self.group = torch.from_numpy(groups.index).to(task.device)
        sizes = torch.from_numpy(groups.counts()).to(task.device)
        self.shift = self.config.adjustment / sizes.clamp(min=1).float().sqrt()
        self.log_q = torch.log_softmax((sizes > 0).float().log(), dim=0)  # -inf for a group without images, for good

    def groups(self, task: Task) -> Groups:
        """Groups of the images trained on; override to infer them."""
        return task.groups("train")

    def loss(self, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.model(batch.x), batch.y, reduction="none")
        group_loss, present = group_means(losses, self.group[batch.index], len(self.log_q))
        self.log_q = updated(self.log_q, group_loss.detach() + self.shift, self.config.step_size)
        counted = self.log_q if self.config.absent == "ignore" else self.log_q.masked_fill(~present, -torch.inf)
        return (counted.softmax(dim=0) * (group_loss + self.shift)).sum()

    def state_dict(self) -> dict[str, Any]:
        return {"log_q": self.log_q}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log_q = state["log_q"].to(self.log_q.device)


def group_means(losses: Tensor, group: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Mean loss (num,) of each group in the batch, 0 where it is absent, and which groups are present (num,)."""
    count = torch.zeros(num, device=losses.device).index_add(0, group, torch.ones_like(losses))
    total = torch.zeros(num, device=losses.device).index_add(0, group, losses.float())
    return total / count.clamp(min=1), count > 0


def updated(log_q: Tensor, group_loss: Tensor, step_size: float) -> Tensor:
    """Exponentiated-gradient step on the logarithms of the group weights (num,)."""
    return torch.log_softmax(log_q + step_size * group_loss, dim=0)
