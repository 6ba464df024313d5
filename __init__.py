"""worstgroup: one protocol, one engine and honest budgets for methods that resist spurious correlations.

Importing this package is cheap: torch is imported only when a name that needs it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark.annotations import Attributes, Groups
    from .benchmark.budget import Budget, Requires
    from .benchmark.data import Batch, Split, Splits
    from .benchmark.engine import Objective
    from .benchmark.errors import UserError
    from .benchmark.record import RunRecord
    from .benchmark.registry import backbone, dataset, method, source
    from .benchmark.runner import run
    from .benchmark.search import Search
    from .benchmark.spec import Attribute, Card, Recipe, RunSpec
    from .benchmark.task import Predictor, Task
    from .leaderboard.verify import verify

_HOMES = {
    "Attributes": "benchmark.annotations",
    "Groups": "benchmark.annotations",
    "Batch": "benchmark.data",
    "Split": "benchmark.data",
    "Splits": "benchmark.data",
    "Objective": "benchmark.engine",
    "UserError": "benchmark.errors",
    "RunRecord": "benchmark.record",
    "Search": "benchmark.search",
    "backbone": "benchmark.registry",
    "dataset": "benchmark.registry",
    "method": "benchmark.registry",
    "source": "benchmark.registry",
    "run": "benchmark.runner",
    "Attribute": "benchmark.spec",
    "Budget": "benchmark.budget",
    "Card": "benchmark.spec",
    "Recipe": "benchmark.spec",
    "Requires": "benchmark.budget",
    "RunSpec": "benchmark.spec",
    "Predictor": "benchmark.task",
    "Task": "benchmark.task",
    "verify": "leaderboard.verify",
}

__all__ = [
    "Attribute",
    "Attributes",
    "Batch",
    "Budget",
    "Card",
    "Groups",
    "Objective",
    "Predictor",
    "Recipe",
    "Requires",
    "RunRecord",
    "RunSpec",
    "Search",
    "Split",
    "Splits",
    "Task",
    "UserError",
    "backbone",
    "dataset",
    "method",
    "run",
    "source",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("worstgroup")
    if name not in _HOMES:
        raise AttributeError(f"module 'worstgroup' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
