"""Fixtures for all tests: a home of their own, variants of the tiny dataset, and finished runs of it."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers import Call

METHODS = ("erm", "groupdro", "dfr")
SEEDS = (0, 1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for every test."""
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody watches what is opened while a method fits: what else keeps it honest stands alone."""
    from worstgroup.benchmark import guard

    monkeypatch.setattr(guard, "watched", lambda work: work())


@pytest.fixture(scope="session")
def tiny() -> None:
    """The dataset `tinyvariants` is registered beside `tiny`."""
    from helpers import register_tiny

    register_tiny()


@pytest.fixture(scope="session")
def finished_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with finished runs of ERM, GroupDRO and DFR on `tiny` over two seeds; read only, copy it to change it."""
    from helpers import plan_tiny
    from worstgroup.benchmark.runner import run_spec

    folder = tmp_path_factory.mktemp("finished")
    before = os.environ.get("WORSTGROUP_HOME")
    os.environ["WORSTGROUP_HOME"] = str(folder)
    try:
        plan = plan_tiny(*METHODS, seeds=SEEDS)
        for planned in plan.runs:
            assert planned.spec is not None
            assert run_spec(planned.spec, plan.stores["tiny"]).status == "finished"
    finally:
        if before is None:
            del os.environ["WORSTGROUP_HOME"]
        else:
            os.environ["WORSTGROUP_HOME"] = before
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def runs(finished_home: Path, home: Path) -> Path:
    """The finished records, copied into this test's home."""
    return Path(shutil.copytree(finished_home / "runs", home / "runs"))


@pytest.fixture
def pick(runs: Path) -> Callable[[str], Path]:
    """The record of seed 0 of a method."""

    def path(method: str) -> Path:
        (found,) = runs.rglob(f"{method}-*-s0-*.json")
        return found

    return path


@pytest.fixture
def call(tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator["Call"]:
    """The program's `main` in this process, with `tinyvariants` registered: `call("ls", "methods")`."""
    from helpers import Result
    from worstgroup import cli

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["worstgroup", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)
