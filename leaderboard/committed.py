"""The leaderboard as it is committed: tables made from `leaderboard/results/`, and those of the README.

What is generated lies in `leaderboard/tables/`, and in the README between `<!-- SUITE:begin -->` and
`<!-- SUITE:end -->`, where the rows of a suite stand. Tests and CI hold both to the records.
"""

import dataclasses
import json
import re
from pathlib import Path

from ..benchmark import record as records
from ..benchmark.budget import Budget
from ..benchmark.errors import UserError
from ..benchmark.home import write_bytes
from ..benchmark.planning import Request, find_card, native_budget
from ..benchmark.registry import METHODS, SOURCES
from ..benchmark.spec import MethodName, method_label
from ..benchmark.suite import read_suite
from . import aggregate, costs, render, reproduction
from .entry import Entry
from .index import Collected
from .table import Table

RESULTS, TABLES = Path("leaderboard/results"), Path("leaderboard/tables")
COSTS = Path("leaderboard/costs")
"""Measurements of `worstgroup profile`, a file for each device and setting."""
MARKED = re.compile(r"(<!-- (?P<suite>[\w/-]+):begin -->\n).*?(<!-- (?P=suite):end -->)", re.DOTALL)
NOTICE = "<!-- Made by `worstgroup board --update` from leaderboard/results and leaderboard/costs. Do not edit. -->"


def made(checkout: Path) -> dict[Path, str]:
    """Every generated file of a checkout and its text; raises `UserError` where a committed record is wrong."""
    found = aggregate.collect(records.find(checkout / RESULTS))
    if found.problems:
        raise UserError("\n".join(found.problems))
    tables = aggregate.build(found)
    readme = checkout / "README.md"
    texts = {
        checkout / TABLES / "README.md": f"{NOTICE}\n\n{render.to_markdown(tables)}",
        checkout / TABLES / "board.csv": render.to_csv(tables),
        checkout / TABLES / "reproduction.md": f"{NOTICE}\n\n{reproduction.render(tables)}",
        readme: MARKED.sub(lambda match: _marked(match, found), readme.read_text(encoding="utf-8")),
    }
    if (checkout / COSTS).is_dir():
        text = costs.render(costs.find(checkout / COSTS), tables)
        texts[checkout / TABLES / "costs.md"] = f"{NOTICE}\n\n{text}"
    return texts


def differing(checkout: Path) -> list[Path]:
    """Generated files that are not what the committed records give."""
    return _differing(made(checkout))


def update(checkout: Path) -> list[Path]:
    """Write what differs; returns which files these are."""
    texts = made(checkout)
    changed = _differing(texts)
    for path in changed:
        write_bytes(path, texts[path].encode())
    return changed


def _differing(texts: dict[Path, str]) -> list[Path]:
    return [path for path, text in texts.items() if not path.is_file() or path.read_bytes() != text.encode()]


def of_suite(found: Collected, suite: str) -> list[Table]:
    """Tables of the runs that a suite asks for, at the methods' defaults, ranked among themselves."""
    asked = {_cell(request) for request in read_suite(suite).requests()}
    own = [one for one in found.entries if _place(one) in asked and _at_defaults(one)]
    return aggregate.build(dataclasses.replace(found, entries=own))


def _cell(request: Request) -> tuple[str, str, str, str]:
    """Dataset, backbone, label and budget of a line of a suite."""
    name = MethodName.parse(request.method)
    label = method_label(name.host, name.source, name.policy, name.extra)
    backbone = request.backbone or find_card(request.dataset)[1].backbone
    return request.dataset, backbone, label, str(Budget.parse(request.budget or native_budget(name)))


def _place(entry: Entry) -> tuple[str, str, str, str]:
    line = entry.line
    return line.dataset, line.backbone, line.label, line.budget


def _at_defaults(entry: Entry) -> bool:
    """Whether a run's method and source have the settings that they have when none is given."""
    line = entry.line
    settings = dataclasses.asdict(METHODS[line.method].config())
    if line.source:
        own = dataclasses.asdict(SOURCES[line.source].config())
        settings |= {f"{line.source}.{key}": value for key, value in own.items()}
    return json.dumps(settings, sort_keys=True) == json.dumps(line.settings, sort_keys=True)


def _marked(match: re.Match[str], found: Collected) -> str:
    begin, suite, end = match[1], match["suite"], match[3]
    parts = [
        f"{render.table_text(table)}\n\n{render.markdown(render.subtitle(table))}" for table in of_suite(found, suite)
    ]
    return begin + "\n\n".join(parts) + "\n" + end
