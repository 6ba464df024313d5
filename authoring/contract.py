"""The contract: what every method keeps. `worstgroup check` and `tests/contract` run these same checks."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count, repeat
from typing import Literal

import numpy as np
import torch

from ..benchmark.annotations import Held, most_labels
from ..benchmark.budget import RUNGS, Budget
from ..benchmark.errors import DiskError, UserError
from ..benchmark.lab import Progress
from ..benchmark.planning import find_card
from ..benchmark.registry import MethodEntry
from .trial import (
    DATASET,
    OUTPUTS,
    TEST_ASKED,
    Bench,
    ContractError,
    NotApplicable,
    altered,
    closed_test_split,
    killed_after_epochs,
    killed_after_steps,
    profile,
    relabelled,
    survive,
    without,
)

HELD: tuple[Held, Held] = ("train", "val")


@dataclass(frozen=True)
class Verdict:
    """What a check found, and how long it took; `message` is what is broken, why it is n/a, or a remark."""

    check: str
    state: Literal["ok", "n/a", "failed"]
    seconds: float
    message: str


def check_documented(bench: Bench) -> str:
    """File, class, paper and every setting are explained, and the native budget is one."""
    problems = [f"{entry.name}: {problem}" for entry in bench.entries for problem in undocumented(entry)]
    if problems:
        raise ContractError("; ".join(problems))
    return ""


def undocumented(entry: MethodEntry) -> Iterator[str]:
    """What a reader of a method's file would miss."""
    Budget.parse(entry.requires.native)
    if not entry.summary:
        yield "the file has no docstring: its first line is what `worstgroup ls methods` shows"
    if not entry.cls.__doc__:
        yield f"class {entry.cls.__name__} has no docstring: give the algorithm and every deviation"
    if not entry.paper:
        yield '`paper` is empty: name the source, or "none"'
    explained = " ".join(cls.__doc__ or "" for cls in entry.config.__mro__ if cls is not object)
    missing = [field.name for field in dataclasses.fields(entry.config) if f"`{field.name}`" not in explained]
    if missing:
        yield f"the docstring of {entry.config.__name__} does not explain, in backticks: {', '.join(missing)}"


def check_runs(bench: Bench) -> str:
    """It runs at its native budget, to finite logits and metrics."""
    try:
        made = bench.run()
    except NotApplicable as reason:
        raise ContractError(f"it cannot run at its native budget: {reason}") from reason
    values = {name: value for name, value in made.record.metrics.items() if value is not None}
    values |= {name: float(np.abs(made.outputs[name]).max()) for name in OUTPUTS}
    infinite = [name for name, value in values.items() if not np.isfinite(value)]
    if infinite:
        raise ContractError(f"not finite: {', '.join(infinite)}")
    return ""


def check_deterministic(bench: Bench) -> str:
    """A second run in another home gives the same bytes."""
    first = bench.run()
    with profile():
        torch.manual_seed(1)  # an unseeded draw of the method must not find the generator as the first run did
        differs = first.differs(bench.make())
    if differs:
        raise ContractError(
            f"a second run gave other bytes of {differs}: draw random numbers from task.rng(purpose) only, "
            "or from torch's generator inside a training step"
        )
    return ""


def obeys(bench: Bench, rung: str) -> None:
    """At one rung the ledger stays within the grant; raises `NotApplicable` where the method does not run."""
    labels = bench.run(rung).labels
    card = find_card(DATASET)[1]
    train, val = (np.array(card.counts[split]).reshape(len(card.classes), -1).sum(1) for split in HELD)
    granted = most_labels(Budget.parse(rung), len(card.attributes), train, val)
    granted["total_a"] = granted["n_train_a"] + granted["n_val_a_select"]
    used = {name: getattr(labels, name) for name in granted}
    over = [f"{name} {used[name]} of {limit}" for name, limit in granted.items() if used[name] > limit]
    if over:
        raise ContractError(f"at budget {rung} it used more labels than granted: {', '.join(over)}")


def check_budget(bench: Bench) -> str:
    """Every rung is obeyed or n/a with a reason, and granted one attribute the method pays for one."""
    remarks: dict[str, list[str]] = {}
    for rung in RUNGS:
        try:
            obeys(bench, rung)
        except NotApplicable as reason:
            remarks.setdefault(str(reason), []).append(rung)
    attributes = find_card(DATASET)[1].attributes
    all_, one = bench.run(bench.native).labels, bench.run(f"{bench.native}:{attributes[0].name}").labels
    if one.total_a * len(attributes) != all_.total_a:
        raise ContractError(
            f"granted {len(attributes)} attributes it uses {all_.total_a} labels, granted one {one.total_a}: "
            "take groups from task.groups(split), whose number is not fixed, and nothing from elsewhere"
        )
    return "; ".join(f"n/a at {', '.join(rungs)}: {reason}" for reason, rungs in remarks.items())


def check_no_leak(bench: Bench) -> str:
    """Permuting what a budget does not grant changes no byte: at `none`, at one attribute, at a share of the images."""
    budgets = ("none", "val-20", f"{bench.native}:{find_card(DATASET)[1].attributes[0].name}")
    remarks = []
    for text in budgets:
        try:
            seen = bench.run(text)
        except NotApplicable as reason:
            remarks.append(f"n/a at {text}: {reason}")
            continue
        with profile(), altered(without(Budget.parse(text))):
            differs = seen.differs(bench.make(text))
        if differs:
            raise ContractError(
                f"at budget {text}, permuting the attributes that it does not grant changed {differs}: "
                "task.groups(split) is the only door to attributes"
            )
    if len(remarks) == len(budgets):
        raise NotApplicable("; ".join(remarks))
    return "; ".join(remarks)


def check_test_unseen(bench: Bench) -> str:
    """Fitting never opens the test split, and permuting the test labels changes no prediction."""
    with profile(), altered(relabelled), closed_test_split(bench.host.cls) as asked:
        made = bench.make()
    if asked:
        raise ContractError(TEST_ASKED)
    differs = bench.run().differs(made)
    if differs:
        raise ContractError(f"permuting the labels of the test split changed {differs}: predict from images alone")
    return ""


def check_resume(bench: Bench) -> str:
    """Killed at any step or between epochs and started again, it ends at the same bytes, history and cost."""
    undisturbed = bench.run()
    disturbances: dict[str, Iterator[AbstractContextManager[Progress]]] = {
        "within epochs": map(killed_after_steps, count(3, 5)),
        "after every epoch": map(killed_after_epochs, repeat(1)),
    }
    for when, killers in disturbances.items():
        with profile():
            made = survive(bench, killers)
        differs = undisturbed.differs(made)
        if differs or made.record.history != undisturbed.record.history:
            raise ContractError(
                f"killed {when} and started again, it ended at other bytes of {differs or 'its history'}: "
                "what training changes beside networks and optimisers belongs into state_dict and load_state_dict"
            )
        passes, expected = made.cost.scratch.n_fwd, undisturbed.cost.scratch.n_fwd
        if passes != expected:
            raise ContractError(
                f"killed {when} and started again, it billed {passes} forward passes instead of {expected}: "
                "everything that trains goes through task.train"
            )
    return ""


def check_cost(bench: Bench) -> str:
    """It bills passes and FLOPs, and given the shared checkpoint it costs at most what it costs from scratch."""
    scratch, marginal = bench.run().cost.scratch, bench.run().cost.marginal
    unbilled = [name for name in ("n_fwd", "n_bwd", "flops") if getattr(scratch, name) <= 0]
    if unbilled:
        raise ContractError(
            f"it billed no {', '.join(unbilled)}: train through task.train or start from task.erm(), "
            "put other work into `with task.stage(name)`"
        )
    if not 0 <= marginal.device_s <= scratch.device_s:
        raise ContractError(f"its marginal cost {marginal.device_s} s is not within [0, {scratch.device_s} s]")
    return ""


CHECKS: dict[str, Callable[[Bench], str]] = {
    "documented": check_documented,
    "runs": check_runs,
    "deterministic": check_deterministic,
    "budget": check_budget,
    "no-leak": check_no_leak,
    "test-unseen": check_test_unseen,
    "resume": check_resume,
    "cost": check_cost,
}
"""All checks in order. Each returns a remark (mostly empty) and raises `ContractError` or `NotApplicable`."""
FIRST = ("runs", "deterministic")
"""Without these the later checks, which compare bytes, would blame the wrong thing."""


def verdicts(method: str) -> Iterator[Verdict]:
    """Check a method point by point, up to a failure in `FIRST`; raises `UnknownName` when there is no such method."""
    bench = Bench(method)
    for name in CHECKS:
        verdict = judge(bench, name)
        yield verdict
        if name in FIRST and verdict.state == "failed":
            return


def judge(bench: Bench, name: str) -> Verdict:
    """One check of a method, whatever it raises."""
    state: Literal["ok", "n/a", "failed"] = "ok"
    start = time.perf_counter()
    try:
        message = CHECKS[name](bench)
    except NotApplicable as reason:
        state, message = "n/a", str(reason)
    except DiskError:
        raise
    except Exception as error:  # a method may break in any way: that is what is being asked
        state, message = "failed", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return Verdict(name, state, time.perf_counter() - start, message)
