"""The board of many records: read once, then from its index; a new record costs its own row.

Run with `pytest tests/speed/test_board.py --benchmark-enable` on an idle machine; `-m slow` is the board of 100,000
records in 1,000 rows, for which stated are five minutes cold, 30 s and 1 GiB from the index, 5 s more for a new record.
Only twice what is stated fails.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.synthetic import ROWS, write_records
from worstgroup.benchmark.record import find, predictions_path, read

AGAIN = 5
"""Times that a board from its index is faster than a cold one, at least."""
COLD_S, WARM_S, GIB, NEW_S = 300, 30, 1, 5
PROGRAM = """
import json, re, sys, time
from pathlib import Path
from worstgroup.benchmark import record
from worstgroup.leaderboard import aggregate, render
from worstgroup.leaderboard.index import Index

if __name__ == "__main__":
    start = time.perf_counter()
    with Index.at_home() as index:
        found = aggregate.collect(record.find(Path(sys.argv[1])), index)
        tables = aggregate.build(found)
    text = render.to_markdown(tables)
    seconds = time.perf_counter() - start
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    print(json.dumps({"seconds": seconds, "peak": peak, "runs": len(found.entries), "problems": found.problems}))
"""


def board(folder: Path, program: Path) -> dict:
    """Of a process of its own."""
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def add(folder: Path) -> None:
    """One more seed of some row."""
    path = next(find(folder))
    made = read(path).model_copy(update={"seed": 10**6})
    made = made.model_copy(update={"run": made.identity_hash()})
    other = path.with_name(f"another-{made.run[:12]}.json")
    other.write_bytes(made.to_json())
    shutil.copy(predictions_path(path), predictions_path(other))


def measured(runs: Path, tmp_path: Path, cells: int, seeds: int) -> tuple[dict, dict, dict]:
    """A cold board, one from the index, and one after a new record."""
    folder, program = tmp_path / "many", tmp_path / "board.py"
    number = write_records(runs, folder, cells, seeds)
    cold, warm = board(folder, program), board(folder, program)
    add(folder)
    new = board(folder, program)
    assert [made["runs"] for made in (cold, warm, new)] == [number, number, number + 1]
    assert not cold["problems"]
    return cold, warm, new


def test_a_board_from_its_index_is_faster_than_a_cold_one(runs: Path, tmp_path: Path, report) -> None:
    cold, warm, new = measured(runs, tmp_path, 3 * ROWS, 25)
    report(
        "board",
        f"{cold['runs']} runs: {cold['seconds']:.1f} s cold, {warm['seconds']:.2f} s from the index, "
        f"{new['seconds'] - warm['seconds']:.2f} s more for a new record",
    )
    assert cold["seconds"] > AGAIN / 2 * warm["seconds"]
    assert new["seconds"] < cold["seconds"] / 2


@pytest.mark.slow
def test_a_hundred_thousand_records(runs: Path, tmp_path: Path, report) -> None:
    cold, warm, new = measured(runs, tmp_path, 1000, 100)
    more = new["seconds"] - warm["seconds"]
    report(
        "board of 100,000",
        f"{cold['seconds']:.0f} s cold ({cold['peak'] / 2**30:.2f} GiB), {warm['seconds']:.1f} s from "
        f"the index ({warm['peak'] / 2**30:.2f} GiB), {more:.1f} s more for a new record",
    )
    assert cold["seconds"] < 2 * COLD_S
    assert warm["seconds"] < 2 * WARM_S
    assert warm["peak"] < 2 * GIB * 2**30
    assert more < 2 * NEW_S
