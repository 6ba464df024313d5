"""Every method, really killed (SIGKILL) at times that chance picks, ends at the bytes of an undisturbed run."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import Call, finish, prediction_files, start
from worstgroup.benchmark.registry import METHODS

KILLS = 4
RUN = ("run", "--dataset", "tiny", "--seeds", "0", "--set", "recipe.epochs=25", "--jobs", "1", "--quiet")
CASES = {
    **dict.fromkeys(METHODS, ()),
    "dfr+exmap": (),
    "groupdro@pseudo": ("--budget", "val-20"),
    "ex2l@masked": ("--budget", "val-20"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_killed_at_any_time_it_ends_at_the_same_bytes(
    method: str, home: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*RUN, "--method", method, *CASES[method])
    with monkeypatch.context() as patch:
        patch.setenv("WORSTGROUP_HOME", str(tmp_path / "undisturbed"))
        began = time.monotonic()
        assert call(*command).code == 0
        length = time.monotonic() - began
    random = np.random.default_rng(sorted(CASES).index(method))
    killed = 0
    for _ in range(KILLS):
        process = start(home, *command, OMP_NUM_THREADS="1")
        while process.poll() is None and not (home / "artifacts").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, max(length, 0.5)))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        finish(process)
    assert call(*command).code == 0
    assert prediction_files(home / "runs") == prediction_files(tmp_path / "undisturbed" / "runs")
    assert killed, "every run had ended before it could be killed"
    assert not list((home / "artifacts" / "work").glob("*")), "a leftover of the killed runs"
