"""CB-LLR: train the last layer anew on half of validation, with every class equally likely."""

from dataclasses import dataclass
from typing import Annotated

from ..benchmark.budget import Requires
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.task import Predictor, Task
from .blocks.retraining import BASES, Base, ClassBalanced, base_network, head_recipe, pool_and_rest, retrained


@dataclass(frozen=True)
class Config:
    """`lr` and `epochs` of the last layer's SGD; its features are those of `base`: the block's ERM (`erm`), or one that
    draws the classes equally (`class_balanced`)."""

    lr: Annotated[float, Search("{0.003,0.001,0.01}")] = 3e-3
    epochs: int = 100
    base: Base = "erm"

    def __post_init__(self) -> None:
        require(self.lr > 0, f"cbllr.lr must be positive, got {self.lr}")
        require(self.epochs >= 1, f"cbllr.epochs must be at least 1, got {self.epochs}")
        require(self.base in BASES, f"cbllr.base must be one of {', '.join(BASES)}, got {self.base!r}")


@method(
    "cbllr",
    paper="LaBonte et al., Towards Last-layer Retraining for Group Robustness with Fewer Annotations, NeurIPS 2023",
    requires=Requires(native="select", uses_val=True),
    config=Config,
)
class CBLLR:
    """Network -> features of validation -> a new last layer, by SGD on class-balanced batches of one half.

    The half's class labels are billed; the other half selects the epoch by the rung. No attribute is fitted on.
    Deviations: features are those of the evaluation transform, computed once in evaluation mode (there images are
    augmented, and BatchNorm trains on); the momentum of 0.9 is in effect (there it is set where PyTorch does not look);
    the network is plain ERM by default (there class-balanced); halves are drawn by class, images with attributes go to
    the one that selects; batch size and weight decay are the block's.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        """Network, then its last layer."""
        network = base_network(task, self.config.base)
        recipe = head_recipe(task.recipe, self.config.lr, self.config.epochs)
        return retrained(task, ClassBalanced(recipe), network, pool_and_rest(task), recipe, fresh=True)
