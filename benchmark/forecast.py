"""What a plan will take before it runs: which runs are finished, what they share, and seconds as `history.py` tells."""

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from . import record
from .errors import CorruptFile
from .history import Estimate, History, erm_name
from .home import artifacts_home, runs_home
from .machine import on_one_device
from .planning import Plan
from .registry import METHODS
from .runner import adopts, finished
from .scheduling import Job, simulate
from .spec import Block, RunSpec

State = Literal["finished", "adopted", "failed", "stale", "new"]
"""`adopted`: made already, as a draw of its search; to be copied."""
MADE: tuple[State, ...] = ("finished", "adopted")


def jobs(specs: Iterable[RunSpec], history: History) -> list[Job]:
    """Runs as the scheduler takes them, in units of an ERM where that was not timed here."""
    return [_job(spec, history.estimate(spec), history) for spec in specs]


def _job(spec: RunSpec, found: Estimate | None, history: History) -> Job:
    """A run of which nothing is known is taken for a training as long as ERM, on top of the shared ERM unless its
    method is a plain objective.
    """
    if found is not None:
        return Job(spec.hash, found.own, found.needs)
    training = history.erm(spec.block) or 1.0
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
    """What a plan would do: by run hash the state, and the seconds of what is to run, where they are known.

    With no `workers` nothing is predicted.
    """

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
        return [run for run, state in self.states.items() if state not in MADE]


def foretell(
    rounds: list[list[RunSpec]], states: Mapping[str, State], history: History, workers: int, gpus: int = 0
) -> Forecast:
    """Predict what runs take on so many workers; those of a round start when the round before has ended.

    `gpus` are those that the workers share, 0 where they compute on the CPU.
    """
    seconds = {run: 0.0 for run, state in states.items() if state == "adopted"}
    shared: dict[str, SharedErm] = {}
    made: set[str] = set()
    by_ratio: set[str] = set()
    wall, gone = 0.0, {run for run, state in states.items() if state in MADE}
    for specs in rounds:
        missing = {spec.hash: spec for spec in specs if spec.hash not in gone}
        found = {run: history.estimate(spec) for run, spec in missing.items()}
        todo = [_job(spec, found[run], history) for run, spec in missing.items()]
        made |= there(todo)
        sharers = on_one_device(min(workers, len(missing)), gpus) if gpus else 1
        shared = _shared_erms(zip(missing.values(), todo, strict=True), found, history, made, sharers) | shared
        known = {run: one for run, one in found.items() if one and one.timed}
        timed = [job for job in todo if job.key in known]
        spans = simulate(timed, min(workers, gpus or workers), made)
        seconds |= {run: (end - start) * sharers for run, (start, end) in spans.items()}
        wall += max((end for _, end in spans.values()), default=0.0)
        by_ratio |= {run for run, one in known.items() if one.by_ratio}
        made |= {thing for job in timed for thing in job.needs}
        gone |= missing.keys()
    return Forecast(workers, states, seconds, frozenset(by_ratio), list(shared.values()), wall)


def _shared_erms(
    todo: Iterable[tuple[RunSpec, Job]],
    found: Mapping[str, Estimate | None],
    history: History,
    made: Collection[str],
    sharers: int,
) -> dict[str, SharedErm]:
    """The shared ERMs that runs need, by name."""
    shared: dict[str, SharedErm] = {}
    for spec, job in todo:
        name, alone = erm_name(spec.block), history.erm(spec.block)
        if name in job.needs:
            certain = found[job.key] is not None or (name in shared and shared[name].certain)
            seconds = None if alone is None else alone * sharers
            shared[name] = SharedErm(spec.block, name in made, seconds, certain)
    return shared


def of_plan(plan: Plan, history: History, workers: int, gpus: int = 0, *, one_by_one: bool = False) -> Forecast:
    """Predict a plan: its searches, then its runs and, as if draw 0 were chosen, those that follow from searches.

    The draws of searches may go `one_by_one`. Without workers, where it is not known what runs are made on, only the
    states are told.
    """
    searched = [planned.spec for planned in plan.searched() if planned.spec]
    chosen = [
        replace(run, candidates=tuple(one.hash for one in sweep.candidates))
        for sweep in plan.sweeps
        for run in sweep.runs[1:]  # on the first seed it is one of the draws
    ]
    runs = [planned.spec for planned in plan.runs if planned.spec]
    found = states([*searched, *runs], history) | dict.fromkeys((spec.hash for spec in chosen), "new")
    rounds = [*([one] for one in searched)] if one_by_one else [searched]
    return foretell([*rounds, runs + chosen] if workers else [], found, history, workers, gpus)


def states(specs: Iterable[RunSpec], history: History) -> dict[str, State]:
    """How each run stands in this home, by hash."""
    return {spec.hash: _state(spec, history) for spec in specs}


def _state(spec: RunSpec, history: History) -> State:
    if finished(spec) is not None:
        return "finished"
    if adopts(spec):
        return "adopted"
    path = record.record_path(runs_home(), spec)
    with suppress(CorruptFile):  # without predictions it counts for nothing, and is made again
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
