"""Fingerprints of code: an edited method is stale, not finished. Comments, docstrings and layout do not count."""

import ast
import hashlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from .registry import PACKAGE

ENGINE = ("engine", "data", "backbones")


def code_fingerprint(module: ModuleType) -> str:
    """Hash of a method's file and of the package's method files and blocks that it imports, transitively."""
    seen: dict[str, str] = {}
    _collect(module, seen)
    return hashlib.sha256("\n".join(f"{name} {seen[name]}" for name in sorted(seen)).encode()).hexdigest()[:16]


@cache
def engine_fingerprint() -> str:
    """Hash of what turns a recipe into weights; shared artifacts are keyed by it."""
    parts = [_normalised(Path(__file__).with_name(f"{name}.py")) for name in ENGINE]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def _collect(module: ModuleType, seen: dict[str, str]) -> None:
    if module.__name__ in seen or not module.__file__:
        return
    seen[module.__name__] = _normalised(Path(module.__file__))
    for value in vars(module).values():
        origin = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(origin, str) and origin.startswith(f"{PACKAGE}.methods."):
            _collect(sys.modules[origin], seen)


@cache
def _normalised(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
