"""What records tell about the seconds of runs that are not made yet.

Seconds are only taken from records that this home holds of this device; records of other places, such as the committed
ones, tell what a method costs relative to ERM, which travels better. Where neither is known, the seconds are not known.
They are the recorded wall time with evaluation, of stages; what no stage covers (the start of workers, the predictions
that are scored) is not in them. On a GPU they are what a run would take that has it alone: workers that share one are
taken to share its time.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from . import record
from .artifacts import artifact_path
from .budget import POLICIES
from .home import runs_home
from .lab import erm_identity
from .record import Cost, RunRecord, Stage
from .spec import Block, RunSpec

COMMITTED = Path(__file__).parents[1] / "leaderboard" / "results"
"""Records that come with a checkout."""
TIMELESS = ("epochs", "lr", "momentum", "weight_decay", "schedule")
"""Fields of a recipe that do not change what an epoch costs."""


@dataclass(frozen=True)
class Device:
    """Where seconds were taken, as records tell: the name, and the CPU threads of a run."""

    name: str
    threads: int


@dataclass(frozen=True)
class Trained:
    """How long a training was: its updates, the epochs in which ERM makes as many, and its own epochs, 0 if unknown."""

    updates: int
    erm_epochs: float
    epochs: int = 0

    def is_of(self, epochs: int) -> bool:
        """Whether it seems to be as long as a recipe of so many epochs says, or to leave one of them out.

        It has no more updates than ERM then, but may have fewer: where networks take turns, or images are left out.
        """
        if self.erm_epochs >= 1.25 * epochs:
            return False
        if self.epochs:
            return max(epochs - 2, epochs / 2) < self.epochs <= epochs
        return self.erm_epochs > epochs / 2


@dataclass(frozen=True)
class Past:
    """A finished run; `here` if its seconds are those of this home and device."""

    spec: RunSpec
    settings: str
    own: dict[str, Stage]
    """Its stages, in seconds that they would have taken alone on the device."""
    shared: dict[str, Stage]
    trained: dict[str, Trained]
    """Those of its own and of shared stages that are trainings."""
    place: tuple[Any, ...]
    """Block but for seed and epochs, device and session: what ERM it is compared with."""
    here: bool

    @classmethod
    def of(cls, found: RunRecord, device: Device | None) -> "Past | None":
        """What a record tells, None where it is of no finished run; without a device it is of another place."""
        if found.status != "finished" or found.cost is None:
            return None
        env, spec = found.env, found.spec()
        sharers = _sharers(env)
        own, shared = (
            {name: _alone(part, sharers) for name, part in parts.items()}
            for parts in (found.cost.stages, found.cost.shared)
        )
        place = (_where(spec.block), *(str(env.get(name)) for name in ("device", "threads", "session")))
        alike = env.get("device_type") == "cuda" or (device is not None and env.get("threads") == device.threads)
        here = device is not None and env.get("device") == device.name and alike
        return cls(spec, _settings(spec), own, shared, _trained(found, found.cost), place, here)

    @property
    def epochs(self) -> int:
        """Those of its recipe."""
        return self.spec.block.recipe.epochs

    @property
    def erm(self) -> tuple[Stage, float] | None:
        """Its share of the block's ERM, and the epochs of that."""
        keys = (key for key in self.shared if _kind(key) == "erm" and key in self.trained)
        return next(((self.shared[key], self.trained[key].erm_epochs) for key in keys), None)

    def beyond_erm(self) -> Iterator[tuple[str, Stage]]:
        """What it costs once the block's ERM is there."""
        yield from self.own.items()
        yield from ((key, part) for key, part in self.shared.items() if _kind(key) != "erm")


@dataclass(frozen=True)
class Estimate:
    """What a run's own stages take, and every shared thing that it needs, by name: seconds, if they are `timed`, else
    multiples of what the block's ERM takes here, which is not known.
    """

    own: float
    needs: dict[str, float]
    by_ratio: bool = False
    """Whether they are what ERM takes here, times what the method took relative to ERM elsewhere or on other data."""
    timed: bool = True


class History:
    """What records tell about seconds: `own` ones of this home, and `others`, of which only ratios are taken."""

    def __init__(self, own: Iterable[RunRecord], others: Iterable[RunRecord], device: Device) -> None:
        self._alike: dict[tuple[str, ...], list[Past]] = defaultdict(list)
        self._trained: dict[tuple[str, ...], dict[int, Trained]] = defaultdict(dict)
        erm_here: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        erm_there: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        own = list(own)
        self._made = {found.run for found in own}
        made = [Past.of(found, device) for found in own] + [Past.of(found, None) for found in others]
        for past in filter(None, made):
            self._alike[_who(past.spec)].append(past)
            for name, trained in past.trained.items():
                self._trained[_what(past, name)].setdefault(past.epochs, trained)
            if past.erm is not None:
                erm, epochs = past.erm
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

    def estimate(self, spec: RunSpec) -> Estimate | None:
        """What a run takes by the records most like it, else by its ratio to ERM; None where not known."""
        alike = self._alike.get(_who(spec), [])
        here = _nearest([past for past in alike if past.here and past.place[0] == _where(spec.block)], spec)
        if here:
            own = median(
                sum(_seconds(part) * self._growth(past, name, spec.block) for name, part in past.own.items())
                for past in here
            )
            donor = min(here, key=lambda past: (past.spec.block.seed != spec.block.seed, past.spec.block.seed))
            return Estimate(own, dict(self._needs(spec, donor)))
        rated = _nearest([past for past in alike if self._erm_there.get(past.place)], spec)
        if not rated:
            return None
        ratio = median(self._ratio(past, spec.block) for past in rated)
        seconds = self.erm(spec.block)
        erm = 1.0 if seconds is None else seconds
        needs = {erm_name(spec.block): erm} if rated[0].erm else {}
        return Estimate(erm * ratio, needs, by_ratio=True, timed=seconds is not None)

    def _ratio(self, past: Past, block: Block) -> float:
        """Device seconds beyond ERM, at the epochs of a block, over those of that ERM, of one session and device."""
        seconds = sum(part.device_s * self._growth(past, name, block) for name, part in past.beyond_erm())
        return seconds / (self._erm_there[past.place] * block.recipe.epochs)

    def _growth(self, past: Past, name: str, block: Block) -> float:
        """By how much a stage takes longer under the epochs of a block."""
        trained = self._trained.get(_what(past, name))
        return block.recipe.epochs / past.epochs if trained and grows(trained) else 1.0

    def _needs(self, spec: RunSpec, donor: Past) -> Iterator[tuple[str, float]]:
        """Shared things of a run as those of a like one; of another block they are there under another, unknown key."""
        same = donor.spec.block.key == spec.block.key
        for key, part in donor.shared.items():
            if _kind(key) == "erm":
                yield erm_name(spec.block), self.erm(spec.block) or 0.0
            else:
                seconds = _seconds(part) * self._growth(donor, key, spec.block)
                yield key if same else f"{key}@{spec.block.key}", seconds


def grows(trained: Mapping[int, Trained]) -> bool:
    """Whether a training, known by the epochs of recipes, is the longer, the more epochs a recipe has.

    Some have a length of their own. Two recipes tell, else its likeness to the recipe's.
    """
    few, many = min(trained), max(trained)
    short, long = trained[few], trained[many]
    if few == many:
        return short.is_of(few)
    return short.updates != long.updates and (long.erm_epochs / short.erm_epochs) ** 2 > many / few


def erm_name(block: Block) -> str:
    """What a block's shared ERM is called among shared things, as in `Cost.shared`."""
    return f"erm:{artifact_path('erm', erm_identity(block)).name}"


def read_history(device: Device, specs: Iterable[RunSpec]) -> History:
    """What the home's records of these runs' datasets and those of the checkout tell; damaged ones tell nothing."""
    folders = dict.fromkeys(runs_home() / record.slug(spec.block.dataset) for spec in specs)
    own = (path for folder in folders for path in record.find(folder))
    return History(record.readable(own), record.readable(record.find(COMMITTED)), device)


# ---------------------------------------------------------------------------------------------------- what is alike


def _who(spec: RunSpec) -> tuple[str, ...]:
    """What must be equal for two runs to do the same kind of work."""
    return spec.method, spec.source, spec.policy if spec.policy in POLICIES else "", spec.extra


def _where(block: Block) -> tuple[Any, ...]:
    """What an epoch's seconds depend on, beside the device."""
    recipe = ((name, value) for name, value in asdict(block.recipe).items() if name not in TIMELESS)
    return block.dataset, block.backbone, *recipe


def _nearest(pasts: list[Past], spec: RunSpec) -> list[Past]:
    """Those that are most like a run: in its place, then its backbone, its settings, its epochs, its budget."""
    settings = _settings(spec)

    def likeness(past: Past) -> tuple[bool, ...]:
        return (
            past.place[0] == _where(spec.block),
            past.spec.block.backbone == spec.block.backbone,
            past.settings == settings,
            past.epochs == spec.block.recipe.epochs,
            past.spec.budget == spec.budget,
        )

    best = max(map(likeness, pasts), default=())
    return [past for past in pasts if likeness(past) == best]


def _what(past: Past, stage: str) -> tuple[str, ...]:
    """What must be equal for two stages to be the same training."""
    return (*_who(past.spec), past.settings, stage if stage in past.own else _kind(stage))


def _kind(name: str) -> str:
    """What a stage or a shared thing is, without its key."""
    return name.partition(":")[0]


def _settings(spec: RunSpec) -> str:
    return json.dumps([spec.config, spec.source_config])  # a record has a list where a run has a tuple


def _trained(found: RunRecord, cost: Cost) -> dict[str, Trained]:
    """A run's trainings; of the last of its own the record holds every epoch, where they were evaluated."""
    size = found.recipe["batch_size"]
    images = sum(group.n_train + group.m_val * bool(found.extra) for group in found.groups)
    batches = max(1, images // size + (images % size > 1))  # a last one of one image joins its neighbour
    updates = {name: part.n_updates for name, part in (cost.stages | cost.shared).items() if part.n_updates}
    last = next((name for name in reversed(cost.stages) if name in updates), None)
    epochs = {last: len(found.history)}
    return {name: Trained(count, count / batches, epochs.get(name, 0)) for name, count in updates.items()}


def _sharers(env: Mapping[str, Any]) -> int:
    """Workers whose seconds a run's are, too. On a CPU every one has cores of its own."""
    told = env.get("sharers")
    return max(1, told) if env.get("device_type") == "cuda" and isinstance(told, int) else 1


def _alone(stage: Stage, sharers: int) -> Stage:
    """A stage of one worker among so many on a GPU as it would take without them."""
    times = ("wall_s", "device_s", "eval_s")
    return stage.model_copy(update={name: getattr(stage, name) / sharers for name in times})


def _seconds(stage: Stage) -> float:
    """Wall seconds of a stage with its evaluation."""
    return stage.wall_s + stage.eval_s
