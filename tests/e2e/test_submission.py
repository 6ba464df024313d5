"""A method as its author meets the suite: written by `new-method`, judged by `check`, run, edited, installed."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Call, Result, finish, start
from worstgroup.authoring import scaffold
from worstgroup.authoring.contract import CHECKS
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.benchmark.record import find, read

PACKAGE = Path(__file__).parents[1] / "package"


def states(done: Result) -> dict[str, str]:
    """Check -> ok, n/a or FAILED, from what `check` printed."""
    return {line.split()[1]: line.split()[0] for line in done.out.splitlines()}


# ------------------------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize("name", ["erm", "dfr@class"])
def test_check_prints_a_line_per_check(call: Call, home: Path, name: str) -> None:
    done = call("check", name)
    assert (done.code, done.err) == (0, "")
    assert states(done) == dict.fromkeys(CHECKS, "ok")
    assert all(re.match(r"ok +[a-z-]+ +\d+\.\d s", line) for line in done.out.splitlines())
    assert not home.exists()  # it worked in homes of its own


def test_check_shows_where_a_method_does_not_run(call: Call) -> None:
    done = call("check", "ex2l")
    assert done.code == 0
    assert re.search(r"^ok +budget .* n/a at none, .*: needs val-5 or richer$", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gruopdro", "Did you mean groupdro"),
        ("dfr+nothing", "unknown source 'nothing'"),
        ("dfr@nothing", "unknown policy"),
        ("dfr+", "write HOST"),
    ],
)
def test_check_of_an_unknown_name_exits_with_2(call: Call, name: str, says: str) -> None:
    done = call("check", name)
    assert (done.code, done.out) == (2, "")
    assert says in done.err


CRASHING = '''"""Crashing."""
from worstgroup import Requires, method
@method("crashing", paper="none", requires=Requires())
class Crashing:
    """Divides by zero."""
    def __init__(self, config): ...
    def fit(self, task): return 1 / 0
'''


def test_a_method_that_raises_is_a_failed_check(fresh: Call) -> None:
    Path("crashing.py").write_text(CRASHING)
    done = fresh("check", "crashing", "--plugin", "crashing.py")
    assert (done.code, done.err) == (1, "")
    assert states(done) == {"documented": "ok", "runs": "FAILED"}  # nothing else can be said of it
    assert "ZeroDivisionError: division by zero (crashing.py:7)" in done.out


def test_a_method_that_cannot_run_at_home_is_a_failed_check(call: Call) -> None:
    done = call("check", "erm@class")
    assert done.code == 1
    assert "cannot run at its native budget: it uses no groups" in done.out


# -------------------------------------------------------------------------------------------------------- new-method


def test_a_new_method_passes_its_check_and_runs(fresh: Call, home: Path) -> None:
    done = fresh("new-method", "my-first")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        f"wrote {Path.cwd() / 'my_first.py'}",
        "next:",
        "  worstgroup check my-first --plugin my_first.py",
        "  worstgroup run --dataset digits2 --method erm,my-first --plugin my_first.py",
    ]
    assert [path.name for path in Path.cwd().iterdir()] == ["my_first.py"]
    checked = fresh("check", "my-first", "--plugin", "my_first.py")
    assert checked.code == 0, checked.out
    assert states(checked) == dict.fromkeys(CHECKS, "ok")

    run = ("run", "--dataset", "tiny", "--method", "my-first", "--plugin", "my_first.py", "--seeds", "0", "--jobs", "1")
    assert fresh(*run).code == 0
    assert [read(path).method for path in find(home / "runs")] == ["my-first"]
    bad = fresh(*run, "--set", "power=2")
    assert (bad.code, bad.err) == (2, "error: my-first.power must be from 0 to 1, got 2.0\n")


def test_an_edited_method_is_stale(fresh: Call, home: Path) -> None:
    assert fresh("new-method", "mine").code == 0
    file = Path("mine.py")
    plugin = ("--plugin", file)
    run = ("run", "--dataset", "tiny", "--method", "mine", "--seeds", "0", "--jobs", "1", *plugin)
    assert fresh(*run).code == 0
    (path,) = find(home / "runs")
    first = read(path).run[:12]
    assert first not in fresh("ls", "runs", "--stale", *plugin).out

    file.write_text(file.read_text() + "\n# a comment changes nothing\n")
    assert first not in fresh("ls", "runs", "--stale", *plugin).out
    assert "1 of 1 runs are finished already" in fresh(*run).err

    file.write_text(file.read_text().replace("weights / weights.mean()", "weights / weights.max()"))
    assert first in fresh("ls", "runs", "--stale", *plugin).out
    assert fresh(*run).code == 0
    both = fresh("ls", "runs", *plugin).out
    (second,) = {read(path).run[:12] for path in find(home / "runs")} - {first}
    stale = fresh("ls", "runs", "--stale", *plugin).out
    assert first in both
    assert second in both
    assert first in stale
    assert second not in stale


def test_an_existing_file_is_not_overwritten(fresh: Call) -> None:
    Path("mine.py").write_text("precious")
    done = fresh("new-method", "mine")
    assert done.code == 2
    assert f"{Path.cwd() / 'mine.py'} exists already" in done.err
    assert Path("mine.py").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("groupdro", "is taken"),
        ("Mine", "lowercase"),
        ("1st", "beginning with a letter"),
        ("-x", "-x"),
        ("_mine", "beginning with a letter"),
        ("my.method", "lowercase"),
        ("../mine", "lowercase"),
        ("dfr+mine", "lowercase"),
        ("", "lowercase"),
        ("lambda", "no word of Python's own"),
        ("a" * 41, "up to 40"),
        ("torch", "would hide the Python module 'torch'"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(fresh: Call, name: str, says: str) -> None:
    done = fresh("new-method", name)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert "Traceback" not in done.err
    assert list(Path.cwd().iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(fresh: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: Path("/proc/nowhere"))
    done = fresh("new-method", "mine")
    assert done.code == 2
    assert "cannot write /proc/nowhere" in done.err


# -------------------------------------------------------------------------------------------------------- a checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package with what makes it a checkout, under its import name."""
    package = tmp_path / "copy" / "worstgroup"
    ignore = shutil.ignore_patterns("__pycache__", "tests", ".git", "shared", ".*_cache")
    shutil.copytree(scaffold.PACKAGE, package, ignore=ignore)
    (package / ".git").mkdir()
    return package


def test_in_a_checkout_it_lies_among_the_methods(checkout: Path) -> None:
    """Found by being there, and the linter has nothing to say; a name that the file itself uses is no trouble."""
    for name in ("in-house", "config"):
        written = scaffold.new_method(name, checkout / "leaderboard", checkout)
        assert written.path == checkout / "methods" / f"{name.replace('-', '_')}.py"
        assert written.commands[0] == f"worstgroup check {name}"
    assert not list(checkout.rglob(f"{TEMPORARY}*"))
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "methods"]
        done = subprocess.run(ruff, cwd=checkout, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "from worstgroup.authoring.contract import verdicts\n"
        "print({verdict.state for name in ('in-house', 'config') for verdict in verdicts(name)})"
    )
    environment = {**os.environ, "PYTHONPATH": str(checkout.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "{'ok'}\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sqrt-reweight", "SqrtReweight"), ("a_b-2", "AB2"), ("config", "ConfigMethod"), ("f", "FMethod")],
)
def test_class_names(name: str, expected: str) -> None:
    assert scaffold.class_name(name) == expected


def test_what_is_no_checkout(checkout: Path, tmp_path: Path) -> None:
    assert scaffold.in_checkout(checkout / "methods", checkout)
    assert not scaffold.in_checkout(tmp_path, checkout)
    (checkout / ".git").rmdir()
    assert not scaffold.in_checkout(checkout, checkout)  # as when installed


@pytest.mark.parametrize("name", ["blocks", "groups"])
def test_in_a_checkout_a_folder_of_that_name_is_in_the_way(checkout: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"methods/{name} exists already"):
        scaffold.new_method(name, checkout, checkout)


# --------------------------------------------------------------------------------------------- a package of its own


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """The program where the example package is installed, in a home of its own."""
    folder = tmp_path_factory.mktemp("package")
    source, site = shutil.copytree(PACKAGE, folder / "source"), folder / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", site, source], check=True, timeout=300)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*arguments: str) -> Result:
        return finish(start(folder / "home", *arguments, PYTHONPATH=path, OMP_NUM_THREADS="1"))

    return run


def test_method_dataset_and_backbone_of_a_package_run_together(installed: Callable[..., Result]) -> None:
    names = ("--dataset", "example-noise", "--method", "erm,example-smooth", "--backbone", "example_conv")
    done = installed("run", *names, "--seeds", "0", "--jobs", "1")
    assert done.code == 0, done
    assert "example-noise · example_conv" in done.out
    assert re.search(r"^ *example-smooth ", done.out, re.MULTILINE)
    listed = installed("ls", "methods")
    assert re.search(r"example-smooth +│ none +│ Label smoothing, from a package", listed.out)


def test_check_passes_for_the_method_of_a_package(installed: Callable[..., Result]) -> None:
    done = installed("check", "example-smooth")
    assert (done.code, done.err) == (0, ""), done
    assert states(done) == dict.fromkeys(CHECKS, "ok")
