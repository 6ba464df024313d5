"""An index of records, so that a board of many thousands is made without reading them again.

It lies in `$WORSTGROUP_HOME/board.sqlite` and is never the truth: whatever is missing, changed or unreadable in it is
read from the records anew, and it may be deleted at any time.
"""

import hashlib
import json
import multiprocessing
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark import record as records
from ..benchmark.errors import CorruptFile
from ..benchmark.fingerprint import code_fingerprint
from ..benchmark.home import home
from ..benchmark.machine import cores
from . import entry as entries
from . import statistics
from .entry import Entry, Layout, Line, Read

_TABLES = """
CREATE TABLE lines (name TEXT PRIMARY KEY, line TEXT);
CREATE TABLE records (path TEXT PRIMARY KEY, stamp TEXT, line TEXT, facts TEXT);
CREATE TABLE histories (name TEXT PRIMARY KEY, correct TEXT);
CREATE TABLE answers (name TEXT PRIMARY KEY, images INTEGER, correct BLOB);
CREATE TABLE layouts (name TEXT PRIMARY KEY, units INTEGER, groups INTEGER, unit BLOB, "group" BLOB);
CREATE TABLE kept (name TEXT PRIMARY KEY, value TEXT);
"""
MANY = 2_000
"""Records from which on several processes read them."""


@dataclass
class Collected:
    """Entries of the records that are sound, a sentence on each of the others, and the index they are known to."""

    entries: list[Entry]
    index: "Index"
    problems: list[str] = field(default_factory=list)


class Index:
    """What was read from records and computed from them, by name; in memory where no `file` is given or it fails."""

    def __init__(self, file: Path | None = None) -> None:
        self._lines: dict[str, Line] = {}
        self._base = _open(file) if file else _fresh(":memory:")

    @classmethod
    @contextmanager
    def at_home(cls) -> "Iterator[Index]":
        """That of `$WORSTGROUP_HOME`, saved and closed in the end."""
        index = cls(index_file())
        try:
            yield index
        finally:
            with suppress(sqlite3.Error):
                index._base.commit()
            index._base.close()

    def collect(self, paths: Iterable[Path]) -> Collected:
        """Entries of all finished runs among these record files, in their order, and what is wrong with the others.

        Failed runs and the draws of searches are passed over.
        """
        paths = list(paths)
        try:
            return self._collect(paths)
        except sqlite3.Error:  # damaged, the disk full, or another process writes for long: it is only a cache
            self._base = _fresh(":memory:")
            return self._collect(paths)

    def _collect(self, paths: list[Path]) -> Collected:
        stamps = {str(path): _stamp(path) for path in paths}
        found = dict(self._known(stamps))
        problems = []
        for path, read in _read_all([path for path in stamps if path not in found]):
            if isinstance(read, str):
                problems.append(read)
                continue
            for table, values in read.rows(path, stamps[path]):
                self._put(table, *values)
        self._base.commit()
        if len(found) < len(stamps):
            found = dict(self._known(stamps))
        entries = (found.get(path) for path in stamps)
        return Collected([entry for entry in entries if entry], self, problems)

    def history(self, entry: Entry) -> list[list[int]]:
        """Validation images that a run got right, by epoch and group."""
        query = "SELECT correct FROM histories WHERE name = ?"
        history: list[list[int]] = json.loads(self._base.execute(query, (entry.digest,)).fetchone()[0])
        return history

    def answers(self, entry: Entry) -> NDArray[np.bool_]:
        """The test images (M,) that a run got right; of an entry with `answers`."""
        found = self._base.execute("SELECT images, correct FROM answers WHERE name = ?", (entry.answers,)).fetchone()
        return np.unpackbits(np.frombuffer(found[1], dtype=np.uint8), count=found[0]).astype(bool)

    def layout(self, name: str) -> Layout:
        """The test set that entries name as their `layout`."""
        query = 'SELECT units, groups, unit, "group" FROM layouts WHERE name = ?'
        units, groups, unit, group = self._base.execute(query, (name,)).fetchone()
        return Layout(np.frombuffer(unit, dtype=np.int64), np.frombuffer(group, dtype=np.int64), (units, groups))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A value that JSON can hold, made once per name."""
        found = self._base.execute("SELECT value FROM kept WHERE name = ?", (name,)).fetchone()
        text = found[0] if found else json.dumps(make())
        if not found:
            with suppress(sqlite3.Error):
                self._put("kept", name, text)
        return json.loads(text)

    def _known(self, stamps: dict[str, str]) -> Iterator[tuple[str, Entry | None]]:
        """Files that are as they were when they were read, and their entries; None for what no table shows."""
        self._base.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (path TEXT PRIMARY KEY, stamp TEXT)")
        self._base.execute("DELETE FROM wanted")
        self._base.executemany("INSERT INTO wanted VALUES (?, ?)", stamps.items())
        query = "SELECT path, line, facts FROM records JOIN wanted USING (path, stamp)"
        for path, line, facts in self._base.execute(query):
            yield path, Entry.from_json(path, self._line(line), facts) if line else None

    def _line(self, name: str) -> Line:
        if name not in self._lines:
            (text,) = self._base.execute("SELECT line FROM lines WHERE name = ?", (name,)).fetchone()
            self._lines[name] = Line.from_json(text)
        return self._lines[name]

    def _put(self, table: str, *values: Any) -> None:
        places = ", ".join("?" * len(values))
        self._base.execute(f"INSERT OR REPLACE INTO {table} VALUES ({places})", values)


@dataclass(frozen=True)
class _Rows:
    """What a record has to say, ready to be written: made where it is read, which may be another process."""

    line: str = ""
    facts: str = ""
    others: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @classmethod
    def of(cls, read: Read) -> "_Rows":
        entry, line = read.entry, read.entry.line.to_json()
        name = _digest(line)
        others: list[tuple[str, tuple[Any, ...]]] = [
            ("lines", (name, line)),
            ("histories", (entry.digest, json.dumps(read.history))),
        ]
        if read.correct is not None and read.layout is not None:
            others.append(("answers", (entry.answers, len(read.correct), np.packbits(read.correct).tobytes())))
            others += _layout(entry.layout, read.layout.shape, read.layout)
        return cls(name, entry.to_json(), tuple(others))

    def rows(self, path: str, stamp: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Tables and what to put there."""
        yield from self.others
        yield "records", (path, stamp, self.line, self.facts)


_told: set[str] = set()


def _layout(name: str, shape: tuple[int, int], layout: Layout) -> list[tuple[str, tuple[Any, ...]]]:
    """A test set, told once by each process: it is the same for all records of a block."""
    if name in _told:
        return []
    _told.add(name)
    return [("layouts", (name, *shape, layout.unit.tobytes(), layout.group.tobytes()))]


def index_file() -> Path:
    """Where the index lies."""
    return home() / "board.sqlite"


def _stamp(path: Path) -> str:
    """Size and time of a record and of its predictions; changes when either is written."""
    parts = []
    for file in (path, records.predictions_path(path)):
        with suppress(OSError):
            status = file.stat()
            parts.append(f"{status.st_size}@{status.st_mtime_ns}")
    return " ".join(parts)


@cache
def _version() -> str:
    """Of the code that the index is written by."""
    return code_fingerprint(sys.modules[__name__], entries, statistics)


def _open(file: Path) -> sqlite3.Connection:
    """The index of a file; made anew where it is of other code or damaged, in memory where it cannot be written."""
    for attempt in range(2):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            base = sqlite3.connect(file, timeout=30)
            base.execute("PRAGMA synchronous = OFF")
            if base.execute("SELECT value FROM kept WHERE name = 'version'").fetchone() == (_version(),):
                return base
            base.close()
            raise sqlite3.DatabaseError("of another version")
        except (sqlite3.Error, OSError):
            if attempt:
                break
            with suppress(OSError):
                file.unlink(missing_ok=True)
            with suppress(sqlite3.Error, OSError):
                _fresh(file).close()
    return _fresh(":memory:")


def _fresh(place: Path | str) -> sqlite3.Connection:
    base = sqlite3.connect(place, timeout=30)
    base.executescript(_TABLES)
    base.execute("INSERT INTO kept VALUES ('version', ?)", (_version(),))
    base.commit()
    return base


def _read_all(paths: list[str]) -> Iterator[tuple[str, _Rows | str]]:
    """Path and what is in it, or what is wrong with it."""
    if len(paths) < MANY:
        _told.clear()
        yield from zip(paths, map(_read, paths), strict=True)
        return
    with ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn")) as pool:
        yield from zip(paths, pool.map(_read, paths, chunksize=100), strict=True)


def _read(path: str) -> _Rows | str:
    try:
        read = entries.read(Path(path))
    except CorruptFile as error:
        return str(error)
    return _Rows.of(read) if read else _Rows()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
