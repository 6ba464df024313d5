"""The typed parts of a record: texts, names and numbers within bounds, and the rows and sums made of them."""

import dataclasses
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from .budget import Budget
from .errors import UserError, one_line
from .spec import Recipe, SplitName

LONGEST = 500
"""Characters of a text that tables show; a longer one would make them unreadable."""
MOST_ATTRIBUTES = 16
"""Metrics look at every pattern of aligned attributes, and these double with each."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+@/,\[\]-]*")


def _name(value: str) -> str:
    if value and (not _NAME.fullmatch(value) or ".." in value):
        raise ValueError("is not a name: letters, digits and _ . : + @ / , [ ] - only, and no '..'")
    return value


Text = Annotated[str, Field(max_length=LONGEST)]
Name = Annotated[Text, AfterValidator(_name)]


def _settings(value: dict[str, Any]) -> dict[str, Any]:
    for key, setting in value.items():
        if max(len(key), len(str(setting))) > LONGEST:  # of a number of thousands of digits Python makes no text
            raise ValueError(f"{one_line(key, 40)}: is longer than the {LONGEST} characters that a table can show")
    return value


Settings = Annotated[dict[str, Any], AfterValidator(_settings)]


def _budget(value: str) -> str:
    try:
        Budget.parse(value)
    except UserError as error:
        raise ValueError(str(error)) from error
    return value


_RECIPE = TypeAdapter(Recipe)


def _recipe(value: dict[str, Any]) -> dict[str, Any]:
    if set(value) != {field.name for field in dataclasses.fields(Recipe)}:
        raise ValueError("does not have the fields of a recipe")
    try:
        _RECIPE.validate_json(json.dumps(value), strict=True)  # in Python's strict mode only a `Recipe` would do
    except UserError as error:
        raise ValueError(str(error)) from error
    return value


Rung = Annotated[Name, AfterValidator(_budget)]
RecipeFields = Annotated[dict[str, Any], AfterValidator(_recipe)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")]
MaybeHash = Annotated[str, Field(pattern=r"^([0-9a-f]{12,64})?$")]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Values = dict[str, Annotated[float, Field(allow_inf_nan=False)] | None]
Count = Annotated[int, Field(ge=0, le=2**40)]
Images = Annotated[int, Field(ge=0, le=10**7)]
"""Images of a group: more would fill the memory of who recomputes what a budget grants, and no dataset has them."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttributeRow(_Part):
    """A spurious attribute as the dataset's card gives it, so that a record can be read without the dataset."""

    name: Name
    values: list[Text]
    aligned: list[Count]
    train_ratio: Share | None


class Selection(_Part):
    """How the model was selected; `seen` counts the images, per group or class, by which an epoch was chosen."""

    criterion: Name
    value: float | None
    step: int | None
    candidates: Count
    ties: list[float] = []
    """What the criterion breaks ties by."""
    seen: list[Count] = []

    @property
    def score(self) -> list[float] | None:
        """Value, then tie-breakers; None where nothing was scored."""
        return None if self.value is None else [self.value, *self.ties]


class Ledger(_Part):
    """Annotations used."""

    n_train_a: Count
    n_val_a_fit: Count
    n_val_a_select: Count
    n_env: Count
    n_y_extra: Count
    total_a: Count
    n_rendered: Count = 0
    """Images with a shortcut replaced that were trained on: no annotation, but privileged."""


class GroupRow(_Part):
    """Counts of one true (y, a) group; records from before train was predicted have no `correct_train`."""

    y: Count
    a: list[Count]
    n_train: Images
    correct_train: Count | None = None
    m_val: Images
    correct_val: Count
    m_test: Images
    correct_test: Count


class EpochRow(_Part):
    """One epoch: mean losses, correct validation predictions per group, and those among the images selected by."""

    train_loss: float
    val_loss: float
    correct_val: list[Count]
    correct_seen: list[Count] = []


class Stage(_Part):
    """Cost of a stage, or of several; the fields are those of `cost.StageCost`."""

    wall_s: Amount
    device_s: Amount
    eval_s: Amount
    n_fwd: Count
    n_bwd: Count
    n_fwd_nograd: Count
    n_updates: Count
    n_head_fits: Count
    flops: Amount
    peak_mem_mib: Amount


class Cost(_Part):
    """Own stages, shares of shared artifacts, and their sums: given the block's ERM checkpoint, and from scratch."""

    stages: dict[str, Stage]
    shared: dict[str, Stage]
    marginal: Stage
    scratch: Stage


class Tuning(_Part):
    """The search that a run's settings come from: the selection score of each draw (None: it failed), the draws that
    were given up before their end, and the sum of what all draws cost from scratch, where what they share is paid for
    once.
    """

    scores: list[list[float] | None]
    pruned: list[Count] = []
    cost: Stage


class PredictionFile(_Part):
    """The .npz beside the record: its SHA-256, and hashes of the labels that it may not carry.

    `kept` tells what it holds. A published record keeps the `answers` on validation and test, with their labels but
    without logits, or, where the licence keeps the labels, `nothing`: there is no file then.
    """

    sha256: MaybeHash
    labels_sha256: dict[SplitName, Hash]
    has_labels: bool
    kept: Literal["all", "answers", "nothing"] = "all"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        file, labels = bool(self.sha256), self.has_labels
        if not {"all": file, "answers": file and labels, "nothing": not file and not labels}[self.kept]:
            raise ValueError(f"kept: {self.kept} does not agree with sha256 and has_labels")
        return self
