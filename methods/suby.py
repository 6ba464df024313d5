"""SUBY: ERM on equally many images of every class, drawn once, the others thrown away."""

from ..benchmark.annotations import Groups
from ..benchmark.budget import Requires
from ..benchmark.registry import method
from ..benchmark.task import Task
from .subg import SUBG


@method(
    "suby",
    paper="Idrissi et al., Simple data balancing achieves competitive worst-group-accuracy, CLeaR 2022",
    requires=Requires(native="select"),
)
class SUBY(SUBG):
    """SUBG with classes for groups: what SUBG does without an attribute, at every budget."""

    def groups(self, task: Task) -> Groups:
        return Groups(task.y("train"), task.num_classes)
