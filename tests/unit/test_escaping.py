"""Whatever a record says, it stays text: no markup, formula, command or line of its own in any format."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import edit, put
from rich.console import Console
from worstgroup.benchmark.errors import CorruptFile
from worstgroup.benchmark.planning import Absent
from worstgroup.benchmark.record import LONGEST, find, predictions_path, read
from worstgroup.leaderboard import page, render, reproduction
from worstgroup.leaderboard.aggregate import build, collect
from worstgroup.leaderboard.papers import reported
from worstgroup.leaderboard.reproduction import Comparison
from worstgroup.leaderboard.statistics import Estimate
from worstgroup.leaderboard.table import Table

Pick = Callable[[str], Path]

HOSTILE = {
    "script": "</script><script>alert(1)</script>",
    "comment": "<!-- <img src=x onerror=alert(1)>",
    "pipe": "a|b | c",
    "link": "[text](javascript:alert(1)) ![x](http://x)",
    "escaped pipe": "\\|\\\\|",
    "code": "`code` **bold** # heading",
    "formula =": "=HYPERLINK(1)",
    "formula +": "+1+cmd|' /C calc'!A0",
    "formula -": "-2+3",
    "formula @": "@SUM(1)",
    "formula after a tab": "\t=1+1",
    "formula after a return": "\r=1+1",
    "formula after an invisible mark": "\u200b=1+1",
    "new lines": "one\ntwo\r\nthree\u2028four\x0bfive",
    "right to left": "a\u202eb\u2066c\u200f",
    "zero width": "a\u200bb\ufeffc\u2060d",
    "terminal": "\x1b[2J\x1b]0;mine\x07\x9b31m",
    "console markup": "[red]x[/red] [/] [link=http://x]y[/link]",
    "latex": r"\input{/etc/passwd} $x_1^2$ & % # ~ {a}",
    "quotes": "\"a\" 'b', c",
    "astral": "\U0001f600\U000e0041é",
    "as long as may be": "w" * LONGEST,
}
INVISIBLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\U000e0041]")
"""All that must not reach an output as such; a new line ends a line of ours."""


@pytest.fixture
def hostile(runs: Path, request: pytest.FixtureRequest) -> Callable[[str], list[Table]]:
    """The tables of records that say something in every free text of theirs."""

    def make(text: str) -> list[Table]:
        for path in sorted(runs.rglob("groupdro-*.json")):
            twin = path.with_name(f"odd-{path.name}")
            shutil.copy(path, twin)
            shutil.copy(predictions_path(path), predictions_path(twin))
            edit(twin, put("config", json.loads(path.read_text())["config"] | {"text": text, text[:40] + "key": 1}))
        for path in find(runs):
            content = json.loads(path.read_text())
            content |= {"weights": text, "classes": [text, f"{text[:-1]}2"], "error": text}
            content["env"]["device"] = text
            for attribute in content["attributes"]:
                attribute["values"] = [text, f"{text[:-1]}3"]
            path.write_text(json.dumps(content))
            edit(path, put("run", read(path).identity_hash()))
        found = collect(find(runs))
        assert found.problems == []
        reason = text if len(text) < LONGEST else "none"
        tables = build(found, [Absent("tiny", "tiny_cnn", "ex2l", "select", reason)])
        (odd, _) = (row for row in tables[0].rows if row.method.startswith("groupdro"))
        odd.searched = True  # settings of a search are printed below the table
        assert text in f"{odd.settings}{tables[0].weights}" or repr(text)[1:-1] in str(odd.settings)
        return tables

    return make


def plain(text: str) -> str:
    """As it may be shown."""
    return "".join(character if character.isprintable() else " " for character in text)


@pytest.mark.parametrize("case", HOSTILE)
def test_no_text_gets_out_of_its_place(hostile: Callable[[str], list[Table]], case: str) -> None:
    text = HOSTILE[case]
    tables = hostile(text)
    for check in (markdown, comma_separated, latex, as_json, html, terminal):
        check(tables, text)


def markdown(tables: list[Table], text: str) -> None:
    made = render.to_markdown(tables)
    assert not INVISIBLE.search(made)
    lines = [line for line in made.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines}) == 1
    assert len(lines) == 2 + len(tables[0].rows)
    assert made.count("\n## ") + made.startswith("## ") == 1
    own = made.replace(render.legend(tables), "")
    assert not re.search(r"(?<!\\)(?:\\\\)*(<|`|\*)", own)
    assert not re.search(r"(?<!\\)(?:\\\\)*\]\(", own)


def comma_separated(tables: list[Table], text: str) -> None:
    made = render.to_csv(tables)
    assert not INVISIBLE.search(made)
    inert(made, len(tables[0].rows))
    assert plain(text) in {line["weights"].removeprefix("'") for line in csv.DictReader(io.StringIO(made))}


def inert(made: str, count: int) -> None:
    """No cell but a number begins as a formula does."""
    lines = list(csv.reader(io.StringIO(made)))
    assert len(lines) == 1 + count
    assert {len(line) for line in lines} == {len(lines[0])}
    for cell in (cell for line in lines for cell in line):
        assert not cell.lstrip().startswith(("=", "+", "-", "@")) or float(cell) < 0


def latex(tables: list[Table], text: str) -> None:
    made = render.to_latex(tables)
    assert not INVISIBLE.search(made)
    assert "\\input" not in made
    ours = "begin end centering caption toprule midrule bottomrule"
    symbols = "textbackslash ensuremath textasciitilde approx cdot geq"
    body = made[: made.rindex("\n% ")].partition("\n")[2]
    commands = re.findall(r"\\([a-zA-Z]+)", re.sub(r"\\\\", "", body))
    assert set(commands) <= {*ours.split(), *symbols.split()}
    assert body.count("\\begin{table}") == body.count("\\end{table}") == 1
    assert len(re.findall(r"\\\\(?=\n)", body)) == 1 + len(tables[0].rows)
    bare = re.sub(r"\\[{}$#%&_^]", "", body)
    assert bare.count("{") == bare.count("}")
    assert "%" not in bare
    assert "#" not in bare


def as_json(tables: list[Table], text: str) -> None:
    made = render.to_json(tables)
    assert made.isascii()
    assert not INVISIBLE.search(made)
    (table,) = json.loads(made)["tables"]
    assert table["weights"] == text  # for programs: nothing is changed


def html(tables: list[Table], text: str) -> None:
    made = page.to_html(tables)
    (held,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', made, re.DOTALL)
    assert "<" not in held
    assert held.isascii()
    assert not INVISIBLE.search(held)
    assert json.loads(held)["tables"][0]["title"] == f"tiny · tiny_cnn ({plain(text)})"
    empty = page.to_html([replace(tables[0], weights="none", device="x", rows=tables[0].rows[:1])])
    assert len(re.findall("<script", made)) == len(re.findall("<script", empty))


def terminal(tables: list[Table], text: str) -> None:
    for width in (60, 1000):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        for part in render.to_terminal(tables, width):
            console.print(part)
        made = console.file.getvalue()  # type: ignore[attr-defined]
        assert not INVISIBLE.search(made)
    assert plain(text)[:60].split()[0] in made


@pytest.mark.parametrize("case", HOSTILE)
def test_no_text_gets_out_beside_the_papers_numbers(hostile: Callable[[str], list[Table]], case: str) -> None:
    text = HOSTILE[case]
    tables = hostile(text)
    line = replace(reported()[0], method_reported=text, note=text, quoted_from=text)
    pairs = [
        Comparison(line, tables[0], row, Estimate(-5.0, None, -6.0, -4.0), (text, "protocol wg1"))
        for row in tables[0].rows
    ]
    made = reproduction.to_csv(pairs)
    assert not INVISIBLE.search(made)
    inert(made, len(pairs))
    assert {line["value"] for line in csv.DictReader(io.StringIO(made))} == {"-5"}  # numbers stay numbers
    shown = reproduction.to_markdown(pairs, [])
    assert not INVISIBLE.search(shown)
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines}) == 1
    assert len(lines) == 2 + len(pairs)


FIELDS: dict[str, Any] = {
    "weights": "w" * (LONGEST + 1),
    "classes.0": "w" * 10_000,
    "attributes.0.values.1": "w" * 10_000,
    "dataset": "w" * 10_000,
    "method": "w" * 10_000,
    "backbone": "w" * 10_000,
    "config": {"absent": "w" * 10_000},
    "source_config": {"w" * 10_000: 1},
    "tuned": {"lr": [1] * 10_000},
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_text_that_no_table_can_hold_is_refused(pick: Pick, field: str) -> None:
    path = pick("erm")
    edit(path, put(field, FIELDS[field]))
    with pytest.raises(CorruptFile, match=rf"{re.escape(field)}: .*{LONGEST} characters") as error:
        read(path)
    assert len(str(error.value)) < 1500


def test_a_long_device_is_shortened(runs: Path) -> None:
    """It is a fact of the machine, which the user of a table does not choose."""
    for path in find(runs):
        edit(path, put("env.device", "w" * 10_000))
    (table,) = build(collect(find(runs)))
    assert table.device == "w" * (LONGEST - 1) + "…"


def test_names_that_the_schema_admits(runs: Path) -> None:
    """Brackets, plus and at signs are part of names; a name cannot begin with what a formula begins with."""
    for path in find(runs):
        edit(path, put("dataset", "tiny:[a]/b,c+d@e-f"))
        edit(path, put("run", read(path).identity_hash()))
    tables = build(collect(find(runs)))
    for check in (markdown, comma_separated, latex, as_json, terminal):
        check(tables, "none")
    for name in ("=1", "+1", "-1", "@x", " x", "x y", "x\ty"):
        edit(next(find(runs)), put("method", name))
        with pytest.raises(CorruptFile, match="method: is not a name"):
            read(next(find(runs)))
