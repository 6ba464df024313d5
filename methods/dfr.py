"""DFR: refit only the last layer, on group-balanced validation features."""

from dataclasses import dataclass

import numpy as np

from ..benchmark.annotations import Indices
from ..benchmark.budget import Requires
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.spec import derive_seed
from ..benchmark.task import Predictor, Task
from .blocks.balance import balanced_subset
from .blocks.last_layer import Scaler, StandardisedLinear, fit_l1


@dataclass(frozen=True)
class Config:
    """`c_grid`: inverse L1 strengths, tried in this order; `refits`: balanced subsets whose heads are averaged;
    `n_min`: groups of at most this size enter whole but do not shrink the others (0 as published)."""

    c_grid: tuple[float, ...] = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
    refits: int = 20
    n_min: int = 0

    def __post_init__(self) -> None:
        require(len(self.c_grid) > 0 and min(self.c_grid) > 0, f"dfr.c_grid needs positive values, got {self.c_grid}")
        require(self.refits >= 1, f"dfr.refits must be at least 1, got {self.refits}")


@method(
    "dfr",
    paper="Kirichenko et al., Last Layer Re-Training is Sufficient for Robustness to Spurious Correlations, ICLR 2023",
    requires=Requires(fit="val", native="val", classes="class"),
    config=Config,
)
class DFR:
    """Shared ERM -> validation features -> L1 logistic regression on group-balanced subsets.

    C is chosen by fitting on one half of the annotated validation images and scoring the other by the rung's rule; the
    final head is the mean of `refits` heads, each fitted on a balanced subset of all of them. Granted one attribute, it
    balances that one. Deviation: features are standardised by all validation features, in tuning too (the original code
    uses the balanced half there and all train features at the end).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """Tune C, refit, average."""
        checkpoint = task.erm()
        features = task.features(checkpoint, "val").numpy()
        annotated = task.annotated("val")
        y = task.y("val", fit=annotated)
        with task.stage("head") as cost:
            scaler = Scaler.fit(features)
            u = scaler(features)
            rng, seed = task.rng("dfr"), derive_seed(*task.spec.block.stream, "liblinear") % 2**31

            def balanced(rows: Indices) -> Indices:
                return rows[balanced_subset(task.groups("val", rows), rng, self.config.n_min)]

            half, rest = task.halves(annotated)
            tuning = balanced(half)
            heads = [fit_l1(u[tuning], y[tuning], task.num_classes, c, seed) for c in self.config.c_grid]
            best, choice = task.choose([(u @ w.T + b).argmax(1) for w, b in heads], rest)

            c = self.config.c_grid[best]
            subsets = [balanced(annotated) for _ in range(self.config.refits)]
            finals = [fit_l1(u[subset], y[subset], task.num_classes, c, seed) for subset in subsets]
            weight, bias = (np.mean(part, axis=0) for part in zip(*finals, strict=True))
            cost.n_head_fits += len(heads) + len(finals)
        return Predictor(checkpoint, choice, StandardisedLinear(scaler, weight, bias))
