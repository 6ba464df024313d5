"""BARACK: GroupDRO on groups that are known for some images and predicted for the others."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.annotations import Groups
from ..benchmark.budget import Requires
from ..benchmark.data import Sampler, weighted
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.spec import Recipe
from ..benchmark.task import Task
from . import groupdro
from .groups.predictor import attribute_logits


@dataclass(frozen=True)
class Config(groupdro.Config):
    """As of GroupDRO; `adjustment` alone is searched, `step_size` is not."""

    step_size: float = 0.01
    adjustment: Annotated[float, Search("{0,1,2,3}")] = 0.0

    def __post_init__(self) -> None:
        groupdro.validate("barack", self)


@method(
    "barack",
    paper="Sohoni et al., BARACK: Partially Supervised Group Robustness With Guarantees, ICML 2022 workshop SCIS",
    requires=Requires(fit="val", native="train-33"),
    config=Config,
)
class BARACK(groupdro.GroupDRO):
    """A network that predicts attributes, trained on the annotated images -> groups of all -> GroupDRO.

    The predictor is that of `@pseudo` on draws in which every class is as likely as the others, and in a class every
    group. It is not told the class: an image gets the likeliest attributes among those that annotated images of its
    class have, so no group is made up; where they have but one value the class is one group. Annotated images keep
    their own. Where all are annotated, nothing is predicted, and this is GroupDRO.

    Only the abstract of the paper was to be had, and no code: beyond its two steps all of this is a reconstruction. It
    learns from all granted images, of validation too, so that it runs where those are all there is (there from a part
    of train); no part of them is held out to stop the predictor early; the block's recipe for both networks; selection
    by the rung.
    """

    def groups(self, task: Task) -> Groups:
        known = task.annotated("train")
        if len(known) == task.size("train"):
            return task.groups("train")
        y, rows = task.y("train"), task.annotated("val")
        ours, others = task.attributes("train", known), task.attributes("val", rows)
        own = ours.joint()
        seen = np.zeros((task.num_classes, own.num), dtype=bool)
        seen[y[known], own.index] = True
        seen[task.y("val", fit=rows)[rows], others.joint().index] = True
        logits = torch.from_numpy(attribute_logits(task, balanced=True)["train"])
        value = likeliest(joint_scores(logits, ours.sizes).numpy(), seen[y])
        value[known] = own.index
        return Groups(y * own.num + value, task.num_classes * own.num)

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        group = self.group.cpu()
        return weighted(1 / group.bincount()[group].double(), recipe)


def joint_scores(logits: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Log-probabilities (n, S_1 * .. * S_k) of all combinations of k attributes from their logits (n, S_1 + .. + S_k).

    The last attribute varies fastest, as in `Attributes.joint`.
    """
    first, *others = (F.log_softmax(part, dim=1) for part in logits.split(sizes, dim=1))  # type: ignore[no-untyped-call]
    for part in others:
        first = (first[:, :, None] + part[:, None]).flatten(1)
    return first


def likeliest(scores: NDArray[np.float32], possible: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Column (n,) of the highest score (n, V) among the possible ones of each row; 0 where none is."""
    best: NDArray[np.int64] = np.where(possible, scores, -np.inf).argmax(axis=1)
    return best
