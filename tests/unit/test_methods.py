import math
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare  # type: ignore[import-untyped]
from stubs import Labels, make_card, make_task, split_of
from torch import Tensor
from toys import LOGITS, NO_VAL
from worstgroup.benchmark.annotations import Groups, Held
from worstgroup.benchmark.data import Batch, weighted
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Task
from worstgroup.methods import groupdro, jtt
from worstgroup.methods.blocks.balance import balanced_subset
from worstgroup.methods.resample import ReSample

# ---------------------------------------------------------------------------------------------------------------- ERM


@pytest.mark.parametrize("k", [2, 3, 10])
def test_zero_logits_cost_the_log_of_the_number_of_classes(k: int) -> None:
    erm: Objective[None] = Objective(None)
    erm.setup(cast(Task, None), LOGITS)
    x = torch.zeros(6, k, requires_grad=True)
    y = torch.arange(6) % k
    loss = erm.loss(Batch(x, y, torch.arange(6)))
    assert loss.item() == pytest.approx(math.log(k))
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.allclose(gradient, (torch.full((6, k), 1 / k) - torch.eye(k)[y]) / 6)


# ----------------------------------------------------------------------------------------------------------- samplers


def sampler_of(kind: str) -> Objective[None]:
    made: Objective[None] = Objective(None)
    made.sampler = cast(Any, kind)
    return made


def epochs(kind: str, train: Labels, number: int = 1, budget: str = "train+val", batch_size: int = 64) -> Tensor:
    """All indices drawn in some epochs."""
    sampler = sampler_of(kind).make_sampler(make_task(train, NO_VAL, budget=budget), Recipe(batch_size=batch_size))
    generator = torch.Generator().manual_seed(0)
    return torch.cat([index for _ in range(number) for index in sampler(generator)])


SIZES = (1749, 92, 28, 529)
TRAIN = split_of(SIZES, make_card())
GROUP = np.repeat(np.arange(4), SIZES)


def test_resample_draws_groups_uniformly() -> None:
    assert ReSample.sampler == groupdro.GroupDRO.sampler == "uniform_group"
    drawn = epochs("uniform_group", TRAIN, 4).numpy()
    assert len(drawn) == 4 * len(GROUP)
    assert chisquare(np.bincount(GROUP[drawn])).pvalue > 0.01
    within = np.bincount(drawn, minlength=len(GROUP))
    for g in range(4):
        assert chisquare(within[g == GROUP]).pvalue > 0.01


def test_uniform_groups_are_the_ones_that_exist() -> None:
    drawn = epochs("uniform_group", split_of((300, 0, 30, 90), make_card()), 10).numpy()
    share = np.bincount(np.repeat([0, 2, 3], (300, 30, 90))[drawn], minlength=4)
    assert share[1] == 0
    assert chisquare(share[[0, 2, 3]]).pvalue > 0.01


def test_class_sampler_draws_classes_uniformly_and_reads_no_attribute() -> None:
    drawn = epochs("class", TRAIN, 4, budget="none").numpy()
    y = GROUP // 2
    assert chisquare(np.bincount(y[drawn])).pvalue > 0.01
    inside = np.bincount(GROUP[drawn])[:2]
    assert inside[0] / inside.sum() == pytest.approx(1749 / (1749 + 92), abs=0.02)


def test_random_sampler_takes_every_image_once() -> None:
    first, second = epochs("random", TRAIN, 2, budget="none").chunk(2)
    assert torch.equal(first.sort().values, torch.arange(len(GROUP)))
    assert torch.equal(second.sort().values, torch.arange(len(GROUP)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", ["uniform_group", "class"])
def test_on_balanced_data_every_sampler_is_random(kind: str) -> None:
    balanced = split_of((25, 25, 25, 25), make_card())
    assert torch.equal(epochs(kind, balanced, 2), epochs("random", balanced, 2))


@pytest.mark.parametrize(
    ("n", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (1, [1]), (5, [5]), (4, [4]), (13, [4, 4, 5])]
)
@pytest.mark.parametrize("equal", [True, False])
def test_a_last_batch_of_one_joins_its_neighbour(n: int, sizes: list[int], equal: bool) -> None:
    weights = torch.ones(n) if equal else torch.arange(1.0, n + 1)
    batches = weighted(weights, Recipe(batch_size=4))(torch.Generator().manual_seed(0))
    assert [len(index) for index in batches] == sizes


# ---------------------------------------------------------------------------------------------------------------- JTT


@pytest.mark.parametrize(("upweight", "weights"), [(50.0, [1, 50, 1, 50]), (1.0, [1, 1, 1, 1])])
def test_jtt_weights(upweight: float, weights: list[float]) -> None:
    errors = np.array([False, True, False, True])
    assert jtt.error_weights(errors, upweight).tolist() == weights


def test_jtt_without_errors_is_refused() -> None:
    with pytest.raises(UserError, match="no training error, so there is nothing to upweight; lower first_epochs"):
        jtt.error_weights(np.zeros(5, bool), 50)


def jtt_order(weights: NDArray[np.float64]) -> Tensor:
    task = make_task(TRAIN, NO_VAL, budget="none")
    sampler = jtt.Upweighted(weights).make_sampler(task, Recipe(batch_size=64))
    return torch.cat(list(sampler(torch.Generator().manual_seed(0))))


@pytest.mark.parametrize(
    ("errors", "upweight"),
    [(GROUP == 2, 1.0), (np.ones(len(GROUP), bool), 50.0)],
    ids=["lambda 1", "all wrong"],
)
def test_jtt_has_the_batches_of_erm(errors: NDArray[np.bool_], upweight: float) -> None:
    assert torch.equal(jtt_order(jtt.error_weights(errors, upweight)), epochs("random", TRAIN, budget="none"))


def test_jtt_draws_errors_by_their_total_weight() -> None:
    errors = GROUP == 2
    drawn = jtt_order(jtt.error_weights(errors, 20.0)).numpy()
    share = 20 * 28 / (20 * 28 + len(GROUP) - 28)
    assert len(drawn) == len(GROUP)
    assert errors[drawn].mean() == pytest.approx(share, abs=0.03)


def test_jtt_on_minority_groups_balances_groups_within_classes() -> None:
    group = np.repeat(np.arange(4), (60, 6, 4, 40))
    weights = jtt.error_weights(np.isin(group, [1, 2]), 10.0)
    assert np.bincount(group, weights).tolist() == [60, 60, 40, 40]


@dataclass
class TwoRuns:
    """A task on which the first run gives fixed logits, and the second run is kept instead of trained."""

    first: Tensor
    truth: NDArray[np.int64]
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=3))
    trained: list[tuple[Any, str]] = field(default_factory=list)
    epoch: int | None = None

    def erm(self, epoch: int) -> int:
        self.epoch = epoch
        return epoch

    def logits(self, checkpoint: int, split: Held) -> Tensor:
        assert (checkpoint, split) == (self.epoch, "train")
        return self.first

    def y(self, split: Held) -> NDArray[np.int64]:
        assert split == "train"
        return self.truth

    def train(self, made: Any, stage: str) -> None:
        self.trained.append((made, stage))


def test_jtt_trains_again_on_the_errors_of_the_first_run() -> None:
    task = TwoRuns(torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]), np.array([0, 0, 1]))
    jtt.JTT(jtt.Config(first_epochs=2, upweight=7)).fit(cast(Task, task))
    ((second, stage),) = task.trained
    assert (task.epoch, stage) == (2, "second")
    assert second.config.tolist() == [1, 7, 7]


def test_jtt_needs_a_first_run_within_the_recipe() -> None:
    with pytest.raises(UserError, match="first_epochs must be at most the recipe's 3 epochs"):
        jtt.Config(first_epochs=4).check(Recipe(epochs=3), make_card())


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (jtt.Config, {"first_epochs": 0}),
        (jtt.Config, {"upweight": -5.0}),
        (groupdro.Config, {"step_size": float("nan")}),
        (groupdro.Config, {"adjustment": -1.0}),
    ],
)
def test_settings_that_cannot_work_are_refused(config: type[Any], settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        config(**settings)


# --------------------------------------------------------------------------------------------------- balanced subsets


def groups_of(*sizes: int, shuffled: int | None = None) -> Groups:
    index = np.repeat(np.arange(len(sizes)), sizes)
    if shuffled is not None:
        index = np.random.default_rng(shuffled).permutation(index)
    return Groups(index, len(sizes))


@pytest.mark.parametrize(
    ("sizes", "n_min", "drawn"),
    [
        ((467, 466, 133, 133), 0, (133, 133, 133, 133)),
        ((30, 1, 9), 0, (1, 1, 1)),
        ((451, 23, 23, 1), 0, (1, 1, 1, 1)),
        ((451, 23, 23, 1), 5, (23, 23, 23, 1)),
        ((30, 5, 6), 5, (6, 5, 6)),
        ((30, 0, 9), 0, (9, 0, 9)),
        ((3, 2, 4), 5, (2, 2, 2)),
        ((8, 8), 0, (8, 8)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_balanced_subset(sizes: tuple[int, ...], n_min: int, drawn: tuple[int, ...], seed: int) -> None:
    groups = groups_of(*sizes, shuffled=seed)
    subset = balanced_subset(groups, np.random.default_rng(seed), n_min)
    assert np.bincount(groups.index[subset], minlength=len(sizes)).tolist() == list(drawn)
    assert (np.diff(subset) > 0).all()  # sorted, without replacement


def test_balanced_subset_draws_every_member_equally_often() -> None:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([balanced_subset(groups_of(40, 10), rng) for _ in range(400)])
    often = np.bincount(drawn)
    assert (often[40:] == 400).all()
    assert often[:40].sum() == 400 * 10
    assert chisquare(often[:40]).pvalue > 0.01


def test_balanced_subset_does_not_depend_on_group_ids() -> None:
    groups = groups_of(30, 20, 10, shuffled=0)
    renamed = Groups(np.array([2, 0, 1])[groups.index], 3)
    a, b = (balanced_subset(g, np.random.default_rng(0)) for g in (groups, renamed))
    assert np.array_equal(a, b)
