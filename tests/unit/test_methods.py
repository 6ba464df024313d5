import math
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression
from stubs import Labels, ledger, make_card, make_spec, make_task, split_of
from torch import Tensor
from toys import LOGITS, NO_VAL
from worstgroup.benchmark import metrics
from worstgroup.benchmark.annotations import Groups, Held
from worstgroup.benchmark.data import Batch, weighted
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.lab import Checkpoint
from worstgroup.benchmark.spec import Recipe, derive_seed
from worstgroup.benchmark.task import Predictor, Task
from worstgroup.methods import dfr, groupdro, jtt
from worstgroup.methods.blocks.balance import balanced_subset
from worstgroup.methods.blocks.last_layer import Scaler, StandardisedLinear, fit_l1
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
        (dfr.Config, {"refits": 0}),
        (dfr.Config, {"c_grid": ()}),
        (dfr.Config, {"c_grid": (1.0, 0.0)}),
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


# ------------------------------------------------------------------------------------------------------- linear heads

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """Features (n, 10) of the generator in the specification, labels and attributes (n,), groups 2y + a."""

    x: Matrix
    y: NDArray[np.int64]
    a: NDArray[np.int64]

    @property
    def labels(self) -> Labels:
        return self.y, self.a[:, None]


def generate(n: int, seed: int, agree: float = 0.95, noise: float = 0.5) -> Sample:
    """core = +-1 by y plus noise, spurious = +-3 by a, and 8 features of noise (two-stage methods, 25)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=n)
    a = np.where(rng.random(n) < agree, y, 1 - y)
    core = 2 * y - 1 + noise * rng.standard_normal(n)
    spurious = 3 * (2 * a - 1) + 0.3 * rng.standard_normal(n)
    return Sample(np.c_[core, spurious, rng.standard_normal((n, 8))].astype(np.float32), y, a)


def objective_value(w: NDArray[Any], b: float, x: Matrix, y: NDArray[np.bool_], c: float) -> float:
    margin = np.where(y, 1, -1) * (x.astype(np.float64) @ w.astype(np.float64) + b)
    return float(np.abs(w).sum(dtype=np.float64) + abs(b) + c * np.logaddexp(0, -margin).sum())


def liblinear(x: Matrix, y: NDArray[np.bool_], c: float, tol: float = 1e-4, steps: int = 100) -> LogisticRegression:
    solver = LogisticRegression(solver="liblinear", l1_ratio=1.0, C=c, random_state=0, tol=tol, max_iter=steps)
    return solver.fit(x, y)


SAMPLE = generate(400, 0)


@pytest.mark.parametrize("c", [1.0, 0.1, 0.03])
def test_two_classes_are_liblinears_l1_regression(c: float) -> None:
    solver = liblinear(SAMPLE.x, SAMPLE.y == 1, c)
    weight, bias = fit_l1(SAMPLE.x, SAMPLE.y, 2, c, 0)
    assert np.array_equal(weight, np.stack([np.zeros(10), solver.coef_[0]]).astype(np.float32))
    assert np.array_equal(bias, np.array([0, solver.intercept_[0]], np.float32))
    softmax = torch.from_numpy(SAMPLE.x @ weight.T + bias).softmax(1).numpy()
    assert np.allclose(softmax, solver.predict_proba(SAMPLE.x), atol=1e-6)


def test_three_classes_are_one_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=300)
    x = (np.eye(3)[y] * 2 + rng.standard_normal((300, 3))).astype(np.float32)
    weight, bias = fit_l1(x, y, 3, 0.3, 0)
    for label in range(3):
        solver = liblinear(x, y == label, 0.3)
        assert np.array_equal(weight[label], solver.coef_[0].astype(np.float32))
        assert bias[label] == np.float32(solver.intercept_[0])
    assert ((x @ weight.T + bias).argmax(1) == y).mean() > 0.8


@pytest.mark.parametrize("classes", [2, 3])
def test_a_vanishing_c_gives_a_constant(classes: int) -> None:
    y = np.arange(400) % classes
    weight, bias = fit_l1(SAMPLE.x, y, classes, 1e-6, 0)
    assert not weight.any()
    assert not bias.any()
    correct = metrics.group_counts((SAMPLE.x @ weight.T + bias).argmax(1) == y, y, classes)
    assert metrics.worst_group_accuracy(*correct) == 0


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_predicted_everywhere(label: int) -> None:
    weight, bias = fit_l1(SAMPLE.x, np.full(400, label), 2, 1.0, 0)
    assert ((SAMPLE.x @ weight.T + bias).argmax(1) == label).all()


def wide() -> tuple[Matrix, NDArray[np.bool_]]:
    """200 correlated examples of 2048 non-negative features, the hard case for liblinear's stopping rule."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((200, 50))
    y = z[:, 0] + 0.5 * rng.standard_normal(200) > 0
    x = z @ rng.standard_normal((50, 2048)) / 50**0.5 + 0.3 * rng.standard_normal((200, 2048))
    return np.maximum(x, 0).astype(np.float32), y


@pytest.mark.parametrize(
    ("data", "c", "bound"),
    [
        ((SAMPLE.x, SAMPLE.y == 1), 1.0, 1e-4),
        ((SAMPLE.x, SAMPLE.y == 1), 0.1, 1e-4),
        (wide(), 0.3, 1e-4),
        (wide(), 1.0, 1e-3),  # 3e-4 measured: at its default tolerance liblinear misses the 1e-4 of an own solver here
    ],
    ids=["narrow-1", "narrow-0.1", "wide-0.3", "wide-1"],
)
def test_objective_is_close_to_the_minimum(data: tuple[Matrix, NDArray[np.bool_]], c: float, bound: float) -> None:
    x, y = data
    u = Scaler.fit(x)(x)
    weight, bias = fit_l1(u, y.astype(np.int64), 2, c, 0)
    best = liblinear(u, y, c, tol=1e-8, steps=5000)
    value = objective_value(weight[1], bias[1], u, y, c)
    least = objective_value(best.coef_[0], best.intercept_[0], u, y, c)
    assert abs(value / least - 1) < bound
    assert ((u @ weight[1] + bias[1] > 0) == best.predict(u)).mean() > 0.99


def test_scaler_standardises() -> None:
    u = Scaler.fit(SAMPLE.x)(SAMPLE.x)
    assert u.dtype == np.float32
    assert np.allclose(u.mean(0), 0, atol=1e-5)
    assert np.allclose(u.std(0), 1, atol=1e-5)


@pytest.mark.parametrize(
    "value",
    [
        0.0,
        1.0,
        0.1,
    ],
)
def test_a_constant_feature_keeps_its_scale(value: float) -> None:
    scaler = Scaler.fit(np.full((1199, 1), value, np.float32))
    assert scaler.scale.tolist() == [1]
    assert abs(scaler(np.full((1, 1), value + 0.01, np.float32))).item() < 0.02


def test_mean_of_heads_is_mean_of_logits() -> None:
    scaler = Scaler.fit(SAMPLE.x)
    u, rng = scaler(SAMPLE.x), np.random.default_rng(0)
    heads = []
    for _ in range(5):
        some = rng.choice(400, 100, replace=False)
        heads.append(fit_l1(u[some], SAMPLE.y[some], 2, 1.0, 0))
    x = torch.from_numpy(SAMPLE.x)
    logits = torch.stack([StandardisedLinear(scaler, w, b)(x) for w, b in heads])
    mean = StandardisedLinear(scaler, *(np.mean(part, axis=0) for part in zip(*heads, strict=True)))
    assert torch.allclose(mean(x), logits.mean(0), atol=1e-5)
    assert logits.std(0).max() > 0.01


# ---------------------------------------------------------------------------------------------------------------- DFR


class FeatureTask(Task):
    """A task whose shared ERM is given by its validation features."""

    features_val: Tensor

    def erm(self, epoch: int | None = None) -> Checkpoint:
        return cast(Checkpoint, None)

    def features(self, checkpoint: Checkpoint, split: Held) -> Tensor:
        assert split == "val"
        return self.features_val


def feature_task(val: Sample, budget: str = "val", policy: str = "") -> FeatureTask:
    plain = make_task(val.labels, val.labels, budget=budget, policy=policy)
    task = FeatureTask(plain.spec, plain._lab, plain._annotations)
    task.features_val = torch.from_numpy(val.x)
    return task


def refit(val: Sample, budget: str = "val", policy: str = "", **config: Any) -> tuple[Predictor, FeatureTask]:
    task = feature_task(val, budget, policy)
    return dfr.DFR(dfr.Config(**config)).fit(task), task


def head_of(predictor: Predictor) -> StandardisedLinear:
    assert isinstance(predictor.head, StandardisedLinear)
    return predictor.head


def group_accuracies(predicted: NDArray[Any], test: Sample) -> NDArray[np.float64]:
    correct, total = metrics.group_counts(predicted == test.y, 2 * test.y + test.a, 4)
    return correct / total


def worst(head: StandardisedLinear, test: Sample) -> float:
    return 100 * float(group_accuracies(head(torch.from_numpy(test.x)).argmax(1).numpy(), test).min())


def plain_head(data: Sample, c: float) -> StandardisedLinear:
    """L1 regression on all of the data, with the solver's seed as in DFR."""
    scaler = Scaler.fit(data.x)
    seed = derive_seed(*make_spec().block.stream, "liblinear") % 2**31
    return StandardisedLinear(scaler, *fit_l1(scaler(data.x), data.y, 2, c, seed))


def rows(data: Sample, index: NDArray[np.int64]) -> Sample:
    return Sample(data.x[index], data.y[index], data.a[index])


@pytest.mark.parametrize(("noise", "within", "loss"), [(0.5, 1, 5), (0.8, 2, 20)])
def test_dfr_mends_what_the_biased_head_breaks(noise: float, within: float, loss: float) -> None:
    """Two-stage methods, 25.1, scored on 40,000 balanced examples. With its noise of 0.5 the drop is 7 to 11 points,
    not 20: the Bayes rule of the biased data has 89.7 % in the minority, that of balanced data 97.7 %.
    """
    train, val = generate(4000, 0, noise=noise), generate(1000, 1, noise=noise)
    balanced, test = generate(4000, 2, agree=0.5, noise=noise), generate(40_000, 3, agree=0.5, noise=noise)
    predictor, _ = refit(val)
    value = worst(head_of(predictor), test)
    assert value == pytest.approx(worst(plain_head(balanced, 1.0), test), abs=within)
    assert worst(plain_head(train, 1.0), test) < value - loss


def test_dfr_on_balanced_data_with_one_refit_is_plain_l1_regression() -> None:
    data = generate(600, 4, agree=0.5)
    balanced = rows(data, balanced_subset(Groups(2 * data.y + data.a, 4), np.random.default_rng(0)))
    predictor, _ = refit(balanced, refits=1, c_grid=(0.3,))
    plain = plain_head(balanced, 0.3)
    head = head_of(predictor)
    assert torch.equal(head.weight, plain.weight)
    assert torch.equal(head.bias, plain.bias)
    assert torch.equal(head.mean, plain.mean)
    assert predictor.choice.candidates == 1


def test_dfr_is_deterministic() -> None:
    val = generate(600, 1)
    a, b = (head_of(refit(val, refits=3)[0]) for _ in range(2))
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.bias, b.bias)


def test_dfr_does_not_depend_on_group_ids() -> None:
    val = generate(600, 1)
    a, b = (head_of(refit(data, refits=2)[0]) for data in (val, replace(val, a=1 - val.a)))
    assert torch.equal(a.weight, b.weight)


def test_dfr_on_balanced_groups_does_not_depend_on_group_ids() -> None:
    data = generate(600, 4, agree=0.5)
    balanced = rows(data, balanced_subset(Groups(2 * data.y + data.a, 4), np.random.default_rng(0)))
    a, b = (
        head_of(refit(sample, refits=1, c_grid=(0.3,))[0]) for sample in (balanced, replace(balanced, a=1 - balanced.a))
    )
    assert torch.equal(a.weight, b.weight)


def test_dfr_chooses_c_by_the_rungs_rule_and_the_first_among_equals() -> None:
    predictor, _ = refit(generate(1000, 1), c_grid=(1e-6, 1.0, 1.0), refits=1)
    choice = predictor.choice
    assert (choice.criterion, choice.step, choice.candidates) == ("val-wga-smoothed", None, 3)
    assert choice.value is not None
    assert choice.value > 0.5
    assert head_of(predictor).weight.any()
    assert not head_of(refit(generate(1000, 1), c_grid=(1e-6, 1e-7), refits=1)[0]).weight.any()


def test_dfr_bills_every_validation_image_once() -> None:
    val = generate(400, 1)
    _, task = refit(val, refits=1)
    used = ledger(task)
    assert used["n_val_a_fit"] == used["total_a"] == used["n_y_extra"] == 400
    assert used["n_val_a_select"] == len(task.halves(np.arange(400))[1])
    assert used["n_train_a"] == 0


@pytest.mark.parametrize(("refits", "grid"), [(1, (1.0,)), (4, (1.0, 0.3, 0.1))])
def test_dfr_counts_its_head_fits(refits: int, grid: tuple[float, ...]) -> None:
    _, task = refit(generate(400, 1), refits=refits, c_grid=grid)
    assert task._lab.clock.stages["head"].n_head_fits == refits + len(grid)


def test_dfr_with_classes_reads_no_attribute() -> None:
    val = generate(400, 1)
    (a, task), (b, _) = (refit(data, "none", "class", refits=2) for data in (val, replace(val, a=1 - val.a)))
    assert {name: n for name, n in ledger(task).items() if n} == {"n_y_extra": 400}
    assert a.choice.criterion == "val-worst-class"
    assert torch.equal(head_of(a).weight, head_of(b).weight)


def test_halves_are_stratified_by_class_and_disjoint() -> None:
    val = generate(401, 1)
    fit, select = feature_task(val).halves(np.arange(401))
    assert np.array_equal(np.sort(np.concatenate([fit, select])), np.arange(401))
    assert np.bincount(val.y[fit]).tolist() == (np.bincount(val.y) // 2).tolist()
