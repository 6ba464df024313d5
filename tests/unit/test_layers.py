"""Imports point down: what a package of this project may import from the others."""

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = (
    ("benchmark",),
    ("datasets", "methods", "leaderboard"),
    ("analysis", "authoring"),
    ("commands",),
    ("cli", "__init__", "__main__"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def test_every_part_has_its_floor() -> None:
    parts = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {path.stem for path in ROOT.glob("*.py")}
    assert parts == set(FLOOR)


@pytest.mark.parametrize("part", [part for part in FLOOR if (ROOT / part).is_dir()])
def test_imports_point_down(part: str) -> None:
    """Also those inside of functions; between parts of one floor there are none."""
    wrong = []
    for path in (ROOT / part).rglob("*.py"):
        package = ".".join(("worstgroup", *path.relative_to(ROOT).parent.parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = resolve_name("." * node.level + (node.module or ""), package).split(".")[1:]
                targets = names[:1] or [alias.name for alias in node.names]
                wrong += [f"{path.name}: {name}" for name in targets if name != part and FLOOR[name] >= FLOOR[part]]
    assert wrong == []
