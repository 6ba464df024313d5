"""Running a plan: one after another in this process, or several worker processes on this machine."""

import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch

from . import forecast
from .determinism import deterministic
from .errors import UserError
from .history import Device, read_history
from .machine import on_one_device, visible_gpu
from .planning import Plan
from .provenance import SESSION, device_name
from .record import RunRecord
from .registry import load_plugin
from .runner import finished, run_spec
from .scheduling import Job, Queue
from .spec import RunSpec
from .store import Store


class Reporter(Protocol):
    """Who is told what happens; see `commands/console.py`."""

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
        todo = forecast.jobs(missing, read_history(Device(device_name(), threads), missing))
        queue, workers = Queue(todo, forecast.there(todo)), min(jobs, len(missing))
        records |= _run_parallel(queue, missing, plan, reporter, workers, _pool(workers, threads, plugins))
    return [records[spec.hash] for spec in specs]


def shard(plan: Plan, text: str) -> Plan:
    """Part i of n of a plan (`i/n`, 1-based), whole seeds and whole searches, so that shards share little.

    The parts are the plan and do not overlap; cells that are not run belong to none. Searches are not dealt out by
    block, as runs are: those of a dataset all begin in the block of its first seed. In a Slurm array whose tasks count
    from 1 it is `$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT`. Raises `UserError`.
    """
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--shard {text}: write i/n with 1 <= i <= n, e.g. 2/8")
    blocks = list(dict.fromkeys(planned.spec.block.key for planned in plan.runs if planned.spec))
    mine = set(blocks[int(part) - 1 :: int(parts)])
    runs = [planned for planned in plan.runs if planned.spec and planned.spec.block.key in mine]
    return Plan(runs, plan.stores, plan.sweeps[int(part) - 1 :: int(parts)])


def _pool(workers: int, threads: int, plugins: Sequence[Path]) -> ProcessPoolExecutor:
    # spawn: a forked child would inherit torch's threads and locks in an undefined state
    context = get_context("spawn")
    numbers, gpus = context.Value("i", 0), torch.cuda.device_count()
    settings = numbers, gpus, threads, tuple(plugins), torch.are_deterministic_algorithms_enabled()
    return ProcessPoolExecutor(workers, context, _initialise, settings)


def _run_parallel(
    queue: Queue, missing: list[RunSpec], plan: Plan, reporter: Reporter, workers: int, pool: ProcessPoolExecutor
) -> dict[str, RunRecord]:
    specs = {spec.hash: spec for spec in missing}
    sharers = on_one_device(workers, torch.cuda.device_count())
    records: dict[str, RunRecord] = {}
    try:
        pending: dict[Future[tuple[RunRecord, float]], Job] = {}
        while queue or pending:
            while queue and len(pending) < workers:  # no more: what has ended by then decides what is next
                job, _ = queue.take()
                spec = specs[job.key]
                pending[pool.submit(_work, spec, plan.stores[spec.block.dataset], SESSION, sharers)] = job
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                job = pending.pop(future)
                records[job.key], seconds = future.result()
                queue.done(job, ok=records[job.key].status == "finished")
                reporter.end(specs[job.key], records[job.key], seconds)
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


def _initialise(numbers: Any, gpus: int, threads: int, plugins: tuple[Path, ...], same_bits: bool) -> None:
    """Set a worker up, which takes the next of the `numbers` and its GPU: the parent alone answers an interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with numbers.get_lock():
        worker, numbers.value = numbers.value, numbers.value + 1
    if gpus:  # before anything asks for a GPU: then no other one is seen in this process
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(worker, gpus, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    torch.set_num_threads(threads)
    deterministic(same_bits)
    Thread(target=_end_with_parent, daemon=True).start()
    for plugin in plugins:
        load_plugin(plugin)


def _end_with_parent() -> None:
    """A parent that was killed closes no queue: its workers would go on, and then wait for ever."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _work(spec: RunSpec, store: Store, session: str, sharers: int) -> tuple[RunRecord, float]:
    start = time.perf_counter()
    record = run_spec(spec, store, session=session, sharers=sharers)
    return record, time.perf_counter() - start
