"""Tables: the same records give the same bytes, and every cell says what it knows."""

import copy
import csv
import hashlib
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import edit as change_file
from helpers import places, put, without_train
from rich.console import Console
from worstgroup.benchmark import metrics
from worstgroup.benchmark.budget import Budget
from worstgroup.benchmark.errors import CorruptFile
from worstgroup.benchmark.planning import Absent
from worstgroup.benchmark.predictions import pack
from worstgroup.benchmark.record import find, predictions_path, read, read_predictions
from worstgroup.leaderboard import statistics
from worstgroup.leaderboard.aggregate import build, collect
from worstgroup.leaderboard.estimates import estimate
from worstgroup.leaderboard.render import LEGEND, SPLITS_LEGEND, to_csv, to_json, to_latex, to_markdown, to_terminal
from worstgroup.leaderboard.statistics import Estimate
from worstgroup.leaderboard.table import Difference, Row, Table
from worstgroup.leaderboard.verify import verify

Pick = Callable[[str], Path]


def tables(runs: Path) -> list[Table]:
    return build(collect(find(runs)))


def row(runs: Path, method: str) -> Row:
    (found,) = (row for table in tables(runs) for row in table.rows if row.method == method)
    return found


def cells(text: str) -> list[list[str]]:
    """Rows of a Markdown table, headings first, split at the pipes that are not escaped."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    parts = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [part for part in parts if not set("".join(part)) <= set("-:")]


def cell(runs: Path, method: str, column: str) -> str:
    headings, *rows = cells(to_markdown(tables(runs)))
    (found,) = (line for line in rows if line[0] == method)
    return found[headings.index(column)]


def every(runs: Path, method: str) -> list[Path]:
    return sorted(runs.rglob(f"{method}-*.json"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record as if the run had been another one."""
    change_file(path, change)
    change_file(path, put("run", read(path).identity_hash()))


def twin(path: Path, name: str, **changes: object) -> Path:
    """A copy of a record beside it, with other values in some fields."""
    copy = path.with_name(f"{name}.json")
    shutil.copy(path, copy)
    shutil.copy(predictions_path(path), predictions_path(copy))
    for field, value in changes.items():
        edit(copy, put(field.replace("__", "."), value))
    return copy


def answer(path: Path, right: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Rewrite a record as if exactly the test images of `right(y, a)` had been answered correctly."""
    record = read(path)
    arrays = read_predictions(path, record)
    y, a = arrays["test_y"].astype(np.int64), arrays["test_a"].astype(np.int64)
    correct = right(y, a)
    arrays["test_prediction"] = np.where(correct, y, 1 - y).astype(np.int16)
    arrays["test_logits"] = np.eye(2, dtype=np.float32)[arrays["test_prediction"]]
    content = pack(arrays)
    predictions_path(path).write_bytes(content)
    n_train = record.counts()["n_train"]
    counts = metrics.group_counts(correct, metrics.group_index(y, a, record.shape), len(record.groups))
    worst = metrics.worst_group(*counts)
    values = metrics.evaluate(*counts, n_train, record.shape, record.spec_attributes())
    for g, count in enumerate(counts[0].tolist()):
        edit(path, put(f"groups.{g}.correct_test", count))
    edit(path, put("metrics", values))
    edit(path, put("ci.wga", metrics.wilson_interval(int(counts[0][worst]), int(counts[1][worst]))))
    edit(path, put("predictions.sha256", hashlib.sha256(content).hexdigest()))
    assert verify(path).ok


# -------------------------------------------------------------------------------------------------------- same bytes


@pytest.mark.parametrize("render", [to_markdown, to_csv, to_latex, to_json])
def test_two_builds_give_the_same_bytes(runs: Path, render: Callable[[list[Table]], str]) -> None:
    assert render(tables(runs)) == render(tables(runs))


def shuffled(runs: Path) -> list[str]:
    """The board of the same files in several orders."""
    paths, texts = list(find(runs)), []
    for seed in range(6):
        random.Random(seed).shuffle(paths)
        made = build(collect(paths))
        texts.append(to_markdown(made) + to_csv(made))
    return texts


def test_the_order_of_the_files_does_not_matter(runs: Path) -> None:
    assert len(set(shuffled(runs))) == 1


def test_nor_with_several_erm_rows_of_one_rung(runs: Path) -> None:
    """No row at `none`: ERM granted one attribute and ERM granted the other stand on the same rung."""
    for i, path in enumerate(every(runs, "erm")):
        twin(path, f"erm-corner-{i}", budget="val:corner", metrics__wga=0.25 + 0.1 * i)
        edit(path, put("budget", "val:stripe"))
    assert len(set(shuffled(runs))) == 1


def test_nor_with_two_versions_of_one_second(runs: Path) -> None:
    for i, path in enumerate(every(runs, "groupdro")):
        edit(path, put("created", "2026-01-01T00:00:00+00:00"))
        twin(path, f"groupdro-edited-{i}", code="f" * 16, metrics__wga=0.25, created="2026-01-01T00:00:00+00:00")
    assert len(set(shuffled(runs))) == 1


def test_nor_with_two_settings_of_one_method(runs: Path) -> None:
    for i, path in enumerate(every(runs, "groupdro")):
        twin(path, f"groupdro-large-{i}", config__step_size=0.5)
    assert len(set(shuffled(runs))) == 1


def test_the_place_of_the_files_does_not_matter(runs: Path, tmp_path: Path) -> None:
    before = to_markdown(tables(runs))
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(reversed(list(find(runs)))):
        path.rename(flat / f"{i}.json")
        predictions_path(path).rename(flat / f"{i}.npz")
    assert to_markdown(tables(flat)) == before


def test_a_record_that_lies_there_twice_counts_once(runs: Path) -> None:
    before = to_markdown(tables(runs))
    shutil.copytree(runs, runs / "copy")
    assert to_markdown(tables(runs)) == before


# ----------------------------------------------------------------------------------------------------------- content


def test_a_row_is_the_mean_of_its_records(runs: Path) -> None:
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO(to_csv(tables(runs))))}
    assert lines.keys() == {"erm", "groupdro", "dfr"}
    for method, line in lines.items():
        found = [read(path) for path in every(runs, method)]
        assert line["seeds"] == "0 1"
        assert int(line["labels"]) == max(record.labels.total_a for record in found if record.labels)
        for name in ("wga", "acc_adj", "acc_mean", "acc_group", "gap_stripe", "gap_corner", "gap_all"):
            values = [record.metrics[name] for record in found]
            assert float(line[name]) == pytest.approx(np.mean(values), abs=1e-5)  # type: ignore[arg-type]
            assert float(line[f"{name}_sd"]) == pytest.approx(np.std(values, ddof=1), abs=1e-5)  # type: ignore[arg-type]
            if line[f"{name}_low"]:
                assert float(line[f"{name}_low"]) <= float(line[name]) + 0.2
                assert float(line[f"{name}_low"]) <= float(line[f"{name}_high"])


SPLITS = {"wga_train": "train_metrics", "wga_val": "val_metrics"}


def test_a_csv_has_wga_on_every_split(runs: Path) -> None:
    without_train(every(runs, "dfr")[1])
    absent = [Absent("tiny", "tiny_cnn", "ex2l", "select", "needs val-5 or richer")]
    text = to_csv(build(collect(find(runs)), absent))
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO(text))}
    for method in ("erm", "groupdro", "dfr"):
        for name, field in SPLITS.items():
            values = [getattr(read(path), field).get("wga") for path in every(runs, method)]
            expected = "" if None in values else f"{np.mean(values):.6g}"
            assert lines[method][name] == expected
    assert (lines["dfr"]["wga_train"], lines["ex2l"]["wga_train"], lines["ex2l"]["wga_val"]) == ("", "", "")
    assert not {f"{name}_{end}" for name in SPLITS for end in ("sd", "low", "high")} & lines["erm"].keys()


def test_a_text_has_wga_on_train_and_validation_when_asked(runs: Path) -> None:
    without_train(every(runs, "dfr")[1])
    absent = [Absent("tiny", "tiny_cnn", "ex2l", "select", "needs val-5 or richer")]
    made = build(collect(find(runs)), absent)
    headings, *rows = cells(to_markdown(made, splits=True))
    assert headings[:7] == ["method", "budget", "rank", "wga", "wga train", "wga val", "vs erm"]
    found = {line[0]: tuple(line[4:6]) for line in rows}
    means = [np.mean([getattr(read(path), field)["wga"] for path in every(runs, "erm")]) for field in SPLITS.values()]
    assert found["erm"] == tuple(f"{100 * mean:.1f}" for mean in means)
    assert found["erm"][0] != found["erm"][1]
    assert found["dfr"][0] == "n/a"
    assert re.fullmatch(r"\d+\.\d", found["dfr"][1])
    assert found["ex2l"] == ("", "")
    assert to_markdown(made, splits=True).endswith(f"{LEGEND} {SPLITS_LEGEND}\n")
    (part,) = to_terminal(made, 1000, splits=True)
    assert [str(column.header) for column in part.columns] == headings
    plain = cells(to_markdown(made))
    assert [[*line[:4], *line[6:]] for line in (headings, *rows)] == plain  # nothing else changes


def test_rows_go_from_the_poorest_budget_to_the_richest(runs: Path) -> None:
    assert [(row.method, row.budget) for row in tables(runs)[0].rows] == [
        ("erm", "none"),
        ("dfr", "val"),
        ("groupdro", "train+val"),
    ]


def test_markdown_shows_percent_and_the_legend(runs: Path) -> None:
    for path in every(runs, "dfr"):
        answer(path, lambda y, a: y >= 0)
    text = to_markdown(tables(runs))
    assert text.startswith("## tiny · tiny_cnn\n")
    assert text.endswith(f"{LEGEND}\n")
    assert cell(runs, "dfr", "wga") == "100.0 [100.0, 100.0]"
    assert cell(runs, "dfr", "gap_all") == "+0.0"
    assert cell(runs, "dfr", "seeds") == "2"
    assert cell(runs, "dfr", "labels") == "96"
    assert cell(runs, "erm", "labels") == "0"
    assert cell(runs, "erm", "vs erm") == ""


def test_differences_are_paired_with_erm(runs: Path) -> None:
    for path in every(runs, "erm"):
        answer(path, lambda y, a: y >= 0)
    for path in every(runs, "dfr"):
        answer(path, lambda y, a: y == 1)
    assert cell(runs, "dfr", "vs erm") == "-100.0 [-100.0, -100.0]"
    for path in every(runs, "erm"):
        answer(path, lambda y, a: y == 1)
    assert cell(runs, "dfr", "vs erm") == "+0.0 [+0.0, +0.0]"


def test_differences_use_the_seeds_that_both_have(runs: Path) -> None:
    erm, dfr = every(runs, "erm"), every(runs, "dfr")
    for path in dfr:
        answer(path, lambda y, a: y >= 0)
    answer(erm[0], lambda y, a: y >= 0)
    answer(erm[1], lambda y, a: y < 0)
    dfr[1].unlink()
    assert cell(runs, "dfr", "seeds") == "1"
    assert cell(runs, "dfr", "vs erm") == "+0.0 [+0.0, +0.0]"


def test_failed_runs_are_no_rows(runs: Path, pick: Pick) -> None:
    for path in every(runs, "erm"):
        edit(path, put("status", "failed"))
    assert [row.method for row in tables(runs)[0].rows] == ["dfr", "groupdro"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol", "wg2"),
        ("dataset", "waterbirds"),
        ("fingerprint", "0" * 16),
        ("backbone", "resnet18"),
        ("weights", "imagenet1k_v1"),
        ("recipe.epochs", 7),
    ],
)
def test_what_is_not_comparable_shares_no_table(runs: Path, field: str, value: object) -> None:
    for path in every(runs, "erm"):
        edit(path, put(field, value))
    assert sorted(len(table.rows) for table in tables(runs)) == [1, 2]


def test_only_the_newest_code_counts(runs: Path) -> None:
    for i, path in enumerate(every(runs, "groupdro")):
        twin(path, f"old-{i}", code="0" * 16, created="1999-01-01T00:00:00+00:00", metrics__wga=0.0)
    assert row(runs, "groupdro").seeds == (0, 1)
    assert row(runs, "groupdro").metrics["wga"].mean > 0  # type: ignore[union-attr]


def edited_backbone(runs: Path, *again: str) -> None:
    """Rewrite all records as of a backbone of a plugin, and of `again` some made later, after that was edited."""
    for path in find(runs):
        edit(path, put("backbone_code", "1" * 16))
        edit(path, put("created", "2026-01-01T00:00:00+00:00"))
    for path in [path for method in again for path in every(runs, method)]:
        twin(path, f"new-{path.stem}", backbone_code="2" * 16, created="2026-01-02T00:00:00+00:00")


def test_only_the_newest_code_of_a_backbone_counts(runs: Path) -> None:
    edited_backbone(runs, "erm", "groupdro")
    (table,) = tables(runs)
    assert {row.method: row.seeds for row in table.rows} == {"erm": (0, 1), "groupdro": (0, 1)}
    codes = {read(path).run: read(path).backbone_code for path in find(runs)}
    assert {codes[one.run] for row in table.rows for one in row.runs} == {"2" * 16}


def test_nothing_is_compared_with_erm_on_other_code_of_the_backbone(runs: Path) -> None:
    edited_backbone(runs, "groupdro")
    (table,) = tables(runs)
    assert [(row.method, row.versus_erm, row.cost) for row in table.rows] == [("groupdro", {}, None)]


def test_two_settings_of_one_method_are_told_apart(runs: Path) -> None:
    for i, path in enumerate(every(runs, "groupdro")):
        twin(path, f"large-{i}", config__step_size=0.5)
    assert sorted(row.method for row in tables(runs)[0].rows) == [
        "dfr",
        "erm",
        "groupdro (step_size=0.01)",
        "groupdro (step_size=0.5)",
    ]


def test_two_settings_of_one_source_are_told_apart(runs: Path) -> None:
    for i, path in enumerate(every(runs, "groupdro")):
        for n in (2, 3):
            twin(path, f"exmap-{n}-{i}", source="exmap", source_config={"clusters": n})
    found = [row for row in tables(runs)[0].rows if "exmap" in row.method]
    assert sorted(row.method for row in found) == [f"groupdro+exmap (exmap.clusters={n})" for n in (2, 3)]
    assert [row.seeds for row in found] == [(0, 1)] * 2


def test_a_cell_that_is_not_run_stands_in_the_table_of_its_block(runs: Path) -> None:
    cells = [
        Absent("tiny", backbone, "ex2l", "select", "needs val-5 or richer") for backbone in ("tiny_cnn", "resnet50")
    ]
    (table,) = build(collect(find(runs)), [*cells, *cells])
    (row,) = (row for row in table.rows if row.method == "ex2l")
    assert (row.reason, row.tag, row.seeds, row.labels) == ("needs val-5 or richer", "n/a", (), 0)
    assert not any(row.metrics.values())
    budgets = [row.budget for row in table.rows]
    assert budgets == sorted(budgets, key=lambda budget: Budget.parse(budget).order)
    assert "needs val-5 or richer" in to_markdown([table])


def test_a_budget_richer_than_the_native_one_is_marked(runs: Path) -> None:
    for path in every(runs, "erm"):
        edit(path, put("budget", "val"))
        edit(path, put("policy", "carried"))
    assert cell(runs, "erm", "budget") == "val (carried)"
    assert cell(runs, "dfr", "budget") == "val"


@pytest.mark.parametrize(("policy", "label"), [("", "groupdro"), ("class", "groupdro@class")])
def test_the_policy_is_part_of_the_method(runs: Path, policy: str, label: str) -> None:
    for path in every(runs, "groupdro"):
        edit(path, put("policy", policy))
    assert row(runs, label).tag == policy


# --------------------------------------------------------------------------------------------------------- undefined


def test_undefined_values_are_not_zero(runs: Path) -> None:
    """A group that training never saw has no train weight: no adjusted accuracy and no gaps."""
    for path in every(runs, "dfr"):
        without_train(path)
        edit(path, put("groups.3.n_train", 0))
        record = read(path)
        counts, shared = record.counts(), (record.shape, record.spec_attributes())
        for field, split in (("metrics", "test"), ("val_metrics", "val")):
            right, images = counts[f"correct_{split}"], counts[f"m_{split}"]
            edit(path, put(field, metrics.evaluate(right, images, counts["n_train"], *shared)))
    for column in ("acc_adj", "gap_stripe", "gap_corner", "gap_all"):
        assert cell(runs, "dfr", column) == "n/a"
        assert cell(runs, "erm", column) != "n/a"
    assert cell(runs, "dfr", "wga")[0].isdigit()
    (line,) = (line for line in csv.DictReader(io.StringIO(to_csv(tables(runs)))) if line["method"] == "dfr")
    for column in ("acc_adj", "acc_adj_low", "gap_all", "gap_all_high", "gap_all_sd"):
        assert line[column] == ""


def test_one_undefined_seed_makes_the_mean_undefined() -> None:
    assert estimate([0.5, None, 0.7]) is None
    assert estimate([0.5, 0.7]) == Estimate(
        pytest.approx(0.6), pytest.approx(0.02**0.5), *[pytest.approx(nan, nan_ok=True)] * 2
    )


def test_without_labels_intervals_come_from_the_counts(runs: Path) -> None:
    """They are of the same run, hold its value, and are no narrower."""
    known = row(runs, "dfr")
    for path in every(runs, "dfr"):
        edit(path, put("predictions.has_labels", False))
    counted = row(runs, "dfr")
    assert (known.from_counts, counted.from_counts) == (False, True)
    for name, exact in known.metrics.items():
        rough = counted.metrics[name]
        assert exact is not None
        assert rough is not None
        assert rough.mean == exact.mean
        assert rough.low <= rough.mean <= rough.high
        assert rough.high - rough.low > 0.8 * (exact.high - exact.low)
    difference, exact_difference = counted.versus_erm["wga"], known.versus_erm["wga"]
    assert difference.mean == exact_difference.mean
    assert difference.low < difference.mean < difference.high
    assert cell(runs, "dfr", "wga").startswith("≈ ")


def test_no_run_is_no_table() -> None:
    assert to_markdown([]) == "No finished run yet.\n"
    assert to_csv([]).strip() == ""
    assert to_terminal([], 80) == []


# --------------------------------------------------------------------------------------------------------- amplified


@pytest.mark.parametrize(
    ("difference", "amplified"),
    [((-0.2, -0.3, -0.1), True), ((-0.2, -0.4, 0.0), False), ((-0.2, -0.4, 0.1), False), ((0.2, 0.1, 0.3), False)],
)
def test_a_gap_is_amplified_beyond_its_interval(difference: tuple[float, float, float], amplified: bool) -> None:
    found = Row("x", "none", "", (0,), 0, {}, {"gap_stripe": Difference(*difference)})
    assert found.amplified("gap_stripe") is amplified
    assert not found.amplified("gap_corner")


def test_mending_one_shortcut_at_the_cost_of_another_is_flagged(runs: Path) -> None:
    for path in every(runs, "erm"):
        answer(path, lambda y, a: a[:, 0] == y)  # follows the stripe
    for path in every(runs, "dfr"):
        answer(path, lambda y, a: a[:, 1] == y)  # follows the corner instead
    assert cell(runs, "dfr", "gap_corner").startswith("> -")
    assert cell(runs, "dfr", "gap_stripe").startswith("+")
    assert cell(runs, "erm", "gap_stripe").startswith("-")  # no flag: nothing to compare with
    (line,) = (line for line in csv.DictReader(io.StringIO(to_csv(tables(runs)))) if line["method"] == "dfr")
    assert (line["gap_corner_amplified"], line["gap_stripe_amplified"]) == ("1", "0")


# -------------------------------------------------------------------------------------------------------------- cost


def bill(runs: Path, method: str, marginal: float, scratch: float) -> None:
    for path in every(runs, method):
        edit(path, put("cost.marginal.device_s", marginal))
        edit(path, put("cost.scratch.device_s", scratch))


@pytest.fixture
def billed(runs: Path) -> Path:
    bill(runs, "erm", 0.0, 2.0)
    bill(runs, "dfr", 0.5, 2.5)
    return runs


def test_cost_is_relative_to_erm(billed: Path) -> None:
    assert cell(billed, "erm", "cost") == "0.00 / 1.00"
    assert cell(billed, "dfr", "cost") == "0.25 / 1.25"


def test_cost_across_devices_is_undefined(billed: Path) -> None:
    edit(every(billed, "dfr")[0], put("env.device", "Abacus 3000"))
    assert cell(billed, "dfr", "cost") == "n/a"
    assert cell(billed, "erm", "cost") == "0.00 / 1.00"
    assert "Abacus 3000" in to_markdown(tables(billed))


def test_cost_across_sessions_is_marked(billed: Path) -> None:
    edit(every(billed, "dfr")[0], put("env.session", "another"))
    assert cell(billed, "dfr", "cost") == "~0.25 / 1.25"
    assert cell(billed, "erm", "cost") == "0.00 / 1.00"


def test_cost_without_erm_is_undefined(billed: Path) -> None:
    for path in every(billed, "erm"):
        path.unlink()
    assert cell(billed, "dfr", "cost") == "n/a"
    assert cell(billed, "dfr", "vs erm") == ""


def test_cost_of_nothing_is_undefined(billed: Path) -> None:
    bill(billed, "erm", 0.0, 0.0)
    assert cell(billed, "dfr", "cost") == "n/a"


# --------------------------------------------------------------------------------------------------------- escaping


MARKUP = [
    "a|b",
    "<script>alert(1)</script>",
    "`code`",
    "**bold**",
    "two\nlines",
    "two\r\nlines",
    "[text](http://x)",
    "\\|",
]


@pytest.mark.parametrize("text", MARKUP)
def test_text_of_records_stays_in_its_markdown_cell(runs: Path, text: str) -> None:
    plain = cells(to_markdown(tables(runs)))
    for path in every(runs, "groupdro"):
        twin(path, f"odd-{path.stem}", config__absent=text)
    for path in find(runs):
        edit(path, put("weights", text))
    markdown = to_markdown(tables(runs))
    assert {len(line) for line in cells(markdown)} == {len(plain[0])}
    assert len(cells(markdown)) == len(plain) + 1
    assert not re.search(r"(?<!\\)<script", markdown)
    assert not re.search(r"(?<!\\)\[text\]\(", markdown)
    assert not re.search(r"(?<!\\)\*\*bold", markdown)
    assert "\r" not in markdown
    assert markdown.count("\n## ") == 0  # still one table, one heading


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", "[link=http://x]y[/link]", "a|b"])
def test_text_of_records_is_no_terminal_markup(runs: Path, text: str) -> None:
    for path in every(runs, "groupdro"):
        twin(path, f"odd-{path.stem}", config__absent=text)
    for path in find(runs):
        edit(path, put("weights", text))
    shown = printed(tables(runs), 200)
    assert f"tiny · tiny_cnn ({text})" in shown
    assert f"groupdro (absent={text})" in shown


def test_text_of_records_does_not_command_the_terminal(runs: Path) -> None:
    for path in find(runs):
        edit(path, put("weights", "\x1b[2J\x1b]0;mine\x07"))
    assert "\x1b" not in printed(tables(runs), 200)


def test_csv_quotes_what_it_must(runs: Path) -> None:
    text = 'a,"b"\nc|d'
    for path in every(runs, "groupdro"):
        twin(path, f"odd-{path.stem}", config__absent=text)
    lines = list(csv.DictReader(io.StringIO(to_csv(tables(runs)))))
    assert 'groupdro (absent=a,"b" c|d)' in {line["method"] for line in lines}
    assert len(lines) == 4


# ---------------------------------------------------------------------------------------------------------- terminal


def printed(made: list[Table], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    for part in to_terminal(made, width):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [48, 60, 80, 100, 132, 200, 1000])
def test_no_part_is_wider_than_the_terminal_and_nothing_is_cut(runs: Path, width: int) -> None:
    made = tables(runs)
    for part in to_terminal(made, width):
        assert Console(width=10_000).measure(part).minimum <= width  # title and caption may wrap
    shown = printed(made, width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    headings, *rows = cells(to_markdown(made))
    for text in (*headings, *(text for line in rows for text in line if text)):
        assert text.replace("\\", "") in shown


@pytest.mark.parametrize("width", [48, 80])
def test_every_part_begins_with_method_and_budget(runs: Path, width: int) -> None:
    made = tables(runs)
    parts = to_terminal(made, width)
    assert len(parts) > 1
    for part in parts:
        assert [str(column.header) for column in part.columns[:2]] == ["method", "budget"]
        assert len(part.columns) > 2
        assert part.row_count == 3
    headings = [str(column.header) for part in parts for column in part.columns[2:]]
    assert headings == cells(to_markdown(made))[0][2:]


# --------------------------------------------------------------------------------------------------------- bad input


def left_out(runs: Path, name: str) -> None:
    """One record is named as wrong, and the board is made of the others."""
    found = collect(find(runs))
    (problem,) = found.problems
    assert name in problem
    assert len(found.entries) == len(list(find(runs))) - 1
    (table,) = build(found)
    assert {row.method for row in table.rows} == {"dfr", "erm", "groupdro"}


def test_a_damaged_record_is_named(runs: Path, pick: Pick) -> None:
    bad = pick("dfr")
    bad.write_text("{")
    left_out(runs, bad.name)


def test_damaged_predictions_are_named(runs: Path, pick: Pick) -> None:
    bad = predictions_path(pick("dfr"))
    bad.write_bytes(b"")
    left_out(runs, bad.name)


@pytest.mark.parametrize("value", [None, -1, 10**30, "x", [], {"a": 1}], ids=repr)
def test_a_forged_record_is_shown_or_refused_by_its_name(
    pick: Pick, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 4)
    path = pick("groupdro")
    original = json.loads(path.read_text())
    wrong = []
    for place in places(original):
        if re.match(r"history|groups\.[1-7]|(val|train)_metrics\.(?!wga)|env\.versions|cost\.(stages|shared)", place):
            continue  # the board does not read them, or reads them as it does their neighbours
        content = copy.deepcopy(original)
        put(place, value)(content)
        path.write_text(json.dumps(content))
        try:
            to_markdown(build(collect([pick("erm"), path])))
        except Exception as error:
            if not isinstance(error, CorruptFile) or str(path) not in str(error):
                wrong.append(f"{place}: {type(error).__name__}: {error}")
    assert wrong == []
