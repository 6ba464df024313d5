"""From what was asked for to run specifications: suites, names, overrides, budgets, all checked before any work."""

import hashlib
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .backbones import check_backbone
from .errors import UnknownName, UserError
from .fingerprint import code_fingerprint
from .registry import BACKBONES, DATASETS, METHODS, PACKAGE, SOURCES, MethodEntry
from .spec import Block, Budget, Card, MethodName, Recipe, RunSpec, override
from .store import Dataset, Store, open_store

DEFAULT_SEEDS = (0, 1, 2)
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One cell asked for: a method on a dataset over seeds; empty fields take the defaults of dataset and method."""

    dataset: str
    method: str
    budget: str = ""
    backbone: str = ""
    weights: str = "none"
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A run to make (`spec`), or a cell that cannot be run and why (`reason`)."""

    label: str
    spec: RunSpec | None = None
    reason: str = ""


@dataclass
class Plan:
    """Runs in order, and the opened stores they read, by dataset name."""

    runs: list[Planned]
    stores: dict[str, Store]


# --------------------------------------------------------------------------------------------------------- suites


class _SuiteBlock(BaseModel):
    model_config = ConfigDict(extra="forbid")
    dataset: str
    methods: list[str]
    backbone: str = ""
    weights: str = "none"
    settings: dict[str, str | int | float | bool] = {}


class Suite(BaseModel):
    """A suite file: what it is for, its seeds, and blocks of `METHOD [BUDGET]` lines."""

    model_config = ConfigDict(extra="forbid")
    summary: str
    seeds: list[int] = list(DEFAULT_SEEDS)
    blocks: list[_SuiteBlock]

    def requests(self) -> Iterator[Request]:
        """One request per line and block."""
        for block in self.blocks:
            for line in block.methods:
                method, _, budget = line.partition(" ")
                settings = {key: str(value) for key, value in block.settings.items()}
                yield Request(
                    block.dataset, method, budget.strip(), block.backbone, block.weights, tuple(self.seeds), settings
                )


def suite_names() -> list[str]:
    """Suites that come with the package."""
    folder = resources.files(f"{PACKAGE}.benchmark.suites")
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def read_suite(name: str) -> Suite:
    """A suite by its name, or from a path that ends in `.toml`."""
    if name.endswith(".toml"):
        path: Any = Path(name)
        if not path.is_file():
            raise UserError(f"suite {name}: there is no such file")
    else:
        if name not in suite_names():
            raise UnknownName(
                "suite", name, suite_names(), "A suite of your own is named by its path, ending in .toml."
            )
        path = resources.files(f"{PACKAGE}.benchmark.suites") / f"{name}.toml"
    try:
        return Suite.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"suite {name}: not a TOML file: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"suite {name}: {'.'.join(str(part) for part in first['loc'])}: {first['msg'].lower()}"
        ) from error


# ------------------------------------------------------------------------------------------------------- datasets


def find_card(name: str) -> tuple[type[Any], Card]:
    """The class and card behind `DATASET[:VARIANT]`."""
    base, _, variant = name.partition(":")
    entry = DATASETS[base]
    return entry.cls, entry.card(variant)


def make_dataset(name: str) -> tuple[Dataset, Card]:
    """A dataset object of a variant and its card."""
    cls, card = find_card(name)
    return cls(card), card


# ----------------------------------------------------------------------------------------------------------- plan


def plan(requests: Iterable[Request], root: Path | None = None) -> Plan:
    """Turn requests into runs; raises one `UserError` that lists everything wrong with them."""
    problems: list[str] = []
    resolved = [(request, _resolve(request, problems)) for request in requests]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    runs: list[Planned] = []
    stores: dict[str, Store] = {}
    for request, cell in resolved:
        if cell is None:
            continue
        entry, name, card, budget = cell.entry, cell.name, cell.card, cell.budget
        policy = entry.requires.resolve(budget, name.policy)
        if policy.tag == "n/a":
            runs.append(Planned(f"{request.method} on {card.name} · {budget}", reason=policy.reason))
            continue
        if card.name not in stores:
            stores[card.name] = open_store(make_dataset(request.dataset)[0], card, root)
        weights, file = _weights(request.weights)
        code = code_fingerprint(sys.modules[entry.cls.__module__])
        for seed in request.seeds:
            block = Block(
                dataset=card.name,
                fingerprint=stores[card.name].fingerprint,
                backbone=request.backbone or card.backbone,
                weights=weights,
                recipe=cell.recipe,
                seed=seed,
                weights_file=file,
            )
            spec = RunSpec(
                block=block,
                method=name.host,
                source=name.source,
                policy=policy.tag,
                config=tuple(sorted(asdict(cell.config).items())),
                budget=budget,
                code=code,
            )
            runs.append(Planned(spec.label, spec))
    return Plan(runs, stores)


@dataclass(frozen=True)
class _Cell:
    """A request with everything looked up and every setting applied."""

    entry: MethodEntry
    name: MethodName
    card: Card
    budget: Budget
    recipe: Recipe
    config: Any


def _resolve(request: Request, problems: list[str]) -> _Cell | None:
    """Look all names of a request up and apply its settings; what is wrong is added to `problems`."""

    def attempt(look: Callable[[], T]) -> T | None:
        try:
            return look()
        except UserError as error:
            problems.append(str(error))
            return None

    if not request.seeds or min(request.seeds) < 0:
        problems.append(f"seeds must be whole numbers from 0, got {list(request.seeds)}")
    name = attempt(lambda: MethodName.parse(request.method))
    entry = attempt(lambda: METHODS[name.host]) if name else None
    card = attempt(lambda: find_card(request.dataset)[1])
    budget = attempt(lambda: Budget.parse(request.budget or (entry.requires.native if entry else "none")))
    if name and name.source:
        attempt(lambda: SOURCES[name.source])
    if card and budget:
        attempt(lambda: budget.columns(card))
    family = request.backbone.partition(":")[0]
    known = attempt(lambda: BACKBONES[family]) if family else True
    if not (name and entry and card and budget and known):
        return None
    attempt(lambda: check_backbone(request.backbone or card.backbone, card, request.weights))
    changes = attempt(lambda: _split_settings(request.settings, name.host))
    if changes is None:
        return None
    recipe, found = override(card.recipe, changes[0], "recipe")
    config, more = override(entry.config(), changes[1], name.host)
    problems += [*found, *more]
    if hasattr(config, "check"):
        attempt(lambda: config.check(recipe))
    return _Cell(entry, name, card, budget, recipe, config)


def _split_settings(settings: dict[str, str], host: str) -> tuple[dict[str, str], dict[str, str]]:
    """`recipe.KEY` goes to the recipe, `METHOD.KEY` to that method only, a bare KEY to every method of the request."""
    recipe, config = {}, {}
    for key, value in settings.items():
        prefix, dot, rest = key.rpartition(".")
        if prefix == "recipe":
            recipe[rest] = value
        elif not dot or prefix == host:
            config[rest] = value
        elif prefix not in METHODS:
            raise UnknownName("setting", key, [f"recipe.{rest}", f"{host}.{rest}"])
    return recipe, config


def _weights(weights: str) -> tuple[str, str]:
    """Identity of the initial weights, by content where it is a file, and the file's path."""
    path = Path(weights)
    if not path.is_file():
        return weights, ""
    with path.open("rb") as file:
        return f"{path.stem}-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}", str(path.resolve())
