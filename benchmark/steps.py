"""Steps of a training, timed: the engine's own step of any method, beside ERM's on the same images.

Blocks of steps of the two sides take turns in one process, so that what disturbs one disturbs the other. On a GPU a
step is timed by CUDA events on the training's stream, on a CPU by process CPU time, which neighbours on the machine
disturb less than the wall clock. Making the batch is not part of it, but where a method makes its own images of it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import engine, runner
from .backbones import Backbone
from .cost import StageCost
from .data import Batch, Sampler
from .device import kernels
from .errors import require
from .spec import RunSpec, derive_seed
from .store import Store

Clock = Literal["cuda events", "process CPU time"]
Seconds = NDArray[np.float64]

STAGE = "profile"
TRIM = 0.1
"""Share of a block's steps that is left out at either end: what the machine did beside."""
COUNTED = (2, 10)
"""Fewest and most steps whose FLOPs are counted: until the classifier was updated, for players that take turns."""


# --------------------------------------------------------------------------------------------------------- capture


@dataclass(frozen=True, eq=False)
class Setup:
    """A training that a method has set up, just before its first step."""

    objective: engine.Objective[Any]
    model: Backbone
    sampler: Sampler
    training: engine.Training

    @property
    def is_classifier(self) -> bool:
        """Whether its epochs are evaluated, as only a classifier's are."""
        return self.training.val is not None


class _Reached(BaseException):
    """Ends a method where its training would begin: no `except Exception` on the way stops it."""


@contextmanager
def trainings(spec: RunSpec, *, stop: bool = False) -> Iterator[list[Setup]]:
    """What a run of `spec` trains on images while this is open; with `stop` it ends at the first such classifier.

    The shared ERM is one of ERM's own alone; last layers on stored features are not on images.
    """
    found: list[Setup] = []

    def note(objective: engine.Objective[Any], model: Backbone, sampler: Sampler, training: engine.Training) -> None:
        setup = Setup(objective, model, sampler, training)
        if _counts(setup, spec):
            found.append(setup)
            if stop and setup.is_classifier:
                raise _Reached

    with suppress(_Reached), engine.observed(note):
        yield found


def find_training(spec: RunSpec, store: Store) -> Setup | None:
    """Run a method up to its first training of a classifier on images and hand that out, or else its last training.

    None where it has none. What comes before is really made, in the present home, which must be an empty one: a shared
    network that is there already is not trained.
    """
    with trainings(spec, stop=True) as found:
        runner.refit(spec, store)
    return choose_training(found)


def choose_training(found: list[Setup]) -> Setup | None:
    """A method's own training: its first of a classifier, else its last one (a first stage, several heads)."""
    return next((setup for setup in found if setup.is_classifier), found[-1] if found else None)


def _counts(setup: Setup, spec: RunSpec) -> bool:
    """Whether it is the method's own training, on images: not the shared ERM, and not a last layer on features."""
    if setup.training.stage == "erm" and spec.method != "erm":
        return False
    return setup.model.name != "identity" or spec.block.backbone.partition(":")[0] == "identity"


# ---------------------------------------------------------------------------------------------------------- timing


@dataclass
class Stopwatch:
    """Seconds of the laps on a device: CUDA events, or process CPU time; and their wall time."""

    device: torch.device
    _laps: list[tuple[Any, Any]] = field(default_factory=list)
    _wall: list[float] = field(default_factory=list)

    @property
    def clock(self) -> Clock:
        """What is read."""
        return "cuda events" if self.device.type == "cuda" else "process CPU time"

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def lap(self) -> Iterator[None]:
        """Time what happens inside; it does not wait for the device."""
        start, mark = time.perf_counter(), self._mark()
        yield
        self._laps.append((mark, self._mark()))
        self._wall.append(time.perf_counter() - start)

    def seconds(self) -> Seconds:
        """Seconds of every lap (n,), once the device is done."""
        if self.device.type != "cuda":
            return np.array([end - start for start, end in self._laps])
        torch.cuda.synchronize(self.device)
        return np.array([start.elapsed_time(end) / 1000 for start, end in self._laps])

    def wall(self) -> Seconds:
        """Wall seconds of every lap (n,); on a GPU those of `seconds`, which nothing waits for in between."""
        return self.seconds() if self.device.type == "cuda" else np.array(self._wall)


@dataclass(frozen=True, eq=False)
class Block:
    """Some steps on end: seconds and wall seconds of each (S,), whether it changed the classifier (S,), wall seconds of
    all with their batches, and what they did.
    """

    seconds: Seconds
    wall: Seconds
    updated: NDArray[np.bool_]
    whole: float
    images: int
    cost: StageCost

    @property
    def mean(self) -> float:
        """Seconds of a step, trimmed."""
        return trimmed_mean(self.seconds, self.updated)

    @classmethod
    def joined(cls, blocks: "Sequence[Block]") -> "Block":
        """All steps of several."""
        return cls(
            seconds=np.concatenate([block.seconds for block in blocks]),
            wall=np.concatenate([block.wall for block in blocks]),
            updated=np.concatenate([block.updated for block in blocks]),
            whole=sum(block.whole for block in blocks),
            images=sum(block.images for block in blocks),
            cost=StageCost.total([block.cost for block in blocks]),
        )


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums FLOPs by PyTorch's own formulas; its `FlopCounterMode` follows modules too, and cannot where gradients are
    asked of a map in the middle of a network.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Side:
    """One of two trainings that are compared, ready to step: as the engine would train it, in its first epochs."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.training = setup, setup.training
        self.recipe, self.device = setup.training.recipe, setup.training.train.device
        self._flops = self._count_flops()
        self._batches = self._endless()
        self.players = engine.Players.of(setup.objective, setup.model, self.recipe)

    def _endless(self) -> Iterator[Batch]:
        """Batches, epoch after epoch, each made when it is asked for; the last, often short one of each is left out."""
        epoch = 0
        while True:
            epoch += 1
            seeds = [derive_seed(*self.training.seed, purpose, epoch) for purpose in ("order", "augment")]
            order, images = (torch.Generator().manual_seed(seed) for seed in seeds)
            batches = self.setup.sampler(order)
            transform = self.setup.objective.transform(self.recipe, images)
            yield from self.training.train.epoch(batches[: max(len(batches) - 1, 1)], transform)

    def _step(self, batches: Iterator[Batch], players: engine.Players, watch: Stopwatch) -> tuple[Tensor, int]:
        """The engine's step: its detached loss, and the number of images."""
        own_images = type(players.objective).transform is not engine.Objective.transform
        with engine.autocast(self.recipe, self.device), ExitStack() as timed:
            if own_images:
                timed.enter_context(watch.lap())
            batch = next(batches)
            if not own_images:
                timed.enter_context(watch.lap())
            loss = players.objective.step(batch, players.optimizers)
        return loss, len(batch.y)

    def block(self, steps: int) -> Block:
        """Take some steps; raises `UserError` when a loss is not finite, since what follows may cost anything."""
        clock, watch = self.training.clock, Stopwatch(self.device)
        self.players.networks.train()
        losses, updated, images = [], [], 0
        with (
            kernels(self.recipe.precision, self.device, self.training.autotuning),
            clock.stage(STAGE) as cost,
            engine.watched(self.setup.model) as changed,
        ):
            before, start = replace(cost), time.perf_counter()
            for _ in range(steps):
                changed.clear()
                loss, size = self._step(self._batches, self.players, watch)
                losses.append(loss)
                images += size
                updated.append(bool(changed))
            clock.lap()  # on a GPU it waits for the last step
            whole = time.perf_counter() - start
            cost.n_updates += sum(updated)
            done = cost + before.scaled(-1)
        finite = bool(torch.stack(losses).isfinite().all())
        require(finite, f"{self.training.stage}: the loss is not finite while it is timed; lower recipe.lr")
        return Block(watch.seconds(), watch.wall(), np.array(updated), whole, images, done)

    def _count_flops(self) -> dict[bool, list[float]]:
        """FLOPs of some steps, by whether they changed the classifier; compiled code would hide from the counter."""
        fewest, most = COUNTED
        found: dict[bool, list[float]] = {True: [], False: []}
        self.setup.model.trunk.__dict__.pop("forward", None)  # a pipeline before may have left a compiled one there
        players = engine.Players.of(self.setup.objective, self.setup.model, replace(self.recipe, compile=False))
        players.networks.train()
        batches = self._endless()
        with engine.watched(self.setup.model) as changed:
            while (count := sum(map(len, found.values()))) < most and (count < fewest or not found[True]):
                changed.clear()
                with _Flops() as counter:
                    self._step(batches, players, Stopwatch(self.device))
                found[bool(changed)].append(float(counter.total))
        return found

    def flops(self, updates: float) -> float:
        """FLOPs per step, forward and backward, where this share of the steps updates the classifier."""
        kinds = {kind: sum(flops) / len(flops) for kind, flops in self._flops.items() if flops}
        return updates * kinds.get(True, 0.0) + (1 - updates) * kinds.get(False, 0.0)

    def peak_memory(self) -> float | None:
        """MiB of device memory of a step with all that it keeps: networks, optimisers, gradients, graph, batch.

        Of players that take turns it is the classifier's, which takes the most. What else lies on the device is not
        counted. None on a CPU, where sides of one process cannot be told apart.
        """
        if self.device.type != "cuda":
            return None
        for optimizer in self.players.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        for _ in range(COUNTED[1]):
            if self.block(1).updated.any():
                break
        above = torch.cuda.max_memory_allocated(self.device) - before
        kept = {id(tensor): tensor.nbytes for tensor in self._kept()}
        return (above + sum(kept.values())) / 2**20

    def _kept(self) -> Iterator[Tensor]:
        """Parameters and buffers, those of frozen networks too, and optimiser states; some of them twice."""
        for network in (self.setup.model, self.players.networks):
            yield from network.parameters()
            yield from network.buffers()
        for optimizer in self.players.optimizers.values():
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def interleave(
    sides: tuple[Side, Side], rounds: int, steps: int, told: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[Block], list[Block]]:
    """Blocks of both sides, taken in turns: first, second, first, second ...; `told` hears of every round."""
    blocks: tuple[list[Block], list[Block]] = [], []
    for done in range(rounds):
        for side, made in zip(sides, blocks, strict=True):
            made.append(side.block(steps))
        told(done + 1, rounds)
    return blocks


# ------------------------------------------------------------------------------------------------------ statistics


@dataclass(frozen=True)
class Ratio:
    """A median over pairs of blocks, with an interval for it of at least 95 % (94 % of five pairs, less of fewer)."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Ratio":
        """The same in another unit."""
        return Ratio(self.value * factor, self.low * factor, self.high * factor)


def trimmed_mean(seconds: Seconds, updated: NDArray[np.bool_]) -> float:
    """Mean of step times (S,), the shortest and longest tenth of each kind of step left out.

    Where players take turns, steps that update the classifier and steps that do not cost differently: all of them
    together would lose more of the rarer kind.
    """
    total = 0.0
    for kind in (seconds[updated], seconds[~updated]):
        cut = int(TRIM * len(kind))
        total += len(kind) * float(np.sort(kind)[cut : len(kind) - cut].mean()) if len(kind) else 0.0
    return total / len(seconds)


def paired_ratio(method: Sequence[float], erm: Sequence[float]) -> Ratio:
    """Median over pairs of the ratio of step times, between the order statistics that a sign test does not reject.

    So few pairs are no sample for a bootstrap: of seven its 95 % interval held the median in 90 % of cases.
    """
    ratios = np.sort(np.array(method) / np.array(erm))
    cut = max(0, int(binom.ppf(0.025, len(ratios), 0.5)) - 1)
    return Ratio(float(np.median(ratios)), float(ratios[cut]), float(ratios[-1 - cut]))
