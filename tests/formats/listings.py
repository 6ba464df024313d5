"""File systems list a folder in any order: one that lists backwards."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from worstgroup.datasets import tables


@contextmanager
def _backwards(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
    with os.scandir(folder) as entries:
        yield iter(sorted(entries, key=lambda entry: entry.name, reverse=True))


def list_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the datasets see every folder in reverse order of names."""
    monkeypatch.setattr(tables, "os", SimpleNamespace(scandir=_backwards))
