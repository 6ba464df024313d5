"""Suite files: blocks of datasets, methods and settings as TOML, and the requests that they stand for."""

import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UnknownName, UserError
from .planning import DEFAULT_SEEDS, Request
from .registry import PACKAGE
from .spec import PROTOCOL

T = TypeVar("T")
Scalar = str | int | float | bool
_Some = Annotated[list[T], Field(min_length=1)]


class _SuiteBlock(BaseModel):
    """Datasets x lines x the values of `grid`, each setting of which takes every value in turn."""

    model_config = ConfigDict(extra="forbid")
    dataset: str | _Some[str]
    methods: _Some[str]
    backbone: str | _Some[str] = ""
    weights: str = ""
    settings: dict[str, Scalar] = {}
    grid: dict[str, _Some[Scalar]] = {}
    search: dict[str, str] = {}

    def requests(self, common: dict[str, Scalar]) -> Iterator[Request]:
        """One request per dataset, backbone, line and point of the grid; `common` settings are the suite's."""
        datasets, backbones = ([part] if isinstance(part, str) else part for part in (self.dataset, self.backbone))
        points = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]
        for dataset, backbone, line, point in product(datasets, backbones, self.methods, points):
            method, _, budget = line.partition(" ")
            settings = {key: str(value) for key, value in (common | self.settings | point).items()}
            yield Request(
                dataset, method, budget.strip(), backbone, self.weights, settings=settings, ranges=self.search
            )


class Suite(BaseModel):
    """A suite file: what it is for, its seeds, and blocks of `METHOD [BUDGET]` lines.

    `tuning` draws of a search precede every row, from the ranges of methods and recipe or those in a block's `search`.
    Under `protocol = "paper"` recipe and ranges are a paper's, and so is `selection`, the rule that epochs and draws
    are chosen by.
    With `splits` its table shows worst-group accuracy on train and validation too.
    """

    model_config = ConfigDict(extra="forbid")
    summary: str
    seeds: list[int] = list(DEFAULT_SEEDS)
    protocol: Literal["wg1", "paper"] = PROTOCOL
    selection: str = ""
    tuning: Annotated[int, Field(ge=0)] = 0
    settings: dict[str, Scalar] = {}
    splits: bool = False
    blocks: _Some[_SuiteBlock]

    def requests(self) -> Iterator[Request]:
        """Those of all blocks."""
        common: dict[str, Any] = {
            "seeds": tuple(self.seeds),
            "tuning": self.tuning,
            "protocol": self.protocol,
            "criterion": self.selection,
        }
        return (replace(request, **common) for block in self.blocks for request in block.requests(self.settings))


def suite_names() -> list[str]:
    """Suites that come with the package."""
    folder = resources.files(f"{PACKAGE}.benchmark.suites")
    return sorted([*_suites_in(folder), *(f"repro/{name}" for name in _suites_in(folder / "repro"))])


def _suites_in(folder: Traversable) -> Iterator[str]:
    return (file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


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
