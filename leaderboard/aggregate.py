"""From records to tables: one table per block (dataset, backbone, recipe), one row per method and budget."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..benchmark import record as records
from ..benchmark.budget import Budget
from ..benchmark.errors import CorruptFile
from ..benchmark.planning import Absent
from ..benchmark.record import Arrays, RunRecord
from . import statistics
from .statistics import Estimate, Outcome, Samples

MEANS = ("acc_adj", "acc_mean", "acc_group")
HELD = {"wga_train": "train_metrics", "wga_val": "val_metrics"}
"""Worst-group accuracy on the splits that are not test, and the field of a record that has it."""


AGREEMENT = ("ami", "worst_recall")
"""How a source's groups agree with the true ones."""


@dataclass(frozen=True)
class Difference:
    """A paired difference to ERM with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class CostRatio:
    """Cost relative to the block's ERM on the same device; `same_session` says whether both were measured together.

    `search` is what all draws of the search cost that the settings come from, 0 without one.
    """

    marginal: float
    scratch: float
    same_session: bool
    search: float = 0.0


@dataclass
class Row:
    """One method at one budget over its seeds, or the `reason` why it is not run there."""

    method: str
    budget: str
    tag: str
    seeds: tuple[int, ...]
    labels: int
    metrics: dict[str, Estimate | None]
    versus_erm: dict[str, Difference] = field(default_factory=dict)
    cost: CostRatio | None = None
    reason: str = ""
    held: dict[str, Estimate | None] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    """Of the source's groups with the true ones, mean over seeds; empty for a row without a source."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of method and source, and those of the recipe that a search found."""
    searched: bool = False
    rendered: int = 0
    """Images with a shortcut replaced that it trained on: no labels, but privileged."""

    def settings_text(self) -> str:
        """`step_size=0.1 recipe.lr=0.003`."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items()).replace(", ", ",")

    def amplified(self, gap: str) -> bool:
        """Whether a gap is wider than ERM's beyond its interval (the Whac-A-Mole effect)."""
        return gap in self.versus_erm and self.versus_erm[gap].high < 0


@dataclass
class Table:
    """One block: what its rows share, its gap columns, and the rows from poorest to richest budget, best first."""

    protocol: str
    dataset: str
    fingerprint: str
    backbone: str
    weights: str
    recipe: dict[str, Any]
    gaps: list[str]
    rows: list[Row]
    device: str


def collect(paths: Iterable[Path]) -> list[tuple[Path, RunRecord]]:
    """Read all finished records of the given files but the candidates of searches; raises `CorruptFile` for one that
    is wrong.
    """
    read = [(path, records.read(path)) for path in paths]
    finished = [(path, record) for path, record in read if record.status == "finished" and not record.is_candidate]
    for path, record in finished:
        for name in ("wga", *MEANS, *(f"gap_{attribute.name}" for attribute in record.attributes)):
            if name not in record.metrics:
                raise CorruptFile(f"{path}: metrics.{name}: missing")
    return finished


def build(found: Sequence[tuple[Path, RunRecord]], absent: Iterable[Absent] = ()) -> list[Table]:
    """Tables of all blocks, in a fixed order: a pure function of the records and their predictions.

    Cells that a plan left out stand as rows in the tables of their dataset and backbone.
    """
    blocks: dict[tuple[str, ...], list[tuple[Path, RunRecord]]] = defaultdict(list)
    # a copied record counts once
    once = {record.identity_hash(): (path, record) for path, record in sorted(found, reverse=True)}
    for path, record in sorted(once.values(), key=lambda item: item[1].run):
        recipe = json.dumps(record.recipe, sort_keys=True)
        blocks[record.protocol, record.dataset, record.fingerprint, record.backbone, record.weights, recipe].append(
            (path, record)
        )
    tables = [_table(blocks[key]) for key in sorted(blocks)]
    missing = list(dict.fromkeys(absent))
    for table in tables:
        own = [cell for cell in missing if (cell.dataset, cell.backbone) == (table.dataset, table.backbone)]
        table.rows += [_absent(cell, table) for cell in own]
        table.rows.sort(key=_place)
    return tables


def _absent(cell: Absent, table: Table) -> Row:
    metrics = dict.fromkeys(table.rows[0].metrics)
    return Row(cell.method, cell.budget, "n/a", (), 0, metrics, reason=cell.reason)


Cell = list[tuple[Path, RunRecord]]


def _cells(block: Cell) -> list[Cell]:
    """Records of one block by cell, sorted by seed; of several versions of a method's code the newest counts.

    Runs of different searches are different cells, whatever these chose.
    """
    versions: dict[tuple[str, str, str], dict[str, Cell]] = defaultdict(lambda: defaultdict(list))
    for path, record in block:
        config = json.dumps([_settings(record), record.tuned, len(record.candidates)], sort_keys=True)
        versions[record.label, record.budget, config][record.code].append((path, record))
    newest = [
        max(versions[key].values(), key=lambda cell: max((r.created, r.code) for _, r in cell))
        for key in sorted(versions)
    ]
    cells = []
    for versed in newest:
        searches: dict[tuple[str, ...], Cell] = defaultdict(list)
        for path, record in versed:
            searches[tuple(record.candidates)].append((path, record))
        cells += [sorted(searches[key], key=lambda item: item[1].seed) for key in sorted(searches)]
    return cells


def _settings(record: RunRecord) -> dict[str, Any]:
    """Settings of the method, those of its source as typed, `SOURCE.KEY`, and a paper's rule of selection."""
    of_source = {f"{record.source}.{key}": value for key, value in record.source_config.items()}
    return record.config | of_source | ({"selection": record.criterion} if record.criterion else {})


def _table(block: Cell) -> Table:
    cells = _cells(block)
    first = block[0][1]
    samples = [_sample(cell) for cell in cells]
    baseline = _baseline(cells)
    rows = []
    for cell, sample, label in zip(cells, samples, _distinct(cells), strict=True):
        row = _row(cell, sample, label)
        if baseline is not None:
            erm, erm_sample = cells[baseline], samples[baseline]
            if cell is not erm:
                row.versus_erm = _differences(cell, sample, erm, erm_sample)
            row.cost = _cost_ratio(cell, erm)
        rows.append(row)
    return Table(
        protocol=first.protocol,
        dataset=first.dataset,
        fingerprint=first.fingerprint,
        backbone=first.backbone,
        weights=first.weights,
        recipe=first.recipe,
        gaps=[name for name in first.metrics if name.startswith("gap_")],
        rows=rows,
        device=", ".join(sorted({str(r.env.get("device", "unknown")) for _, r in block})),
    )


def _place(row: Row) -> tuple[int, float, str, str]:
    """From poorest to richest budget, best first."""
    return _order(row.budget), -_value(row, "wga"), row.method, row.budget


def _order(budget: str) -> int:
    return Budget.parse(budget).order


def _value(row: Row, name: str) -> float:
    estimate = row.metrics[name]
    return estimate.mean if estimate else 0.0


def _baseline(cells: list[Cell]) -> int | None:
    """Position of the ERM cell that others are compared with: at the poorest budget, there with the most seeds (a
    search leaves the defaults on its first seed alone), and of those without a search.
    """

    def place(i: int) -> tuple[int, int, int]:
        first = cells[i][0][1]
        return _order(first.budget), -len(cells[i]), len(first.candidates)

    return min((i for i, cell in enumerate(cells) if cell[0][1].label == "erm"), key=place, default=None)


@dataclass(frozen=True, eq=False)
class _Sample:
    seeds: tuple[int, ...]
    metrics: dict[str, Samples]


def _sample(cell: Cell) -> _Sample | None:
    """Bootstrap samples of a cell; None where the licence keeps the labels out of the records."""
    if not all(record.predictions and record.predictions.has_labels for _, record in cell):
        return None
    arrays: list[Arrays] = [records.read_predictions(path, record) for path, record in cell]
    outcome = Outcome.of([record for _, record in cell], arrays)
    weights = statistics.unit_weights(outcome.total.shape[0])
    return _Sample(outcome.seeds, statistics.sample_metrics(outcome, weights, cell[0][1]))


def _estimate(values: list[float | None], sample: _Sample | None, name: str) -> Estimate | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    mean = float(np.mean(known))
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
    if sample is None or name not in sample.metrics:
        return Estimate(mean, sd, float("nan"), float("nan"))
    return Estimate(mean, sd, *statistics.interval(statistics.over_seeds(sample.metrics[name])))


def _distinct(cells: list[Cell]) -> list[str]:
    """Method labels; where a method stands twice at a budget, with the settings in which its rows differ.

    Of searched rows these are the modes alone, since every search draws other numbers; what is still called the same
    is numbered.
    """
    firsts = [cell[0][1] for cell in cells]
    twins: dict[tuple[str, str, bool], list[dict[str, Any]]] = defaultdict(list)
    for record in firsts:
        twins[record.label, record.budget, bool(record.candidates)].append(_settings(record))
    parts: list[list[str]] = []
    for record in firsts:
        own, searched = _settings(record), bool(record.candidates)
        others = twins[record.label, record.budget, searched]
        keys = [key for key in own if len({json.dumps(other.get(key)) for other in others}) > 1]
        draw = [f"draw {record.draw} of {len(record.candidates)}"] if searched else []
        parts.append(draw + [f"{key}={own[key]}" for key in keys if not searched or isinstance(own[key], str)])
    places = [(record.label, record.budget, *part) for record, part in zip(firsts, parts, strict=True)]
    for i, (record, part) in enumerate(zip(firsts, parts, strict=True)):
        if record.candidates and Counter(places)[places[i]] > 1:
            part.append(f"search {1 + places[:i].count(places[i])}")
    return [
        f"{record.label} ({', '.join(part)})" if part else record.label
        for record, part in zip(firsts, parts, strict=True)
    ]


def _row(cell: Cell, sample: _Sample | None, label: str) -> Row:
    first = cell[0][1]
    names = [name for name in first.metrics if name in ("wga", *MEANS) or name.startswith("gap_")]
    return Row(
        method=label,
        budget=first.budget,
        tag=first.policy,
        seeds=tuple(record.seed for _, record in cell),
        labels=max(record.labels.total_a for _, record in cell if record.labels),
        settings=_settings(first) | {f"recipe.{key}": value for key, value in first.tuned.items()},
        searched=bool(first.candidates),
        agreement=_agreement([record for _, record in cell]),
        rendered=max(record.labels.n_rendered for _, record in cell if record.labels),
        metrics={name: _estimate([record.metrics[name] for _, record in cell], sample, name) for name in names},
        held={
            name: _estimate([getattr(record, part).get("wga") for _, record in cell], None, name)
            for name, part in HELD.items()
        },
    )


def _agreement(cell: list[RunRecord]) -> dict[str, float]:
    """Agreement of a source's groups with the true ones on the split that is fitted on; train where it is both."""
    splits = [record.agreement.get("train", record.agreement.get("val")) for record in cell]
    known = [values for values in splits if values]
    if len(known) < len(cell):
        return {}
    return {name: float(np.mean([values[name] for values in known])) for name in AGREEMENT}


def _differences(cell: Cell, sample: _Sample | None, erm: Cell, erm_sample: _Sample | None) -> dict[str, Difference]:
    """Paired differences to ERM over the seeds that both have."""
    if sample is None or erm_sample is None:
        return {}
    seeds = [seed for seed in sample.seeds if seed in erm_sample.seeds]
    if not seeds:
        return {}
    ours = [sample.seeds.index(seed) for seed in seeds]
    theirs = [erm_sample.seeds.index(seed) for seed in seeds]
    values = {record.seed: record.metrics for _, record in cell}
    erm_values = {record.seed: record.metrics for _, record in erm}
    differences = {}
    for name in sample.metrics:
        drawn = statistics.over_seeds(sample.metrics[name][ours] - erm_sample.metrics[name][theirs])
        pairs = [(values[seed][name], erm_values[seed][name]) for seed in seeds]
        mean = np.mean([a - b for a, b in pairs if a is not None and b is not None])
        differences[name] = Difference(float(mean), *statistics.interval(drawn))
    return differences


def _cost_ratio(cell: Cell, erm: Cell) -> CostRatio | None:
    """Seconds on the device relative to ERM's, summed over common seeds; None across devices."""
    baseline = {record.seed: record for _, record in erm}
    pairs = [(record, baseline[record.seed]) for _, record in cell if record.seed in baseline]
    if any(a.env.get("device") != b.env.get("device") for a, b in pairs):
        return None
    costs = [(a.cost, b.cost) for a, b in pairs if a.cost is not None and b.cost is not None]
    unit = sum(erm.scratch.device_s for _, erm in costs)
    if unit <= 0:
        return None
    return CostRatio(
        marginal=sum(own.marginal.device_s for own, _ in costs) / unit,
        scratch=sum(own.scratch.device_s for own, _ in costs) / unit,
        search=tuning.cost.device_s * len(pairs) / unit if (tuning := pairs[0][0].tuning) else 0.0,
        same_session=all(a.env.get("session") == b.env.get("session") for a, b in pairs),
    )
