"""From what was asked for to run specifications: names, overrides, budgets, all checked before any work."""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from .backbones import BUILT_IN
from .errors import UserError
from .fingerprint import code_fingerprint
from .pools import Report
from .record import RunRecord
from .registry import BACKBONES, METHODS, SOURCES, MethodEntry
from .resolving import (
    DEFAULT_SEEDS,
    Cell,
    Request,
    find_card,
    initial_weights,
    make_dataset,
    native_budget,
    resolve,
    unused_settings,
)
from .search import Search
from .selection import PSEUDO_WGA
from .spec import PSEUDO, Block, RunSpec, method_label
from .store import Store, open_store
from .tuning import Space, Sweep, frozen

__all__ = [
    "DEFAULT_SEEDS",
    "Absent",
    "Plan",
    "Planned",
    "Request",
    "code_now",
    "entries_fingerprint",
    "find_card",
    "make_dataset",
    "native_budget",
    "plan",
    "weights_identity",
]


@dataclass(frozen=True)
class Absent:
    """A cell that is not run, and why."""

    dataset: str
    backbone: str
    method: str
    budget: str
    reason: str


@dataclass(frozen=True)
class Planned:
    """A run to make, or a cell that is not run."""

    label: str
    spec: RunSpec | None = None
    absent: Absent | None = None
    failed: bool = False
    """Whether it is absent because its search has failed."""

    @property
    def reason(self) -> str:
        """Why there is no run."""
        return self.absent.reason if self.absent else ""


@dataclass
class Plan:
    """Runs in order, the opened stores they read, by dataset name, and searches, whose runs follow from them."""

    runs: list[Planned]
    stores: dict[str, Store]
    sweeps: list[Sweep] = field(default_factory=list)

    def searched(self) -> list[Planned]:
        """The candidates of all searches, each once."""
        specs = dict.fromkeys(one for sweep in self.sweeps for one in sweep.candidates)
        return [Planned(spec.label, spec) for spec in specs]

    def decided(self, records: Mapping[str, RunRecord]) -> "Plan":
        """The plan once its searches have ended, given the candidates' records by hash: the best draw of each on every
        seed, or why there is none.
        """
        chosen: list[Planned] = []
        for sweep in self.sweeps:
            try:
                chosen += [Planned(spec.label, spec) for spec in sweep.chosen(records)]
            except UserError as error:
                run = sweep.runs[0]
                absent = Absent(run.block.dataset, run.block.backbone, run.method_label, str(run.budget), str(error))
                chosen.append(Planned(sweep.label, absent=absent, failed=True))
        return Plan([*self.runs, *chosen], self.stores)


# ----------------------------------------------------------------------------------------------------------- plan


def plan(
    requests: Iterable[Request],
    root: Path | None = None,
    *,
    strict: bool = False,
    report: Report = lambda what, done, total: None,
) -> Plan:
    """Turn requests into runs; raises one `UserError` that lists everything wrong with them.

    Opens the stores that they need, building those that are missing.
    """
    problems: list[str] = []
    make = cache(lambda name, data: make_dataset(name, root, dict(data)))  # users' own data are read for their card
    checked: set[tuple[Any, ...]] = set()
    resolved = [(request, resolve(request, make, checked, problems)) for request in requests]
    problems += unused_settings([request for request, _ in resolved])
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    runs: list[Planned] = []
    sweeps: list[Sweep] = []
    opened: dict[str, Store] = {}
    for request, cell in resolved:
        if cell is None:
            continue
        name, card, budget = cell.name, cell.card, cell.budget
        backbone = request.backbone or card.backbone
        needs = cell.source.requires if cell.source else None
        policy = cell.requires.resolve(budget, name.policy, needs, bool(name.extra))
        reason = cell.requires.lacks(card) or policy.reason
        if reason:
            label = method_label(name.host, name.source, name.policy, name.extra)
            absent = Absent(card.name, backbone, label, str(budget), reason)
            runs.append(Planned(f"{label} on {card.name} · {budget}", absent=absent))
            continue
        source = SOURCES[PSEUDO] if policy.tag == "pseudo" else cell.source
        if card.name not in opened:
            opened[card.name] = open_store(cell.dataset, card, root, strict=strict, report=report)
        specs = list(_specs(request, cell, source, policy.tag, opened[card.name]))
        if request.tuning:
            sweeps.append(Sweep.over(specs, _space(request, cell, source), request.tuning))
        else:
            runs += [Planned(spec.label, spec) for spec in specs]
    names = {asked: store.card.name for asked, store in opened.items()}
    stores = {store.card.name: store for store in opened.values()}
    return Plan([_renamed(run, names) for run in runs], stores, sweeps)


def _specs(request: Request, cell: Cell, source: MethodEntry | None, policy: str, store: Store) -> Iterator[RunSpec]:
    """One run per seed."""
    backbone = request.backbone or cell.card.backbone
    weights, file = weights_identity(initial_weights(request, cell.card))
    code, of_backbone = entries_fingerprint(cell.entry, source), backbone_code(backbone)
    selects_by_source = source is not None and cell.requires.fit == "none"
    for seed in request.seeds:
        block = Block(
            dataset=store.card.name,
            fingerprint=store.fingerprint,
            backbone=backbone,
            weights=weights,
            recipe=cell.recipe,
            seed=seed,
            backbone_code=of_backbone,
            weights_file=file,
        )
        yield RunSpec(
            block=block,
            method=cell.name.host,
            source=source.name if source else "",
            policy=policy,
            config=frozen(cell.config),
            budget=cell.budget,
            code=code,
            source_config=frozen(cell.source_config) if source else (),
            extra=cell.name.extra,
            protocol=request.protocol,
            criterion=request.criterion or (PSEUDO_WGA if selects_by_source else ""),
        )


def _space(request: Request, cell: Cell, source: MethodEntry | None) -> Space:
    parts = [(cell.name.host, cell.config), *([(source.name, cell.source_config)] if source else [])]
    fixed = frozenset(key if "." in key else f"{cell.name.host}.{key}" for key in request.settings)
    return Space(tuple(parts), cell.recipe, {key: Search(text) for key, text in request.ranges.items()}, fixed)


def _renamed(run: Planned, names: dict[str, str]) -> Planned:
    """A cell that is not run stands under the name of the dataset that was found, beside those that are."""
    if run.absent is None or run.absent.dataset not in names:
        return run
    return replace(run, absent=replace(run.absent, dataset=names[run.absent.dataset]))


def entries_fingerprint(entry: MethodEntry, source: MethodEntry | None) -> str:
    """Fingerprint of the code of a method and, if it is composed with one, of its group source."""
    modules = [sys.modules[part.cls.__module__] for part in (entry, source) if part]
    return code_fingerprint(*modules)


def code_now(method: str, source: str) -> str:
    """Fingerprint of the code of a method and its source as it is now, empty where one of them is gone."""
    if method not in METHODS or (source and source not in SOURCES):
        return ""
    return entries_fingerprint(METHODS[method], SOURCES[source] if source else None)


def backbone_code(name: str) -> str:
    """Fingerprint of a backbone's code, empty for the engine's own, which belong to the engine's fingerprint."""
    module = BACKBONES[name.partition(":")[0]].build.__module__
    return "" if module in BUILT_IN else code_fingerprint(sys.modules[module])


def weights_identity(weights: str) -> tuple[str, str]:
    """Identity of the initial weights, by content where it is a file, and the file's path."""
    path = Path(weights)
    if not path.is_file():
        return weights, ""
    with path.open("rb") as file:
        return f"{path.stem}-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}", str(path.resolve())
