"""ERM: minimise the mean training loss."""

from dataclasses import dataclass

from ..benchmark.registry import method
from ..benchmark.spec import Requires
from ..benchmark.task import Predictor, Task


@method("erm", paper="Vapnik, Statistical Learning Theory, 1998", requires=Requires())
class ERM:
    """Empirical risk minimisation, the unit of every cost ratio.

    The row is the block's shared training, with its epoch selected by the rung's rule; methods that build on ERM start
    from the last epoch of the same training.
    """

    @dataclass(frozen=True)
    class Config:
        """ERM has nothing to set beyond the recipe."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """Select along the shared trajectory."""
        return task.select_erm()
