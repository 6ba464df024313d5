"""The pages tell the truth: their examples run, their links lead somewhere, and `--help` explains every option.

Pages are README, CONTRIBUTING and those of `docs/`. A page is one session in an empty folder: its blocks are tried from
top to bottom, each as far as that is cheap. A block that is a file says so: ```` ```python title="my_method.py" ````.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from formats.embeddings import write_npz
from formats.folder import rows, write_folder
from formats.waterbirds import write_release
from helpers import Call
from rich.text import Text
from worstgroup import cli
from worstgroup.benchmark import profiling
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.registry import BACKBONES, DATASETS, METHODS, SOURCES
from worstgroup.benchmark.suite import read_suite

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT)): path for path in (*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")))}
del PAGES["CHANGELOG.md"]  # it tells of what was, too
LANGUAGES = {"sh", "python", "toml", "text", "csv"}
OTHERS = ("pip", "pytest", "git", "cd", "sbatch", "rsync", ".ci/run")
"""Other programs that pages call; here they do nothing."""
FOREIGN = {"--benchmark-enable", "--dist", "--array"}
"""Options of theirs that the text names."""
SLURM = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is the content of (or empty), and its text."""

    language: str
    title: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    for info, text in re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", PAGES[page].read_text(), re.MULTILINE | re.DOTALL):
        language, _, title = info.partition(" ")
        yield Block(language, title.removeprefix('title="').removesuffix('"'), text)


def prose(page: str) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", PAGES[page].read_text(), flags=re.MULTILINE | re.DOTALL)


def calls(script: str, folder: Path) -> list[list[str]]:
    """What a shell script calls `worstgroup` with, told by bash itself; an unknown program is an error."""
    stubs = "".join(f"{name}() {{ :; }}\n" for name in OTHERS)
    teller = (
        "worstgroup() { local IFS=$'\\037'; printf '%s\\037\\036' \"$*\" >&3; }\n"  # at once: some run side by side
    )
    told = folder.parent / "calls"
    head = f"set -eu\nexec 3>{told}\n"
    done = subprocess.run(
        ["bash", "-c", head + stubs + teller + script],
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **SLURM},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (script, done.stderr)
    return [call.split("\037")[:-1] for call in told.read_text().split("\036")[:-1]]


# ---------------------------------------------------------------------------------------------------------- examples


@pytest.fixture
def files(home: Path, tmp_path: Path) -> Path:
    """A folder with the files that pages speak of, drawn; Waterbirds lies where `prepare` would put it."""
    write_release(home / "data" / "waterbirds")
    for folder in (tmp_path, tmp_path / "here"):
        folder.mkdir(exist_ok=True)
    here = tmp_path / "here"
    write_npz(here / "features.npz")
    write_folder(here / "my-pictures")
    ours = {"cat": "landbird", "dog": "waterbird", "grass": "land", "sofa": "water"}
    write_folder(here / "my-birds", [(name, split, ours[y], ours[a]) for name, split, y, a in rows()])
    return here


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, fresh: Call, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session: dict[str, Any] = {"__name__": page}
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        if block.title:
            (files / block.title).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), session)
        if block.language == "toml":
            check_toml(files / block.title)
        if block.language == "sh":
            for words in calls(block.text, files):
                attempt(words, fresh, monkeypatch)


def check_toml(file: Path) -> None:
    """A suite can be read; a package's entry points are of groups that there are."""
    if file.name != "pyproject.toml":
        assert list(read_suite(str(file)).requests())
        return
    groups = tomllib.loads(file.read_text())["project"]["entry-points"]
    assert set(groups) <= {registry._group for registry in (METHODS, SOURCES, DATASETS, BACKBONES)}


def attempt(words: list[str], call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command: every word is read by the real parser; what is cheap is done, `run` is rehearsed."""
    parse(words)
    if words[0] == "profile" and "gpu" not in words:
        with monkeypatch.context() as patch:
            patch.setattr(profiling, "_Bench", planned)
            done = call(*words)
            assert (done.code, done.err) == (2, f"error: {PLANNED}\n"), (words, done.err)
    elif (words := rehearsal(words)) is not None:
        done = call(*words)
        assert done.code == 0, (words, done.out, done.err)


PLANNED = "all that was asked for can be measured"


def planned(*_: object) -> None:
    """Stands for what measures, once everything is planned."""
    raise UserError(PLANNED)


def rehearsal(words: list[str]) -> list[str] | None:
    """A command as it is tried here; None where it needs a network, official files, a run of the reader's, minutes."""
    command, own = words[0], {"--download", "--check", "--update", "--costs"} & set(words)
    theirs = any(word == "DIR" or word.startswith(("/", "leaderboard/")) for word in words)
    if command in ("explain", "submit", "embed", "profile") or own or theirs:
        return None
    small = {"run": ["--dry-run"], "tune": ["--draws", "2", "--jobs", "1"]}
    if command == "tune" or {"--plugin", "digits2"} <= set(words):  # a method of the page is run, on tiny images
        words = ["tiny" if word == "digits2" else word for word in words]
        small["run"] = ["--seeds", "0", "--jobs", "1"]
    return [*words, *small.get(command, [])]


def parse(words: list[str]) -> None:
    """Read a command line without doing anything; raises for an option or a value that is wrong."""
    if words != ["--help"]:
        command = commands()[words[0]]
        command.make_context(words[0], list(words[1:]))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "mini", "--shards", "1/2"], "--shards"),
        (["profile", "--size", "big"], "valid int"),
        (["board", "--format", "pdf"], "pdf"),
        (["check"], "(?i)missing .*method"),
    ],
)
def test_a_wrong_option_in_a_page_would_be_noticed(words: list[str], says: str) -> None:
    with pytest.raises(Exception, match=says):
        parse(words)


def test_scripts_are_read_as_a_shell_does(files: Path) -> None:
    script = 'cd there && worstgroup run "a b" \\\n  --seeds 0,1  # why\nworstgroup ls "$SLURM_ARRAY_TASK_ID/3"\n'
    assert calls(script, files) == [["run", "a b", "--seeds", "0,1"], ["ls", "2/3"]]
    with pytest.raises(AssertionError, match="worstgruop"):
        calls("worstgruop run mini\n", files)


# ------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by on GitHub."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_linked_from_the_readme() -> None:
    readme = PAGES["README.md"].read_text()
    assert [page for page in PAGES if page.startswith("docs/") and f"({page})" not in readme] == []


def test_the_readme_names_all_there_is() -> None:
    """A new process is asked: other tests register entries of their own in this one."""
    code = "from worstgroup.benchmark.registry import *; print(*METHODS, *SOURCES, *DATASETS, *BACKBONES)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(there) > 60
    names = set(re.findall(r"`([\w.]+)(?::NAME)?`", PAGES["README.md"].read_text()))
    private = {"tiny", "generated"}  # for checks and measurements
    assert set(there) - private - names == set()


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_closed_and_named(page: str) -> None:
    fences = re.findall(r"^ *```.*$", PAGES[page].read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(list(blocks(page)))


# ---------------------------------------------------------------------------------------------------------- options


def commands() -> dict[str, Any]:
    """The parser of each command, by its name; typer has its own copy of click, so that they have no type of ours."""
    return dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def options(command: Any) -> set[str]:
    return {"--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))}


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_exist(page: str) -> None:
    known = {name: options(command) for name, command in commands().items()}
    anywhere = FOREIGN.union(*known.values())
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        command = code.split()[1] if code.startswith("worstgroup ") else ""
        assert not command or command in known or command == "--help", code
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", code))
        assert named <= known.get(command, anywhere), code


@pytest.mark.parametrize("name", commands())
def test_help_explains_every_option(name: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    command = commands()[name]
    assert command.help
    for parameter in command.params:
        text = getattr(parameter, "help", None)
        assert text, parameter.name
        assert text.endswith("."), (parameter.name, text)
        assert Text.from_markup(text).plain == text.replace("\\[", "["), (
            f"{parameter.name}: write \\[, rich eats the rest"
        )
    shown = call(name, "--help")
    assert shown.code == 0
    assert all(option in shown.out for option in options(command))


def test_help_lists_every_command(call: Call) -> None:
    shown = call("--help").out
    assert all(re.search(rf"^\W*{name}\b", shown, re.MULTILINE) for name in commands())


# --------------------------------------------------------------------------------------------------------- citation


def test_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    def field(name: str) -> list[str]:
        return re.findall(rf'^{name}: "?([^"\n]+)"?$', text, re.MULTILINE)

    assert (field("cff-version"), field("type"), field("version")) == (["1.2.0"], ["software"], [version])
    assert field("license") == ["Apache-2.0"]
    assert field("message")
    assert field("title") == ["worstgroup"]
    assert "\t" not in text
    assert f"version = {{{version}}}" in PAGES["README.md"].read_text()
    papers = ("ExMap:", "Mitigating Spurious Correlation in Images by Intervention", "eX2L", "ClusterFix:")
    assert all(paper in text for paper in papers)
