"""`worstgroup board` in all its formats, beside the papers, and in a checkout."""

import csv
import io
import json
from pathlib import Path

import pytest
from helpers import Call
from worstgroup.leaderboard import committed


@pytest.mark.parametrize(
    ("format_", "begins"),
    [
        ("md", "## tiny"),
        ("csv", "protocol,dataset"),
        ("latex", "% needs \\usepackage{booktabs}"),
        ("json", "{\n"),
        ("html", "<!doctype html>"),
    ],
)
def test_a_format_is_printed_and_written_alike(
    call: Call, runs: Path, tmp_path: Path, format_: str, begins: str
) -> None:
    printed = call("board", "--format", format_)
    assert (printed.code, printed.err) == (0, "")
    assert printed.out.lower().startswith(begins.lower())
    target = tmp_path / "new" / "board"
    written = call("board", "--format", format_, "--output", target)
    assert (written.code, written.out, written.err) == (0, "", "")
    assert target.read_text() == printed.out
    for method in ("erm", "groupdro", "dfr"):
        assert method in printed.out


def test_json_and_csv_tell_the_same(call: Call, runs: Path) -> None:
    (table,) = json.loads(call("board", "--format", "json").out)["tables"]
    lines = list(csv.DictReader(io.StringIO(call("board", "--format", "csv").out)))
    assert [row["method"] for row in table["rows"]] == [line["method"] for line in lines]
    for row, line in zip(table["rows"], lines, strict=True):
        assert row["rank"] == int(line["rank"])
        assert row["metrics"]["wga"]["mean"] == pytest.approx(float(line["wga"]), rel=1e-5)
        assert len(row["runs"]) == len(row["seeds"]) == 2
    assert table["resolution"]["one_image"] == pytest.approx(1 / table["resolution"]["images"])


def test_an_empty_home_gives_an_empty_page(call: Call, home: Path) -> None:
    done = call("board", "--format", "html")
    assert done.code == 0
    assert "worstgroup run mini" in done.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--output", "board.txt"), "--format"),
        (("--format", "pdf"), "pdf"),
        (("--reproduction", "--format", "html"), "unknown format 'html'"),
        (("nowhere",), "there is no such folder"),
        (("--check",), "checkout"),
        (("--check", "--update"), "stand alone"),
        ((".", "--check"), "stand alone"),
        (("--costs", "none.csv"), "there is no file of measurements"),
        (("--costs", "none.csv", "--format", "html"), "--costs is written as md or csv"),
        (("--update",), "checkout"),
    ],
)
def test_a_mistake_is_one_message(
    call: Call, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("board", *arguments)
    assert done.code == 2
    assert says in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "board.txt").exists()


def test_the_papers_stand_beside_ours(call: Call, runs: Path) -> None:
    done = call("board", "--reproduction")
    assert done.code == 0
    assert done.out.startswith("# The papers' numbers beside ours")
    assert "exmap-table1: 0 of" in done.out.lower()


def test_check_and_update_in_a_checkout(
    call: Call, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worstgroup.authoring import scaffold

    checkout = tmp_path / "checkout"
    for folder in (checkout / ".git", checkout / committed.RESULTS.parent):
        folder.mkdir(parents=True)
    (checkout / "pyproject.toml").touch()
    (checkout / "README.md").write_text("no table\n")
    runs.rename(checkout / committed.RESULTS)
    monkeypatch.setattr(scaffold, "PACKAGE", checkout)
    monkeypatch.chdir(checkout)
    done = call("board", "--check")
    assert done.code == 1
    assert "board.csv: differs from leaderboard/results" in done.out
    assert call("board", "--update").code == 0
    assert call("board", "--check").code == 0
    assert (checkout / "leaderboard/tables/board.csv").read_text() == call(
        "board", checkout / committed.RESULTS, "--format", "csv"
    ).out
