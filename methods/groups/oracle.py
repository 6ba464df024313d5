"""oracle: the true attributes, as a check of what a host does with the groups that a source gives it."""

from ...benchmark.annotations import Attributes, Held
from ...benchmark.budget import Requires
from ...benchmark.registry import NoConfig, source
from ...benchmark.task import Task


@source("oracle", paper="control", requires=Requires(fit="host", native="train+val"))
class Oracle:
    """What the budget grants, handed on: `HOST+oracle` is HOST with all its attributes, bit for bit."""

    def __init__(self, config: NoConfig) -> None:
        self.config = config

    def attributes(self, task: Task, split: Held) -> Attributes:
        """True attributes of every image of a split; raises `BudgetExceeded` where the budget does not grant them."""
        return task.attributes(split)
