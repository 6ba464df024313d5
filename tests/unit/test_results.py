"""The results that are committed verify, and one that is falsified does not."""

import shutil
from pathlib import Path

import pytest
import worstgroup
from helpers import edit, put
from worstgroup.benchmark.record import find, predictions_path, read
from worstgroup.leaderboard.verify import orphans, verify, verify_all

RESULTS = Path(worstgroup.__file__).parent / "leaderboard" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="no results are committed yet: no leaderboard/results")


def test_committed_results_verify() -> None:
    verdicts = verify_all(RESULTS)
    assert verdicts
    assert [f"{verdict.path.name}: {problem}" for verdict in verdicts for problem in verdict.problems] == []
    assert {verdict.level for verdict in verdicts} <= {"answers", "counts", "failed"}
    assert orphans(RESULTS) == []


def test_a_falsified_copy_does_not(tmp_path: Path) -> None:
    path = next(path for path in find(RESULTS) if read(path).status == "finished" and not read(path).candidates)
    copy = tmp_path / path.name
    for file in filter(Path.exists, (path, predictions_path(path))):
        shutil.copy(file, tmp_path)
    assert verify(copy).ok
    edit(copy, put("metrics.wga", 1.0 - read(path).metrics["wga"] / 2))  # type: ignore[operator]
    assert any(problem.startswith("metrics.wga") for problem in verify(copy).problems)
