"""The real program in processes of its own: start-up, worker processes, signals, two programs at once."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TINYSET, Call, Result, finish, prediction_files, start
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.benchmark.record import find, read

RUN = ("run", "--dataset", "tiny", "--method", "erm,groupdro,dfr", "--seeds", "0,1")
LONG = ("run", "--dataset", "tiny", "--method", "erm,groupdro", "--seeds", "0", "--set", "recipe.epochs=40")
PLUGIN = ("--plugin", TINYSET)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
sys.argv = ["worstgroup", *sys.argv[1:]]
from worstgroup.cli import main
try:
    main()
finally:
    print("heavy:", sorted({"torch", "numpy", "sklearn", "pandas", "torchvision"} & set(sys.modules)), file=sys.stderr)
"""
    for arguments in (["--help"], ["run", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert "Usage: worstgroup" in done.stdout
        assert done.stderr.strip() == "heavy: []"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, worstgroup; dir(worstgroup); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_mistake_is_one_message_and_exit_code_2(home: Path) -> None:
    done = finish(start(home, "ls", "runs", "--plugin", "gone.py"))
    assert done == Result(2, "", "error: --plugin gone.py: there is no such file\n")


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A home after the program made six runs one after another, and what it said."""
    folder = tmp_path_factory.mktemp("worked")
    return folder, finish(start(folder, *RUN, *PLUGIN, "--jobs", "1"))


def test_run_then_skip_then_board_then_verify(
    worked: tuple[Path, Result], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = worked
    assert first.code == 0, first
    assert [f"[{i}/6]" in line for i, line in enumerate(first.err.splitlines(), 1)] == [True] * 6
    assert "tiny · tiny_cnn" in first.out
    for method in ("erm", "groupdro", "dfr"):
        assert re.search(rf"^ *{method} ", first.out, re.MULTILINE)
    written = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "runs").rglob("*.*")}
    assert len(written) == 12

    monkeypatch.setenv("WORSTGROUP_HOME", str(folder))
    second = call(*RUN)
    assert second.code == 0
    assert second.err == "6 of 6 runs are finished already\n"
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "runs").rglob("*.*")} == written
    assert first.out.split() == second.out.split() == call("board").out.split()
    judged = call("verify")
    assert (judged.code, judged.err) == (0, "")
    assert "6 records, 0 with differences" in judged.out


def test_two_jobs_give_the_bytes_of_one(worked: tuple[Path, Result], home: Path) -> None:
    done = finish(start(home, *RUN, *PLUGIN, "--jobs", "2"))
    assert done.code == 0, done
    assert sorted(re.findall(r"\[(\d)/6\]", done.err)) == list("123456")
    one, two = prediction_files(worked[0] / "runs"), prediction_files(home / "runs")
    assert len(one) == 6
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_two_programs_share_a_home(home: Path, call: Call) -> None:
    both = [start(home, *RUN, *PLUGIN, "--jobs", "1", **ONE_THREAD) for _ in range(2)]
    done = [finish(process) for process in both]
    assert [result.code for result in done] == [0, 0], done
    assert sorted(read(path).label for path in find(home / "runs")) == [
        label for label in ("dfr", "erm", "groupdro") for _ in range(2)
    ]
    assert not list(home.rglob(f"{TEMPORARY}*"))
    assert "6 records, 0 with differences" in call("verify").out
    assert "Traceback" not in done[0].err + done[1].err


# ----------------------------------------------------------------------------------------------------------- signals


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
    """Start the long runs, send a signal once a training has got further than it was, and wait for the end."""
    before = states(home)
    process = start(home, *LONG, *PLUGIN, "--jobs", jobs, **ONE_THREAD)
    wait_for(process, lambda: states(home) != before)
    process.send_signal(number)
    done = finish(process)
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


def test_runs_that_are_killed_again_and_again_give_the_same_bytes(
    home: Path, call: Call, undisturbed: dict[str, bytes]
) -> None:
    """Ctrl-C, SIGKILL, SIGTERM in the middle of a training, each time the same command again."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        assert interrupt(home, number, jobs=1).code == code
    assert call("cache").code == 0
    assert call(*LONG, "--jobs", "1").code == 0
    assert prediction_files(home / "runs") == undisturbed
    assert states(home) == {}
    assert "2 records, 0 with differences" in call("verify").out


def test_ctrl_c_says_how_to_go_on(home: Path) -> None:
    assert "the same command goes on where this one stopped" in interrupt(home, signal.SIGINT, jobs=1).err


def test_ctrl_c_ends_the_workers_too(home: Path) -> None:
    process = start(home, *LONG, *PLUGIN, "--jobs", "2", **ONE_THREAD)
    wait_for(process, lambda: bool(states(home)))
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    done = finish(process)
    assert_alone(process.pid)
    assert done.code == 130
    assert "Traceback" not in done.err


def test_a_closed_pipe_is_no_error(runs: Path, home: Path) -> None:
    process = start(home, "board", "--format", "csv")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) != 0
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
