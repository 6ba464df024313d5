"""The one training loop, the one prediction loop, and the contract of what is trained: `Objective`.

Every epoch starts from seeds of its own, so a training that was killed goes on from its last full-state checkpoint to
the same bits, without storing any generator.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .artifacts import load_state
from .backbones import Backbone
from .cost import Clock, StageCost
from .data import Batch, Pixels, Sampler, augment, random_order, weighted
from .device import compile_trunk, kernels, optimizer_options
from .errors import NonFiniteLoss
from .fingerprint import engine_fingerprint
from .home import write_bytes
from .selection import Score, Selector
from .spec import Recipe, derive_seed

if TYPE_CHECKING:
    from .task import Task

CHECK_EVERY = 50
"""Steps between looks at the losses: each look waits for the device, and nothing else in an epoch does."""
KEPT = 2**28
"""Bytes of outputs that stay on the device before they are copied to the host, which waits for the device."""
EVAL_VALUES = {"cpu": 2**21, "cuda": 2**25}
"""Pixel values of an evaluation batch: on a processor 512 images of 32 px, or 32 of 224 px."""

ConfigT = TypeVar("ConfigT")
Predictions = NDArray[np.int16]
Observer = Callable[["Objective[Any]", "Backbone", Sampler, "Training"], None]
_observers: list[Observer] = []


class Objective(Generic[ConfigT]):
    """What one training minimises: by default the mean cross-entropy. Override only what differs from ERM.

    `sampler`: `random` (every image once), `class` or `uniform_group` (n draws, each class or group equally likely).
    """

    sampler: Literal["random", "class", "uniform_group"] = "random"

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    def setup(self, task: "Task", model: Backbone) -> None:
        """Called once before training; keep the model, ask the task for groups, build extra networks."""
        self.model = model

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss of a batch."""
        return F.cross_entropy(self.model(batch.x), batch.y)

    def networks(self) -> dict[str, nn.Module]:
        """Everything that trains, by name; override to add a second network or a discriminator."""
        return {"model": self.model}

    def optimizers(self, recipe: Recipe) -> dict[str, Optimizer]:
        """One optimiser per player; by default each network's parameters under the recipe."""
        return {name: make_optimizer(net.parameters(), recipe) for name, net in self.networks().items()}

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        """One update and its detached loss; override for alternating players."""
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        with torch.autocast(loss.device.type, enabled=False):  # or it would round gradients of what is kept in float32
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers.values():
                optimizer.step()
        return loss.detach()

    def lr_factor(self, recipe: Recipe, epoch: float) -> float:
        """What every learning rate is multiplied with after so many epochs; by default the recipe's schedule."""
        return 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs)) if recipe.schedule == "cosine" else 1.0

    def transform(self, recipe: Recipe, generator: torch.Generator) -> Callable[[Tensor], Tensor] | None:
        """An epoch's augmentation of pixels (B, C, H, W) in [0, 1], by default the recipe's.

        It may give several views of each image, as (B, V, C, H, W).
        """
        return augment(recipe.augment, generator)

    def make_sampler(self, task: "Task", recipe: Recipe) -> Sampler:
        """The epoch's index batches; override to weight or compose them.

        `uniform_group` falls back to `class` where only some images have attributes.
        """
        if self.sampler == "random":
            return random_order(task.size("train"), recipe)
        index = task.groups("train").index if self.sampler == "uniform_group" else task.y("train")
        if (index < 0).any():
            index = task.y("train")
        stratum = torch.from_numpy(index)
        return weighted(1 / stratum.bincount()[stratum].double(), recipe)

    def state_dict(self) -> dict[str, Any]:
        """What beside networks and optimisers must survive a restart (group weights, memories), as plain tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
    """The recipe's optimiser, fused on a GPU; weight decay is coupled L2 except for adamw."""
    lr, decay, chosen = recipe.lr, recipe.weight_decay, list(parameters)
    options: dict[str, Any] = optimizer_options(chosen[0].device) if chosen else {}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(chosen, lr=lr, weight_decay=decay, momentum=recipe.momentum, **options)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(chosen, lr=lr, weight_decay=decay, **options)
    return torch.optim.AdamW(chosen, lr=lr, weight_decay=decay, **options)


@dataclass
class Epoch:
    """What one epoch left: mean train loss, mean validation loss, and validation predictions (n_val,).

    A training without validation leaves NaN and no predictions.
    """

    train_loss: float
    val_loss: float
    predictions: Predictions


@dataclass
class Trajectory:
    """A finished training: its epochs, the selected epoch (1-based) and its score, None when the last was kept."""

    epochs: list[Epoch] = field(default_factory=list)
    step: int = 0
    score: Score | None = None


@dataclass(frozen=True, eq=False)
class Training:
    """Everything a training needs beside its objective: data, recipe, seeds, clock, places, progress.

    It ends after `stop` epochs of the recipe's schedule, or when its patience is over. Without `val` nothing is
    evaluated. `selector` picks the epoch (None keeps the last); `keep` is called with (epoch, model) after every epoch,
    `watch` with the epoch's selection value, if it has one: it may raise, to give the training up. Kernels are tuned to
    shapes (`autotuning`) unless a network sees another number of images in every step.
    """

    train: Pixels
    val: Pixels | None
    recipe: Recipe
    stop: int
    stage: str
    seed: tuple[Any, ...]
    clock: Clock
    state: Path
    selector: Selector | None = None
    keep: Callable[[int, nn.Module], None] | None = None
    progress: Callable[[str, int, int], None] = lambda stage, epoch, epochs: None
    watch: Callable[[float], None] = lambda value: None
    autotuning: bool = True


def fit(objective: Objective[Any], model: Backbone, sampler: Sampler, training: Training) -> Trajectory:
    """Train until the last epoch, leave the selected epoch's weights in `model`, and say how it went.

    Raises `NonFiniteLoss` at the first step whose loss is NaN or infinite.
    """
    for observer in _observers:
        observer(objective, model, sampler, training)
    recipe, clock = training.recipe, training.clock
    players = Players.of(objective, model, recipe)
    base_lr = [group["lr"] for group in players.parameter_groups()]
    device = training.train.device
    chosen = kernels(recipe.precision, device, training.autotuning)

    with chosen, clock.stage(training.stage) as cost, watched(model) as changed:
        others = cost.scaled(-1)  # a checkpoint holds the bill of its own training, not of the whole stage
        trajectory, best = _restore(training, players, cost)
        if training.selector is not None:
            for done in trajectory.epochs:
                training.watch(training.selector(done.predictions)[0])
        for epoch in range(len(trajectory.epochs) + 1, training.stop + 1):
            if _is_over(trajectory, recipe):
                break
            seeds = [derive_seed(*training.seed, purpose, epoch) for purpose in ("order", "augment", "forward")]
            order, images = (torch.Generator().manual_seed(seed) for seed in seeds[:2])
            torch.manual_seed(seeds[2])
            batches = sampler(order)
            made = training.train.epoch(batches, objective.transform(recipe, images))
            players.networks.train()
            losses: list[Tensor] = []
            for i in range(len(batches)):
                _set_lr(players, base_lr, objective.lr_factor(recipe, epoch - 1 + i / len(batches)))
                changed.clear()
                with autocast(recipe, device):
                    losses.append(objective.step(next(made), players.optimizers))
                cost.n_updates += bool(changed)
                if (i + 1) % CHECK_EVERY == 0 or i + 1 == len(batches):
                    _check_finite(losses, training.stage, epoch)
            clock.lap()
            billed = asdict(cost + others)
            with clock.off():
                trajectory.epochs.append(_evaluate(model, training, torch.stack(losses).mean().item()))
                score = training.selector(trajectory.epochs[-1].predictions) if training.selector else None
                best = _select(trajectory, score, model, best)
                if training.keep is not None:
                    training.keep(epoch, model)
                _save(training, players, trajectory, best, billed)
                training.progress(training.stage, epoch, training.stop)
                if score is not None:
                    training.watch(score[0])
    model.load_state_dict(best)
    return trajectory


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every training that begins inside, just before its first step; it may raise, to end it."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 autocast when the recipe asks for it.

    Weights are cast at every pass: torch would keep what the first one cast, and players who move in turn would see
    each other, and themselves, as they were before.
    """
    if recipe.precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Optimizer]]:
    """Notes optimisers that step inside and hold one of the model's parameters."""
    parameters = {id(parameter) for parameter in model.parameters()}
    changed: list[Optimizer] = []

    def note(optimizer: Optimizer, *_: Any) -> None:
        if any(id(p) in parameters for group in optimizer.param_groups for p in group["params"]):
            changed.append(optimizer)

    handle = register_optimizer_step_post_hook(note)
    try:
        yield changed
    finally:
        handle.remove()


def _set_lr(players: "Players", base: list[float], factor: float) -> None:
    for group, lr in zip(players.parameter_groups(), base, strict=True):
        group["lr"] = lr * factor


def _check_finite(losses: list[Tensor], stage: str, epoch: int) -> None:
    start = (len(losses) - 1) // CHECK_EVERY * CHECK_EVERY
    finite = torch.stack(losses[start:]).isfinite()
    if not finite.all():
        raise NonFiniteLoss(stage, epoch, start + int((~finite).nonzero()[0]) + 1)


@torch.no_grad()
def predict(function: Callable[[Tensor], Tensor], model: nn.Module, pixels: Pixels, recipe: Recipe) -> Tensor:
    """Outputs (n, ...) of a function of `model`, float32 on the CPU, in evaluation mode and dataset order."""
    model.eval()
    values = EVAL_VALUES.get(pixels.device.type, EVAL_VALUES["cuda"])
    size = min(512, max(32, values // pixels.stored(0).numel()))  # maps of many large images fill the memory
    with kernels(recipe.precision, pixels.device), autocast(recipe, pixels.device):
        return on_host(function(batch.x).float() for batch in pixels.batches(size))


def on_host(outputs: Iterable[Tensor]) -> Tensor:
    """Outputs (B, ...) of all batches as one tensor (n, ...) on the CPU, copied `KEPT` bytes at a time."""
    copied: list[Tensor] = []
    waiting: list[Tensor] = []
    for output in outputs:
        waiting.append(output)
        if sum(part.nbytes for part in waiting) >= KEPT:
            copied.append(torch.cat(waiting).cpu())
            waiting = []
    if waiting:
        copied.append(torch.cat(waiting).cpu())
    return copied[0] if len(copied) == 1 else torch.cat(copied)


def _evaluate(model: Backbone, training: Training, train_loss: float) -> Epoch:
    if training.val is None:
        return Epoch(train_loss, math.nan, np.empty(0, np.int16))
    logits = predict(model, model, training.val, training.recipe)
    loss = F.cross_entropy(logits, training.val.y.cpu()).item()
    return Epoch(train_loss, loss, logits.argmax(1).numpy().astype(np.int16))


def _select(
    trajectory: Trajectory, score: Score | None, model: nn.Module, best: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Weights to keep after the newest epoch, which has this score; a later epoch must be strictly better."""
    if score is not None and trajectory.score is not None and score <= trajectory.score:
        return best
    trajectory.step, trajectory.score = len(trajectory.epochs), score
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _is_over(trajectory: Trajectory, recipe: Recipe) -> bool:
    """Whether the last `patience` epochs were no better than the one selected; never where nothing is selected."""
    waited = len(trajectory.epochs) - trajectory.step
    return bool(recipe.patience) and trajectory.score is not None and waited >= recipe.patience


@dataclass(frozen=True, eq=False)
class Players:
    """All that training changes: networks, their optimisers, and the objective's own state."""

    objective: Objective[Any]
    networks: nn.ModuleDict
    optimizers: dict[str, Optimizer]

    @classmethod
    def of(cls, objective: Objective[Any], model: Backbone, recipe: Recipe) -> "Players":
        """Those of an objective that is set up for `model`, laid out and compiled as the recipe says."""
        players = cls(objective, nn.ModuleDict(objective.networks()), objective.optimizers(recipe))
        for network in dict.fromkeys([model, *players.networks.values()]):  # of some methods only its head is a player
            if recipe.channels_last:
                network.to(memory_format=torch.channels_last)
            if recipe.compile and isinstance(network, Backbone):
                compile_trunk(network.trunk)
        return players

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all optimisers, in a fixed order."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Full state as plain tensors and numbers."""
        return {
            "networks": self.networks.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "objective": self.objective.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the full state back."""
        self.networks.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.objective.load_state_dict(state["objective"])


def _save(
    training: Training, players: Players, trajectory: Trajectory, best: dict[str, Tensor], billed: dict[str, Any]
) -> None:
    """Write the full state, whole or not at all."""
    state = {
        **players.state_dict(),
        "best": best,
        "step": trajectory.step,
        "score": trajectory.score,
        "losses": [(epoch.train_loss, epoch.val_loss) for epoch in trajectory.epochs],
        "predictions": torch.from_numpy(np.stack([epoch.predictions for epoch in trajectory.epochs])),
        "cost": billed,
        "code": engine_fingerprint(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(training.state, buffer.getbuffer())


def _restore(training: Training, players: Players, cost: StageCost) -> tuple[Trajectory, dict[str, Tensor]]:
    """Go on from the last full-state checkpoint, if there is a whole one that this code wrote."""
    state = load_state(training.state)
    if state is None or state.get("code") != engine_fingerprint():
        return Trajectory(), {}
    players.load_state_dict(state)
    cost.add(StageCost(**state["cost"]))
    epochs = [
        Epoch(train, val, predictions.numpy())
        for (train, val), predictions in zip(state["losses"], state["predictions"], strict=True)
    ]
    score = None if state["score"] is None else tuple(state["score"])
    return Trajectory(epochs, state["step"], score), state["best"]
