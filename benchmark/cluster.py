"""Running a plan on a Ray cluster (optional; needs ray): every run is a task, retried elsewhere when its node is lost.

The cluster is the one at `$RAY_ADDRESS`, else the one that runs on this machine, else one that is started here for as
long as the plan takes. Workers use this home where they see it; where they do not, data is sent to them and records
come back (`errands.py`, `parcels.py`), so that the same files are here in the end.
"""

import math
import os
import pickle
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any

from . import errands
from .errors import UserError, one_line, require
from .executors import Reporter
from .fingerprint import package_fingerprint
from .home import TEMPORARY, home, write_bytes
from .parcels import candidates_of, gather, pack_store
from .planning import Plan
from .provenance import SESSION
from .record import RunRecord
from .registry import plugin_name
from .runner import adopts, finished, lost, run_spec
from .slots import Queue, Share, share_of
from .spec import RunSpec

RETRIES = 3
"""Times that a run is made again when its worker or its node dies, and as often when Ray ends it for lack of memory."""
OOM_RETRIES = "RAY_task_oom_retries"
"""Where Ray reads the latter from, in the driver's process and before it connects; left alone it tries for ever."""
LOOK = 1.0
"""Seconds after which nodes that have come or gone are looked for."""
ANSWERS = 5.0
"""Seconds that an address has to answer: Ray itself would try for minutes."""


def need_ray() -> None:
    """Raise `UserError` unless Ray is installed."""
    require(find_spec("ray") is not None, "--executor ray needs Ray: `pip install worstgroup[ray]`")


class Cluster:
    """Runs plans on Ray, connecting when there is something to run. As a context manager it lets go of the cluster at
    the end, and stops one that it has started itself.

    `cpus`, `gpus`, `threads` and `usual` are those of `share_of`; `same_bits` is what workers with a GPU give to
    `deterministic`; `say` is told in one line where the runs go.
    """

    def __init__(
        self,
        *,
        cpus: float | None = None,
        gpus: float | None = None,
        threads: int = 0,
        usual: int = 1,
        plugins: Sequence[Path] = (),
        same_bits: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        need_ray()
        self._asked = cpus, gpus, threads, usual
        self._plugins = tuple(errands.Plugin(path.resolve(), plugin_name(path), path.read_bytes()) for path in plugins)
        self._same_bits = same_bits
        self._say = say
        self._held = ExitStack()
        self._share: Share | None = None

    def __enter__(self) -> Callable[[Plan, Reporter], list[RunRecord]]:
        return self.run_plan

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()
        self._share = None

    def run_plan(self, plan: Plan, reporter: Reporter) -> list[RunRecord]:
        """Run what is missing and return the records of all runs of the plan, in its order, as `executors.run_plan`.

        An interrupt ends the tasks at once; finished runs are kept. Raises `UserError`.
        """
        specs = [planned.spec for planned in plan.runs if planned.spec is not None]
        records = {spec.hash: record for spec in specs if (record := finished(spec)) is not None}
        missing = {spec.hash: spec for spec in specs if spec.hash not in records}
        reporter.begin(len(specs), len(specs) - len(missing))
        for spec in [spec for spec in missing.values() if adopts(spec)]:  # nothing to compute
            start = time.perf_counter()
            records[spec.hash] = run_spec(missing.pop(spec.hash), plan.stores[spec.block.dataset])
            reporter.end(spec, records[spec.hash], time.perf_counter() - start)
        if missing:
            share = self._connect()
            with _probe() as probe:
                drive = _Drive(plan, missing.values(), reporter, share, self._plugins, self._same_bits, probe)
                records |= drive.run()
        return [records[spec.hash] for spec in specs]

    def _connect(self) -> Share:
        if self._share is None:
            where = self._held.enter_context(_connected())
            nodes = list(_nodes().values())
            self._share = share_of(nodes, *self._asked)
            slots = [self._share.slots(node) for node in nodes]
            used = sum(map(bool, slots))
            self._say(f"Ray {where}: nodes: {used}, runs at a time: {sum(slots)}, each with {self._share}")
        return self._share


class _Drive:
    """One plan under way: what waits, what is on which node, and what has been sent."""

    def __init__(
        self,
        plan: Plan,
        missing: Iterable[RunSpec],
        reporter: Reporter,
        share: Share,
        plugins: tuple[errands.Plugin, ...],
        same_bits: bool,
        probe: str,
    ) -> None:
        self.plan, self.reporter, self.share = plan, reporter, share
        self.plugins, self.same_bits, self.probe = plugins, same_bits, probe
        self.queue, self.task = Queue(missing), _task(share)
        self.slots: dict[str, int] = {}
        self.pending: dict[Any, tuple[RunSpec, str, dict[str, Any]]] = {}
        self.parcels: dict[tuple[str, str], Any] = {}
        self.records: dict[str, RunRecord] = {}

    def run(self) -> dict[str, RunRecord]:
        """Keep every node busy until all is done."""
        import ray

        looked = -math.inf
        try:
            while self.queue or self.pending:
                if time.monotonic() - looked >= LOOK:
                    looked = time.monotonic()
                    self.slots = {name: self.share.slots(node) for name, node in _nodes().items()}
                    require(any(self.slots.values()), "the Ray cluster has lost every node that a run fits on")
                self._fill()
                for ref in ray.wait(list(self.pending), timeout=LOOK)[0]:
                    self._land(ref, *self.pending.pop(ref))
        except BaseException:
            for ref in self.pending:
                ray.cancel(ref, force=True)
            raise
        return self.records

    def _fill(self) -> None:
        """Give runs to nodes with room, one each in turn; those of a lost node are on another by now, and count."""
        while self.queue and len(self.pending) < sum(self.slots.values()):
            busy = Counter(node for _, node, _ in self.pending.values())
            free = {node: count - busy[node] for node, count in self.slots.items()}
            node = max(free, key=free.__getitem__)
            if free[node] <= 0:
                return
            spec = self.queue.take(node)
            self.reporter.start(spec)
            self._submit(spec, node, {})

    def _submit(self, spec: RunSpec, node: str, parcels: dict[str, Any]) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        order = errands.Order(
            spec=spec,
            store=self.plan.stores[spec.block.dataset],
            candidates=candidates_of(spec),
            plugins=self.plugins,
            home=str(home().absolute()),
            probe=self.probe,
            session=SESSION,
            threads=self.share.threads,
            on_gpu=self.share.gpus > 0,
            sharers=self.share.on_one_device(self.slots.get(node, 1)),
            same_bits=self.same_bits,
        )
        where = NodeAffinitySchedulingStrategy(node, soft=True)  # elsewhere once the node is dead
        task = self.task.options(name=spec.label, scheduling_strategy=where)
        self.pending[task.remote(package_fingerprint(), pickle.dumps(order), parcels)] = spec, node, parcels

    def _land(self, ref: Any, spec: RunSpec, node: str, parcels: dict[str, Any]) -> None:
        """Take what has come back: a record, or what the worker lacks besides the `parcels` that it was sent.

        Raises `UserError` where it refused.
        """
        answer = self._answer(ref, spec)
        if answer and "refused" in answer:
            raise UserError(f"on {answer['node']}: {answer['refused']}")
        if answer and "lacks" in answer:
            # what was sent goes along again: after a loss the next worker may lack what an earlier one asked for
            more = {what: self._parcel(what, spec) for what in answer["lacks"]}
            self._submit(spec, node, parcels | more)
            return
        self.queue.ended(spec, node)
        if answer:
            made = gather(spec, answer["record"], answer["predictions"])
        else:
            reason = f"its worker or its node was lost more than {RETRIES} times, perhaps for lack of memory"
            made = lost(spec, self.plan.stores[spec.block.dataset].card, reason)
        self.records[spec.hash] = made
        self.reporter.end(spec, made, answer["seconds"] if answer else 0.0)

    def _answer(self, ref: Any, spec: RunSpec) -> errands.Answer | None:
        """The worker's answer, None where the run was lost as often as it may be."""
        import ray

        try:
            answer: errands.Answer = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            if "failed to import" in str(error):  # Ray's own words, there is no type for it
                reason = one_line(str(error).strip().splitlines()[-1])
                raise UserError(f"a node cannot load worstgroup, install the same version there: {reason}") from error
            raise
        except ray.exceptions.RayError:
            return None
        return answer

    def _parcel(self, what: str, spec: RunSpec) -> Any:
        """A store or a file of weights as Ray objects, which every node fetches once."""
        import ray

        block = spec.block
        key = what, block.dataset if what == errands.STORE else block.weights
        if key not in self.parcels:
            whole = what == errands.STORE
            content = pack_store(self.plan.stores[block.dataset], ray.put) if whole else _put_file(block.weights_file)
            self.parcels[key] = content
        return self.parcels[key]


def _task(share: Share) -> Any:
    """The remote function that makes a run."""
    import ray

    options: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus}
    if share.gpus:
        options["max_calls"] = 1  # a process that has used a GPU keeps to it, whichever one Ray gives it next
    # a run that fails has a record; only what was lost is made again
    return ray.remote(max_retries=RETRIES, retry_exceptions=False, **options)(_work)


def _work(code: str, order: bytes, parcels: dict[str, Any]) -> errands.Answer:
    """The task."""
    import ray

    return errands.work(code, order, parcels, ray.get)


def _put_file(path: str) -> Any:
    import ray

    return ray.put(Path(path).read_bytes())


# ------------------------------------------------------------------------------------------------------ connection


def _nodes() -> dict[str, Mapping[str, float]]:
    """Resources of the nodes that are alive, by their id."""
    import ray

    look: Callable[[], list[dict[str, Any]]] = ray.nodes
    return {node["NodeID"]: node["Resources"] for node in look() if node["Alive"]}


@contextmanager
def _probe() -> Iterator[str]:
    """The name of a file in the home that is there as long as the plan runs; who sees it shares the home."""
    path = home() / f"{TEMPORARY}ray-{token_hex(8)}"
    write_bytes(path, b"")
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _connected() -> Iterator[str]:
    """Be connected to a cluster, and say to which; a connection that was there before is used and left as it was."""
    os.environ.setdefault(OOM_RETRIES, str(RETRIES))
    import ray

    if ray.is_initialized():
        yield "as connected"
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address and address not in ("auto", "local"):
        check_address(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        where = _init(address)
    except (ConnectionError, ImportError, RuntimeError, ValueError) as error:
        reason = one_line(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"cannot connect to the Ray cluster at {address or 'this machine'}: {reason}") from error
    try:
        signal.signal(signal.SIGTERM, handler)  # Ray has set its own
        yield where
    finally:
        ray.shutdown()


def _init(address: str) -> str:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address != "local":
        try:
            ray.init(address or "auto", **quiet)
            return f"at {ray.get_runtime_context().gcs_address}"
        except ConnectionError:
            if address:
                raise
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody has asked for a report to Ray's makers
    ray.init("local", include_dashboard=False, **quiet)
    return "on this machine alone, since RAY_ADDRESS names no cluster and none runs here"


def check_address(address: str) -> None:
    """Raise `UserError` for what is no address, and where nothing answers."""
    shown, forms = one_line(address), "HOST:PORT, ray://HOST:PORT or auto"
    host, _, port = address.rpartition("://")[2].rpartition(":")
    is_port = re.fullmatch("[0-9]{1,5}", port) is not None and 0 < int(port) < 2**16
    require(bool(host) and is_port, f"RAY_ADDRESS {shown}: write {forms}")
    try:
        socket.create_connection((host, int(port)), ANSWERS).close()
    except UnicodeError as error:  # of a label that is empty, too long or not text
        raise UserError(f"RAY_ADDRESS {shown}: that can be no host's name; write {forms}") from error
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS {shown} does not answer ({error.strerror or error}). Start a cluster with "
            "`ray start --head`, or unset RAY_ADDRESS."
        ) from error
