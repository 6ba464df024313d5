"""Training step of the engine against a bare loop that does the same arithmetic.

Run with `pytest tests/speed --benchmark-enable` on an idle machine. The stated ratio is 1.05; only twice that fails.
"""

import time
from statistics import median

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from worstgroup.benchmark import engine
from worstgroup.benchmark.backbones import build_backbone
from worstgroup.benchmark.cost import Clock
from worstgroup.benchmark.data import Pixels, random_order
from worstgroup.benchmark.spec import Recipe

PAIRS = 15
CASES = {"tiny_cnn": (32, 64, 28), "resnet18": (64, 32, 6)}
MEAN, STD = (0.5,) * 3, (0.25,) * 3


def bare_epoch(model, recipe, images, y):
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
    start = time.perf_counter()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    model.train()
    for index in torch.randperm(len(y)).split(recipe.batch_size):
        x = images[index].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        x = x.sub_(mean).div_(std)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y[index])
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def engine_epoch(objective, clock, recipe, train, val, state):
    training = engine.Training(train, val, recipe, 1, "train", ("speed",), clock, state)
    engine.fit(objective, objective.model, random_order(len(train), recipe), training)
    state.unlink()
    return clock.stages.pop("train").wall_s


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_engine_step_ratio(name, benchmark, report, tmp_path):
    size, batch_size, steps = CASES[name]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size * steps, size, size, 3), dtype=np.uint8)
    y = rng.integers(0, 2, len(images))
    recipe = Recipe(optimizer="sgd", lr=1e-3, batch_size=batch_size, epochs=1)
    train, val = (Pixels(images[:n], y[:n], MEAN, STD, torch.device("cpu")) for n in (len(images), 2))
    bare, ours = (build_backbone(name, num_classes=2, image=(size, size)) for _ in range(2))
    clock = Clock(torch.device("cpu"))
    clock.meter(ours, ours.trunk, train.batch(torch.tensor([0])).x)
    objective = engine.Objective(None)
    objective.model = ours

    sides = {
        "bare": lambda: bare_epoch(bare, recipe, train.images, train.y),
        "engine": lambda: engine_epoch(objective, clock, recipe, train, val, tmp_path / "state.pt"),
    }

    def pair(first="bare", second="engine"):
        seconds = {side: sides[side]() for side in (first, second)}
        return seconds["engine"] / seconds["bare"]

    pair()  # warm-up
    pairs = PAIRS if benchmark.enabled else 3
    ratios = [pair(*(("bare", "engine") if i % 2 else ("engine", "bare"))) for i in range(pairs)]
    benchmark.extra_info["ratio"] = median(ratios)
    spread = f"median of {pairs}, {min(ratios):.3f} to {max(ratios):.3f}"
    report(f"engine / bare loop, {name} at {size} px", f"{median(ratios):.3f} ({spread})")
    benchmark.pedantic(pair, rounds=1)
    assert median(ratios) < 2 * 1.05
