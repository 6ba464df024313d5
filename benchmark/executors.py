"""Running a plan: one after another in this process, or several worker processes on this machine."""

import signal
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import torch

from .errors import UserError
from .planning import Plan
from .record import RunRecord
from .registry import load_plugin
from .runner import SESSION, finished, run_spec
from .spec import RunSpec
from .store import Store


class Reporter(Protocol):
    """Who is told what happens; see `console.py`."""

    def begin(self, total: int, cached: int) -> None:
        """Before the first run: how many there are, and how many are finished already."""

    def start(self, spec: RunSpec) -> None:
        """A run starts."""

    def progress(self, stage: str, epoch: int, epochs: int) -> None:
        """An epoch of the current run ended (only when runs go one after another)."""

    def end(self, spec: RunSpec, record: RunRecord, seconds: float) -> None:
        """A run ended, finished or failed."""


def run_plan(
    plan: Plan, reporter: Reporter, *, jobs: int = 1, threads: int = 1, plugins: Sequence[Path] = ()
) -> list[RunRecord]:
    """Run what is missing and return the records of all runs of the plan, in its order; searches are not among them.

    Every run computes on `threads` CPU threads whatever `jobs` is, since sums differ in their last bits with the
    number of threads. An interrupt ends the workers at once; finished runs are kept.
    """
    torch.set_num_threads(threads)
    specs = [planned.spec for planned in plan.runs if planned.spec is not None]
    records = {spec.hash: record for spec in specs if (record := finished(spec)) is not None}
    missing = [spec for spec in specs if spec.hash not in records]
    reporter.begin(len(specs), len(specs) - len(missing))
    if jobs <= 1 or len(missing) <= 1:
        for spec in missing:
            reporter.start(spec)
            start = time.perf_counter()
            records[spec.hash] = run_spec(spec, plan.stores[spec.block.dataset], reporter.progress)
            reporter.end(spec, records[spec.hash], time.perf_counter() - start)
    else:
        pool = _pool(min(jobs, len(missing)), threads, plugins)
        records |= _run_parallel(missing, plan, reporter, pool)
    return [records[spec.hash] for spec in specs]


def shard(plan: Plan, text: str) -> Plan:
    """Part i of n of a plan (`i/n`, 1-based), whole seeds and whole searches, so that shards share little."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--shard {text}: write i/n with 1 <= i <= n, e.g. 2/8")
    blocks = list(dict.fromkeys(planned.spec.block.key for planned in plan.runs if planned.spec))
    mine = set(blocks[int(part) - 1 :: int(parts)])
    runs = [planned for planned in plan.runs if planned.spec and planned.spec.block.key in mine]
    return Plan(runs, plan.stores, plan.sweeps[int(part) - 1 :: int(parts)])


def _pool(jobs: int, threads: int, plugins: Sequence[Path]) -> ProcessPoolExecutor:
    # spawn: a forked child would inherit torch's threads and locks in an undefined state
    return ProcessPoolExecutor(jobs, get_context("spawn"), _initialise, (threads, tuple(plugins)))


def _run_parallel(
    missing: list[RunSpec], plan: Plan, reporter: Reporter, pool: ProcessPoolExecutor
) -> dict[str, RunRecord]:
    records: dict[str, RunRecord] = {}
    try:
        pending: dict[Future[tuple[RunRecord, float]], RunSpec] = {}
        for spec in missing:
            pending[pool.submit(_work, spec, plan.stores[spec.block.dataset], SESSION)] = spec
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                spec = pending.pop(future)
                record, seconds = future.result()
                records[spec.hash] = record
                reporter.end(spec, record, seconds)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps for lack of memory. Finished runs are kept; "
            "go on with the same command and fewer --jobs."
        ) from error
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return records


def _initialise(threads: int, plugins: tuple[Path, ...]) -> None:
    """Set a worker up: the parent alone answers an interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    for plugin in plugins:
        load_plugin(plugin)


def _work(spec: RunSpec, store: Store, session: str) -> tuple[RunRecord, float]:
    start = time.perf_counter()
    record = run_spec(spec, store, session=session)
    return record, time.perf_counter() - start
