"""Trial runs of a method, for the checks of `contract.py`: in temporary homes, on altered data, killed on the way.

Every trial is made on the dataset `tiny` with seed 0, on the CPU and one thread: the user's runs are never touched.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..benchmark import runner
from ..benchmark.annotations import granted
from ..benchmark.artifacts import load_state
from ..benchmark.budget import Budget
from ..benchmark.device import running_on
from ..benchmark.engine import Objective
from ..benchmark.errors import UserError
from ..benchmark.home import artifacts_home, runs_home
from ..benchmark.lab import Progress
from ..benchmark.planning import Request, find_card, native_budget, plan
from ..benchmark.predictions import Arrays
from ..benchmark.record import Cost, Ledger, RunRecord, read_predictions, record_path
from ..benchmark.registry import METHODS, SOURCES
from ..benchmark.spec import MethodName, SplitName
from ..benchmark.store import Split, Store
from ..benchmark.task import Task

DATASET, SEED = "tiny", 0
OUTPUTS = ("val_prediction", "val_logits", "test_prediction", "test_logits")
"""What two runs must agree on, byte by byte."""


class ContractError(UserError):
    """A method breaks the contract: the message says what is broken and what to do."""


class NotApplicable(Exception):
    """A check, or a budget, that does not concern a method; the text is the reason."""


@dataclass(frozen=True, eq=False)
class Made:
    """A finished run, and its stored predictions and logits by name."""

    record: RunRecord
    labels: Ledger
    cost: Cost
    outputs: Arrays

    def differs(self, other: "Made") -> str:
        """Names of the outputs that are not the same bytes as in `other`."""
        return ", ".join(name for name in OUTPUTS if self.outputs[name].tobytes() != other.outputs[name].tobytes())


@contextmanager
def profile() -> Iterator[None]:
    """A fresh home, the CPU and one thread; what held before holds again afterwards."""
    threads = torch.get_num_threads()
    with (
        TemporaryDirectory(prefix="worstgroup-check-") as home,
        patch.dict(os.environ, WORSTGROUP_HOME=home),
        running_on(torch.device("cpu")),
    ):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _unheard(stage: str, epoch: int, epochs: int) -> None:
    """Progress that nobody hears of."""


def make(method: str, budget: str = "", progress: Progress = _unheard) -> Made:
    """Make a run in the present home; raises `NotApplicable`, or `ContractError` when it fails."""
    made = plan([Request(DATASET, method, budget, seeds=(SEED,))])
    (planned,) = made.runs
    if planned.spec is None:
        if not planned.reason:
            raise ContractError(f"at budget {budget} it is n/a without a reason; see `Requires`")
        raise NotApplicable(planned.reason)
    record = runner.run_spec(planned.spec, made.stores[DATASET], progress)
    if record.labels is None or record.cost is None or record.status == "failed":
        raise ContractError(f"the run at budget {planned.spec.budget} failed: {record.error}")
    arrays = read_predictions(record_path(runs_home(), planned.spec), record)
    return Made(record, record.labels, record.cost, arrays)


class Bench:
    """A method under check, `HOST[+SOURCE][@POLICY]`; its undisturbed runs are made once for all checks.

    `home` is the budget at which it is at home, by default the native one.
    """

    def __init__(self, method: str, home: str = "") -> None:
        name = MethodName.parse(method)
        self.method = method
        self.host = METHODS[name.host]
        self.entries = [self.host, *([SOURCES[name.source]] if name.source else [])]
        self.home = home or native_budget(name)
        self._made: dict[str, Made] = {}

    @property
    def native(self) -> str:
        """The home budget, or the poorest that grants an attribute where the method needs none."""
        return "select" if self.home == "none" else self.home

    def make(self, budget: str = "", progress: Progress = _unheard) -> Made:
        """Make a run in the present home, by default at the method's budget."""
        return make(self.method, budget or self.home, progress)

    def run(self, budget: str = "") -> Made:
        """The undisturbed run at a budget, by default its own."""
        budget = budget or self.home
        if budget not in self._made:
            with profile():
                self._made[budget] = self.make(budget)
        return self._made[budget]


# ------------------------------------------------------------------------------------------------- altered data


@contextmanager
def altered(change: Callable[[SplitName, Split], Split]) -> Iterator[None]:
    """All stores give out changed splits."""
    split = Store.split

    def give(self: Store, name: SplitName) -> Split:
        return change(name, split(self, name))

    with patch.object(Store, "split", give):
        yield


def without(budget: Budget) -> Callable[[SplitName, Split], Split]:
    """Permute, over the images of train and validation, every attribute that the budget does not grant."""
    columns = list(budget.columns(find_card(DATASET)[1]))
    shares: dict[SplitName, float] = {"train": budget.grant.train, "val": budget.grant.val}

    def change(name: SplitName, split: Split) -> Split:
        if name == "test":
            return split
        a = np.random.default_rng(1).permutation(split.a)
        kept = np.ix_(granted(split.y, shares[name], DATASET, SEED, name), np.array(columns, dtype=np.int64))
        a[kept] = split.a[kept]
        return replace(split, a=a)

    return change


def relabelled(name: SplitName, split: Split) -> Split:
    """The test split with classes and attributes permuted over its images."""
    if name != "test":
        return split
    order = np.random.default_rng(1).permutation(len(split.y))
    return replace(split, y=split.y[order], a=split.a[order])


TEST_ASKED = "it asked for the test split before fitting was over: fit on train and val, the engine predicts test"


@contextmanager
def closed_test_split(method: type[Any]) -> Iterator[list[SplitName]]:
    """Until a method has been fitted the test split raises; yields the list of the times it was asked for."""
    asked: list[SplitName] = []

    def refuse(name: SplitName, split: Split) -> Split:
        if name == "test":
            asked.append(name)
            raise ContractError(TEST_ASKED)
        return split

    place: tuple[type[Any], str] = (Task, "train") if issubclass(method, Objective) else (method, "fit")
    fit = getattr(*place)

    def blind(*arguments: Any, **options: Any) -> Any:
        with altered(refuse):
            return fit(*arguments, **options)

    with patch.object(*place, blind):
        yield asked


# ------------------------------------------------------------------------------------------------ interruptions


class _Killed(BaseException):
    """Stands in for SIGKILL: no `except Exception` on the way stops it."""


def survive(bench: Bench, killers: Iterator[AbstractContextManager[Progress]]) -> Made:
    """Start the run again and again, each time under the next killer, until it ends."""
    while True:
        try:
            with next(killers) as progress:
                return bench.make(progress=progress)
        except _Killed:
            for file in (artifacts_home() / "work").rglob("*.pt"):
                if load_state(file) is None:
                    raise ContractError(
                        "its checkpoint does not load without running code: state_dict may hold "
                        "tensors, numbers, strings, and lists and dictionaries of them"
                    ) from None
        except ContractError as error:
            raise ContractError(f"killed and started again, {error}") from error


@contextmanager
def killed_after_steps(steps: int) -> Iterator[Progress]:
    """Kill after so many optimiser steps, whichever optimisers make them."""
    steps_done = count(1)

    def hook(*_: Any) -> None:
        if next(steps_done) == steps:
            raise _Killed

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield _unheard
    finally:
        handle.remove()


@contextmanager
def killed_after_epochs(epochs: int) -> Iterator[Progress]:
    """Kill when so many epochs have ended."""
    epochs_done = count(1)

    def progress(*_: Any) -> None:
        if next(epochs_done) == epochs:
            raise _Killed

    yield progress
