"""Searches that give up on hopeless draws: judged by the draws before, and recorded as given up."""

import sys
from dataclasses import replace

import pytest
from helpers import Call
from stubs import quiet
from worstgroup.benchmark import pruning
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.executors import run_plan
from worstgroup.benchmark.planning import Plan, Request, plan
from worstgroup.benchmark.record import find, read
from worstgroup.benchmark.runner import runs_home
from worstgroup.benchmark.tuning import was_pruned
from worstgroup.commands.console import RunReporter
from worstgroup.commands.terminal import err
from worstgroup.leaderboard.verify import verify

pytestmark = pytest.mark.usefixtures("tiny")
EPOCHS, DRAWS = 4, 8


def searched(**changes: object) -> Plan:
    """A search whose later draws hardly learn."""
    settings = {"recipe.epochs": str(EPOCHS)}
    request = Request("tiny", "erm", "select", seeds=(0,), tuning=DRAWS, settings=settings)
    return plan([replace(request, **changes)])  # type: ignore[arg-type]


def judge() -> pruning.Judge:
    return pruning.Judge(EPOCHS)


def test_a_draw_below_the_median_is_given_up() -> None:
    found = judge()
    for value in (0.5, 0.6, 0.7, 0.8):
        found.begin()
        for _ in range(EPOCHS):
            found.watch(value)
        found._study.tell(found._trial, value)
    found.begin()
    found.watch(0.1)
    with pytest.raises(UserError, match=r"given up after epoch 2: it scored 0.1000"):
        found.watch(0.1)
    found._study.tell(found._trial, state=found._given_up)
    found.begin()
    for _ in range(EPOCHS):
        found.watch(0.9)


def test_the_first_draws_are_never_given_up() -> None:
    found = judge()
    for value in (0.9, 0.1, 0.1, 0.1):
        found.begin()
        for _ in range(EPOCHS):
            found.watch(value)
        found._study.tell(found._trial, value)


def test_given_up_draws_are_recorded_billed_and_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "STARTUP", 1)
    made = searched(ranges={"recipe.lr": "{1e-12}"})
    records = pruning.run_searches(made, RunReporter(err, quiet=True))
    pruned = [i for i, record in enumerate(records) if was_pruned(record)]
    assert len(records) == DRAWS
    assert pruned
    for i in pruned:
        cost = records[i].cost
        assert cost is not None
        assert 0 < cost.stages["train"].n_updates < EPOCHS * 12
    (final,) = run_plan(made.decided({record.run: record for record in records}), RunReporter(err, quiet=True))
    assert final.tuning
    assert final.tuning.pruned == pruned
    assert all(final.tuning.scores[i] is None for i in pruned)
    assert final.draw not in pruned
    (path,) = (file for file in find(runs_home()) if read(file).run == final.run)
    assert verify(path).ok, verify(path).problems


def test_a_search_that_goes_on_judges_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished draws count with the values of their epochs, as if they had been watched."""
    monkeypatch.setattr(pruning, "STARTUP", 1)
    made = searched(ranges={"recipe.lr": "{1e-12}"})
    first = [was_pruned(record) for record in pruning.run_searches(made, RunReporter(err, quiet=True))]
    again = [was_pruned(record) for record in pruning.run_searches(made, RunReporter(err, quiet=True))]
    assert first == again


def test_the_values_of_a_finished_run_are_those_that_were_watched() -> None:
    from worstgroup.benchmark.runner import run_spec

    made = searched()
    watched: list[float] = []
    spec = made.sweeps[0].candidates[1]
    record = run_spec(spec, made.stores["tiny"], quiet, watch=watched.append)
    assert list(pruning.selection_values(record)) == pytest.approx(watched)
    assert len(watched) == EPOCHS


def test_without_optuna_it_says_what_to_install(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = call("tune", "--dataset", "tiny", "--method", "erm", "--draws", "2", "--prune")
    assert done.code == 2
    assert "pip install worstgroup[optuna]" in done.err


def test_tune_says_which_draws_were_given_up(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "STARTUP", 1)
    words = ("tune", "--dataset", "tiny", "--method", "erm", "--budget", "select", "--draws", "5", "--prune", "--quiet")
    done = call(*words, "--set", "recipe.epochs=4", "--search", "recipe.lr={1e-12}")
    assert done.code == 0, done.err
    assert "given up after epoch" in done.out
