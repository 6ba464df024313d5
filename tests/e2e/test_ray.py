"""`run --executor ray` on a real Ray cluster of several nodes, all on this machine."""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import Call, finish, prediction_files, start
from worstgroup.benchmark import cluster as driver
from worstgroup.benchmark.record import find, read

pytest.importorskip("ray", reason="Ray is not installed: pip install worstgroup[ray]")

MEMORY = 80 * 2**20
"""Bytes of a node's object store, close to the least that Ray takes."""
PATIENCE = 300
"""Seconds to wait on a busy machine, where every worker of Ray's first has to import torch."""
RUN = ("run", "--dataset", "tiny", "--method", "erm,groupdro,dfr", "--threads", "1")
ON_RAY = ("--executor", "ray")
PLUGIN = '''"""A method of the user's."""
from dataclasses import dataclass
from typing import Annotated
from worstgroup import Objective, Requires, Search, method
import torch

@dataclass(frozen=True)
class Config:
    factor: Annotated[float, Search("U(0.5,2)")] = 1.0

@method("mine", paper="", requires=Requires(), config=Config)
class Mine(Objective):
    def __init__(self, config):
        self.config = config
    def loss(self, batch):
        return self.config.factor * torch.nn.functional.cross_entropy(self.model(batch.x), batch.y)
'''


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster whose first node makes no runs; a test adds those that do."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(True, head_node_args={"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False})
        yield made
        made.shutdown()


Nodes = Callable[..., Any]


@pytest.fixture
def nodes(head: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Adds a node for the length of the test, with one CPU unless told otherwise; by default it has no home set."""
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    added: list[Any] = []

    def add(home: Path | str = "", cpus: int = 1, gpus: int = 0) -> Any:
        there = {"WORSTGROUP_HOME": str(home)}
        added.append(head.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=MEMORY, env_vars=there))
        return added[-1]

    yield add
    for node in added:
        if node in head.worker_nodes:
            head.remove_node(node)


@contextmanager
def another_home(path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORSTGROUP_HOME", str(path))
        yield


def timeless(records: Path) -> dict[str, dict[str, Any]]:
    """All of every record but what it cost and what is of the moment, by its place; each run is there once."""
    found = {str(path.relative_to(records)): read(path) for path in find(records)}
    assert set(Counter(record.run for record in found.values()).values()) == {1}
    assert all(record.status == "finished" for record in found.values())
    moment: dict[str, Any] = {"created": True, "env": True, "cost": True, "tuning": {"cost"}}
    return {place: record.model_dump(exclude=moment) for place, record in found.items()}


def assert_same(one: Path, two: Path) -> None:
    """The same runs with the same records and, byte for byte, the same predictions."""
    assert timeless(one) == timeless(two)
    assert prediction_files(one) == prediction_files(two)


def test_a_node_killed_in_the_middle_loses_nothing(head: Any, nodes: Nodes, home: Path, finished_home: Path) -> None:
    """Two nodes see the home; the records are those of the local executor."""
    doomed, _ = nodes(), nodes()
    process = start(home, *RUN, "--seeds", "0,1", *ON_RAY)
    end = time.monotonic() + PATIENCE
    while len(list(find(home / "runs"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    head.remove_node(doomed, allow_graceful=False)
    done = finish(process, PATIENCE)
    assert done.code == 0, done
    assert sorted(re.findall(r"\[(\d)/6\]", done.err)) == list("123456")
    assert "nodes: 2, runs at a time: 2, each with 1 CPU" in done.err
    assert_same(home / "runs", finished_home / "runs")


def test_without_a_common_home_everything_travels(
    nodes: Nodes, home: Path, tmp_path: Path, fresh: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search with a method of a plugin, on nodes with homes of their own: store, plugin and candidates go there."""
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    command = ("run", "--dataset", "tiny", "--method", "mine,dfr", "--seeds", "0,1", "--tuning", "2", "--threads", "1")
    with another_home(tmp_path / "local"):
        assert fresh(*command, "--jobs", "1", "--plugin", plugin).code == 0
    apart = [tmp_path / "node a", tmp_path / "node b"]
    for there in apart:
        nodes(there)
    done = fresh(*command, *ON_RAY, "--plugin", plugin)
    assert done.code == 0, done
    assert_same(home / "runs", tmp_path / "local" / "runs")
    for there in apart:
        assert list((there / "data" / "store").glob("tiny-*/manifest.json"))
        assert not (there / "runs").exists()
    assert {path.name for path in home.iterdir()} == {"board.sqlite", "data", "locks", "runs"}, "nothing was made here"


@pytest.mark.slow
def test_a_share_of_a_gpu(nodes: Nodes, home: Path, call: Call) -> None:
    """A node that says it has a GPU, where the runs see none that works and go on without."""
    nodes(gpus=1)
    command = ("run", "--dataset", "tiny", "--method", "erm", "--seeds", "0", *ON_RAY)
    done = call(*command, "--gpus", "0.25", "--cpus", "0.1")
    assert done.code == 0, done
    assert "nodes: 1, runs at a time: 4, each with 0.1 CPU and 0.25 GPU" in done.err
    assert len(timeless(home / "runs")) == 1


def test_what_no_node_has_is_refused(nodes: Nodes, home: Path, call: Call) -> None:
    nodes(cpus=2)
    for option, amount, says in (("--gpus", "1", "1 CPU and 1 GPU"), ("--cpus", "64", "64 CPUs")):
        done = call(*RUN, *ON_RAY, option, amount)
        assert (done.code, done.out) == (2, "")
        assert f"error: a run is to have {says}, and no node of the Ray cluster has as much. There is: " in done.err
        assert "1 x 2 CPUs" in done.err
    assert not list(find(home / "runs"))


@pytest.mark.slow
def test_a_node_with_another_version_is_refused(
    nodes: Nodes, home: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes()
    monkeypatch.setattr(driver, "package_fingerprint", lambda: "0" * 16)
    done = call(*RUN, "--seeds", "0", *ON_RAY)
    assert done.code == 2
    assert re.search(r"error: on .*: its worstgroup is not the one that the plan was made with", done.err)
    assert not list(find(home / "runs"))


@pytest.mark.slow
def test_an_interrupt_ends_the_tasks(nodes: Nodes, home: Path) -> None:
    nodes()
    process = start(home, *RUN, "--seeds", "0", "--set", "recipe.epochs=100000", *ON_RAY)
    end = time.monotonic() + PATIENCE
    while not list((home / "artifacts" / "work").rglob("*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process, PATIENCE)
    assert done.code == 130, done
    assert "interrupted. What is finished is kept" in done.err
    assert "Traceback" not in done.err
    time.sleep(1)
    states = {path: path.stat().st_mtime_ns for path in (home / "artifacts" / "work").rglob("*.pt")}
    time.sleep(1)
    assert states
    assert {path: path.stat().st_mtime_ns for path in states} == states, "a task outlived the program"
