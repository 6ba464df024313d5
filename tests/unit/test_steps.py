"""Steps that are timed: which training of a method, what a step does, and the statistics of paired ratios."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from worstgroup.benchmark import engine
from worstgroup.benchmark.cost import StageCost
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.planning import Request, plan
from worstgroup.benchmark.runner import refit
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.steps import (
    Block,
    Ratio,
    Side,
    Stopwatch,
    _Flops,
    choose_training,
    find_training,
    interleave,
    paired_ratio,
    trainings,
    trimmed_mean,
)

CPU = torch.device("cpu")
BATCH = 16


def side_of(method: str, **settings: str) -> Side:
    """The step of a method on `tiny`."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    made = plan([Request("tiny", method, seeds=(0,), settings=changes)])
    spec = made.runs[0].spec
    assert spec is not None
    setup = find_training(spec, made.stores["tiny"])
    assert setup is not None
    return Side(setup)


def stage_of(method: str) -> str | None:
    """The stage that a method's step is of, None where it trains nothing on images."""
    made = plan([Request("tiny", method, seeds=(0,))])
    assert made.runs[0].spec is not None
    setup = find_training(made.runs[0].spec, made.stores["tiny"])
    return setup.training.stage if setup else None


# ---------------------------------------------------------------------------------------------------- which training


@pytest.mark.parametrize(
    ("method", "stage"),
    [("erm", "erm"), ("groupdro", "train"), ("jtt", "second"), ("afr", "erm80"), ("dfr", None), ("crt", None)],
)
def test_the_step_is_of_the_methods_own_training_on_images(method: str, stage: str | None) -> None:
    assert stage_of(method) == stage


def test_a_methods_training_is_left_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "step", lambda *_: pytest.fail("it took a step"))
    assert stage_of("groupdro") == "train"
    assert engine.fit.__module__ == engine.__name__  # what watched it is gone


def test_of_several_trainings_the_first_of_a_classifier_counts(register: Callable[..., None]) -> None:
    class Three:
        def __init__(self, config: Any) -> None:
            self.config = config

        def fit(self, task: Any) -> Any:
            task.train_network(Objective(None), task.initial().model, "helper")
            task.train(Objective(None), "first")
            return task.train(Objective(None), "second")

    register("three", Three)
    made = plan([Request("tiny", "three", seeds=(0,))])
    spec, store = made.runs[0].spec, made.stores["tiny"]
    assert spec is not None
    with trainings(spec) as found:
        refit(spec, store)
    assert [(setup.training.stage, setup.is_classifier) for setup in found] == [
        ("helper", False),
        ("first", True),
        ("second", True),
    ]
    chosen = choose_training(found)
    assert chosen is found[1]
    assert choose_training(found[:1]) is found[0]
    assert choose_training([]) is None


# ------------------------------------------------------------------------------------------------------ what it does


@pytest.mark.parametrize("own", [True, False])
def test_images_that_a_method_makes_are_part_of_its_step(register: Callable[..., None], own: bool) -> None:
    def slowly(images: Tensor) -> Tensor:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        return images

    class SlowImages(Objective[Any]):
        def transform(self, recipe: Recipe, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
            return slowly

    register("slow-images", SlowImages if own else Objective)
    side = side_of("slow-images")
    assert (side.block(2).mean > 0.05) == own


@pytest.mark.parametrize(
    ("method", "settings", "passes"),
    [
        ("erm", {}, (1, 1, 0, 1)),
        ("groupdro", {}, (1, 1, 0, 1)),
        ("ex2l", {}, (2, 2, 0, 1)),
        ("dann", {}, (0.5, 0.5, 0.5, 0.5)),
        ("dann", {"dann__disc_steps": "3"}, (0.25, 0.25, 0.75, 0.25)),
    ],
)
def test_passes_of_a_step(method: str, settings: dict[str, str], passes: tuple[float, ...]) -> None:
    side = side_of(method, **settings)
    block = Block.joined([side.block(4) for _ in range(2)])
    cost, examples = block.cost, 8 * BATCH
    assert block.images == examples
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd) == tuple(examples * share for share in passes[:3])
    assert block.updated.mean() == passes[3]
    assert cost.n_updates == 8 * passes[3]
    assert block.seconds.shape == block.wall.shape == block.updated.shape == (8,)
    assert block.whole >= block.wall.sum() > 0


def test_counted_flops_agree_with_the_engines_meter() -> None:
    for method in ("erm", "groupdro", "ex2l"):  # a discriminator is no backbone: the meter leaves it out
        side = side_of(method)
        block = side.block(4)
        counted = 4 * side.flops(float(block.updated.mean()))
        assert counted == pytest.approx(block.cost.flops, rel=0.05), method


def test_flops_are_weighted_by_the_kinds_of_steps() -> None:
    side = side_of("dann")
    some, none = side.flops(1.0), side.flops(0.0)
    assert none < some  # the discriminator's step has no backward through the classifier
    assert side.flops(0.25) == pytest.approx(0.25 * some + 0.75 * none)


def test_both_sides_see_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    step = Objective.step

    def noted(self: Any, batch: Batch, optimizers: Any) -> Tensor:
        seen.append(batch.index)
        return step(self, batch, optimizers)

    sides = side_of("erm"), side_of("cbloss")
    monkeypatch.setattr(Objective, "step", noted)
    interleave(sides, rounds=2, steps=4)
    first, second = ([*seen[k : k + 4], *seen[k + 8 : k + 12]] for k in (0, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert {len(index) for index in seen} == {BATCH}


def test_blocks_of_the_sides_take_turns() -> None:
    order: list[str] = []

    class Noting:
        def __init__(self, name: str) -> None:
            self.name = name

        def block(self, steps: int) -> str:
            order.append(self.name)
            return f"{self.name}{steps}"

    told: list[tuple[int, int]] = []
    blocks = interleave((Noting("erm"), Noting("own")), 3, 5, lambda *done: told.append(done))  # type: ignore[arg-type]
    assert order == ["erm", "own"] * 3
    assert blocks == (["erm5"] * 3, ["own5"] * 3)
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_loss_that_is_not_finite_is_refused(register: Callable[..., None]) -> None:
    class Exploding(Objective[Any]):
        def loss(self, batch: Batch) -> Tensor:
            return F.cross_entropy(self.model(batch.x), batch.y) * float("inf")

    register("exploding", Exploding)
    with pytest.raises(UserError, match=r"the loss is not finite while it is timed; lower recipe\.lr"):
        side_of("exploding").block(2)


def test_the_layout_and_precision_of_the_recipe_are_those_of_the_step() -> None:
    side = side_of("erm", recipe__channels_last="true", recipe__precision="bf16")
    seen: dict[str, Any] = {}
    side.setup.model.trunk.register_forward_hook(lambda _, inputs, out: seen.update(x=inputs[0], dtype=out.dtype))
    side.block(1)
    assert seen["x"].is_contiguous(memory_format=torch.channels_last)
    assert seen["dtype"] == torch.bfloat16


def test_compiled_steps_are_timed_and_their_flops_still_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compiled(forward: Callable[[Tensor], Tensor], **_: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            calls.append(len(x))
            return forward(x)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    side = side_of("erm", recipe__compile="true")
    assert calls == []  # FLOPs were counted in eager mode
    assert side.flops(1.0) == side_of("erm").flops(1.0) > 0
    side.block(3)
    assert calls == [BATCH] * 3


def test_memory_of_a_side_is_not_told_on_a_processor() -> None:
    assert side_of("erm").peak_memory() is None


# -------------------------------------------------------------------------------------------------------- statistics


def block(seconds: list[float], updated: list[bool] | None = None, images: int = 8) -> Block:
    times = np.array(seconds)
    kinds = np.ones(len(times), bool) if updated is None else np.array(updated)
    return Block(times, 2 * times, kinds, float(times.sum()), images, StageCost(n_fwd=images))


def test_the_trimmed_mean_leaves_a_tenth_out_at_either_end() -> None:
    times = np.array([100.0, *np.arange(1.0, 9.0), -100.0])
    assert trimmed_mean(times, np.ones(10, bool)) == pytest.approx(4.5)
    assert trimmed_mean(np.array([1.0, 2.0, 6.0]), np.ones(3, bool)) == pytest.approx(3.0)  # too few to leave one out


def test_trimming_keeps_the_mix_of_kinds() -> None:
    updated = np.tile([True, False, False, False], 10)
    times = np.where(updated, 4.0, 1.0)
    assert trimmed_mean(times, updated) == pytest.approx(7 / 4)
    times[0], times[1] = 1000.0, 1000.0  # one disturbance of each kind
    assert trimmed_mean(times, updated) == pytest.approx(7 / 4)


def test_a_paired_ratio_is_the_median_over_pairs() -> None:
    erm = [1.0, 2.0, 4.0, 1.0, 1.0]
    found = paired_ratio([1.5 * t for t in erm], erm)
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))  # drift of both is no difference
    mixed = paired_ratio([1.0, 2.2, 4.4, 1.1, 9.0], erm)
    assert mixed.value == pytest.approx(1.1)  # one disturbed pair moves it little
    assert mixed.low == pytest.approx(1.0)
    assert mixed.high == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("pairs", "least", "most"), [(5, 0.92, 0.96), (7, 0.97, 1), (9, 0.945, 0.98), (15, 0.945, 0.98)]
)
def test_how_often_the_interval_holds_the_true_ratio(pairs: int, least: float, most: float) -> None:
    """By the binomial distribution 94, 98, 96 and 96 %."""
    rng = np.random.default_rng(0)
    erm, method = rng.lognormal(0, 0.02, (2, 2000, pairs))
    found = [paired_ratio((1.3 * ours).tolist(), theirs.tolist()) for ours, theirs in zip(method, erm, strict=True)]
    assert least < np.mean([ratio.low <= 1.3 <= ratio.high for ratio in found]) <= most


def test_one_disturbed_pair_of_nine_is_outside_of_the_interval() -> None:
    assert paired_ratio([1.0, 1.1, 1.0, 50.0, 1.1, 1.0, 1.1, 1.0, 1.1], [1.0] * 9).high == pytest.approx(1.1)


def test_one_pair_has_no_spread() -> None:
    assert paired_ratio([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)
    assert Ratio(1.5, 1.0, 2.0).times(2) == Ratio(3.0, 2.0, 4.0)


def test_joined_blocks_hold_all_steps() -> None:
    joined = Block.joined([block([1.0, 2.0], images=4), block([3.0], [False], images=2)])
    assert joined.seconds.tolist() == [1.0, 2.0, 3.0]
    assert joined.wall.tolist() == [2.0, 4.0, 6.0]
    assert joined.updated.tolist() == [True, True, False]
    assert (joined.whole, joined.images, joined.cost.n_fwd) == (6.0, 6, 6)


def test_the_stopwatch_counts_work_and_not_waiting() -> None:
    watch = Stopwatch(CPU)
    with watch.lap():
        time.sleep(0.05)
    with watch.lap():
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    slept, worked = watch.seconds()
    assert slept < 0.04 < 0.05 <= worked
    assert (watch.wall() >= 0.05).all()
    assert watch.clock == "process CPU time"


def test_flops_are_counted_where_a_gradient_is_asked_of_a_map_inside() -> None:
    """As Grad-CAM does on AlexNet: through the head and no further."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2))
    with _Flops() as counter:
        maps = model[0](torch.ones(5, 3, 8, 8))
        logits = model[2](model[1](maps))
        torch.autograd.grad(logits.sum(), maps)
    convolution, linear = 2 * 5 * 36 * 4 * 27, 2 * 5 * 4 * 36 * 2
    assert counter.total == convolution + linear + linear
