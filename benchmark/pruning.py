"""Searches that give up on hopeless draws, by optuna's median rule (optional; needs optuna).

A draw is given up when its best selection value so far is below the median of the finished draws at the same epoch. The
draws go one after another, since each is judged by those before it.
"""

import time
from collections.abc import Iterator

import numpy as np
import torch

from .errors import UserError
from .executors import Reporter
from .planning import Plan
from .record import RunRecord
from .runner import finished, run_spec
from .selection import CRITERIA
from .spec import RunSpec
from .tuning import Pruned, Sweep, was_pruned

STARTUP = 4
"""Draws that are never given up."""
WARMUP = 0.2
"""Share of a recipe's epochs before which none is."""


class Judge:
    """The draws of one search, judged by those that have finished."""

    def __init__(self, epochs: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError("--prune needs optuna: `pip install worstgroup[optuna]`") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(STARTUP, max(1, round(WARMUP * epochs)))
        self._study = optuna.create_study(direction="maximize", pruner=pruner)
        self._given_up = optuna.trial.TrialState.PRUNED
        self._failed = optuna.trial.TrialState.FAIL

    def begin(self) -> None:
        """A draw starts."""
        self._trial = self._study.ask()
        self.seen = 0
        """Epochs that were watched."""

    def watch(self, value: float) -> None:
        """The selection value after one more epoch; raises `Pruned`."""
        self._trial.report(value, self.seen)
        self.seen += 1
        if self._trial.should_prune():
            raise Pruned(f"after epoch {self.seen}: it scored {value:.4f}, and never reached the median draw")

    def end(self, record: RunRecord) -> None:
        """A draw has ended: finished, failed or given up."""
        if record.status == "finished" and record.selection and record.selection.value is not None:
            self._study.tell(self._trial, record.selection.value)
        else:
            self._study.tell(self._trial, state=self._given_up if was_pruned(record) else self._failed)


def selection_values(record: RunRecord) -> Iterator[float]:
    """Selection value after every epoch of a finished training that an epoch was selected in."""
    chosen = record.selection
    if chosen and chosen.step is not None:
        for epoch in record.search or record.history:
            yield CRITERIA[chosen.criterion].score(np.array(epoch.correct_seen), np.array(chosen.seen))[0]


def run_searches(plan: Plan, reporter: Reporter, *, threads: int = 1) -> list[RunRecord]:
    """Run the candidates of all searches of a plan in this process, and return their records, in order.

    Raises `UserError` where optuna is not installed.
    """
    torch.set_num_threads(threads)
    judged = [(sweep, Judge(sweep.runs[0].block.recipe.epochs)) for sweep in plan.sweeps]
    done = sum(finished(one) is not None for sweep in plan.sweeps for one in sweep.candidates)
    reporter.begin(sum(len(sweep.candidates) for sweep in plan.sweeps), done)
    return [record for sweep, judge in judged for record in _search(sweep, judge, plan, reporter)]


def _search(sweep: Sweep, judge: Judge, plan: Plan, reporter: Reporter) -> Iterator[RunRecord]:
    for spec in sweep.candidates:
        judge.begin()
        record = finished(spec) or _run(spec, judge, plan, reporter)
        if not judge.seen:  # made before, or in one piece: the plain ERM
            _replay(judge, record)
        judge.end(record)
        yield record


def _replay(judge: Judge, record: RunRecord) -> None:
    """Let a finished draw count as if it had been watched: it is not given up."""
    for value in selection_values(record):
        try:
            judge.watch(value)
        except Pruned:
            continue


def _run(spec: RunSpec, judge: Judge, plan: Plan, reporter: Reporter) -> RunRecord:
    reporter.start(spec)
    start = time.perf_counter()
    record = run_spec(spec, plan.stores[spec.block.dataset], reporter.progress, watch=judge.watch)
    reporter.end(spec, record, time.perf_counter() - start)
    return record
