"""What `--executor ray` says before there is a cluster; none of it imports Ray."""

import socket
import subprocess
import sys

import pytest
from helpers import Call, plan_tiny
from worstgroup.benchmark import cluster
from worstgroup.benchmark.cluster import Cluster
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.executors import run_plan
from worstgroup.benchmark.record import RunRecord
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
    for address in ("head", "head:", ":6379", "head:port"):
        with pytest.raises(UserError, match=rf"RAY_ADDRESS {address}: write HOST:PORT"):
            cluster.check_address(address)


def test_a_finished_plan_needs_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    plan = plan_tiny("erm", seeds=(0, 1))

    class Silent(Listener):
        def start(self, spec: RunSpec) -> None: ...
        def progress(self, stage: str, epoch: int, epochs: int) -> None: ...
        def end(self, spec: RunSpec, record: RunRecord, seconds: float) -> None: ...

    made = run_plan(plan, Silent())
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)  # as if Ray were installed
    listener = Listener()
    with Cluster() as run_on_ray:
        assert [one.run for one in run_on_ray(plan, listener)] == [one.run for one in made]
    assert listener.told == [(2, 2)]
