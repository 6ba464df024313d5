"""What every registered method must keep, on the tiny dataset: a new file in `methods/` is tested by being there."""

import dataclasses
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from helpers import plan_tiny, predictions
from worstgroup.benchmark.planning import Plan
from worstgroup.benchmark.record import RunRecord
from worstgroup.benchmark.registry import METHODS
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import RUNGS, Budget
from worstgroup.benchmark.store import Split, Store

pytestmark = pytest.mark.usefixtures("tiny")
every_method = pytest.mark.parametrize("method", list(METHODS))


def run_one(plan: Plan, **options) -> RunRecord:
    (planned,) = plan.runs
    assert planned.spec is not None, planned.reason
    record = run_spec(planned.spec, plan.stores["tiny"], **options)
    assert record.status == "finished", record.error
    return record


@every_method
@pytest.mark.parametrize("rung", RUNGS)
def test_obeys_every_budget(method: str, rung: str) -> None:
    plan = plan_tiny(method, budget=rung)
    (planned,) = plan.runs
    if planned.spec is None:
        assert "needs" in planned.reason
        return
    record = run_one(plan)
    grant, labels = RUNGS[rung], record.labels
    assert labels is not None
    assert grant.train or labels.n_train_a == 0
    assert grant.val_fit or labels.n_val_a_fit == 0
    assert grant.val_select or labels.n_val_a_select == 0
    assert all(np.isfinite(value) for value in record.metrics.values() if value is not None)


@every_method
def test_granted_one_attribute_pays_for_one(method: str) -> None:
    native = METHODS[method].requires.native
    native = "select" if native == "none" else native
    both = run_one(plan_tiny(method, budget=native)).labels
    one = run_one(plan_tiny(method, budget=f"{native}:stripe")).labels
    assert both is not None
    assert one is not None
    assert one.total_a * 2 == both.total_a


@every_method
def test_is_deterministic(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    first = predictions(run_one(plan_tiny(method)))
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "second"))
    assert predictions(run_one(plan_tiny(method))) == first


@every_method
def test_sees_no_attribute_without_budget(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    plan = plan_tiny(method, budget="none")
    if plan.runs[0].spec is None:
        pytest.skip(f"{method} does not run at none: {plan.runs[0].reason}")
    first = predictions(run_one(plan), ("test_prediction", "test_logits", "val_logits"))
    split = Store.split

    def permuted(self: Store, name) -> Split:
        data = split(self, name)
        return data if name == "test" else replace(data, a=np.random.default_rng(1).permutation(data.a))

    monkeypatch.setattr(Store, "split", permuted)
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "second"))
    again = predictions(run_one(plan_tiny(method, budget="none")), ("test_prediction", "test_logits", "val_logits"))
    assert again == first


@every_method
def test_goes_on_where_it_was_interrupted(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    undisturbed = run_one(plan_tiny(method))
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "second"))
    plan = plan_tiny(method)
    epochs = count(1)

    def interrupt(stage: str, epoch: int, epochs_: int) -> None:
        if next(epochs) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_one(plan, progress=interrupt)
    resumed = run_one(plan)
    assert predictions(resumed) == predictions(undisturbed)
    assert resumed.history == undisturbed.history
    assert resumed.cost is not None
    assert undisturbed.cost is not None
    assert resumed.cost.scratch.n_fwd == undisturbed.cost.scratch.n_fwd


@every_method
def test_bills_its_cost(method: str) -> None:
    record = run_one(plan_tiny(method))
    assert record.cost is not None
    scratch, marginal = record.cost.scratch, record.cost.marginal
    assert scratch.n_fwd > 0
    assert scratch.n_bwd > 0
    assert scratch.flops > 0
    assert 0 <= marginal.device_s <= scratch.device_s


@every_method
def test_documents_itself(method: str) -> None:
    entry = METHODS[method]
    assert entry.summary
    assert entry.cls.__doc__
    assert entry.paper
    Budget.parse(entry.requires.native)
    for field in dataclasses.fields(entry.config):
        assert f"`{field.name}`" in (entry.config.__doc__ or ""), (
            f"{field.name} is not in {entry.config.__name__}'s docstring"
        )
