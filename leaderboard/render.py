"""Tables as text: Markdown, CSV, and a rich table for the terminal, all from the same rows."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import rich.box
import rich.table
from rich.cells import cell_len
from rich.markup import escape
from tabulate import tabulate

from ..benchmark.errors import printable
from .entry import AGREEMENT, HELD, MEANS
from .statistics import Estimate
from .table import Difference, Resolution, Row, Table

MISSING = "n/a"
KEYS = ("method", "budget")
FORMULA = tuple("=+-@")
"""What a spreadsheet takes a formula by."""
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")

LEGEND = (
    "`wga` worst-group accuracy over the true (y, a) groups. `acc_adj` group accuracies weighted by train counts, "
    "`acc_mean` by test counts, `acc_group` equally. `gap_NAME` accuracy where only that attribute is unaligned with "
    "the class, minus in-distribution accuracy; `gap_all` where all are. `>` marks a gap wider than ERM's beyond its "
    "interval (Whac-A-Mole). `labels` attribute labels used (+ images with a shortcut replaced: privileged). `cost` "
    "device seconds relative to the block's ERM: given its checkpoint / from scratch (+ all draws of its search); `~` "
    "when not measured in one session. Percent, mean over seeds; brackets are 95 % intervals over seeds and test "
    "units; `vs erm` is the paired difference in wga. `rank` is 1 + the rows of the same budget that are better beyond "
    "the interval of the paired difference: equal ranks are ties."
)

SOURCE_LEGEND = (
    "`ami` and `worst recall` tell how far the groups of a source are the true ones on the images fitted on: mutual "
    "information within the classes, adjusted for chance, and the share of the true group recalled worst that lies in "
    "groups of which it is the largest part."
)

COUNTS_LEGEND = (
    "`≈` intervals are from group counts, not paired and wider: the licence keeps the answers out of the records."
)

SPLITS_LEGEND = (
    "`wga train` and `wga val` are `wga` of the same model on the train and the validation images, not "
    "augmented (n/a where a record does not tell it)."
)


@dataclass(frozen=True)
class Column:
    """A column of the text tables: its heading and a row's cell."""

    heading: str
    cell: Callable[[Row], str]


def legend(tables: Iterable[Table], splits: bool = False) -> str:
    """What the columns mean."""
    tables = list(tables)
    sources = any(map(_has_source, tables))
    counts = any(row.from_counts for table in tables for row in table.rows)
    further = {SOURCE_LEGEND: sources, COUNTS_LEGEND: counts, SPLITS_LEGEND: splits}
    return " ".join([LEGEND, *(text for text, wanted in further.items() if wanted)])


def _has_source(table: Table) -> bool:
    return any(row.agreement for row in table.rows)


def columns(table: Table, splits: bool = False) -> list[Column]:
    """Columns of one table; with `splits` also wga on train and validation."""
    sources = _has_source(table)
    return [
        Column("method", lambda row: row.method),
        Column("budget", lambda row: row.budget + (f" ({row.tag})" if row.tag == "carried" else "")),
        Column("rank", lambda row: "" if row.rank is None else str(row.rank)),
        Column(
            "wga",
            lambda row: (
                MISSING if row.reason else ("≈ " if row.from_counts else "") + _with_interval(row.metrics["wga"])
            ),
        ),
        *(Column(name.replace("_", " "), lambda row, name=name: _held(row, name)) for name in HELD if splits),  # type: ignore[misc]
        Column("vs erm", lambda row: _difference(row.versus_erm.get("wga"))),
        *(Column(name, lambda row, name=name: _percent(row, name)) for name in MEANS),  # type: ignore[misc]
        *(Column(gap, lambda row, gap=gap: _gap(row, gap)) for gap in table.gaps),  # type: ignore[misc]
        *(Column(name.replace("_", " "), lambda row, name=name: _share(row, name)) for name in AGREEMENT if sources),  # type: ignore[misc]
        Column("labels", lambda row: "" if row.reason else _labels(row)),
        Column("cost", lambda row: "" if row.reason else _cost(row)),
        Column("seeds", lambda row: "" if row.reason else str(len(row.seeds))),
    ]


def title(table: Table) -> str:
    """Heading of a table."""
    weights = "" if table.weights == "none" else f" ({table.weights})"
    return f"{table.dataset} · {table.backbone}{weights}"


def subtitle(table: Table) -> str:
    """What all rows of a table share."""
    recipe = table.recipe
    patience = f", patience {recipe['patience']}" if recipe.get("patience") else ""
    return (
        f"protocol {table.protocol} · data {table.fingerprint} · {recipe['optimizer']} lr {recipe['lr']:g}, "
        f"weight decay {recipe['weight_decay']:g}, batch {recipe['batch_size']}, {recipe['epochs']} epochs, "
        f"{recipe['schedule']}{patience} · costs on {table.device}"
    )


def notes(table: Table) -> list[str]:
    """What the smallest group can tell, the settings of rows that come from a search, and why others are n/a."""
    searched = [f"{row.method}: {row.settings_text() or 'has no settings'}" for row in table.rows if row.searched]
    absent = [f"{row.method} at {row.budget}: n/a, {row.reason}" for row in table.rows if row.reason]
    return [*([resolution(table.resolution)] if table.resolution else []), *searched, *absent]


def resolution(found: Resolution) -> str:
    """A sentence on what differences the test set can tell."""
    return (
        f"smallest test group: {found.group}, {found.images:,} images; one of them is {100 * found.one_image:.2f} "
        f"points, two standard errors at {100 * found.accuracy:.0f} % are {100 * found.two_errors:.1f}"
    )


def to_markdown(tables: Iterable[Table], splits: bool = False) -> str:
    """One Markdown section per table, and the legend."""
    parts, tables = [], list(tables)
    for table in tables:
        said = [subtitle(table), *notes(table)]
        parts += [
            f"## {markdown(title(table))}",
            markdown(said[0]),
            table_text(table, splits),
            *map(markdown, said[1:]),
        ]
    return "\n\n".join([*parts, legend(tables, splits)]) + "\n" if parts else "No finished run yet.\n"


def table_text(table: Table, splits: bool = False) -> str:
    """The rows of a table as Markdown."""
    shown = columns(table, splits)
    rows = [[markdown(column.cell(row)) for column in shown] for row in table.rows]
    return tabulate(rows, [column.heading for column in shown], tablefmt="github", disable_numparse=True)


def to_latex(tables: Iterable[Table], splits: bool = False) -> str:
    r"""One `table` environment per table, for a document that loads `booktabs`; the legend is a comment."""
    parts, tables = [], list(tables)
    for table in tables:
        shown = columns(table, splits)
        rows = [[printable(column.cell(row)) for column in shown] for row in table.rows]
        body = tabulate(rows, [column.heading for column in shown], tablefmt="latex_booktabs", disable_numparse=True)
        caption = _latex(". ".join([title(table), subtitle(table), *notes(table)]))
        parts.append(f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{body}\n\\end{{table}}")
    comment = f"% {printable(legend(tables, splits))}" if parts else "% No finished run yet."
    return _symbols("\n\n".join(["% needs \\usepackage{booktabs}", *parts, comment])) + "\n"


def _latex(text: str) -> str:
    """Text in which nothing is a command of LaTeX."""
    special = {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\textasciitilde{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {character: f"\\ensuremath{{{character}}}" for character in "<>|"}
    return "".join(special.get(character, character) for character in printable(text))


def _symbols(text: str) -> str:
    """What LaTeX's usual fonts lack, as commands."""
    return text.replace("≈", r"$\approx$").replace("·", r"$\cdot$").replace("≥", r"$\geq$")


def to_csv(tables: Iterable[Table]) -> str:
    """One line per row of every table, with plain numbers (fractions, not percent); undefined values are empty."""
    lines: list[dict[str, object]] = []
    for table in tables:
        for row in table.rows:
            line: dict[str, object] = {
                "protocol": table.protocol,
                "dataset": table.dataset,
                "fingerprint": table.fingerprint,
                "backbone": table.backbone,
                "weights": table.weights,
                "epochs": table.recipe["epochs"],
                "method": row.method,
                "budget": row.budget,
                "tag": row.tag,
                "rank": row.rank if row.rank else "",
                "seeds": " ".join(str(seed) for seed in row.seeds),
                "labels": row.labels,
                "rendered": row.rendered,
                "from_counts": int(row.from_counts),
                "settings": row.settings_text(),
            }
            for name, estimate in row.metrics.items():
                line |= {name: _number(estimate, "mean"), f"{name}_sd": _number(estimate, "sd")}
                line |= {f"{name}_low": _number(estimate, "low"), f"{name}_high": _number(estimate, "high")}
                if name.startswith("gap_"):
                    line[f"{name}_amplified"] = int(row.amplified(name))
            line |= {name: _number(row.held.get(name), "mean") for name in HELD}
            line |= {f"source_{name}": f"{row.agreement[name]:.6g}" for name in AGREEMENT if name in row.agreement}
            for key in ("mean", "low", "high"):
                line[f"wga_vs_erm_{key}"] = _number(row.versus_erm.get("wga"), key)
                line[f"wga_vs_best_{key}"] = _number(row.versus_best, key)
            line["cost_marginal"] = _number(row.cost, "marginal")
            line["cost_scratch"] = _number(row.cost, "scratch")
            line["cost_search"] = _number(row.cost, "search")
            line["cost_same_session"] = int(row.cost.same_session) if row.cost else ""
            lines.append(line)
    return write_csv(list(dict.fromkeys(key for line in lines for key in line)), lines)


def write_csv(headings: Sequence[str], lines: Iterable[dict[str, object]]) -> str:
    """Lines as CSV; what is absent is empty, and no text is run by a spreadsheet that opens it."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, headings, restval="", lineterminator="\n")
    writer.writerow({heading: _inert(heading) for heading in headings})
    writer.writerows({key: _inert(value) for key, value in line.items()} for line in lines)
    return buffer.getvalue()


def _inert(value: object) -> object:
    """A text that a spreadsheet would take for a formula begins with an apostrophe; a number stays as it is."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip()[:1] in FORMULA and not _NUMBER.fullmatch(text) else text


def to_json(tables: Iterable[Table]) -> str:
    """All tables with everything that is known of their rows; numbers are fractions, undefined ones null."""
    content = [{"title": title(table), **asdict(table)} for table in tables]
    return json.dumps({"version": 1, "tables": _known(content)}, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def _known(value: Any) -> Any:
    """The same with None for what is not a number; JSON has no other word for it."""
    if isinstance(value, dict):
        return {key: _known(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_known(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_terminal(tables: Iterable[Table], width: int, splits: bool = False) -> list[rich.table.Table]:
    """Tables for a terminal of some width; columns that do not fit go on below."""
    shown = []
    for table in tables:
        cells = {column.heading: [column.cell(row) for row in table.rows] for column in columns(table, splits)}
        parts = _fit(cells, width)
        for i, headings in enumerate(parts):
            target = rich.table.Table(
                title=escape(printable(title(table))) if i == 0 else None,
                caption=escape("\n".join(map(printable, [subtitle(table), *notes(table)])))
                if i == len(parts) - 1
                else None,
                header_style="bold",
                box=rich.box.SIMPLE_HEAD,
                title_justify="left",
                caption_justify="left",
                pad_edge=False,
            )
            for j, heading in enumerate(headings):
                side: Literal["left", "right"] = "left" if j < len(KEYS) else "right"
                target.add_column(escape(printable(heading)), justify=side, no_wrap=True)
            for row in zip(*(cells[heading] for heading in headings), strict=True):
                target.add_row(*(escape(printable(cell)) for cell in row))
            shown.append(target)
    return shown


def _fit(cells: dict[str, list[str]], width: int) -> list[list[str]]:
    """Headings of each part, every part beginning with the keys, so that no part is wider than `width`."""
    between = 3  # padding and the box's divider
    size = {heading: max(map(cell_len, [heading, *values])) + between for heading, values in cells.items()}
    room = width - sum(size[key] for key in KEYS)
    parts, used = [list(KEYS)], 0
    for heading in cells:
        if heading in KEYS:
            continue
        if used and used + size[heading] > room:
            parts, used = [*parts, list(KEYS)], 0
        parts[-1].append(heading)
        used += size[heading]
    return parts


def _share(row: Row, name: str) -> str:
    """Agreement of the row's source, empty without one."""
    return f"{100 * row.agreement[name]:.0f}" if name in row.agreement else ""


def _percent(row: Row, name: str) -> str:
    estimate = row.metrics[name]
    if estimate is None:
        return "" if row.reason else MISSING
    return f"{100 * estimate.mean:.1f}"


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return MISSING
    known = not math.isnan(estimate.low)
    return f"{100 * estimate.mean:.1f}" + (f" [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]" if known else "")


def _held(row: Row, name: str) -> str:
    return "" if row.reason else _with_interval(row.held.get(name))


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _gap(row: Row, gap: str) -> str:
    estimate = row.metrics[gap]
    if estimate is None:
        return "" if row.reason else MISSING
    return f"{'> ' if row.amplified(gap) else ''}{100 * estimate.mean:+.1f}"


def _labels(row: Row) -> str:
    return f"{row.labels:,}" + (f" + {row.rendered:,} rendered" if row.rendered else "")


def _cost(row: Row) -> str:
    if row.cost is None:
        return MISSING
    search = f" + {row.cost.search:.1f}" if row.cost.search else ""
    return f"{'' if row.cost.same_session else '~'}{row.cost.marginal:.2f} / {row.cost.scratch:.2f}{search}"


def _number(holder: object, name: str) -> str:
    """A plain number from an estimate that may be missing, empty when undefined."""
    value = getattr(holder, name, None)
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def markdown(text: str) -> str:
    """Escape what would break a table or become markup."""
    return re.sub(r"([\\|`*<]|\](?=\())", r"\\\1", printable(text))
