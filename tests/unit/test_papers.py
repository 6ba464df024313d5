"""The papers' numbers: every file reads, every name in them exists, and the numbers are the printed ones."""

from collections import Counter, defaultdict
from decimal import Decimal
from pathlib import Path

import pytest
from worstgroup.benchmark.errors import CorruptFile
from worstgroup.benchmark.planning import find_card, native_budget
from worstgroup.benchmark.registry import BACKBONES, METHODS, SOURCES
from worstgroup.benchmark.spec import MethodName, override
from worstgroup.benchmark.suite import read_suite, suite_names
from worstgroup.leaderboard import papers
from worstgroup.leaderboard.papers import COLUMNS, Reported, read, reported
from worstgroup.leaderboard.reproduction import BEYOND

LINES = {
    "clusterfix-supplement-table1": 5,
    "clusterfix-supplement-table2": 7,
    "clusterfix-supplement-table3": 19,
    "clusterfix-supplement-table4": 19,
    "clusterfix-supplement-table5": 12,
    "clusterfix-table1": 66,
    "clusterfix-table2": 66,
    "clusterfix-table3": 20,
    "ex2l-table2": 96,
    "ex2l-table3": 88,
    "ex2l-table7": 24,
    "ex2l-table8": 46,
    "ex2l-table9": 46,
    "ex2l-table10": 46,
    "ex2l-table11": 46,
    "ex2l-table12": 46,
    "ex2l-table13": 6,
    "ex2l-table14": 6,
    "exmap-table1": 62,
    "exmap-table2": 24,
    "exmap-table3": 18,
    "exmap-table4": 12,
    "exmap-table5": 8,
    "exmap-table6": 10,
    "mac-table1": 16,
    "mac-table2": 20,
}
"""Numbers of every table, in the order of reading."""
CELEBA = "celeba:Blond_Hair/Male"


@pytest.fixture(scope="module")
def numbers() -> list[Reported]:
    return reported()


def test_every_table_is_whole_and_in_order(numbers: list[Reported]) -> None:
    assert list(Counter(line.key for line in numbers).items()) == list(LINES.items())


def test_no_number_stands_twice(numbers: list[Reported]) -> None:
    parts = ("paper", "table", "dataset", "backbone", "method_reported", "supervision", "metric")
    places = Counter(tuple(getattr(line, part) for part in parts) for line in numbers)
    assert [place for place, count in places.items() if count > 1] == []


def test_every_name_of_ours_exists(numbers: list[Reported]) -> None:
    for line in numbers:
        assert not line.is_ours or find_card(line.dataset)[1].name == line.dataset
        assert line.weights in BACKBONES[line.backbone.partition(":")[0]].weights
        assert line.method, "all methods of the papers are in the suite"
        name = MethodName.parse(line.method)
        entries = {"": METHODS[name.host], **({name.source: SOURCES[name.source]} if name.source else {})}
        for key, value in line.settings:
            prefix, _, setting = key.rpartition(".")
            changed, problems = override(entries[prefix].config(), {setting: value}, prefix)
            assert problems == []
            assert str(getattr(changed, setting)) == value, "as a row's settings are compared"


def test_every_number_is_repeated_by_a_suite(numbers: list[Reported]) -> None:
    """At the paper's dataset, model, method and budget; only MaC's MaskTune, which it quotes, is run with labels."""
    budgets: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in suite_names():
        paper = name.removeprefix("repro/").partition("-")[0]
        for request in read_suite(name).requests() if name.startswith("repro/") else ():
            weights = request.weights or find_card(request.dataset)[1].weights
            budget = request.budget or native_budget(MethodName.parse(request.method))
            budgets[paper, request.dataset, request.method, request.backbone, weights].add(budget)
    for line in numbers:
        if line.is_ours and line.metric not in BEYOND and (line.paper, line.method) != ("MaC", "masktune"):
            own = budgets[line.paper.lower(), line.dataset, line.method, line.backbone, line.weights]
            assert own, line
            assert line.budget in ("", *own), line


# ------------------------------------------------------------------------------------------------------- the numbers

SPOTS = [
    ("exmap-table1", "waterbirds", "Base (ERM)", "wga", "76.8"),
    ("exmap-table1", CELEBA, "DFR+ExMap", "acc_adj", "91.8"),
    ("exmap-table1", "waterbirds", "DivDis*", "wga", "81.0"),
    ("exmap-table2", "cmnist:bin99", "GEORGE (DFR)", "wga", "71.7"),
    ("exmap-table2", "urbancars:coobj", "DFR+ExMap", "acc_adj", "93.2"),
    ("exmap-table3", "urbancars:val95", "DFR (BG)", "gap_object", "-29.2"),
    ("exmap-table3", "urbancars:val95", "GEORGE (DFR)", "gap_all", "-63.4"),
    ("exmap-table4", "waterbirds:fg-black", "DFR+ExMap", "drop_acc_adj", "17.5"),
    ("exmap-table5", "waterbirds", "DFR+ExMap (KMeans)", "acc_adj", "95.9"),
    ("exmap-table6", "waterbirds", "JTT+ExMap", "acc_adj", "90.0"),
    ("mac-table1", "waterbirds", "ERM, land-water", "mask_fg", "85.6"),
    ("mac-table1", "waterbirds", "ERM, water-water", "score_bg", "0.37"),
    ("mac-table2", "waterbirds", "MaC", "wga", "93.0 ± 0.7"),
    ("mac-table2", CELEBA, "DFR", "acc_adj", "91.3 ± 0.3"),
    ("ex2l-table2", "waterbirds", "ERM", "wga", "23.68 ± 21.1"),
    ("ex2l-table2", "cmnist:ex2l", "CDAN", "acc_mean", "35.25 ± 24.4"),
    ("ex2l-table2", "waterbirds:ex2l", "IRM", "wga", "84.42 ± 3.0"),
    ("ex2l-table2", "spawrious:m2m-hard", "eX2L-JS Dist.", "wga", "38.02 ± 36.1"),
    ("ex2l-table2", "spawrious:o2o-easy", "GroupDRO", "acc_mean", "95.13 ± 0.3"),
    ("ex2l-table7", CELEBA, "eX2L-Soft Dice", "wga", "83.33 ± 1.0"),
    ("ex2l-table7", "celeba:ex2l", "MMD", "acc_mean", "92.19 ± 0.3"),
    ("ex2l-table8", "spawrious:m2m-hard", "eX2L-MAE", "cost_ratio", "1.95"),
    ("ex2l-table9", "cmnist:ex2l", "CDANN", "wga_ratio", "0.84"),
    ("ex2l-table10", "waterbirds", "eX2L-SSIM", "time", "28.79"),
    ("ex2l-table11", CELEBA, "GroupDRO", "wga", "84.07"),
    ("ex2l-table12", "spawrious:o2o-easy", "DANN", "cost_ratio", "1.00"),
    ("ex2l-table13", "spawrious:m2m-hard", "ERM", "wga", "3.82"),
    ("ex2l-table14", "spawrious:m2m-hard", "GroupDRO", "acc_mean", "71.01"),
    ("clusterfix-table1", "celeba:Big_Lips/Male", "BPA", "acc_group", "66.50 ± 0.24"),
    ("clusterfix-table1", "CelebA, mean of ten targets", "CFix", "acc_group", "83.91"),
    ("clusterfix-table2", "celeba:Wearing_Necklace/Male", "ERM", "wga", "2.72 ± 0.83"),
    ("clusterfix-table2", "celeba:Pale_Skin/Male", "George", "wga", "62.03 ± 16.50"),
    ("clusterfix-table3", "waterbirds:place", "CFix", "wga", "86.61"),
    ("clusterfix-supplement-table1", "cmnist:cm10", "ERM", "acc_group", "74.48"),
    ("clusterfix-supplement-table2", "cmnist:cm10", "CFix, \u03b3 = 20", "acc_group", "86.05"),
    ("clusterfix-supplement-table3", "celeba:Male/Wearing_Lipstick", "DebiAN", "acc_group", "88.50 ± 1.11"),
    ("clusterfix-supplement-table4", "celeba:Male/Heavy_Makeup", "PGI", "wga", "46.90 ± 13.10"),
    ("clusterfix-supplement-table5", "waterbirds", "CFix*", "wga", "72.27"),
]


@pytest.mark.parametrize(("key", "dataset", "method", "metric", "printed"), SPOTS)
def test_a_number_is_the_printed_one(
    numbers: list[Reported], key: str, dataset: str, method: str, metric: str, printed: str
) -> None:
    (line,) = of(numbers, key=key, dataset=dataset, method_reported=method, metric=metric)
    assert f"{line.value}" + (f" ± {line.spread}" if line.spread is not None else "") == printed


def of(numbers: list[Reported], **parts: str) -> list[Reported]:
    return [line for line in numbers if all(getattr(line, part) == value for part, value in parts.items())]


def test_the_same_method_at_two_supervisions(numbers: list[Reported]) -> None:
    found = of(numbers, key="exmap-table1", dataset="waterbirds", method="lff", metric="wga")
    assert {line.budget: str(line.value) for line in found} == {"select": "78.0", "none": "44.1"}


def test_two_samplers_of_one_similarity(numbers: list[Reported]) -> None:
    found = of(numbers, key="ex2l-table3", dataset="cmnist:ex2l", method_reported="SSIM", metric="wga_val")
    samplers = {dict(line.settings)["sampler"]: str(line.value) for line in found}
    assert samplers == {"random": "22.42", "uniform_group": "67.41"}


@pytest.mark.parametrize("table", ["table1", "table2"])
def test_averages_of_ten_targets(numbers: list[Reported], table: str) -> None:
    own = [n for n in numbers if (n.paper, n.table) == ("ClusterFix", table)]
    for method in {n.method_reported for n in own}:
        targets = [n.value for n in own if n.method_reported == method and n.is_ours]
        (average,) = (n.value for n in own if n.method_reported == method and not n.is_ours)
        assert len(targets) == 10
        assert abs(sum(targets) / 10 - average) < Decimal("0.01")


@pytest.mark.parametrize("table", range(8, 13))
def test_ratios_and_repeated_numbers_of_the_tables_of_time(numbers: list[Reported], table: int) -> None:
    own = {(n.method_reported, n.metric): n for n in numbers if n.key == f"ex2l-table{table}"}
    tables = of(numbers, key="ex2l-table2", metric="wga") + of(numbers, key="ex2l-table7", metric="wga")
    main = {(n.dataset, n.method, n.settings): n.value for n in tables}
    for (method, metric), line in own.items():
        if metric == "wga":
            assert line.value == main[line.dataset, line.method, line.settings]
        if metric in (pairs := {"cost_ratio": "time", "wga_ratio": "wga"}):
            ratio = own[method, pairs[metric]].value / own["ERM", pairs[metric]].value
            assert abs(ratio - line.value) <= Decimal("0.005")


def test_drops_are_differences(numbers: list[Reported]) -> None:
    own = {(n.method, n.dataset, n.metric): n.value for n in numbers if n.key == "exmap-table4"}
    for method in ("erm", "dfr", "dfr+george", "dfr+exmap"):
        whole, cut = (own[method, name, "acc_adj"] for name in ("waterbirds", "waterbirds:fg-black"))
        assert own[method, "waterbirds:fg-black", "drop_acc_adj"] == whole - cut


# ------------------------------------------------------------------------------------------------------ files that lie

GOOD = dict.fromkeys(COLUMNS, "") | {
    "paper": "ExMap",
    "table": "table1",
    "dataset": "waterbirds",
    "backbone": "resnet50",
    "method": "dfr+exmap",
    "settings": "exmap.clustering=kmeans",
    "method_reported": "DFR+ExMap",
    "budget": "none",
    "metric": "wga",
    "value": "92.50",
}


def written(tmp_path: Path, *rows: dict[str, str], columns: tuple[str, ...] = COLUMNS) -> Path:
    path = tmp_path / "exmap-table1.csv"
    path.write_text("\n".join([",".join(columns), *(",".join(row.values()) for row in rows)]) + "\n", encoding="utf-8")
    return path


def test_a_line_is_typed(tmp_path: Path) -> None:
    (line,) = read(written(tmp_path, GOOD | {"spread": "0.70"}))
    assert (line.value, line.spread) == (Decimal("92.50"), Decimal("0.70"))
    assert str(line.value) == "92.50"
    assert line.settings == (("exmap.clustering", "kmeans"),)
    assert (line.key, line.title) == ("exmap-table1", "ExMap, Table 1")


def test_a_dataset_of_the_paper_alone_begins_with_a_capital_letter(tmp_path: Path) -> None:
    (line,) = read(written(tmp_path, GOOD | {"dataset": "ImageNet-9", "method": "", "settings": ""}))
    assert not line.is_ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "mean"}, "unknown metric 'mean'"),
        ({"metric": "gap_object"}, "unknown metric 'gap_object'"),
        ({"dataset": "waterbird"}, "unknown dataset 'waterbird'. Did you mean waterbirds"),
        ({"dataset": "waterbirds:plaice"}, "unknown dataset variant 'waterbirds:plaice'"),
        ({"method": "dfr+exmapp"}, "unknown source 'exmapp'"),
        ({"method": "dffr"}, "unknown method 'dffr'"),
        ({"budget": "vall"}, "unknown budget 'vall'"),
        ({"budget": "val:wings"}, "unknown attribute of waterbirds 'wings'"),
        ({"value": "92.5%"}, "value: '92.5%' is not a number"),
        ({"value": ""}, "value: '' is not a number"),
        ({"value": "nan"}, "value: 'nan' is not a number"),
        ({"spread": "±1"}, "spread: '±1' is not a number"),
        ({"settings": "kmeans"}, "settings: 'kmeans' is not KEY=VALUE"),
        ({"table": "table2"}, "the line is of exmap-table2, the file of exmap-table1"),
        ({"note": "a,b"}, f"it must have {len(COLUMNS)} cells"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(CorruptFile) as caught:
        read(written(tmp_path, GOOD, GOOD | change))
    assert str(caught.value).startswith(f"exmap-table1.csv, line 3: {message}")


def test_a_line_with_too_few_cells(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="line 2: it must have 15 cells"):
        read(written(tmp_path, dict(list(GOOD.items())[:-1])))


def test_other_columns(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="line 1: the columns must be paper,table,"):
        read(written(tmp_path, GOOD, columns=COLUMNS[:-1]))


def test_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["ex2l-table10.csv", "ex2l-table2.csv", "clusterfix-table1.csv", "ex2l-table9.csv"]
    found = sorted((tmp_path / name for name in names), key=papers._place)
    assert [path.name for path in found] == [names[2], names[1], names[3], names[0]]
