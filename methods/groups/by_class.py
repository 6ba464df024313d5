"""class: no attribute at all, so that groups are classes: the control that every source has to beat."""

from ...benchmark.annotations import Attributes, Held
from ...benchmark.budget import Requires
from ...benchmark.registry import NoConfig, source
from ...benchmark.task import Task


@source("class", paper="control", requires=Requires(native="none"))
class ByClass:
    """Groups are classes, as under `HOST@class`; a host that fits on no groups selects by them."""

    def __init__(self, config: NoConfig) -> None:
        self.config = config

    def attributes(self, task: Task, split: Held) -> Attributes:
        """No attribute of any image."""
        return Attributes.none(task.size(split))
