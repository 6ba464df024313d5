"""What methods cost beside what they gain, in the shape of eX2L's tables of time (its appendix D), from files that
`worstgroup profile --format csv` wrote and from the rows of a leaderboard.

The paper divides worst-group accuracies; here their difference stands, which a weak ERM does not inflate.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from ..benchmark.errors import CorruptFile, UserError
from .papers import Reported, reported
from .render import MISSING, markdown, title, write_csv
from .table import Difference, Table

ERM = "erm"
STEP, SCRATCH = "step", "from scratch"
SETTING = (
    "device",
    "threads",
    "backbone",
    "image",
    "batch",
    "precision",
    "layout",
    "torch",
    "clock",
    "rounds",
    "steps",
)
"""What all lines of a file share and its heading says."""
NEEDED = ("method", "budget", "part", "flops", *SETTING)
"""What every file has; other columns are there where lines fill them."""

LEGEND = (
    "`ms` of a training step. `step` its time over ERM's at equal images, timed in turns in one process: the median "
    "over pairs of blocks, with an interval of at least 95 %. `update` the time for each update of the classifier over "
    "ERM's, with all images that the method takes for it. `paper` the ratios that papers print, of whole trainings on "
    "their GPUs; `dann` and `cdann` train their discriminator alone in every second step, on features that no backward "
    "goes through, which makes a step cheaper than the papers' and an update of the classifier dearer; batches of "
    "`divdis` are half unlabelled validation images, those of `debian` hold a half for each of two networks. `run` "
    "device seconds of a whole run from scratch over ERM's, and in FLOPs; of so few epochs that what is done once "
    "weighs more than in a longer training. Columns of datasets: difference in worst-group accuracy to ERM there, in "
    "points, with its paired 95 % interval. `GFLOP` of a step per image of its batch on networks that were not timed: "
    "passes that were counted, times the FLOPs of a forward, a backward as two. A method that refuses a network at "
    "this size has no line: `ex2l` and `masktune` need maps of more than one pixel."
)


@dataclass
class Cost:
    """What one method was measured to cost; empty where it has no training step or no run was made."""

    method: str
    budget: str
    step_s: float | None = None
    step_ratio: Difference | None = None
    update_ratio: float | None = None
    run: tuple[float, float] | None = None
    """Seconds and FLOPs from scratch, over ERM's."""
    images: dict[str, float] = field(default_factory=dict)
    """FLOPs per image of a batch, by network and size."""


@dataclass(frozen=True)
class Sheet:
    """A file of measurements: its name, the setting that they hold in, and the costs in its order."""

    name: str
    setting: dict[str, str]
    costs: list[Cost]

    @property
    def networks(self) -> list[str]:
        """Networks whose FLOPs were counted."""
        return list(dict.fromkeys(name for cost in self.costs for name in cost.images))


# ------------------------------------------------------------------------------------------------------------ reading


def find(path: Path) -> list[Sheet]:
    """Measurements in a file, or in all CSV files of a folder by name; raises `UserError`, and `CorruptFile` for a file
    that is none of them.
    """
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        advice = "make one with `worstgroup profile --suite methods --format csv --output FOLDER`"
        raise UserError(f"{path}: there is no file of measurements; {advice}")
    return [read(file) for file in files]


def read(file: Path) -> Sheet:
    """One file; raises `CorruptFile`."""
    try:
        lines = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))
        missing = [name for name in NEEDED if not lines or name not in lines[0]]
        if missing:
            raise CorruptFile(f"{file}: it is no file of `worstgroup profile --format csv`: no column {missing[0]}")
        return Sheet(file.stem, {name: lines[0][name] for name in SETTING}, list(_costs(lines)))
    except (ValueError, TypeError, csv.Error) as error:
        raise CorruptFile(f"{file}: it cannot be read ({error}); measure again") from error


def _costs(lines: list[dict[str, str]]) -> Iterator[Cost]:
    found: dict[tuple[str, str], Cost] = {}
    unit = next((line for line in lines if line["method"] == ERM and line["part"] == SCRATCH), None)
    for line in lines:
        if line["part"].endswith(" loop"):
            continue
        key = line["method"], line["budget"]
        cost = found.setdefault(key, Cost(*key))
        if line["part"] == STEP:
            cost.step_s = float(line["seconds"])
            ends = (line[name] for name in ("step_ratio", "step_ratio_low", "step_ratio_high"))
            cost.step_ratio = Difference(*map(float, ends))
            cost.update_ratio = float(line["update_ratio"]) if line["update_ratio"] else None
        elif line["part"] == SCRATCH and unit:
            cost.run = _over(line, unit, "device_s"), _over(line, unit, "flops")
        elif line["part"].endswith(" px"):
            cost.images[line["part"]] = float(line["flops"])
    yield from found.values()


def _over(line: dict[str, str], unit: dict[str, str], name: str) -> float:
    return float(line[name]) / float(unit[name]) if float(unit[name]) else math.nan


# ---------------------------------------------------------------------------------------------------------- rendering


def render(sheets: Sequence[Sheet], tables: Sequence[Table], format_: str = "md") -> str:
    """Costs of every file beside the differences to ERM in these tables, as `md` or `csv`."""
    ratios = papers_ratios(reported())
    if format_ == "csv":
        lines = [line for sheet in sheets for line in _plain(sheet, tables, ratios)]
        return write_csv(list(dict.fromkeys(name for line in lines for name in line)), lines)
    parts = [part for sheet in sheets for part in (_heading(sheet), _main(sheet, tables, ratios), _larger(sheet))]
    return "\n\n".join(["# What methods cost", *filter(None, parts), LEGEND]) + "\n"


def papers_ratios(lines: Iterable[Reported]) -> dict[str, tuple[float, float]]:
    """Smallest and largest cost ratio that papers print of each method."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if line.metric == "cost_ratio" and line.method:
            found.setdefault(line.method, []).append(float(line.value))
    return {method: (min(values), max(values)) for method, values in found.items()}


def gains(cost: Cost, tables: Sequence[Table]) -> dict[str, Difference]:
    """Differences in worst-group accuracy to ERM of a method's row at the same budget, by the table's title."""
    found = {}
    for table in tables:
        for row in table.rows:
            if (row.method, row.budget) == (cost.method, cost.budget) and "wga" in row.versus_erm:
                found[title(table)] = row.versus_erm["wga"]
    return found


def _heading(sheet: Sheet) -> str:
    said = sheet.setting
    text = (
        f"{said['backbone']}, {said['image'].partition('x')[0]} px, batches of {said['batch']}, {said['precision']}, "
        f"{said['layout']}; {said['device']}, {_threads(said['threads'])}, torch {said['torch']}; {said['clock']}, "
        f"{said['rounds']} pairs of {said['steps']} steps"
    )
    return f"## {markdown(sheet.name)}\n\n{markdown(text)}"


def _threads(number: str) -> str:
    return f"{number} thread{'s' * (number != '1')}"


def _main(sheet: Sheet, tables: Sequence[Table], ratios: dict[str, tuple[float, float]]) -> str:
    places = list(dict.fromkeys(place for cost in sheet.costs for place in gains(cost, tables)))
    rows = []
    for cost in sheet.costs:
        seconds, flops = (f"{value:.2f}" for value in cost.run) if cost.run else (MISSING, MISSING)
        gained = gains(cost, tables)
        rows.append(
            [
                markdown(cost.method),
                cost.budget,
                f"{1000 * cost.step_s:.4g}" if cost.step_s else MISSING,
                _bracketed(cost.step_ratio, "{:.2f}"),
                f"{cost.update_ratio:.2f}" if cost.update_ratio else MISSING,
                _range(ratios.get(cost.method)),
                seconds,
                flops,
                *(_bracketed(gained.get(place), "{:+.1f}", 100) if place in gained else "" for place in places),
            ]
        )
    headings = ["method", "budget", "ms", "step", "update", "paper", "run", "run, FLOPs", *map(markdown, places)]
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True)


def _larger(sheet: Sheet) -> str:
    """FLOPs on networks that were not timed, a line for all methods of the same; empty without any."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for cost in sheet.costs:
        if cost.images:
            alike.setdefault(tuple(f"{cost.images[name] / 1e9:.4g}" for name in sheet.networks), []).append(cost.method)
    rows = [[*flops, markdown(", ".join(methods))] for flops, methods in alike.items()]
    headings = [*(f"GFLOP, {name}" for name in sheet.networks), "methods"]
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True) if rows else ""


def _bracketed(value: Difference | None, form: str, factor: float = 1) -> str:
    if value is None:
        return MISSING
    mean, low, high = (form.format(factor * number) for number in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def _range(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return ""
    low, high = (f"{end:.2f}" for end in ends)
    return low if low == high else f"{low}-{high}"


def _plain(
    sheet: Sheet, tables: Sequence[Table], ratios: dict[str, tuple[float, float]]
) -> Iterator[dict[str, object]]:
    """A line for every method, and numbers without rounding."""
    for cost in sheet.costs:
        line: dict[str, object] = {"file": sheet.name, **sheet.setting, "method": cost.method, "budget": cost.budget}
        if cost.step_ratio:
            ratio = cost.step_ratio
            line |= {"step_s": cost.step_s, "step_ratio": ratio.mean}
            line |= {"step_ratio_low": ratio.low, "step_ratio_high": ratio.high, "update_ratio": cost.update_ratio}
        if cost.method in ratios:
            line["paper_low"], line["paper_high"] = ratios[cost.method]
        if cost.run:
            line["run_ratio"], line["run_flops_ratio"] = cost.run
        line |= {f"flops {name}": flops for name, flops in cost.images.items()}
        for place, gain in gains(cost, tables).items():
            line |= {f"wga {place}": gain.mean, f"wga low {place}": gain.low, f"wga high {place}": gain.high}
        yield line
