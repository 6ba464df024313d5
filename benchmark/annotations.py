"""The metered view of attribute labels: the only door to them, and the ledger of what was used.

One annotation is one attribute value of one image. The view knows train and validation only; test labels do not exist
here. An image used both to fit and to select stands in both columns of the ledger and once in the total.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from .budget import Budget
from .errors import BudgetExceeded
from .spec import Card, derive_seed

Purpose = Literal["fit", "select"]
Held = Literal["train", "val"]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Groups:
    """Group index (n,) of the requested examples, -1 where unknown, and how many groups there are (empty included)."""

    index: NDArray[np.int64]
    num: int

    def counts(self) -> NDArray[np.int64]:
        """Examples per group (num,)."""
        return np.bincount(self.index[self.index >= 0], minlength=self.num)


@dataclass(frozen=True, eq=False)
class Attributes:
    """Attribute values (n, k) of the requested examples, -1 where unknown; `sizes` (k,) says how many each has."""

    values: NDArray[np.int64]
    sizes: tuple[int, ...]

    @classmethod
    def none(cls, n: int) -> "Attributes":
        """No attribute at all: groups are then classes."""
        return cls(np.zeros((n, 0), np.int64), ())

    @classmethod
    def join(cls, parts: "list[Attributes]") -> "Attributes":
        """Examples one after the other; a source may have found more values on one part than on another."""
        sizes = tuple(max(size) for size in zip(*(part.sizes for part in parts), strict=True))
        return cls(np.concatenate([part.values for part in parts]), sizes)

    @classmethod
    def of(cls, values: Indices) -> "Attributes":
        """Values (n, k), none of them unknown, whose sizes are as large as they need."""
        return cls(values, tuple(int(column.max()) + 1 for column in values.T))

    def at(self, rows: Indices) -> "Attributes":
        """Those of some examples."""
        return Attributes(self.values[rows], self.sizes)

    def joint(self) -> Groups:
        """All attributes as one: its value (n,), -1 where any is unknown."""
        return self._index(self.values, self.sizes)

    def groups(self, y: Indices, num_classes: int) -> Groups:
        """Groups of class and attributes, y major."""
        return self._index(np.column_stack([y, self.values]), (num_classes, *self.sizes))

    @staticmethod
    def _index(columns: Indices, shape: tuple[int, ...]) -> Groups:
        index = np.full(len(columns), -1)
        known = (columns >= 0).all(axis=1)
        index[known] = np.ravel_multi_index(tuple(columns[known].T), shape) if shape else 0
        return Groups(index, int(np.prod(shape)))


@dataclass(frozen=True)
class Labels:
    """Annotations used by a run, by purpose (spec: metrics and protocol, section 6).

    `n_rendered` counts no annotations but images with a shortcut replaced: who has them knows what the shortcuts are.
    """

    n_train_a: int = 0
    n_val_a_fit: int = 0
    n_val_a_select: int = 0
    n_env: int = 0
    n_y_extra: int = 0
    total_a: int = 0
    n_rendered: int = 0


# ------------------------------------------------------------------------------------------------- drawing subsets


def grant_by_class(classes: Indices, share: float) -> Indices:
    """How many images of each class (K,) a share of a split grants, of `classes` (K,) that it has.

    The first round(share * n) places of an order in which the classes lie evenly spread, but never fewer than two of a
    class (where it has them): one to fit on, one to select by.
    """
    y = np.repeat(np.arange(len(classes)), classes)
    place = (np.arange(len(y)) - np.repeat(np.cumsum(classes) - classes, classes) + 0.5) / classes[y]
    first = y[np.lexsort((y, place))[: round(share * len(y))]]
    fewest = np.minimum(classes, 2 if share > 0 else 0)
    return np.maximum(np.bincount(first, minlength=len(classes)), fewest)


def most_labels(budget: Budget, k: int, train: Indices, val: Indices) -> dict[str, int]:
    """The most annotations of each purpose that a budget lets a run use, by field of `Labels`.

    `k` attributes are granted; `train` and `val` (K,) are the images of each class.
    """
    grant = budget.grant
    n_train, n_val = int(grant_by_class(train, grant.train).sum()), int(grant_by_class(val, grant.val).sum())
    return {"n_train_a": k * n_train, "n_val_a_fit": k * n_val * grant.val_fit, "n_val_a_select": k * n_val}


def granted(y: Indices, share: float, dataset: str, seed: int, split: Held) -> Indices:
    """Images of a split whose attributes a share of it grants, sorted; the same for every method, nested in the share.

    Drawn by class only: a draw by group would use the labels that are rationed.
    """
    rng = np.random.default_rng(derive_seed(dataset, seed, "granted", split))
    sizes = grant_by_class(np.bincount(y), share)
    drawn = [rng.permutation(np.flatnonzero(y == label))[:size] for label, size in enumerate(sizes)]
    return np.sort(np.concatenate([np.arange(0), *drawn]))


def halves(
    rows: Indices, y: Indices, rng: np.random.Generator, last: NDArray[np.bool_] | None = None
) -> tuple[Indices, Indices]:
    """Rows in two, stratified by their labels `y`: one half to fit on, one to select on (spec 10.2); sorted.

    Rows marked as `last` (n,) go to the second half first.
    """
    fit = []
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        if last is not None:
            members = members[np.argsort(last[members], kind="stable")]
        fit.append(rows[members[: len(members) // 2]])
    chosen = np.sort(np.concatenate(fit))
    return chosen, np.setdiff1d(rows, chosen)


# ------------------------------------------------------------------------------------------------------- the meter

Used = dict[str, NDArray[np.bool_]]
"""Which images' attributes were used, by `split:purpose`; under `val:y` whose class labels went into fitting, under
`split:env` whose native environments, under `train:views` whose views."""


class Annotations:
    """Attributes of train and validation behind a budget. What it does not grant is not kept.

    `y` and `a` map split names to arrays (n,) and (n, k); `seed` is the run's, from which the granted images are drawn.
    `env` has the dataset's own environments (n,), which no budget withholds; they are counted.
    """

    def __init__(
        self,
        card: Card,
        y: dict[Held, Indices],
        a: dict[Held, Indices],
        budget: Budget,
        seed: int = 0,
        env: dict[Held, Indices] | None = None,
    ) -> None:
        self.card = card
        self.budget = budget
        self._columns = list(budget.columns(card))
        self._y = y
        self._env = env or {}
        shares: dict[Held, float] = {"train": budget.grant.train, "val": budget.grant.val}
        self._granted = {split: granted(y[split], shares[split], card.name, seed, split) for split in shares}
        self._a = {split: _only(a[split], rows, self._columns) for split, rows in self._granted.items()}
        self._used = self._nothing()
        self._closed = False

    def _nothing(self) -> Used:
        lengths = {key: len(self._y[cast(Held, key.partition(":")[0])]) for key in _KEYS}
        return {key: np.zeros(n, dtype=bool) for key, n in lengths.items()}

    def rows(self, split: Held, purpose: Purpose = "fit") -> Indices:
        """Images whose attributes are granted for a purpose, sorted; train attributes are never selected by."""
        allowed = self.budget.grant.val_fit if purpose == "fit" else split == "val"
        return self._granted[split] if allowed else np.arange(0)

    def attributes(self, split: Held, purpose: Purpose, rows: Indices | None = None) -> Attributes:
        """True values of the granted attributes, by default of all images, billed.

        Raises `BudgetExceeded` beyond the grant.
        """
        wanted = np.arange(len(self._y[split])) if rows is None else rows
        if self._closed:
            raise BudgetExceeded(_REFUSED)
        beyond = np.setdiff1d(wanted, self.rows(split, purpose))
        if len(beyond):
            some = f"of {len(beyond)} of {len(wanted)} requested {split} images" if len(wanted) else f"of {split}"
            raise BudgetExceeded(
                f"budget {self.budget} does not grant the attributes {some} for {purpose}: declare what the method "
                "needs in Requires(fit=...), ask for task.annotated(split) only, or run it at a richer budget"
            )
        self._used[f"{split}:{purpose}"][wanted] = True
        sizes = tuple(len(self.card.attributes[j].values) for j in self._columns)
        return Attributes(self._a[split][wanted][:, self._columns], sizes)

    def environments(self, split: Held, rows: Indices) -> Indices:
        """The dataset's own environment of images (m,), -1 where a split has none; counted, granted to all."""
        if split not in self._env:
            return np.full(len(rows), -1)
        self._used[f"{split}:env"][rows] = True
        return self._env[split][rows]

    def bill_labels(self, rows: Indices) -> None:
        """Note that class labels of held-out (validation) images went into fitting."""
        self._used["val:y"][rows] = True

    def bill_views(self, rows: Indices) -> None:
        """Note that all views of these train images went into fitting."""
        self._used["train:views"][rows] = True

    @contextmanager
    def apart(self, *, closed: bool) -> Iterator[Used]:
        """Meter what happens inside on a ledger of its own, handed out; `closed` refuses every attribute."""
        before = self._used, self._closed
        self._used, self._closed = self._nothing(), closed or self._closed
        try:
            yield self._used
        finally:
            self._used, self._closed = before

    def inherit(self, used: dict[str, list[int]]) -> None:
        """Take over the labels, by key of `Used` and row, that went into something shared."""
        if self._closed and any(rows for key, rows in used.items() if key not in _FREE):
            raise BudgetExceeded(_REFUSED)
        for key, rows in used.items():
            self._used[key][rows] = True

    def ledger(self) -> Labels:
        """What was used so far."""
        count = {key: int(mask.sum()) for key, mask in self._used.items()}
        either = int((self._used["val:fit"] | self._used["val:select"]).sum())
        k = len(self._columns)
        return Labels(
            n_train_a=k * count["train:fit"],
            n_val_a_fit=k * count["val:fit"],
            n_val_a_select=k * count["val:select"],
            n_env=count["train:env"] + count["val:env"],
            n_y_extra=count["val:y"],
            total_a=k * (count["train:fit"] + either),
            n_rendered=len(self.card.interventions) * count["train:views"],
        )


def _only(a: Indices, rows: Indices, columns: list[int]) -> Indices:
    """Attributes (n, k) of these images and columns, -1 elsewhere."""
    kept, places = np.full_like(a, -1), np.ix_(rows, np.array(columns, np.int64))
    kept[places] = a[places]
    return kept


_FREE = ("val:y", "train:env", "val:env", "train:views")
_KEYS = ("train:fit", "val:fit", "val:select", *_FREE)
_REFUSED = "a shared artifact declared as made without attributes (labelled=False) asks for some"
