"""What a plan will take before it runs: which runs are finished, what they share, and seconds from recorded costs.

Seconds are only taken from records that this home holds of this device; records of other places, such as the committed
ones, tell what a method costs relative to ERM, which travels better. Where neither is known, the seconds are not known.
They are the recorded wall time with evaluation, of stages; what no stage covers (the start of workers, the predictions
that are scored) is not in them.
"""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from . import record
from .artifacts import artifact_path
from .budget import POLICIES
from .errors import CorruptFile
from .home import artifacts_home, runs_home
from .lab import erm_identity
from .planning import Plan
from .record import Cost, RunRecord, Stage
from .registry import METHODS
from .runner import finished
from .scheduling import Job, simulate
from .spec import Block, RunSpec

COMMITTED = Path(__file__).parents[1] / "leaderboard" / "results"
"""Records that come with a checkout."""
TIMELESS = ("epochs", "lr", "momentum", "weight_decay", "schedule")
"""Fields of a recipe that do not change what an epoch costs."""
State = Literal["finished", "failed", "stale", "new"]


@dataclass(frozen=True)
class Device:
    """Where seconds were taken, as records tell: the name, and the CPU threads of a run."""

    name: str
    threads: int


@dataclass(frozen=True)
class Past:
    """A finished run; `here` if its seconds are those of this home and device."""

    spec: RunSpec
    cost: Cost
    images: int
    """Images of an epoch."""
    place: tuple[Any, ...]
    """Block but for seed and epochs, device and session: what ERM it is compared with."""
    here: bool

    @classmethod
    def of(cls, found: RunRecord, device: Device | None) -> "Past | None":
        """What a record tells, None where it is of no finished run; without a device it is of another place."""
        if found.status != "finished" or found.cost is None:
            return None
        env, spec = found.env, found.spec()
        images = sum(group.n_train for group in found.groups)
        place = (_where(spec.block), *(str(env.get(name)) for name in ("device", "threads", "session")))
        alike = env.get("device_type") == "cuda" or (device is not None and env.get("threads") == device.threads)
        here = device is not None and env.get("device") == device.name and alike
        return cls(spec, found.cost, images, place, here)

    @property
    def erm(self) -> Stage | None:
        """Its share of the block's ERM."""
        shares = (stage for key, stage in self.cost.shared.items() if key.startswith("erm:"))
        return next((stage for stage in shares if stage.n_fwd), None)

    def scale(self, block: Block) -> float:
        """Epochs of a block over its own."""
        return block.recipe.epochs / self.spec.block.recipe.epochs

    def own(self, block: Block) -> float:
        """Seconds of its own stages, at the epochs of a block."""
        return sum(_seconds(stage, self.scale(block)) for stage in self.cost.stages.values())


@dataclass(frozen=True)
class Estimate:
    """Predicted seconds of a run's own, and of every shared thing that it needs, by name."""

    own: float
    needs: dict[str, float]
    by_ratio: bool = False
    """Whether they are what ERM takes here, times what the method took relative to ERM elsewhere or on other data."""


class History:
    """What records tell about seconds: `own` ones of this home, and `others`, of which only ratios are taken."""

    def __init__(self, own: Iterable[RunRecord], others: Iterable[RunRecord], device: Device) -> None:
        self._alike: dict[tuple[str, ...], list[Past]] = defaultdict(list)
        erm_here: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        erm_there: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        own = list(own)
        self._made = {found.run for found in own}
        made = [Past.of(found, device) for found in own] + [Past.of(found, None) for found in others]
        for past in filter(None, made):
            self._alike[_who(past.spec)].append(past)
            if (erm := past.erm) is not None:
                epochs = erm.n_fwd / max(past.images, 1)
                erm_there[past.place].append(erm.device_s / epochs)
                if past.here:
                    erm_here[past.place[0]].append(_seconds(erm) / epochs)
        self._erm_here = {place: median(found) for place, found in erm_here.items()}
        self._erm_there = {place: median(found) for place, found in erm_there.items()}

    def erm(self, block: Block) -> float | None:
        """Seconds of a block's shared ERM on this device."""
        epoch = self._erm_here.get(_where(block))
        return None if epoch is None else epoch * block.recipe.epochs

    def stale(self, spec: RunSpec) -> bool:
        """Whether the run was made with other code of its method."""
        codes = {past.spec.code for past in self._alike.get(_who(spec), ()) if past.spec.block.seed == spec.block.seed}
        return any(replace(spec, code=code).hash in self._made for code in codes - {spec.code})

    def estimate(self, spec: RunSpec, unit: float | None = None) -> Estimate | None:
        """Seconds of a run: those of the records most like it, else by its ratio to ERM; None where not known.

        Where ERM was not timed here either, a `unit` may stand for its seconds.
        """
        alike = self._alike.get(_who(spec), [])
        timed = _nearest([past for past in alike if past.here and past.place[0] == _where(spec.block)], spec)
        erm = self.erm(spec.block) or unit
        if timed:
            own = median(past.own(spec.block) for past in timed)
            donor = min(timed, key=lambda past: (past.spec.block.seed != spec.block.seed, past.spec.block.seed))
            return Estimate(own, dict(self._needs(spec, donor)))
        rated = _nearest([past for past in alike if self._ratio(past) is not None], spec)
        if erm is None or not rated:
            return None
        ratio = median(self._ratio(past) or 0.0 for past in rated)
        return Estimate(erm * ratio, {erm_name(spec.block): erm} if rated[0].erm else {}, by_ratio=True)

    def _ratio(self, past: Past) -> float | None:
        """Device seconds beyond the block's ERM over those of that ERM, both of one session and device."""
        epoch = self._erm_there.get(past.place)
        return past.cost.marginal.device_s / (epoch * past.spec.block.recipe.epochs) if epoch else None

    def _needs(self, spec: RunSpec, donor: Past) -> Iterator[tuple[str, float]]:
        """Shared things of a run as those of a like one; of another block they are there under another, unknown key."""
        same = donor.spec.block.key == spec.block.key
        for key, stage in donor.cost.shared.items():
            if key.startswith("erm:"):
                yield erm_name(spec.block), self.erm(spec.block) or _seconds(stage, donor.scale(spec.block))
            else:
                yield key if same else f"{key}@{spec.block.key}", _seconds(stage, donor.scale(spec.block))


def jobs(specs: Iterable[RunSpec], history: History) -> list[Job]:
    """Runs as the scheduler takes them, in units of an ERM where that was not timed here.

    A run of which nothing is known is taken for a training as long as ERM, on top of the shared ERM unless its method
    is a plain objective.
    """
    return [_job(spec, history) for spec in specs]


def _job(spec: RunSpec, history: History) -> Job:
    training = history.erm(spec.block) or 1.0
    found = history.estimate(spec, training)
    if found is not None:
        return Job(spec.hash, found.own, found.needs)
    return Job(spec.hash, training, {erm_name(spec.block): training} if _may_need_erm(spec) else {})


def _may_need_erm(spec: RunSpec) -> bool:
    objective = hasattr(METHODS[spec.method].cls, "loss")
    return not objective or bool(spec.source) or spec.policy == "subset"


def there(jobs: Iterable[Job]) -> set[str]:
    """Shared things that lie in the home already."""
    return {thing for job in jobs for thing in job.needs if _on_disk(thing)}


def _on_disk(thing: str) -> bool:
    kind, _, key = thing.partition(":")
    return os.path.exists(artifacts_home() / kind / key / "meta.json")  # False for a name that no file can have


def erm_name(block: Block) -> str:
    """What a block's shared ERM is called among shared things, as in `Cost.shared`."""
    return f"erm:{artifact_path('erm', erm_identity(block)).name}"


# -------------------------------------------------------------------------------------------------------- a forecast


@dataclass(frozen=True)
class SharedErm:
    """A block's ERM that several runs start from: whether it is there, and what it takes, where known.

    It is `certain` where records tell that one of the runs needs it.
    """

    block: Block
    made: bool
    seconds: float | None
    certain: bool = True


@dataclass(frozen=True)
class Forecast:
    """What a plan would do: by run hash the state, and the seconds of what is to run, where they are known."""

    workers: int
    states: Mapping[str, State]
    seconds: Mapping[str, float]
    """With those of the shared things that the run is the first to need."""
    by_ratio: frozenset[str] = frozenset()
    shared: list[SharedErm] = field(default_factory=list)
    wall_s: float = 0.0
    """Seconds from the first run's start to the last one's end, of the runs whose seconds are known."""

    @property
    def missing(self) -> list[str]:
        """What is to run."""
        return [run for run, state in self.states.items() if state != "finished"]


def foretell(rounds: list[list[RunSpec]], states: Mapping[str, State], history: History, workers: int) -> Forecast:
    """Predict what runs take on so many workers; those of a round start when the round before has ended."""
    seconds: dict[str, float] = {}
    shared: dict[str, SharedErm] = {}
    made: set[str] = set()
    by_ratio: set[str] = set()
    wall, gone = 0.0, {run for run, state in states.items() if state == "finished"}
    for specs in rounds:
        missing = {spec.hash: spec for spec in specs if spec.hash not in gone}
        todo, known = jobs(missing.values(), history), {run: history.estimate(spec) for run, spec in missing.items()}
        made |= there(todo)
        shared = _shared_erms(todo, missing, history, made) | shared
        by_ratio |= {run for run, found in known.items() if found and found.by_ratio}
        timed = [job for job in todo if known[job.key]]
        spans = simulate(timed, workers, made)
        seconds |= {run: end - start for run, (start, end) in spans.items()}
        wall += max((end for _, end in spans.values()), default=0.0)
        made |= {thing for job in timed for thing in job.needs}
        gone |= missing.keys()
    return Forecast(workers, states, seconds, frozenset(by_ratio), list(shared.values()), wall)


def _shared_erms(
    todo: list[Job], specs: Mapping[str, RunSpec], history: History, made: Collection[str]
) -> dict[str, SharedErm]:
    """The shared ERMs that runs need, by name."""
    found: dict[str, SharedErm] = {}
    for job in todo:
        spec = specs[job.key]
        name = erm_name(spec.block)
        if name in job.needs:
            certain = history.estimate(spec, unit=1.0) is not None or (name in found and found[name].certain)
            found[name] = SharedErm(spec.block, name in made, history.erm(spec.block), certain)
    return found


def of_plan(plan: Plan, history: History, workers: int) -> Forecast:
    """Predict a plan: its searches, then its runs and, as if draw 0 were chosen, those that follow from searches."""
    searched = [planned.spec for planned in plan.searched() if planned.spec]
    chosen = [
        replace(run, candidates=tuple(one.hash for one in sweep.candidates))
        for sweep in plan.sweeps
        for run in sweep.runs[1:]  # on the first seed it is one of the draws
    ]
    runs = [planned.spec for planned in plan.runs if planned.spec]
    return foretell([searched, runs + chosen], states([*searched, *runs, *chosen], history), history, workers)


def states(specs: Iterable[RunSpec], history: History) -> dict[str, State]:
    """How each run stands in this home, by hash."""
    return {spec.hash: _state(spec, history) for spec in specs}


def _state(spec: RunSpec, history: History) -> State:
    if finished(spec) is not None:
        return "finished"
    path = record.record_path(runs_home(), spec)
    if path.exists() and record.read(path).status == "failed":
        return "failed"
    return "stale" if history.stale(spec) else "new"


def settled(plan: Plan) -> Plan:
    """A plan in which the runs that follow from searches stand, where all draws have been made."""
    runs, open_ = list(plan.runs), []
    for sweep in plan.sweeps:
        found = {one.hash: made for one in sweep.candidates if (made := finished(one)) is not None}
        if len(found) < len({one.hash for one in sweep.candidates}):
            open_.append(sweep)
        else:
            runs += Plan([], plan.stores, [sweep]).decided(found).runs
    return Plan(runs, plan.stores, open_)


def read_history(device: Device, specs: Iterable[RunSpec]) -> History:
    """What the home's records of these runs' datasets and those of the checkout tell; damaged ones tell nothing."""
    folders = dict.fromkeys(runs_home() / record.slug(spec.block.dataset) for spec in specs)
    return History((found for folder in folders for found in _readable(folder)), _readable(COMMITTED), device)


def _readable(folder: Path) -> Iterator[RunRecord]:
    for path in record.find(folder) if folder.is_dir() else ():
        try:
            yield record.read(path)
        except CorruptFile:
            continue


# ---------------------------------------------------------------------------------------------------- what is alike


def _who(spec: RunSpec) -> tuple[str, ...]:
    """What must be equal for two runs to do the same kind of work."""
    return spec.method, spec.source, spec.policy if spec.policy in POLICIES else "", spec.extra


def _where(block: Block) -> tuple[Any, ...]:
    """What an epoch's seconds depend on, beside the device."""
    recipe = ((name, value) for name, value in asdict(block.recipe).items() if name not in TIMELESS)
    return block.dataset, block.backbone, *recipe


def _nearest(pasts: list[Past], spec: RunSpec) -> list[Past]:
    """Those that are most like a run: in its place, then its backbone, its settings, its budget."""

    def likeness(past: Past) -> tuple[bool, ...]:
        one, other = past.spec, spec
        settings = (one.config, one.source_config) == (other.config, other.source_config)
        return (
            past.place[0] == _where(other.block),
            one.block.backbone == other.block.backbone,
            settings,
            one.budget == other.budget,
        )

    best = max(map(likeness, pasts), default=())
    return [past for past in pasts if likeness(past) == best]


def _seconds(stage: Stage, scale: float = 1.0) -> float:
    """Wall seconds of a stage with its evaluation; those of a training, scaled to other epochs."""
    return (stage.wall_s + stage.eval_s) * (scale if stage.n_updates else 1.0)
