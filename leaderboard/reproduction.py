"""The papers' numbers beside ours: a comparison for every printed number and row of ours that can stand beside it.

Nothing here is ranked, and no number of a paper is in the tables of the leaderboard.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from tabulate import tabulate

from ..benchmark.errors import UnknownName
from ..benchmark.planning import find_card
from ..benchmark.spec import PAPER, override
from ..benchmark.suite import read_suite, suite_names
from .entry import HELD
from .papers import PLAIN, Reported, reported
from .render import MISSING, markdown, title, write_csv
from .statistics import Estimate
from .table import Row, Table

FORMATS = ("md", "csv")
TIMES = ("cost_ratio", "time")
BEYOND = ("time", "wga_ratio", "score_fg", "score_bg", "mask_fg", "mask_bg")
"""Metrics of the papers that no row has; attribution to objects is `worstgroup explain RUN --attribution`."""
DROP = "drop_"
FOREGROUND = ":fg-black"
"""The variant that a drop is measured on, beside the dataset itself."""

LEGEND = (
    "Numbers that papers print, beside the rows of ours of the same dataset, method and metric, at the paper's budget "
    "where that is known. They are not ranked and not part of the leaderboard: recipes, searches and checkpoints "
    "differ. Percent, but for ratios. `paper` as printed, with its standard deviation; `ours` the mean over seeds with "
    "its 95 % interval over seeds and test units; `difference` ours minus the paper's; `inside` whether the paper's "
    "number lies in our interval, which leaves the paper's own spread aside. Rows of protocol `paper` and of the "
    "paper's backbone come first. `differs` is what sets our row apart, `notes` what is known about the paper's number."
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A paper's number and a row of ours; `ours` has the paper's unit, `differs` says what sets the row apart."""

    paper: Reported
    table: Table
    row: Row
    ours: Estimate
    differs: tuple[str, ...]

    @property
    def difference(self) -> float:
        """Ours minus the paper's."""
        return self.ours.mean - float(self.paper.value)

    @property
    def inside(self) -> bool | None:
        """Whether the paper's number lies in our interval, None without one."""
        if math.isnan(self.ours.low):
            return None
        return self.ours.low <= float(self.paper.value) <= self.ours.high


@dataclass(frozen=True)
class Coverage:
    """How many of a paper's table's numbers have a row of ours, and how many cannot have one."""

    key: str
    matched: int
    total: int
    beyond: int


def render(tables: Sequence[Table], format_: str = "md") -> str:
    """The papers' numbers beside these tables, as `md` or `csv`; raises `UserError`."""
    if format_ not in FORMATS:
        raise UnknownName("format", format_, FORMATS)
    lines = reported()
    comparisons = compare(tables, lines)
    return to_csv(comparisons) if format_ == "csv" else to_markdown(comparisons, coverage(comparisons, lines))


# ---------------------------------------------------------------------------------------------------------- comparing


def compare(tables: Sequence[Table], lines: Iterable[Reported]) -> list[Comparison]:
    """All pairs, in the order of the papers' lines; of one line the rows most like the paper's first."""
    blocks: dict[str, list[Table]] = defaultdict(list)
    for table in tables:
        blocks[_dataset(table)].append(table)
    pairs: list[Comparison] = []
    for line in lines:
        pairs += sorted(_beside(line, blocks[line.dataset], tables), key=_place)
    return pairs


def coverage(comparisons: Iterable[Comparison], lines: Iterable[Reported]) -> list[Coverage]:
    """One entry per table of the papers, in their order."""
    found, lines = {comparison.paper for comparison in comparisons}, list(lines)
    totals = Counter(line.key for line in lines)
    matched = Counter(line.key for line in found)
    beyond = Counter(line.key for line in lines if line.metric in BEYOND or not (line.is_ours and line.method))
    return [Coverage(key, matched[key], total, beyond[key]) for key, total in totals.items()]


def _dataset(table: Table) -> str:
    """`waterbirds` of `waterbirds[112px,custom]`."""
    return table.dataset.partition("[")[0]


def _beside(line: Reported, own: list[Table], tables: Sequence[Table]) -> Iterator[Comparison]:
    for table in own:
        for row in filter(lambda row: _fits(line, row), table.rows):
            value = _value(line.metric, table, row, tables)
            if value is not None:
                yield Comparison(line, table, row, value, tuple(_differs(line, table, row)))


def _fits(line: Reported, row: Row) -> bool:
    """Whether a row of the dataset is one of the paper's method with its settings, at its budget where that is known.

    In tables a method's settings follow its name in brackets.
    """
    named = bool(line.method) and row.method.partition(" (")[0] == line.method
    granted = line.budget in ("", row.budget)
    return named and granted and all(str(row.settings.get(key)) == value for key, value in line.settings)


def _value(metric: str, table: Table, row: Row, tables: Sequence[Table]) -> Estimate | None:
    """A row's metric in the papers' unit, None where it has none."""
    if metric == "cost_ratio":
        found = Estimate(row.cost.scratch, None, math.nan, math.nan) if row.cost else None
    elif metric.startswith(DROP):
        found = _drop(metric.removeprefix(DROP), table, row, tables)
    else:
        found = row.held.get(metric) if metric in HELD else row.metrics.get(metric)
    if found is None or metric in PLAIN:
        return found
    sd = None if found.sd is None else 100 * found.sd
    return Estimate(100 * found.mean, sd, 100 * found.low, 100 * found.high)


def _drop(metric: str, table: Table, row: Row, tables: Sequence[Table]) -> Estimate | None:
    """What the same row has more on the whole pictures, which were trained on apart: no interval."""
    whole = table.dataset.replace(FOREGROUND, "")
    for other in tables:
        if _block(other) == (whole, *_block(table)[1:]):
            for twin in other.rows:
                a, b = twin.metrics.get(metric), row.metrics.get(metric)
                if (twin.method, twin.budget) == (row.method, row.budget) and a and b:
                    return Estimate(a.mean - b.mean, None, math.nan, math.nan)
    return None


def _block(table: Table) -> tuple[Any, ...]:
    return table.dataset, table.protocol, table.backbone, table.weights, table.recipe


def _place(pair: Comparison) -> tuple[Any, ...]:
    """Most like the paper's first; then a fixed order."""
    table, row = pair.table, pair.row
    unlike = table.protocol != PAPER, table.backbone != pair.paper.backbone, len(pair.differs)
    return *unlike, *map(str, _block(table)), table.fingerprint, row.budget, row.method


# -------------------------------------------------------------------------------------------------- what sets apart


def _differs(line: Reported, table: Table, row: Row) -> Iterator[str]:
    """What sets a row apart from the paper's: data, model, recipe, labels, clock."""
    if table.backbone != line.backbone:
        yield f"backbone {table.backbone} (paper: {line.backbone or 'not said'})"
    elif line.weights and table.weights != line.weights:
        yield f"weights {table.weights} (paper: {line.weights})"
    yield from _data(table)
    if table.protocol != PAPER:
        yield f"protocol {table.protocol}"
    elif table.recipe not in _recipes(line.paper, line.dataset, line.metric in TIMES):
        yield "not this paper's recipe"
    if not line.budget:
        yield f"budget {row.budget} (paper: not clear)"
    if line.metric == "cost_ratio" and row.cost:
        yield f"timed on {table.device}" + ("" if row.cost.same_session else ", not in one session")
    if line.metric.startswith(DROP):
        yield "two trainings, one for each test set"


def _data(table: Table) -> Iterator[str]:
    """What the brackets of a dataset's name say; a paper's own transform is part of protocol `paper`."""
    transforms = find_card(_dataset(table))[1].transforms
    for option in filter(None, table.dataset.partition("[")[2].removesuffix("]").split(",")):
        if option == "custom":
            yield "data with other counts than the official ones"
        elif option.endswith("px"):
            yield f"pictures of {option.removesuffix('px')} px"
        elif option not in transforms or table.protocol != PAPER:
            yield f"{'transform' if option in transforms else 'data'} {option}"


@cache
def _recipes(paper: str, dataset: str, of_time: bool) -> tuple[dict[str, Any], ...]:
    """Recipes that the suites of a paper give a dataset; those that are for timing alone train for too few epochs."""
    names = [name for name in suite_names() if name.startswith(f"repro/{paper.lower()}-")]
    asked = [one for name in names if of_time or not name.endswith("-cost") for one in read_suite(name).requests()]
    usual = find_card(dataset)[1].recipe
    made = [override(usual, _changes(one.settings), "recipe")[0] for one in asked if one.dataset == dataset]
    return tuple(asdict(recipe) for recipe in dict.fromkeys(made))


def _changes(settings: dict[str, str]) -> dict[str, str]:
    return {key.removeprefix("recipe."): value for key, value in settings.items() if key.startswith("recipe.")}


# ----------------------------------------------------------------------------------------------------------- as text


def to_markdown(comparisons: Iterable[Comparison], covered: Iterable[Coverage]) -> str:
    """A section for every table of the papers that a row of ours stands beside, and how many numbers have none."""
    sections: dict[str, list[Comparison]] = defaultdict(list)
    for pair in comparisons:
        sections[pair.paper.title].append(pair)
    none = "No finished run stands beside a number of the papers yet. The suites `repro/*` make such runs."
    parts = ["# The papers' numbers beside ours", LEGEND if sections else none]
    for heading, pairs in sections.items():
        notes = list(dict.fromkeys(note for pair in pairs for note in _notes(pair.paper)))
        cells = [{key: markdown(cell) for key, cell in _cells(pair, notes).items()} for pair in pairs]
        parts += [f"## {heading}", tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)]
        parts += ["\n".join(f"{i}. {markdown(note)}" for i, note in enumerate(notes, 1))] if notes else []
    parts += ["## Numbers with a row of ours", "\n".join(map(_covered, covered))]
    return "\n\n".join(parts) + "\n"


def _covered(entry: Coverage) -> str:
    beyond = f" ({entry.beyond} are of a set or a metric that no row has)" if entry.beyond else ""
    return f"- {entry.key}: {entry.matched} of {entry.total} numbers have a row of ours{beyond}"


def _cells(pair: Comparison, notes: list[str]) -> dict[str, str]:
    """A line of a section, whose `notes` it refers to by their numbers."""
    paper, table, row = pair.paper, pair.table, pair.row
    return {
        "in the paper": paper.method_reported + (f" ({paper.supervision})" if paper.supervision else ""),
        "metric": paper.metric,
        "paper": f"{paper.value}" + (f" ± {paper.spread}" if paper.spread is not None else ""),
        "ours": _estimate(pair),
        "difference": f"{pair.difference:+.{_digits(pair)}f}",
        "inside": {None: MISSING, True: "yes", False: "no"}[pair.inside],
        "our row": f"{row.method} at {row.budget}",
        "seeds": str(len(row.seeds)),
        "our block": f"{title(table)}, protocol {table.protocol}, {table.recipe['epochs']} epochs",
        "differs": "; ".join(pair.differs),
        "notes": ", ".join(str(1 + notes.index(note)) for note in _notes(paper)),
    }


def _notes(paper: Reported) -> list[str]:
    """What is known about a number, one reason each."""
    return [*([f"quoted from {paper.quoted_from}"] if paper.quoted_from else []), *filter(None, paper.note.split("; "))]


def _digits(pair: Comparison) -> int:
    return 2 if pair.paper.metric in PLAIN else 1


def _estimate(pair: Comparison) -> str:
    ours, digits = pair.ours, _digits(pair)
    if not math.isnan(ours.low):
        return f"{ours.mean:.{digits}f} [{ours.low:.{digits}f}, {ours.high:.{digits}f}]"
    return f"{ours.mean:.{digits}f}" + ("" if ours.sd is None else f" (sd {ours.sd:.{digits}f})")


HEADINGS = (
    *("paper", "table", "dataset", "paper_method", "method", "supervision", "paper_budget", "metric", "paper_value"),
    *("paper_sd", "value", "sd", "low", "high", "difference", "inside", "seeds", "our_method", "our_budget"),
    *("our_settings", "our_dataset", "fingerprint", "backbone", "weights", "protocol", "epochs", "differs"),
    *("quoted_from", "note"),
)


def to_csv(comparisons: Iterable[Comparison]) -> str:
    """One line per comparison, in the papers' units (percent, but for ratios); what is not known is empty."""
    return write_csv(HEADINGS, map(_line, comparisons))


def _line(pair: Comparison) -> dict[str, object]:
    paper, table, row, ours = pair.paper, pair.table, pair.row, pair.ours
    return {
        "paper": paper.paper,
        "table": paper.table,
        "dataset": paper.dataset,
        "paper_method": paper.method_reported,
        "method": paper.method,
        "supervision": paper.supervision,
        "paper_budget": paper.budget,
        "metric": paper.metric,
        "paper_value": paper.value,
        "paper_sd": "" if paper.spread is None else paper.spread,
        "value": f"{ours.mean:.6g}",
        "sd": "" if ours.sd is None else f"{ours.sd:.6g}",
        "low": "" if math.isnan(ours.low) else f"{ours.low:.6g}",
        "high": "" if math.isnan(ours.high) else f"{ours.high:.6g}",
        "difference": f"{pair.difference:.6g}",
        "inside": "" if pair.inside is None else int(pair.inside),
        "seeds": " ".join(map(str, row.seeds)),
        "our_method": row.method,
        "our_budget": row.budget,
        "our_settings": row.settings_text(),
        "our_dataset": table.dataset,
        "fingerprint": table.fingerprint,
        "backbone": table.backbone,
        "weights": table.weights,
        "protocol": table.protocol,
        "epochs": table.recipe["epochs"],
        "differs": "; ".join(pair.differs),
        "quoted_from": paper.quoted_from,
        "note": paper.note,
    }
