"""From records to tables: one table per block (dataset, backbone, recipe), one row per method and budget."""

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..benchmark.budget import Budget
from .entry import AGREEMENT, HELD, MEANS, Entry, Line
from .estimates import Cell, Estimates, estimate
from .index import DAMAGED, Collected, Index, delete
from .table import CostRatio, Resolution, Row, RunResult, Table

if TYPE_CHECKING:
    from ..benchmark.planning import Absent

SOUND = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)
"""What SQLite says of an index that cannot be used now, but is not damaged."""


def board(paths: Iterable[Path], absent: "Iterable[Absent]" = ()) -> tuple[list[Table], list[str]]:
    """Tables of all finished runs among the given record files, and what is wrong with the others.

    The index of the home makes it fast; where that is damaged, full or locked the records are read without it.
    """
    paths, absent = list(paths), list(absent)
    try:
        with Index.at_home() as index:
            found = collect(paths, index)
            return build(found, absent), found.problems
    except DAMAGED as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in SOUND:
            delete()
    found = collect(paths)
    return build(found, absent), found.problems


def collect(paths: Iterable[Path], index: Index | None = None) -> Collected:
    """What tables need of all finished runs among the given record files, and what is wrong with the others.

    A copy counts once. Runs on another test set than most of their block are left out.
    """
    collected = (index or Index()).collect(paths)
    once: dict[str, Entry] = {}
    for entry in sorted(collected.entries, key=lambda entry: entry.path):
        first = once.setdefault(entry.run, entry)
        if first is not entry:
            collected.problems.append(f"{entry.path}: run {entry.run[:12]} is there already, as {first.path}")
    blocks = _by_block(once.values())
    foreign = {entry.run: reason for block in blocks.values() for entry, reason in _foreign(block)}
    collected.problems += [f"{once[run].path}: {reason}" for run, reason in foreign.items()]
    collected.entries = [entry for run, entry in once.items() if run not in foreign]
    return collected


def _by_block(entries: Iterable[Entry]) -> dict[tuple[str, ...], list[Entry]]:
    blocks: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.run):
        line = entry.line
        recipe = json.dumps(line.recipe, sort_keys=True)
        blocks[line.protocol, line.dataset, line.fingerprint, line.backbone, line.weights, recipe].append(entry)
    return blocks


def _foreign(block: list[Entry]) -> Iterable[tuple[Entry, str]]:
    """Runs whose test set, or what its groups are called, is not that of most others."""
    groups = Counter(_groups(entry) for entry in block).most_common(1)[0][0]
    known = Counter(entry.layout for entry in block if entry.layout and _groups(entry) == groups)
    layout = known.most_common(1)[0][0] if known else ""
    for entry in block:
        if _groups(entry) != groups or entry.layout not in ("", layout):
            yield (
                entry,
                "groups: its test set, or a name in it, is not that of the other runs with its dataset fingerprint",
            )


def _groups(entry: Entry) -> tuple[Any, ...]:
    line = entry.line
    return line.classes, line.attributes, line.m_test


def build(found: Collected, absent: "Iterable[Absent]" = ()) -> list[Table]:
    """Tables of all blocks, in a fixed order: a pure function of the records and their predictions.

    Of several versions of a backbone's code the newest counts, and nothing on another stands beside it.
    Cells that a plan left out stand as rows in the tables of their dataset and backbone.
    """
    blocks, estimates = _by_block(found.entries), Estimates(found.index)
    newest = (_newest(blocks[key], lambda entry: entry.backbone_code) for key in sorted(blocks))
    tables = [_table(block, found.asked, estimates) for block in newest]
    missing = list(dict.fromkeys(absent))
    for table in tables:
        own = [cell for cell in missing if (cell.dataset, cell.backbone) == (table.dataset, table.backbone)]
        table.rows += [_absent(cell, table) for cell in own]
        table.rows.sort(key=_place)
    return tables


def _absent(cell: "Absent", table: Table) -> Row:
    metrics = dict.fromkeys(table.rows[0].metrics)
    return Row(cell.method, cell.budget, "n/a", (), 0, metrics, reason=cell.reason)


def _newest(entries: list[Entry], version: Callable[[Entry], str]) -> list[Entry]:
    """The entries of the version that was made last."""
    last = version(max(entries, key=lambda entry: (entry.created, version(entry))))
    return [entry for entry in entries if version(entry) == last]


def _cells(block: list[Entry], asked: Mapping[str, str]) -> list[Cell]:
    """Runs of one block by row; of several versions of a method's code, and of what a search chose, the newest counts.

    `asked` tells by their hashes what runs were asked for.
    """
    rows: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in block:
        rows[_asked_for(entry.line, asked)].append(entry)
    newest = (_newest(rows[key], _version) for key in sorted(rows))
    return [Cell(tuple(sorted(entries, key=lambda entry: entry.seed))) for entries in newest]


def _asked_for(line: Line, asked: Mapping[str, str]) -> tuple[str, str, str]:
    """What makes a row, whatever the code: label, budget, and the settings, or of a search what each of its draws is.

    So a search stays the same when the method is edited, which changes the hashes of all its candidates, or when
    another draw wins since one was tried again; with another number of draws or other ranges it is another one. A
    candidate whose record is not there is known by its hash alone.
    """
    draws = [asked.get(run, run) for run in line.candidates]
    return line.label, line.budget, json.dumps(draws or [line.settings, line.tuned], sort_keys=True)


def _version(entry: Entry) -> str:
    """What the runs of a row share, and what they may have had otherwise before."""
    line = entry.line
    return json.dumps([entry.code, line.candidates, line.draw, line.settings, line.tuned], sort_keys=True)


def _table(block: list[Entry], asked: Mapping[str, str], estimates: Estimates) -> Table:
    cells = _cells(block, asked)
    first, line = block[0], block[0].line
    baseline = _baseline(cells)
    rows = [_row(cell, label, baseline, estimates) for cell, label in zip(cells, _distinct(cells), strict=True)]
    _rank(cells, rows, estimates)
    return Table(
        protocol=line.protocol,
        dataset=line.dataset,
        fingerprint=line.fingerprint,
        backbone=line.backbone,
        weights=line.weights,
        recipe=line.recipe,
        gaps=[name for name in first.metrics if name.startswith("gap_")],
        rows=rows,
        device=", ".join(sorted({entry.device for entry in block})),
        resolution=_resolution(rows),
    )


def _rank(cells: Sequence[Cell], rows: Sequence[Row], estimates: Estimates) -> None:
    """Rank the rows of each budget among themselves: more labels are not a better method."""
    for budget in {row.budget for row in rows}:
        places = [i for i, row in enumerate(rows) if row.budget == budget]
        best = min(places, key=lambda i: _place(rows[i]))
        for i in places:
            better = [j for j in places if _value(rows[j]) > _value(rows[i])]
            paired = [estimates.difference(cells[i], cells[j]) for j in better]
            rows[i].rank = 1 + sum(difference is not None and difference.high < 0 for difference in paired)
            if i != best:
                rows[i].versus_best = estimates.difference(cells[i], cells[best])


def _place(row: Row) -> tuple[int, float, str, str]:
    """From poorest to richest budget, best first."""
    return _order(row.budget), -_value(row), row.method, row.budget


def _order(budget: str) -> int:
    return Budget.parse(budget).order


def _value(row: Row) -> float:
    found = row.metrics["wga"]
    return found.mean if found else 0.0


def _baseline(cells: list[Cell]) -> Cell | None:
    """The ERM row that others are compared with: at the poorest budget, there with the most seeds (a search leaves the
    defaults on its first seed alone), and of those without a search.
    """
    erm = [cell for cell in cells if cell.line.label == "erm"]
    return min(
        erm, key=lambda cell: (_order(cell.line.budget), -len(cell.entries), len(cell.line.candidates)), default=None
    )


def _distinct(cells: list[Cell]) -> list[str]:
    """Method labels; where a method stands twice at a budget, with the settings in which its rows differ.

    Of searched rows these are the modes alone, since every search draws other numbers; what is still called the same
    is numbered.
    """
    lines = [cell.line for cell in cells]
    twins: dict[tuple[str, str, bool], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        twins[line.label, line.budget, bool(line.candidates)].append(line.settings)
    parts: list[list[str]] = []
    for line in lines:
        own, searched = line.settings, bool(line.candidates)
        others = twins[line.label, line.budget, searched]
        keys = [key for key in own if len({json.dumps(other.get(key)) for other in others}) > 1]
        draw = [f"draw {line.draw} of {len(line.candidates)}"] if searched else []
        parts.append(draw + [f"{key}={own[key]}" for key in keys if not searched or isinstance(own[key], str)])
    places = [(line.label, line.budget, *part) for line, part in zip(lines, parts, strict=True)]
    for i, (line, part) in enumerate(zip(lines, parts, strict=True)):
        if line.candidates and Counter(places)[places[i]] > 1:
            part.append(f"search {1 + places[:i].count(places[i])}")
    return [
        f"{line.label} ({', '.join(part)})" if part else line.label for line, part in zip(lines, parts, strict=True)
    ]


def _row(cell: Cell, label: str, erm: Cell | None, estimates: Estimates) -> Row:
    line, entries = cell.line, cell.entries
    names = [name for name in entries[0].metrics if name in ("wga", *MEANS) or name.startswith("gap_")]
    return Row(
        method=label,
        budget=line.budget,
        tag=line.policy,
        seeds=cell.seeds,
        labels=max(entry.labels for entry in entries),
        settings=line.settings | {f"recipe.{key}": value for key, value in line.tuned.items()},
        searched=bool(line.candidates),
        agreement=_agreement(entries),
        rendered=max(entry.rendered for entry in entries),
        metrics={name: estimates.metric(cell, name) for name in names},
        versus_erm=estimates.differences(cell, erm) if erm not in (None, cell) else {},
        cost=_cost_ratio(cell, erm) if erm else None,
        held={name: estimate([entry.held[name] for entry in entries]) for name in HELD},
        host=line.method,
        source=line.source,
        from_counts=cell.from_counts,
        groups=estimates.groups(cell),
        runs=[_run(entry) for entry in entries],
        curve=estimates.curve(cell),
    )


def _run(entry: Entry) -> RunResult:
    line = entry.line
    accuracies = [c / m if m else np.inf for c, m in zip(entry.correct, line.m_test, strict=True)]
    worst = line.groups[int(np.argmin(accuracies))]
    wga, mean = (entry.metrics[name] or 0.0 for name in ("wga", "acc_mean"))
    return RunResult(entry.seed, entry.run, wga, entry.wilson, worst, mean, entry.step, entry.marginal_s)


def _agreement(entries: Sequence[Entry]) -> dict[str, float]:
    """Agreement of a source's groups with the true ones on the split that is fitted on; train where it is both."""
    means = {name: estimate([entry.agreement.get(name) for entry in entries]) for name in AGREEMENT}
    return {name: found.mean for name, found in means.items() if found}


def _cost_ratio(cell: Cell, erm: Cell) -> CostRatio | None:
    """Seconds on the device relative to ERM's, summed over common seeds; None across devices."""
    baseline = {entry.seed: entry for entry in erm.entries}
    pairs = [(entry, baseline[entry.seed]) for entry in cell.entries if entry.seed in baseline]
    if any(own.device != other.device for own, other in pairs):
        return None
    unit = sum(other.scratch_s or 0.0 for _, other in pairs)
    if unit <= 0:
        return None
    return CostRatio(
        marginal=sum(own.marginal_s or 0.0 for own, _ in pairs) / unit,
        scratch=sum(own.scratch_s or 0.0 for own, _ in pairs) / unit,
        search=(pairs[0][0].search_s or 0.0) * len(pairs) / unit,
        same_session=all(own.session == other.session for own, other in pairs),
    )


def _resolution(rows: Sequence[Row]) -> Resolution:
    """What the smallest test group can tell."""
    smallest = min((group for group in rows[0].groups if group.m_test), key=lambda group: group.m_test)
    accuracy, m = max(map(_value, rows)), smallest.m_test
    return Resolution(smallest.name, m, 1 / m, accuracy, 2 * float(np.sqrt(accuracy * (1 - accuracy) / m)))
