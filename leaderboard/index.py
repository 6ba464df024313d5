"""An index of records, so that a board of many thousands is made without reading them again.

It lies in `$WORSTGROUP_HOME/board.sqlite` and is never the truth: whatever is missing, changed or unreadable in it is
read from the records anew, and it may be deleted at any time. Every row carries a checksum, so that a damaged disk
changes no number; what is found damaged raises `sqlite3.Error`.
"""

import hashlib
import json
import multiprocessing
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark import metrics
from ..benchmark import record as records
from ..benchmark.errors import CorruptFile
from ..benchmark.home import index_files
from ..benchmark.machine import cores
from . import entry as entries
from .entry import Draw, Entry, Layout, Line, Read

_TABLES = """
CREATE TABLE lines (name TEXT PRIMARY KEY, line TEXT, checksum INTEGER);
CREATE TABLE records (path BLOB PRIMARY KEY, stamp TEXT, line TEXT, facts TEXT, checksum INTEGER);
CREATE TABLE histories (name TEXT PRIMARY KEY, correct TEXT, checksum INTEGER);
CREATE TABLE answers (name TEXT PRIMARY KEY, images INTEGER, correct BLOB, checksum INTEGER);
CREATE TABLE layouts (name TEXT PRIMARY KEY, units INTEGER, groups INTEGER, unit BLOB, "group" BLOB, checksum INTEGER);
CREATE TABLE kept (name TEXT PRIMARY KEY, value TEXT, checksum INTEGER);
"""
DAMAGED = (sqlite3.Error, UnicodeDecodeError)
"""What a damaged index raises; the second where SQLite's message holds bytes of it."""
MANY = 2_000
"""Records from which on several processes read them."""


@dataclass
class Collected:
    """Entries of the records that are sound, a sentence on each of the others, and the index they are known to."""

    entries: list[Entry]
    index: "Index"
    problems: list[str] = field(default_factory=list)
    asked: dict[str, str] = field(default_factory=dict)
    """What was asked for in every run that was read, draws of searches too, by the run's hash (`Entry.asked`)."""


class Index:
    """What was read from records and computed from them, by name; in memory where no `file` is given or it fails."""

    def __init__(self, file: Path | None = None) -> None:
        self._lines: dict[str, Line] = {}
        self._base = _open(file) if file else _fresh(":memory:")

    @classmethod
    @contextmanager
    def at_home(cls) -> "Iterator[Index]":
        """That of `$WORSTGROUP_HOME`, saved and closed in the end."""
        index = cls(index_files()[0])
        try:
            yield index
        finally:
            with suppress(*DAMAGED):
                index._base.commit()
            index._base.close()

    def collect(self, paths: Iterable[Path]) -> Collected:
        """Entries of all finished runs among these record files, in their order, and what is wrong with the others.

        Failed runs and the draws of searches are passed over.
        """
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
        sound = [found[path] for path in stamps if path in found]
        asked = {one.run: one.asked for one in sound}
        return Collected([one for one in sound if isinstance(one, Entry)], self, problems, asked)

    def history(self, entry: Entry) -> list[list[int]]:
        """Validation images that a run got right, by epoch and group."""
        (text,) = self._get("histories", entry.digest)
        history: list[list[int]] = json.loads(text)
        return history

    def answers(self, entry: Entry) -> NDArray[np.bool_]:
        """The test images (M,) that a run got right; of an entry with `answers`."""
        images, correct = self._get("answers", entry.answers)
        return np.unpackbits(np.frombuffer(correct, dtype=np.uint8), count=images).astype(bool)

    def layout(self, name: str) -> Layout:
        """The test set that entries name as their `layout`."""
        units, groups, unit, group = self._get("layouts", name)
        return Layout(np.frombuffer(unit, dtype=np.int64), np.frombuffer(group, dtype=np.int64), (units, groups))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A value that JSON can hold, made once per name."""
        known = self._base.execute("SELECT 1 FROM kept WHERE name = ?", (name,)).fetchone()
        (text,) = self._get("kept", name) if known else (json.dumps(make()),)
        if not known:
            with suppress(*DAMAGED):
                self._put("kept", name, text)
        return json.loads(text)

    def _known(self, stamps: dict[str, str]) -> Iterator[tuple[str, Entry | Draw]]:
        """Files that are as they were when they were read, and what was in them."""
        self._base.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (path BLOB PRIMARY KEY, stamp TEXT)")
        self._base.execute("DELETE FROM wanted")
        wanted = ((os.fsencode(path), stamp) for path, stamp in stamps.items())  # a name need not be valid UTF-8
        self._base.executemany("INSERT INTO wanted VALUES (?, ?)", wanted)
        self._base.commit()  # an open transaction would keep another process from writing
        query = "SELECT path, stamp, line, facts, checksum FROM records JOIN wanted USING (path, stamp)"
        for found in self._base.execute(query):
            place, _, line, facts = _checked(found)
            path = os.fsdecode(place)
            yield path, Entry.from_json(path, self._line(line), facts) if line else Draw.from_json(facts)

    def _line(self, name: str) -> Line:
        if name not in self._lines:
            (text,) = self._get("lines", name)
            self._lines[name] = Line.from_json(text)
        return self._lines[name]

    def _put(self, table: str, *values: Any) -> None:
        places = ", ".join("?" * (len(values) + 1))
        self._base.execute(f"INSERT OR REPLACE INTO {table} VALUES ({places})", (*values, _checksum(values)))

    def _get(self, table: str, name: str) -> tuple[Any, ...]:
        """A row without its name."""
        return _checked(self._base.execute(f"SELECT * FROM {table} WHERE name = ?", (name,)).fetchone())[1:]


@dataclass(frozen=True)
class _Rows:
    """What a record has to say, ready to be written: made where it is read, which may be another process."""

    line: str
    facts: str
    others: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @classmethod
    def of(cls, read: Read | Draw) -> "_Rows":
        if isinstance(read, Draw):
            return cls("", read.to_json())
        entry, line = read.entry, read.entry.line.to_json()
        name = hashlib.sha256(line.encode()).hexdigest()
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
        yield "records", (os.fsencode(path), stamp, self.line, self.facts)


_told: set[str] = set()


def _layout(name: str, shape: tuple[int, int], layout: Layout) -> list[tuple[str, tuple[Any, ...]]]:
    """A test set, told once by each process: it is the same for all records of a block."""
    if name in _told:
        return []
    _told.add(name)
    return [("layouts", (name, *shape, layout.unit.tobytes(), layout.group.tobytes()))]


def _checksum(values: Iterable[Any]) -> int:
    total = 0
    for value in values:
        total = zlib.crc32(value if isinstance(value, bytes) else str(value).encode(), total)
    return total


def _checked(row: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """A row without its checksum; raises `sqlite3.Error` where it is missing or damaged."""
    if row is None or _checksum(row[:-1]) != row[-1]:
        raise sqlite3.DataError("a row of the index is missing or damaged")
    return row[:-1]


def delete() -> None:
    """Delete the index of the home, as far as the disk lets us."""
    for file in index_files():
        with suppress(OSError):
            file.unlink()


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
    """Of the code that decides what is in the index."""
    files = [Path(__file__).with_name(f"{name}.py") for name in ("entry", "estimates", "index", "statistics")]
    files.append(Path(metrics.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


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
        except (*DAMAGED, OSError):
            if attempt:
                break
            delete()
            with suppress(*DAMAGED, OSError):
                _fresh(file).close()
    return _fresh(":memory:")


def _fresh(place: Path | str) -> sqlite3.Connection:
    base = sqlite3.connect(place, timeout=30)
    base.executescript(_TABLES)
    base.execute("INSERT INTO kept VALUES ('version', ?, ?)", (_version(), _checksum(("version", _version()))))
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
        return _Rows.of(entries.read(Path(path)))
    except CorruptFile as error:
        return str(error)
