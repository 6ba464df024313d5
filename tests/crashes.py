"""What tests of crashes share: children of the zygote, the moments of an undisturbed run, and what must be equal."""

import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from crash_points import Point
from helpers import Result
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.benchmark.record import RunRecord, find, read, read_predictions

Command = tuple[str, ...]
RUN: Command = ("run", "--dataset", "tiny", "--method", "erm,groupdro,jtt,dfr", "--seeds", "0", "--jobs", "1")
PRUNE: Command = ("cache", "--prune")
COUNTS = ("n_fwd", "n_bwd", "n_fwd_nograd", "n_updates", "n_head_fits")


class Zygote:
    """Starts the program in forked children; see `zygote.py`."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self._numbers = scratch, count()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def _ask(self, question: Any) -> int:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def start(
        self, home: Path, *commands: Command, point: Point | None = None, powerless: bool = False, **environment: str
    ) -> "Child":
        """Start commands, which run one after another until one of them fails or `point` is reached."""
        files = self.scratch / str(next(self._numbers))
        files.mkdir(parents=True)
        job = {
            "home": str(home),
            "commands": commands,
            "point": asdict(point) if point else None,
            "powerless": powerless,
            "environment": environment,
            "output": str(home.parent / f"{home.name}-output"),
            **{name: str(files / name) for name in ("out", "err", "log")},
        }
        return Child(self._ask(job), files, self)

    def wait(self, pid: int) -> int:
        """How a child ended: its exit code, or a signal as a negative number."""
        return self._ask(pid)

    def run(self, home: Path, *commands: Command, **options: Any) -> "Child":
        """Start commands and wait for their end."""
        child = self.start(home, *commands, **options)
        child.wait()
        return child


@dataclass
class Child:
    """A process that was started, and where it writes to."""

    pid: int
    files: Path
    zygote: Zygote
    code: int | None = None

    def wait(self) -> Result:
        """Its exit code and both streams, once it has ended."""
        if self.code is None:
            self.code = self.zygote.wait(self.pid)
        return Result(self.code, *((self.files / name).read_text() for name in ("out", "err")))

    def moments(self) -> list[tuple[str, str, bool]]:
        """Phase of each moment, what it was, and whether a file was half written then."""
        lines = (self.files / "log").read_text().splitlines()
        return [(phase, what, half == "True") for phase, what, half in (line.split("\t") for line in lines)]


def points(moments: Sequence[tuple[str, str, bool]], phase: str, kills: int, seed: int = 0) -> list[Point]:
    """So many different moments of a phase, drawn in turn among its kinds (a step, a file written, renamed, ...), each
    also with a file half written where there is one.
    """
    random = np.random.default_rng([seed, *phase.encode()])
    kinds: dict[tuple[str, bool], list[Point]] = defaultdict(list)
    of_phase = [(what, half) for of, what, half in moments if of == phase]
    for number, (what, possible) in enumerate(of_phase):
        for half in {False, possible}:
            kinds[what.split(" ")[0], half].append(Point(phase, number, half))
    shuffled = [[kind[i] for i in random.permutation(len(kind))] for _, kind in sorted(kinds.items())]
    random.shuffle(shuffled)
    turns = [point for turn in zip_longest(*shuffled) for point in turn if point is not None]
    return turns[:kills]


# ------------------------------------------------------------------------------------------------- what must be equal


def facts(record: RunRecord) -> dict[str, Any]:
    """All of a record that is no fact of the moment, with what of its cost is counted."""
    told = record.model_dump(mode="json", exclude={"created", "env", "cost"})
    cost = record.cost.model_dump() if record.cost else {"marginal": {}, "scratch": {}}
    return told | {part: {name: cost[part].get(name) for name in COUNTS} for part in ("marginal", "scratch")}


def content(home: Path) -> dict[str, Any]:
    """Everything of a home that a repetition gives again: records, predictions, artifacts and stores, by place."""
    found: dict[str, Any] = {}
    for path in files(home):
        place = path.relative_to(home)
        if place.parts[0] == "runs" and path.suffix == ".json":
            found[str(place)] = facts(read(path))
        elif place.parts[0] in ("runs", "artifacts", "data") and path.name not in ("meta.json", "inherited.json"):
            found[str(place)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def files(home: Path) -> Iterator[Path]:
    """All files of a home that are not temporary, without locks and unfinished work."""
    for path in sorted(home.rglob("*")):
        parts = path.relative_to(home).parts
        passing = parts[0] == "locks" or parts[:2] == ("artifacts", "work") or parts[0].startswith("board.")
        if path.is_file() and not passing and not any(part.startswith(TEMPORARY) for part in parts):
            yield path


def left(home: Path) -> list[str]:
    """Every file and folder of a home but its locks."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.parent.name != "locks")


def believed(home: Path) -> list[str]:
    """What is wrong with the records that a home shows right after a kill; each must be whole."""
    problems = []
    for path in find(home / "runs"):
        try:
            record = read(path)
            if record.status == "finished":
                read_predictions(path, record)
            else:
                problems.append(f"{path.name}: {record.error}")
        except Exception as error:
            problems.append(f"{path.name}: {error}")
    return problems


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Places where two contents differ."""
    return sorted(place for place in one.keys() | other.keys() if one.get(place) != other.get(place))


def doubled(children: Sequence[Child]) -> list[str]:
    """What was made more than once: runs that were executed, files and folders that were put in their place."""
    made = Counter(
        what
        for child in children
        for phase, what, _ in child.moments()
        if phase == "run" or (phase in ("record", "artifact", "store") and what.startswith("rename"))
    )
    passing = (TEMPORARY, ".latest")  # which store was last opened is noted by everybody
    return [what for what, times in made.items() if times > 1 and not any(part in what for part in passing)]
