"""What a leaderboard shows: tables of rows, as plain values without any formatting."""

from dataclasses import dataclass, field
from typing import Any

from .statistics import Estimate


@dataclass(frozen=True)
class Difference:
    """A paired difference with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class CostRatio:
    """Cost relative to the block's ERM on the same device; `same_session` says whether both were measured together.

    `search` is what all draws of the search cost that the settings come from, 0 without one.
    """

    marginal: float
    scratch: float
    same_session: bool
    search: float = 0.0


@dataclass(frozen=True)
class GroupResult:
    """Accuracy of one true group, mean over seeds with its 95 % interval; None where the test set has none of it."""

    name: str
    n_train: int
    m_test: int
    accuracy: Estimate | None


@dataclass(frozen=True)
class RunResult:
    """One seed: what it scored, the Wilson interval of its worst group, and which group that is.

    `step` is the epoch that the budget's rule chose, None for a model that is not one of several epochs.
    """

    seed: int
    run: str
    wga: float
    wilson: tuple[float, float]
    worst_group: str
    acc_mean: float
    step: int | None
    device_s: float | None


@dataclass
class Row:
    """One method at one budget over its seeds, or the `reason` why it is not run there."""

    method: str
    budget: str
    tag: str
    seeds: tuple[int, ...]
    labels: int
    metrics: dict[str, Estimate | None]
    versus_erm: dict[str, Difference] = field(default_factory=dict)
    versus_best: Difference | None = None
    """In worst-group accuracy, to the best row of its budget; None for that row itself."""
    rank: int | None = None
    """1 + the rows of its budget that are better beyond the interval of the paired difference."""
    cost: CostRatio | None = None
    reason: str = ""
    held: dict[str, Estimate | None] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    """Of the source's groups with the true ones, mean over seeds; empty for a row without a source."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of method and source, and those of the recipe that a search found."""
    searched: bool = False
    rendered: int = 0
    """Images with a shortcut replaced that it trained on: no labels, but privileged."""
    host: str = ""
    source: str = ""
    from_counts: bool = False
    """Whether intervals are from group counts, the answers being kept back: they are wider then."""
    groups: list[GroupResult] = field(default_factory=list)
    runs: list[RunResult] = field(default_factory=list)
    curve: list[list[float | None]] = field(default_factory=list)
    """Validation accuracy by epoch and group, mean over seeds; groups in the order of `groups`."""

    def settings_text(self) -> str:
        """`step_size=0.1 recipe.lr=0.003`."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items()).replace(", ", ",")

    def amplified(self, gap: str) -> bool:
        """Whether a gap is wider than ERM's beyond its interval (the Whac-A-Mole effect)."""
        return gap in self.versus_erm and self.versus_erm[gap].high < 0


@dataclass(frozen=True)
class Resolution:
    """What the smallest test group can tell: its images, what one of them is worth, and what two standard errors are
    worth at the accuracy of the table's best worst group.
    """

    group: str
    images: int
    one_image: float
    accuracy: float
    two_errors: float


@dataclass
class Table:
    """One block: what its rows share, its gap columns, and the rows from poorest to richest budget, best first."""

    protocol: str
    dataset: str
    fingerprint: str
    backbone: str
    weights: str
    recipe: dict[str, Any]
    gaps: list[str]
    rows: list[Row]
    device: str
    resolution: Resolution | None = None
