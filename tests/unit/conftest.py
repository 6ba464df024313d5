"""Fixtures of the unit tests: throw-away entries of the registries."""

from collections.abc import Callable
from typing import Any

import pytest
from worstgroup.benchmark.budget import Requires
from worstgroup.benchmark.registry import BACKBONES, METHODS, SOURCES, method, source


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers a class as a method or, if it has `attributes`, as a group source, for the length of a test.

    Whatever else a test registers is forgotten with it.
    """
    for registry in (METHODS, SOURCES, BACKBONES):
        monkeypatch.setattr(registry, "_entries", {name: registry[name] for name in registry})

    def add(name: str, cls: type[Any], requires: Requires | None = None, **options: Any) -> None:
        enter = source if hasattr(cls, "attributes") else method
        enter(name, paper="none", requires=requires or Requires(native="none"), **options)(cls)

    return add
