"""What runs share, and what they do not: keys of shared arrays, and errors while they are made."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers import plan_tiny
from stubs import tiny_task
from worstgroup.benchmark.annotations import Attributes, Held
from worstgroup.benchmark.budget import Requires
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.home import artifacts_home
from worstgroup.benchmark.lab import Arrays
from worstgroup.benchmark.record import RunRecord
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.task import Choice, Predictor, Task

TRAIN = 96
MAKER = "worstgroup_test_maker"
NEEDS_GROUPS = Requires(fit="train", native="train+val", classes="class")
Register = Callable[..., None]


@dataclass(frozen=True)
class Modulus:
    """`k` is the number of values."""

    k: int = 2


def parity(made: list[tuple[str, int]]) -> type[Any]:
    """A source: the place of an image modulo k, shared by all runs; `made` notes what was made."""

    class Parity:
        def __init__(self, config: Modulus) -> None:
            self.config = config

        def attributes(self, task: Task, split: Held) -> Attributes:
            k = self.config.k

            def make() -> Arrays:
                made.append((split, k))
                return {"a": np.arange(task.size(split))[:, None] % k}

            return Attributes(task.cached("parity", [split, k], make)["a"], (k,))

    Parity.__module__ = __name__
    return Parity


def host(found: list[list[int]]) -> type[Any]:
    """A method that shares the sizes of its groups; `found` notes them run by run."""

    class Host(Objective[Any]):
        def setup(self, task: Task, model: Any) -> None:
            super().setup(task, model)
            shared = task.cached("sizes", None, lambda: {"n": task.groups("train").counts()})
            found.append(shared["n"].tolist())

    Host.__module__ = __name__
    return Host


def run(name: str, **settings: str) -> RunRecord:
    """The record of a run of seed 0, failed or not."""
    plan = plan_tiny(name, **settings)
    assert plan.runs[0].spec is not None
    return run_spec(plan.runs[0].spec, plan.stores["tiny"])


# ---------------------------------------------------------------------------------------------------- under a source


def test_what_a_host_shares_is_keyed_by_the_settings_of_its_source(register: Register) -> None:
    made: list[tuple[str, int]] = []
    found: list[list[int]] = []
    register("parity", parity(made), config=Modulus)
    register("first", host(found), NEEDS_GROUPS)
    register("second", host(found), NEEDS_GROUPS)
    for name in ("first", "second"):
        for k in ("2", "3"):
            record = run(f"{name}+parity", parity__k=k)
            assert record.status == "finished", record.error
    assert [len(sizes) for sizes in found] == [4, 6, 4, 6]
    assert found[:2] == found[2:]
    assert [sum(sizes) for sizes in found] == [TRAIN] * 4
    assert run("resample+parity", parity__k="2").status == "finished"
    assert made == [("train", 2), ("train", 3)]  # what the source itself shares is for all hosts


def test_what_a_host_shares_is_not_shared_between_true_groups_classes_and_sources(register: Register) -> None:
    found: list[list[int]] = []
    register("parity", parity([]), config=Modulus)
    register("first", host(found), NEEDS_GROUPS)
    register("second", host(found), NEEDS_GROUPS)
    for name in ("first@class", "first+parity", "second@class"):
        record = run(name)
        assert record.status == "finished", record.error
    assert [len(sizes) for sizes in found] == [2, 4, 2]


@pytest.mark.parametrize("asked_before", [False, True])
def test_what_is_shared_without_labels_holds_none_that_a_source_was_granted(
    register: Register, asked_before: bool
) -> None:
    """Runs of all budgets read it, whoever made it first."""

    class Labelled:
        def __init__(self, config: Any) -> None:
            self.config = config

        def attributes(self, task: Task, split: Held) -> Attributes:
            known = task.attributes("val", task.annotated("val"))
            return Attributes(np.full((task.size(split), 1), len(known.values) % 2), (2,))

    class Sharing(Objective[Any]):
        def setup(self, task: Task, model: Any) -> None:
            super().setup(task, model)
            if asked_before:
                task.groups("train")
            task.cached("groups", None, lambda: {"g": task.groups("train").index})

    Labelled.__module__ = Sharing.__module__ = __name__
    register("labelled", Labelled, Requires(fit="val", native="val"))
    register("probe", Sharing, NEEDS_GROUPS)
    record = run("probe+labelled")
    assert record.status == "failed"
    assert "declared as made without attributes (labelled=False) asks for some" in record.error


def test_what_a_stream_shares_is_its_own() -> None:
    task = tiny_task("erm")
    for rows in ([0, 1, 2], [2, 1, 0], [0, 1]):
        stream = task.on(np.array(rows), np.arange(0))
        shared = stream.cached("y", None, lambda stream=stream: {"y": stream.y("train")})  # type: ignore[misc]
        assert shared["y"].tolist() == task.y("train")[rows].tolist()


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "maps.npz"), OSError(28, "No space", "maps")])
def test_a_file_that_a_method_lacks_fails_its_run_alone(register: Register, error: OSError) -> None:
    class Reading:
        """Reads a file that is not there, to share it."""

        def __init__(self, config: Any) -> None:
            self.config = config

        def fit(self, task: Task) -> Predictor:
            task.cached("maps", None, self.read)
            return Predictor(task.erm(), Choice("last"))

        def read(self) -> Arrays:
            raise error

    Reading.__module__ = __name__
    register("probe", Reading)
    record = run("probe")
    assert record.status == "failed"
    assert record.error == f"maps: {error}"


# ---------------------------------------------------------------------------------------------------------- its code


def module(path: Path, code: str) -> ModuleType:
    """The module of a file, after this was written into it."""
    path.write_text(f"import numpy as np\n\ndef make(n, scale=1):\n    x = {code}\n    return dict(x=x)\n")
    spec = importlib.util.spec_from_file_location(MAKER, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[MAKER] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[MAKER])
    return sys.modules[MAKER]


def test_a_partial_is_keyed_by_the_code_of_what_it_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MAKER, sys)  # whatever takes its place is forgotten
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which an import within a second would take for fresh
    path, found = tmp_path / "maker.py", []
    for code in ("np.arange(n)", "np.arange(n)  # said in other words", "np.arange(n) * 2", "np.arange(n)"):
        make = module(path, code).make
        wrapped = (partial(make, 3), partial(partial(make, 3), scale=2))
        found += [tiny_task("erm").cached("demo", None, each)["x"].tolist() for each in wrapped]
    plain, double = [0, 1, 2], [0, 2, 4]
    assert found == [plain] * 4 + [double] * 2 + [plain] * 2
    assert len(list((artifacts_home() / "demo").iterdir())) == 2
