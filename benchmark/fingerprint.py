"""Fingerprints of code: an edited method is stale, not finished. Comments, docstrings and layout do not count."""

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import ModuleType

from .registry import PACKAGE

ENGINE = (
    "engine",
    "data",
    "device",
    "backbone",
    "backbones",
    "timm_models",
    "lab",
    "task",
    "seen",
    "choices",
    "annotations",
)
_METHODS = f"{PACKAGE}.methods."


def code_fingerprint(*modules: ModuleType) -> str:
    """Hash of methods' files and of the package's method files and blocks that they import, transitively."""
    seen: dict[str, str] = {}
    for module in modules:
        if module.__file__:
            _collect(module.__name__, Path(module.__file__), seen)
    return hashlib.sha256("\n".join(f"{name} {seen[name]}" for name in sorted(seen)).encode()).hexdigest()[:16]


@cache
def engine_fingerprint() -> str:
    """Hash of what turns a recipe into weights; shared artifacts are keyed by it."""
    parts = [_structure(_parse(Path(__file__).with_name(f"{name}.py"))) for name in ENGINE]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


@cache
def package_fingerprint() -> str:
    """Hash of every file of the package that may have a part in a record, to the last comment."""
    package = Path(__file__).parents[1]
    content = hashlib.sha256()
    for folder in ("benchmark", "datasets", "methods"):
        for path in sorted((package / folder).rglob("*.py")):
            content.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def _collect(name: str, path: Path, seen: dict[str, str]) -> None:
    tree = _parse(path)
    seen[name] = hashlib.sha256(_structure(tree).encode()).hexdigest()
    for imported in _imports(tree, name):
        if imported.startswith(_METHODS) and imported not in seen:
            found = getattr(sys.modules.get(imported), "__file__", None) or getattr(find_spec(imported), "origin", None)
            if found:
                _collect(imported, Path(found), seen)


def _imports(tree: ast.Module, name: str) -> Iterator[str]:
    """Modules that a file imports, by full name, and the names it takes from them, which may be modules too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), name.rpartition(".")[0] or name)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in sys.modules)


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _structure(node: object) -> str:
    """A syntax tree as text without positions and docstrings, the same on every version of Python."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({','.join(f'{name}={_structure(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(_structure(item) for item in node if not _says_nothing(item))}]"
    return repr(node)


def _says_nothing(node: object) -> bool:
    """A `pass`, or a string that stands alone as a statement: a docstring, or the like below a constant."""
    lone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return lone or isinstance(node, ast.Pass)
