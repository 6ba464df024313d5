"""What lies in the home folder, and what of it can go."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError
from .home import (
    TEMPORARY,
    artifacts_home,
    data_home,
    disk_errors,
    home,
    index_files,
    locks_home,
    remove_folder,
    runs_home,
)


def contents() -> Iterator[tuple[str, int, int]]:
    """Name, number of files and bytes of every part of the home folder."""
    parts = {"runs": runs_home(), "data/store": data_home() / "store", "data/pixels": data_home() / "pixels"}
    parts |= {f"artifacts/{folder.name}": folder for folder in _folders(artifacts_home())}
    for name, folder in parts.items():
        sizes = list(_sizes(folder))
        yield name, len(sizes), sum(sizes)
    index = [path.stat().st_size for path in index_files() if path.is_file()]
    yield "board index", len(index), sum(index)


def _sizes(folder: Path) -> Iterator[int]:
    """Bytes of every file below a folder; one that another process has just deleted is none."""
    for place, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):
                yield os.stat(os.path.join(place, file)).st_size


def prune_artifacts() -> int:
    """Delete artifacts, full-state checkpoints, the board's index and leftovers of killed processes; returns the bytes
    freed.

    Runs and data stay. Raises `UserError` while another process works in this home.
    """
    for file in sorted(locks_home().glob("*.lock")):
        try:
            with disk_errors(file), FileLock(file, timeout=0):
                pass
        except Timeout as error:
            raise UserError(f"another process is at work in {home()} ; prune when it is done") from error
    doomed = [*_folders(artifacts_home()), *index_files(), *home().rglob(f"{TEMPORARY}*")]
    freed = 0
    with disk_errors(home()):
        for path in doomed:
            if path.is_dir():
                freed += sum(_sizes(path))
                remove_folder(path)
            elif path.exists():
                freed += path.stat().st_size
                path.unlink()
    return freed


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
