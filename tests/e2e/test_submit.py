"""`submit`: from finished runs to what a pull request needs, in an empty folder and in a checkout."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import Call, edit, put
from worstgroup.authoring import contract, scaffold
from worstgroup.authoring.contract import CHECKS, Verdict
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.benchmark.record import find, read
from worstgroup.leaderboard import submission

Pick = Callable[[str], Path]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` has nothing to say: it takes seconds, and other tests are about it."""
    monkeypatch.setattr(contract, "verdicts", lambda method: iter([Verdict("runs", "ok", 0.0, "")]))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that passes for the checkout, to work in."""
    folder = tmp_path / "checkout"
    (folder / ".git").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    monkeypatch.setattr(scaffold, "PACKAGE", folder)
    monkeypatch.chdir(folder)
    return folder


def names(folder: Path) -> set[str]:
    """Files below a folder, records by method, seed and suffix."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {re.sub(r"/tiny_cnn/(\w+)-[a-z+-]+(-s\d)-[0-9a-f]{12}", r"/\1\2", str(file)) for file in files}


def made(*methods: str, seeds: str = "01") -> set[str]:
    """What `names` says of these records of `tiny`."""
    return {f"tiny/{method}-s{seed}.{end}" for method in methods for seed in seeds for end in ("json", "npz")}


# ---------------------------------------------------------------------------------------------------------- happy paths


def test_a_new_method_is_handed_in(fresh: Call) -> None:
    plugin = ("--plugin", "mine.py")
    assert fresh("new-method", "mine").code == 0
    run = ("run", "--dataset", "tiny", "--method", "erm,mine", "--seeds", "0,1,2", "--jobs", "1", "--quiet")
    assert fresh(*run, *plugin).code == 0
    done = fresh("submit", "mine", *plugin)
    assert (done.code, done.err) == (0, ""), done
    folder = Path.cwd() / "submission-mine"
    assert done.out.splitlines()[0] == f"wrote 3 runs of mine and 3 of erm: {folder}"
    results = {f"results/{name}" for name in made("mine", "erm", seeds="012")}
    assert names(folder) == {"SUBMISSION.md", "environment.json", "mine.py", *results}
    assert (folder / "mine.py").read_bytes() == Path("mine.py").read_bytes()
    (environment,) = json.loads((folder / "environment.json").read_text())
    assert environment["runs"] == 6
    assert {"torch", "numpy", "worstgroup"} <= environment["versions"].keys()

    text = (folder / "SUBMISSION.md").read_text()
    assert text.startswith("# mine\n\n`mine`: ERM with the loss of every image weighted")
    assert re.search(r"^\| mine +\| train\+val +\| \d+ +\| \d+\.\d \[", text, re.MULTILINE)
    assert f"- [x] `worstgroup check mine`: {len(CHECKS)} checks, 0 failed" in text
    assert "- [x] `worstgroup verify`: 6 records, 6 level answers; 6 dataset fingerprints checked" in text
    assert "- [x] nothing stale, failed or missing" in text
    assert "- Licence of the code: (to be filled in)" in text
    verified = fresh("verify", folder)
    assert (verified.code, verified.err) == (0, "")
    assert "6 verified, level answers" in verified.out
    assert "6 dataset fingerprints checked" in verified.out


@pytest.mark.usefixtures("runs", "unchecked")
def test_in_a_checkout_results_lie_with_the_others(call: Call, checkout: Path, pick: Pick) -> None:
    done = call("submit", "groupdro")
    results, folder = checkout / "leaderboard" / "results", checkout / "leaderboard" / "submissions" / "groupdro"
    assert done.code == 0
    assert done.err == "groupdro on tiny · tiny_cnn · train+val: 2 of 3 seeds, missing: 2\n"
    assert names(results) == made("groupdro", "erm")
    assert names(folder) == {"SUBMISSION.md", "environment.json"}  # the method's file is in methods/
    assert not list(checkout.rglob(f"{TEMPORARY}*"))
    text = (folder / "SUBMISSION.md").read_text()
    assert "- [ ] nothing stale, failed or missing" in text
    assert "  - groupdro on tiny · tiny_cnn · train+val: 2 of 3 seeds, missing: 2" in text
    assert call("verify", results).code == 0

    again = call("submit", "groupdro")
    assert again.code == 2
    assert f"{folder} exists already; move it away" in again.err
    before = {path: path.read_bytes() for path in results.rglob("*.*")}
    edit(pick("erm"), put("created", "2030-01-01T00:00:00+00:00"))  # made anew, after others were compared with it
    other = call("submit", "dfr")
    assert other.code == 0
    assert f"{pick('erm').name}: made anew, but {results} has this run already, which stays as it is" in other.err
    assert other.err.count("made anew") == 1
    assert names(results) == made("groupdro", "erm", "dfr")
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.usefixtures("runs", "unchecked", "checkout")
def test_a_folder_that_is_named_is_taken_in_a_checkout_too(call: Call, tmp_path: Path, runs: Path) -> None:
    shutil.move(runs, tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()  # an empty one is as good as none
    done = call("submit", "dfr", "--output", tmp_path / "out", "--path", tmp_path / "elsewhere")
    assert done.code == 0, done
    assert names(tmp_path / "out" / "results") == made("dfr", "erm")


@pytest.mark.usefixtures("here", "runs")
def test_a_failed_check_is_shown(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(method: str) -> Iterator[Verdict]:
        assert method == "erm"
        yield Verdict("runs", "ok", 0.0, "")
        yield Verdict("billing", "failed", 0.0, "something is\nnot billed")

    monkeypatch.setattr(contract, "verdicts", verdicts)
    done = call("submit", "erm")
    assert done.code == 0
    assert "worstgroup check erm: billing FAILED: something is not billed" in done.err
    text = Path("submission-erm/SUBMISSION.md").read_text()
    assert "- [ ] `worstgroup check erm`: 2 checks, 1 failed\n  - billing: something is not billed\n" in text


@pytest.mark.usefixtures("here", "unchecked")
def test_what_is_stale_or_failed_or_alone_is_named(call: Call, runs: Path, pick: Pick) -> None:
    old = pick("groupdro")
    edit(old, put("code", "0" * 16))
    edit(old, put("run", read(old).identity_hash()))
    for path in runs.rglob("erm-*.json"):
        edit(path, lambda content: content.update(status="failed", error="no luck"))
    done = call("submit", "groupdro")
    assert done.code == 0
    assert f"{old.name}: stale, the code of groupdro has changed since; left out" in done.err
    assert "groupdro on tiny · tiny_cnn · train+val: 1 of 3 seeds, missing: 0, 2" in done.err
    assert "no run of erm on tiny · tiny_cnn with the same recipe: nothing to compare with" in done.err
    assert names(Path("submission-groupdro/results")) == made("groupdro", seeds="1")


@pytest.mark.usefixtures("here", "unchecked")
def test_what_foreign_records_say_is_shown_on_one_line(call: Call, runs: Path, pick: Pick) -> None:
    foreign = runs.rename(runs.with_name("foreign"))
    (path,) = foreign.rglob("groupdro-*-s1-*.json")
    edit(path, lambda content: content.update(status="failed", error="no luck\x1b[2J\x1b]0;pwned\x07\nall well"))
    done = call("submit", "groupdro", "--path", foreign)
    assert done.code == 0
    assert f"{path.name}: failed, left out: no luck [2J ]0;pwned  all well" in done.err
    assert all(line.isprintable() for line in done.err.splitlines())


@pytest.mark.usefixtures("here", "unchecked")
def test_runs_on_a_backbone_that_has_changed_are_named(call: Call, runs: Path, pick: Pick) -> None:
    for path, field, value in (
        (pick("groupdro"), "backbone_code", "0" * 16),
        (pick("erm"), "backbone_code", "0" * 16),
        (next(runs.rglob("groupdro-*-s1-*.json")), "backbone", "homemade"),
    ):
        edit(path, put(field, value))
        edit(path, put("run", read(path).identity_hash()))
    done = call("submit", "groupdro")
    assert done.code == 2
    assert f"{pick('groupdro').name}: stale, the code of backbone tiny_cnn has changed since; left out" in done.err
    assert "stale, backbone homemade is not known here; name its file with --plugin; left out" in done.err
    done = call("submit", "erm")
    assert done.code == 0
    assert f"{pick('erm').name}: stale, the code of backbone tiny_cnn has changed since; left out" in done.err
    assert names(Path("submission-erm/results")) == made("erm", seeds="1")


# --------------------------------------------------------------------------------------------------------- refusals


def stale(runs: Path) -> None:
    for path in runs.rglob("dfr-*.json"):
        edit(path, put("code", "0" * 16))


def falsified(runs: Path) -> None:
    for path in runs.rglob("dfr-*.json"):
        edit(path, put("metrics.wga", 0.99))


def unreadable(runs: Path) -> None:
    next(runs.rglob("dfr-*.json")).write_text("{")


REFUSED: dict[str, tuple[tuple[str, ...], Callable[[Path], object], tuple[str, ...]]] = {
    "unknown": (("dfrr",), lambda runs: None, ("unknown method 'dfrr'. Did you mean dfr",)),
    "unknown source": (("dfr+exmpa",), lambda runs: None, ("unknown source 'exmpa'",)),
    "none": (
        ("afr",),
        lambda runs: None,
        ("no finished run of afr", "`worstgroup run --dataset digits2 --method erm,afr`"),
    ),
    "another policy": (("dfr@class",), lambda runs: None, ("no finished run of dfr@class", "There are runs of dfr.")),
    "stale": (("dfr",), stale, ("dfr-val-s0-", "dfr-val-s1-", "stale", "no run of dfr is of its code as it is now")),
    "falsified": (("dfr",), falsified, ("dfr-val-s0-", "dfr-val-s1-", "does not verify: metrics.wga")),
    "unreadable": (("dfr",), unreadable, ("dfr-val-s", "Invalid JSON")),
    "no folder": (("dfr", "--path", "gone"), lambda runs: None, ("gone: there is no such folder of records",)),
    "taken": (("dfr", "--output", "full"), lambda runs: None, ("full exists already; move it away",)),
    "a file": (("dfr", "--output", "full/file"), lambda runs: None, ("full/file exists already",)),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_handed_in_is_refused(call: Call, here: Path, runs: Path, case: str) -> None:
    arguments, spoil, says = REFUSED[case]
    (here / "full").mkdir()
    (here / "full" / "file").write_text("precious")
    spoil(runs)
    done = call("submit", *arguments)
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert all(line.startswith("error: ") for line in done.err.splitlines())
    for text in says:
        assert text in done.err
    assert names(here) == {"full/file"}


@pytest.mark.usefixtures("here", "runs", "unchecked")
def test_nothing_is_half_written(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submission, "environments", interrupted)
    assert call("submit", "dfr").code == 130
    assert list(Path.cwd().iterdir()) == []


def test_unreadable_records_of_others_do_not_matter(
    call: Call, here: Path, runs: Path, unchecked: None, pick: Pick
) -> None:
    pick("groupdro").write_text("{")
    assert call("submit", "dfr").code == 0
    assert len(list(find(here / "submission-dfr"))) == 4
