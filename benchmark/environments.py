"""What an environment is, as a setting that methods which compare environments share."""

from dataclasses import dataclass, replace
from typing import Literal

from .budget import Requires
from .errors import require
from .spec import Card, Recipe

EnvDefinition = Literal["native", "attribute", "group"]


@dataclass(frozen=True)
class EnvConfig:
    """`env` defines environments: the dataset's own (`native`, which cost no attribute label), the joint values of the
    granted attributes (`attribute`), or the groups of class and attributes (`group`).
    """

    env: EnvDefinition = "attribute"

    def check(self, recipe: Recipe, card: Card) -> None:
        """Raise `UserError` where native environments are asked of a dataset that has none."""
        require(
            self.env != "native" or bool(card.environments),
            f"env=native: {card.name} comes without training environments; set env=attribute or env=group",
        )

    def requires(self, declared: Requires) -> Requires:
        """Native environments are metadata: no attribute goes into fitting, and classes cannot take their place."""
        return replace(declared, fit="none", native="none", classes="n/a") if self.env == "native" else declared
