"""What a run takes of a cluster's node, and which node gets which run: pure, without a cluster."""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import UserError, require
from .spec import RunSpec


@dataclass(frozen=True)
class Share:
    """What a run takes of a node: CPUs and GPUs, fractions too, and the threads it computes on."""

    cpus: float
    gpus: float
    threads: int

    def slots(self, resources: Mapping[str, float]) -> int:
        """Runs that fit on a node at once; a fraction lies on one GPU."""
        by_cpu = math.floor(resources.get("CPU", 0) / self.cpus + 1e-6)
        if not self.gpus:
            return by_cpu
        gpus = resources.get("GPU", 0)
        by_gpu = int(gpus) * math.floor(1 / self.gpus + 1e-6) if self.gpus < 1 else math.floor(gpus / self.gpus)
        return min(by_cpu, by_gpu)

    def on_one_device(self, slots: int) -> int:
        """Runs that share a device, at most, on a node that so many fit on: all of them where it is the CPU."""
        return max(1, math.floor(1 / self.gpus + 1e-6) if self.gpus else slots)

    def __str__(self) -> str:
        return _told({"CPU": self.cpus, "GPU": self.gpus})


def share_of(
    nodes: Sequence[Mapping[str, float]], cpus: float | None, gpus: float | None, threads: int, usual: int
) -> Share:
    """A run's share of nodes with these resources; what is not given follows from them. Raises `UserError`.

    By default a run has one GPU where there are any, and with it that share of its node's CPUs; without GPUs as many
    CPUs as threads, by default the `usual` number, which is that of the local executor.
    """
    require(cpus is None or 0 < cpus < math.inf, f"--cpus {cpus}: a run needs more than 0 CPUs")
    require(
        gpus is None or (0 <= gpus < math.inf and (gpus < 1 or gpus % 1 == 0)),
        f"--gpus {gpus}: write a fraction below 1, of one GPU, or a whole number of GPUs",
    )
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    if gpus and cpus is None:
        whole = [node["CPU"] / node["GPU"] for node in nodes if node.get("GPU", 0) and node.get("CPU", 0)]
        cpus = float(threads or max(1, math.floor(min(whole, default=1) * gpus)))
    if cpus is None:
        cpus = float(threads or usual)
    found = Share(cpus, gpus, threads or (max(1, int(cpus)) if gpus else usual))
    if not any(found.slots(node) for node in nodes):
        there = "; ".join(f"{count} x {told}" for told, count in Counter(map(_told, nodes)).items()) or "no node"
        raise UserError(
            f"a run is to have {found}, and no node of the Ray cluster has as much. There is: {there}. "
            "Ask for less with --cpus, --gpus or --threads."
        )
    return found


def _told(resources: Mapping[str, float]) -> str:
    """`2 CPUs and 0.5 GPU`."""
    shown = [(resources.get(name, 0), name) for name in ("CPU", "GPU")]
    return " and ".join(f"{amount:g} {name}{'s' if amount > 1 else ''}" for amount, name in shown if amount) or "no CPU"


class Queue:
    """Runs that wait, by block. What runs of a block share lies where one of them has ended, so a node goes on with
    such a block; else it begins another one; only then does it help with one that is under way.
    """

    def __init__(self, specs: Iterable[RunSpec]) -> None:
        self._blocks: dict[str, deque[RunSpec]] = defaultdict(deque)
        self._begun: dict[str, set[str]] = defaultdict(set)
        self._ready: set[tuple[str, str]] = set()
        for spec in specs:
            self._blocks[spec.block.key].append(spec)

    def __len__(self) -> int:
        return sum(map(len, self._blocks.values()))

    def take(self, node: str) -> RunSpec:
        """The next run for a node."""
        block = min((block for block, waiting in self._blocks.items() if waiting), key=lambda b: self._rank(b, node))
        self._begun[block].add(node)
        return self._blocks[block].popleft()

    def ended(self, spec: RunSpec, node: str) -> None:
        """A run has ended on a node, which now has what its block shares."""
        self._ready.add((spec.block.key, node))

    def _rank(self, block: str, node: str) -> tuple[int, int]:
        """Least first, then in the plan's order; of blocks of others the one with most left."""
        if (block, node) in self._ready:
            return 0, 0
        if not self._begun[block]:
            return 1, 0
        return (2, 0) if node in self._begun[block] else (3, -len(self._blocks[block]))
