"""The papers' own numbers, as printed: read and checked from `reported/`, one file per table, one number per line."""

import csv
import io
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from ..benchmark.budget import Budget
from ..benchmark.errors import CorruptFile, UnknownName, UserError
from ..benchmark.planning import find_card
from ..benchmark.registry import METHODS, PACKAGE, SOURCES
from ..benchmark.spec import MethodName

PERCENT = ("wga", "wga_train", "wga_val", "acc_mean", "acc_adj", "acc_group", "drop_acc_adj", "mask_fg", "mask_bg")
"""Metrics in percent, as are the gaps (`gap_NAME`, `gap_all`). A drop is what is lost where only the foreground is
shown; `mask_fg` and `mask_bg` are the shares of object and background that an attribution mask covers.
"""
PLAIN = ("cost_ratio", "wga_ratio", "time", "score_fg", "score_bg")
"""Metrics that are no percentages: ratios to ERM's seconds and worst-group accuracy, seconds, mean attribution."""
COLUMNS = (
    *("paper", "table", "dataset", "backbone", "weights", "method", "settings", "method_reported", "budget"),
    *("metric", "value", "spread", "supervision", "quoted_from", "note"),
)


@dataclass(frozen=True)
class Reported:
    """One number of a paper.

    `dataset`, `backbone`, `weights`, `method` and `budget` are our names: a dataset that is none of ours has the
    paper's own, which begins with a capital letter, and what the paper leaves open is empty. `settings` are those that
    make a row of `method` the paper's; "ours" is spelled out in `method_reported`. `value` and `spread` (a standard
    deviation) have the printed digits; `note` is what is known about why a number may differ or not be what it is
    called.
    """

    paper: str
    table: str
    dataset: str
    backbone: str
    weights: str
    method: str
    settings: tuple[tuple[str, str], ...]
    method_reported: str
    budget: str
    metric: str
    value: Decimal
    spread: Decimal | None
    supervision: str
    quoted_from: str
    note: str

    @property
    def key(self) -> str:
        """Name of the paper's table, `exmap-table1`."""
        return f"{self.paper.lower()}-{self.table}"

    @property
    def title(self) -> str:
        """`ExMap, Table 1`."""
        return f"{self.paper}, {self.table.replace('supplement-', 'supplement, ').replace('table', 'Table ')}"

    @property
    def is_ours(self) -> bool:
        """Whether its dataset is one of ours."""
        return not self.dataset[:1].isupper()


def reported() -> list[Reported]:
    """All numbers, by file and in the order printed; raises `CorruptFile` naming file and line of one that is wrong."""
    folder = resources.files(f"{PACKAGE}.leaderboard") / "reported"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".csv")), key=_place)
    return [line for file in files for line in read(file)]


def _place(file: Traversable) -> list[str | int]:
    """Table 10 stands after table 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]


def read(file: Traversable) -> list[Reported]:
    """Numbers of one table; raises `CorruptFile` naming file and line of one that is wrong."""
    reader = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")), strict=True)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise CorruptFile(f"{file.name}, line 1: the columns must be {','.join(COLUMNS)}")
    try:
        return [_line(row, file.name.removesuffix(".csv")) for row in reader]
    except (UserError, csv.Error) as error:
        raise CorruptFile(f"{file.name}, line {reader.line_num}: {error}") from error


def _line(row: dict[str, str], table: str) -> Reported:
    """Raises `UserError` for a value that cannot be."""
    if None in row or None in row.values():
        raise UserError(f"it must have {len(COLUMNS)} cells")
    settings = tuple(_setting(part) for part in row["settings"].split())
    value, spread = _number("value", row["value"]), _number("spread", row["spread"]) if row["spread"] else None
    line = Reported(**{**row, "settings": settings, "value": value, "spread": spread})  # type: ignore[arg-type]
    if line.key != table:
        raise UserError(f"the line is of {line.key}, the file of {table}")
    known = _metrics(line.dataset if line.is_ours else "")
    if line.metric not in known:
        raise UnknownName("metric", line.metric, known)
    if line.method:
        _check_method(line.method)
    if line.budget:
        budget = Budget.parse(line.budget)
        if line.is_ours:
            budget.columns(find_card(line.dataset)[1])
    return line


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UserError(f"settings: {text!r} is not KEY=VALUE")
    return key, value


def _number(name: str, text: str) -> Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation as error:
        raise UserError(f"{name}: {text!r} is not a number") from error
    if not number.is_finite():
        raise UserError(f"{name}: {text!r} is not a number")
    return number


@cache
def _metrics(dataset: str) -> tuple[str, ...]:
    """Metrics that can be reported on one of our datasets, with its gaps; on any other if the name is empty."""
    attributes = [attribute.name for attribute in find_card(dataset)[1].attributes] if dataset else []
    gaps = [f"gap_{name}" for name in attributes] + (["gap_all"] if len(attributes) > 1 else [])
    return (*PERCENT, *PLAIN, *gaps)


@cache
def _check_method(text: str) -> None:
    """Raise `UnknownName` unless host and source exist."""
    name = MethodName.parse(text)
    METHODS[name.host]
    if name.source:
        SOURCES[name.source]
