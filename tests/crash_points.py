"""Named moments of the program, counted, at which a test kills it or lets its disk be full.

The program has no hooks for that. Moments are what the interpreter's audit events tell of files that are opened for
writing, renamed and deleted; statements of SQLite; steps of optimisers; and calls of the engine's prediction loop.
"""

import errno
import os
import re
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

PHASES = ("training", "evaluation", "artifact", "record", "store", "board", "prune")
_PLACES = {"runs": "record", "artifacts": "artifact", "data": "store", "board.sqlite": "board"}
_ACTS = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir", "os.mkdir": "mkdir"}
_AFTER_SOME = 40
"""Virtual-machine steps of SQLite between two moments: a statement has several."""


@dataclass(frozen=True)
class Point:
    """The moment `number` (from 0) of a phase, before what happens there. With `half` the file that was written last is
    cut to half its size, as when the writing had come that far. `full`: no kill, but no byte can be written any more.
    """

    phase: str
    number: int
    half: bool = False
    full: bool = False


class Watch:
    """Counts moments, notes them in a log, and strikes at one of them."""

    def __init__(self, home: Path, output: Path, log: Path, point: Point | None) -> None:
        self.home, self.output, self.point = str(home), str(output), point
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.counts: Counter[str] = Counter()
        self.phase = "prune" if "--prune" in sys.argv else ""
        self.writing = ""
        self.struck = self.busy = False
        self._counting = RLock()

    def install(self) -> None:
        """Watch this process from now on, until it ends."""
        from torch.optim.optimizer import register_optimizer_step_post_hook
        from worstgroup.benchmark import engine, pools, runner

        register_optimizer_step_post_hook(lambda *_: self.note("training", "step"))
        engine.predict = self._around(engine.predict, lambda *_: ("evaluation", "predict"))
        runner.execute = self._around(runner.execute, lambda spec, *_: ("run", spec.hash))
        pools._pixels = self._around(pools._pixels, lambda *_: ("store", "decode a chunk"))
        sqlite3.connect = self._connect(sqlite3.connect)
        sys.addaudithook(self.audit)

    def _connect(self, real: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
        def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
            base = real(*arguments, **options)
            base.set_trace_callback(lambda statement: self.note("board", " ".join(statement.split())[:40]))
            base.set_progress_handler(lambda: self.note("board", "in a statement"), _AFTER_SOME)
            return base

        return connect

    def _around(self, real: Callable[..., Any], what: Callable[..., tuple[str, str]]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            phase, name = what(*arguments)
            self.note(phase, name)
            result = real(*arguments, **options)
            self.note(phase, f"{name} done")
            return result

        return call

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by the interpreter before it does what the event tells; what this raises it does not do."""
        if self.busy:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._file("write", os.fsdecode(path))
        elif event in _ACTS:
            folder = arguments[-2 if event == "os.rename" else -1]
            place = os.fsdecode(arguments[0])
            if folder >= 0:  # shutil.rmtree names files below an open folder
                place = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), place)
            self._file(_ACTS[event], place, os.fsdecode(arguments[1]) if event == "os.rename" else "")

    def _file(self, act: str, place: str, target: str = "") -> None:
        phase = self._phase_of(place)
        if not phase:
            return
        if self.struck and act in ("write", "mkdir"):
            raise OSError(errno.ENOSPC, "No space left on device", place)
        short = re.sub(r"-\d+-[0-9a-f]{8}", "", os.path.relpath(target or place, self.home))
        self.note(phase, f"{act} {short}")
        if act == "write":
            self.writing = place
        elif self.writing.startswith(place):
            self.writing = ""

    def _phase_of(self, place: str) -> str:
        if place.startswith(self.output + os.sep):
            return "board"
        if not place.startswith(self.home + os.sep):
            return ""
        first, *rest = os.path.relpath(place, self.home).split(os.sep)
        if first == "artifacts" and rest and "work" in rest[0]:
            first = "training"
        return self.phase if self.phase and first != "locks" else _PLACES.get(first, first if rest else "")

    def note(self, phase: str, what: str) -> None:
        """A moment has come."""
        with self._counting:  # pixels are decoded in a thread
            number, self.counts[phase] = self.counts[phase], self.counts[phase] + 1
            half = bool(self.writing) and self._phase_of(self.writing) == phase
            os.write(self.log, f"{phase}\t{what}\t{half}\n".encode())
            if self.point and (phase, number) == (self.point.phase, self.point.number):
                self.strike()

    def strike(self) -> None:
        """End here, as the kernel ends a process."""
        assert self.point
        if self.point.half and os.path.exists(self.writing):
            self.busy = True
            os.truncate(self.writing, os.path.getsize(self.writing) // 2)
            self.busy = False
        if not self.point.full:
            os.kill(os.getpid(), signal.SIGKILL)
        self.struck = True
        raise OSError(errno.ENOSPC, "No space left on device", self.writing or self.home)
