"""What every registered method must keep, on the tiny dataset: a new file in `methods/` is tested by being there."""

from functools import cache

import pytest
from worstgroup.authoring import contract
from worstgroup.benchmark.budget import RUNGS
from worstgroup.benchmark.registry import METHODS

every_method = pytest.mark.parametrize("method", list(METHODS))
bench = cache(contract.Bench)  # undisturbed runs are made once for all tests of a method


@every_method
@pytest.mark.parametrize("check", contract.CHECKS)
def test_keeps_the_contract(method: str, check: str) -> None:
    verdict = contract.judge(bench(method), check)
    assert verdict.state != "failed", verdict.message


@every_method
@pytest.mark.parametrize("rung", RUNGS)
def test_obeys_every_budget(method: str, rung: str) -> None:
    try:
        contract.obeys(bench(method), rung)
    except contract.NotApplicable as reason:
        pytest.skip(str(reason))
