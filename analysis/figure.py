"""Figures as files."""

from io import BytesIO
from pathlib import Path
from typing import Any

from ..benchmark.home import write_bytes


def save(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as a PNG, whole or not at all, and the same bytes for the same figure."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
