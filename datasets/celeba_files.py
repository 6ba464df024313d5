"""CelebA as it lies on disk: the two official lists, or one table of other code, each told apart by its content.

Rows are joined by the stem of the picture's name and sorted by it, so that every packaging gives the same examples in
the same order. Tables are read line by line: 202,599 rows of 41 cells take about a second, once for all pairs.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..benchmark.errors import CorruptFile, MissingData
from .tables import PICTURES, SPLIT_IDS, read_csv, safe_path

LISTS = ("list_attr_celeba", "list_eval_partition")
"""The official lists, as .txt or .csv; some copies of the .csv are separated by blanks."""
TABLES = ("metadata.csv", "celeba_metadata.csv", "metadata_celeba.csv")
"""Names of the single tables of other code."""
MARKS = tuple(f"{place}{LISTS[0]}{end}" for place in ("", "Anno/") for end in (".txt", ".csv")) + TABLES
"""One of these lies in every CelebA folder."""
FOLDERS = (
    *(place + name for name in ("img_align_celeba", "img_align_celeba_png") for place in (f"{name}/", "", "Img/")),
    "",
)
"""Where pictures lie, the first that has any; the Kaggle archive nests their folder."""
FLAGS = {"-1": 0, "0": 0, "1": 1}
BITS = {"0": 0, "1": 1}
CELLS = ("-1", "0", "1", "2")
"""All that a cell of such a column can say."""
SPLIT_CODES = {text: code for code, text in enumerate(SPLIT_IDS)}


@dataclass(frozen=True)
class Packaging:
    """A single table: its columns of picture names and splits, and those of attributes that have other names there.

    Without `held` it has a column for every attribute.
    """

    picture: str
    held: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> set[str]:
        """Columns that tell this packaging from others."""
        return {self.picture, "split", *self.held.values()}


PACKAGINGS = (
    Packaging("image_id"),  # JTT
    Packaging("img_filename", {"Blond_Hair": "y", "Male": "place"}),  # DFR, ExMap
    Packaging("filename", {"Blond_Hair": "y", "Male": "a"}),  # SubpopBench
)


@dataclass(frozen=True)
class Table:
    """Columns of a table as numbers (n,), sorted by the stems of the pictures' names, with their lines in the file.

    `folder` is what stands before the pictures' names.
    """

    path: Path
    stems: NDArray[np.str_]
    lines: NDArray[np.int64]
    folder: str
    columns: dict[str, NDArray[np.int64]]

    def where(self, row: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.path}: line {self.lines[row]}"


def read_labels(folder: Path, attributes: Sequence[str]) -> Table:
    """Attributes (0 or 1) and `split` (0, 1, 2) of every picture.

    Raises `MissingData` where the folder's files do not have these attributes, `CorruptFile` for what is wrong in them.
    """
    flags, partition = (_find(folder, name) for name in LISTS)
    if flags is None:
        return _read_single(folder, attributes)
    if partition is None:
        raise MissingData(f"{folder}: there is {flags.name}, but no {LISTS[1]}.txt or .csv; put it beside")
    table = read_columns(flags, "image_id", dict.fromkeys(attributes, FLAGS))
    return _join(table, _renamed(read_columns(partition, "image_id", {"partition": SPLIT_CODES}), ["split"]))


def find_pictures(folder: Path, table: Table) -> list[str]:
    """The picture of every row, from one listing of their folder.

    Raises `MissingData` when there are no pictures at all, `CorruptFile` when one is missing.
    """
    places = [folder / name for name in FOLDERS]
    if table.folder:
        places = [safe_path(folder, table.folder, table.where(0))]
    place, files = next(((place, files) for place in places if (files := _listing(place))), (folder, {}))
    if not files:
        raise MissingData(f"{folder}: there are no pictures; unpack img_align_celeba.zip into it")
    stems = table.stems.tolist()
    missing = [row for row, stem in enumerate(stems) if stem not in files]
    if missing:
        raise CorruptFile(
            f"{table.where(missing[0])}: there is no {stems[missing[0]]}.jpg or .png in {place} "
            f"({len(missing):,} of {len(stems):,} pictures are missing)"
        )
    start = os.path.join(place, "")
    return [start + files[stem] for stem in stems]  # Path objects would take twenty times as long


def read_columns(path: Path, picture: str, codes: Mapping[str, Mapping[str, int]]) -> Table:
    """Some columns of a table, each with the numbers that its cells stand for; `picture` is that of the file names.

    Separated by commas or blanks, with a header or as one of the official lists. Raises `CorruptFile`, with the line.
    """
    text = _text(path)
    header = _open(path, text)[0]
    missing = [name for name in (picture, *codes) if name not in header]
    if missing:
        raise CorruptFile(f"{path}: has no column {', '.join(missing)}; its header is {' '.join(header)[:200]!r}")
    if len(set(header)) < len(header):
        raise CorruptFile(f"{path}: two columns have the same name; its header is {' '.join(header)[:200]!r}")
    table, cells = _rows(path, text, header.index(picture))
    numbers = [[code.get(cell, -1) for cell in CELLS] + [-1] for code in codes.values()]
    values = [np.array(known)[cells[:, header.index(name)]] for name, known in zip(codes, numbers, strict=True)]
    unknown = table.lines[np.min(values, axis=0) < 0]
    if len(unknown):
        line = unknown.min()
        row = next(row for number, row in _open(path, text)[1] if number == line)
        raise _unknown(path, line, [row[header.index(name)] for name in codes], codes)
    return replace(table, columns=dict(zip(codes, values, strict=True)))


# ---------------------------------------------------------------------------------------------------------- inside


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path}: cannot be read as text: {error}") from error


@lru_cache(maxsize=2)  # by the text itself: any pair is read from it without splitting it anew
def _rows(path: Path, text: str, picture: int) -> tuple[Table, NDArray[np.uint8]]:
    """A table without its columns, and the places of all its cells (n, columns) in `CELLS`, or behind its end."""
    header, rows, expected = _open(path, text)
    place = {cell: i for i, cell in enumerate(CELLS)}
    names: list[str] = []
    lines: list[int] = []
    cells = bytearray()
    for line, row in rows:
        if len(row) != len(header):
            raise CorruptFile(f"{path}: line {line} has {len(row)} cells, expected {len(header)}")
        cells += bytes(map(place.get, row, repeat(len(CELLS))))
        names.append(row[picture])
        lines.append(line)
    if expected not in (None, len(names)):
        raise CorruptFile(f"{path}: its first line says {expected:,} pictures, {len(names):,} rows follow")
    if not names:
        raise CorruptFile(f"{path}: has no rows")
    table, order = _sorted(path, names, np.array(lines))
    return table, np.frombuffer(cells, np.uint8).reshape(len(names), len(header))[order]


def _open(path: Path, text: str) -> tuple[list[str], Iterator[tuple[int, list[str]]], int | None]:
    """Header and (line, cells) of every row that is not blank, and how many rows the file says it has.

    The official lists have no header (partition), or a count and a header without the name column (attributes).
    """
    lines = text.splitlines()
    first, second = (line.split() for line in (*lines[:2], "", "")[:2])
    if len(first) == 1 and re.fullmatch(r"[0-9]{1,18}", first[0]):
        return ["image_id", *second], _split(lines[2:], 3), int(first[0])
    if first and first[0].lower().endswith(PICTURES):
        return ["image_id", "partition"], _split(lines, 1), None
    rows = ((line, row) for line, row in read_csv(lines, path) if row) if "," in "".join(first) else _split(lines, 1)
    header = next(rows, (0, []))[1]
    return [name.strip() for name in header], rows, None


def _split(lines: list[str], first: int) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) between blanks."""
    return ((line, row) for line, row in enumerate(map(str.split, lines), start=first) if row)


def _unknown(path: Path, line: int, cells: list[str], codes: Mapping[str, Mapping[str, int]]) -> CorruptFile:
    """The error for the first cell of a row that stands for no number."""
    name, cell = next((name, cell) for name, cell in zip(codes, cells, strict=True) if cell not in codes[name])
    return CorruptFile(f"{path}: line {line}: {name} is {cell!r}, it must be one of {', '.join(codes[name])}")


def _sorted(path: Path, names: list[str], lines: NDArray[np.int64]) -> tuple[Table, NDArray[np.int64]]:
    """The table by stems, and its order; raises `CorruptFile` for a picture that is named twice, or not at all."""
    parts = [name.rpartition("/") for name in names]
    stems = np.array([os.path.splitext(base)[0] for _, _, base in parts])
    order = np.argsort(stems, kind="stable")
    table = Table(path, stems[order], lines[order], parts[0][0], {})
    for row, (folder, _, base) in enumerate(parts):
        if folder != table.folder or not base:
            raise CorruptFile(f"{path}: line {lines[row]}: {names[row]!r} is not a picture beside {names[0]!r}")
    twice = np.flatnonzero(table.stems[1:] == table.stems[:-1])
    if len(twice):
        raise CorruptFile(f"{table.where(twice[0] + 1)}: picture {table.stems[twice[0]]} stands there a second time")
    return table, order


def _renamed(table: Table, names: Sequence[str]) -> Table:
    return replace(table, columns=dict(zip(names, table.columns.values(), strict=True)))


def _join(one: Table, other: Table) -> Table:
    """Both tables' columns; raises `CorruptFile` unless they name the same pictures."""
    for table, rest in ((one, other), (other, one)) if not np.array_equal(one.stems, other.stems) else ():
        alone = np.flatnonzero(~np.isin(table.stems, rest.stems))
        if len(alone):
            raise CorruptFile(f"{table.where(alone[0])}: picture {table.stems[alone[0]]} is not in {rest.path}")
    return replace(one, columns={**one.columns, **other.columns})


def _find(folder: Path, name: str) -> Path | None:
    """One of the official lists, in the folder or where the official release puts it."""
    files = [folder / place / f"{name}{end}" for place in ("", "Anno", "Eval") for end in (".txt", ".csv")]
    return next((file for file in files if file.is_file()), None)


def _read_single(folder: Path, attributes: Sequence[str]) -> Table:
    path = next((folder / name for name in TABLES if (folder / name).is_file()), folder / TABLES[0])
    header = _open(path, _text(path))[0]
    kind = next((kind for kind in PACKAGINGS if kind.columns <= set(header)), None)
    if kind is None:
        wanted = "; ".join(", ".join(sorted(kind.columns)) for kind in PACKAGINGS)
        raise CorruptFile(f"{path}: is no table of CelebA ({wanted}); its header is {' '.join(header)[:200]!r}")
    lacking = [name for name in attributes if kind.held and name not in kind.held]
    if lacking:
        raise MissingData(
            f"{path}: has no {' and no '.join(lacking)}: its columns {' and '.join(kind.held.values())} are "
            f"{' and '.join(kind.held)} for good. Put {LISTS[0]}.txt and {LISTS[1]}.txt beside it"
        )
    code = BITS if kind.held else FLAGS
    columns = {kind.held.get(name, name): code for name in attributes}
    return _renamed(read_columns(path, kind.picture, {**columns, "split": SPLIT_CODES}), [*attributes, "split"])


def _listing(folder: Path) -> dict[str, str]:
    """Stems and names of a folder's pictures; of several with one stem the first by name."""
    return _by_stem(tuple(os.listdir(folder))) if folder.is_dir() else {}


@lru_cache(maxsize=1)
def _by_stem(names: tuple[str, ...]) -> dict[str, str]:
    pictures = [name for name in sorted(names, reverse=True) if name.lower().endswith(PICTURES)]
    return {os.path.splitext(name)[0]: name for name in pictures}
