"""The HTML page in a real browser: it shows what the tables say, asks for nothing, and runs nothing that a record says.

Every test ends with no error on the browser's console and no request but that for the file itself.
"""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worstgroup.leaderboard.page import to_html
from worstgroup.leaderboard.statistics import Estimate
from worstgroup.leaderboard.table import CostRatio, Difference, GroupResult, Resolution, Row, RunResult, Table

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
expect = playwright.expect  # waits until it holds: browsers tell of history and of closed dialogs in a later task
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no `chromium` on PATH, and $CHROMIUM names none")

QUIET = ("background-networking", "component-update", "sync", "quic", "gpu")
ARGUMENTS = ["--no-sandbox", "--no-first-run", *(f"--disable-{part}" for part in QUIET)]
RECIPE = {"optimizer": "sgd", "lr": 0.001, "weight_decay": 1e-4, "batch_size": 32, "epochs": 3, "schedule": "constant"}
GROUPS = ("land/left", "land/right", "water/left", "water/right")
GAPS = ["gap_place", "gap_side", "gap_all"]
LABELS = {"none": 0, "val-20": 240, "val": 1200, "val:place": 600, "train+val": 6000}
HOSTILE = [
    "<script>document.title = 'x'</script>",
    "</script><img src=x onerror=\"document.title = 'x'\">",
    "quotes \" ' ` & {{7*7}} ${7*7}",
    "left\u202etfel \u200fright",
    "long" * 80,
]
Open = Callable[..., Any]


def estimate(mean: float) -> Estimate:
    return Estimate(mean, 0.01, mean - 0.05, mean + 0.05)


def groups(wga: float, names: tuple[str, ...]) -> list[GroupResult]:
    """Accuracies rising from the worst group's; the test set has none of the last but one."""
    absent = len(names) - 2
    return [
        GroupResult(n, 100 * g + 8, 50, estimate(wga + g / 1000) if g != absent else None) for g, n in enumerate(names)
    ]


def row(
    method: str, budget: str, wga: float, *, amplified: str = "", names: tuple[str, ...] = GROUPS, **more: Any
) -> Row:
    host, _, source = method.partition("+")
    names_of = ("wga", "acc_mean", "acc_adj", "acc_group")
    erm = method == "erm" and budget == "none"
    differences = {name: Difference(0.1, 0.02, 0.2) for name in (*names_of, *GAPS)}
    differences |= {amplified: Difference(-0.1, -0.2, -0.01)} if amplified else {}
    made = Row(
        method=method,
        budget=budget,
        tag="",
        seeds=(0, 1),
        labels=LABELS[budget],
        metrics={**{name: estimate(wga) for name in names_of}, **{gap: estimate(-wga / 4) for gap in GAPS}},
        versus_erm={} if erm else differences,
        rank=1,
        cost=CostRatio(1.0, 1 + wga, True),
        host=host,
        source=source,
        agreement={"ami": 0.25, "worst_recall": 0.75} if source else {},
        settings={"step_size": 0.1},
        held={"wga_train": estimate(0.9), "wga_val": None},
        groups=groups(wga, names),
        runs=[RunResult(s, f"{s}b" * 8, wga, (wga - 0.1, wga + 0.1), names[0], 0.8, 2, 31.5) for s in (0, 1)],
        curve=[[0.4 + 0.1 * epoch] * len(names) for epoch in range(3)] if host != "dfr" else [],
    )
    return replace(made, **more)


def table(rows: list[Row], dataset: str = "birds", backbone: str = "tiny_cnn") -> Table:
    resolution = Resolution("water/right", 125, 1 / 125, 0.71, 0.081)
    return Table("wg1", dataset, "0" * 16, backbone, "none", RECIPE, GAPS, rows, "some device", resolution)


def absent(method: str, budget: str, reason: str) -> Row:
    metrics = dict.fromkeys(("wga", "acc_mean", "acc_adj", "acc_group", *GAPS))
    return Row(method, budget, "n/a", (), 0, metrics, reason=reason)


def board() -> list[Table]:
    birds = [
        row("dfr+exmap", "none", 0.5, versus_best=None),
        row("erm", "none", 0.3, rank=2, versus_best=Difference(-0.2, -0.3, -0.1)),
        row("dfr", "val-20", 0.6),
        absent("groupdro", "val-20", "needs train+val"),
        row("dfr", "val", 0.7, searched=True),
        row("homemade", "val:place", 0.4, cost=None, amplified="gap_side"),
        row("groupdro", "train+val", 0.65, labels=6000, rendered=12),
    ]
    faces = [row("erm", "none", 0.4), row("jtt", "val", 0.45)]
    return [table(birds), table(faces, "faces", "other_cnn")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of some tables: `show(tables, view="#view=plots", width=390)`."""
    file, problems, asked, contexts = tmp_path / "board.html", [], [], []

    def open_page(tables: list[Table], view: str = "", width: int = 1280, scheme: str = "light", **more: Any) -> Any:
        file.write_text(to_html(tables), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
        page.on("request", lambda request: asked.append(request.url.partition("#")[0]))
        page.goto(file.as_uri() + view)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems
    assert set(asked) == {file.as_uri()}


def methods(page: Any) -> list[str]:
    """Methods of the rows shown, in order."""
    return page.evaluate("[...document.querySelectorAll('tr.row .method')].map((name) => name.innerText.trim())")


def said(element: Any) -> str:
    """Its text on one line, with a plain minus sign."""
    return " ".join(element.inner_text().replace("\u2212", "-").split())


def names(page: Any) -> list[str]:
    return page.locator("table.board thead .sort:visible span:first-child").all_inner_texts()


def hash_of(page: Any) -> str:
    return page.evaluate("location.hash.slice(1)")  # page.url hears of a change later


def fits(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# -------------------------------------------------------------------------------------------------------- the table


def test_the_page_is_a_function_of_the_tables() -> None:
    page = to_html(board())
    assert page == to_html(board())
    assert not re.search(r"(?:src|href)=\"?(?:http|//)", page)


def test_the_table_shows_what_the_rows_know(show: Open) -> None:
    page = show(board())
    assert page.locator("h2").first.inner_text() == "birds · tiny_cnn"
    assert "Protocol wg1 · 16 runs in 2 tables" in page.locator("header.top").inner_text()
    assert methods(page) == ["dfr+exmap", "erm", "dfr", "groupdro", "dfr", "homemade", "groupdro"]
    first = page.locator("tr.row").first
    assert first.locator("td.rank").inner_text() == "1"
    assert said(first.locator("td.wga")) == "50.0 [45.0, 55.0]"
    assert said(first.locator("td.difference").first) == "best"
    second = page.locator("tr.row").nth(1)
    assert said(second.locator("td.difference").first) == "-20.0 [-30.0, -10.0]"
    assert page.get_by_text("n/a: needs train+val").is_visible()
    assert page.get_by_text("6,000 + 12 rendered").count() == 1
    assert said(page.locator("tr.rung").first) == "none no attribute label; selection by the worst class"
    notes = page.locator("section[aria-label=Table] .notes").all_inner_texts()
    assert "125 images. One image is 0.8 points" in notes[0]
    assert "8.1 points" in notes[0]
    assert "step_size=0.1" in notes[1]


def test_an_amplified_gap_is_marked_in_words(show: Open) -> None:
    page = show(board())
    marked = page.locator("td.amplified")
    assert marked.count() == 1
    assert said(marked.locator(".lead")) == "> -10.0"
    assert "amplified" in marked.text_content()
    assert "homemade" in page.locator("tr.row", has=marked).inner_text()


def test_every_column_explains_itself(show: Open) -> None:
    page = show(board(), "#sort=method")
    headings = names(page)
    assert headings[:5] == ["rank", "method", "budget", "wga", "vs best"]
    assert {"vs erm", "acc_adj", *GAPS, "ami", "worst recall", "labels", "cost", "cost scratch", "seeds"} < set(
        headings
    )
    for i, heading in enumerate(headings):
        page.locator("button.help").nth(i).press("Enter")
        assert page.locator("#help").inner_text().startswith(f"{heading}: ")
        page.keyboard.press("Escape")
        assert not page.locator("#help").is_visible()
    page.locator(".about summary").click()
    assert page.locator(".about").get_by_text("Whac-A-Mole").is_visible()


def test_help_works_on_touch(show: Open) -> None:
    page = show(board(), width=390, has_touch=True)
    page.locator("button.help").first.tap()
    assert page.locator("#help").inner_text().startswith("rank: ")


def test_sorting_by_click_and_by_keyboard(show: Open) -> None:
    page = show(board())
    heading = page.locator("th.wga")
    heading.locator(".sort").click()
    assert heading.get_attribute("aria-sort") == "descending"
    falling = ["dfr", "groupdro", "dfr", "dfr+exmap", "homemade", "erm", "groupdro"]
    assert methods(page) == falling  # what is n/a comes last, whichever way
    heading.locator(".sort").press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert methods(page) == [*reversed(falling[:-1]), "groupdro"]
    page.locator("th.labels .sort").press("Space")
    assert methods(page)[:2] == ["dfr+exmap", "erm"]
    assert heading.get_attribute("aria-sort") == "none"
    page.locator("th.budget .sort").click()
    assert page.locator("tr.rung").count() == 5


def test_any_column_sorts_both_ways(show: Open) -> None:
    page = show(board(), "#sort=method")
    buttons = page.locator("thead .sort:visible")
    budget = names(page).index("budget")
    for i in [each for each in range(buttons.count()) if each != budget]:
        orders = []
        for _ in range(2):
            buttons.nth(i).click()
            orders.append((page.locator("thead [aria-sort$=ending]").get_attribute("aria-sort"), methods(page)))
            assert "n/a: needs" not in page.locator("tr.row").first.inner_text() or i == names(page).index("method")
        assert {order for order, _ in orders} == {"ascending", "descending"}
        assert sorted(orders[0][1]) == sorted(orders[1][1])
        assert len(orders[0][1]) == 7


def test_filters_of_rows(show: Open) -> None:
    page = show(board())
    for name, value, left in [
        ("budget", "val", ["dfr"]),
        ("budget", "val:place", ["homemade"]),
        ("family", "single-stage", ["erm", "groupdro", "groupdro"]),
        ("family", "two-stage", ["dfr+exmap", "dfr", "dfr"]),
        ("family", "other", ["homemade"]),
        ("source", "exmap", ["dfr+exmap"]),
        ("source", "-", ["erm", "dfr", "groupdro", "dfr", "homemade", "groupdro"]),
    ]:
        page.select_option(f"select[name={name}]", value)
        assert methods(page) == left
        assert page.locator("output").inner_text() == f"{len(left)} of 7 rows"
        page.get_by_role("button", name="Clear filters").click()
        assert len(methods(page)) == 7


def test_filters_of_tables(show: Open) -> None:
    page = show(board())
    for name, value in {"dataset": "faces", "backbone": "other_cnn"}.items():
        page.select_option(f"select[name={name}]", value)
        assert page.locator("h2").first.inner_text() == "faces · other_cnn"
        page.select_option(f"select[name={name}]", "")
        assert page.locator("h2").first.inner_text() == "birds · tiny_cnn"
    page.get_by_label("Next table").click()
    assert methods(page) == ["erm", "jtt"]


def test_search_finds_methods_in_all_tables(show: Open) -> None:
    page = show(board())
    page.fill("input[name=q]", "DFR ex")
    assert methods(page) == ["dfr+exmap"]
    page.fill("input[name=q]", "jtt")  # in the other table alone
    assert page.locator("h2").first.inner_text() == "faces · other_cnn"
    page.fill("input[name=q]", "nothing")
    assert page.get_by_text("No row of any table matches").is_visible()
    page.fill("input[name=q]", "")
    assert page.locator("h2").first.inner_text() == "birds · tiny_cnn"


def test_the_hash_brings_a_view_back(show: Open) -> None:
    page = show(board())
    page.get_by_label("Next table").click()
    page.locator("th.wga .sort").click()
    page.select_option("select[name=budget]", "val")
    page.fill("input[name=q]", "jtt")
    state = hash_of(page)
    page.reload()
    assert hash_of(page) == state
    assert page.locator("h2").first.inner_text() == "faces · other_cnn"
    assert methods(page) == ["jtt"]
    assert page.locator("th.wga").get_attribute("aria-sort") == "descending"
    assert page.input_value("select[name=budget]") == "val"
    page.go_back()
    expect(page.locator("h2").first).to_have_text("birds · tiny_cnn")


def test_a_hash_of_things_that_are_not_there_is_harmless(show: Open) -> None:
    page = show(board(), "#table=none&view=none&budget=none-such&sort=what&details=gone&a=x&family=%3Cb%3E")
    assert len(methods(page)) == 7
    assert not page.locator("dialog").is_visible()


# ------------------------------------------------------------------------------------------------- details, compare


@pytest.mark.parametrize("way", ["click on the row", "Enter on the method"])
def test_details_of_a_row(show: Open, way: str) -> None:
    page = show(board())
    if way == "Enter on the method":
        page.get_by_role("button", name="erm", exact=True).press("Enter")
    else:
        page.locator("tr.row", has_text="erm").nth(0).locator("td.gap").first.click()
    dialog = page.locator("dialog")
    assert dialog.locator("h2").inner_text() == "erm at none"
    seeds = [line.split("\t") for line in dialog.locator("tbody tr").all_inner_texts()]
    assert seeds[1] == ["1", "30.0", "[20.0, 40.0]", "land/left", "80.0", "2", "31.5", "1b1b1b1b1b1b"]
    assert dialog.locator("[data-kind=bar]").count() == 3
    assert "Without test images: water/left" in dialog.inner_text()
    assert dialog.locator("[data-kind=line]").count() == len(GROUPS)
    assert "step_size=0.1" in dialog.inner_text()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.wait_for_function("!location.hash.includes('details')")  # the event `close` comes a task later


def test_details_go_from_row_to_row_and_back(show: Open) -> None:
    page = show(board(), "#details=erm+at+none")
    heading = page.locator("dialog h2")
    page.get_by_label("Next row").click()
    assert heading.inner_text() == "dfr at val-20"
    assert page.locator("dialog [data-kind=line]").count() == 0  # it has no history
    page.get_by_label("Next row").click()
    assert heading.inner_text() == "dfr at val"  # the row that is n/a has no details
    page.go_back()
    expect(heading).to_have_text("dfr at val-20")
    page.get_by_role("button", name="Close").click()
    expect(page.locator("dialog")).to_be_hidden()


def test_many_groups_have_two_curves(show: Open) -> None:
    many = tuple(f"class {g // 2}/value {g % 2}" for g in range(100))
    page = show([table([row("erm", "none", 0.3, names=many)])], "#details=erm+at+none")
    dialog = page.locator("dialog")
    assert dialog.locator("[data-kind=bar]").count() == 99
    assert dialog.locator("[data-kind=line]").count() == 2
    assert dialog.get_by_text("mean of the groups").count() == 1


def test_compare_two_rows(show: Open) -> None:
    page = show(board())
    for name in ("dfr at val", "erm at none"):
        page.get_by_label(f"compare {name}", exact=True).check()
    page.get_by_role("button", name="Compare", exact=True).last.click()
    lines = [line.split("\t") for line in page.locator(".compare tbody tr").all_inner_texts()]
    assert lines[0] == ["wga", "70.0 [65.0, 75.0]", "30.0 [25.0, 35.0]", "+10.0 [+2.0, +20.0]"]
    assert {line[0] for line in lines} >= {"acc_mean", *GAPS, "labels", "cost"}
    assert page.locator(".compare [data-kind=bar]").count() == 2 * 3 + 2 * len(GAPS)
    page.select_option("select[name=b]", "groupdro at train+val")
    lines = [line.split("\t") for line in page.locator(".compare tbody tr").all_inner_texts()]
    assert lines[0][3] == "+5.0"  # no paired interval is held for these two
    page.reload()
    assert page.input_value("select[name=a]") == "dfr at val"
    assert page.input_value("select[name=b]") == "groupdro at train+val"


# ------------------------------------------------------------------------------------------------------------ plots


def test_plots_have_a_mark_for_every_row(show: Open) -> None:
    page = show(board(), "#view=plots")
    figures = page.locator("#plots > figure")
    assert figures.count() == 3
    counts = [
        (figures.nth(i).locator("[data-kind=dot]").count(), figures.nth(i).locator("[data-kind=interval]").count())
        for i in range(3)
    ]
    assert counts == [(6, 6), (5, 5), (18, 18)]  # one row is n/a, one more has no cost, three gaps
    assert figures.nth(0).locator("[data-kind=line]").count() == 1  # dfr over two budgets
    assert figures.nth(1).locator("svg").count() == 4  # budgets with a cost
    assert "for want of a cost: 1." in figures.nth(1).inner_text()
    assert figures.nth(2).locator("[data-kind=amplified]").all_text_contents() == [">"]
    page.select_option("select[name=budget]", "val")
    assert figures.nth(0).locator("[data-kind=dot]").count() == 1


def test_a_method_is_lit_in_all_plots(show: Open) -> None:
    page = show(board(), "#view=plots")
    button = page.locator(".legend").get_by_role("button", name="dfr", exact=True)
    button.focus()
    lit = page.locator("#plots.lit [data-kind=dot].on")
    assert lit.count() == 2 + 2 + 2 * 3
    button.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    assert button.get_attribute("aria-pressed") == "true"
    assert lit.count() == 10


def test_rows_without_intervals_are_drawn(show: Open) -> None:
    bare = row("erm", "none", 0.3)
    bare = replace(bare, metrics={name: Estimate(0.3, None, math.nan, math.nan) for name in bare.metrics}, cost=None)
    page = show([table([bare])], "#view=plots")
    assert page.locator("#plots > figure").first.locator("[data-kind=dot]").count() == 1
    page.get_by_role("button", name="Table", exact=True).click()
    assert said(page.locator("td.wga")) == "30.0"


# ---------------------------------------------------------------------------------------------- the page as a whole


def test_dark_and_light(show: Open) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page = show(board(), scheme="dark")
    dark = page.evaluate(paper)
    page.select_option(".theme select", "light")
    light = page.evaluate(paper)
    assert light == "rgb(255, 255, 255)" != dark
    page.reload()
    assert page.evaluate(paper) == light
    page.select_option(".theme select", "")
    assert page.evaluate(paper) == dark


def test_hostile_names_stay_text(show: Open) -> None:
    rows = [
        replace(row("erm", "none", 0.3 + 0.01 * i), method=name, host=name, source=name)
        for i, name in enumerate(HOSTILE)
    ]
    rows = [replace(each, settings={each.method: each.method}, searched=True) for each in rows]
    rows.append(absent(HOSTILE[0], "val", HOSTILE[1]))
    rows[0].groups[0] = replace(rows[0].groups[0], name=HOSTILE[1])
    tables = [replace(table(rows, dataset=HOSTILE[1], backbone=HOSTILE[4]), device=HOSTILE[0])]
    page = show(tables)
    shown = [" ".join(re.sub("[\u202e\u200f]", " ", name).split()) for name in HOSTILE]
    assert methods(page)[:5] == shown
    assert page.get_by_text(f"n/a: {HOSTILE[1]}").is_visible()
    assert fits(page)
    page.get_by_role("button", name=shown[0], exact=True).click()
    assert page.locator("dialog h2").inner_text() == f"{shown[0]} at none"
    assert page.locator("dialog").get_by_text(HOSTILE[1], exact=False).count()
    page.keyboard.press("Escape")
    for view in ("Plots", "Compare"):
        page.get_by_role("button", name=view, exact=True).first.click()
        assert page.locator(".drawn svg:visible").count()
        assert fits(page)
    assert page.title() == "worstgroup leaderboard"
    assert page.locator("main img").count() == 0


def test_a_phone_has_no_overflow(show: Open) -> None:
    page = show(board(), width=390)
    scrolled = page.locator("section[aria-label=Table] .scroll")
    assert scrolled.evaluate("box => box.scrollWidth > box.clientWidth")
    scrolled.evaluate("box => { box.scrollLeft = 300; }")
    name, box = page.locator("tr.row .method").first.bounding_box(), scrolled.bounding_box()
    assert name["x"] == pytest.approx(box["x"], abs=1)  # the method stays in sight
    for view in ("Table", "Plots", "Compare"):
        page.get_by_role("button", name=view, exact=True).first.click()
        assert fits(page)
    page.get_by_role("button", name="Table", exact=True).click()
    page.get_by_role("button", name="Filter rows").click()
    page.fill("input[name=q]", "dfr")
    assert len(methods(page)) == 3
    assert fits(page)


def test_print_shows_the_whole_table(show: Open) -> None:
    page = show([table([row("erm", "none", 0.3 + i / 1000, seeds=(0,) * (i + 1)) for i in range(60)])])
    page.emulate_media(media="print")
    box = page.locator("section[aria-label=Table] .scroll")
    assert box.evaluate("box => box.scrollHeight <= box.clientHeight")
    assert not page.locator(".tools").is_visible()


def test_many_tables_are_shown_one_at_a_time(show: Open) -> None:
    rows = [row("erm", "none", 0.3), *(row("jtt", "val", 0.4 + i / 1000) for i in range(204))]
    page = show([table(rows, "first"), *(table(rows[:10], f"set{i:02}") for i in range(99))], "#sort=-wga")
    shown = page.locator("tr.row")
    assert shown.count() == 200
    page.get_by_role("button", name="Show all 205 rows").click()
    assert shown.count() == 205
    page.fill("input[name=find]", "set97")
    assert page.locator("h2").first.inner_text() == "set97 · tiny_cnn"
    assert shown.count() == 10


def test_an_empty_board_says_how_to_begin(show: Open) -> None:
    page = show([])
    assert page.get_by_role("heading", name="No finished run yet").is_visible()
    assert "worstgroup run mini" in page.locator("pre").inner_text()
