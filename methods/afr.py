"""AFR: refit the last layer on held-out train images, those that ERM is unsure of weighing most."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from ..benchmark.annotations import Indices
from ..benchmark.budget import Requires
from ..benchmark.engine import Objective, autocast
from ..benchmark.errors import require
from ..benchmark.lab import Arrays
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.task import Checkpoint, Predictor, Task

SHARE = 0.8
"""Share of train that the first stage trains on."""


@dataclass(frozen=True)
class Config:
    """`gamma` is how fast an image's weight falls with ERM's probability of its class, `lam` lambda of the penalty on
    leaving ERM's head, `lr` of the gradient descent and how many `steps` it takes; the head after every `every` steps
    is a candidate, and so is ERM's."""

    gamma: Annotated[float, Search("{4,6,8,10,12,14,16,18,20,1,1.5,2,2.5,3}")] = 4.0
    lam: Annotated[float, Search("{0,0.001,0.01,0.1,0.3}")] = 0.0
    lr: float = 0.01
    steps: int = 500
    every: int = 10

    def __post_init__(self) -> None:
        for name in ("gamma", "lam", "steps"):
            require(getattr(self, name) >= 0, f"afr.{name} must be at least 0, got {getattr(self, name)}")
        require(self.lr > 0, f"afr.lr must be positive, got {self.lr}")
        require(self.every >= 1, f"afr.every must be at least 1, got {self.every}")


@method(
    "afr",
    paper="Qiu et al., Simple and Fast Group Robustness by Automatic Feature Reweighting, ICML 2023",
    requires=Requires(native="select"),
    config=Config,
)
class AFR:
    """ERM on 80 % of train -> features of the other 20 % -> `min sum_i mu_i CE_i + lambda |theta - theta_ERM|^2`.

    `mu_i` falls as `exp(-gamma p_i)` with the probability p_i that ERM gives the image's class, is divided by the size
    of that class, and stays as it is. theta are weights and biases of the head, from ERM's on, by gradient descent on
    all images at once, with the gradient's norm clipped at 1 (script and README of the released code, not the notebook,
    which puts a random layer on top of the logits). Features are not standardised.

    Deviations: the 80 % are drawn class by class and anew for every seed (there from all of train, the same for all
    seeds); the first stage has the block's recipe, and all settings share it; every tenth step is a candidate of the
    rung's rule (there every step, by validation groups).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """Both stages."""
        first, rest = split_by_class(task.y("train"), SHARE, task.rng("erm80"))
        erm, held_out = erm_of(task.part(first)), task.part(rest)
        features = torch.from_numpy(held_out.cached("afr", erm.key, lambda: features_of(held_out, erm))["features"])
        with task.stage("head") as cost:
            x, y = features.to(task.device), torch.from_numpy(held_out.y("train")).to(task.device)
            weights = confidence_weights(erm.model.head(x), y, self.config.gamma)
            heads = list(descend(erm.model.head, x, y, weights, self.config))
            cost.n_head_fits += 1
        seen = task.features(erm, "val")
        best, choice = task.choose(predicted(head, seen) for head in heads)
        return Predictor(erm, choice, heads[best])


def split_by_class(y: NDArray[np.int64], share: float, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Positions in two, sorted: this share of every class, and the others."""
    order = rng.permutation(len(y))
    classes = [order[y[order] == label] for label in np.unique(y)]
    first = np.sort(np.concatenate([members[: round(share * len(members))] for members in classes]))
    return first, np.setdiff1d(order, first)


def erm_of(task: Task) -> Checkpoint:
    """ERM on the images of the task, trained once for all runs of the block."""

    def make() -> Checkpoint:
        return task.train_network(Objective(None), task.initial().model, "erm80")

    return task.shared_network("erm80", None, make)


def features_of(task: Task, checkpoint: Checkpoint) -> Arrays:
    """Features (n, d) of the images of the task alone."""
    model = checkpoint.model.eval()
    with torch.no_grad(), autocast(task.recipe, task.device):
        batches = [model.features(x).float().cpu() for x in task.images("train")]
    return {"features": torch.cat(batches).numpy()}


def confidence_weights(logits: Tensor, y: Tensor, gamma: float) -> Tensor:
    """`mu` (n,), in proportion to `exp(-gamma p_i) / n_{y_i}`, with the sum 1."""
    p = logits.detach().softmax(1).gather(1, y[:, None])[:, 0]
    weights = (-gamma * p).exp() / y.bincount()[y]
    return weights / weights.sum()


def descend(start: nn.Linear, x: Tensor, y: Tensor, weights: Tensor, config: Config) -> Iterator[nn.Linear]:
    """Heads after 0, `every`, 2 `every`, ... and all steps on features x (n, d) with weights (n,), on the CPU."""
    origin = theta = [parameter.detach() for parameter in (start.weight, start.bias)]
    for step in range(config.steps):
        if step % config.every == 0:
            yield linear(*theta)
        now = [parameter.requires_grad_() for parameter in map(torch.clone, theta)]
        losses = F.cross_entropy(F.linear(x, *now), y, reduction="none")
        away = sum(((part - then) ** 2).sum() for part, then in zip(now, origin, strict=True))
        slopes = torch.autograd.grad((weights * losses).sum() + config.lam * away, now)
        norm = torch.cat([slope.flatten() for slope in slopes]).norm()
        rate = config.lr * (1 / norm).clamp(max=1)
        theta = [part - rate * slope for part, slope in zip(theta, slopes, strict=True)]
    yield linear(*theta)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """The layer with this weight (K, d) and bias (K,), on the CPU."""
    layer: nn.Linear = skip_init(nn.Linear, weight.shape[1], weight.shape[0])  # type: ignore[no-untyped-call]
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@torch.no_grad()
def predicted(head: nn.Linear, features: Tensor) -> NDArray[np.int64]:
    """Predicted classes (n,)."""
    classes: NDArray[np.int64] = head(features).argmax(1).numpy()
    return classes
