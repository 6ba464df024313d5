"""DANN: features from which a discriminator cannot tell the environment."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.environments import EnvConfig
from ..benchmark.errors import require
from ..benchmark.registry import method
from ..benchmark.spec import Recipe
from ..benchmark.task import Task
from .blocks.environments import EnvironmentObjective


@dataclass(frozen=True)
class Config(EnvConfig):
    """`weight` lambda of the adversary; `disc_steps` d discriminator steps for each step of the classifier;
    `grad_penalty` rho on the discriminator's input gradient; `disc_lr` (None: the recipe's), `disc_weight_decay` and
    `beta1` of the discriminator's Adam; `width`, `depth` and `dropout` of the discriminator."""

    weight: float = 1.0
    disc_steps: int = 1
    grad_penalty: float = 0.0
    disc_lr: float | None = None
    disc_weight_decay: float = 0.0
    beta1: float = 0.5
    width: int = 256
    depth: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "grad_penalty", "disc_weight_decay"):
            require(getattr(self, name) >= 0, f"dann.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("disc_steps", "width"):
            require(getattr(self, name) >= 1, f"dann.{name} must be at least 1, got {getattr(self, name)}")
        require(self.disc_lr is None or self.disc_lr > 0, f"dann.disc_lr must be positive, got {self.disc_lr}")
        require(self.depth >= 2, f"dann.depth must be at least 2, got {self.depth}")
        require(0 <= self.beta1 < 1, f"dann.beta1 must be in [0, 1), got {self.beta1}")
        require(0 <= self.dropout < 1, f"dann.dropout must be in [0, 1), got {self.dropout}")


@method(
    "dann",
    paper="Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016 (alternating, as in DomainBed)",
    requires=Requires(fit="train", native="train+val", classes="erm", masked=True),
    config=Config,
)
class DANN(EnvironmentObjective[Config]):
    """Two players in turn: `min_D CE(D(h), e) + rho GP`, then `min CE(z, y) - lambda (CE(D(h), e) + rho GP)`.

    An environment e is a joint value of the granted attributes; batches hold equally many images of each. Under
    `@masked` the discriminator sees annotated images only. Deviations: the classifier trains under the block's recipe
    (there Adam for both); features are detached in a discriminator's step (there a graph is built and thrown away). As
    there, one step in 1 + d changes the classifier, which `n_updates` in the record counts, but each moves its
    BatchNorm statistics.
    """

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        with task.seeded("discriminator"):
            self.discriminator = discriminator(model.feature_dim, self.num_envs, self.config).to(task.device)
        self.steps = 0

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model, "discriminator": self.discriminator}

    def optimizers(self, recipe: Recipe) -> dict[str, Optimizer]:
        own = super().optimizers(recipe)
        own["discriminator"] = torch.optim.Adam(
            self.discriminator.parameters(),
            lr=self.config.disc_lr or recipe.lr,
            betas=(self.config.beta1, 0.9),
            weight_decay=self.config.disc_weight_decay,
        )
        return own

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        self.steps += 1  # from 1, as there: at d = 1 the classifier moves first
        player = "discriminator" if self.discriminates() else "model"
        loss = self.discriminator_loss(batch) if player == "discriminator" else self.loss(batch)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers[player].step()
        return loss.detach()

    def discriminates(self) -> bool:
        """Whether this step is the discriminator's."""
        return self.steps % (1 + self.config.disc_steps) < self.config.disc_steps

    def loss(self, batch: Batch) -> Tensor:
        features = self.model.features(batch.x)
        adversary = self.confusion(features, self.e[batch.index])
        return F.cross_entropy(self.model.head(features), batch.y) - self.config.weight * adversary

    def discriminator_loss(self, batch: Batch) -> Tensor:
        """`CE(D(h), e) + rho GP` on features without a graph."""
        with torch.no_grad():
            features = self.model.features(batch.x)
        return self.confusion(features.requires_grad_(self.config.grad_penalty > 0), self.e[batch.index])

    def confusion(self, features: Tensor, e: Tensor) -> Tensor:
        """`CE(D(h), e) + rho GP` over the images whose environment is known; 0 where none is."""
        known = (e >= 0).nonzero()[:, 0]
        if not len(known):
            return features.new_zeros((), requires_grad=True)
        losses = F.cross_entropy(self.discriminator(features[known]), e[known], reduction="none")
        if not self.config.grad_penalty:
            return losses.mean()
        (gradient,) = torch.autograd.grad(losses.sum(), features, create_graph=True)
        return losses.mean() + self.config.grad_penalty * gradient[known].square().sum(1).mean()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def discriminator(features: int, environments: int, config: Config) -> nn.Sequential:
    """DomainBed's MLP: `depth` linear layers of `width` units with ReLU, dropout after each but the last."""
    layers: list[nn.Module] = [nn.Linear(features, config.width), nn.Dropout(config.dropout), nn.ReLU()]
    for _ in range(config.depth - 2):
        layers += [nn.Linear(config.width, config.width), nn.Dropout(config.dropout), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(config.width, environments))
