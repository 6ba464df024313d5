"""RWY: ERM on batches in which every class is equally likely."""

from ..benchmark.budget import Requires
from ..benchmark.engine import Objective
from ..benchmark.registry import NoConfig, method


@method(
    "rwy",
    paper="Idrissi et al., Simple data balancing achieves competitive worst-group-accuracy, CLeaR 2022",
    requires=Requires(native="select"),
)
class RWY(Objective[NoConfig]):
    """Draw n images an epoch with replacement, P(i) proportional to 1/n_y; the loss is plain cross-entropy.

    ReSample is its variant for groups (there RWG). Deviations: the recipe is the block's; selection is the rung's.
    """

    sampler = "class"
