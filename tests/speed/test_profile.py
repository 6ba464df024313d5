"""`profile` against itself: ERM's step beside ERM's is 1, and eX2L's two networks cost two.

Run with `pytest tests/speed --benchmark-enable` on an idle machine; otherwise only that it measures is tested.
"""

import pytest
from worstgroup.benchmark.profiling import Ask, Effort, measure

STATED = {"erm": (0.97, 1.03), "ex2l": (1.9, 2.2)}
ROUNDS, STEPS = 11, 6


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", STATED)
def test_step_ratio(name, benchmark, report):
    ask = Ask((name,), size=64, backbone="resnet18", batch=32)
    effort = Effort(3, STEPS, ROUNDS) if benchmark.enabled else Effort(1, 2, 1)
    (method,) = benchmark.pedantic(measure, args=(ask, effort), rounds=1).methods
    ratio = method.steps.step_ratio
    report(f"{name} / erm step by `profile`", f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    low, high = STATED[name] if benchmark.enabled else (0.5, 4)
    assert low <= ratio.value <= high
