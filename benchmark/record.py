"""`RunRecord`: what one run was, used, cost and scored, as one typed JSON file beside its compressed predictions.

Records are written atomically and validated on every read. `created`, `env` and `cost` are facts of the moment; all the
rest is a function of the run's identity.
"""

import hashlib
import json
import math
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .budget import Budget
from .errors import CorruptFile, one_line
from .home import write_bytes
from .predictions import Arrays, unpack
from .record_parts import (
    LONGEST,
    MOST_ATTRIBUTES,
    AttributeRow,
    Cost,
    Count,
    EpochRow,
    GroupRow,
    Hash,
    Ledger,
    MaybeHash,
    Name,
    PredictionFile,
    RecipeFields,
    Rung,
    Selection,
    Settings,
    Share,
    Stage,
    Text,
    Tuning,
    Values,
)
from .spec import Attribute, Block, Recipe, RunSpec, method_label

__all__ = [
    "COUNTING",
    "ENVIRONMENT",
    "LONGEST",
    "SCHEMA",
    "AttributeRow",
    "Cost",
    "EpochRow",
    "GroupRow",
    "Ledger",
    "PredictionFile",
    "RunRecord",
    "Selection",
    "Stage",
    "Tuning",
    "find",
    "find_run",
    "predictions_path",
    "read",
    "read_predictions",
    "record_path",
    "slug",
    "write",
]

SCHEMA: Literal[1] = 1
ENVIRONMENT = "environment.json"
"""What lies beside submitted records and is none."""


class RunRecord(BaseModel):
    """One run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA
    status: Literal["finished", "failed"]
    created: str
    run: Hash
    protocol: Name
    dataset: Name
    fingerprint: Hash
    backbone: Name
    weights: Text
    backbone_code: MaybeHash = ""
    method: Name
    source: Name
    policy: Literal["", "class", "pseudo", "subset", "masked", "carried"]
    config: Settings
    source_config: Settings = {}
    extra: Literal["", "val"] = ""
    budget: Rung
    recipe: RecipeFields
    criterion: Name = ""
    tuned: Settings = {}
    draw: Count = 0
    candidates: list[Hash] = []
    seed: int
    code: Hash
    classes: list[Text]
    attributes: Annotated[list[AttributeRow], Field(max_length=MOST_ATTRIBUTES)]
    error: str = ""
    selection: Selection | None = None
    labels: Ledger | None = None
    groups: list[GroupRow] = []
    history: list[EpochRow] = []
    search: list[EpochRow] = []
    """The training that the epoch was chosen in, where the model was then fitted anew on those images too."""
    metrics: Values = {}
    val_metrics: Values = {}
    train_metrics: Values = {}
    """Of the selected model under the evaluation transform; empty in records from before train was predicted."""
    ci: dict[Literal["wga"], tuple[Share, Share]] = {}
    agreement: dict[Literal["train", "val"], Values] = {}
    """Of the source's groups with the true ones, on the splits that the method asked for."""
    cost: Cost | None = None
    tuning: Tuning | None = None
    env: dict[str, Any] = {}
    predictions: PredictionFile | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        """A finished record lacks no part."""
        if self.status == "finished":
            for part in ("selection", "labels", "groups", "metrics", "val_metrics", "ci", "cost", "predictions"):
                if not getattr(self, part):
                    raise ValueError(f"{part}: missing in a finished record")
            if len(self.candidates) != len(self.tuning.scores if self.tuning else ()):
                raise ValueError("tuning: does not say how each of the candidates did")
            if len(self.groups) != math.prod(self.shape):
                raise ValueError(f"groups: {len(self.groups)}, classes and attributes make {math.prod(self.shape)}")
            for g, group in enumerate(self.groups):
                if (group.correct_train is None) == bool(self.train_metrics):
                    raise ValueError(f"groups.{g}.correct_train: belongs together with train_metrics, one is missing")
            for name, attribute in ((f"attributes.{j}.aligned", a) for j, a in enumerate(self.attributes)):
                if len(attribute.aligned) != len(self.classes) or max(attribute.aligned) >= len(attribute.values):
                    raise ValueError(f"{name}: does not give one of the values to every class")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, S_1 .. S_k)."""
        return (len(self.classes), *(len(attribute.values) for attribute in self.attributes))

    def spec_attributes(self) -> list[Attribute]:
        """Attributes as metrics take them."""
        return [Attribute(a.name, tuple(a.values), tuple(a.aligned), a.train_ratio) for a in self.attributes]

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """Group counts as arrays (G,): n_train, m_val, correct_val, m_test, correct_test; correct_train if known."""
        names = ["n_train", "m_val", "correct_val", "m_test", "correct_test"]
        names += ["correct_train"] if self.train_metrics else []
        return {name: np.array([getattr(group, name) for group in self.groups], dtype=np.int64) for name in names}

    def identity_hash(self) -> str:
        """The run hash that the identity fields give; an edited field changes it."""
        return self.spec().hash

    def spec(self, weights_file: str = "") -> RunSpec:
        """The run that this is the record of; `weights_file` is the file that its initial weights were read from."""
        block = Block(
            dataset=self.dataset,
            fingerprint=self.fingerprint,
            backbone=self.backbone,
            weights=self.weights,
            recipe=Recipe(**self.recipe),
            seed=self.seed,
            backbone_code=self.backbone_code,
            weights_file=weights_file,
        )
        return RunSpec(
            block=block,
            method=self.method,
            source=self.source,
            policy=self.policy,
            config=tuple(sorted(self.config.items())),
            budget=Budget.parse(self.budget),
            code=self.code,
            source_config=tuple(sorted(self.source_config.items())),
            extra=self.extra,
            protocol=self.protocol,
            criterion=self.criterion,
            tuned=tuple(sorted(self.tuned.items())),
            draw=self.draw,
            candidates=tuple(self.candidates),
        )

    @property
    def is_candidate(self) -> bool:
        """Whether it is one of a search's draws, which stand in no table; draw 0 is the plain run."""
        return self.draw > 0 and not self.candidates

    @property
    def label(self) -> str:
        """Method as typed on the command line, with its policy."""
        return method_label(self.method, self.source, self.policy, self.extra)

    def to_json(self) -> bytes:
        """Canonical JSON, one field a line at the top level."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=True) + "\n").encode()


COUNTING = {"val_index": "val_prediction", "test_index": "test_prediction", "test_unit": "test_prediction"}
"""Arrays that a published record leaves out where they count from 0, and the one that is as long."""


def slug(text: str) -> str:
    """Text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.+@-]", "_", text).replace("..", "_")


def record_path(runs: Path, spec: RunSpec) -> Path:
    """Where a run's record lies; readable, and unique by the run's hash."""
    block = spec.block
    name = f"{slug(spec.method_label)}-{slug(str(spec.budget))}-s{block.seed}-{spec.hash[:12]}.json"
    return runs / slug(block.dataset) / slug(block.backbone) / name


def find_run(beside: Path, run: str) -> Path | None:
    """The record of another run of the same dataset and backbone as the one at `beside`, by its hash."""
    return next(beside.parent.glob(f"*-{run[:12]}.json"), None)


def predictions_path(record: Path) -> Path:
    """The .npz that belongs to a record."""
    return record.with_suffix(".npz")


def write(path: Path, record: RunRecord, packed: bytes | None) -> None:
    """Write the packed predictions, then the record that makes them count."""
    if packed is not None:
        write_bytes(predictions_path(path), packed)
    write_bytes(path, record.to_json())


def read(path: Path) -> RunRecord:
    """Read and validate a record; raises `CorruptFile` naming the first field that is wrong."""
    try:
        return RunRecord.model_validate_json(_content(path), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = one_line(".".join(str(part) for part in first["loc"]))
        problem = one_line(first["msg"].removeprefix("Value error, "))
        if field == "schema_version" and isinstance(first["input"], int) and first["input"] > SCHEMA:
            problem = f"written by a newer version, schema {first['input']}; update worstgroup"
        raise CorruptFile(f"{path}: {field + ': ' if field else ''}{problem}") from error
    except OSError as error:
        raise CorruptFile(f"{path}: cannot be read: {error.strerror}") from error


def _content(path: Path) -> bytes:
    """Bytes of a file; raises `CorruptFile` for a folder, and for a pipe or a device, which may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CorruptFile(f"{path}: cannot be read: not a file")
    return path.read_bytes()


def read_predictions(path: Path, record: RunRecord, part: str = "") -> Arrays:
    """Arrays of the .npz of the record at `path`, all or those whose name begins with `part`; raises `CorruptFile` when
    absent, altered or unreadable.

    Those that a published record leaves out because they only count from 0 are there again (`COUNTING`).
    """
    file = predictions_path(path)
    if record.predictions is not None and record.predictions.kept == "nothing":
        raise CorruptFile(f"{path}: predictions.kept: its predictions are not published, only its group counts are")
    try:
        content = _content(file)
    except OSError as error:
        raise CorruptFile(f"{file}: cannot be read: {error.strerror}") from error
    if record.predictions is None or hashlib.sha256(content).hexdigest() != record.predictions.sha256:
        raise CorruptFile(f"{file}: predictions.sha256: the file is not the one that the record was written with")
    try:
        arrays = unpack(content, part)
        left_out = COUNTING if record.predictions.kept == "answers" else {}
        counted = {name: np.arange(len(arrays[of])) for name, of in left_out.items() if of in arrays}
        return counted | arrays
    except Exception as error:  # zip, zlib and NumPy raise a dozen types for forged content
        raise CorruptFile(f"{file}: cannot be read: {type(error).__name__}: {one_line(str(error))}") from error


def find(folder: Path) -> Iterator[Path]:
    """All record files below a folder, in a fixed order; files in the making and `ENVIRONMENT` are not among them."""
    files = folder.rglob("*.json")
    return iter(sorted(path for path in files if not path.name.startswith(".") and path.name != ENVIRONMENT))


def readable(paths: Iterable[Path]) -> Iterator[RunRecord]:
    """The records of these files, without those that are damaged."""
    for path in paths:
        with suppress(CorruptFile):
            yield read(path)
