"""Fixtures of the commands' tests."""

from pathlib import Path

import pytest
from helpers import Call, Result
from worstgroup.benchmark.registry import BACKBONES, DATASETS, METHODS, SOURCES


@pytest.fixture
def fresh(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The program in an empty folder; what a call's plugins register is forgotten after it, as when a process ends."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> Result:
        with monkeypatch.context() as patch:
            for registry in (METHODS, SOURCES, DATASETS, BACKBONES):
                patch.setattr(registry, "_entries", {name: registry[name] for name in registry})
            return call(*arguments)

    return run
