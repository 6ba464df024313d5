"""What goes into the HTML page: every column is explained, and no text of a record can get out of the data."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import edit, put
from worstgroup.benchmark.record import find
from worstgroup.leaderboard import render
from worstgroup.leaderboard.aggregate import build, collect
from worstgroup.leaderboard.page import HELP, columns, family, to_html
from worstgroup.leaderboard.table import Row, Table


@pytest.fixture
def table(runs: Path) -> Table:
    (built,) = build(collect(find(runs)))
    return built


def data(html: str) -> dict[str, Any]:
    """The JSON in a page; there must be exactly one, and it must be whole."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


def test_the_page_has_all_columns_of_the_text_tables_and_explains_them(table: Table) -> None:
    table.rows[0].agreement = {"ami": 0.5, "worst_recall": 0.5}
    found = {column["heading"]: column["help"] for column in columns(table)}
    assert {column.heading for column in render.columns(table)} <= set(found)
    assert {"rank", "vs best"} <= set(found)
    assert set(HELP.values()) == set(found.values())


def test_the_page_holds_every_row_with_its_runs(table: Table) -> None:
    (held,) = data(to_html([table]))["tables"]
    assert [(row["method"], row["budget"]) for row in held["rows"]] == [(row.method, row.budget) for row in table.rows]
    assert [run["run"] for row in held["rows"] for run in row["runs"]] == [
        r.run for row in table.rows for r in row.runs
    ]
    assert held["rows"][0]["metrics"]["wga"]["mean"] == pytest.approx(table.rows[0].metrics["wga"].mean, rel=1e-5)
    held_out = held["rows"][0]["held"]["wga_val"]
    assert held_out["low"] is None  # NaN, for which JSON has no word
    assert len({row["key"] for row in held["rows"]}) == len(table.rows)


def test_rows_from_counts_are_marked_and_explained(runs: Path) -> None:
    for path in sorted(runs.rglob("dfr-*.json")):
        edit(path, put("predictions.has_labels", False))
    html = to_html(build(collect(find(runs))))
    (held,) = data(html)["tables"]
    assert {row["method"]: row["from_counts"] for row in held["rows"]} == {"dfr": True, "erm": False, "groupdro": False}
    (column,) = (column for column in held["columns"] if column["key"] == "wga")
    assert "≈ before it: intervals are from group counts" in column["help"]
    assert 'lead: (row) => (row.from_counts ? "≈ " : "") + percent(row.metrics.wga?.mean)' in html


def test_no_text_ends_the_data(table: Table) -> None:
    bad = "</script><script>alert(1)</script><!--"
    table.rows[0] = replace(table.rows[0], method=bad, settings={bad: bad}, searched=True)
    html = to_html([replace(table, dataset=bad, backbone=f"{bad}\x1b\u202e")])
    assert "alert(1)</script>" not in html
    assert "<!--" not in html.partition('id="data"')[2].partition("</script>")[0]
    (held,) = data(html)["tables"]
    assert held["dataset"] == held["rows"][0]["method"] == bad
    assert held["backbone"] == f"{bad}  "


def test_links_outlast_new_rows(table: Table) -> None:
    before = data(to_html([table]))["tables"][0]
    table.rows.insert(0, replace(table.rows[0], method="new"))
    after = data(to_html([table]))["tables"][0]
    assert after["key"] == before["key"]
    assert {row["key"] for row in before["rows"]} < {row["key"] for row in after["rows"]}


def test_twins_have_different_keys(table: Table) -> None:
    table.rows.append(table.rows[0])
    keys = [row["key"] for row in data(to_html([table]))["tables"][0]["rows"]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("method", "host", "expected"),
    [
        ("groupdro", "groupdro", "single-stage"),
        ("erm", "erm", "single-stage"),
        ("dfr+exmap", "dfr", "two-stage"),
        ("groupdro@class", "", "single-stage"),  # a row that is n/a has no host
        ("jtt (step_size=0.1)", "", "two-stage"),
        ("mine", "mine", "other"),
    ],
)
def test_families(method: str, host: str, expected: str) -> None:
    assert family(Row(method, "none", "", (), 0, {}, host=host)) == expected
