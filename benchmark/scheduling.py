"""In which order runs start, so that no worker waits for what another one makes: pure, without a clock of its own.

Several runs share what one of them makes, the block's ERM above all; while one makes it, another that needs it could
only wait at its lock. So what others wait for is made first, by the shortest run that makes it, and longer runs start
before shorter ones. Seconds may be in any unit, and guesses: they decide about the order, never about a result.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

SLIGHT = 0.1
"""Share of a mean run that a shared thing must cost for runs to be ordered by it."""


@dataclass(frozen=True)
class Job:
    """A run to schedule: the seconds that are its own, and those of every shared thing that it needs, by name."""

    key: str
    own: float = 1.0
    needs: Mapping[str, float] = field(default_factory=dict)

    def total(self, made: Collection[str] = ()) -> float:
        """Its seconds where all it needs has to be made but for what is there."""
        return self.own + sum(seconds for thing, seconds in self.needs.items() if thing not in made)


class Queue:
    """Runs that have not started, and what of the things that they share is `made` or in the making."""

    def __init__(self, jobs: Iterable[Job], made: Iterable[str] = ()) -> None:
        self._waiting = list(jobs)
        self._made = set(made)
        self._making: dict[str, str] = {}
        self._wanted = Counter(thing for job in self._waiting for thing in job.needs)
        mean = sum(job.total() for job in self._waiting) / max(1, len(self._waiting))
        self._slight = {
            thing for job in self._waiting for thing, seconds in job.needs.items() if seconds < SLIGHT * mean
        }

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> tuple[Job, tuple[str, ...]]:
        """The run to start now, and the shared things that it will make; of equals the first one.

        It is one that waits for nothing in the making, where there is any.
        """
        job = min(self._waiting, key=self._rank)
        self._waiting.remove(job)
        self._wanted.subtract(job.needs)
        makes = tuple(thing for thing in job.needs if self._open(thing))
        self._making |= dict.fromkeys(makes, job.key)
        return job, makes

    def done(self, job: Job, *, ok: bool = True) -> None:
        """A run has ended. What it was to make is there, unless it failed: then the next run that needs it makes it."""
        for thing in [thing for thing, maker in self._making.items() if maker == job.key]:
            del self._making[thing]
            if ok:
                self._made.add(thing)

    def _open(self, thing: str) -> bool:
        return thing not in self._made and thing not in self._making

    def _rank(self, job: Job) -> tuple[bool, bool, float]:
        """Least first: those that need not wait; then what makes things for others, the shortest first; then the
        longest.
        """
        weighty = job.needs.keys() - self._slight
        waits = any(thing in self._making for thing in weighty)
        makes = any(self._open(thing) and self._wanted[thing] > 1 for thing in weighty)
        seconds = job.total(self._made)
        return waits, not makes, seconds if makes else -seconds


def simulate(jobs: Iterable[Job], workers: int, made: Iterable[str] = ()) -> dict[str, tuple[float, float]]:
    """When every run would start to work and end, in seconds from the first, if each took as long as it says.

    A run that needs a thing in the making starts when that is made.
    """
    queue = Queue(jobs, made)
    running: list[tuple[float, int, Job]] = []
    there: dict[str, float] = {}
    spans: dict[str, tuple[float, float]] = {}
    now = 0.0
    while queue or running:
        while queue and len(running) < workers:
            job, makes = queue.take()
            begin = max([now, *(there[thing] for thing in job.needs if thing in there)])
            made_at = begin + sum(job.needs[thing] for thing in makes)
            there |= dict.fromkeys(makes, made_at)
            spans[job.key] = begin, made_at + job.own
            heapq.heappush(running, (made_at + job.own, len(spans), job))
        now, _, ended = heapq.heappop(running)
        queue.done(ended)
    return spans
