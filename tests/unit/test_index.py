"""The board's index: with it and without it, whole or damaged, alone or shared, the tables are the same bytes."""

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Call, edit, finish, prediction_files, put, start
from worstgroup.benchmark.home import index_files
from worstgroup.benchmark.record import find, predictions_path
from worstgroup.leaderboard import entry as entries
from worstgroup.leaderboard import index as indexes
from worstgroup.leaderboard import render
from worstgroup.leaderboard.aggregate import board, build, collect
from worstgroup.leaderboard.index import Index

Pick = Callable[[str], Path]


def texts(made: tuple[list[object], list[str]]) -> tuple[str, ...]:
    """Tables in three formats, and what is said of the rest."""
    tables, problems = made
    return render.to_markdown(tables), render.to_csv(tables), render.to_json(tables), *problems  # type: ignore[arg-type]


def plain(runs: Path) -> tuple[str, ...]:
    """Made without any index on disk."""
    found = collect(find(runs))
    return texts((build(found), found.problems))  # type: ignore[arg-type]


def indexed(runs: Path) -> tuple[str, ...]:
    return texts(board(find(runs)))  # type: ignore[arg-type]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the records that are read."""
    names: list[str] = []
    real = entries.read

    def read(path: Path) -> entries.Read | entries.Draw:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(entries, "read", read)
    return names


# ---------------------------------------------------------------------------------------------------- the same tables


def test_the_tables_are_the_same_with_it(runs: Path, reads: list[str]) -> None:
    expected = plain(runs)
    reads.clear()
    assert indexed(runs) == expected
    assert len(reads) == 6
    assert index_files()[0].is_file()
    assert indexed(runs) == expected
    assert len(reads) == 6  # nothing was read again


CHANGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "a record": (lambda path: edit(path, put("created", "2030-01-01T00:00:00+00:00")), 1),
    "a record that is bad now": (lambda path: path.write_text("{"), 1),
    "a record that is gone": (lambda path: path.unlink(), 0),
    "predictions": (lambda path: predictions_path(path).write_bytes(b"other"), 1),
    "predictions that are gone": (lambda path: predictions_path(path).unlink(), 1),
    "a new record": (lambda path: shutil.copy(path, path.with_name("new.json")), 1),
    "time alone": (lambda path: os.utime(path, (1, 1)), 1),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_noticed(runs: Path, pick: Pick, reads: list[str], case: str) -> None:
    indexed(runs)
    change, count = CHANGES[case]
    change(pick("dfr"))
    reads.clear()
    found = indexed(runs)
    assert len(reads) == count
    assert found == plain(runs)


def test_a_record_that_is_mended_is_shown_again(runs: Path, pick: Pick) -> None:
    before, path = indexed(runs), pick("dfr")
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert indexed(runs)[-1].startswith(f"{path}: ")
    path.write_bytes(content)
    assert indexed(runs) == before


def test_it_can_be_deleted_at_any_time(runs: Path) -> None:
    expected = plain(runs)
    with Index.at_home() as index:
        found = collect(find(runs), index)
        index_files()[0].unlink()
        assert texts((build(found), found.problems)) == expected  # type: ignore[arg-type]
    assert indexed(runs) == expected


def test_several_processes_read_the_same(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain(runs)
    monkeypatch.setattr(indexes, "MANY", 2)
    monkeypatch.setattr(indexes, "cores", lambda: 2)
    assert indexed(runs) == expected
    assert indexed(runs) == expected


def test_two_processes_build_at_once(call: Call, home: Path, runs: Path) -> None:
    expected = call("board", "--format", "csv").out
    for file in index_files():
        file.unlink(missing_ok=True)
    together = [start(home, "board", "--format", "csv") for _ in range(2)]
    assert [(made.code, made.out, made.err) for made in map(finish, together)] == [(0, expected, "")] * 2


def test_another_process_that_writes_is_not_waited_for_in_vain(
    runs: Path, pick: Pick, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = indexed(runs)
    edit(pick("erm"), lambda content: None)
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: real(*args, **{**options, "timeout": 0.01}))
    other = real(index_files()[0])
    other.execute("BEGIN IMMEDIATE")
    try:
        assert indexed(runs) == expected
    finally:
        other.close()
    assert index_files()[0].is_file()  # it is the other's too


# ------------------------------------------------------------------------------------------------------------ damage


def scribble(seed: int) -> Callable[[Path], None]:
    """Overwrite a few places with random bytes."""

    def change(file: Path) -> None:
        draw, content = random.Random(seed), bytearray(file.read_bytes())
        for _ in range(8):
            at = draw.randrange(len(content) - 64)
            content[at : at + 64] = draw.randbytes(64)
        file.write_bytes(content)

    return change


def statement(sql: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        base = sqlite3.connect(file)
        base.executescript(sql)
        base.close()

    return change


def folder(file: Path) -> None:
    file.unlink()
    (file / "x").mkdir(parents=True)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("hello"),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:5000]),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "random": lambda file: file.write_bytes(random.Random(0).randbytes(20_000)),
    **{f"random bytes in it, {seed}": scribble(seed) for seed in range(12)},
    "a folder": folder,
    "a link to itself": lambda file: (file.unlink(), file.symlink_to(file)),
    "another version": statement("UPDATE kept SET value = 'x' WHERE name = 'version'"),
    "another program's": lambda file: (file.unlink(), statement("CREATE TABLE kept (a, b); CREATE TABLE x (y)")(file)),
    "no lines": statement("DELETE FROM lines"),
    "no answers": statement("DELETE FROM answers; DELETE FROM kept WHERE name <> 'version' AND name NOT LIKE '%v%'"),
    "no table": statement("DROP TABLE answers; DROP TABLE histories; DELETE FROM kept WHERE name LIKE '% %'"),
    "a number in a fact": statement("UPDATE records SET facts = replace(facts, '0.', '0.1')"),
    "a number in what is kept": statement("UPDATE kept SET value = replace(value, '0.', '0.1') WHERE name LIKE '% %'"),
    "other answers": statement("UPDATE answers SET correct = zeroblob(6); DELETE FROM kept WHERE name LIKE '% %'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_changes_nothing(runs: Path, case: str, capfd: pytest.CaptureFixture[str], reads: list[str]) -> None:
    expected = plain(runs)
    indexed(runs)
    DAMAGE[case](index_files()[0])
    assert indexed(runs) == expected
    assert indexed(runs) == expected
    assert capfd.readouterr() == ("", "")
    if case != "a folder":  # that is somebody's
        reads.clear()
        assert indexed(runs) == expected
        assert reads == []  # it was made anew


def test_a_journal_that_was_left_is_not_taken_for_a_new_indexs_own(runs: Path) -> None:
    expected = indexed(runs)
    file, journal = index_files()
    base = sqlite3.connect(file, isolation_level=None)
    base.execute("PRAGMA cache_size = 1")
    base.execute("BEGIN")
    base.execute("UPDATE kept SET value = hex(randomblob(9999))")
    content = journal.read_bytes()
    base.execute("ROLLBACK")
    base.close()
    file.write_bytes(b"no index any more")
    journal.write_bytes(content)
    assert indexed(runs) == expected
    assert not journal.exists()


def test_a_full_disk(runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    expected, real = plain(runs), sqlite3.connect

    def connect(place: object, **options: float) -> sqlite3.Connection:
        base = real(place, **options)  # type: ignore[call-overload]
        if place != ":memory:":
            base.execute("PRAGMA max_page_count = 12")
        return base  # type: ignore[no-any-return]

    monkeypatch.setattr(sqlite3, "connect", connect)
    assert indexed(runs) == expected
    assert capfd.readouterr() == ("", "")


def test_a_home_that_cannot_be_written(runs: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain(runs)
    elsewhere = Path(shutil.move(runs, tmp_path / "elsewhere"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "file" / "home"))
    assert indexed(elsewhere) == expected


def test_an_index_that_may_only_be_read(runs: Path, pick: Pick, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed(runs)
    edit(pick("erm"), put("env.device", "Abacus 3000"))
    real = sqlite3.connect

    def connect(place: object, **options: float) -> sqlite3.Connection:
        base = real(place, **options)  # type: ignore[call-overload]
        if place != ":memory:":
            base.execute("PRAGMA query_only = ON")
        return base  # type: ignore[no-any-return]

    monkeypatch.setattr(sqlite3, "connect", connect)
    assert indexed(runs) == plain(runs)
    assert "Abacus 3000" in indexed(runs)[0]


# ------------------------------------------------------------------------------------------------------- the command


def test_cache_shows_and_prunes_it(call: Call, runs: Path) -> None:
    before = call("board", "--format", "json")
    shown = next(line for line in call("cache").out.splitlines() if "board index" in line)
    assert shown.split()[2] == "1"
    records = prediction_files(runs)
    pruned = call("cache", "--prune")
    assert next(line for line in pruned.out.splitlines() if "board index" in line).split()[2] == "0"
    assert not any(file.exists() for file in index_files())
    assert prediction_files(runs) == records
    assert call("board", "--format", "json") == before
    assert json.loads(before.out)["tables"]
