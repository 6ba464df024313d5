"""The built wheel works without the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "worstgroup"]


def call(*command: str, cwd: Path, **environment: str) -> str:
    import os

    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the files that git tracks, so that no leftover of the checkout gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source), cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_what_it_needs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    python = {
        f"worstgroup/{path.relative_to(ROOT)}"
        for folder in ("benchmark", "methods", "datasets", "leaderboard")
        for path in (ROOT / folder).rglob("*.py")
    }
    suites = {f"worstgroup/{path.relative_to(ROOT)}" for path in (ROOT / "benchmark" / "suites").glob("*.toml")}
    page = {f"worstgroup/{path.relative_to(ROOT)}" for path in (ROOT / "leaderboard" / "page").rglob("*.*")}
    roots = {f"worstgroup/{path.name}" for path in ROOT.glob("*.py")}
    assert python | suites | page | roots | {"worstgroup/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("/tests/" in name for name in names)


def test_installed_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "install", "--quiet", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    environment = {"PYTHONPATH": str(site), "WORSTGROUP_HOME": str(tmp_path / "home")}
    where = call(sys.executable, "-c", "import worstgroup; print(worstgroup.__file__)", cwd=tmp_path, **environment)
    assert Path(where.strip()).is_relative_to(site)
    assert "mini" in call(*PROGRAM, "ls", "suites", cwd=tmp_path, **environment)
    run = ("run", "--dataset", "digits2", "--method", "erm", "--seeds", "0", "--set", "recipe.epochs=1")
    assert "digits2" in call(*PROGRAM, *run, cwd=tmp_path, **environment)
    assert "1 records, 0 with differences" in call(*PROGRAM, "verify", cwd=tmp_path, **environment)
