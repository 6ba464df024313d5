"""Registries: a decorator registers an entry, files of a folder and entry points of other packages are discovered.

An entry is found by dropping one file into `methods/` or `datasets/`, or by an installed package that declares the
entry point group `worstgroup.methods`, `worstgroup.datasets` or `worstgroup.backbones`; names that no entry has get the
closest ones offered.
"""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from .budget import Requires
from .errors import UnknownName, UserError
from .spec import Card, digest

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])
F = TypeVar("F", bound=Callable[..., Any])
PACKAGE = __name__.rpartition(".benchmark.")[0]


class Registry(Generic[T]):
    """Names to entries of one kind, filled on first use from a subpackage and from entry points."""

    def __init__(self, kind: str, folder: str, group: str | None = None) -> None:
        self.kind = kind
        self._folder = folder
        self._group = group
        self._entries: dict[str, T] = {}
        self._discovered = False

    def add(self, name: str, entry: T) -> None:
        """Register one entry; a name can be taken only once."""
        if name in self._entries:
            raise UserError(f"two {self.kind}s are called {name!r}; rename one of them")
        self._entries[name] = entry

    def discover(self) -> None:
        """Import every module of the folder and every entry point, once."""
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(f"{PACKAGE}.{self._folder}")
        for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
            if not module.ispkg:
                importlib.import_module(f"{package.__name__}.{module.name}")
        for entry in entry_points(group=self._group) if self._group else ():
            try:
                entry.load()
            except Exception as error:
                raise UserError(
                    f"the installed package behind entry point {entry.name!r} ({self._group}) cannot be loaded: {error}"
                ) from error

    def __getitem__(self, name: str) -> T:
        self.discover()
        if name not in self._entries:
            raise UnknownName(self.kind, name, self._entries, f"See `worstgroup ls {self.kind}s`.")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        self.discover()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self.discover()
        return iter(sorted(self._entries))


@dataclass(frozen=True)
class MethodEntry:
    """A registered method or group source: its class, its typed configuration and what it needs."""

    name: str
    cls: type[Any]
    config: type[Any]
    requires: Requires
    paper: str

    def make(self, settings: Iterable[tuple[str, Any]] = ()) -> Any:
        """The method or source with these settings, the others at their defaults."""
        return self.cls(self.config(**dict(settings)))

    @property
    def summary(self) -> str:
        """First line of the docstring of the method's file."""
        return (sys.modules[self.cls.__module__].__doc__ or "").strip().partition("\n")[0]


@dataclass(frozen=True)
class DatasetEntry:
    """A registered dataset: its class and the cards of its variants (`""` is the default one).

    `make` gives the card of a variant that is none of these, e.g. any pair of attributes, or None.
    """

    name: str
    cls: type[Any]
    cards: dict[str, Card]
    make: Callable[[str], Card | None] = lambda variant: None

    @property
    def of_package(self) -> bool:
        """Whether it is one of the package's own, whose cards are edited only in a checkout."""
        return self.cls.__module__.startswith(f"{PACKAGE}.datasets.")

    def card(self, variant: str) -> Card:
        """The card of one variant, or `UnknownName`."""
        if variant not in self.cards:
            made = self.make(variant)
            if made is not None:
                return made
            known = [f"{self.name}:{v}" if v else self.name for v in self.cards]
            if not variant:
                raise UserError(f"{self.name} is a family of datasets: name one of {', '.join(known)}")
            raise UnknownName("dataset variant", f"{self.name}:{variant}", known)
        return self.cards[variant]


@dataclass(frozen=True)
class BackboneEntry:
    """A registered backbone: a builder and one line about it."""

    name: str
    build: Callable[..., Any]
    weights: tuple[str, ...]
    summary: str


METHODS: Registry[MethodEntry] = Registry("method", "methods", "worstgroup.methods")
SOURCES: Registry[MethodEntry] = Registry("source", "methods.groups", "worstgroup.sources")
DATASETS: Registry[DatasetEntry] = Registry("dataset", "datasets", "worstgroup.datasets")
BACKBONES: Registry[BackboneEntry] = Registry("backbone", "benchmark.backbones", "worstgroup.backbones")


@dataclass(frozen=True)
class NoConfig:
    """For a method with nothing to set beyond the recipe."""


def method(name: str, *, paper: str, requires: Requires, config: type[Any] = NoConfig) -> Callable[[C], C]:
    """Register a method class: an `Objective`, or a class with `fit(task) -> Predictor`.

    It is constructed with an instance of `config`, a frozen dataclass with a default for every field.
    """

    def register(cls: C) -> C:
        _check_config(f"method {name!r}", config)
        if not (hasattr(cls, "fit") or hasattr(cls, "loss")):
            raise UserError(f"method {name!r} needs `loss(batch)` (an Objective) or `fit(task)`")
        METHODS.add(name, MethodEntry(name, cls, config, requires, paper))
        return cls

    return register


def source(name: str, *, paper: str, requires: Requires, config: type[Any] = NoConfig) -> Callable[[C], C]:
    """Register a group source: a class with `attributes(task, split) -> Attributes`, for use as `HOST+SOURCE`.

    It is constructed with an instance of `config`, a frozen dataclass with a default for every field.
    """

    def register(cls: C) -> C:
        _check_config(f"source {name!r}", config)
        if not hasattr(cls, "attributes"):
            raise UserError(f"source {name!r} needs `attributes(task, split)`")
        SOURCES.add(name, MethodEntry(name, cls, config, requires, paper))
        return cls

    return register


def _check_config(what: str, config: type[Any]) -> None:
    if not is_dataclass(config) or any(f.default is f.default_factory is MISSING for f in fields(config)):
        raise UserError(f"{what}: config must be a dataclass with a default for every field")


def dataset(
    name: str, cards: dict[str, Card], make: Callable[[str], Card | None] = lambda variant: None
) -> Callable[[C], C]:
    """Register a dataset class with `__init__(card)`, `source_key(root)` and `load(root) -> Splits`.

    `make` gives the cards of variants that are too many to list, and None for what is no variant.
    """

    def register(cls: C) -> C:
        DATASETS.add(name, DatasetEntry(name, cls, cards, make))
        return cls

    return register


def backbone(name: str, *, weights: tuple[str, ...] = ("none",)) -> Callable[[F], F]:
    """Register a function that builds a `Backbone` of this name."""

    def register(build: F) -> F:
        summary = (build.__doc__ or "").strip().partition("\n")[0]
        BACKBONES.add(name, BackboneEntry(name, build, weights, summary))
        return build

    return register


def package_card(name: str) -> Card | None:
    """The package's own card of a dataset called as in cards and blocks, `waterbirds:place[112px]`; None where it is a
    plugin's.
    """
    base, _, variant = name.partition("[")[0].partition(":")
    if base not in DATASETS or not DATASETS[base].of_package:
        return None
    return DATASETS[base].cards.get(variant) or DATASETS[base].make(variant)


def plugin_name(path: Path) -> str:
    """What the module of a plugin is called, which is part of its entries' fingerprints."""
    return f"worstgroup_plugin_{path.stem}_{digest(str(path.resolve()))[:8]}"


def load_plugin(path: Path, name: str = "") -> None:
    """Import one Python file that registers entries; it runs with all rights of the user, so only when named.

    `name` is what its module is called where it is the copy of another file.
    """
    if not path.is_file():
        raise UserError(f"--plugin {path}: there is no such file")
    name = name or plugin_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"--plugin {path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"--plugin {path}: {type(error).__name__}: {error}") from error
