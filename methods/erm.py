"""ERM: minimise the mean training loss."""

from ..benchmark.budget import Requires
from ..benchmark.registry import NoConfig, method
from ..benchmark.task import Predictor, Task


@method("erm", paper="Vapnik, Statistical Learning Theory, 1998", requires=Requires())
class ERM:
    """Empirical risk minimisation, the unit of every cost ratio.

    The row is the block's shared training, with its epoch selected by the rung's rule; methods that build on ERM start
    from the last epoch of the same training.
    """

    def __init__(self, config: NoConfig) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """Select along the shared trajectory."""
        return task.select_erm()
