"""The metered view of attribute labels: the only door to them, and the ledger of what was used.

One annotation is one attribute value of one image. The view knows train and validation only; test labels do not exist
here. An image used both to fit and to select stands in both columns of the ledger and once in the total.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import metrics
from .errors import BudgetExceeded
from .spec import Budget, Card

Purpose = Literal["fit", "select"]
Held = Literal["train", "val"]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Groups:
    """Group index (n,) of the requested examples, y major, and how many groups there are (empty ones included)."""

    index: NDArray[np.int64]
    num: int

    def counts(self) -> NDArray[np.int64]:
        """Examples per group (num,)."""
        return np.bincount(self.index, minlength=self.num)


@dataclass(frozen=True)
class Labels:
    """Annotations used by a run, by purpose (spec: metrics and protocol, section 6)."""

    n_train_a: int = 0
    n_val_a_fit: int = 0
    n_val_a_select: int = 0
    n_env: int = 0
    n_y_extra: int = 0
    total_a: int = 0


class Annotations:
    """Attributes of train and validation behind a budget.

    `y` and `a` map split names to arrays (n,) and (n, k).
    """

    def __init__(self, card: Card, y: dict[Held, Indices], a: dict[Held, Indices], budget: Budget) -> None:
        self.card = card
        self.budget = budget
        self._columns = budget.columns(card)
        self._y = y
        self._a = a
        self._used: dict[tuple[Held, Purpose], NDArray[np.bool_]] = {
            key: np.zeros(len(y[key[0]]), dtype=bool) for key in (("train", "fit"), ("val", "fit"), ("val", "select"))
        }
        self._y_used = np.zeros(len(y["val"]), dtype=bool)

    @property
    def shape(self) -> tuple[int, ...]:
        """Classes and the values of every granted attribute."""
        return (self.card.shape[0], *(self.card.shape[1 + j] for j in self._columns))

    def groups(self, split: Held, purpose: Purpose, indices: Indices | None = None) -> Groups:
        """True groups over the granted attributes, billed; raises `BudgetExceeded` beyond the grant."""
        grant = self.budget.grant
        allowed = {("train", "fit"): grant.train, ("val", "fit"): grant.val_fit, ("val", "select"): grant.val_select}
        if not allowed.get((split, purpose), False):
            raise BudgetExceeded(
                f"budget {self.budget} does not grant the attributes of {split} for {purpose}: "
                "declare what the method needs in Requires(fit=...), or run it at a richer budget"
            )
        rows = np.arange(len(self._y[split])) if indices is None else indices
        self._used[split, purpose][rows] = True
        index = metrics.group_index(self._y[split][rows], self._a[split][rows][:, list(self._columns)], self.shape)
        return Groups(index, int(np.prod(self.shape)))

    def bill_labels(self, indices: Indices) -> None:
        """Note that class labels of held-out (validation) images went into fitting."""
        self._y_used[indices] = True

    def ledger(self) -> Labels:
        """What was used so far."""
        used, k = self._used, len(self._columns)
        return Labels(
            n_train_a=k * int(used["train", "fit"].sum()),
            n_val_a_fit=k * int(used["val", "fit"].sum()),
            n_val_a_select=k * int(used["val", "select"].sum()),
            n_y_extra=int(self._y_used.sum()),
            total_a=k * int(used["train", "fit"].sum() + (used["val", "fit"] | used["val", "select"]).sum()),
        )
