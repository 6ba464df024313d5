"""What a run costs: a stage clock that leaves evaluation out, example passes through the backbones, FLOPs, memory.

On a GPU `device_s` is wall time between synchronised stage borders; on a CPU it is process CPU time, which neighbours
on the machine disturb less. Passes and FLOPs depend on no hardware.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class StageCost:
    """Cost of one stage; evaluation is not in it. Passes count examples, `n_head_fits` last-layer solver runs."""

    wall_s: float = 0.0
    device_s: float = 0.0
    eval_s: float = 0.0
    n_fwd: int = 0
    n_bwd: int = 0
    n_fwd_nograd: int = 0
    n_updates: int = 0
    n_head_fits: int = 0
    flops: float = 0.0
    peak_mem_mib: float = 0.0

    def __add__(self, other: "StageCost") -> "StageCost":
        summed = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return StageCost(**{**summed, "peak_mem_mib": max(self.peak_mem_mib, other.peak_mem_mib)})

    def scaled(self, share: float) -> "StageCost":
        """This share of the cost, e.g. the first T of E epochs; peak memory stays."""
        part = replace(self)
        for name, value in vars(self).items():
            if name != "peak_mem_mib":
                setattr(part, name, round(value * share) if isinstance(value, int) else value * share)
        return part

    def add(self, other: "StageCost") -> None:
        """Add another cost in place."""
        for name, value in vars(self + other).items():
            setattr(self, name, value)

    @classmethod
    def total(cls, costs: "list[StageCost]") -> "StageCost":
        """Sum of stages."""
        total = cls()
        for cost in costs:
            total = total + cost
        return total


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forward_flops(model: nn.Module, example: Tensor) -> float:
    """FLOPs of one forward of an input (1, ...) in evaluation mode, by PyTorch's counter."""
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    model.train(training)
    return float(counter.get_total_flops())


@dataclass
class Clock:
    """Stage costs of one run, and the costs inherited from shared artifacts (each billed once, by key)."""

    device: torch.device
    stages: dict[str, StageCost] = field(default_factory=dict)
    shared: dict[str, StageCost] = field(default_factory=dict)
    _open: list[StageCost] = field(default_factory=list)
    _mark: tuple[float, float] = (0.0, 0.0)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return (time.perf_counter(),) * 2
        return time.perf_counter(), time.process_time()

    @property
    def current(self) -> StageCost:
        """Cost of the innermost open stage, to count passes into."""
        return self._open[-1]

    def lap(self) -> None:
        """Bill the time since the last lap to the open stage, so that its cost is complete up to now."""
        wall, busy = self._now()
        if self._open:
            self.current.wall_s += wall - self._mark[0]
            self.current.device_s += busy - self._mark[1]
            self.current.peak_mem_mib = max(self.current.peak_mem_mib, _peak_memory_mib(self.device))
        self._mark = wall, busy

    @contextmanager
    def stage(self, name: str) -> Iterator[StageCost]:
        """Bill what happens inside to the stage `name`; a second visit adds to it, an outer stage is suspended."""
        self.lap()
        self._reset_peak()
        self._open.append(self.stages.setdefault(name, StageCost()))
        try:
            yield self.current
        finally:
            self.lap()
            self._open.pop()
            self._reset_peak()  # what comes next did not need it

    @contextmanager
    def off(self) -> Iterator[None]:
        """Keep evaluation, logging and checkpoints off the open stage's clock and counters."""
        self.lap()
        before, start = replace(self.current), self._mark[0]
        try:
            yield
        finally:
            self._mark = self._now()
            self._reset_peak()
            self.current.eval_s += self._mark[0] - start
            for name in ("n_fwd", "n_bwd", "n_fwd_nograd", "flops"):
                setattr(self.current, name, getattr(before, name))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Bill nobody for the time inside, spent on loading pixels or waiting for another process."""
        self.lap()
        try:
            yield
        finally:
            self._mark = self._now()
            self._reset_peak()

    @contextmanager
    def apart(self) -> Iterator[tuple[dict[str, StageCost], dict[str, StageCost]]]:
        """Bill what happens inside to stages and shared costs of its own, handed out: those of a shared artifact."""
        before = self.stages, self.shared
        self.stages, self.shared = {}, {}
        try:
            yield self.stages, self.shared
        finally:
            self.stages, self.shared = before

    def inherit(self, key: str, cost: StageCost) -> None:
        """Add a shared artifact's cost, once; of several shares of a training the largest counts."""
        if key not in self.shared or cost.n_fwd > self.shared[key].n_fwd:
            self.shared[key] = cost

    def meter(self, model: nn.Module, trunk: nn.Module, example: Tensor) -> None:
        """Count every example that passes through `trunk` from now on, and its FLOPs.

        `example` is an input (1, ...) on which one forward of `model` is counted; a backward counts twice a forward.
        """
        flops = forward_flops(model, example)

        def forward(_: nn.Module, __: Any, out: Tensor) -> None:
            if not self._open:
                return
            cost = self.current
            cost.flops += flops * len(out)
            if out.grad_fn is not None and torch.is_grad_enabled():
                cost.n_fwd += len(out)
                # At the node, not at the tensor: Grad-CAM asks for the tensor's gradient and goes no further back.
                out.grad_fn.register_prehook(partial(backward, len(out)))
            else:
                cost.n_fwd_nograd += len(out)

        def backward(examples: int, _: Any) -> None:
            if self._open:
                self.current.n_bwd += examples
                self.current.flops += 2 * flops * examples

        trunk.register_forward_hook(forward)


@dataclass(frozen=True)
class CostReport:
    """Costs of a finished run: `marginal` given the block's ERM checkpoint, `scratch` with it."""

    stages: dict[str, StageCost]
    shared: dict[str, StageCost]
    marginal: StageCost
    scratch: StageCost

    @classmethod
    def of(cls, clock: Clock) -> "CostReport":
        """Sum the stages; features of the shared checkpoint belong to the run, only its training is shared."""
        own = [*clock.stages.values(), *(c for key, c in clock.shared.items() if not key.startswith("erm:"))]
        erm = [c for key, c in clock.shared.items() if key.startswith("erm:")]
        return cls(clock.stages, clock.shared, StageCost.total(own), StageCost.total([*own, *erm]))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for the record."""
        return asdict(self)
