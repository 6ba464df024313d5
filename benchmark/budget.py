"""The annotation ladder, and how a method runs on a rung: natively, under a policy, or not at all."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import UnknownName, UserError

if TYPE_CHECKING:
    from .spec import Card


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

    `fit`: whose attributes it fits on (`host`: of a source that hands on true ones, those that its host fits on).
    `native`: its rung when none is asked for. `classes`: what becomes of it when no attribute is granted and groups are
    classes: it runs (`class`), it equals ERM and is not rerun (`erm`), or it does not exist (`n/a`). `masked`: it can
    train on images of which only some have attributes (the others are -1). `uses_val`: it trains on validation images,
    with no attribute of theirs. `rendered`: it trains on images with a shortcut replaced, which not every dataset
    renders.
    """

    fit: Literal["none", "val", "train", "host"] = "none"
    native: str = "none"
    classes: Literal["n/a", "class", "erm"] = "n/a"
    masked: bool = False
    uses_val: bool = False
    rendered: bool = False

    def lacks(self, card: "Card") -> str:
        """Why it does not exist on a dataset, empty where it does."""
        return "the dataset renders no interventions" if self.rendered and not card.interventions else ""

    def resolve(
        self, budget: Budget, policy: str = "", source: "Requires | None" = None, extra: bool = False
    ) -> "Policy":
        """Decide how the method runs at a budget: natively, under a policy, or not at all.

        `policy` is the one asked for, if any; `source` are the needs of the group source it is composed with; `extra`
        asks to train on the granted validation images too.
        """
        grant = budget.grant
        if extra and (self.fit == "val" or self.uses_val or (policy in ("subset", "masked") and grant.train == 0)):
            return Policy("n/a", "it trains on validation images anyway, so extra val does not apply")
        if extra and not grant.val_fit:
            return Policy("n/a", "extra val needs val-5 or richer")
        if source is not None:
            return self._composed(source, budget, policy)
        if policy == "class":
            lacks = "uses no groups" if self.fit == "none" else "cannot take classes for groups"
            return self._by_classes(f"it {lacks}, so @class does not apply to it")
        if policy:
            return self._by_some(budget, policy)
        if self._granted(grant):
            return self._at_home(budget)
        if self.fit == "train" and grant.val_fit:
            return Policy("pseudo")
        return self._by_classes("needs val-5 or richer")

    def _granted(self, grant: Rung) -> bool:
        """Whether a rung grants what is fitted on, at least for some images."""
        return {"none": True, "val": grant.val_fit, "train": grant.train == 1}.get(self.fit, False)

    def _at_home(self, budget: Budget) -> "Policy":
        """Native, or `carried` where the budget grants more than is used: choosing among epochs is native to all."""
        most = {"none": "select", "val": "val"}.get(self.fit, "train+val")
        home = max(Budget(self.native).order, Budget(most).order)
        return Policy("carried" if budget.order > home else "")

    def _composed(self, source: "Requires", budget: Budget, policy: str) -> "Policy":
        if policy:
            return Policy("n/a", f"a source says what groups are, so @{policy} does not apply")
        if source.fit == "host":
            if self.fit == "none":
                return Policy("n/a", "it selects by true groups where the budget grants them; no source is needed")
            if budget.grant.val < 1 or not self._granted(budget.grant):
                return Policy("n/a", f"true groups of all images need {'val' if self.fit == 'val' else 'train+val'}")
            return self._at_home(budget)
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
