"""The real program in processes of its own: start-up, worker processes, two programs at once, pipes."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import TINYSET, Call, Result, finish, prediction_files, start
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.benchmark.record import find, read

RUN = ("run", "--dataset", "tinyvariants", "--method", "erm,groupdro,dfr", "--seeds", "0,1")
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
    assert "tinyvariants · tiny_cnn" in first.out
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


def test_a_closed_pipe_is_no_error(runs: Path, home: Path) -> None:
    process = start(home, "board", "--format", "csv")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) != 0
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are looked up in /proc")
def test_workers_end_with_a_program_that_was_killed(home: Path) -> None:
    """They would go on with what is queued, and then wait for ever."""
    program = start(home, *RUN, *PLUGIN, "--jobs", "2", "--set", "recipe.epochs=500", **ONE_THREAD)
    workers: list[int] = []
    while len(workers) < 2:  # the resource tracker is a child, too
        assert program.poll() is None
        time.sleep(0.2)
        workers = [pid for pid in children(program.pid) if b"spawn_main" in command_line(pid)]
    program.kill()
    finish(program)
    until = time.monotonic() + 60
    while any(b"spawn_main" in command_line(pid) for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.2)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> bytes:
    """Empty for a process that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
