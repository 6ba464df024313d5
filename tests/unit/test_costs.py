"""`board --costs`: files of `profile` beside the rows of a leaderboard."""

import csv
import io
from pathlib import Path

import pytest
from worstgroup.benchmark.errors import CorruptFile, UserError
from worstgroup.leaderboard import costs
from worstgroup.leaderboard.table import Difference, Row, Table

SETTING = {
    "device": "AMD EPYC",
    "threads": "1",
    "backbone": "resnet18",
    "image": "64x64x3",
    "batch": "32",
    "precision": "fp32",
    "layout": "nchw",
    "torch": "2.9",
    "clock": "process CPU time",
    "rounds": "7",
    "steps": "4",
}
LINES = [
    {"method": "erm", "budget": "none", "part": "step", "seconds": "0.2", "images": "32", "step_ratio": "1.0"},
    {"method": "erm", "budget": "none", "part": "erm step", "seconds": "0.2", "images": "32"},
    {"method": "erm", "budget": "none", "part": "from scratch", "device_s": "4.0", "flops": "8e9", "epochs": "2"},
    {
        "method": "ex2l",
        "budget": "train+val",
        "part": "step",
        "seconds": "0.4",
        "images": "32",
        "step_ratio": "2.0",
        "update_ratio": "4.0",
    },
    {"method": "ex2l", "budget": "train+val", "part": "resnet50 224 px", "images": "1", "flops": "4.9e10"},
    {"method": "dfr", "budget": "val", "part": "head", "device_s": "1.0", "flops": "0"},
    {"method": "dfr", "budget": "val", "part": "from scratch", "device_s": "5.0", "flops": "9e9", "epochs": "2"},
    {"method": "erm", "budget": "", "part": "bare loop", "images": ""},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cost-epyc.csv"
    ratios = ("step_ratio", "step_ratio_low", "step_ratio_high", "update_ratio")
    names = list(dict.fromkeys([*costs.NEEDED, *ratios, *(name for line in LINES for name in line)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    for line in LINES:
        ends = {f"step_ratio_{end}": line["step_ratio"] for end in ("low", "high") if "step_ratio" in line}
        writer.writerow({**SETTING, **line, **ends})
    path.write_text(text.getvalue())
    return path


def table() -> Table:
    rows = [
        Row("ex2l", "train+val", "", (0, 1), 10, {}, versus_erm={"wga": Difference(0.2, 0.1, 0.31)}),
        Row("dfr", "val-5", "", (0, 1), 10, {}, versus_erm={"wga": Difference(0.4, 0.3, 0.5)}),
    ]
    return Table("wg1", "digits2", "f", "tiny_cnn", "none", {}, [], rows, "AMD EPYC")


def cells(text: str, first: str) -> list[str]:
    """Cells of the first line of a Markdown table that begins with this one."""
    lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return next(line for line in lines if line[0] == first)


def test_a_line_for_every_method_beside_what_it_gains(file: Path) -> None:
    text = costs.render(costs.find(file), [table()])
    assert cells(text, "method")[-1] == "digits2 · tiny_cnn"
    assert cells(text, "ex2l")[:5] == ["ex2l", "train+val", "400", "2.00 [2.00, 2.00]", "4.00"]
    assert cells(text, "ex2l")[6:] == ["n/a", "n/a", "+20.0 [+10.0, +31.0]"]
    assert cells(text, "dfr") == [
        "dfr",
        "val",
        "n/a",
        "n/a",
        "n/a",
        "",
        "1.25",
        "1.12",
        "",
    ]  # its row has another budget
    assert cells(text, "erm")[6:8] == ["1.00", "1.00"]
    assert cells(text, "GFLOP, resnet50 224 px") == ["GFLOP, resnet50 224 px", "methods"]
    assert cells(text, "49") == ["49", "ex2l"]
    assert "AMD EPYC, 1 thread" in text


def test_the_papers_ratios_stand_beside_ours(file: Path) -> None:
    low, high = costs.papers_ratios(costs.reported())["ex2l"]
    assert (low, high) == pytest.approx((1.95, 2.05), abs=0.02)
    assert cells(costs.render(costs.find(file), []), "ex2l")[5] == f"{low:.2f}-{high:.2f}"


def test_csv_has_plain_numbers(file: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(costs.render(costs.find(file), [table()], "csv"))))
    assert [line["method"] for line in lines] == ["erm", "ex2l", "dfr"]
    assert float(lines[1]["wga digits2 · tiny_cnn"]) == 0.2
    assert float(lines[2]["run_ratio"]) == 1.25
    assert [line["update_ratio"] for line in lines] == ["", "4.0", ""]
    assert float(lines[1]["flops resnet50 224 px"]) == 4.9e10


def test_a_folder_holds_several(file: Path) -> None:
    (file.parent / "cost-b.csv").write_bytes(file.read_bytes())
    assert [sheet.name for sheet in costs.find(file.parent)] == ["cost-b", "cost-epyc"]


def test_what_is_no_measurement_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file of measurements; make one with"):
        costs.find(tmp_path / "none.csv")
    file.write_text("a,b\n1,2\n")
    with pytest.raises(CorruptFile, match="no column method"):
        costs.find(file)
    file.write_text(file.read_text().replace("a,b", ",".join(costs.NEEDED)).replace("1,2", "erm,none,x px,many"))
    with pytest.raises(CorruptFile, match="cannot be read"):
        costs.find(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptFile, match="cannot be read"):
        costs.find(file)
