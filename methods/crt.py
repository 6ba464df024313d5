"""CRT: retrain the classifier of a frozen ERM, with every group equally likely."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from ..benchmark.budget import Requires
from ..benchmark.engine import Objective
from ..benchmark.errors import require
from ..benchmark.registry import NoConfig, method
from ..benchmark.search import Search
from ..benchmark.task import Predictor, Task
from . import reweight
from .resample import ReSample
from .reweight import ReWeight

VARIANTS: dict[str, Callable[[], Objective[Any]]] = {
    "resample": lambda: ReSample(NoConfig()),
    "reweight": lambda: ReWeight(reweight.Config()),
    "vanilla": lambda: Objective(None),
}
"""What the classifier minimises."""


@dataclass(frozen=True)
class Config:
    """`variant` makes groups count equally by drawing them equally often (`resample`) or by weighting their losses
    (`reweight`), or leaves them as they are (`vanilla`, a control that needs no attribute); `lr` of the classifier
    (None: the recipe's, which was made for whole networks)."""

    variant: Literal["resample", "reweight", "vanilla"] = "resample"
    lr: Annotated[float | None, Search("10^U(-1,2)", of="lr")] = None  # the range is ours: the source has none

    def __post_init__(self) -> None:
        known = ", ".join(VARIANTS)
        require(self.variant in VARIANTS, f"crt.variant must be one of {known}, got {self.variant!r}")
        require(self.lr is None or self.lr > 0, f"crt.lr must be positive, got {self.lr}")

    def requires(self, declared: Requires) -> Requires:
        """The control fits on no attribute."""
        return Requires() if self.variant == "vanilla" else declared


@method(
    "crt",
    paper="Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020 "
    "(with groups, as in SubpopBench)",
    requires=Requires(fit="train", native="train+val", classes="class"),
    config=Config,
)
class CRT:
    """Shared ERM -> train features -> a new linear classifier under ReSample's, ReWeight's or ERM's loss.

    The classifier trains under the block's recipe, its epoch is selected by the rung. Deviations: features
    are those of the evaluation transform and computed once (there images are augmented anew in every epoch), hence
    cached ones cost no pass; the first stage is the ERM of the run's own seed (in SubpopBench always that of seed 0).
    Where groups are classes this is the original method, with balanced classes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """ERM, then its classifier anew."""
        recipe = replace(task.recipe, lr=self.config.lr or task.recipe.lr)
        return task.train_head(VARIANTS[self.config.variant](), task.erm(), recipe=recipe, fresh=True)
