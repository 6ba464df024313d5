"""What is run, on what and under which budget: frozen dataclasses whose hash is the identity of a run."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from .errors import UnknownName, UserError, require

PROTOCOL = "wg1"
"""Version of the protocol: rows of different versions never share a table."""

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


# --------------------------------------------------------------------------------------------- annotation budgets


@dataclass(frozen=True)
class Rung:
    """One step of the annotation ladder: whose attributes are granted, and what for.

    `train` is the share of train images whose attributes may be fitted on, `val` the share of validation images whose
    attributes are granted: to select by, and with `val_fit` to fit on too. `optional` rungs are stress tests and
    ablations beside the standard ones.
    """

    name: str
    train: float
    val: float
    val_fit: bool
    criterion: str
    summary: str
    optional: bool = False


def _rungs() -> list[Rung]:
    smoothed, plain = "val-wga-smoothed", "val-wga"  # a share of validation holds groups of a few images
    few = "of {} % of validation, drawn by class"
    return [
        Rung("none", 0, 0, False, "val-worst-class", "no attribute label; selection by the worst class"),
        *(
            Rung(f"select-{k}", 0, k / 100, False, smoothed, f"attributes {few.format(k)}, for selection only", True)
            for k in (1, 5, 20)
        ),
        Rung("select", 0, 1, False, plain, "validation attributes, for selection only"),
        *(
            Rung(f"val-{k}", 0, k / 100, True, smoothed, f"attributes {few.format(k)}, to fit and to select", k == 1)
            for k in (1, 5, 20)
        ),
        Rung("val", 0, 1, True, smoothed, "validation attributes, to fit and to select"),
        *(
            Rung(f"train-{k}", k / 100, 1, True, plain, f"attributes of {k} % of train and all of validation", True)
            for k in (1, 10, 33)
        ),
        Rung("train+val", 1, 1, True, plain, "all attributes of train and validation"),
    ]


RUNGS: dict[str, Rung] = {rung.name: rung for rung in _rungs()}
"""The ladder, poorest rung first (spec: metrics and protocol, section 10)."""


@dataclass(frozen=True)
class Budget:
    """A rung, and the attributes it grants (`()` grants all of them; each costs one label per image)."""

    rung: str
    attributes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `val` or `val:background` or `val:background,object`."""
        rung, colon, names = text.partition(":")
        if rung not in RUNGS:
            raise UnknownName("budget", rung, RUNGS, "See `worstgroup ls budgets`.")
        attributes = tuple(sorted({name for name in names.split(",") if name}))  # one spelling for one grant
        if colon and not attributes:
            raise UserError(f"budget {text!r} ends in a colon: write {rung!r}, or {rung}:ATTRIBUTE")
        if attributes and not RUNGS[rung].val:
            raise UserError(f"budget {text!r}: {rung} grants no attribute, so none can be named")
        return cls(rung, attributes)

    def __str__(self) -> str:
        return f"{self.rung}:{','.join(self.attributes)}" if self.attributes else self.rung

    @property
    def grant(self) -> Rung:
        """What the rung allows."""
        return RUNGS[self.rung]

    @property
    def order(self) -> int:
        """Position on the ladder, 0 = no label."""
        return list(RUNGS).index(self.rung)

    def columns(self, card: "Card") -> tuple[int, ...]:
        """Indices of the granted attributes in card order; raises `UnknownName` for a name the card lacks."""
        names = [attribute.name for attribute in card.attributes]
        for name in self.attributes:
            if name not in names:
                raise UnknownName(f"attribute of {card.name}", name, names)
        return tuple(i for i, name in enumerate(names) if self.grants(name))

    def grants(self, attribute: str) -> bool:
        """Whether this attribute is among the granted ones."""
        return not self.attributes or attribute in self.attributes


@dataclass(frozen=True)
class Requires:
    """What a method (or a group source) needs, and where it is at home.

    `fit`: whose attributes it fits on. `native`: its rung when none is asked for. `classes`: what becomes of it when no
    attribute is granted and groups are classes: it runs (`class`), it equals ERM and is not rerun (`erm`), or it does
    not exist (`n/a`). `masked`: it can train on images of which only some have attributes (the others are -1).
    """

    fit: Literal["none", "val", "train"] = "none"
    native: str = "none"
    classes: Literal["n/a", "class", "erm"] = "n/a"
    masked: bool = False

    def resolve(
        self, budget: Budget, policy: str = "", source: "Requires | None" = None, extra: bool = False
    ) -> "Policy":
        """Decide how the method runs at a budget: natively, under a policy, or not at all.

        `policy` is the one asked for, if any; `source` are the needs of the group source it is composed with; `extra`
        asks to train on the granted validation images too.
        """
        grant = budget.grant
        if extra and (self.fit == "val" or (policy in ("subset", "masked") and grant.train == 0)):
            return Policy("n/a", "it trains on granted validation images anyway, so extra val does not apply")
        if extra and not grant.val_fit:
            return Policy("n/a", "extra val needs val-5 or richer")
        if source is not None:
            return self._composed(source, budget, policy)
        if policy == "class":
            lacks = "uses no groups" if self.fit == "none" else "cannot take classes for groups"
            return self._by_classes(f"it {lacks}, so @class does not apply to it")
        if policy:
            return self._by_some(budget, policy)
        if {"none": True, "val": grant.val_fit, "train": grant.train == 1}[self.fit]:
            return self._at_home(budget)
        if self.fit == "train" and grant.val_fit:
            return Policy("pseudo")
        return self._by_classes("needs val-5 or richer")

    def _at_home(self, budget: Budget) -> "Policy":
        """Native, or `carried` where the budget grants more than is used: choosing among epochs is native to all."""
        most = {"none": "select", "val": "val", "train": "train+val"}[self.fit]
        home = max(Budget(self.native).order, Budget(most).order)
        return Policy("carried" if budget.order > home else "")

    def _composed(self, source: "Requires", budget: Budget, policy: str) -> "Policy":
        if policy:
            return Policy("n/a", f"a source says what groups are, so @{policy} does not apply")
        if self.fit == "none":
            return Policy("n/a", "it uses no groups, so a source does not apply to it")
        if source.fit != "none" and not budget.grant.val_fit:
            return Policy("n/a", "its source needs val-5 or richer")
        return source._at_home(budget)

    def _by_classes(self, otherwise: str) -> "Policy":
        if self.classes == "class":
            return Policy("class")
        if self.classes == "erm":
            return Policy("erm", "≡ erm: one environment, nothing to match; not rerun")
        return Policy("n/a", otherwise)

    def _by_some(self, budget: Budget, policy: str) -> "Policy":
        """A policy for attributes of some images, asked for by name."""
        if self.fit != "train":
            return Policy("n/a", f"@{policy} is for methods that fit on attributes of train")
        if policy == "masked" and not self.masked:
            return Policy("n/a", "it cannot leave out the attributes of some images, so @masked does not apply")
        if budget.grant.train == 1:
            return Policy("n/a", f"all attributes are granted, so @{policy} does not apply")
        return Policy(policy) if budget.grant.val_fit else Policy("n/a", "needs val-5 or richer")


@dataclass(frozen=True)
class Policy:
    """How a method runs at a budget.

    `tag` is `""` (native), `carried` (it needs fewer labels than are granted), `class` (classes are its groups),
    `pseudo` (attributes predicted from the granted ones), `subset` (fine-tuned from ERM on annotated images only),
    `masked` (attribute terms on annotated images only), or, with a `reason`, `erm` (identical to ERM, not rerun) and
    `n/a`.
    """

    tag: str
    reason: str = ""


SOME = ("pseudo", "subset", "masked")
"""Policies for attributes of some images."""
POLICIES = ("class", *SOME)
"""Policies that can be asked for, as `METHOD@POLICY`; they are part of a row's name."""


# ------------------------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Attribute:
    """A spurious attribute: its values, the one aligned with each class, and the declared share of aligned images."""

    name: str
    values: tuple[str, ...]
    aligned: tuple[int, ...]
    train_ratio: float | None = None


@dataclass(frozen=True)
class Source:
    """A file that a dataset is made of: its name, MD5 of the official content, and where it can be fetched."""

    file: str
    md5: str = ""
    url: str = ""


Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Recipe:
    """How every method of a block trains: the same images per step, steps and augmentation for all."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 128
    epochs: int = 30
    schedule: Schedule = "constant"
    augment: Literal["none", "flip", "crop+flip"] = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"recipe.epochs must be at least 1, got {self.epochs}")
        require(self.batch_size >= 2, f"recipe.batch_size must be at least 2, got {self.batch_size}")
        require(0 < self.lr < math.inf, f"recipe.lr must be a positive number, got {self.lr}")
        require(0 <= self.weight_decay < math.inf, f"recipe.weight_decay must be at least 0, got {self.weight_decay}")
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

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of the identity."""
        return digest({**dataclasses.asdict(self), "block": self.block.identity})

    @property
    def label(self) -> str:
        """Short name for people: `dfr@class on digits2 · none · seed 0`."""
        return f"{self.method_label} on {self.block.dataset} · {self.budget} · seed {self.block.seed}"

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
            problems.append(f"{what} {key}={text}: {error.errors()[0]['msg'].lower()}")
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
