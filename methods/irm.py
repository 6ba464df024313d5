"""IRM: one classifier that every environment would leave as it is."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.environments import EnvConfig
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.task import Task
from .blocks.environments import EnvironmentObjective, membership
from .blocks.precision import wide

Estimator = Literal["split", "full"]


@dataclass(frozen=True)
class Config(EnvConfig):
    """`weight` lambda of the penalty from step `anneal_steps` on; before, it is 1. `estimator` of a squared derivative:
    the product of its means over every other image and over the rest (`split`: unbiased, may be negative), or the
    square of its mean (`full`).
    """

    weight: Annotated[float, Search("10^U(-1,5)")] = 100.0
    anneal_steps: Annotated[int, Search("10^U(0,4)")] = 500
    estimator: Estimator = "split"

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"irm.weight must be at least 0, got {self.weight}")
        require(self.anneal_steps >= 0, f"irm.anneal_steps must be at least 0, got {self.anneal_steps}")


@method(
    "irm",
    paper="Arjovsky et al., Invariant Risk Minimization, arXiv 1907.02893 (IRMv1, as in DomainBed)",
    requires=Requires(fit="train", native="train+val", masked=True),
    config=Config,
)
class IRM(EnvironmentObjective[Config]):
    """`mean_e (R_e + lambda_t D_e)`, `D_e = (d R_e(s z) / ds at s = 1)^2`: how much e would rescale the logits z.

    As in DomainBed, Adam forgets its moments when lambda sets in, since the gradient jumps; here SGD its momentum too.
    An environment with one image in the batch has no `split` penalty. Under `@masked` the risk is the mean over all
    images, the penalty is of annotated ones. Deviation: the derivative in closed form (there by a second backward).
    """

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.steps = 0

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        if self.steps == self.config.anneal_steps:
            for optimizer in optimizers.values():
                optimizer.state.clear()
        loss = super().step(batch, optimizers)
        self.steps += 1
        return loss

    def loss(self, batch: Batch) -> Tensor:
        logits, e = self.model(batch.x), self.e[batch.index]
        risk = self.risk(F.cross_entropy(logits, batch.y, reduction="none"), batch.index)
        weight = self.config.weight if self.steps >= self.config.anneal_steps else 1.0
        return risk + weight * penalty(slopes(logits, batch.y), membership(e, self.num_envs), self.config.estimator)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def slopes(logits: Tensor, y: Tensor) -> Tensor:
    """`d CE(s z, y) / ds` at s = 1 of each image (B,), which is `sum_k softmax(z)_k z_k - z_y`."""
    logits = wide(logits)
    return (logits.softmax(1) * logits).sum(1) - logits.gather(1, y[:, None])[:, 0]


def penalty(slopes: Tensor, member: Tensor, estimator: Estimator) -> Tensor:
    """Mean of `D_e` over the environments in the batch, of derivatives (B,) and their membership (E, B)."""
    even = odd = member
    if estimator == "split":
        odd = member & (member.cumsum(1) % 2 == 0)  # of the environment's images in order: 1, 3, ... counted from 0
        even = member & ~odd
    first, second = ((part * slopes).sum(1) / part.sum(1).clamp(min=1) for part in (even, odd))
    return (first * second).sum() / member.any(1).sum().clamp(min=1)
