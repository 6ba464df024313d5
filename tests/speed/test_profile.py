"""Training steps of single-stage methods against ERM's, by `worstgroup profile`: same engine, images and backbone.

Twice the stated ratio fails. `pytest tests/speed --benchmark-enable` on an idle machine measures longer, and then the
stated ratio holds within a tenth.
"""

import pytest
from worstgroup.benchmark.profiling import Ask, Effort, measure

STATED = {
    "erm": 1.0,
    "groupdro": 1.05,
    "irm": 1.05,
    "mmd": 1.05,
    "coral": 1.05,
    "dann": 1.05,
    "cdann": 1.05,
    "cdan": 1.1,
    "lff": 2.1,
    "ex2l": 2.1,
}
QUICK, LONG = Effort(warmup=1, steps=2, rounds=3), Effort(warmup=3, steps=6, rounds=11)


@pytest.mark.usefixtures("one_thread")
def test_step_ratios(benchmark, report):
    ask = Ask(tuple(STATED), size=64, backbone="resnet18", batch=32)
    made = benchmark.pedantic(measure, args=(ask, LONG if benchmark.enabled else QUICK), rounds=1)
    ratios = {method.label: method.steps.step_ratio for method in made.methods}
    for name, ratio in ratios.items():
        report(f"{name} / erm step", f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    allowed = 1.1 if benchmark.enabled else 2
    assert {name: ratio.value for name, ratio in ratios.items() if ratio.value > allowed * STATED[name]} == {}
    if benchmark.enabled:
        assert abs(ratios["erm"].value - 1) < 0.03
