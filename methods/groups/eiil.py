"""eiil: the two environments on which the logits of an early ERM would be rescaled most differently."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...benchmark.annotations import Attributes, Held
from ...benchmark.budget import Requires
from ...benchmark.errors import require
from ...benchmark.registry import source
from ...benchmark.search import Search
from ...benchmark.spec import Card, Recipe
from ...benchmark.task import Task
from ..blocks.first_run import require_epochs
from ..irm import slopes

STEPS = 10_000
LR = 1e-3


@dataclass(frozen=True)
class Config:
    """`reference_epochs` T is the length of the reference run; `solver` takes the optimum as it is (`closed`), or looks
    for it as released (`adam`), which comes close to it for few images only."""

    reference_epochs: Annotated[int, Search("{1,2,5}")] = 1
    solver: Literal["closed", "adam"] = "closed"

    def __post_init__(self) -> None:
        require(self.reference_epochs >= 1, f"eiil.reference_epochs must be at least 1, got {self.reference_epochs}")
        require(self.solver in ("closed", "adam"), f"eiil.solver must be closed or adam, got {self.solver!r}")

    def check(self, recipe: Recipe, card: Card) -> None:
        """Raise `UserError` unless the reference run fits into the recipe."""
        require_epochs("eiil.reference_epochs", self.reference_epochs, recipe)


@source(
    "eiil",
    paper="Creager et al., Environment Inference for Invariant Learning, ICML 2021",
    requires=Requires(native="none"),
    config=Config,
)
class EIIL:
    """The block's ERM after T epochs -> `max_q sum_y J_y(q)` -> the environments q = 0 and q = 1 of every class.

    J is the squared IRMv1 penalty of a class's images, shared out by q between two environments. It is convex in
    `sum_i q_i g_i`, where g is the derivative of an image's loss by a factor on its logits, so its maximum is at
    `q_i = [g_i > 0]` or the complement: for two classes the images that are wrong (JTT's error set), for more a part of
    those. The row EIIL of later papers is `groupdro+eiil`.

    Deviations: `closed` takes that maximum (the released 10,000 steps of Adam reach it for 1,000 images; for 160,000
    most gradients fall below Adam's epsilon and most images stay where they started); J is that of each class, as in
    Whac-A-Mole's port (originally of all images); environments are numbered so that g is larger in 1; groups are of
    class and environment, as in that port (the original learner, IRM, compares the two environments: `irm+eiil`).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def attributes(self, task: Task, split: Held) -> Attributes:
        """Environment of every image of a split, as one pseudo-attribute."""
        y = torch.from_numpy(task.y(split))
        g = derivatives(task.logits(task.erm(epoch=self.config.reference_epochs), split), y)
        both = bool((g > 0).any() and not (g > 0).all())
        require(
            both,
            f"eiil: on {split} the reference is right, or wrong, about all images, so one environment is empty; "
            "change eiil.reference_epochs",
        )
        found = (g > 0).numpy() if self.config.solver == "closed" else self.solved(task, split, g, y)
        return Attributes(found[:, None].astype(int), (2,))

    def solved(self, task: Task, split: Held, g: Tensor, y: Tensor) -> NDArray[np.bool_]:
        """Environments (n,) that Adam finds, computed once."""

        def solve() -> dict[str, NDArray[np.bool_]]:
            with task.seeded("eiil"):
                start = torch.randn(len(g))
            return {"environment": by_adam(g.float(), y, start).numpy()}

        return task.cached("environments", {**asdict(self.config), "split": split}, solve)["environment"]


def derivatives(logits: Tensor, y: Tensor) -> Tensor:
    """`d CE(s z, y) / ds` at s = 1 of each image (n,), in float64.

    From logits less that of the true class: with two classes the sign is then exactly that of an error.
    """
    logits = logits.double()
    return slopes(logits - logits.gather(1, y[:, None]), y)


def shares(g: Tensor, y: Tensor) -> Tensor:
    """`g_i / N_y` of each image (K, n) in the row of its class, 0 in the others, of derivatives and labels (n,)."""
    member = F.one_hot(y).T
    return member * g / member.sum(1, keepdim=True).clamp(min=1)


def violation(q: Tensor, shares: Tensor) -> Tensor:
    """J, summed over classes: `((sum_i q_i g_i / N_y)^2 + (sum_i (1 - q_i) g_i / N_y)^2) / 2`, of q (n,)."""
    first = shares @ q
    return (first.square() + (shares.sum(1) - first).square()).sum() / 2


def violation_slope(q: Tensor, shares: Tensor) -> Tensor:
    """`dJ / dw` (n,) for q = sigmoid(w): in closed form, which takes half the time of a backward pass."""
    return (2 * (shares @ q) - shares.sum(1)) @ shares * q * (1 - q)


def by_adam(g: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """Environments (n,) of derivatives and labels (n,), after 10,000 steps of Adam on w from `start`, q = sigmoid(w).

    In every class 1 is the one of larger derivatives.
    """
    share, w = shares(g, y), start.clone()
    optimizer = torch.optim.Adam([w], lr=LR, maximize=True)
    for _ in range(STEPS):
        w.grad = violation_slope(w.sigmoid(), share)
        optimizer.step()
    q = (w > 0).to(share)
    swapped = share @ q < share @ (1 - q)
    return (q == 1) ^ swapped[y]
