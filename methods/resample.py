"""ReSample: ERM on batches in which every group is equally likely."""

from dataclasses import dataclass

from ..benchmark.engine import Objective
from ..benchmark.registry import method
from ..benchmark.spec import Requires


@dataclass(frozen=True)
class Config:
    """ReSample has nothing to set beyond the recipe."""


@method(
    "resample",
    paper="Idrissi et al., Simple data balancing achieves competitive worst-group-accuracy, CLeaR 2022 (there RWG)",
    requires=Requires(fit="train", native="train+val", class_fallback=True),
)
class ReSample(Objective[Config]):
    """Draw n images an epoch with replacement, P(i) proportional to 1/n_g; the loss is plain cross-entropy.

    The expected batch loss is the group-balanced mean, which makes this the control for every method with that sampler.
    """

    Config = Config
    sampler = "uniform_group"
