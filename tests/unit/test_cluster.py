"""What `--executor ray` says before there is a cluster, and what it sends to one; none of it imports Ray."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Call, plan_tiny
from worstgroup.benchmark import cluster
from worstgroup.benchmark.cluster import OOM_RETRIES, RETRIES, Cluster
from worstgroup.benchmark.errands import STORE, WEIGHTS, Answer, Order
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.executors import run_plan
from worstgroup.benchmark.planning import Plan, Planned
from worstgroup.benchmark.record import RunRecord
from worstgroup.benchmark.runner import lost
from worstgroup.benchmark.spec import RunSpec

RUN = ("run", "--dataset", "tiny", "--method", "erm", "--seeds", "0")


class Listener:
    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def begin(self, total: int, cached: int) -> None:
        self.told.append((total, cached))

    def start(self, spec: RunSpec) -> None:
        raise AssertionError(spec)

    def progress(self, stage: str, epoch: int, epochs: int) -> None:
        raise AssertionError(stage)

    def end(self, spec: RunSpec, record: RunRecord, seconds: float) -> None:
        raise AssertionError(record)


class Quiet(Listener):
    def start(self, spec: RunSpec) -> None: ...
    def progress(self, stage: str, epoch: int, epochs: int) -> None: ...
    def end(self, spec: RunSpec, record: RunRecord, seconds: float) -> None: ...


def test_only_a_plan_on_ray_imports_it() -> None:
    code = "import sys, worstgroup.benchmark.cluster; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_ray_the_extra_is_named(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    done = call(*RUN, "--executor", "ray")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --executor ray needs Ray: `pip install worstgroup[ray]`\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--executor", "ray", "--jobs", "2"), "--jobs does not go with --executor ray, where --cpus and --gpus say"),
        (("--executor", "ray", "--tuning", "2", "--prune"), "--prune does not go with --executor ray"),
        (("--gpus", "0.5"), "--gpus does not go with --executor local"),
        (("--cpus", "1"), "--cpus does not go with --executor local"),
    ],
)
def test_options_that_do_not_go_together_are_refused(call: Call, options: tuple[str, ...], says: str) -> None:
    done = call(*RUN, *options)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {says}")


def test_an_address_where_nothing_answers_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(UserError, match=rf"RAY_ADDRESS {address} does not answer \(.+\). Start a cluster"):
                cluster.check_address(address)
    for address in (
        "head",
        "head:",
        ":6379",
        "head:port",
        "head:²",
        "head:٣",
        "head:0",
        "head:65536",
        "head:" + 400 * "1",
    ):
        with pytest.raises(UserError, match=rf"RAY_ADDRESS {address}: write HOST:PORT"):
            cluster.check_address(address)


@pytest.mark.parametrize("host", ["h" * 64, "head..node", ".head", "h\udcff"])
def test_an_address_that_can_be_no_hosts_name_is_refused(host: str) -> None:
    with pytest.raises(UserError, match=r"^RAY_ADDRESS .*:6379: that can be no host's name; write HOST:PORT") as told:
        cluster.check_address(f"{host}:6379")
    assert str(told.value).isprintable()


def test_a_finished_plan_needs_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    plan = plan_tiny("erm", seeds=(0, 1))

    made = run_plan(plan, Quiet())
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)  # as if Ray were installed
    listener = Listener()
    with Cluster() as run_on_ray:
        assert [one.run for one in run_on_ray(plan, listener)] == [one.run for one in made]
    assert listener.told == [(2, 2)]


# ------------------------------------------------------------------------------------------- with a stand-in for Ray

Work = Callable[[str, bytes, dict[str, Any]], Answer]


class Ref:
    """What `remote` returns and `get` resolves."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer


class Task:
    """A remote function that does its work at once."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def options(self, **options: object) -> "Task":
        return self

    def remote(self, code: str, order: bytes, parcels: dict[str, Any]) -> Ref:
        return Ref(self.work(code, order, parcels))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A cluster of one node in this process; `environ` is what Ray would have read when it began."""
    environ: dict[str, str] = {}
    node = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 8.0}}
    stand_in = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda *where, **options: environ.update(os.environ),
        shutdown=lambda: None,
        get_runtime_context=lambda: SimpleNamespace(gcs_address="here:1"),
        nodes=lambda: [node],
        remote=lambda **options: Task,
        wait=lambda refs, timeout: (refs, []),
        get=lambda ref: ref.answer,
        put=lambda content: content,
        cancel=lambda ref, force: None,
        environ=environ,
    )
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: None)
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(OOM_RETRIES, "")  # so that it is as it was afterwards
    monkeypatch.delenv(OOM_RETRIES)
    return stand_in


def refuse(code: str, order: bytes, parcels: dict[str, Any]) -> Answer:
    return {"node": "a", "refused": "enough"}


@pytest.mark.usefixtures("ray")
def test_what_was_sent_goes_with_the_run_wherever_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first node has the store and asks for the weights alone; it dies, and no other one has either."""
    (tmp_path / "mine.safetensors").write_bytes(b"weights")
    plan = plan_tiny("erm")
    first = plan.runs[0].spec
    assert first is not None
    block = replace(first.block, weights="mine", weights_file=str(tmp_path / "mine.safetensors"))
    spec = replace(first, block=block)
    sent: list[list[str]] = []

    def work(code: str, order: bytes, parcels: dict[str, Any]) -> Answer:
        sent.append(sorted(parcels))
        assert len(sent) < 5, f"it goes on for ever: {sent}"
        there = {*parcels, *([STORE] if len(sent) == 1 else [])}
        lacks = [what for what in (STORE, WEIGHTS) if what not in there]
        return (
            {"node": "a", "lacks": lacks} if lacks else {"node": "a", "record": b"", "predictions": None, "seconds": 1}
        )

    monkeypatch.setattr(cluster, "_work", work)
    made = lost(spec, plan.stores["tiny"].card, "")
    monkeypatch.setattr(cluster, "gather", lambda spec, content, packed: made)
    with Cluster() as run_on_ray:
        assert run_on_ray(Plan([Planned(spec.label, spec)], plan.stores), Quiet()) == [made]
    assert sent == [[], [WEIGHTS], [STORE, WEIGHTS]]


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("options", [(), ("--deterministic",)])
def test_workers_are_told_of_determinism_by_a_driver_without_a_gpu(
    call: Call, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    orders: list[Order] = []

    def work(code: str, order: bytes, parcels: dict[str, Any]) -> Answer:
        orders.append(pickle.loads(order))
        return refuse(code, order, parcels)

    monkeypatch.setattr(cluster, "_work", work)
    assert "error: on a: enough" in call(*RUN, "--executor", "ray", *options).err
    assert [order.same_bits for order in orders] == [bool(options)]


@pytest.mark.parametrize(("asked", "told"), [(None, str(RETRIES)), ("0", "0")])
def test_ray_is_told_how_often_to_try_again_for_lack_of_memory(
    ray: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, asked: str | None, told: str
) -> None:
    """Left alone, it would try for ever."""
    if asked is not None:
        monkeypatch.setenv(OOM_RETRIES, asked)
    monkeypatch.setattr(cluster, "_work", refuse)
    with pytest.raises(UserError, match="enough"), Cluster() as run_on_ray:
        run_on_ray(plan_tiny("erm"), Quiet())
    assert ray.environ[OOM_RETRIES] == told
