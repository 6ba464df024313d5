"""DANN: features from which a discriminator cannot tell the environment."""

from dataclasses import dataclass

from ..benchmark.budget import Requires
from ..benchmark.registry import method
from .blocks.adversary import AdversarialConfig, AdversarialObjective, validate


@dataclass(frozen=True)
class Config(AdversarialConfig):
    """As of every adversarial method."""

    def __post_init__(self) -> None:
        validate("dann", self)


@method(
    "dann",
    paper="Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016 (alternating, as in DomainBed)",
    requires=Requires(fit="train", native="train+val", classes="erm", masked=True),
    config=Config,
)
class DANN(AdversarialObjective[Config]):
    """Two players in turn: `min_D CE(D(h), e) + rho GP`, then `min CE(z, y) - lambda (CE(D(h), e) + rho GP)`.

    Batches hold equally many images of each environment. Under `@masked` the discriminator sees annotated images only.
    `impl=grl` is the paper's form, in which both move in every step; its lambda scales what reaches the classifier
    alone, and `ramp` is the paper's schedule. Deviations: the classifier trains under the block's recipe (in DomainBed
    Adam for both); features are detached in a discriminator's step (there a graph is built and thrown away). As there,
    one step in 1 + d changes the classifier, which `n_updates` in the record counts, but each moves its BatchNorm
    statistics.
    """
