"""The papers' numbers beside ours: what stands beside what, and what is said about the difference."""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from helpers import edit, put
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.planning import find_card
from worstgroup.benchmark.record import find, read
from worstgroup.benchmark.spec import Recipe
from worstgroup.leaderboard.aggregate import build, collect
from worstgroup.leaderboard.papers import Reported
from worstgroup.leaderboard.render import to_csv as board_csv
from worstgroup.leaderboard.render import to_markdown as board_markdown
from worstgroup.leaderboard.reproduction import (
    Comparison,
    _recipes,
    compare,
    coverage,
    render,
    to_csv,
    to_markdown,
)
from worstgroup.leaderboard.statistics import Estimate
from worstgroup.leaderboard.table import CostRatio, Row, Table

NAN = float("nan")
LINE = Reported(
    paper="MaC",
    table="table2",
    dataset="waterbirds",
    backbone="resnet50",
    weights="imagenet1k_v1",
    method="dfr",
    settings=(),
    method_reported="DFR",
    budget="val",
    metric="wga",
    value=Decimal("92.90"),
    spread=Decimal("0.2"),
    supervision="✓✓",
    quoted_from="DFR paper",
    note="one reason; another",
)
RECIPE = _recipes("MaC", "waterbirds", False)[0]
"""Of the suite that repeats the table."""


def row(method: str = "dfr", budget: str = "val", wga: float = 0.92, **changes: Any) -> Row:
    values = dict.fromkeys(("wga", "acc_adj", "acc_mean", "acc_group"), Estimate(wga, 0.01, wga - 0.02, wga + 0.03))
    return replace(Row(method, budget, "", (0, 1, 2), 1199, values), **changes)  # type: ignore[arg-type]


def table(*rows: Row, dataset: str = "waterbirds", **changes: Any) -> Table:
    own = Table("paper", dataset, "f" * 16, "resnet50", "imagenet1k_v1", RECIPE, ["gap_place"], list(rows), "a GPU")
    return replace(own, **changes)


def one(line: Reported, *tables: Table) -> Comparison:
    (found,) = compare(tables, [line])
    return found


# ------------------------------------------------------------------------------------------------ what stands beside


def test_the_same_cell_under_the_papers_recipe() -> None:
    found = one(LINE, table(row()))
    assert (found.ours.mean, found.ours.low, found.ours.high) == pytest.approx((92, 90, 95))
    assert found.ours.sd == pytest.approx(1)
    assert found.difference == pytest.approx(-0.9)
    assert found.inside is True
    assert found.differs == ()


@pytest.mark.parametrize(("printed", "inside"), [("90.1", True), ("89.9", False), ("94.9", True), ("95.1", False)])
def test_inside_is_our_interval(printed: str, inside: bool) -> None:
    assert one(replace(LINE, value=Decimal(printed)), table(row())).inside is inside


def test_without_an_interval_nothing_is_inside() -> None:
    """As on CelebA, whose licence keeps labels out of records."""
    found = one(LINE, table(row(metrics={"wga": Estimate(0.92, 0.01, NAN, NAN)})))
    assert found.inside is None
    assert math.isnan(found.ours.low)


@pytest.mark.parametrize(
    "other",
    [
        row("erm"),
        row("dfr@class"),
        row("dfr+exmap"),
        row("dfr(+val)"),
        row(budget="val-20"),
        row(budget="val:place"),
        row(metrics={"wga": None}),
        row(metrics={"acc_mean": Estimate(0.9, None, 0.8, 1)}),
    ],
)
def test_other_rows_do_not_stand_beside_it(other: Row) -> None:
    assert compare([table(other)], [LINE]) == []


@pytest.mark.parametrize("name", ["waterbirds:place", "waterbirds:place[112px]", "waterbirds:built", "celeba:ex2l"])
def test_another_variant_does_not(name: str) -> None:
    assert compare([table(row(), dataset=name)], [LINE]) == []


def test_a_row_that_is_called_by_its_settings_does() -> None:
    rows = [row("dfr (n_min=5)"), row("dfr (n_min=0)")]
    assert [pair.row.method for pair in compare([table(*rows)], [LINE])] == ["dfr (n_min=0)", "dfr (n_min=5)"]


def test_settings_that_make_a_row_the_papers() -> None:
    line = replace(LINE, method="ex2l", budget="train+val", settings=(("similarity", "ssim"), ("sampler", "random")))
    kept = {"similarity": "ssim", "sampler": "random", "lambda1": 1.0}
    rows = [
        row("ex2l", "train+val", settings=settings)
        for settings in (kept, kept | {"similarity": "mae"}, kept | {"sampler": "uniform_group"}, {})
    ]
    assert one(line, table(*rows)).row is rows[0]


def test_an_unknown_budget_matches_every_row_and_says_so() -> None:
    rows = [row(budget=budget) for budget in ("val", "val-20")]
    found = compare([table(*rows)], [replace(LINE, budget="")])
    assert {pair.differs for pair in found} == {(f"budget {b} (paper: not clear)",) for b in ("val", "val-20")}


def test_a_method_or_a_dataset_that_is_not_ours_has_no_row() -> None:
    lines = [replace(LINE, method=""), replace(LINE, dataset="CelebA, mean of ten targets")]
    assert compare([table(row())], lines) == []


# ----------------------------------------------------------------------------------------------- what sets a row apart


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone": "tiny_cnn", "weights": "none"}, ("backbone tiny_cnn (paper: resnet50)",)),
        ({"weights": "imagenet1k_v2"}, ("weights imagenet1k_v2 (paper: imagenet1k_v1)",)),
        ({"protocol": "wg1"}, ("protocol wg1",)),
        ({"recipe": RECIPE | {"epochs": 7}}, ("not this paper's recipe",)),
        ({"dataset": "waterbirds[112px]"}, ("pictures of 112 px",)),
        (
            {"dataset": "waterbirds[112px,custom]", "protocol": "wg1"},
            ("pictures of 112 px", "data with other counts than the official ones", "protocol wg1"),
        ),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], said: tuple[str, ...]) -> None:
    assert one(LINE, replace(table(row()), **changes)).differs == said


def test_the_recipe_of_another_paper_is_not_this_papers() -> None:
    recipe = _recipes("ExMap", "waterbirds", False)[0]
    assert one(LINE, table(row(), recipe=recipe)).differs == ("not this paper's recipe",)
    line = replace(LINE, paper="ExMap", table="table1", weights="imagenet1k_v2")
    assert one(line, table(row(), recipe=recipe, weights="imagenet1k_v2")).differs == ()


def test_a_transform_belongs_to_a_papers_protocol() -> None:
    line = replace(LINE, dataset="celeba:Blond_Hair/Male")
    own = table(row(), dataset="celeba:Blond_Hair/Male[bpa]", recipe=_recipes("MaC", line.dataset, False)[0])
    assert one(line, own).differs == ()
    assert one(line, replace(own, protocol="wg1")).differs == ("transform bpa", "protocol wg1")


def test_rows_most_like_the_papers_come_first() -> None:
    tables = [
        table(row(), protocol="wg1", backbone="alexnet"),
        table(row(), protocol="wg1"),
        table(row(), backbone="alexnet"),
        table(row(), dataset="waterbirds[64px]"),
        table(row()),
    ]
    assert [pair.table for pair in compare(tables, [LINE])] == [tables[i] for i in (4, 3, 2, 1, 0)]
    assert [pair.table for pair in compare(tables[::-1], [LINE])] == [tables[i] for i in (4, 3, 2, 1, 0)]


def test_recipes_of_the_suites_are_complete() -> None:
    fields = set(asdict(Recipe()))
    for paper, dataset in (("ExMap", "urbancars:val95"), ("eX2L", "waterbirds:ex2l"), ("ClusterFix", "cmnist:cm10")):
        recipes = _recipes(paper, dataset, False)
        assert recipes
        assert all(set(recipe) == fields for recipe in recipes)
    assert {recipe["epochs"] for recipe in _recipes("eX2L", "waterbirds", False)} == {300}
    assert {recipe["epochs"] for recipe in _recipes("eX2L", "waterbirds", True)} == {300, 2}
    assert find_card("waterbirds")[1].recipe.epochs not in (300, 2)


# ------------------------------------------------------------------------------------------------------ other metrics


def test_gaps_splits_and_costs() -> None:
    gap = replace(LINE, metric="gap_place", value=Decimal("-8.2"))
    held = replace(LINE, metric="wga_train", value=Decimal("15.04"))
    ratio = replace(LINE, metric="cost_ratio", value=Decimal("1.95"))
    own = row(
        metrics={"gap_place": Estimate(-0.09, 0.01, -0.12, -0.06)},
        held={"wga_train": Estimate(0.5, None, NAN, NAN), "wga_val": None},
        cost=CostRatio(0.1, 2.04, same_session=False),
    )
    found = compare([table(own)], [gap, held, ratio, replace(held, metric="wga_val"), replace(gap, metric="time")])
    assert [pair.paper.metric for pair in found] == ["gap_place", "wga_train", "cost_ratio"]
    assert [pair.ours.mean for pair in found] == pytest.approx([-9, 50, 2.04])
    assert [pair.inside for pair in found] == [True, None, None]
    assert found[2].differs == ("timed on a GPU, not in one session",)


def test_a_drop_is_the_difference_to_the_whole_pictures() -> None:
    line = replace(LINE, dataset="waterbirds:fg-black", metric="drop_acc_adj", value=Decimal("29.9"))
    cut = table(row(wga=0.6), dataset="waterbirds:fg-black", protocol="wg1")
    whole = table(row("erm"), row(wga=0.95), protocol="wg1")
    found = one(line, cut, whole)
    assert found.ours.mean == pytest.approx(35)
    assert found.inside is None
    assert found.differs == ("protocol wg1", "two trainings, one for each test set")
    assert compare([cut], [line]) == []
    assert compare([cut, replace(whole, backbone="alexnet")], [line]) == []
    assert compare([cut, table(row(budget="val-20"), protocol="wg1")], [line]) == []


# ------------------------------------------------------------------------------------------------------------ coverage


def test_coverage_counts_numbers_not_rows() -> None:
    other = replace(LINE, dataset="CelebA, all", table="table9")
    lines = [
        LINE,
        *(replace(LINE, metric=name) for name in ("acc_mean", "score_fg")),
        replace(LINE, method="jtt"),
        other,
    ]
    found = compare([table(row()), table(row(), protocol="wg1")], lines)
    assert len(found) == 4
    entries = [(c.key, c.matched, c.total, c.beyond) for c in coverage(found, lines)]
    assert entries == [("mac-table2", 2, 4, 1), ("mac-table9", 0, 1, 1)]


# ------------------------------------------------------------------------------------------------------------- as text


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-:")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def markdown(lines: list[Reported], *tables: Table) -> str:
    found = compare(tables, lines)
    return to_markdown(found, coverage(found, lines))


def test_a_markdown_line() -> None:
    text = markdown([LINE], table(row()))
    headings, line = cells(text)
    assert dict(zip(headings, line, strict=True)) == {
        "in the paper": "DFR (✓✓)",
        "metric": "wga",
        "paper": "92.90 ± 0.2",
        "ours": "92.0 [90.0, 95.0]",
        "difference": "-0.9",
        "inside": "yes",
        "our row": "dfr at val",
        "seeds": "3",
        "our block": "waterbirds · resnet50 (imagenet1k_v1), protocol paper, 100 epochs",
        "differs": "",
        "notes": "1, 2, 3",
    }
    assert "## MaC, Table 2\n" in text
    assert "\n1. quoted from DFR paper\n2. one reason\n3. another\n" in text
    assert text.endswith("- mac-table2: 1 of 1 numbers have a row of ours\n")
    assert "not ranked" in text


def test_a_note_stands_once_in_a_section() -> None:
    lines = [LINE, replace(LINE, metric="acc_mean", note="another", quoted_from="")]
    text = markdown(lines, table(row()))
    assert [line[-1] for line in cells(text)] == ["notes", "1, 2, 3", "3"]
    assert text.count("another") == 1


def test_without_an_interval_the_deviation_is_shown() -> None:
    shown = [
        cells(markdown([LINE], table(row(metrics={"wga": estimate}))))[1][3]
        for estimate in (Estimate(0.92, 0.011, NAN, NAN), Estimate(0.92, None, NAN, NAN))
    ]
    assert shown == ["92.0 (sd 1.1)", "92.0"]


def test_ratios_have_two_digits() -> None:
    line = replace(LINE, metric="cost_ratio", value=Decimal("1.95"), spread=None)
    shown = cells(markdown([line], table(row(cost=CostRatio(2.0, 2.046, same_session=True)))))[1]
    assert shown[2:6] == ["1.95", "2.05", "+0.10", "n/a"]


def test_text_of_records_is_escaped() -> None:
    own = table(row("dfr (on=<b>|x)"), weights="a\n# b|c")
    text = markdown([LINE], own)
    assert r"dfr (on=\<b>\|x) at val" in text
    assert r"(a # b\|c)" in text
    assert len([line for line in text.splitlines() if line.startswith("#")]) == 3


def test_nothing_beside_anything() -> None:
    text = markdown([LINE])
    assert "No finished run stands beside a number" in text
    assert text.endswith("- mac-table2: 0 of 1 numbers have a row of ours\n")
    assert next(csv.reader(io.StringIO(to_csv([]))))[:3] == ["paper", "table", "dataset"]


def test_a_csv_line() -> None:
    own = row(settings={"n_min": 5, "on": "val"})
    text = to_csv(compare([table(own, protocol="wg1")], [LINE]))
    assert text.splitlines()[1] == (
        "MaC,table2,waterbirds,DFR,dfr,✓✓,val,wga,92.90,0.2,92,1,90,95,-0.9,1,0 1 2,dfr,val,n_min=5 on=val,waterbirds,"
        "ffffffffffffffff,resnet50,imagenet1k_v1,wg1,100,protocol wg1,DFR paper,one reason; another"
    )


# --------------------------------------------------------------------------------------------------- of finished runs


@pytest.fixture
def tables(runs: Path) -> list[Table]:
    """Finished runs, as if of Waterbirds in small pictures of one's own."""
    for path in find(runs):
        edit(path, put("dataset", "waterbirds[112px,custom]"))
        edit(path, put("run", read(path).identity_hash()))
    return build(collect(find(runs)))


def test_finished_runs_beside_all_papers(tables: list[Table]) -> None:
    lines = list(csv.DictReader(io.StringIO(render(tables, "csv"))))
    rows = {row.method: row for table in tables for row in table.rows}
    assert {line["paper"] for line in lines} == {"ExMap", "MaC", "eX2L", "ClusterFix"}
    assert {line["our_dataset"] for line in lines} == {"waterbirds[112px,custom]"}
    for line in lines:
        assert line["dataset"] == "waterbirds"
        assert line["paper_budget"] in ("", line["our_budget"])
        assert "pictures of 112 px; data with other counts than the official ones; protocol wg1" in line["differs"]
        if line["metric"] == "wga":
            estimate = rows[line["our_method"]].metrics["wga"]
            assert estimate is not None
            assert float(line["value"]) == pytest.approx(100 * estimate.mean, abs=1e-3)
            inside = 100 * estimate.low <= float(line["paper_value"]) <= 100 * estimate.high
            assert line["inside"] == str(int(inside))
            assert float(line["difference"]) == pytest.approx(
                float(line["value"]) - float(line["paper_value"]), abs=1e-3
            )
    assert "## ExMap, Table 1\n" in render(tables)


@pytest.mark.parametrize("text", [board_markdown, board_csv])
def test_no_number_of_a_paper_is_in_the_tables(tables: list[Table], text: Callable[[list[Table]], str]) -> None:
    before = text(tables)
    render(tables)
    assert text(tables) == before
    assert "ClusterFix" not in before


def test_an_unknown_format() -> None:
    with pytest.raises(UserError, match="unknown format 'html'"):
        render([], "html")
