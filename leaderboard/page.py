"""Tables as one HTML page that asks for nothing from outside: libraries, texts and data stand in the file itself.

The data go in as JSON that the page's script reads and shows as text; whatever a record says, it cannot become markup.
"""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..benchmark.budget import Budget
from ..benchmark.errors import printable
from ..benchmark.registry import METHODS
from .entry import AGREEMENT, MEANS
from .render import subtitle, title
from .table import Row, Table

LIBRARIES = ("d3.min.js", "plot.min.js", "alpine-csp.min.js")
LICENCES = ("alpine.LICENSE.txt", "d3.LICENSE.txt", "plot.LICENSE.txt")
MANY_GROUPS = 16
"""Above it validation curves are the worst group and the mean only."""

HELP = {
    "rank": "1 + the rows of the same budget that are better beyond the 95 % interval of the paired difference. "
    "Rows of rank 1 cannot be told from the best. More labels are not a better method, so budgets are ranked apart.",
    "method": "HOST, HOST+SOURCE where a source infers the groups, @POLICY where the budget changes what it does. "
    "Opens the row: its seeds, groups, curves and settings.",
    "budget": "Whose attribute labels were granted to fit and to select. Sorts from the poorest to the richest, best "
    "first.",
    "wga": "Worst-group accuracy over the true (class, attributes) groups of the test images, with its 95 % interval "
    "over seeds and test units. The strip beside it spans 0 to 100 %. ≈ before it: intervals are from group "
    "counts, not paired and wider, since the licence keeps the answers out of the records.",
    "best": "Paired difference in wga to the best row of the same budget, with its 95 % interval, in points.",
    "erm": "Paired difference in wga to ERM, with its 95 % interval, in points.",
    "acc_adj": "Group accuracies weighted by train counts.",
    "acc_mean": "Group accuracies weighted by test counts: the share of right answers.",
    "acc_group": "Group accuracies weighted equally.",
    "gap": "Accuracy where only this attribute is unaligned with the class, minus in-distribution accuracy, in points. "
    "> marks a gap wider than ERM's beyond its interval: amplified (Whac-A-Mole).",
    "gap_all": "Accuracy where all attributes are unaligned with the class, minus in-distribution accuracy, in points. "
    "> marks a gap wider than ERM's beyond its interval: amplified.",
    "ami": "Mutual information of the source's groups with the true ones on the images fitted on, within the classes "
    "and adjusted for chance.",
    "worst_recall": "Share of the true group recalled worst that lies in groups of which it is the largest part.",
    "labels": "Attribute labels used, one per image and attribute; + images with a shortcut replaced: privileged.",
    "cost": "Device seconds relative to the block's ERM, given ERM's checkpoint. ~ when not measured in one session.",
    "scratch": "The same from scratch; + all draws of the search that the settings come from.",
    "seeds": "Seeds that the row is the mean of.",
}
"""What the columns mean; that of `gap` is for every single attribute."""


def to_html(tables: Sequence[Table]) -> str:
    """The page; the same tables give the same bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    *libraries, alpine = (f"vendor/{name}" for name in LIBRARIES)
    scripts = [_part(name) for name in (*libraries, "plots.js", "page.js", alpine)]  # Alpine starts at once: it is last
    return environment.from_string(_part("page.html")).render(
        protocols=", ".join(sorted({table.protocol for table in tables})),
        tables=len(tables),
        runs=sum(len(row.runs) for table in tables for row in table.rows),
        help=_all_help(tables),
        style=Markup(_part("page.css")),
        scripts=[Markup(script) for script in scripts],
        sources=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        licences=Markup("\n\n".join(_part(f"vendor/{name}") for name in LICENCES)),
        data=Markup(_json(_data(tables))),
    )


def family(row: Row) -> str:
    """`single-stage` for a loss in one training, `two-stage` for a pipeline, `other` for what is not registered."""
    host = row.host or re.split(r"[+@( ]", row.method)[0]  # a row that is n/a has its label only
    if host not in METHODS:
        return "other"
    one = host == "erm" or hasattr(METHODS[host].cls, "loss")  # ERM's row is the shared training, which others build on
    return "single-stage" if one else "two-stage"


def columns(table: Table) -> list[dict[str, str]]:
    """Columns of a table: the key that rows sort and show by, its kind, heading and help."""
    sources = any(row.agreement for row in table.rows)
    kinds = [
        *((key, key, key) for key in ("rank", "method", "budget", "wga")),
        ("best", "difference", "vs best"),
        ("erm", "difference", "vs erm"),
        *((name, "share", name) for name in MEANS),
        *((gap, "gap", gap) for gap in table.gaps),
        *((name, "agreement", name.replace("_", " ")) for name in AGREEMENT if sources),
        ("labels", "labels", "labels"),
        ("cost", "cost", "cost"),
        ("scratch", "cost", "cost scratch"),
        ("seeds", "seeds", "seeds"),
    ]
    return [{"key": key, "kind": kind, "heading": heading, "help": _help(key)} for key, kind, heading in kinds]


def _help(key: str) -> str:
    return HELP.get(key) or HELP["gap"]


def _all_help(tables: Sequence[Table]) -> list[tuple[str, str]]:
    """Headings and help of the columns that some table has, single gaps as one."""
    found = {column["heading"]: column["help"] for table in tables for column in columns(table)}
    gaps = {name for table in tables for name in table.gaps if name not in HELP}
    entries = {"gap_NAME" if heading in gaps else heading: text for heading, text in found.items()}
    return list(entries.items())


def _data(tables: Sequence[Table]) -> dict[str, Any]:
    """All that the script needs."""
    budgets = {row.budget: Budget.parse(row.budget) for table in tables for row in table.rows}
    ladder = sorted(budgets, key=lambda name: (budgets[name].order, name))
    return {
        "budgets": [{"name": name, "summary": _summary(budgets[name])} for name in ladder],
        "tables": [_table(table) for table in tables],
    }


def _summary(budget: Budget) -> str:
    return f"{budget.grant.summary}{' (' + ', '.join(budget.attributes) + ' only)' if budget.attributes else ''}"


def _table(table: Table) -> dict[str, Any]:
    """A table as the script takes it: its rows in order, each with a key that a link can name."""
    shared = [table.protocol, table.dataset, table.fingerprint, table.backbone, table.weights, table.recipe]
    keys = _keys(table.rows)
    return {
        "key": hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12],
        "title": title(table),
        "subtitle": subtitle(table),
        "dataset": table.dataset,
        "backbone": table.backbone,
        "resolution": _resolution(table),
        "searched": [[row.method, row.settings_text() or "no settings"] for row in table.rows if row.searched],
        "gaps": table.gaps,
        "columns": columns(table),
        "rows": [_row(row, key, table.gaps) for row, key in zip(table.rows, keys, strict=True)],
    }


def _keys(rows: Sequence[Row]) -> list[str]:
    """`METHOD at BUDGET`, numbered where that is there already."""
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        name = f"{row.method} at {row.budget}"
        seen[name] += 1
        keys.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return keys


def _row(row: Row, key: str, gaps: Sequence[str]) -> dict[str, Any]:
    names, curve = [group.name for group in row.groups], row.curve
    if len(names) > MANY_GROUPS:
        names, curve = ["worst group", "mean of the groups"], [_summarised(epoch) for epoch in curve]
    return asdict(row) | {
        "key": key,
        "family": family(row),
        "settings": row.settings_text(),
        "amplified": [name for name in gaps if row.amplified(name)],
        "curve": curve,
        "curve_names": names,
    }


def _summarised(epoch: list[float | None]) -> list[float | None]:
    """Lowest and mean accuracy of the groups that validation has."""
    known = [value for value in epoch if value is not None]
    return [min(known), sum(known) / len(known)] if known else [None, None]


def _resolution(table: Table) -> str:
    found = table.resolution
    if found is None:
        return ""
    return (
        f"Resolution: the smallest test group is {found.group} with {found.images:,} images. One image is "
        f"{100 * found.one_image:.2g} points; two standard errors at the best worst group of the table "
        f"({100 * found.accuracy:.1f}) are {100 * found.two_errors:.1f} points."
    )


def _json(value: Any) -> str:
    """JSON that nothing in it can end: no `<` stands in it as such."""
    text = json.dumps(_plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """The same with None for NaN, numbers as precise as is shown, and no control character in a text."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, str):
        return printable(value)
    return value


def _part(name: str) -> str:
    """A file of the page."""
    return (files(__package__) / "page" / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    """As a Content-Security-Policy names a script that may run."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
