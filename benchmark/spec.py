"""What is run, on what and under which budget: frozen dataclasses whose hash is the identity of a run."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from .budget import POLICIES, Budget
from .errors import UnknownName, UserError, require

PROTOCOL: Literal["wg1"] = "wg1"
"""Version of the protocol: rows of different versions never share a table."""
PAPER = "paper"
"""A paper's own recipe, selection rule and search, for reproductions."""

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


def digest(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def derive_seed(*parts: Any) -> int:
    """A seed below 2**63 for one named purpose, e.g. `derive_seed(block, seed, "order", epoch)`.

    Every random draw of the engine comes from such a stream, so that a new purpose never shifts another's numbers.
    """
    return int(digest(list(parts))[:16], 16) >> 1


# ------------------------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Attribute:
    """A spurious attribute: its values, the one aligned with each class, and the declared share of aligned images.

    Where `aligned` is empty it is found in the files: the value that the class has more often than others (lift).
    """

    name: str
    values: tuple[str, ...]
    aligned: tuple[int, ...]
    train_ratio: float | None = None


@dataclass(frozen=True)
class Source:
    """A file that a dataset is made of, and where it can be fetched; without `urls` it is fetched by hand.

    `md5` is of the official content and `size` its bytes, where they are published; an archive is unpacked into `into`,
    a folder below the data home.
    """

    file: str
    md5: str = ""
    urls: tuple[str, ...] = ()
    size: int = 0
    into: str = ""


@dataclass(frozen=True)
class Transform:
    """The deterministic part of a transform: steps on a decoded picture, and the (height, width) that it ends with.

    Steps are separated by commas: `resize 256x256` (height x width, aspect not kept), `resize 224` (the short side),
    `crop 224x224` (from the centre). No step leaves the picture as it is.
    """

    steps: str
    image: tuple[int, int]


Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Recipe:
    """How every method of a block trains: the same images per step, steps and augmentation for all.

    `precision`: `fp32` is single precision everywhere, also on a GPU, where PyTorch by itself would round convolutions
    to TF32; `tf32` rounds the factors of convolutions and matrix products to 10 bits of mantissa there, in training and
    prediction, and is fp32 on a CPU; `bf16` is autocast to bfloat16, whose exceptions stay in single precision.
    `channels_last` keeps the channels of a pixel together, in images and in the weights of the classifier and of all
    networks that train with it: values are the same up to rounding. `compile` compiles the trunks of all these
    networks.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 128
    epochs: int = 30
    schedule: Schedule = "constant"
    augment: Literal["none", "flip", "crop+flip"] = "none"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    patience: int = 0
    """Epochs without a better selection score after which a training ends; 0: never before the last."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"recipe.epochs must be at least 1, got {self.epochs}")
        require(self.batch_size >= 2, f"recipe.batch_size must be at least 2, got {self.batch_size}")
        require(0 < self.lr < math.inf, f"recipe.lr must be a positive number, got {self.lr}")
        require(0 <= self.weight_decay < math.inf, f"recipe.weight_decay must be at least 0, got {self.weight_decay}")
        require(self.patience >= 0, f"recipe.patience must be at least 0, got {self.patience}")
        require(0 <= self.momentum < 1, f"recipe.momentum must be in [0, 1), got {self.momentum}")


@dataclass(frozen=True)
class Card:
    """What a dataset variant is: its groups and exact counts, licence, sources, default transform and recipe."""

    name: str
    title: str
    classes: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    image: tuple[int, int, int]
    counts: dict[SplitName, tuple[int, ...]]
    licence: str
    citation: str
    recipe: Recipe
    backbone: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sources: tuple[Source, ...] = ()
    share_labels: bool = True
    """Whether the licence lets records carry y and a; otherwise they carry a hash."""
    notes: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    """Parameters of a generator, part of the card."""
    sizes: dict[SplitName, int] = field(default_factory=dict)
    """Images of a split whose group counts are not known beforehand."""
    adaptable: bool = False
    """Whether files in the same format with other counts are taken, under the name `NAME[custom]`."""
    environments: tuple[str, ...] = ()
    """Names of the training environments that come with the dataset."""
    interventions: tuple[str, ...] = ()
    """Attributes whose shortcut can be replaced: of each there is a view of every train image (`Split.views`)."""
    transforms: dict[str, Transform] = field(default_factory=dict)
    """Transforms by name, the default one first; empty where pixels are not read from pictures."""
    transform: str = ""
    """The transform in use; empty: the default one."""
    weights: str = "none"
    """Initial weights of the default backbone."""
    by_hand: str = ""
    """Why no program may fetch it, and what to fetch by hand; empty where `sources` can be fetched."""
    fetch_unasked: bool = False
    """Whether its files are so few and so free that a run fetches them when they are missing."""
    dtype: Literal["uint8", "float32"] = "uint8"
    """What the store holds: pixels, or precomputed features."""

    @property
    def pixels(self) -> Transform:
        """The transform in use."""
        return self.transforms[self.transform or next(iter(self.transforms))]

    @property
    def variant(self) -> str:
        """`place` of `waterbirds:place[112px]`."""
        return self.name.partition("[")[0].partition(":")[2]

    def called(self, option: str) -> str:
        """The card's name with one more option in its brackets: `waterbirds` becomes `waterbirds[custom]`."""
        base, bracket, rest = self.name.partition("[")
        return f"{base}[{rest[:-1]},{option}]" if bracket else f"{base}[{option}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of classes, then of values of each attribute: groups are indexed y major, then in card order."""
        return (len(self.classes), *(len(attribute.values) for attribute in self.attributes))

    @property
    def num_groups(self) -> int:
        """Number of (y, a) cells."""
        return math.prod(self.shape)

    def group_names(self) -> list[str]:
        """Human names of all groups in index order, e.g. `waterbird/land`."""
        names = list(self.classes)
        for attribute in self.attributes:
            names = [f"{name}/{value}" for name in names for value in attribute.values]
        return names


# ----------------------------------------------------------------------------------------------------------- runs


PSEUDO = "predictor"
"""The source that `@pseudo` stands for."""


@dataclass(frozen=True)
class MethodName:
    """`HOST[+SOURCE][@POLICY]` as typed on the command line; in suites and tables `(+val)` may follow."""

    host: str
    source: str = ""
    policy: str = ""
    extra: Literal["", "val"] = ""

    @classmethod
    def parse(cls, text: str) -> "MethodName":
        """Split the parts; which of them exist is for the registries to say."""
        name = text
        while name.endswith("(+val)"):  # it may be asked for by name and by option
            name = name.removesuffix("(+val)")
        rest, at, policy = name.partition("@")
        host, plus, source = rest.partition("+")
        if not host or (at and not policy) or (plus and not source):
            raise UserError(f"method {text!r}: write HOST, HOST+SOURCE, HOST@POLICY or HOST+SOURCE@POLICY")
        if policy and policy not in POLICIES:
            raise UnknownName("policy", policy, POLICIES)
        if source == PSEUDO and not policy:  # one spelling for one run
            source, policy = "", "pseudo"
        return cls(host, source, policy, "val" if name != text else "")


@dataclass(frozen=True)
class Block:
    """What all methods of one comparison share, and what the shared ERM is keyed by."""

    dataset: str
    fingerprint: str
    backbone: str
    weights: str
    recipe: Recipe
    seed: int
    backbone_code: str = ""
    """Fingerprint of the code of a backbone that is not the engine's own."""
    weights_file: str = ""
    """Where weights that are a file lie; `weights` then names them by content, so this is no part of the identity."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All fields that matter."""
        fields = dataclasses.asdict(self)
        del fields["weights_file"]
        return fields

    @cached_property
    def key(self) -> str:
        """Hash of the identity."""
        return digest(self.identity)

    @property
    def stream(self) -> tuple[str, str, str, int]:
        """What random streams derive from: names and the seed, never labels, so that no draw can carry one."""
        return self.dataset, self.backbone, self.weights, self.seed


@dataclass(frozen=True)
class RunSpec:
    """Identity of one run. `code` is the fingerprint of the files of method and source and of what they import."""

    block: Block
    method: str
    source: str
    policy: str
    config: tuple[tuple[str, Any], ...]
    budget: Budget
    code: str
    source_config: tuple[tuple[str, Any], ...] = ()
    extra: Literal["", "val"] = ""
    """`val`: trained on the granted validation images too."""
    protocol: str = PROTOCOL
    criterion: str = ""
    """Selection rule instead of the rung's: a paper's, under the protocol `paper`; or the pseudo-groups of the source,
    where the method itself fits on none.
    """
    tuned: tuple[tuple[str, Any], ...] = ()
    """Settings of the recipe that a search found for this run's own trainings; the shared ERM keeps the block's."""
    draw: int = 0
    """Which draw of a search its settings are; 0: none, or the defaults."""
    candidates: tuple[str, ...] = ()
    """Hashes of the runs, one per draw, among which this one's settings were chosen; empty without a search."""

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of the identity."""
        return digest({**dataclasses.asdict(self), "block": self.block.identity})

    @property
    def rule(self) -> str:
        """The criterion that selects."""
        return self.criterion or self.budget.grant.criterion

    @property
    def label(self) -> str:
        """Short name for people: `dfr@class on digits2 · none · seed 0`."""
        label = f"{self.method_label} on {self.block.dataset} · {self.budget} · seed {self.block.seed}"
        return f"{label} · draw {self.draw}" if self.draw or self.candidates else label

    @property
    def method_label(self) -> str:
        """Method as typed on the command line."""
        return method_label(self.method, self.source, self.policy, self.extra)


def method_label(method: str, source: str, policy: str, extra: str) -> str:
    """`HOST[+SOURCE][@POLICY][(+val)]`; a policy that changes what the method does is part of the name."""
    plus = f"+{source}" if source and policy != "pseudo" else ""  # @pseudo names the source `predictor` already
    at = f"@{policy}" if policy in POLICIES else ""
    return f"{method}{plus}{at}{'(+val)' if extra else ''}"


# ----------------------------------------------------------------------------------------------------- typed knobs


def override(instance: Any, changes: dict[str, str], what: str) -> tuple[Any, list[str]]:
    """Replace fields of a dataclass by values typed as text, each checked against the field's type.

    Returns the new instance and all problems found, so that a caller can report them together.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    known = {f.name: f for f in dataclasses.fields(instance)}
    hints = get_type_hints(type(instance))
    for key, text in changes.items():
        if key not in known:
            problems.append(str(UnknownName(f"{what} key", key, known)))
            continue
        try:
            values[key] = _parse(hints[key], text)
        except ValidationError as error:
            problems.append(f"{what}.{key}={text}: {error.errors()[0]['msg'].lower()}")
    if problems:
        return instance, problems
    try:
        return dataclasses.replace(instance, **values), []
    except UserError as error:
        return instance, [str(error)]


def _parse(hint: Any, text: str) -> Any:
    adapter = TypeAdapter(hint)
    if get_origin(hint) is tuple:  # typed as 0.3,0.1 or as [0.3, 0.1]
        return adapter.validate_python([part.strip() for part in text.strip("[]() ").split(",") if part.strip()])
    return adapter.validate_strings(text)
