"""What `profile` prints: tables for the terminal, Markdown, CSV and JSON, all from the same measurements."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import rich.table
from rich.markup import escape
from tabulate import tabulate

from ..benchmark.cost import StageCost
from ..benchmark.profiled import MethodCost, Pipeline, Profile, StepCost, Steps
from ..benchmark.steps import Ratio
from ..benchmark.yardsticks import Throughput
from ..leaderboard.render import write_csv

SCHEMA, ERM = 1, "erm"
MISSING = "n/a"
NOISE = r"\((?:r|tm)\)|\b(?:nvidia|geforce|tesla|quadro|amd|radeon|instinct|intel|cpu|gpu|processor|graphics|core)\b"
SIZES = r"@|\b\d+(?:\.\d+)?[gm]hz\b|\b\d+gb\b|\bhbm\d\w*|\bsxm\d*\b|\bpcie\b|\b\d+-core\b|\bwith\b.*"
"""What a device's name says beside the model."""

LEGEND = (
    "`step ratio` time of a training step of the method over ERM's, at equal images: the median over pairs of blocks "
    "of steps that took turns; brackets are intervals for it of at least 95 % from six pairs on. `update ratio` the "
    "same for each update of the classifier, with all images that the method takes for it. A step is forward, loss, "
    "backward and optimiser; making the batch is in it only where the method makes images of its own. `fwd/bwd` "
    "examples that pass a backbone in a step, forward (with graph + without) and backward. `GFLOP` per step, by "
    "PyTorch's counter. `roofline` FLOPs per second of the step over those of a large matrix product on the same "
    "device in the same precision."
)
STAGES_LEGEND = (
    "`marginal` what the method adds once the block's ERM is there, `from scratch` with it; (shared) is made once for "
    "all methods. `x ERM` device seconds, and FLOPs, over those of ERM's whole run in this session. Evaluation is in "
    "neither. Only a few epochs are run: what is done once, such as features or heads, weighs less in longer trainings."
)
ON_CPU = (
    "Measured on a CPU, by process CPU time: these ratios hold for this processor and settle nothing about a GPU. "
    "Passes and FLOPs hold everywhere. `--method erm` shows how far ERM comes out from itself here."
)


@dataclass(frozen=True)
class Sheet:
    """A table as text: title, headings and cells."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


# ---------------------------------------------------------------------------------------------------------- facts


def facts(profile: Profile) -> dict[str, Any]:
    """The setting that all numbers hold in, as plain values."""
    recipe, env = profile.recipe, profile.env
    return {
        "device": env["device"],
        "device_type": env["device_type"],
        "precision": recipe.precision,
        "layout": "nhwc" if recipe.channels_last else "nchw",
        "channels_last": recipe.channels_last,
        "compile": recipe.compile,
        "threads": env["threads"],
        "torch": env["versions"]["torch"],
        "clock": profile.clock,
        "dataset": profile.dataset,
        "image": list(profile.image),
        "backbone": profile.backbone,
        "batch": recipe.batch_size,
        "warmup": profile.warmup,
        "steps": profile.steps,
        "rounds": profile.rounds,
    }


def caption(profile: Profile) -> str:
    """One paragraph: what was measured, where and how."""
    said = facts(profile)
    height, width, _ = profile.image
    compiled = ", compiled" if said["compile"] else ""
    threads = f", {said['threads']} thread{'s' * (said['threads'] != 1)}" if said["device_type"] == "cpu" else ""
    roofline = profile.roofline
    parts = [
        f"{said['backbone']} on {said['dataset']}, {height}x{width} px, batches of {said['batch']}, "
        f"{said['precision']}, {said['layout']}{compiled}. {said['device']}{threads}, torch {said['torch']}.",
        f"Clock: {said['clock']}; {said['rounds']} pairs of {said['steps']} steps after {said['warmup']} to warm up.",
        f"Best seen on this device: {roofline.flops_per_s / 1e12:.3g} TFLOP/s in a matrix product, "
        f"{roofline.bytes_per_s / 1e9:.3g} GB/s in a copy.",
    ]
    return " ".join([*parts, *([ON_CPU] if said["device_type"] == "cpu" else [])])


# ---------------------------------------------------------------------------------------------------------- tables


def sheets(profile: Profile) -> list[Sheet]:
    """Steps of all methods, the stages of each pipeline, and the loops, where they were measured."""
    made = [_steps(profile)]
    made += [_stages(method, method.pipeline, profile) for method in profile.methods if method.pipeline]
    made += [_runs(profile)] if made[1:] else []
    made += [_counted(profile)] if profile.counted else []
    return [*made, *([_loops(profile.loops)] if profile.loops else [])]


def _steps(profile: Profile) -> Sheet:
    on_gpu = profile.env["device_type"] == "cuda"
    headings = ("method", "step ratio", "update ratio", "ms/step", "images/s", "images", "fwd/bwd", "GFLOP", "roofline")
    rows: list[tuple[str, ...]] = []
    measured = [method.steps for method in profile.methods if method.steps]
    if measured:
        rows.append((f"{ERM} (the unit)", "1", "1", *_cells(measured[0].erm, on_gpu)))
    for method in profile.methods:
        steps = method.steps
        if steps is None:
            rows.append((f"{method.label}: no step on images", *[MISSING] * (len(headings) - 1 + on_gpu)))
            continue
        name = method.label if steps.stage in ("train", ERM) else f"{method.label}: {steps.stage}"
        rows.append((name, ratio(steps.step_ratio), ratio(steps.update_ratio), *_cells(steps.method, on_gpu)))
    columns = (*headings, *(["MiB"] if on_gpu else []))
    rows += [(f"{absent.method}: n/a ({absent.reason})", *[""] * len(columns[1:])) for absent in profile.absent]
    return Sheet("Training steps against ERM's", columns, rows)


def _cells(step: StepCost, on_gpu: bool) -> Iterator[str]:
    forward = f"{step.n_fwd:.4g}" + (f"+{step.n_fwd_nograd:.4g}" if step.n_fwd_nograd else "")
    yield f"{1000 * step.seconds:.4g}"
    yield f"{step.images_per_s:,.0f}"
    yield f"{step.images:.4g}"
    yield f"{forward}/{step.n_bwd:.4g}"
    yield f"{step.flops / 1e9:.4g}"
    yield f"{100 * step.roofline_share:.1f} %"
    if on_gpu:
        yield MISSING if step.peak_mem_mib is None else f"{step.peak_mem_mib:,.0f}"


def ratio(value: Ratio | None) -> str:
    """`1.03 [1.01, 1.05]`."""
    return MISSING if value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def parts(pipeline: Pipeline) -> Iterator[tuple[str, StageCost]]:
    """Every stage, every shared cost by its kind, and the two sums."""
    yield from pipeline.stages.items()
    yield from ((f"{key.partition(':')[0]} (shared)", cost) for key, cost in pipeline.shared.items())
    yield "marginal", pipeline.marginal
    yield "from scratch", pipeline.scratch


def _stages(method: MethodCost, pipeline: Pipeline, profile: Profile) -> Sheet:
    on_gpu, erm = profile.env["device_type"] == "cuda", pipeline.erm
    columns: dict[str, Callable[[StageCost], str]] = {
        "device s": lambda cost: f"{cost.device_s:.3f}",
        "wall s": lambda cost: f"{cost.wall_s:.3f}",
        "eval s": lambda cost: f"{cost.eval_s:.3f}",
        "fwd": lambda cost: f"{cost.n_fwd:,}",
        "bwd": lambda cost: f"{cost.n_bwd:,}",
        "fwd, no graph": lambda cost: f"{cost.n_fwd_nograd:,}",
        "head fits": lambda cost: f"{cost.n_head_fits:,}",
        "GFLOP": lambda cost: f"{cost.flops / 1e9:,.1f}",
        **({"MiB": lambda cost: f"{cost.peak_mem_mib:,.0f}"} if on_gpu else {}),
        "x ERM": lambda cost: _times(cost.device_s, erm.device_s),
        "x ERM, FLOPs": lambda cost: _times(cost.flops, erm.flops),
    }
    rows = [(name, *(cell(cost) for cell in columns.values())) for name, cost in parts(pipeline)]
    epochs = f"{pipeline.epochs} epoch{'s' * (pipeline.epochs != 1)}"
    return Sheet(f"Stages of {method.label} · {method.budget}, {epochs}", ("stage", *columns), rows)


def _runs(profile: Profile) -> Sheet:
    """Whole runs, one line each: what the stages above add up to."""
    rows = []
    for method in profile.methods:
        if pipeline := method.pipeline:
            ratios = run_ratios(pipeline)
            cells = [ratios[part][name] for part in ("marginal", "scratch") for name in ("device_s", "flops")]
            rows.append(
                (method.label, method.budget, *(f"{cell:.3f}" if cell is not None else MISSING for cell in cells))
            )
    headings = ("method", "budget", "marginal", "marginal, FLOPs", "from scratch", "from scratch, FLOPs")
    return Sheet("Whole runs, x ERM's from scratch", headings, rows)


def _counted(profile: Profile) -> Sheet:
    """FLOPs of a step per image of its batch on other networks, by the passes that were counted here."""
    rows = []
    for method in profile.methods:
        if steps := method.steps:
            step = steps.method
            forward, still, back = (f"{n / step.images:.4g}" for n in (step.n_fwd, step.n_fwd_nograd, step.n_bwd))
            flops = (f"{network.flops(step) / 1e9:.4g}" for network in profile.counted)
            rows.append((method.label, forward, still, back, *flops))
    networks = (f"{network.backbone} {network.size} px" for network in profile.counted)
    title = "GFLOP of a step per image of its batch on larger networks (not timed)"
    return Sheet(title, ("method", "fwd", "fwd, no graph", "bwd", *networks), rows)


def _times(cost: float, unit: float) -> str:
    return f"{cost / unit:.3f}" if unit else MISSING


def _loops(loops: Throughput) -> Sheet:
    reference = f"DataLoader, {loops.workers} workers, PIL, fp32, nchw"
    rates = {"engine": loops.engine, "bare PyTorch loop, same settings": loops.bare, reference: loops.reference}
    rows: list[tuple[str, ...]] = [(name, f"{rate:,.0f}", f"{loops.engine / rate:.3f}") for name, rate in rates.items()]
    return Sheet("ERM's loop with its batches, wall time", ("loop", "images/s", "engine / loop"), rows)


def legend(profile: Profile) -> str:
    """What the headings mean."""
    pipelines = any(method.pipeline for method in profile.methods)
    return " ".join([LEGEND, *([STAGES_LEGEND] if pipelines else [])])


def to_terminal(profile: Profile) -> list[rich.table.Table]:
    """Tables for rich."""
    shown = []
    for sheet in sheets(profile):
        table = rich.table.Table(title=escape(sheet.title), title_justify="left", header_style="bold")
        for i, heading in enumerate(sheet.headings):
            table.add_column(escape(heading), no_wrap=i == 0, justify="right" if i else "left")
        for row in sheet.rows:
            table.add_row(*map(escape, row))
        shown.append(table)
    return shown


def to_markdown(profile: Profile) -> str:
    """A section per table, the caption first and the legend last."""
    sections = [
        f"## {sheet.title}\n\n{tabulate(sheet.rows, sheet.headings, tablefmt='github', disable_numparse=True)}"
        for sheet in sheets(profile)
    ]
    return "\n\n".join([caption(profile), *sections, legend(profile)]) + "\n"


# ----------------------------------------------------------------------------------------------------- plain values


def to_json(profile: Profile) -> str:
    """Everything, under names that stay; `step_ratio` is the number to read off, also at the top for one method."""
    methods = [_plain(method) for method in profile.methods]
    single = {"step_ratio": methods[0]["step_ratio"]} if len(methods) == 1 else {}
    content = {
        "schema": SCHEMA,
        "created": date.today().isoformat(),
        **facts(profile),
        "caption": caption(profile),
        "recipe": asdict(profile.recipe),
        "env": profile.env,
        "roofline": {**asdict(profile.roofline), "flops_per_byte": profile.roofline.balance},
        **single,
        "methods": methods,
        "absent": [asdict(absent) for absent in profile.absent],
        "counted": [asdict(network) for network in profile.counted],
        "loops": asdict(profile.loops) if profile.loops else None,
    }
    return json.dumps(content, indent=1) + "\n"


def _plain(method: MethodCost) -> dict[str, Any]:
    steps, pipeline = method.steps, method.pipeline
    return {
        "method": method.label,
        "budget": method.budget,
        **_ratios(steps),
        "stage": steps.stage if steps else None,
        "step": asdict(steps.method) if steps else None,
        "erm_step": asdict(steps.erm) if steps else None,
        "pipeline": {**asdict(pipeline), "ratios": run_ratios(pipeline)} if pipeline else None,
    }


def _ratios(steps: Steps | None) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in (
        ("step_ratio", steps.step_ratio if steps else None),
        ("update_ratio", steps.update_ratio if steps else None),
    ):
        found |= {name: value.value if value else None}
        found |= {f"{name}_{end}": getattr(value, end) if value else None for end in ("low", "high")}
    return found


def run_ratios(pipeline: Pipeline) -> dict[str, dict[str, float | None]]:
    """Sums over ERM's whole run, in seconds and FLOPs."""
    names = ("device_s", "wall_s", "flops")
    return {
        part: {name: _over(getattr(cost, name), getattr(pipeline.erm, name)) for name in names}
        for part, cost in (("marginal", pipeline.marginal), ("scratch", pipeline.scratch))
    }


def _over(cost: float, unit: float) -> float | None:
    return cost / unit if unit else None


def to_csv(profile: Profile) -> str:
    """A line for the step of every method and of the ERM beside it, for an image of it on each larger network, for each
    stage and sum of a pipeline, and for each loop; what does not apply is empty.
    """
    setting = facts(profile) | {"image": "x".join(map(str, profile.image))}
    lines: list[dict[str, Any]] = []
    for method in profile.methods:
        of = {"method": method.label, "budget": method.budget}
        if method.steps:
            lines.append({**of, "part": "step", **_ratios(method.steps), **asdict(method.steps.method)})
            lines.append({**of, "part": "erm step", **asdict(method.steps.erm)})
            for network in profile.counted:
                flops = network.flops(method.steps.method)
                lines.append({**of, "part": f"{network.backbone} {network.size} px", "images": 1, "flops": flops})
        if method.pipeline:
            epochs = {"epochs": method.pipeline.epochs}
            lines += [{**of, "part": name, **epochs, **asdict(cost)} for name, cost in parts(method.pipeline)]
    for name, rate in asdict(profile.loops).items() if profile.loops else ():
        if name != "workers":
            lines.append({"method": ERM, "part": f"{name} loop", "images_per_s": rate})
    names = dict.fromkeys(name for line in lines for name in line)
    return write_csv([*names, *setting], ({**line, **setting} for line in lines))


# ------------------------------------------------------------------------------------------------------- file names


def file_name(profile: Profile, suffix: str, day: date) -> str:
    """`cost-h100-bf16-nhwc-resnet50-224-2026-11-22.csv`: files of several devices and settings can lie together."""
    said = facts(profile)
    compiled = ["compiled"] if said["compile"] else []
    network = [re.sub(r"[^\w.]+", "-", said["backbone"]), str(profile.image[0])]
    name = [device_slug(said["device"]), said["precision"], said["layout"], *compiled, *network, day.isoformat()]
    return f"cost-{'-'.join(name)}.{suffix}"


def device_slug(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` becomes `h100`."""
    plain = re.sub(NOISE, " ", re.sub(SIZES, " ", device.lower()))
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "device"


def place(output: Path, profile: Profile, suffix: str) -> Path:
    """Where the text goes: the file itself, or in a folder one named after the setting."""
    return output / file_name(profile, suffix, date.today()) if output.is_dir() else output
