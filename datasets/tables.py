"""Tables beside pictures, and what all datasets that read files share.

Every column is read as text and checked on use, so that a message can name the row and the value that is wrong.
"""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..benchmark.errors import CorruptFile, MissingData
from ..benchmark.home import data_home
from ..benchmark.spec import Card
from ..benchmark.store import Splits, search, splits_key

SPLIT_IDS = {"0": "train", "1": "val", "2": "test"}
"""Split numbers of the group_DRO family of tables."""
PICTURES = (".jpg", ".jpeg", ".png")


class FileDataset:
    """A dataset that reads files: its identity is that of its labels and of its pictures' content."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def source_key(self, root: Path | None) -> str:
        """Identity of the files; raises `MissingData` when they are not there."""
        return splits_key(self.load(root))

    def load(self, root: Path | None) -> Splits:
        """Read the tables; pictures are decoded when they are asked for."""
        raise NotImplementedError


def find_folder(what: str, names: Sequence[str], root: Path | None, marks: Sequence[str], advice: str) -> Path:
    """The first folder that holds one of `marks` (relative paths): `root` itself, or one of `names` below it.

    Without `root` it is searched for below the data home. Raises `MissingData` with `advice`.
    """
    seen = [folder for name in (*names, "") for folder in search(name, root, what=what)]
    for folder in dict.fromkeys(seen):
        if any((folder / mark).exists() for mark in marks):
            return folder
    looked = f"{root} (nor in {', '.join(names)} below it)" if root else f"{', '.join(names)} below {data_home()}"
    raise MissingData(f"{what}: there is no {' or '.join(marks)} in {looked}. {advice}")


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A table of text with a header, separated by commas, tabs or blanks; the row index is the line number in the file.

    Raises `CorruptFile` for an unreadable file, a missing column, a repeated one, and rows of another width.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path}: cannot be read as text: {error}") from error
    lines = text.splitlines()
    header = lines[0] if lines else ""
    if "," in header:
        rows = list(read_csv(lines, path))
    else:
        rows = [(n, line.split("\t") if "\t" in header else line.split()) for n, line in enumerate(lines, start=1)]
    rows = [(line, [cell.strip() for cell in row]) for line, row in rows]
    names = rows[0][1] if rows else []
    missing = [column for column in columns if column not in names]
    if missing:
        raise CorruptFile(f"{path}: has no column {', '.join(missing)}; its header is {header[:200]!r}")
    if len(set(names)) < len(names):
        raise CorruptFile(f"{path}: two columns have the same name; its header is {header[:200]!r}")
    numbered = [(line, row) for line, row in rows[1:] if any(row)]
    for line, row in numbered:
        if len(row) != len(names):
            raise CorruptFile(f"{path}: line {line} has {len(row)} cells, the header {len(names)}")
    if not numbered:
        raise CorruptFile(f"{path}: has a header and no rows")
    return pd.DataFrame([row for _, row in numbered], columns=names, index=[line for line, _ in numbered], dtype=str)


def read_csv(lines: Sequence[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row, its cells between commas.

    Raises `CorruptFile` for a quote that is not closed: it would swallow all rows behind it.
    """
    reader, line = csv.reader(lines, skipinitialspace=True, strict=True), 1
    try:
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise CorruptFile(f"{path}: line {line}: cannot be split into cells: {error}") from error


def codes(table: pd.DataFrame, column: str, values: Mapping[str, int], path: Path) -> NDArray[np.int64]:
    """The column's cells (n,) as numbers; raises `CorruptFile` that names the line of the first unknown cell."""
    found = table[column].map(values)
    if found.isna().any():
        line = found.index[found.isna()][0]
        known = ", ".join(values)
        raise CorruptFile(f"{path}: line {line}: {column} is {table[column][line]!r}, it must be one of {known}")
    return np.asarray(found, np.int64)


def safe_path(folder: Path, name: str, where: str) -> Path:
    """A file of the table below its folder; raises `CorruptFile` for a name that leads out of it."""
    path = Path(name.lstrip("/"))
    if ".." in path.parts or not path.parts or "\0" in name:
        raise CorruptFile(f"{where}: {name!r} is not a file below {folder}")
    return folder / path


def list_folders(what: str, folder: Path, names: Sequence[str], advice: str) -> list[list[Path]]:
    """The pictures in each of these folders below `folder`, sorted by name: every file system has an order of its own.

    Raises `MissingData` with `advice` that names the folders without any picture.
    """
    found = [list_pictures(folder / name) for name in names]
    empty = [name for name, files in zip(names, found, strict=True) if not files]
    if empty:
        more = f" and {len(empty) - 8} more folders" if len(empty) > 8 else ""
        raise MissingData(f"{what}: {folder} has no picture in {', '.join(empty[:8])}{more}. {advice}")
    return found


def list_pictures(folder: Path) -> list[Path]:
    """Sorted, without hidden files (`._x.png` is what macOS leaves in archives); none where there is no folder."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())
    except OSError:
        return []
    return [folder / name for name in names if name.lower().endswith(PICTURES) and not name.startswith(".")]
