"""From what was asked for to run specifications: names, overrides, budgets, all checked before any work."""

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from .backbones import build_backbone, check_backbone
from .budget import RUNGS, SOME, Budget, Requires
from .errors import UnknownName, UserError, one_line
from .fingerprint import code_fingerprint
from .pictures import with_pixels
from .pools import Report
from .record import LONGEST, RunRecord
from .registry import BACKBONES, DATASETS, METHODS, SOURCES, MethodEntry
from .search import RECIPE, Search
from .selection import CRITERIA, PSEUDO_WGA
from .spec import PAPER, PROTOCOL, PSEUDO, Block, Card, MethodName, Recipe, RunSpec, method_label, override
from .store import Dataset, Store, open_store
from .tuning import Space, Sweep, frozen

DEFAULT_SEEDS = (0, 1, 2)
MOST_DRAWS = 10_000
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One cell asked for: a method on a dataset over seeds; empty fields take the defaults of dataset and method."""

    dataset: str
    method: str
    budget: str = ""
    backbone: str = ""
    weights: str = ""
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    settings: dict[str, str] = field(default_factory=dict)
    extra: str = ""
    tuning: int = 0
    """Draws of a search; 0: none."""
    ranges: dict[str, str] = field(default_factory=dict)
    """Search ranges other than those of method and recipe, by setting."""
    protocol: str = PROTOCOL
    criterion: str = ""


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


# ------------------------------------------------------------------------------------------------------- datasets


def find_card(name: str) -> tuple[type[Any], Card]:
    """The class and card behind `DATASET[:VARIANT]`."""
    base, _, variant = name.partition(":")
    entry = DATASETS[base]
    return entry.cls, entry.card(variant)


@dataclass(frozen=True)
class DataSettings:
    """`data.KEY` settings: which of the dataset's transforms, and the shorter side of its images in pixels."""

    transform: str = ""
    size: int = 0


def make_dataset(name: str, root: Path | None = None, settings: dict[str, str] | None = None) -> tuple[Dataset, Card]:
    """A dataset object of a variant and its card, which for users' own data is read from the files.

    `settings` are those of `DataSettings`. Raises `UserError`.
    """
    cls, card = find_card(name)
    chosen, problems = override(DataSettings(), settings or {}, "data")
    if problems:
        raise UserError("\n".join(problems))
    if hasattr(cls, "describe"):
        card = cls(card).describe(root)
    card = with_pixels(card, chosen.transform, chosen.size)
    return cls(card), card


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
    resolved = [(request, _resolve(request, make, checked, problems)) for request in requests]
    problems += _unused_settings([request for request, _ in resolved])
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


def _specs(request: Request, cell: "_Cell", source: MethodEntry | None, policy: str, store: Store) -> Iterator[RunSpec]:
    """One run per seed."""
    backbone = request.backbone or cell.card.backbone
    weights, file = weights_identity(_initial(request, cell.card))
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


def _space(request: Request, cell: "_Cell", source: MethodEntry | None) -> Space:
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
    return "" if module == build_backbone.__module__ else code_fingerprint(sys.modules[module])


@dataclass(frozen=True)
class _Cell:
    """A request with everything looked up and every setting applied."""

    entry: MethodEntry
    source: MethodEntry | None
    name: MethodName
    requires: Requires
    dataset: Dataset
    card: Card
    budget: Budget
    recipe: Recipe
    config: Any
    source_config: Any


def _initial(request: Request, card: Card) -> str:
    """Weights asked for; by default the dataset's own, which belong to its own backbone."""
    own = card.weights if request.backbone in ("", card.backbone) else "none"
    return request.weights or own


def _resolve(
    request: Request,
    make: Callable[[str, tuple[tuple[str, str], ...]], tuple[Dataset, Card]],
    checked: set[tuple[Any, ...]],
    problems: list[str],
) -> _Cell | None:
    """Look all names of a request up and apply its settings; what is wrong is added to `problems`.

    `make` is `make_dataset`, given name and settings; `checked` are methods and models that were tried together, which
    for a large network takes a second.
    """

    def attempt(look: Callable[[], T]) -> T | None:
        try:
            return look()
        except UserError as error:
            problems.append(str(error))
            return None

    if not request.seeds or min(request.seeds) < 0:
        problems.append(f"seeds must be whole numbers from 0, got {list(request.seeds)}")
    if request.tuning == 1:
        problems.append("tuning must be 0 (no search) or at least 2 draws, the first of which is the defaults, got 1")
    if request.tuning > MOST_DRAWS:
        problems.append(f"tuning must be at most {MOST_DRAWS:,} draws: all of them are planned before the first is run")
    if request.extra not in ("", "val"):
        problems.append(f"--extra {request.extra}: only val can be had, the granted validation images")
    name = attempt(lambda: MethodName.parse(request.method + ("(+val)" if request.extra else "")))
    entry = attempt(lambda: METHODS[name.host]) if name else None
    data = {key.removeprefix("data."): value for key, value in request.settings.items() if key.startswith("data.")}
    made = attempt(lambda: make(request.dataset, tuple(data.items())))
    card = made[1] if made else None
    source = attempt(lambda: SOURCES[name.source]) if name and name.source else None
    family = request.backbone.partition(":")[0]
    known = attempt(lambda: BACKBONES[family]) if family else True
    asked = attempt(lambda: Budget.parse(request.budget or "none"))
    if not (name and entry and made and card and asked and known) or (name.source and not source):
        return None
    model = attempt(lambda: check_backbone(request.backbone or card.backbone, card, _initial(request, card)))
    borrowed = source or SOURCES[PSEUDO]
    changes = attempt(lambda: _split_settings(request.settings, name.host, borrowed.name))
    if changes is None:
        return None
    recipe, found = override(card.recipe, changes[0], "recipe")
    config, more = override(entry.config(), changes[1], name.host)
    source_config, most = override(borrowed.config(), changes[2], borrowed.name)
    problems += [*found, *more, *most]
    requires: Requires = config.requires(entry.requires) if hasattr(config, "requires") else entry.requires
    budget = asked if request.budget else Budget.parse(native_budget(name, requires))
    attempt(lambda: budget.columns(card))
    attempt(lambda: _check_criterion(request, budget))
    for key, text in request.ranges.items():
        attempt(partial(_check_range, key, text, {name.host: config, borrowed.name: source_config}))
    for part, settings in ((entry, config), (source, source_config)):
        pair = part, settings, model and model.name, card.name
        if part and model and hasattr(part.cls, "check_model") and pair not in checked:
            checked.add(pair)
            attempt(partial(part.cls(settings).check_model, model, card))
    for settings in (config, source_config):
        if hasattr(settings, "check"):
            attempt(partial(settings.check, recipe, card))
    return _Cell(entry, source, name, requires, made[0], card, budget, recipe, config, source_config)


def _check_criterion(request: Request, budget: Budget) -> None:
    """Raise `UserError` unless the selection rule asked for exists, belongs to a paper, and sees no more labels."""
    if not request.criterion:
        return
    known = [name for name, criterion in CRITERIA.items() if not criterion.of_source]
    if request.criterion not in known:
        raise UnknownName("selection", request.criterion, known)
    if request.protocol != PAPER:
        raise UserError(f"selection {request.criterion}: only under protocol {PAPER}; else the budget's rule selects")
    if CRITERIA[request.criterion].needs_groups and not budget.grant.val:
        raise UserError(f"selection {request.criterion} needs validation attributes, budget {budget} grants none")


def _check_range(key: str, text: str, configs: dict[str, Any]) -> None:
    """Raise `UserError` unless a search range is one, and its setting may be searched."""
    Search(text)
    prefix, _, name = key.rpartition(".")
    if prefix == "recipe":
        if name not in RECIPE:
            reason = "the rest of the recipe is the same for all methods"
            raise UserError(f"search {key}: only recipe.{' and recipe.'.join(RECIPE)} can be searched, {reason}")
    elif prefix in configs:
        known = [field.name for field in fields(configs[prefix])]
        if name not in known:
            raise UnknownName(f"{prefix} key", name, known)
    elif prefix not in METHODS and prefix not in SOURCES:
        raise UnknownName("search", key, [f"{part}.{name}" for part in ("recipe", *configs)])


def _unused_settings(requests: list[Request]) -> Iterator[str]:
    """Settings and search ranges of a method or source that no request has anything to do with."""
    names = [part for request in requests for part in re.split(r"[+@(]", request.method)]
    named = {*names, PSEUDO}  # which stands behind @pseudo, asked for or not
    given = [("setting", key) for request in requests for key in request.settings]
    given += [("search", key) for request in requests for key in request.ranges]
    for kind, key in dict.fromkeys(given):
        prefix, dot, _ = key.rpartition(".")
        if dot and prefix not in named and (prefix in METHODS or prefix in SOURCES):
            methods = ", ".join(dict.fromkeys(request.method for request in requests))
            yield f"{kind} {key} reaches no run: {prefix} has no part in {methods}"


def native_budget(name: MethodName, requires: Requires | None = None) -> str:
    """The rung of a method when none is asked for; `requires` are its needs, by default as declared.

    A composed method is at home where its source is, with one that hands on true groups at the poorest rung that grants
    them all; what fits on granted validation images at `val` at least.
    """
    own = requires or METHODS[name.host].requires
    native = SOURCES[name.source].requires.native if name.source else own.native
    if name.source and SOURCES[name.source].requires.fit == "host":
        native = "val" if own.fit == "val" else "train+val"
    if name.policy in SOME or (name.extra and not RUNGS[native].val_fit):
        return "val"
    return native


def _split_settings(settings: dict[str, str], host: str, source: str) -> tuple[dict[str, str], ...]:
    """By the prefix of their key: those of the recipe (`recipe.KEY`), of the method and of its source.

    `METHOD.KEY` goes to that method only, a bare KEY to every method of the request.
    """
    parts: tuple[dict[str, str], ...] = {}, {}, {}
    for key, value in settings.items():
        prefix, dot, rest = key.rpartition(".")
        if max(len(key), len(value)) > LONGEST:
            raise UserError(
                f"setting {one_line(key, 40)}: it is longer than the {LONGEST} characters that a table shows"
            )
        if prefix == "data":  # what pixels are read, not how is trained
            continue
        if prefix == "recipe":
            parts[0][rest] = value
        elif not dot or prefix == host:
            parts[1][rest] = value
        elif prefix == source:
            parts[2][rest] = value
        elif prefix not in METHODS and prefix not in SOURCES:
            raise UnknownName("setting", key, [f"recipe.{rest}", f"{host}.{rest}"])
    return parts


def weights_identity(weights: str) -> tuple[str, str]:
    """Identity of the initial weights, by content where it is a file, and the file's path."""
    path = Path(weights)
    if not path.is_file():
        return weights, ""
    with path.open("rb") as file:
        return f"{path.stem}-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}", str(path.resolve())
