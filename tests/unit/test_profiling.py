"""`profile` from Python: plans, pipelines, yardsticks, and the tables, files and names that come of it."""

import csv
import io
import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from worstgroup.benchmark import yardsticks
from worstgroup.benchmark.cost import StageCost
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.home import home, runs_home
from worstgroup.benchmark.profiled import Counted, MethodCost, Pipeline, Profile, StepCost, Steps
from worstgroup.benchmark.profiling import EFFORTS, SUITES, Ask, Effort, everything, fitted_steps, measure
from worstgroup.benchmark.registry import METHODS
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.steps import Block, Ratio
from worstgroup.benchmark.yardsticks import (
    Roofline,
    Throughput,
    bare_loop,
    measure_loops,
    measure_roofline,
    reference_loop,
    write_pictures,
)
from worstgroup.commands import profile_report

CPU = torch.device("cpu")
SHORT = Effort(1, 2, 2)
TINY = Ask(("groupdro",), dataset="tiny")
SETUP: dict[str, Any] = {"backbone": "tiny_cnn", "size": 16, "batch": 16}


# --------------------------------------------------------------------------------------------------------- measuring


def test_a_single_stage_method_has_a_step_and_no_pipeline() -> None:
    (method,) = (made := measure(TINY, SHORT)).methods
    assert (method.label, method.budget, method.pipeline) == ("groupdro", "train+val", None)
    assert method.steps is not None
    assert method.steps.stage == "train"
    assert 0 < method.steps.step_ratio.low <= method.steps.step_ratio.value <= method.steps.step_ratio.high
    assert method.steps.step_ratio == method.steps.update_ratio
    assert (method.steps.method.n_fwd, method.steps.method.images, method.steps.method.updates) == (16, 16, 1)
    assert method.steps.method.flops == method.steps.erm.flops
    assert method.steps.erm.roofline_share > 0
    assert (made.clock, made.dataset, made.backbone, made.steps) == ("process CPU time", "tiny", "tiny_cnn", 2)
    assert made.loops is None


def test_players_that_take_turns_cost_twice_for_each_update() -> None:
    (method,) = measure(replace(TINY, methods=("dann",)), SHORT).methods
    assert method.steps is not None
    assert method.steps.update_ratio == method.steps.step_ratio.times(2)


def test_batches_of_other_sizes_are_compared_at_equal_images() -> None:
    (method,) = measure(replace(TINY, methods=("divdis",)), SHORT).methods
    assert method.steps is not None
    assert method.steps.update_ratio is not None
    own, erm = method.steps.method, method.steps.erm
    assert own.images == 2 * erm.images
    assert method.steps.step_ratio.value == pytest.approx(method.steps.update_ratio.value / 2)


def test_methods_that_do_not_exist_there_are_named_beside_the_others() -> None:
    made = measure(replace(TINY, methods=("ex2l", "erm"), budget="none"), SHORT)
    assert [method.label for method in made.methods] == ["erm"]
    assert [(absent.method, absent.reason) for absent in made.absent] == [("ex2l", "needs val-5 or richer")]
    assert "| ex2l: n/a (needs val-5 or richer) |" in profile_report.to_markdown(made)


def test_a_suite_skips_what_refuses_the_network() -> None:
    ask = Ask(("erm", "ex2l"), backbone="alexnet", size=64, batch=2, skip=True)
    made = measure(ask, Effort(1, 2, 1))
    assert [method.label for method in made.methods] == ["erm"]
    (absent,) = made.absent
    assert absent.method == "ex2l"
    assert "maps of 1x1 pixels" in absent.reason
    with pytest.raises(UserError, match="maps of 1x1 pixels"):
        measure(replace(ask, skip=False))


def test_a_method_may_name_its_budget() -> None:
    made = measure(replace(TINY, methods=("dfr@class none",)), SHORT)
    assert [(method.label, method.budget) for method in made.methods] == [("dfr@class", "none")]


def test_all_methods_and_all_sources_that_need_no_label_are_in_the_suite() -> None:
    names = everything()
    assert names[0] == "erm"
    assert set(METHODS) == {name for name in names if name.isalnum()}
    assert {"dfr+exmap", "dfr+george", "dfr@class none"} <= set(names)
    assert not {"dfr+oracle", "dfr+predictor"} & set(names)


@pytest.mark.parametrize(("name", "forward"), [("resnet50", 8.18e9), ("convnext_tiny", 8.91e9), ("alexnet", 1.42e9)])
def test_passes_become_flops_of_other_networks(name: str, forward: float) -> None:
    """A forward of 224 px, multiplications and additions counted, as torchvision prints them."""
    network = Counted.of(name, 224)
    assert network.forward_flops == pytest.approx(forward, rel=0.01)
    step = step_cost(images=32.0, n_fwd=64.0, n_fwd_nograd=32.0, n_bwd=64.0)
    assert network.flops(step) == pytest.approx((2 + 1 + 4) * network.forward_flops)


def test_a_pipeline_reports_every_stage_beside_erms_whole_run() -> None:
    dfr, jtt = measure(replace(TINY, methods=("dfr", "jtt")), SHORT).methods
    assert dfr.steps is None
    assert dfr.pipeline is not None
    assert list(dfr.pipeline.stages) == ["head"]
    assert [key.partition(":")[0] for key in dfr.pipeline.shared] == ["erm", "features"]
    n, val, epochs = 96, 48, 2
    erm = dfr.pipeline.erm
    assert (erm.n_fwd, erm.n_bwd, dfr.pipeline.epochs) == (n * epochs, n * epochs, epochs)
    marginal, scratch = dfr.pipeline.marginal, dfr.pipeline.scratch
    assert (marginal.n_fwd, marginal.n_bwd, marginal.n_fwd_nograd) == (0, 0, val)
    assert (scratch.n_fwd, scratch.n_bwd) == (n * epochs, n * epochs)
    assert scratch.device_s == pytest.approx(marginal.device_s + erm.device_s)
    assert jtt.pipeline is not None
    assert jtt.steps is not None
    assert jtt.steps.stage == "second"
    assert jtt.pipeline.marginal.n_fwd == n * epochs
    assert jtt.pipeline.erm == erm  # measured once


def test_stages_on_demand_and_epochs_from_the_settings() -> None:
    ask = replace(TINY, methods=("erm",), stages=True, settings={"recipe.epochs": "3"})
    (erm,) = measure(ask, SHORT).methods
    assert erm.pipeline is not None
    assert erm.pipeline.epochs == 3
    assert erm.pipeline.scratch == erm.pipeline.erm
    assert erm.pipeline.marginal.n_fwd == 0
    assert erm.steps is not None


def test_nothing_is_left_in_the_users_home_but_the_dataset() -> None:
    measure(TINY, SHORT)
    assert sorted(path.name for path in home().iterdir()) == ["data"]
    assert not runs_home().exists()
    assert list((home() / "data").iterdir())


def test_generated_images_leave_nothing() -> None:
    made = measure(Ask(("groupdro",), **SETUP), SHORT)
    assert not home().exists()
    assert (made.dataset, made.image, made.recipe.batch_size) == ("generated:16x512", (16, 16, 3), 16)


def test_large_batches_get_enough_generated_images() -> None:
    made = measure(Ask(("groupdro",), size=8, batch=200, backbone="tiny_cnn"), Effort(1, 2, 1))
    assert made.dataset == "generated:8x800"
    assert made.methods[0].steps is not None
    assert made.methods[0].steps.method.images == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ()}, "name a method with --method"),
        ({"methods": ("groupdor",)}, "unknown method 'groupdor'. Did you mean groupdro"),
        ({"methods": ("ex2l",), "budget": "none"}, r"ex2l on tiny · none: n/a \(needs val-5 or richer\)"),
        ({"dataset": "tiy"}, "unknown dataset 'tiy'"),
        ({"size": 0}, "--size 0: it must be at least 8 px"),
        ({"batch": 1}, "--batch 1: it must be at least 2 images"),
        ({"batch": 97}, "batches of 97 images: tiny has 96 to train on; lower --batch"),
        ({"methods": ("erm", "dfr"), "trace": Path("t.json")}, "a trace is of one method"),
        ({"settings": {"groupdro.stepsize": "1"}}, "unknown groupdro key 'stepsize'"),
        ({"settings": {"recipe.epochs": "0"}}, "recipe.epochs must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(replace(TINY, **change), SHORT)
    assert not runs_home().exists()


@pytest.mark.parametrize(
    ("values", "message"), [((0, 2, 1), "--warmup 0"), ((1, 1, 1), "--steps 1"), ((1, 2, 0), "--rounds 0")]
)
def test_efforts_have_least_values(values: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=f"{message}: it must be at least"):
        Effort(*values)


def test_the_defaults_on_a_gpu_are_those_of_the_protocol() -> None:
    assert EFFORTS["cuda"].warmup >= 20
    assert (EFFORTS["cuda"].steps or 0) >= 50
    assert EFFORTS["cuda"].rounds >= 3


@pytest.mark.parametrize(("seconds", "steps"), [(0.001, 50), (0.05, 20), (0.24, 4), (3.0, 4)])
def test_blocks_of_fitted_length(seconds: float, steps: int) -> None:
    times = np.full(2, seconds)
    assert fitted_steps(Block(times, times, np.ones(2, bool), 1.0, 4, StageCost())) == steps


def test_a_method_that_fails_is_named() -> None:
    ask = replace(TINY, methods=("jtt",), settings={"recipe.epochs": "30", "jtt.first_epochs": "30"})
    with pytest.raises(UserError, match=r"jtt on tiny .*: it failed: jtt: the first run makes no training error"):
        measure(ask, SHORT)


def test_the_gpu_suite_runs_on_a_processor_at_a_tiny_size() -> None:
    suite = SUITES["gpu"]
    assert (suite.backbone, suite.size, suite.batch) == ("resnet50", 224, 128)
    assert suite.settings["recipe.precision"] == "bf16"
    assert suite.settings["recipe.channels_last"] == "true"
    made = measure(replace(suite, **SETUP, settings={**suite.settings, "mac.epochs": "1"}), SHORT)
    assert [method.label for method in made.methods] == ["erm", "groupdro", "ex2l", "dfr", "dfr+exmap", "mac", "jtt"]
    assert all(method.pipeline for method in made.methods)
    assert [method.label for method in made.methods if method.steps is None] == ["dfr", "dfr+exmap"]
    assert made.loops is not None
    assert min(made.loops.engine, made.loops.bare, made.loops.reference) > 0
    text = profile_report.to_markdown(made)
    assert "bf16, nhwc" in text
    assert "bare PyTorch loop" in text


def test_a_trace_is_one_that_viewers_read(tmp_path: Path) -> None:
    measure(replace(TINY, trace=tmp_path / "trace.json"), SHORT)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("conv" in str(event.get("name")) for event in events)


# -------------------------------------------------------------------------------------------------------- yardsticks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_roofline_is_measured_in_the_runs_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (seen.add(a.dtype), multiply(a, b, out=out)))
    before = torch.backends.cuda.matmul.allow_tf32
    found = measure_roofline(CPU, precision, matmul=64, copied=2**20)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert found.flops_per_s > 0
    assert found.bytes_per_s > 0
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_the_roofline_follows_from_the_fastest_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardsticks, "_fastest", lambda work, device: (work(), 0.5)[1])
    found = measure_roofline(CPU, "fp32", matmul=10, copied=1000)
    assert found == Roofline(flops_per_s=4000, bytes_per_s=4000)
    assert found.balance == 1


def test_the_bare_loop_trains_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (24, 16, 16, 3), dtype=torch.uint8)
    steps: list[torch.Size] = []
    loss = functional.cross_entropy
    monkeypatch.setattr(functional, "cross_entropy", lambda z, y: (steps.append(z.shape), loss(z, y))[1])
    recipe = Recipe(batch_size=8, precision="bf16", channels_last=True, augment="crop+flip")
    assert bare_loop(images, "tiny_cnn", recipe, CPU, steps=3, warmup=2) > 0
    assert steps == [torch.Size([8, 2])] * 5


def test_the_reference_loop_decodes_files(tmp_path: Path) -> None:
    files = write_pictures(tmp_path, 3, (60, 40))
    assert {Image.open(file).size for file in files} == {(60, 40)}
    assert len({file.read_bytes() for file in files}) == 3
    assert reference_loop(files, 16, "tiny_cnn", 4, 0, CPU, 2) > 0
    files[0].write_bytes(b"no picture")
    with pytest.raises(OSError, match="cannot identify"):
        reference_loop(files[:1], 16, "tiny_cnn", 4, 0, CPU, 2)


def test_loops_side_by_side() -> None:
    images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
    found = measure_loops(7.0, images, "tiny_cnn", Recipe(batch_size=4), CPU, steps=2, warmup=1, picture=(40, 30))
    assert found.engine == 7.0
    assert min(found.bare, found.reference) > 0


# ------------------------------------------------------------------------------------------------------------ report


def step_cost(**changes: Any) -> StepCost:
    facts: dict[str, Any] = {"seconds": 0.02, "images": 32.0, "images_per_s": 1600.0, "n_fwd": 32.0, "n_bwd": 32.0}
    facts |= {"n_fwd_nograd": 0.0, "updates": 1.0, "flops": 3e9, "roofline_share": 0.25, "peak_mem_mib": None}
    return StepCost(**(facts | changes))


def profile_of(device_type: str = "cpu", **changes: Any) -> Profile:
    steps = Steps(
        "train", Ratio(1.5, 1.4, 1.6), Ratio(3.0, 2.8, 3.2), step_cost(seconds=0.03, n_fwd_nograd=8.0), step_cost()
    )
    cost, erm = StageCost(2.0, 1.0, 0.5, flops=4e9), StageCost(3.0, 2.0, flops=8e9)
    pipeline = Pipeline(2, {"head": cost}, {"erm:0123": erm}, cost, cost + erm, erm)
    facts: dict[str, Any] = {
        "env": {
            "device": "NVIDIA H100 80GB HBM3" if device_type == "cuda" else "AMD EPYC 7B13",
            "device_type": device_type,
            "threads": 2,
            "versions": {"torch": "2.9.0"},
        },
        "clock": "cuda events" if device_type == "cuda" else "process CPU time",
        "dataset": "generated:64x512",
        "image": (64, 64, 3),
        "backbone": "resnet18",
        "recipe": Recipe(batch_size=32),
        "warmup": 3,
        "steps": 4,
        "rounds": 7,
        "roofline": Roofline(1e12, 1e11),
        "methods": [MethodCost("alpha", "val", steps, None), MethodCost("beta", "none", None, pipeline)],
        "absent": [],
        "loops": None,
        "counted": [],
    }
    return Profile(**(facts | changes))


def test_markdown_holds_every_number() -> None:
    text = profile_report.to_markdown(profile_of(loops=Throughput(100.0, 110.0, 10.0, 4)))
    assert re.search(r"\| alpha +\| 1\.500 \[1\.400, 1\.600\] \| 3\.000 \[2\.800, 3\.200\] \| 30", text)
    assert "32+8/32" in text
    assert "25.0 %" in text
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    (beta,) = (row for row in cells if row[1:2] == ["beta"])
    assert beta[2:-1] == ["none", "0.500", "0.500", "1.500", "1.500"]
    (without,) = (row for row in cells if row[1:2] == ["beta: no step on images"])
    assert set(without[2:-1]) == {"n/a"}
    (marginal,) = (row for row in cells if row[1:2] == ["marginal"])
    assert marginal[-3:-1] == ["0.500", "0.500"]
    (scratch,) = (row for row in cells if row[1:2] == ["from scratch"])
    assert scratch[-3:-1] == ["1.500", "1.500"]
    assert "erm (shared)" in text
    assert "10.000" in text  # the engine over the reference pattern
    assert "MiB" not in text


def test_the_caption_says_plainly_what_a_processor_cannot_tell() -> None:
    said = profile_report.caption(profile_of())
    for text in (
        "Measured on a CPU",
        "settle nothing about a GPU",
        "Clock: process CPU time",
        "2 threads",
        "fp32, nchw",
    ):
        assert text in said
    on_gpu = profile_report.caption(profile_of("cuda"))
    assert "CPU" not in on_gpu
    assert "Clock: cuda events" in on_gpu


def test_memory_is_shown_on_a_gpu() -> None:
    steps = Steps("second", Ratio(1, 1, 1), None, step_cost(peak_mem_mib=2048.4), step_cost(peak_mem_mib=1024.0))
    text = profile_report.to_markdown(profile_of("cuda", methods=[MethodCost("alpha", "val", steps, None)]))
    assert "2,048" in text
    assert "alpha: second" in text
    assert "n/a" in text  # no update of the classifier


def test_json_keeps_its_names() -> None:
    recipe = Recipe(batch_size=32, precision="bf16", channels_last=True, compile=True)
    content = json.loads(profile_report.to_json(profile_of("cuda", recipe=recipe)))
    expected = {"precision": "bf16", "layout": "nhwc", "channels_last": True, "compile": True, "threads": 2}
    expected |= {"torch": "2.9.0", "clock": "cuda events", "device": "NVIDIA H100 80GB HBM3", "batch": 32}
    assert {key: content[key] for key in expected} == expected
    alpha, beta = content["methods"]
    assert (alpha["method"], alpha["step_ratio"], alpha["step_ratio_low"], alpha["update_ratio"]) == (
        "alpha",
        1.5,
        1.4,
        3,
    )
    assert alpha["erm_step"]["seconds"] == 0.02
    assert (beta["step_ratio"], beta["step"]) == (None, None)
    assert beta["pipeline"]["ratios"]["marginal"] == {"device_s": 0.5, "wall_s": pytest.approx(2 / 3), "flops": 0.5}
    assert "step_ratio" not in content
    alone = json.loads(profile_report.to_json(profile_of(methods=profile_of().methods[:1])))
    assert alone["step_ratio"] == 1.5


def test_csv_has_a_line_for_every_part() -> None:
    larger = [Counted("resnet50", 224, 8e9)]
    text = profile_report.to_csv(profile_of(loops=Throughput(100.0, 110.0, 10.0, 4), counted=larger))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["method"], row["part"]) for row in rows] == [
        ("alpha", "step"),
        ("alpha", "erm step"),
        ("alpha", "resnet50 224 px"),
        ("beta", "head"),
        ("beta", "erm (shared)"),
        ("beta", "marginal"),
        ("beta", "from scratch"),
        ("erm", "engine loop"),
        ("erm", "bare loop"),
        ("erm", "reference loop"),
    ]
    assert (rows[0]["step_ratio"], rows[0]["peak_mem_mib"], rows[1]["step_ratio"]) == ("1.5", "", "")
    assert float(rows[2]["flops"]) == pytest.approx(8e9 * (32 + 8 + 2 * 32) / 32)
    assert (rows[3]["device_s"], rows[3]["epochs"], rows[8]["images_per_s"]) == ("1.0", "2", "110.0")
    assert {(row["device"], row["clock"], row["image"]) for row in rows} == {
        ("AMD EPYC 7B13", "process CPU time", "64x64x3")
    }


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla V100-PCIE-16GB", "v100"),
        ("Intel(R) Xeon(R) Processor @ 2.20GHz", "xeon"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", "i7-9750h"),
        ("AMD EPYC 7B13 64-Core Processor", "epyc-7b13"),
        ("x86_64", "x86-64"),
        ("", "device"),
    ],
)
def test_files_are_named_by_what_they_were_measured_on(device: str, slug: str) -> None:
    assert profile_report.device_slug(device) == slug


def test_a_folder_gets_a_file_named_by_its_setting(tmp_path: Path) -> None:
    fast = profile_of("cuda", recipe=Recipe(precision="bf16", channels_last=True))
    day = date(2026, 11, 22)
    assert profile_report.file_name(fast, "csv", day) == "cost-h100-bf16-nhwc-resnet18-64-2026-11-22.csv"
    compiled = profile_of("cuda", recipe=Recipe(compile=True))
    assert profile_report.file_name(compiled, "json", day) == "cost-h100-fp32-nchw-compiled-resnet18-64-2026-11-22.json"
    assert profile_report.place(tmp_path, fast, "csv").parent == tmp_path
    assert profile_report.place(tmp_path / "own.csv", fast, "csv") == tmp_path / "own.csv"


def test_a_suite_goes_on_past_a_method_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("it broke\nhere")

    monkeypatch.setattr(METHODS["groupdro"].cls, "loss", broken)
    made = measure(replace(TINY, methods=("erm", "groupdro"), skip=True), SHORT)
    assert [method.label for method in made.methods] == ["erm"]
    assert [(absent.method, absent.reason) for absent in made.absent] == [("groupdro", "it broke here")]
