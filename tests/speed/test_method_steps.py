"""Training step of single-stage methods against ERM's, same engine, same images, same backbone.

Run with `pytest tests/speed --benchmark-enable` on an idle machine; only twice the stated ratio fails.
"""

from contextlib import nullcontext
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from worstgroup.benchmark import engine
from worstgroup.benchmark.annotations import Attributes
from worstgroup.benchmark.backbones import build_backbone
from worstgroup.benchmark.cost import Clock
from worstgroup.benchmark.data import Pixels
from worstgroup.benchmark.registry import METHODS
from worstgroup.benchmark.spec import Recipe

PAIRS, SIZE, BATCH, STEPS = 9, 64, 32, 6
STATED = {
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
CPU = torch.device("cpu")
RECIPE = Recipe(optimizer="sgd", lr=1e-3, batch_size=BATCH, epochs=1)


class SpeedTask(SimpleNamespace):
    """What an objective asks of a task, over random images with one attribute."""

    device, num_classes, recipe = CPU, 2, RECIPE

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        n = BATCH * STEPS
        images = rng.integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)
        self.labels, self.values = rng.integers(0, 2, n), rng.integers(0, 2, (n, 1))
        self.pixels = Pixels(images, self.labels, (0.5,) * 3, (0.25,) * 3, CPU)

    def size(self, split):
        return len(self.labels)

    def y(self, split):
        return self.labels

    def attributes(self, split):
        return Attributes(self.values, (2,))

    def groups(self, split):
        return self.attributes(split).groups(self.labels, 2)

    def environments(self, definition):
        return self.attributes("train").joint()

    def network(self, num_classes, purpose=""):
        return build_backbone("resnet18", num_classes=num_classes, image=(SIZE, SIZE))

    def seeded(self, purpose):
        return nullcontext()


def epoch(task, objective, state):
    """CPU seconds of an epoch, evaluation and set-up off the clock."""
    objective.setup(task, task.network(2))
    clock = Clock(CPU)
    training = engine.Training(task.pixels, None, RECIPE, 1, "train", ("speed",), clock, state)
    engine.fit(objective, objective.model, objective.make_sampler(task, RECIPE), training)
    state.unlink()
    return clock.stages.pop("train").device_s


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", STATED)
def test_step_ratio_to_erm(name, benchmark, report, tmp_path):
    task, entry = SpeedTask(), METHODS[name]

    def pair(erm_first=True):
        objectives = {"erm": engine.Objective(None), name: entry.cls(entry.config())}
        order = list(objectives) if erm_first else list(objectives)[::-1]
        seconds = {side: epoch(task, objectives[side], tmp_path / "state.pt") for side in order}
        return seconds[name] / seconds["erm"]

    pair()  # warm-up
    pairs = PAIRS if benchmark.enabled else 2
    ratios = sorted(pair(i % 2 == 0) for i in range(pairs))
    benchmark.extra_info["ratio"] = median(ratios)
    report(
        f"{name} / erm step, resnet18 at {SIZE} px",
        f"{median(ratios):.3f} (median of {pairs}, {ratios[0]:.3f} to {ratios[-1]:.3f}; stated {STATED[name]})",
    )
    benchmark.pedantic(pair, rounds=1)
    assert median(ratios) < 2 * STATED[name]
