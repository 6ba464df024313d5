"""What methods cost, measured beside ERM in one process: their steps, their whole pipelines, the share of the device.

Nothing is recorded as a run: all is made in a temporary home, and timed apart from the runs whose accuracy counts.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import profile as profiler

from . import runner
from .cost import StageCost
from .device import pick_device
from .engine import Objective
from .errors import UserError, one_line, require
from .home import data_home, home_at, write_bytes
from .planning import Absent, Plan, Request, plan
from .profiled import Counted, MethodCost, Pipeline, Profile, StepCost, Steps
from .provenance import SESSION, environment
from .record import RunRecord
from .registry import METHODS, SOURCES
from .spec import RunSpec
from .steps import Block, Setup, Side, Stopwatch, choose_training, find_training, interleave, paired_ratio, trainings
from .store import Store
from .yardsticks import Throughput, measure_loops, measure_roofline

DATASET, ERM = "digits2", "erm"
TRACED = 3
"""Steps in a trace."""
IMAGES = 512
"""Generated train images, or four batches of them: the last batch of an epoch is left out."""
EPOCHS = 2
"""Epochs of a pipeline, unless the settings say otherwise."""
Report = Callable[[str, int, int], None]
"""Told (what, done, total)."""


@dataclass(frozen=True)
class Effort:
    """Steps before anything is timed, steps of a block (None: what ERM does in about a second), pairs of blocks."""

    warmup: int
    steps: int | None
    rounds: int

    def __post_init__(self) -> None:
        for name, least in (("warmup", 1), ("steps", 2), ("rounds", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"--{name} {value}: it must be at least {least}")


EFFORTS = {"cuda": Effort(20, 50, 9), "cpu": Effort(3, None, 9)}
FITTED = (4, 50)
"""Fewest and most steps of a block whose length is fitted to ERM's speed; their number is even."""


@dataclass(frozen=True)
class Ask:
    """What is to be measured: methods, each as `METHOD [BUDGET]`, on a dataset, or on generated images of `size` px, in
    one setting.

    `stages` adds whole pipelines for all methods (those of several stages have them anyway), `loops` the engine's
    throughput beside that of other loops; `counted` larger networks, with the size of their images, whose FLOPs follow
    from the passes that are counted here; `trace` is where a trace of the method's steps goes. With `skip` a method
    that refuses the network or the images is left out and named.
    """

    methods: tuple[str, ...]
    dataset: str = ""
    backbone: str = ""
    size: int | None = None
    budget: str = ""
    batch: int | None = None
    settings: dict[str, str] = field(default_factory=dict)
    stages: bool = False
    loops: bool = False
    counted: tuple[tuple[str, int], ...] = ()
    skip: bool = False
    trace: Path | None = None
    root: Path | None = None


LARGE = (("resnet50", 224), ("convnext_tiny", 224), ("convnext_base", 224))

SUITES = {
    "methods": Ask((), backbone="resnet18", size=64, stages=True, counted=LARGE, skip=True),
    "gpu": Ask(
        (ERM, "groupdro", "ex2l", "dfr", "dfr+exmap", "mac", "jtt"),
        backbone="resnet50",
        size=224,
        batch=128,
        settings={"recipe.precision": "bf16", "recipe.channels_last": "true", "recipe.augment": "crop+flip"},
        stages=True,
        loops=True,
        counted=LARGE,
        skip=True,
    ),
}
"""What the project measures itself on, by name; without methods: all of them. ERM beside itself tells how far ratios
can be trusted.
"""


def everything() -> tuple[str, ...]:
    """All registered methods, ERM first, and DFR with every group source that infers groups without a label, beside the
    control that takes classes for groups.
    """
    hosts = (ERM, *(name for name in METHODS if name != ERM))
    sources = (name for name in SOURCES if SOURCES[name].requires.fit == "none" and name != "class")
    return (*hosts, "dfr@class none", *(f"dfr+{name}" for name in sources))


# ------------------------------------------------------------------------------------------------------- measuring


def measure(ask: Ask, effort: Effort | None = None, report: Report = lambda what, done, total: None) -> Profile:
    """Measure methods one after the other, each beside ERM; raises `UserError` for what cannot run, before any work."""
    device = pick_device()
    effort = effort or EFFORTS[device.type]
    require(ask.trace is None or len(ask.methods) == 1, "--trace: a trace is of one method; name one with --method")
    with _fresh_home(with_data=bool(ask.dataset) or ask.size is None), _without_denormals():
        made, absent = _planned(ask, report)
        erm, *runs = made.runs
        specs = [run.spec for run in runs if run.spec]
        absent += [run.absent for run in runs if run.absent]
        if erm.spec is None or not specs:
            raise UserError("\n".join(f"{run.label}: n/a ({run.reason})" for run in made.runs if run.absent))
        bench = _Bench(made.stores[erm.spec.block.dataset], erm.spec, effort, ask, report)
        return bench.profile(specs, absent)


@contextmanager
def _without_denormals() -> Iterator[None]:
    """Numbers that are all but zero are zero: a processor takes several times as long for them, and a loss that reaches
    zero on generated images makes many.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def _fresh_home(with_data: bool = True) -> Iterator[None]:
    """A temporary home, with the present one's datasets in it."""
    data = data_home()
    with TemporaryDirectory(prefix="worstgroup-profile-") as folder:
        if with_data:
            data.mkdir(parents=True, exist_ok=True)
            (Path(folder) / "data").symlink_to(data.resolve(), target_is_directory=True)
        with home_at(Path(folder)):
            yield


def _planned(ask: Ask, report: Report) -> tuple[Plan, list[Absent]]:
    """ERM and the methods, planned together, and those that are skipped.

    Raises `UserError` for everything that is wrong with the others.
    """
    require(bool(ask.methods), "name a method with --method, or several separated by commas")
    require(ask.size is None or ask.size >= 8, f"--size {ask.size}: it must be at least 8 px")
    require(ask.batch is None or ask.batch >= 2, f"--batch {ask.batch}: it must be at least 2 images")
    settings = {"recipe.epochs": str(EPOCHS), **ask.settings}
    if ask.batch is not None:
        settings["recipe.batch_size"] = str(ask.batch)
    dataset = ask.dataset or DATASET
    if ask.size is not None and ask.dataset:
        settings["data.size"] = str(ask.size)
    elif ask.size is not None:
        dataset = f"generated:{ask.size}x{max(IMAGES, 4 * (ask.batch or 0))}"
    request = partial(Request, dataset, backbone=ask.backbone, weights="none", seeds=(0,), settings=settings)
    cells = (text.partition(" ") for text in ask.methods)
    asked = [request(name, budget=budget or ask.budget) for name, _, budget in cells]
    absent: list[Absent] = []
    for one in list(asked) if ask.skip else ():
        others = [other.method for other in asked if other is not one]
        own = {key: value for key, value in settings.items() if key.partition(".")[0] not in others}
        try:
            plan([replace(one, settings=own)], ask.root, report=report)
        except UserError as error:
            asked.remove(one)
            absent.append(Absent(dataset, ask.backbone, one.method, one.budget, str(error)))
    return plan([request(ERM), *asked], ask.root, report=report), absent


class _Bench:
    """Measures methods beside one ERM, which goes on training."""

    def __init__(self, store: Store, erm: RunSpec, effort: Effort, ask: Ask, report: Report) -> None:
        self.store, self.erm, self.effort, self.ask, self.report = store, erm, effort, ask, report
        recipe, images = erm.block.recipe, sum(store.card.counts["train"])
        if recipe.batch_size > images:
            text = f"batches of {recipe.batch_size} images: {store.card.name} has {images} to train on; lower --batch"
            raise UserError(text)
        self.roofline = measure_roofline(pick_device(), recipe.precision)
        setup = self._alone(erm)
        if setup is None:
            raise UserError(f"{erm.label}: there is no training on images to compare with")
        self.side = self._warm(setup)
        self.steps_of_block = effort.steps or fitted_steps(self.side.block(2))

    def profile(self, specs: list[RunSpec], absent: list[Absent]) -> Profile:
        """All methods, one after the other; with `skip` those that fail are among the absent ones."""
        block, card = self.erm.block, self.store.card
        made = []
        for spec in specs:
            try:
                made.append(self.method(spec))
            except (UserError, RuntimeError) as error:
                if not self.ask.skip:
                    raise
                reason = one_line(str(error))
                absent.append(Absent(card.name, block.backbone, spec.method_label, str(spec.budget), reason))
        return Profile(
            env=environment(SESSION),
            clock=Stopwatch(self.side.device).clock,
            dataset=card.name,
            image=card.image,
            backbone=block.backbone,
            recipe=block.recipe,
            warmup=self.effort.warmup,
            steps=self.steps_of_block,
            rounds=self.effort.rounds,
            roofline=self.roofline,
            methods=made,
            absent=absent,
            loops=self.loops() if self.ask.loops else None,
            counted=[Counted.of(name, size) for name, size in self.ask.counted],
        )

    def _alone(self, spec: RunSpec) -> Setup | None:
        """The training of a method, before anything else was made."""
        with _fresh_home():
            return find_training(spec, self.store)

    def _warm(self, setup: Setup) -> Side:
        side = Side(setup)
        side.block(self.effort.warmup)
        return side

    def method(self, spec: RunSpec) -> MethodCost:
        """Pipeline, where it is asked for or the method is one, and steps."""
        several = not issubclass(METHODS[spec.method].cls, Objective) and spec.method != ERM
        pipeline, setup = None, None
        if self.ask.stages or several or spec.source:
            pipeline, setup = self.pipeline(spec)
        else:
            setup = self._alone(spec)
        steps = self.steps(spec, setup) if setup else None
        del setup
        gc.collect()  # networks and images of this method, before the next one's come
        return MethodCost(spec.method_label, str(spec.budget), steps, pipeline)

    def pipeline(self, spec: RunSpec) -> tuple[Pipeline, Setup | None]:
        """A whole run beside ERM's, which is made once for all methods, and what it trained."""
        erm = Pipeline.of(self._run(self.erm), StageCost()).scratch
        with trainings(spec) as found:
            made = Pipeline.of(self._run(spec), erm)
        return made, self._alone(spec) if spec.method == ERM else choose_training(found)

    def _run(self, spec: RunSpec) -> RunRecord:
        stages = f"{spec.method_label}: stages"
        record = runner.run_spec(spec, self.store, lambda stage, epoch, epochs: self.report(stages, epoch, epochs))
        require(record.status == "finished", f"{spec.label}: it failed: {record.error}")
        return record

    def steps(self, spec: RunSpec, setup: Setup) -> Steps:
        """Blocks of steps, in turns with ERM's."""
        erm, own = self.side, self._warm(setup)
        told = partial(self.report, f"{spec.method_label}: steps")
        theirs, ours = interleave((erm, own), self.effort.rounds, self.steps_of_block, told)
        if self.ask.trace:
            write_trace(own, self.ask.trace)
        method, base = (StepCost.of(side, made, self.roofline) for side, made in ((own, ours), (erm, theirs)))
        ratio = paired_ratio([block.mean for block in ours], [block.mean for block in theirs])
        step_ratio = ratio.times(base.images / method.images)
        update_ratio = ratio.times(base.updates / method.updates) if method.updates else None
        return Steps(own.training.stage, step_ratio, update_ratio, method, base)

    def loops(self) -> Throughput:
        """ERM's images per second with all that the engine does, beside those of other loops."""
        side, block = self.side, self.erm.block
        made = side.block(self.steps_of_block)
        pixels = side.training.train
        images = pixels.gather(torch.arange(min(len(pixels), 4 * block.recipe.batch_size)))
        return measure_loops(
            made.images / made.whole,
            images,
            block.backbone,
            block.recipe,
            side.device,
            steps=self.steps_of_block,
            warmup=self.effort.warmup,
        )


def fitted_steps(block: Block) -> int:
    """An even number of steps like those of a block that take about a second together."""
    fewest, most = FITTED
    return max(fewest, min(most, 2 * round(1 / block.mean / 2)))


def write_trace(side: Side, path: Path) -> None:
    """A few steps as a trace for chrome://tracing or Perfetto; raises `DiskError`."""
    with profiler() as traced:
        side.block(TRACED)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        traced.export_chrome_trace(str(file))
        write_bytes(path, file.read_bytes())
