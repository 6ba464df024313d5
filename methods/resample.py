"""ReSample: ERM on batches in which every group is equally likely."""

from ..benchmark.budget import Requires
from ..benchmark.engine import Objective
from ..benchmark.registry import NoConfig, method


@method(
    "resample",
    paper="Idrissi et al., Simple data balancing achieves competitive worst-group-accuracy, CLeaR 2022 (there RWG)",
    requires=Requires(fit="train", native="train+val", classes="class"),
)
class ReSample(Objective[NoConfig]):
    """Draw n images an epoch with replacement, P(i) proportional to 1/n_g; the loss is plain cross-entropy.

    The expected batch loss is the group-balanced mean, which makes this the control for every method with that sampler.
    """

    sampler = "uniform_group"
