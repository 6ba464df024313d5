"""errors: whether an early ERM gets an image right, which is the error set of JTT as a group."""

from dataclasses import dataclass
from typing import Annotated

from ...benchmark.annotations import Attributes, Held
from ...benchmark.budget import Requires
from ...benchmark.errors import require
from ...benchmark.registry import source
from ...benchmark.search import Search
from ...benchmark.spec import Card, Recipe
from ...benchmark.task import Task
from ..blocks.first_run import misclassified, require_epochs


@dataclass(frozen=True)
class Config:
    """`first_epochs` T is the length of the run whose errors count."""

    first_epochs: Annotated[int, Search("{1,5,10}")] = 1

    def __post_init__(self) -> None:
        require(self.first_epochs >= 1, f"errors.first_epochs must be at least 1, got {self.first_epochs}")

    def check(self, recipe: Recipe, card: Card) -> None:
        """Raise `UserError` unless the first run fits into the recipe."""
        require_epochs("errors.first_epochs", self.first_epochs, recipe)


@source(
    "errors",
    paper="Liu et al., Just Train Twice: Improving Group Robustness without Training Group Information, ICML 2021",
    requires=Requires(native="none"),
    config=Config,
)
class Errors:
    """The block's ERM after T epochs -> right (0) or wrong (1); with the class that makes two groups of every class.

    JTT weights the images that are wrong; a host does with such groups what it does. Errors are those of evaluation
    mode, of validation images too, whose class labels are then looked at. Raises where there is none.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def attributes(self, task: Task, split: Held) -> Attributes:
        """Whether each image of a split is an error, as one pseudo-attribute."""
        wrong = misclassified(task, task.erm(epoch=self.config.first_epochs), split)
        require(
            bool(wrong.any()),
            f"errors: the first run makes no error on {split}, so it tells no groups apart; lower errors.first_epochs",
        )
        return Attributes(wrong[:, None].astype(int), (2,))
