"""The committed leaderboard: its tables are those of its results, and whoever edits one is told."""

import shutil
from pathlib import Path

import pytest
from helpers import edit, put
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.record import find
from worstgroup.leaderboard import committed

CHECKOUT = Path(__file__).parents[2]
README = "before\n<!-- tiny:begin -->\nold\n<!-- tiny:end -->\nafter\n"
SUITE = """summary = "of tests"
[[blocks]]
dataset = "tiny"
methods = ["erm", "dfr"]
"""


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    if not (CHECKOUT / committed.RESULTS).is_dir():
        pytest.skip("no results are committed yet")
    assert committed.differing(CHECKOUT) == []


@pytest.fixture
def checkout(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the finished runs as its results, and a README with the rows of a suite."""
    made = tmp_path / "checkout"
    shutil.copytree(runs, made / committed.RESULTS)
    (made / "README.md").write_text(README)
    (made / "tiny.toml").write_text(SUITE)
    read = committed.read_suite
    monkeypatch.setattr(committed, "read_suite", lambda name: read(str(made / f"{name}.toml")))
    return made


def test_what_is_missing_or_edited_is_made_anew(checkout: Path) -> None:
    wanted = {"README.md", "leaderboard/tables/README.md", "leaderboard/tables/board.csv"}
    wanted.add("leaderboard/tables/reproduction.md")
    assert {str(path.relative_to(checkout)) for path in committed.differing(checkout)} == wanted
    assert {str(path.relative_to(checkout)) for path in committed.update(checkout)} == wanted
    assert committed.differing(checkout) == []
    assert committed.update(checkout) == []
    table = checkout / committed.TABLES / "README.md"
    table.write_text(table.read_text().replace("erm", "arm"))
    assert committed.differing(checkout) == [table]
    assert committed.update(checkout) == [table]
    assert "arm" not in table.read_text()


def test_the_readme_has_the_rows_of_its_suite_and_the_rest_stays(checkout: Path) -> None:
    committed.update(checkout)
    text = (checkout / "README.md").read_text()
    assert text.startswith("before\n<!-- tiny:begin -->\n| method")
    assert text.endswith("<!-- tiny:end -->\nafter\n")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["method", "erm", "dfr"]  # groupdro has results too, but the suite does not ask for it
    assert "groupdro" in (checkout / committed.TABLES / "README.md").read_text()


def test_a_wrong_record_is_named_and_nothing_is_written(checkout: Path) -> None:
    path = next(find(checkout / committed.RESULTS))
    edit(path, put("metrics.wga", 0.99))
    with pytest.raises(UserError, match=r"metrics\.wga"):
        committed.update(checkout)
    assert not (checkout / committed.TABLES).exists()
    assert (checkout / "README.md").read_text() == README
