"""Killed in the middle of a training and started again, the program ends at the same bytes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Call, Result, finish, prediction_files, start

LONG = ("run", "--dataset", "tiny", "--method", "erm,groupdro", "--seeds", "0", "--set", "recipe.epochs=30")


def wait_for(process: "subprocess.Popen[str]", condition: Callable[[], bool], timeout: float = 60) -> None:
    """Wait while the program works; fails if it ends before the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"not in time: {process.communicate()}")
        time.sleep(0.005)


def states(home: Path) -> dict[Path, int]:
    """Full-state checkpoints of trainings under way, and when each was last written."""
    found = {}
    for path in (home / "artifacts/work").rglob("*.pt"):
        try:
            found[path] = path.stat().st_mtime_ns
        except FileNotFoundError:  # the training has ended
            continue
    return found


def interrupt(home: Path, number: signal.Signals, jobs: int) -> Result:
    """Start the long runs, send a signal to the whole group once a training got further, and wait for the end."""
    before = states(home)
    process = start(home, *LONG, "--jobs", jobs, OMP_NUM_THREADS="1")
    wait_for(process, lambda: states(home) != before)
    os.killpg(process.pid, number)
    done = finish(process)
    assert_alone(process.pid)
    assert states(home), "the trainings had ended before the signal"
    assert "Traceback" not in done.err
    return done


def assert_alone(group: int) -> None:
    """No process of the group is left, or all end within ten seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("a worker outlived the program")


@pytest.fixture
def undisturbed(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Predictions of the long runs when nothing disturbs them."""
    with monkeypatch.context() as patch:
        patch.setenv("WORSTGROUP_HOME", str(tmp_path / "undisturbed"))
        assert call(*LONG, "--jobs", "1").code == 0
    return prediction_files(tmp_path / "undisturbed" / "runs")


def test_killed_runs_go_on_to_the_same_bytes(home: Path, call: Call, undisturbed: dict[str, bytes]) -> None:
    """Ctrl-C with workers, then SIGKILL without, each time the same command again."""
    assert interrupt(home, signal.SIGINT, jobs=2).code == 130
    assert interrupt(home, signal.SIGKILL, jobs=1).code == -9
    assert call(*LONG, "--jobs", "1").code == 0
    assert prediction_files(home / "runs") == undisturbed
    assert states(home) == {}
    assert "2 records, 0 with differences" in call("verify").out


def workers(process: "subprocess.Popen[str]") -> list[int]:
    """Worker processes of the program, without the helper that tracks their resources."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_worker_that_dies_is_a_message(home: Path) -> None:
    """What the kernel does when memory is short."""
    process = start(home, *LONG, "--jobs", 2, OMP_NUM_THREADS="1")
    wait_for(process, lambda: bool(states(home)))
    os.kill(workers(process)[0], signal.SIGKILL)
    done = finish(process)
    assert_alone(process.pid)
    assert done.code not in (0, None)
    assert "Traceback" not in done.err
    assert "--jobs" in done.err
