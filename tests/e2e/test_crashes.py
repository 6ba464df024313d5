"""Killed at named moments of every phase, on a full disk, without permission, or beside seven others on one home: the
same command again ends at the bytes of an undisturbed run, and `cache --prune` leaves nothing of the accident.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_points import PHASES, Point
from crashes import PRUNE, RUN, Child, Command, Zygote, believed, content, differing, doubled, left, points
from helpers import finish, prediction_files, start
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.benchmark.registry import METHODS

KILLS, MANY = 3, 30
"""Kills of each phase in CI, and in the long test."""
PREPARE: Command = ("prepare", "tiny")
BOARD: Command = ("board", "--format", "csv", "--output", "board.csv")
COMMANDS = {**dict.fromkeys(PHASES, RUN), "store": PREPARE, "board": BOARD, "prune": PRUNE}
EVERY = {
    **dict.fromkeys(METHODS, ()),
    "dfr+exmap": (),
    "groupdro@pseudo": ("--budget", "val-20"),
    "ex2l@masked": ("--budget", "val-20"),
}


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("zygote"))
    yield made
    made.close()


@dataclass(frozen=True)
class Calm:
    """What a command leaves when nothing disturbs it: its moments, its content, and what is left after pruning."""

    home: Path
    moments: list[tuple[str, str, bool]]
    content: dict[str, Any]
    left: list[str]


@pytest.fixture(scope="module")
def calm(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[Command, Calm]:
    """Undisturbed runs of all commands; `board` and `cache --prune` work on the home that `run` left."""
    worked = tmp_path_factory.mktemp("calm") / "worked"
    calm = {RUN: observed(zygote, RUN, worked)}
    for command, home in ((PREPARE, worked.with_name("prepared")), (BOARD, worked), (PRUNE, worked)):
        calm[command] = observed(zygote, command, home)
    return calm


def observed(zygote: Zygote, command: Command, home: Path) -> Calm:
    child = run(zygote, home, command)
    assert child.wait().code == 0, child.wait()
    found, pruned = content(home), Path(shutil.copytree(home, home.with_name("pruned")))
    assert zygote.run(pruned, PRUNE).code == 0
    result = Calm(Path(shutil.copytree(home, home.with_name(command[0]))), child.moments(), found, left(pruned))
    shutil.rmtree(pruned)
    return result


def output(home: Path) -> Path:
    """Where `board` writes to, outside the home."""
    folder = home.with_name(f"{home.name}-output")
    folder.mkdir(exist_ok=True)
    return folder / "board.csv"


def run(zygote: Zygote, home: Path, command: Command, **options: Any) -> Child:
    where = {"board.csv": str(output(home))}
    return zygote.run(home, tuple(where.get(word, word) for word in command), **options)


def begin(calm: dict[Command, Calm], home: Path, command: Command) -> None:
    """What a command finds."""
    if command in (BOARD, PRUNE):
        shutil.copytree(calm[RUN].home, home)
    if command == BOARD:
        (home / "board.sqlite").unlink()


def survives(zygote: Zygote, calm: dict[Command, Calm], home: Path, point: Point) -> list[str]:
    """Kill a command at a moment (or fill the disk), start it again, prune: what is not as if nothing had happened."""
    command = COMMANDS[point.phase]
    begin(calm, home, command)
    stopped = run(zygote, home, command, point=point).wait()
    problems = [f"{point}: ended with {stopped}"] if stopped.code != (2 if point.full else -signal.SIGKILL) else []
    if point.full and "no space left on the disk" not in stopped.err:
        problems.append(f"{point}: says {stopped.err}")
    problems += believed(home)
    if command == PRUNE:  # what is left of the artifacts must not be taken for whole
        shutil.rmtree(home / "runs")
        command = RUN
    again = run(zygote, home, command).wait()
    if again.code or "left out" in again.err or "Traceback" in again.err:
        problems.append(f"{point}: started again, it ended with {again}")
    problems += [f"{point}: {place} differs" for place in differing(content(home), calm[command].content)]
    if command == BOARD:
        problems += unlike(zygote, calm, home)
    if (pruned := zygote.run(home, PRUNE).wait()).code:
        problems.append(f"{point}: cannot be pruned: {pruned}")
    problems += [f"{point}: {place} is left or lost" for place in set(left(home)) ^ set(calm[command].left)]
    shutil.rmtree(home)
    return problems


def unlike(zygote: Zygote, calm: dict[Command, Calm], home: Path) -> list[str]:
    """What is wrong with a table that was written in a folder of the user's, where nothing is pruned."""
    table, expected = output(home), output(calm[BOARD].home.with_name("worked"))
    problems = [] if table.read_bytes() == expected.read_bytes() else ["the table differs"]
    for leftover in table.parent.glob(f"{TEMPORARY}*"):
        os.utime(leftover, (0, 0))  # it is an hour later
    assert run(zygote, home, BOARD).code == 0
    problems += [f"{path.name} is left" for path in table.parent.iterdir() if path != table]
    shutil.rmtree(table.parent)
    return problems


# -------------------------------------------------------------------------------------------------------------- kills


def kill_often(
    zygote: Zygote, calm: dict[Command, Calm], folder: Path, phase: str, kills: int, capsys: Any, seed: int
) -> None:
    moments = calm[COMMANDS[phase]].moments
    chosen = points(moments, phase, kills, seed)
    problems = [survives(zygote, calm, folder / str(i), point) for i, point in enumerate(chosen)]
    with capsys.disabled():
        of = sum(name == phase for name, *_ in moments)
        halves, well = sum(point.half for point in chosen), sum(not found for found in problems)
        sys.stdout.write(
            f"\n{phase:<10} {well:3} of {len(chosen):3} kills survived ({halves} half-way; {of} moments)\n"
        )
    assert not [line for found in problems for line in found]
    assert len(chosen) >= min(kills, 20)


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_a_phase(
    zygote: Zygote, calm: dict[Command, Calm], tmp_path: Path, phase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_often(zygote, calm, tmp_path, phase, KILLS, capsys, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed_often_in_a_phase(
    zygote: Zygote, calm: dict[Command, Calm], tmp_path: Path, phase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_often(zygote, calm, tmp_path, phase, MANY, capsys, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY)
def test_every_method_is_killed_in_its_training(method: str, zygote: Zygote, tmp_path: Path) -> None:
    """Three moments of each, one after another in the same home."""
    epochs = ("--seeds", "0", "--set", "recipe.epochs=4", "--jobs", "1", "--quiet")
    command = ("run", "--dataset", "tiny", "--method", method, *EVERY[method], *epochs)
    undisturbed = zygote.run(tmp_path / "calm", command)
    assert undisturbed.code == 0, undisturbed.wait()
    home = tmp_path / "home"
    chosen = points(undisturbed.moments(), "training", 3)
    killed = [zygote.run(home, command, point=point).code for point in sorted(chosen, key=lambda one: -one.number)]
    assert killed[0] == -signal.SIGKILL  # the others may find the training further than their moment
    assert zygote.run(home, command).code == 0
    assert differing(content(home), content(tmp_path / "calm")) == []


@pytest.mark.slow
def test_a_whole_group_with_workers_is_killed(zygote: Zygote, tmp_path: Path) -> None:
    """The real program, with two workers, at times that chance picks."""
    command = (*RUN[:-3], "0,1", "--set", "recipe.epochs=12", "--jobs", "2")
    alone = (*command[:-1], "1")
    assert zygote.run(tmp_path / "calm", alone).code == 0
    random, home = np.random.default_rng(0), tmp_path / "home"
    killed = 0
    for _ in range(5):
        process = start(home, *command, OMP_NUM_THREADS="1")
        while process.poll() is None and not (home / "artifacts").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 8))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        finish(process)
        assert believed(home) == []
    assert killed
    assert zygote.run(home, alone).code == 0
    assert prediction_files(home / "runs") == prediction_files(tmp_path / "calm" / "runs")


# ------------------------------------------------------------------------------------------------------- disks, rights


FULL = ("training", "artifact", "record", "store")


def fill_often(zygote: Zygote, calm: dict[Command, Calm], folder: Path, phase: str, times: int) -> None:
    """No byte can be written from a moment on, which is an error and no failed run; then there is room again."""
    moments = calm[COMMANDS[phase]].moments
    names = [what for of, what, _ in moments if of == phase]
    writing = [one for one in points(moments, phase, len(moments)) if names[one.number].startswith("write")]
    problems = [
        survives(zygote, calm, folder / str(i), replace(point, half=False, full=True))
        for i, point in enumerate(writing[:times])
    ]
    assert not [line for found in problems for line in found]
    assert problems


@pytest.mark.parametrize("phase", FULL)
def test_a_disk_that_fills_up(zygote: Zygote, calm: dict[Command, Calm], tmp_path: Path, phase: str) -> None:
    fill_often(zygote, calm, tmp_path, phase, 1)


@pytest.mark.slow
@pytest.mark.parametrize("phase", FULL)
def test_a_disk_that_fills_up_often(zygote: Zygote, calm: dict[Command, Calm], tmp_path: Path, phase: str) -> None:
    fill_often(zygote, calm, tmp_path, phase, 12)


@pytest.mark.parametrize("place", ["", "runs", "artifacts", "data", "locks"])
def test_a_folder_that_one_may_not_write(zygote: Zygote, calm: dict[Command, Calm], tmp_path: Path, place: str) -> None:
    """Without the powers of root, whom permissions do not bind."""
    if sys.platform != "linux":
        pytest.skip("knows how to lay down the powers of root on Linux only")
    home = tmp_path / "home"
    folder = home / place
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    denied = zygote.run(home, RUN, powerless=True).wait()
    folder.chmod(0o700)
    assert denied.code == 2, denied
    assert "permission denied" in denied.err
    assert str(folder) in denied.err
    assert "Traceback" not in denied.err
    assert believed(home) == []
    assert zygote.run(home, RUN, powerless=True).code == 0
    assert differing(content(home), calm[RUN].content) == []


# ------------------------------------------------------------------------------------------------------- many at once

TWICE: Command = (*RUN[:-3], "0,1", *RUN[-2:])


@pytest.fixture(scope="module")
def twice(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Content of a home with runs of two seeds that one process has made."""
    home = tmp_path_factory.mktemp("twice") / "home"
    assert zygote.run(home, TWICE).code == 0
    return content(home)


def test_eight_processes_share_a_home(zygote: Zygote, twice: dict[str, Any], tmp_path: Path) -> None:
    """The same suite, started together: nothing is made twice, and all print the same table."""
    home = tmp_path / "home"
    children = [zygote.start(home, TWICE) for _ in range(8)]
    ended = [child.wait() for child in children]
    assert [result.code for result in ended] == [0] * 8, ended
    assert [result.err for result in ended if "left out" in result.err or "Traceback" in result.err] == []
    assert len({result.out for result in ended}) == 1
    assert doubled(children) == []
    assert differing(content(home), twice) == []
    assert not list(home.rglob(f"{TEMPORARY}*"))


def test_who_dies_with_a_lock_blocks_nobody(zygote: Zygote, twice: dict[str, Any], tmp_path: Path) -> None:
    """Three processes on a home, two of which are killed in the middle of what the others wait for."""
    home = tmp_path / "home"
    dying = [zygote.start(home, TWICE, point=Point(*where)) for where in (("training", 9), ("artifact", 9, True))]
    living = zygote.start(home, TWICE)
    assert living.wait().code == 0, living.wait()
    assert {child.wait().code for child in dying} <= {0, -signal.SIGKILL}
    assert -signal.SIGKILL in {child.wait().code for child in dying}
    assert differing(content(home), twice) == []
    assert zygote.run(home, PRUNE).code == 0
    assert [path for path in left(home) if path.startswith("artifacts/") or TEMPORARY in path] == []


def test_pruning_beside_a_worker_loses_nothing(zygote: Zygote, twice: dict[str, Any], tmp_path: Path) -> None:
    """It is refused as a rule; where it came between two locks, the worker may fail, and its next command goes on."""
    home = tmp_path / "home"
    worker = zygote.start(home, TWICE)
    pruned = []
    while not (home / "runs").exists():
        shown = zygote.run(home, ("cache",)).wait()
        assert (shown.code, shown.err) == (0, "")
        pruned.append(zygote.run(home, PRUNE).wait())
    assert {result.code for result in pruned} <= {0, 2}
    assert all("another process is at work" in result.err for result in pruned if result.code)
    assert "Traceback" not in worker.wait().err
    assert zygote.run(home, TWICE).code == 0
    assert differing(content(home), twice) == []
