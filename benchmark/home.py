"""Where things lie on disk, and the one way anything is written there: to a temporary name, then renamed."""

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO

from filelock import FileLock
from platformdirs import user_cache_dir

from .errors import DiskError

HOME = "WORSTGROUP_HOME"
TEMPORARY = ".tmp-"
ABANDONED = 3600
"""Seconds after its last change from which on nobody writes a temporary file any more."""


def home() -> Path:
    """`$WORSTGROUP_HOME`, by default the platform's cache folder."""
    return Path(os.environ.get(HOME) or user_cache_dir("worstgroup"))


@contextmanager
def home_at(folder: Path) -> Iterator[None]:
    """Everything inside has its home in `folder`, child processes too."""
    before = os.environ.get(HOME)
    os.environ[HOME] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[HOME]
        else:
            os.environ[HOME] = before


def data_home() -> Path:
    """Raw datasets and their uint8 stores."""
    return home() / "data"


def artifacts_home() -> Path:
    """Shared checkpoints and features."""
    return home() / "artifacts"


def runs_home() -> Path:
    """Run records."""
    return home() / "runs"


def index_files() -> tuple[Path, Path]:
    """What the leaderboard has read from records, and the journal of a write to it; they may be deleted at any time,
    but never the first alone: a new index would take the journal for its own.
    """
    return home() / "board.sqlite", home() / "board.sqlite-journal"


def locks_home() -> Path:
    """Lock files; they hold nothing."""
    return home() / "locks"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a `DiskError` that names the place and the way out."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "no space left on the disk",
            errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "no file may be that large here",
            errno.EIO: "the disk has failed",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.ENOENT: "the folder cannot be made",
            errno.ENOTDIR: "a file stands where a folder is needed",
            errno.EEXIST: "a file stands where a folder is needed",
            errno.EISDIR: "a folder stands where a file is needed",
            errno.ENOTEMPTY: "a folder that is not empty stands there",
        }
        if error.errno not in reasons:
            raise
        place = Path(error.filename or path)
        place = path if TEMPORARY in place.name else place  # its name says nothing to a user
        advice = "Free some space (`worstgroup cache --prune`) or set WORSTGROUP_HOME to a writable folder."
        if not place.absolute().is_relative_to(home().absolute()):
            advice = "Choose another place."
        raise DiskError(f"cannot write {place}: {reasons[error.errno]}. {advice}") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all; raises `DiskError` when the disk refuses."""
    write_file(path, lambda file: file.write(content))


def write_file(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Let `fill` write into a file that appears as `path` whole or not at all."""
    with disk_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "", str(path))
    temporary = _temporary(path)
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    _sweep(path)


def write_folder(path: Path, fill: Callable[[Path], None], seal: str = "") -> None:
    """Let `fill` write into a fresh folder that appears as `path` whole or not at all; raises `DiskError`.

    A folder that holds the file `seal` is named by its content: one that another process has put there meanwhile, whose
    lock does not reach here, is as good, and stays.
    """
    temporary = _temporary(path)
    with disk_errors(path):
        try:
            temporary.mkdir(parents=True)
            fill(temporary)
            try:
                temporary.replace(path)
            except OSError as error:
                taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
                if not (taken and seal and (path / seal).exists()):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _sweep(path)


def _sweep(path: Path) -> None:
    """Delete what killed processes left of the same file or folder where no `cache --prune` looks."""
    if path.absolute().is_relative_to(home().absolute()):
        return
    for left in path.parent.glob(f"{TEMPORARY}{escape(path.name)}-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                remove_folder(left) if left.is_dir() else left.unlink()


def remove_folder(path: Path) -> None:
    """Delete a folder whole: what a kill leaves of it has a temporary name, so that nobody takes it for real."""
    shutil.rmtree(path.replace(_temporary(path)))


def check_space(folder: Path, need: int, what: str) -> None:
    """Raise `DiskError` before anything is written when fewer than `need` bytes are free where `folder` is to lie."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise DiskError(
            f"{what}: {_amount(need)} are needed in {folder}, which has {_amount(free)} free. "
            "Free some space, or set WORSTGROUP_HOME to a folder on a larger disk."
        )


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the inter-process lock that belongs to `path`; a second process waits here."""
    place, base = path.resolve(), home().resolve()
    if place.is_relative_to(base):  # a common home may be mounted in two places
        place = place.relative_to(base)
    name = hashlib.sha256(str(place).encode()).hexdigest()[:24]
    with disk_errors(path):
        locks_home().mkdir(parents=True, exist_ok=True)
        held = FileLock(locks_home() / f"{name}.lock")
        held.acquire()
    try:
        yield
    finally:
        held.release()
