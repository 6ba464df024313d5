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
        known = {path: found for path, found in self._known(stamps) if found.stamp == stamps[path]}
        collected, fresh = Collected([], self), {}
        for path, read in _read_all([Path(path) for path in stamps if path not in known]):
            if isinstance(read, str):
                collected.problems.append(read)
                continue
            fresh[path] = read.entry if read else None
            self._keep(path, stamps[path], read)
        self._base.commit()
        for path in stamps:
            entry = known[path].entry(self._line) if path in known else fresh.get(path)
            collected.entries += [entry] if entry else []
        return collected

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

    def _known(self, stamps: dict[str, str]) -> "Iterator[tuple[str, _Row]]":
        self._base.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (path TEXT PRIMARY KEY)")
        self._base.execute("DELETE FROM wanted")
        self._base.executemany("INSERT INTO wanted VALUES (?)", ((path,) for path in stamps))
        found = self._base.execute("SELECT path, stamp, line, facts FROM records JOIN wanted USING (path)")
        return ((path, _Row(path, stamp, line, facts)) for path, stamp, line, facts in found)

    def _line(self, name: str) -> Line:
        if name not in self._lines:
            (text,) = self._base.execute("SELECT line FROM lines WHERE name = ?", (name,)).fetchone()
            self._lines[name] = Line.from_json(text)
        return self._lines[name]

    def _keep(self, path: str, stamp: str, read: Read | None) -> None:
        if read is None:
            self._put("records", path, stamp, "", "")
            return
        line = read.entry.line.to_json()
        name = _digest(line)
        facts = {key: value for key, value in vars(read.entry).items() if key not in ("path", "line")}
        self._put("lines", name, line)
        self._put("records", path, stamp, name, json.dumps(facts))
        self._put("histories", read.entry.digest, json.dumps(read.history))
        if read.correct is not None and read.layout is not None:
            self._put("answers", read.entry.answers, len(read.correct), np.packbits(read.correct).tobytes())
            units = read.layout.unit.tobytes(), read.layout.group.tobytes()
            self._put("layouts", read.entry.layout, *read.layout.shape, *units)

    def _put(self, table: str, *values: Any) -> None:
        places = ", ".join("?" * len(values))
        self._base.execute(f"INSERT OR REPLACE INTO {table} VALUES ({places})", values)


@dataclass(frozen=True)
class _Row:
    """A row of `records`; a run that no table shows has no line."""

    path: str
    stamp: str
    line: str
    facts: str

    def entry(self, line: Callable[[str], Line]) -> Entry | None:
        if not self.line:
            return None
        facts = json.loads(self.facts)
        return Entry(path=self.path, line=line(self.line), **facts | {"wilson": tuple(facts["wilson"])})


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


def _read_all(paths: list[Path]) -> Iterator[tuple[str, Read | str | None]]:
    """Path and what is in it, or what is wrong with it."""
    if len(paths) < MANY:
        yield from zip(map(str, paths), map(_read, paths), strict=True)
        return
    with ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn")) as pool:
        yield from zip(map(str, paths), pool.map(_read, paths, chunksize=100), strict=True)


def _read(path: Path) -> Read | str | None:
    try:
        return entries.read(path)
    except CorruptFile as error:
        return str(error)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
