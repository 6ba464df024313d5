"""One request, looked up and checked: names, settings, budget, and whether its parts go together."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .backbone import Backbone
from .backbones import check_backbone
from .budget import RUNGS, SOME, Budget, Requires
from .errors import UnknownName, UserError, one_line
from .pictures import with_pixels
from .record_parts import LONGEST
from .registry import BACKBONES, DATASETS, METHODS, SOURCES, MethodEntry
from .search import RECIPE, Search
from .selection import CRITERIA
from .spec import PAPER, PROTOCOL, PSEUDO, Card, MethodName, Recipe, override
from .store import Dataset

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


# -------------------------------------------------------------------------------------------------------- a request


@dataclass(frozen=True)
class Cell:
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


def initial_weights(request: Request, card: Card) -> str:
    """Weights asked for; by default the dataset's own, which belong to its own backbone."""
    own = card.weights if request.backbone in ("", card.backbone) else "none"
    return request.weights or own


def resolve(
    request: Request,
    make: Callable[[str, tuple[tuple[str, str], ...]], tuple[Dataset, Card]],
    checked: set[tuple[Any, ...]],
    problems: list[str],
) -> Cell | None:
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

    problems += _malformed(request)
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
    model = attempt(lambda: check_backbone(request.backbone or card.backbone, card, initial_weights(request, card)))
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
    cell = Cell(entry, source, name, requires, made[0], card, budget, recipe, config, source_config)
    for check in _checks(cell, request, model, checked):
        attempt(check)
    return cell


def _malformed(request: Request) -> Iterator[str]:
    """What is wrong with a request whatever its names mean."""
    if not request.seeds or min(request.seeds) < 0:
        yield f"seeds must be whole numbers from 0, got {list(request.seeds)}"
    if request.tuning == 1:
        yield "tuning must be 0 (no search) or at least 2 draws, the first of which is the defaults, got 1"
    if request.tuning > MOST_DRAWS:
        yield f"tuning must be at most {MOST_DRAWS:,} draws: all of them are planned before the first is run"
    if request.extra not in ("", "val"):
        yield f"--extra {request.extra}: only val can be had, the granted validation images"


def _checks(
    cell: Cell, request: Request, model: Backbone | None, checked: set[tuple[Any, ...]]
) -> Iterator[Callable[[], object]]:
    """What raises `UserError` where parts of a cell do not go together; `model` is None where it is wrong itself."""
    yield partial(cell.budget.columns, cell.card)
    yield partial(_check_criterion, request, cell.budget)
    configs = {cell.name.host: cell.config, (cell.source or SOURCES[PSEUDO]).name: cell.source_config}
    for key, text in request.ranges.items():
        yield partial(_check_range, key, text, configs)
    for part, settings in ((cell.entry, cell.config), (cell.source, cell.source_config)):
        pair = part, settings, model and model.name, cell.card.name
        if part and model and hasattr(part.cls, "check_model") and pair not in checked:
            checked.add(pair)
            yield partial(part.cls(settings).check_model, model, cell.card)
    for settings in (cell.config, cell.source_config):
        if hasattr(settings, "check"):
            yield partial(settings.check, cell.recipe, cell.card)


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


def unused_settings(requests: list[Request]) -> Iterator[str]:
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
