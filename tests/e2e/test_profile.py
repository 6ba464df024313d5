"""The command `profile`, by the program's `main` in this process, with as little work as it can have."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Call

SHORT = ("--dataset", "tiny", "--steps", 2, "--rounds", 2, "--warmup", 1, "--quiet")


def test_a_table_with_its_caption_and_legend(call: Call) -> None:
    done = call("profile", "--method", "groupdro,dfr", *SHORT)
    assert (done.code, done.err) == (0, "")
    for text in (
        "Training steps against ERM's",
        "erm (the unit)",
        "Stages of dfr",
        "from scratch",
        "Measured on a CPU, by process CPU time",
        "tiny_cnn on tiny, 16x16 px, batches of 16, fp32, nchw",
        "2 pairs of 2 steps after 1 to warm up",
    ):
        assert text in done.out
    row = next(line for line in done.out.splitlines() if "groupdro" in line)
    assert re.search(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", row)


def test_markdown(call: Call) -> None:
    done = call("profile", "--method", "erm", *SHORT, "--format", "md", "--stages")
    assert (done.code, done.err) == (0, "")
    assert "## Training steps against ERM's" in done.out
    assert "## Stages of erm · none, 2 epochs" in done.out
    assert sum(line.startswith("|") for line in done.out.splitlines()) >= 8


def test_csv_and_settings(call: Call) -> None:
    extra = ("--set", "recipe.precision=bf16", "--set", "recipe.channels_last=true", "--batch", 8, "--threads", 2)
    done = call("profile", "--method", "dann", *SHORT, *extra, "--format", "csv")
    assert (done.code, done.err) == (0, "")
    step, erm = csv.DictReader(io.StringIO(done.out))
    assert (step["method"], step["part"], erm["part"]) == ("dann", "step", "erm step")
    assert float(step["update_ratio"]) == pytest.approx(2 * float(step["step_ratio"]))
    assert (step["precision"], step["layout"], step["batch"], step["threads"]) == ("bf16", "nhwc", "8", "2")


def test_json_is_the_contract(call: Call) -> None:
    before = torch.get_num_threads()
    done = call("profile", "--method", "ex2l", *SHORT, "--format", "json")
    assert (done.code, done.err) == (0, "")
    content = json.loads(done.out)
    (method,) = content["methods"]
    assert content["step_ratio"] == method["step_ratio"] > 0
    assert content["clock"] == "process CPU time"
    assert method["step"]["n_fwd"] == method["step"]["n_bwd"] == 2 * content["batch"] == 32
    for key in ("device", "precision", "channels_last", "compile", "threads", "torch", "roofline"):
        assert content[key] is not None
    assert torch.get_num_threads() == before


def test_a_file_and_a_folder(call: Call, tmp_path: Path) -> None:
    arguments = ("profile", "--method", "groupdro", *SHORT, "--format", "json", "--output")
    named = call(*arguments, tmp_path / "own.json")
    assert (named.code, named.out) == (0, "")
    assert str(tmp_path / "own.json") in named.err.replace("\n", "")
    assert json.loads((tmp_path / "own.json").read_text())["methods"][0]["method"] == "groupdro"
    assert call(*arguments, tmp_path).code == 0
    (file,) = tmp_path.glob("cost-*.json")
    assert re.fullmatch(r"cost-[a-z0-9-]+-fp32-nchw-tiny_cnn-\d+-\d{4}-\d\d-\d\d\.json", file.name)


def test_generated_images_and_a_trace(call: Call, tmp_path: Path) -> None:
    setting = ("--size", 8, "--backbone", "tiny_cnn", "--batch", 8, "--steps", 2, "--rounds", 1, "--warmup", 1)
    done = call("profile", "--method", "groupdro", *setting, "--trace", tmp_path / "trace.json", "--format", "json")
    assert done.code == 0
    assert json.loads(done.out)["dataset"] == "generated:8x512"
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_method_of_ones_own(call: Call, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        '"""mine: ERM again."""\n'
        "import worstgroup as wg\n"
        '@wg.method("mine_profiled", paper="none", requires=wg.Requires(native="none"))\n'
        'class Mine(wg.Objective):\n    """ERM."""\n'
    )
    done = call("profile", "--method", "mine_profiled", *SHORT, "--plugin", plugin, "--format", "json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["step_ratio"] > 0


REFUSED: list[tuple[tuple[Any, ...], str]] = [
    ((), "name a method with --method, or several separated by commas"),
    (("--method", "groupdor"), "unknown method 'groupdor'. Did you mean groupdro"),
    (("--method", "groupdro", "--dataset", "tiy"), "unknown dataset 'tiy'"),
    (("--method", "ex2l", "--dataset", "tiny", "--budget", "none"), "ex2l on tiny · none: n/a (needs val-5 or richer)"),
    (("--method", "groupdro", "--budget", "al"), "unknown budget 'al'"),
    (("--method", "groupdro", "--steps", 0), "--steps 0: it must be at least 2"),
    (("--method", "groupdro", "--rounds", 0), "--rounds 0: it must be at least 1"),
    (("--method", "groupdro", "--size", 0), "--size 0: it must be at least 8 px"),
    (("--method", "groupdro", "--batch", 0), "--batch 0: it must be at least 2 images"),
    (("--method", "groupdro", "--backbone", "resnet81"), "unknown backbone 'resnet81'"),
    (("--method", "groupdro", "--output", "x.csv"), "say in which --format"),
    (("--method", "groupdro", "--format", "csv", "--output", "no/such/x.csv"), "there is no folder no/such"),
    (("--method", "groupdro", "--trace", "no/such/t.json"), "there is no folder no/such"),
    (("--method", "groupdro", "--trace", "."), "name a file"),
    (("--method", "groupdro,ex2l", "--trace", "t.json"), "a trace is of one method"),
    (("--method", "groupdro", "--set", "recipe.lr"), "--set recipe.lr: write KEY=VALUE"),
    (("--suite", "cpu"), "unknown profile suite 'cpu'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_wrong_is_one_clear_error(call: Call, arguments: tuple[Any, ...], message: str) -> None:
    done = call("profile", *arguments)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_needs_a_gpu(call: Call) -> None:
    done = call("profile", "--suite", "gpu")
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert "needs a CUDA GPU" in line
    assert "worstgroup profile --method groupdro,ex2l --backbone resnet18 --size 64" in line


@pytest.mark.parametrize("method", ["groupdro", "dfr"])
def test_a_file_of_one_method_is_one_of_costs(call: Call, tmp_path: Path, method: str) -> None:
    """One has no whole run, the other no training step."""
    assert call("profile", "--method", method, *SHORT, "--format", "csv", "--output", tmp_path).code == 0
    shown = call("board", "--costs", tmp_path)
    assert (shown.code, shown.err) == (0, "")
    assert f"| {method} " in shown.out
