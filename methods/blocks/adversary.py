"""Two players over the features: a discriminator tells environments apart, and a classifier keeps it from doing so."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ...benchmark.backbones import Backbone
from ...benchmark.data import Batch, Sampler
from ...benchmark.environments import EnvConfig
from ...benchmark.errors import require
from ...benchmark.search import Search
from ...benchmark.spec import Recipe
from ...benchmark.task import Task
from .environments import EnvironmentObjective

Width = Annotated[int, Search("2^U(6,10)")]
Dropout = Annotated[float, Search("{0,0.1,0.5}")]


@dataclass(frozen=True)
class AdversarialConfig(EnvConfig):
    """`impl`: the players take turns (`alternating`), or move at once, with the discriminator's gradient reversed on
    its way into the classifier (`grl`). `weight` is lambda of the adversary; with `ramp` it grows from 0, over
    `ramp_steps` steps (0: the whole training).

    `disc_steps` d discriminator steps for each step of the classifier (where they take turns); `grad_penalty` rho on
    the discriminator's input gradient; `disc_lr` (None: the recipe's), `disc_weight_decay` and `beta1` of the
    discriminator's Adam; `width`, `depth` and `dropout` of the discriminator.
    """

    impl: Literal["alternating", "grl"] = "alternating"
    weight: Annotated[float, Search("10^U(-2,2)")] = 1.0
    ramp: bool = False
    ramp_steps: int = 0
    disc_steps: Annotated[int, Search("2^U(0,3)")] = 1
    grad_penalty: Annotated[float, Search("10^U(-2,1)")] = 0.0
    disc_lr: Annotated[float | None, Search("10^U(-1,1)", of="lr")] = None
    disc_weight_decay: Annotated[float, Search("10^U(-6,-2)")] = 0.0
    beta1: Annotated[float, Search("{0,0.5}")] = 0.5
    width: Width = 256
    depth: Annotated[int, Search("{3,4,5}")] = 3
    dropout: Dropout = 0.0


def validate(method: str, config: AdversarialConfig) -> None:
    """Raise `UserError` for a value that makes no sense, under the method's name."""
    for name in ("weight", "ramp_steps", "grad_penalty", "disc_weight_decay"):
        require(getattr(config, name) >= 0, f"{method}.{name} must be at least 0, got {getattr(config, name)}")
    for name in ("disc_steps", "width"):
        require(getattr(config, name) >= 1, f"{method}.{name} must be at least 1, got {getattr(config, name)}")
    require(config.disc_lr is None or config.disc_lr > 0, f"{method}.disc_lr must be positive, got {config.disc_lr}")
    require(config.depth >= 2, f"{method}.depth must be at least 2, got {config.depth}")
    require(0 <= config.beta1 < 1, f"{method}.beta1 must be in [0, 1), got {config.beta1}")
    require(0 <= config.dropout < 1, f"{method}.dropout must be in [0, 1), got {config.dropout}")


ConfigT = TypeVar("ConfigT", bound=AdversarialConfig)


class AdversarialObjective(EnvironmentObjective[ConfigT]):
    """A classifier's cross-entropy against the confusion `C = sum_i w_i CE(D_i, e_i) + rho GP` of a discriminator D.

    Alternating (DomainBed): d times `min_D C`, once `min CE(z, y) - lambda C`. Reversed (Ganin et al.): at once
    `CE(z, y) + C`, whose gradient by D is plain, while that of C enters the classifier times -lambda. The penalty GP is
    the mean squared length of the gradient of `sum_i CE(D_i, e_i)` by the features.

    By default D sees the features and all images weigh the same; a method overrides `make_discriminator`, `judge` and
    `weights`. Images of unknown environment are left out of C.
    """

    discriminator: nn.Module
    horizon: int

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        with task.seeded("discriminator"):
            self.discriminator = self.make_discriminator().to(task.device)
        self.steps = 0

    def make_discriminator(self) -> nn.Module:
        """The discriminator with its initial weights."""
        return mlp(self.model.feature_dim, self.num_envs, self.config)

    def judge(self, features: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """The discriminator's logits (B, E) for features (B, d), logits (B, K) and labels (B,)."""
        judged: Tensor = self.discriminator(features)
        return judged

    def weights(self, logits: Tensor, y: Tensor, e: Tensor) -> Tensor:
        """Weights w (B,) of the images in the discriminator's loss."""
        return torch.full_like(e, 1 / len(e), dtype=torch.float32)

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

    def make_sampler(self, task: Task, recipe: Recipe) -> Sampler:
        sampler = super().make_sampler(task, recipe)
        self.horizon = self.config.ramp_steps or recipe.epochs * len(sampler(torch.Generator()))
        return sampler

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        players = self.players()
        loss = self.loss(batch) if "model" in players else self.discriminator_loss(batch)
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for player in players:
            optimizers[player].step()
        self.steps += 1
        return loss.detach()

    def players(self) -> tuple[str, ...]:
        """Who moves in the next step."""
        if self.config.impl == "grl":
            return "model", "discriminator"
        number = self.steps + 1  # from 1, as in DomainBed: at d = 1 the classifier moves first
        turn = number % (1 + self.config.disc_steps) < self.config.disc_steps
        return ("discriminator" if turn else "model",)

    def strength(self) -> float:
        """lambda of the next step."""
        return self.config.weight * (ramp(self.steps / self.horizon) if self.config.ramp else 1.0)

    def loss(self, batch: Batch) -> Tensor:
        features = self.model.features(batch.x)
        logits = self.model.head(features)
        cross_entropy, strength = F.cross_entropy(logits, batch.y), self.strength()
        if self.config.impl == "grl":
            return cross_entropy + self.confusion(reverse(features, strength), reverse(logits, strength), batch)
        return cross_entropy - strength * self.confusion(features, logits, batch)

    def discriminator_loss(self, batch: Batch) -> Tensor:
        """`C` on features without a graph."""
        with torch.no_grad():
            features = self.model.features(batch.x)
            logits = self.model.head(features)
        return self.confusion(features.requires_grad_(self.config.grad_penalty > 0), logits, batch)

    def confusion(self, features: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        """`C` over the images whose environment is known; 0 where none is."""
        y, e = batch.y, self.e[batch.index]
        if self.masked:  # only then: to look for them is to wait for the device
            known = (e >= 0).nonzero()[:, 0]
            if not len(known):
                return features.new_zeros((), requires_grad=True)
            features, logits, y, e = features[known], logits[known], y[known], e[known]
        losses = F.cross_entropy(self.judge(features, logits, y), e, reduction="none")
        loss = (self.weights(logits, y, e) * losses).sum()
        if not self.config.grad_penalty:
            return loss
        (gradient,) = torch.autograd.grad(losses.sum(), features, create_graph=True)
        return loss + self.config.grad_penalty * gradient.square().sum(1).mean()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def reverse(x: Tensor, strength: float) -> Tensor:
    """The same values, to the bit; a gradient passes with its sign turned, times `strength`."""
    return x.detach() - strength * (x - x.detach())


def ramp(share: float) -> float:
    """`2 / (1 + exp(-10 p)) - 1`, from 0 to almost 1 with the share p of the steps that are done (at most 1)."""
    return 2 / (1 + math.exp(-10 * min(share, 1.0))) - 1


def mlp(inputs: int, environments: int, config: AdversarialConfig) -> nn.Sequential:
    """DomainBed's MLP: `depth` linear layers of `width` units with ReLU, dropout after each but the last."""
    layers: list[nn.Module] = [nn.Linear(inputs, config.width), nn.Dropout(config.dropout), nn.ReLU()]
    for _ in range(config.depth - 2):
        layers += [nn.Linear(config.width, config.width), nn.Dropout(config.dropout), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(config.width, environments))
