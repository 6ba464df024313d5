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

PAIRS = 11
CASES = {"tiny_cnn": (32, 64, 28), "resnet18": (64, 32, 6)}


def bare_epoch(model, optimizer, images, y, mean, std, batch_size):
    model.train()
    start = time.perf_counter()
    for index in torch.randperm(len(y)).split(batch_size):
        x = images[index].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        x = x.sub_(mean).div_(std)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y[index])
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def engine_epoch(model, pixels, val, recipe, state):
    clock = Clock(torch.device("cpu"))
    clock.meter(model, model.trunk, pixels.batch(torch.tensor([0])).x)
    objective = engine.Objective(None)
    objective.model = model
    training = engine.Training(pixels, val, recipe, 1, "train", ("speed",), clock, state)
    engine.fit(objective, model, random_order(len(pixels), recipe), training)
    state.unlink()
    return clock.stages["train"].wall_s


@pytest.mark.parametrize("name", CASES)
def test_engine_step_ratio(name, benchmark, report, tmp_path):
    size, batch_size, steps = CASES[name]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size * steps, size, size, 3), dtype=np.uint8)
    y = rng.integers(0, 2, len(images))
    recipe = Recipe(optimizer="sgd", lr=1e-3, batch_size=batch_size, epochs=1)
    mean, std = (0.5,) * 3, (0.25,) * 3
    pixels, val = (Pixels(images[:n], y[:n], mean, std, torch.device("cpu")) for n in (len(images), 2))
    model = build_backbone(name, num_classes=2, image=(size, size))
    optimizer = engine.make_optimizer(model.parameters(), recipe)
    shaped = [torch.tensor(value).view(1, 3, 1, 1) for value in (mean, std)]

    def pair():
        bare = bare_epoch(model, optimizer, pixels.images, pixels.y, *shaped, batch_size)
        fresh = build_backbone(name, num_classes=2, image=(size, size))
        return engine_epoch(fresh, pixels, val, recipe, tmp_path / "state.pt") / bare

    pair()  # warm-up
    pairs = PAIRS if benchmark.enabled else 3
    ratios = [pair() for _ in range(pairs)]
    benchmark.extra_info["ratio"] = median(ratios)
    report(
        f"engine / bare loop, {name} at {size} px",
        f"{median(ratios):.3f} (median of {pairs}, {min(ratios):.3f} to {max(ratios):.3f})",
    )
    benchmark.pedantic(pair, rounds=1)
    assert median(ratios) < 2 * 1.05
