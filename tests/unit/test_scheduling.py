"""The order of runs, on a synthetic clock: who makes what is shared, who waits, and how long it all takes."""

import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import plan_tiny
from worstgroup.benchmark import executors, machine
from worstgroup.benchmark.provenance import environment
from worstgroup.benchmark.scheduling import Job, Queue, simulate

ERM = {"erm": 5.0}


def started(queue: Queue) -> str:
    """The key of the next run to start."""
    return queue.take()[0].key


def wall(jobs: list[Job], workers: int) -> float:
    """Seconds until the last run ends."""
    return max(end for _, end in simulate(jobs, workers).values())


# ----------------------------------------------------------------------------------------------------------- order


def test_what_others_need_is_made_first_by_the_shortest_run_and_the_rest_fills_up() -> None:
    jobs = [Job("mac", 4, ERM), Job("groupdro", 5), Job("dfr", 0.1, ERM), Job("erm", 0, ERM), Job("ex2l", 9)]
    queue = Queue(jobs)
    maker, makes = queue.take()
    assert (maker.key, makes) == ("erm", ("erm",))
    assert [started(queue), started(queue)] == ["ex2l", "groupdro"]
    queue.done(maker)
    assert [started(queue), started(queue)] == ["mac", "dfr"]
    assert not queue


def test_every_block_makes_its_own() -> None:
    jobs = [
        Job(f"{method} {seed}", own, {f"erm {seed}": 5.0}) for method, own in [("dfr", 1), ("erm", 0)] for seed in "ab"
    ]
    queue = Queue(jobs)
    (first, _), (second, _) = queue.take(), queue.take()
    assert [first.key, second.key] == ["erm a", "erm b"]
    queue.done(second)
    assert started(queue) == "dfr b"  # not the one whose ERM is still in the making


def test_what_is_there_is_not_made() -> None:
    queue = Queue([Job("erm", 0, ERM), Job("dfr", 1, ERM), Job("lff", 8)], made=["erm"])
    assert [queue.take() for _ in range(3)] == [(Job("lff", 8), ()), (Job("dfr", 1, ERM), ()), (Job("erm", 0, ERM), ())]


def test_equals_keep_the_order_of_the_plan() -> None:
    queue = Queue([Job(key) for key in "bca"])
    assert [started(queue) for _ in range(3)] == ["b", "c", "a"]


@pytest.mark.parametrize("ok", [True, False])
def test_what_a_failed_run_should_have_made_the_next_one_makes(ok: bool) -> None:
    queue = Queue([Job("erm", 0, ERM), Job("dfr", 1, ERM)])
    maker, _ = queue.take()
    queue.done(maker, ok=ok)
    assert queue.take() == (Job("dfr", 1, ERM), () if ok else ("erm",))


def test_a_worker_takes_a_waiting_run_rather_than_none() -> None:
    """It goes on at once when the maker ends, or makes the thing itself where that one fails."""
    queue = Queue([Job("erm", 0, ERM), Job("dfr", 1, ERM)])
    queue.take()
    assert queue.take() == (Job("dfr", 1, ERM), ())


@pytest.mark.parametrize(("seconds", "order"), [(4.0, "bcla"), (0.1, "abcl")])
def test_only_things_that_cost_something_decide(seconds: float, order: str) -> None:
    """Of two runs that share a thing the second one is put off while it is in the making, unless it is slight."""
    needs = {"thing": seconds}
    queue = Queue([Job("a", 5, needs), Job("b", 4.5, needs), Job("l", 4.2), Job("c", 4.3)])
    assert "".join(started(queue) for _ in range(4)) == order


# ----------------------------------------------------------------------------------------------------------- clock


def test_a_run_starts_when_what_it_needs_is_made() -> None:
    spans = simulate([Job("erm", 0, ERM), Job("dfr", 1, ERM)], workers=2)
    assert spans == {"erm": (0.0, 5.0), "dfr": (5.0, 6.0)}


def test_of_what_a_run_makes_others_need_not_wait_for_its_end() -> None:
    spans = simulate([Job("a", 10, {"map": 2.0}), Job("b", 10, {"map": 2.0})], workers=2)
    assert spans == {"a": (0.0, 12.0), "b": (2.0, 12.0)}


def test_no_worker_idles_where_it_need_not() -> None:
    """Three seeds of a suite: as long as the work shared out evenly, where the plan's own order lets workers wait."""
    methods = {"erm": 0.0, "dfr": 0.2, "masktune": 0.5, "mac": 4.0}
    jobs = [Job(f"{name} {seed}", own, {f"erm {seed}": 5.0}) for name, own in methods.items() for seed in range(3)]
    jobs += [Job(f"single {i}", 4.0 + i / 10) for i in range(12)]
    work = 3 * 5 + sum(job.own for job in jobs)
    assert wall(jobs, 1) == pytest.approx(work)
    assert wall(jobs, 2) <= 1.02 * work / 2
    assert wall(jobs, 4) <= 1.1 * work / 4


@pytest.mark.parametrize("case", range(30))
def test_any_jobs_on_any_number_of_workers(case: int) -> None:
    rng = random.Random(case)
    things = {f"thing {i}": rng.uniform(0, 9) for i in range(rng.randrange(5))}
    jobs = [
        Job(str(i), rng.uniform(0, 9), {name: things[name] for name in things if rng.random() < 0.4})
        for i in range(rng.randrange(1, 40))
    ]
    workers = rng.randrange(1, 6)
    spans = simulate(jobs, workers)
    assert spans.keys() == {job.key for job in jobs}
    for instant in (begin for begin, _ in spans.values()):
        assert sum(begin <= instant < end for begin, end in spans.values()) <= workers
    needed = {thing for job in jobs for thing in job.needs}
    work = sum(job.own for job in jobs) + sum(things[thing] for thing in needed)
    assert sum(end - begin for begin, end in spans.values()) == pytest.approx(work)  # nothing is made twice
    assert work / workers - 1e-9 <= max(end for _, end in spans.values()) <= work + 1e-9


# --------------------------------------------------------------------------------------------------------- executor


def test_the_executor_follows_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more runs are handed out than there are workers, and a run that needs the ERM not before it is there."""
    plan = plan_tiny("dfr", "erm", "groupdro", "reweight")
    specs = [run.spec for run in plan.runs if run.spec]
    of = {spec.hash: spec.method for spec in specs}
    log: list[str] = []

    def work(spec: Any, *_: object) -> tuple[Any, float]:
        log.append(f"start {spec.method}")
        return SimpleNamespace(status="finished", run=spec.hash), 1.0

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Any:
            future = super().submit(*arguments, **options)
            future.result()  # so that what is handed out next does not depend on the threads
            return future

    class Notes:
        def end(self, spec: Any, record: Any, seconds: float) -> None:
            log.append(f"end {spec.method}")

    monkeypatch.setattr(executors, "_work", work)
    own = {"erm": 0.0, "dfr": 0.2, "groupdro": 5.0, "reweight": 4.0}
    jobs = [Job(run, own[method], ERM if method in ("erm", "dfr") else {}) for run, method in of.items()]
    notes: Any = Notes()
    records = executors._run_parallel(Queue(jobs), specs, plan, notes, 2, Pool(2))  # type: ignore[arg-type]
    assert records.keys() == of.keys()
    assert log[:2] == ["start erm", "start groupdro"]
    assert log.index("end erm") < log.index("start dfr")
    ahead = accumulate(1 if line.startswith("start") else -1 for line in log)
    assert max(ahead) == 2
    assert sorted(log) == sorted(f"{what} {method}" for what in ("start", "end") for method in own)


# -------------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("gpus", "visible", "names"),
    [
        (0, "", ["", "", "", ""]),
        (1, "", ["0", "0", "0", "0"]),
        (3, "", ["0", "1", "2", "0"]),
        (2, "4, 7", ["4", "7", "4", "7"]),
        (2, "GPU-a,GPU-b", ["GPU-a", "GPU-b", "GPU-a", "GPU-b"]),
    ],
)
def test_workers_take_the_gpus_in_turn(gpus: int, visible: str, names: list[str]) -> None:
    assert [machine.visible_gpu(worker, gpus, visible) for worker in range(4)] == names


@pytest.mark.parametrize(
    ("gpus", "asked", "found"),
    [
        (0, {}, {"jobs": 4, "threads": 2}),
        (0, {"jobs": 1}, {"jobs": 1, "threads": 2}),
        (1, {}, {"jobs": 1, "threads": 8}),
        (4, {}, {"jobs": 4, "threads": 2}),
        (4, {"jobs": 8}, {"jobs": 8, "threads": 2}),
        (16, {}, {"jobs": 16, "threads": 1}),
        (4, {"jobs": 2, "threads": 3}, {"jobs": 2, "threads": 3}),
    ],
)
def test_all_gpus_are_used_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, gpus: int, asked: dict[str, int], found: dict[str, int]
) -> None:
    """On eight cores. How many workers are asked for does not change the threads, on which the last bits depend."""
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert machine.workers(gpus, **asked) == found


@pytest.mark.parametrize(("workers", "gpus", "sharers"), [(2, 0, 2), (1, 1, 1), (3, 1, 3), (4, 4, 1), (5, 4, 2)])
def test_a_record_tells_how_many_workers_shared_its_device(workers: int, gpus: int, sharers: int) -> None:
    assert machine.on_one_device(workers, gpus) == sharers
    assert environment("", sharers)["sharers"] == sharers


def test_a_worker_sees_its_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = get_context("spawn").Value("i", 0)
    seen = []
    handler = signal.getsignal(signal.SIGINT)
    try:
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
                executors._initialise(numbers, 2, 1, (), False)
                seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert seen == ["2", "5", "2"]
