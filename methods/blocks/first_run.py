"""The block's ERM after its first epochs, which tells images apart by whether it gets them right."""

import numpy as np
from numpy.typing import NDArray

from ...benchmark.annotations import Held
from ...benchmark.errors import require
from ...benchmark.spec import Recipe
from ...benchmark.task import Checkpoint, Task


def require_epochs(setting: str, epochs: int, recipe: Recipe) -> None:
    """Raise `UserError` unless a first run of so many epochs, as `setting` says, is a prefix of the recipe's."""
    require(epochs <= recipe.epochs, f"{setting} must be at most the recipe's {recipe.epochs} epochs, got {epochs}")


def misclassified(task: Task, first: Checkpoint, split: Held) -> NDArray[np.bool_]:
    """Images (n,) that a network gets wrong in evaluation mode."""
    wrong: NDArray[np.bool_] = task.logits(first, split).argmax(1).numpy() != task.y(split)
    return wrong
