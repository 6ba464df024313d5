"""What `profile` measures, as plain values: steps, pipelines, and the setting that they hold in."""

from dataclasses import dataclass
from typing import Any

import torch

from .backbones import build_backbone
from .cost import StageCost, forward_flops
from .errors import UserError
from .planning import Absent
from .record import RunRecord
from .spec import Recipe
from .steps import Block, Clock, Ratio, Side, trimmed_mean
from .yardsticks import Roofline, Throughput


@dataclass(frozen=True)
class StepCost:
    """One side's step: seconds of the clock, the images and what is done with them, FLOPs by PyTorch's counter.

    `images_per_s` is per wall second without making batches; `updates` are those of the classifier, 1 at most;
    `roofline_share` is FLOPs per second over the best that the device was seen to do.
    """

    seconds: float
    images: float
    images_per_s: float
    n_fwd: float
    n_bwd: float
    n_fwd_nograd: float
    updates: float
    flops: float
    roofline_share: float
    peak_mem_mib: float | None

    @classmethod
    def of(cls, side: Side, blocks: list[Block], roofline: Roofline) -> "StepCost":
        """The mean of all steps, times trimmed."""
        made = Block.joined(blocks)
        steps, updates = len(made.seconds), float(made.updated.mean())
        flops = side.flops(updates)
        return cls(
            seconds=made.mean,
            images=made.images / steps,
            images_per_s=made.images / steps / trimmed_mean(made.wall, made.updated),
            n_fwd=made.cost.n_fwd / steps,
            n_bwd=made.cost.n_bwd / steps,
            n_fwd_nograd=made.cost.n_fwd_nograd / steps,
            updates=updates,
            flops=flops,
            roofline_share=flops / made.mean / roofline.flops_per_s,
            peak_mem_mib=side.peak_memory(),
        )


@dataclass(frozen=True)
class Steps:
    """A method's training step beside ERM's. `step_ratio` is at equal images; `update_ratio` is for each update of the
    classifier, with as many images as the method takes for it (None where none was updated). `stage` is the training
    that the step is of.
    """

    stage: str
    step_ratio: Ratio
    update_ratio: Ratio | None
    method: StepCost
    erm: StepCost


@dataclass(frozen=True)
class Pipeline:
    """A whole run of so many epochs: its stages, what it inherits from shared artifacts, and sums as in a record; and
    ERM's from scratch in the same session.
    """

    epochs: int
    stages: dict[str, StageCost]
    shared: dict[str, StageCost]
    marginal: StageCost
    scratch: StageCost
    erm: StageCost

    @classmethod
    def of(cls, record: RunRecord, erm: StageCost) -> "Pipeline":
        """From a finished run."""
        if record.cost is None:
            raise UserError(f"{record.method}: its run failed: {record.error}")
        cost, epochs = record.cost, int(record.recipe["epochs"])
        stages, shared = (
            {name: StageCost(**stage.model_dump()) for name, stage in part.items()}
            for part in (cost.stages, cost.shared)
        )
        marginal, scratch = (StageCost(**part.model_dump()) for part in (cost.marginal, cost.scratch))
        return cls(epochs, stages, shared, marginal, scratch, erm)


@dataclass(frozen=True)
class Counted:
    """A network whose FLOPs are counted and not timed: those of a forward of one image of this size."""

    backbone: str
    size: int
    forward_flops: float

    @classmethod
    def of(cls, backbone: str, size: int) -> "Counted":
        """By PyTorch's counter, on a network without weights."""
        with torch.device("meta"):
            model = build_backbone(backbone, num_classes=2, image=(size, size))
            return cls(backbone, size, forward_flops(model, torch.empty(1, 3, size, size)))

    def flops(self, step: StepCost) -> float:
        """FLOPs of a step per image of its batch: a backward counts twice, what is outside of the networks nothing."""
        passes = step.n_fwd + step.n_fwd_nograd + 2 * step.n_bwd
        return self.forward_flops * passes / step.images


@dataclass(frozen=True)
class MethodCost:
    """What was measured of one method: no `steps` where it trains nothing on images, no `pipeline` where not asked."""

    label: str
    budget: str
    steps: Steps | None
    pipeline: Pipeline | None


@dataclass(frozen=True)
class Profile:
    """All that one command measured, and the setting that it holds in; `absent` are methods that do not exist there."""

    env: dict[str, Any]
    clock: Clock
    dataset: str
    image: tuple[int, int, int]
    backbone: str
    recipe: Recipe
    warmup: int
    steps: int
    rounds: int
    roofline: Roofline
    methods: list[MethodCost]
    absent: list[Absent]
    loops: Throughput | None
    counted: list[Counted]
