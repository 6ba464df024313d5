"""Every command as users meet it, by the program's `main` in this process."""

import csv
import io
import itertools
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from helpers import Call, Result, edit, prediction_files, put
from rich.console import Console
from worstgroup import cli
from worstgroup.benchmark.budget import RUNGS
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.benchmark.record import find, predictions_path, read
from worstgroup.benchmark.registry import BACKBONES, DATASETS, METHODS
from worstgroup.commands.console import RunReporter

RUN = ("run", "--dataset", "tiny", "--method", "erm,groupdro,dfr", "--seeds", "0,1")


def assert_refused(result: Result, *says: str) -> None:
    """Exit code 2 and a message for people: every line says what is wrong, and nothing is a traceback."""
    assert result.code == 2, result
    assert "Traceback" not in result.err
    assert result.out == ""
    assert result.err.splitlines()
    assert all(line.startswith("error: ") for line in result.err.splitlines()), result.err
    for text in says:
        assert text in result.err


# ------------------------------------------------------------------------------------------------------- ls and show


@pytest.mark.parametrize("kind", [kind.value for kind in cli.Kind])
def test_ls_lists_every_kind(call: Call, runs: Path, kind: str) -> None:
    expected = {
        "datasets": {"digits2", "digits2:balval", "cmnist:bin99", "tiny"},
        "methods": set(METHODS),
        "backbones": set(BACKBONES),
        "budgets": set(RUNGS),
        "suites": {"mini", "cmnist-mini"},
        "sources": set(),
        "runs": {read(path).run[:12] for path in find(runs)},
    }[kind]
    done = call("ls", kind)
    assert (done.code, done.err) == (0, "")
    for name in expected:
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", done.out), name


def test_the_version_is_that_of_the_package(call: Call) -> None:
    done = call("--version")
    assert (done.code, done.out) == (0, f"worstgroup {version('worstgroup')}\n")


def test_ls_runs_of_an_empty_home(call: Call) -> None:
    assert call("ls", "runs").code == 0


def test_ls_stale_shows_runs_of_other_code(call: Call, runs: Path, pick: Callable[[str], Path]) -> None:
    path = pick("dfr")
    edit(path, put("code", "0" * 16))
    shown = call("ls", "runs", "--stale").out
    assert read(path).run[:12] in shown
    assert sum(read(other).run[:12] in shown for other in find(runs)) == 1
    assert "stale" in call("ls", "runs").out


def test_runs_on_an_edited_backbone_are_stale(call: Call, runs: Path, pick: Callable[[str], Path]) -> None:
    edit(pick("dfr"), put("backbone_code", "0" * 16))
    edit(pick("erm"), put("backbone", "homemade"))
    shown = call("ls", "runs", "--stale").out
    expected = {read(pick(name)).run[:12] for name in ("dfr", "erm")}
    assert set(re.findall(r"\b[0-9a-f]{12}\b", shown)) == expected


SHOWN = {
    "tiny": ["classes: low, high", "low/off/off", "30 / 12 / 6", "default backbone: tiny_cnn"],
    "digits2:balval": ["dataset digits2:balval", "citation: "],
    "cmnist:bin99": ["digit 0-4/red", "source: "],
    "groupdro": ["method groupdro", "step_size = 0.01", "native budget: train+val"],
    "erm": ["method erm", "no settings"],
    "tiny_cnn": ["backbone tiny_cnn", "weights: none"],
    "resnet18": ["backbone resnet18", "imagenet1k_v1"],
    "train+val": ["budget train+val", "selection: val-wga"],
    "mini": ["suite mini", "seeds: [0, 1, 2]", "digits2 · tiny_cnn · erm"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_show_prints_a_card(call: Call, name: str) -> None:
    done = call("show", name)
    assert (done.code, done.err) == (0, "")
    for text in SHOWN[name]:
        assert text in done.out


@pytest.mark.parametrize("name", [*METHODS, *BACKBONES, *RUNGS])
def test_show_knows_what_ls_lists(call: Call, name: str) -> None:
    assert call("show", name).code == 0


def test_show_of_a_foreign_suite_does_not_command_the_terminal(call: Call, tmp_path: Path) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text('summary = "mine\\u001b[2J"\n[[blocks]]\ndataset = "tiny\\u001b[2J"\nmethods = ["erm"]\n')
    done = call("show", suite)
    assert done.code == 0
    assert "mine [2J" in done.out
    assert all(line.isprintable() for line in done.out.splitlines())


def test_show_knows_every_variant(call: Call) -> None:
    for name in DATASETS:
        for card in DATASETS[name].cards.values():
            assert f"dataset {card.name}\n" in call("show", card.name).out


def test_show_offers_what_is_close(call: Call) -> None:
    assert_refused(call("show", "gruopdro"), "unknown name 'gruopdro'", "Did you mean groupdro")


# --------------------------------------------------------------------------------------------------------------- run


def test_dry_run_says_what_would_run(call: Call, home: Path, runs: Path) -> None:
    done = call(*RUN[:-1], "0,1,2", "--dry-run")
    assert done.code == 0
    lines = done.out.partition("\n\n")[0].splitlines()
    assert len(lines) == 9
    for line in lines:
        assert (": to run" if "seed 2" in line else ": finished") in line
    assert len(list(runs.rglob("*.json"))) == 6
    assert not (home / "artifacts").exists()


def test_quiet_prints_only_the_table(call: Call) -> None:
    done = call(*RUN, "--quiet", "--jobs", "1")
    assert done.err == ""
    assert "tiny · tiny_cnn" in done.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("epoch", [1, 3, 5])
def test_a_signal_ends_it_and_the_same_command_goes_on(
    call: Call, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, epoch: int
) -> None:
    """At two epochs a training, these are the first ones of ERM, of another seed's ERM, and of GroupDRO."""
    assert call(*RUN, "--jobs", "1").code == 0
    undisturbed = prediction_files(home / "runs")
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "second"))
    epochs = itertools.count(1)

    def interrupt(self: RunReporter, *_: object) -> None:
        if next(epochs) == epoch:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunReporter, "progress", interrupt)
        done = call(*RUN, "--jobs", "1")
    assert done.code == code
    assert "Traceback" not in done.err
    assert len(prediction_files(tmp_path / "second/runs")) < 6
    assert call(*RUN, "--jobs", "1").code == 0
    assert prediction_files(tmp_path / "second/runs") == undisturbed


def test_ctrl_c_says_how_to_go_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunReporter, "progress", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    done = call(*RUN, "--jobs", "1")
    assert done.code == 130
    assert "the same command goes on where this one stopped" in " ".join(done.err.split())


def test_settings_reach_the_runs_they_name(call: Call, home: Path) -> None:
    settings = ("--set", "groupdro.step_size=0.2", "--set", "recipe.lr=0.003")
    assert call(*RUN[:-1], "4", *settings, "--jobs", "1").code == 0
    found = {read(path).method: read(path) for path in find(home / "runs")}
    assert found["groupdro"].config["step_size"] == 0.2
    assert found["dfr"].config["refits"] == 20
    assert {(record.recipe["lr"], record.seed) for record in found.values()} == {(0.003, 4)}


def test_a_budget_that_a_method_cannot_run_on_is_shown_with_its_reason(call: Call) -> None:
    rung = ("run", "--dataset", "tiny", "--seeds", "0", "--method")
    done = call(*rung, "erm,ex2l,dann,resample", "--budget", "none", "--jobs", "1")
    assert done.code == 0
    assert re.search(r"^ *ex2l +none +n/a +", done.out, re.MULTILINE)
    assert re.search(r"^ex2l at none: n/a, needs val-5 or richer *$", done.out, re.MULTILINE)
    assert re.search(r"^dann at none: n/a, ≡ erm: one environment.* not rerun *$", done.out, re.MULTILINE)
    assert re.search(r"^ *resample@class +none ", done.out, re.MULTILINE)
    again = call(*rung, "ex2l", "--budget", "none", "--dry-run")
    assert again.out == "ex2l on tiny · none: n/a (needs val-5 or richer)\n"
    assert re.search(r"^ *erm +val \(carried\)", call(*rung, "erm", "--budget", "val").out, re.MULTILINE)


def test_validation_images_can_be_trained_on(call: Call) -> None:
    run = ("run", "--dataset", "tiny", "--seeds", "0", "--jobs", "1", "--method", "erm,dfr", "--budget", "val-20")
    done = call(*run, "--extra", "val")
    assert done.code == 0
    assert re.search(r"^ *erm\(\+val\) +val-20 \(carried\) ", done.out, re.MULTILINE)
    assert re.search(r"^dfr\(\+val\) at val-20: n/a, it trains on validation images anyway", done.out, re.MULTILINE)
    assert "1 records, 0 with differences" in call("verify").out
    assert call(*run, "--extra", "test").code == 2


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shards_partition_the_runs(call: Call, parts: int) -> None:
    def runs(*options: object) -> list[str]:
        return call(*RUN[:-1], "0,1,2,3,4", "--dry-run", *options).out.partition("\n\n")[0].splitlines()

    whole = runs()
    assert len(whole) == len(set(whole)) == 15
    shards = [runs("--shard", f"{i}/{parts}") for i in range(1, parts + 1)]
    assert sorted(line for part in shards for line in part) == sorted(whole)
    if parts <= 5:
        assert all(shards)


def test_a_suite_file_of_ones_own(call: Call, tmp_path: Path, home: Path) -> None:
    suite = tmp_path / "own.toml"
    suite.write_text('summary = "x"\nseeds = [3]\n[[blocks]]\ndataset = "tiny"\nmethods = ["erm", "dfr val:stripe"]\n')
    assert call("run", suite, "--jobs", "1").code == 0
    assert sorted((read(path).budget, read(path).seed) for path in find(home / "runs")) == [
        ("none", 3),
        ("val:stripe", 3),
    ]


def test_a_run_shows_train_and_validation_when_asked(call: Call, tmp_path: Path, runs: Path) -> None:
    suite = tmp_path / "own.toml"
    for line, option, shown in (("", (), False), ("splits = true", (), True), ("", ("--splits",), True)):
        suite.write_text(f'summary = "x"\nseeds = [0]\n{line}\n[[blocks]]\ndataset = "tiny"\nmethods = ["erm"]\n')
        done = call("run", suite, "--jobs", "1", *option)
        assert done.code == 0
        assert ("wga train" in done.out) is shown
    assert "wga val" in call(*RUN, "--splits").out
    assert "wga val" not in call(*RUN).out


# ------------------------------------------------------------------------------------------ board, verify and cache


def test_board_in_three_formats(call: Call, runs: Path) -> None:
    table, markdown, lines = (call("board", "--format", form) for form in ("table", "md", "csv"))
    assert (table.code, markdown.code, lines.code) == (0, 0, 0)
    assert "tiny · tiny_cnn" in table.out
    assert markdown.out.startswith("## tiny · tiny_cnn")
    assert {line["method"] for line in csv.DictReader(io.StringIO(lines.out))} == {"erm", "groupdro", "dfr"}
    assert call("board", runs, "--format", "md").out == markdown.out


def test_board_shows_train_and_validation_when_asked(call: Call, runs: Path) -> None:
    assert "wga train" not in call("board", runs, "--format", "md").out
    for form in ("table", "md"):
        done = call("board", runs, "--format", form, "--splits")
        assert (done.code, done.err) == (0, "")
        assert "wga train" in done.out
        assert "wga val" in done.out
    assert call("board", runs, "--format", "csv", "--splits").out == call("board", runs, "--format", "csv").out


def test_board_of_nothing_says_how_to_begin(call: Call, tmp_path: Path) -> None:
    assert "worstgroup run mini" in call("board").out
    assert call("board", "--format", "md").out == "No finished run yet.\n"
    assert call("board", "--format", "csv").code == 0
    assert_refused(call("board", tmp_path / "gone"), "there is no such folder")


def test_verify_names_what_differs(call: Call, runs: Path, pick: Callable[[str], Path]) -> None:
    edit(pick("dfr"), put("metrics.wga", 0.99))
    predictions_path(pick("erm")).unlink()
    done = call("verify")
    assert done.code == 1
    assert f"{pick('dfr').name}: metrics.wga: the record says 0.99" in done.err
    assert f"{predictions_path(pick('erm'))}: cannot be read" in done.err
    assert "6 records, 2 with differences" in done.out
    assert "4 verified" in done.out
    assert call("verify", pick("groupdro")).code == 0
    assert call("verify", pick("dfr")).code == 1


def test_verify_finds_predictions_without_a_record(call: Call, runs: Path, pick: Callable[[str], Path]) -> None:
    pick("erm").unlink()
    done = call("verify")
    assert done.code == 1
    assert "predictions without a record" in done.err


def test_verify_of_nothing(call: Call, tmp_path: Path) -> None:
    assert call("verify").code == 0
    assert_refused(call("verify", tmp_path / "gone.json"), "there is no such file or folder")


def test_cache_shows_and_prunes(call: Call, home: Path) -> None:
    assert call(*RUN, "--jobs", "1", "--quiet").code == 0
    before = call("cache").out
    assert str(home) in before
    for part in ("runs", "data/store", "artifacts/erm", "artifacts/features"):
        assert part in before
    assert re.search(r"runs +12 files", before)
    pruned = call("cache", "--prune")
    assert re.match(r"freed \d+\.\d MiB\n", pruned.out)
    assert "artifacts/erm" not in pruned.out
    assert re.search(r"runs +12 files", pruned.out)
    assert "6 of 6 runs are finished already" in call(*RUN).err


# --------------------------------------------------------------------------------------------------------- bad input


BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "nothing": ((), ("name a suite",)),
    "a suite and a dataset that it lacks": (("mini", "--dataset", "tiny"), ("unknown dataset of this suite 'tiny'",)),
    "a suite and a method": (("mini", "--method", "erm"), ("a suite names its own",)),
    "a range that is none": (
        ("--dataset", "tiny", "--method", "erm", "--tuning", "2", "--search", "recipe.lr=0.1"),
        ("search range '0.1'", "write 10^U(-1,5)"),
    ),
    "a range for what all methods share": (
        ("--dataset", "tiny", "--method", "erm", "--tuning", "2", "--search", "recipe.epochs=U(1,9)"),
        ("only recipe.lr and recipe.weight_decay",),
    ),
    "a search of nothing": (
        ("--dataset", "tiny", "--method", "irm", "--search", "irm.weight=U(0,1)"),
        ("nothing is searched; say with --tuning N",),
    ),
    "a search without a value": (
        ("--dataset", "tiny", "--method", "erm", "--tuning", "2", "--search", "recipe.lr"),
        ("--search recipe.lr: write KEY=RANGE",),
    ),
    "no method": (("--dataset", "tiny"), ("--method is missing",)),
    "no dataset": (("--method", "erm"), ("--dataset is missing",)),
    "dataset": (("--dataset", "tyni", "--method", "erm"), ("unknown dataset 'tyni'", "Did you mean tiny")),
    "variant": (("--dataset", "digits2:bal", "--method", "erm"), ("'digits2:bal'", "digits2:balval")),
    "method": (("--dataset", "tiny", "--method", "groupdor"), ("unknown method 'groupdor'", "Did you mean groupdro")),
    "source": (("--dataset", "tiny", "--method", "dfr+exmpa"), ("unknown source 'exmpa'",)),
    "policy": (("--dataset", "tiny", "--method", "dfr@clas"), ("unknown policy 'clas'", "class")),
    "half a method": (("--dataset", "tiny", "--method", "dfr+"), ("method 'dfr+'", "HOST+SOURCE")),
    "backbone": (("--dataset", "tiny", "--method", "erm", "--backbone", "resnet81"), ("'resnet81'", "resnet18")),
    "backbone option": (("--dataset", "tiny", "--method", "erm", "--backbone", "tiny_cnn:x"), ("tiny_cnn:x",)),
    "backbone too deep": (("--dataset", "tiny", "--method", "erm", "--backbone", "alexnet"), ("63x63",)),
    "weights": (("--dataset", "tiny", "--method", "erm", "--weights", "imagenet"), ("no weights 'imagenet'",)),
    "weights file": (
        ("--dataset", "tiny", "--method", "erm", "--backbone", "resnet18", "--weights", "gone.pt"),
        ("gone.pt: there is no such file",),
    ),
    "suite": (("minni",), ("unknown suite 'minni'", "Did you mean", "mini")),
    "suite file": (("gone.toml",), ("gone.toml: there is no such file",)),
    "suite and budget": (("mini", "--budget", "val"), ("--budget",)),
    "budget": (("--dataset", "tiny", "--method", "erm", "--budget", "vall"), ("unknown budget 'vall'", "val")),
    "half a budget": (("--dataset", "tiny", "--method", "erm", "--budget", "val:"), ("ends in a colon",)),
    "attribute": (("--dataset", "tiny", "--method", "erm", "--budget", "val:strip"), ("'strip'", "stripe")),
    "setting": (("--dataset", "tiny", "--method", "dfr", "--set", "refit=3"), ("unknown dfr key 'refit'", "refits")),
    "setting of nothing": (("--dataset", "tiny", "--method", "dfr", "--set", "dfrr.refits=3"), ("dfrr.refits",)),
    "value": (("--dataset", "tiny", "--method", "dfr", "--set", "refits=many"), ("dfr.refits=many", "integer")),
    "value of a choice": (("--dataset", "tiny", "--method", "groupdro", "--set", "absent=x"), ("absent=x", "renorm")),
    "recipe key": (("--dataset", "tiny", "--method", "erm", "--set", "recipe.lrr=1"), ("recipe key 'lrr'", "lr")),
    "recipe value": (("--dataset", "tiny", "--method", "erm", "--set", "recipe.epochs=1.5"), ("epochs=1.5",)),
    "recipe range": (("--dataset", "tiny", "--method", "erm", "--set", "recipe.lr=-1"), ("recipe.lr", "positive")),
    "recipe range 2": (("--dataset", "tiny", "--method", "erm", "--set", "recipe.momentum=-1"), ("momentum",)),
    "recipe range 3": (("--dataset", "tiny", "--method", "erm", "--set", "recipe.weight_decay=-1"), ("weight_decay",)),
    "range of a setting": (("--dataset", "tiny", "--method", "jtt", "--set", "first_epochs=9"), ("first_epochs",)),
    "no equals": (
        ("--dataset", "tiny", "--method", "erm", "--set", "recipe.lr"),
        ("recipe.lr: write KEY=VALUE",),
    ),
    "no key": (("--dataset", "tiny", "--method", "erm", "--set", "=1"), ("--set =1: write KEY=VALUE",)),
    "seeds": (("--dataset", "tiny", "--method", "erm", "--seeds", "abc"), ("--seeds abc: write whole numbers",)),
    "half of seeds": (("--dataset", "tiny", "--method", "erm", "--seeds", "0,"), ("--seeds 0,: write whole numbers",)),
    "seeds below 0": (
        ("--dataset", "tiny", "--method", "erm", "--seeds", "-1"),
        ("seeds must be whole numbers",),
    ),
    "shard": (("--dataset", "tiny", "--method", "erm", "--shard", "3/2"), ("--shard 3/2: write i/n",)),
    "half a shard": (("--dataset", "tiny", "--method", "erm", "--shard", "2"), ("--shard 2: write i/n",)),
    "shard 0": (("--dataset", "tiny", "--method", "erm", "--shard", "0/2"), ("--shard 0/2: write i/n",)),
    "plugin": (("--dataset", "tiny", "--method", "erm", "--plugin", "gone.py"), ("gone.py: there is no such file",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(call: Call, home: Path, case: str) -> None:
    arguments, says = BAD[case]
    assert_refused(call("run", "--jobs", "1", *arguments), *says)
    assert not (home / "runs").exists()
    assert not (home / "artifacts").exists()


@pytest.mark.parametrize("arguments", [("--jobs", "-1"), ("--jobs", "two"), ("--frobnicate",)])
def test_typers_own_errors_exit_with_2_too(call: Call, arguments: tuple[str, ...]) -> None:
    done = call(*RUN, *arguments)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert arguments[0] in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            (
                "--method",
                "erm,groupdro,dfr",
                "--set",
                "groupdro.step_size=x",
                "--set",
                "recipe.lr=0",
                "--set",
                "dfr.c=1",
            ),
            ("groupdro.step_size=x", "recipe.lr must be", "unknown dfr key 'c'"),
        ),
        (
            ("--method", "bogus,dfr", "--seeds", "-1", "--set", "recipe.foo=1"),
            ("unknown method 'bogus'", "seeds must be", "unknown recipe key 'foo'"),
        ),
        (("--dataset", "nope", "--method", "bogus"), ("unknown dataset 'nope'", "unknown method 'bogus'")),
        (
            ("--method", "erm", "--budget", "vall", "--backbone", "resnet81"),
            ("unknown budget 'vall'", "unknown backbone 'resnet81'"),
        ),
    ],
)
def test_several_mistakes_are_reported_together(call: Call, arguments: tuple[str, ...], says: tuple[str, ...]) -> None:
    dataset = () if "--dataset" in arguments else ("--dataset", "tiny")
    done = call("run", *dataset, *arguments)
    assert_refused(done, *says)
    assert len(done.err.splitlines()) == len(set(done.err.splitlines())) == len(says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("summary = ", "not a TOML file"),
        ("seeds = [0]", "summary: field required"),
        ('summary = "x"\nseed = 1\n[[blocks]]\ndataset = "tiny"\nmethods = ["erm"]', "seed: extra inputs"),
        ('summary = "x"\n[[blocks]]\ndataset = "tiny"\nmethods = "erm"', "blocks.0.methods"),
    ],
)
def test_a_bad_suite_file_names_its_field(call: Call, tmp_path: Path, content: str, says: str) -> None:
    suite = tmp_path / "own.toml"
    suite.write_text(content)
    assert_refused(call("run", suite), str(suite), says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("import a_package_that_is_not_there\n", "a_package_that_is_not_there"),
        (
            "from worstgroup import dataset\n@dataset('digits2', {})\nclass D: ...\n",
            "two datasets are called",
        ),
        ("from worstgroup import Requires, method\n@method('x', paper='', requires=Requires())\nclass M: ...\n", "'x'"),
        ("raise SystemExit(3)\n", "SystemExit"),
    ],
)
def test_a_broken_plugin_is_named(call: Call, tmp_path: Path, content: str, says: str) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(content)
    assert_refused(call(*RUN, "--plugin", plugin), says)


def test_missing_data_says_what_to_put_where(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worstgroup.benchmark import store

    monkeypatch.setattr(store, "fetch_dataset", lambda card, report: pytest.fail("a test tried to download"))
    (tmp_path / "empty").mkdir()
    done = call("run", "--dataset", "cmnist:bin99", "--method", "erm", "--root", tmp_path / "empty")
    assert_refused(done, str(tmp_path / "empty"), "train-images-idx3-ubyte", "--root")
    gone = call("run", "--dataset", "cmnist:bin99", "--method", "erm", "--root", tmp_path / "gone")
    assert_refused(gone, f"--root {tmp_path / 'gone'} is not a folder")


def test_the_error_of_a_run_does_not_command_the_terminal(pick: Callable[[str], Path]) -> None:
    path, shown = pick("erm"), Console(file=io.StringIO(), width=200)
    edit(path, lambda content: content.update(status="failed", error="no luck\x1b[2J\nat all"))
    reporter = RunReporter(shown)
    reporter.begin(1, 0)
    reporter.end(read(path).spec(), read(path), 1.0)
    line = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "no luck [2J at all" in line
    assert line.rstrip("\n").isprintable()


def test_a_diverging_run_fails_alone(call: Call, home: Path, tmp_path: Path) -> None:
    suite = tmp_path / "own.toml"
    block = '[[blocks]]\ndataset = "tiny"\nmethods = ["erm", "groupdro"]\n'
    suite.write_text(f'summary = "x"\nseeds = [0]\n{block}settings = {{ "recipe.lr" = 1e30 }}\n{block}')
    done = call("run", suite, "--jobs", "1")
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "2 of 4 runs failed; the same command tries them again." in done.err
    assert len(re.findall(r"failed stage '(erm|train)': the loss is not finite at epoch 1, step [1-6] ", done.err)) == 2
    found = [read(path) for path in find(home / "runs")]
    assert sorted((record.status, record.method) for record in found) == [
        ("failed", "erm"),
        ("failed", "groupdro"),
        ("finished", "erm"),
        ("finished", "groupdro"),
    ]
    for record in found:
        if record.status == "failed":
            assert re.search(r"not finite at epoch 1, step \d+$", record.error)
            assert record.metrics == {}
    board = call("board")
    assert board.code == 0
    assert board.out.count("tiny · tiny_cnn") == 1
    assert call("verify").code == 0
    assert "failed" in call("ls", "runs").out
    assert "2 of 4 runs are finished already" in call("run", suite, "--jobs", "1").err


@pytest.mark.parametrize("command", [("board",), ("board", "--format", "md")])
def test_a_board_leaves_a_record_of_another_schema_out_and_names_it(
    call: Call, runs: Path, pick: Callable[[str], Path], command: tuple[str, ...]
) -> None:
    edit(pick("dfr"), put("schema_version", 9))
    done = call(*command)
    assert done.code == 0
    assert "left out" in done.err
    assert str(pick("dfr")) in done.err
    assert "schema_version" in done.err
    assert "groupdro" in done.out


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "of another schema": (lambda path: edit(path, put("schema_version", 9)), "schema_version: "),
    "damaged": (lambda path: path.write_text("{"), "Invalid JSON"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_ls_runs_leaves_a_bad_record_out_and_names_it(
    call: Call, runs: Path, pick: Callable[[str], Path], case: str
) -> None:
    spoil, says = SPOILT[case]
    others = {read(path).run[:12] for path in find(runs) if path != pick("dfr")}
    spoil(pick("dfr"))
    done = call("ls", "runs")
    assert done.code == 0
    assert done.err.startswith(f"left out: {pick('dfr')}: {says}")
    assert done.err.count("\n") == 1
    assert others == set(re.findall(r"\b[0-9a-f]{12}\b", done.out))


@pytest.mark.parametrize("case", SPOILT)
def test_a_run_whose_record_is_bad_says_how_to_make_it_again(
    call: Call, runs: Path, pick: Callable[[str], Path], case: str
) -> None:
    path = pick("dfr")
    before = read(path).run
    spoil, says = SPOILT[case]
    spoil(path)
    for command in (RUN, (*RUN, "--dry-run")):
        assert_refused(call(*command), f"{path}: {says}", "To have this run made again, delete that file")
    path.unlink()
    assert call(*RUN, "--jobs", "1", "--quiet").code == 0
    assert read(path).run == before


def test_a_damaged_record_of_a_failed_run_is_in_nobodys_way(
    call: Call, runs: Path, pick: Callable[[str], Path]
) -> None:
    path = pick("dfr")
    predictions_path(path).unlink()
    path.write_text("{")
    planned = call(*RUN, "--dry-run")
    assert (planned.code, planned.err) == (0, "")
    assert call(*RUN, "--jobs", "1", "--quiet").code == 0
    assert read(path).status == "finished"


# ------------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with these options; skipped where that is not allowed."""
    mounted: list[Path] = []

    def do(options: str) -> Path:
        target = tmp_path / "mounted"
        target.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a file system here")
        mounted.append(target)
        return target

    yield do
    for target in mounted:
        subprocess.run(["umount", str(target)], check=True)


@pytest.fixture(params=["below a file", "in /proc", "on a read-only disk"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nothing can be written."""
    if request.param == "below a file":
        (tmp_path / "file").write_text("")
        place = tmp_path / "file" / "home"
    elif request.param == "in /proc":
        place = Path("/proc/worstgroup")
    else:
        place = request.getfixturevalue("mount")("ro,size=1m") / "home"
    monkeypatch.setenv("WORSTGROUP_HOME", str(place))
    return place


def test_a_home_that_cannot_be_written_is_named(call: Call, unwritable: Path) -> None:
    assert_refused(call(*RUN, "--jobs", "1"), str(unwritable), "WORSTGROUP_HOME")


@pytest.mark.parametrize("command", [("board",), ("verify",), ("cache",), ("cache", "--prune"), ("ls", "runs")])
def test_reading_a_home_that_cannot_be_written(call: Call, unwritable: Path, command: tuple[str, ...]) -> None:
    done = call(*command)
    assert done.code in (0, 2)
    assert "Traceback" not in done.err


@pytest.mark.parametrize("size", ["64k", "250k", "400k", "700k", "1m"])
def test_a_full_disk_is_named_and_nothing_is_half_written(
    call: Call, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    home = mount(f"size={size}")
    monkeypatch.setenv("WORSTGROUP_HOME", str(home))
    done = call(*RUN, "--jobs", "1")
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert re.search(r"error: (cannot write .* no space left on the disk|.* are needed in .* free)", done.err)
    for path in find(home / "runs"):
        assert read(path).status == "finished"
    assert not list(home.rglob(f"{TEMPORARY}*"))
    assert call("verify").code == 0

    subprocess.run(["mount", "-o", "remount,size=20m", str(home)], check=True)
    assert call(*RUN, "--jobs", "1").code == 0
    assert "6 records, 0 with differences" in call("verify").out


# ------------------------------------------------------------------------------------------------------------ python


def test_the_python_api_makes_the_runs_of_the_command_line(call: Call, home: Path) -> None:
    import worstgroup

    record = worstgroup.run("tiny", "groupdro", seed=0, step_size=0.2)
    (path,) = find(home / "runs")
    before = path.read_bytes()
    assert call(*RUN[:3], "--method", "groupdro", "--seeds", "0", "--set", "step_size=0.2").code == 0
    assert path.read_bytes() == before
    assert json.loads(before)["run"] == record.run
    assert worstgroup.verify(path).ok
    assert np.isfinite(record.metrics["wga"] or np.nan)
