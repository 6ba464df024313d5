"""SUBG: ERM on equally many images of every group, drawn once, the others thrown away."""

import torch

from ..benchmark.annotations import Groups
from ..benchmark.budget import Requires
from ..benchmark.data import Sampler, cycled
from ..benchmark.engine import Objective
from ..benchmark.registry import NoConfig, method
from ..benchmark.spec import Recipe
from ..benchmark.task import Task
from .blocks.balance import balanced_subset


@method(
    "subg",
    paper="Idrissi et al., Simple data balancing achieves competitive worst-group-accuracy, CLeaR 2022",
    requires=Requires(fit="train", native="train+val", classes="class"),
)
class SUBG(Objective[NoConfig]):
    """Every group is cut to the size of the smallest before training, by a draw of its own for each seed.

    On equally large groups it is ERM, bit for bit. Deviations: an epoch passes over the subset as often as makes up n
    images, so that all methods take the same steps (there an epoch is one pass, and there are more of them); the recipe
    is the block's; selection is the rung's.
    """

    def groups(self, task: Task) -> Groups:
        """What is made equally large."""
        return task.groups("train")

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        subset = balanced_subset(self.groups(task), task.rng("subset"))
        return cycled(torch.from_numpy(subset), task.size("train"), recipe)
