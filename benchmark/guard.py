"""Watches what a method opens while it fits and while its model predicts: labels are the engine's to read.

Python cannot keep a secret from code in its own process. What this sees are files opened by Python code and splits made
by the package's own readers; native code, other processes and labels written into a method's file it does not see
(docs/security.md). The engine is told from a method by the stack: it opens what a `Task` was asked for.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TypeVar

from .errors import BudgetExceeded
from .home import artifacts_home, data_home, index_files, runs_home
from .registry import PACKAGE

T = TypeVar("T")
MADE = f"{PACKAGE}.split"
"""The audit event of a split with its labels being made; see `Split`."""
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
_EVENTS = frozenset({"open", "sqlite3.connect", *_STARTS, MADE})
_LIBRARIES = {*sys.stdlib_module_names, "filelock", "numpy", "pydantic", "safetensors", "torch"}
"""What opens files on behalf of its caller."""
_DOORS = (f"{PACKAGE}.benchmark.task", f"{PACKAGE}.benchmark.engine")
"""Where a method may ask for what the engine then reads; the test split may be asked for nowhere."""
_TEST = "test.labels.npz"


class _Watch:
    """What may not be opened during one run, and the first thing that was opened nevertheless."""

    def __init__(self) -> None:
        package = Path(__file__).resolve().parents[1]
        places = [data_home(), runs_home(), artifacts_home(), *index_files(), package / "leaderboard" / "results"]
        self._places = tuple(os.path.realpath(place) for place in places)
        self.seen = ""

    def what(self, event: str, args: tuple[object, ...]) -> str:
        """What of the engine's an event touches, empty for nothing."""
        if event == MADE:
            return "the labels of a split"
        if event in _STARTS:
            told = repr(args[:2])
            return next((place for place in self._places if place in told), "")
        if not isinstance(args[0], str | bytes | os.PathLike):
            return ""
        path = os.path.realpath(os.fsdecode(args[0]))
        return path if any(path == place or path.startswith(place + os.sep) for place in self._places) else ""


_watches: list[_Watch] = []


def watched(work: Callable[[], T]) -> T:
    """What `work` returns; raises `BudgetExceeded` when a method opens what holds labels, and once more at the end."""
    _install()
    watch = _Watch()
    _watches.append(watch)
    try:
        result = work()
    finally:
        _watches.remove(watch)
    if watch.seen:
        raise BudgetExceeded(watch.seen)
    return result


@cache
def _install() -> None:
    sys.addaudithook(_hook)  # it stays for good; without a watch it does nothing


def _hook(event: str, args: tuple[object, ...]) -> None:
    if not _watches or event not in _EVENTS:
        return
    watch = _watches[-1]
    found = watch.what(event, args)
    if found and not _asked_for(sys._getframe(1), () if found.endswith(_TEST) else _DOORS):
        watch.seen = watch.seen or f"the method reached past its task for {found}: labels come from task.groups(split)"
        raise BudgetExceeded(watch.seen)


def _asked_for(frame: FrameType | None, doors: tuple[str, ...]) -> bool:
    """Whether it is the package that opens something, and where a method made it do so, through one of the `doors`."""
    inner = ""
    while frame is not None and frame.f_code is not watched.__code__:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in _LIBRARIES:
            if not _own(name):
                return inner in doors
            inner = name
        frame = frame.f_back
    return frame is not None and bool(inner)  # in another thread nobody knows who asked


def _own(name: str) -> bool:
    return name.startswith(f"{PACKAGE}.") and not name.startswith(f"{PACKAGE}.methods.")
