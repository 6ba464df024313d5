from collections.abc import Sequence
from dataclasses import asdict
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from stubs import counts, examples, make_attributes
from worstgroup.benchmark import metrics
from worstgroup.benchmark.cost import StageCost
from worstgroup.benchmark.metrics import Counts
from worstgroup.benchmark.predictions import Arrays
from worstgroup.benchmark.record import (
    AttributeRow,
    Cost,
    GroupRow,
    Ledger,
    PredictionFile,
    RunRecord,
    Selection,
    Stage,
)
from worstgroup.benchmark.spec import Attribute, Recipe
from worstgroup.leaderboard import statistics
from worstgroup.leaderboard.entry import Layout, Line
from worstgroup.leaderboard.statistics import DRAWS, Outcome, Samples

NOTHING = Stage(**asdict(StageCost()))
ONE = make_attributes(["bg"], ratio=0.9)
TWO = make_attributes(["bg", "co"], ratio=0.95)


def record(
    correct: Counts, total: Counts, attributes: Sequence[Attribute] = ONE, train: Counts | None = None, seed: int = 0
) -> RunRecord:
    """A finished run with these test counts, scored as the runner does."""
    n_train = np.arange(len(total)) + 1 if train is None else train
    shape = (2, *(len(attribute.values) for attribute in attributes))
    return RunRecord(
        status="finished",
        created="2026-01-01T00:00:00+00:00",
        run="0" * 64,
        protocol="wg1",
        dataset="toy",
        fingerprint="0" * 12,
        backbone="tiny_cnn",
        weights="none",
        method="erm",
        source="",
        policy="",
        config={},
        budget="none",
        recipe=asdict(Recipe()),
        seed=seed,
        code="0" * 16,
        classes=["0", "1"],
        attributes=[AttributeRow(**asdict(attribute)) for attribute in attributes],
        groups=[
            GroupRow(
                y=y,
                a=list(a),
                n_train=int(n_train[g]),
                m_val=0,
                correct_val=0,
                m_test=int(total[g]),
                correct_test=int(correct[g]),
            )
            for g, (y, *a) in enumerate(np.ndindex(*shape))
        ],
        metrics=metrics.evaluate(correct, total, n_train, shape, attributes),
        val_metrics={"wga": None},
        ci={"wga": (0.0, 1.0)},
        cost=Cost(stages={}, shared={}, marginal=NOTHING, scratch=NOTHING),
        selection=Selection(criterion="val-mean", value=None, step=None, candidates=1),
        labels=Ledger(n_train_a=0, n_val_a_fit=0, n_val_a_select=0, n_env=0, n_y_extra=0, total_a=0),
        predictions=PredictionFile(sha256="0" * 64, labels_sha256={}, has_labels=False),
    )


def predictions(made: RunRecord, copies: int = 1, one_unit: bool = True) -> Arrays:
    """Test predictions with the record's counts, each image `copies` times, as one unit or as several."""
    data = examples(made.counts()["correct_test"], made.counts()["m_test"], made.shape)
    n = len(data["y"])
    repeated = {f"test_{name}": np.repeat(data[name], copies, axis=0) for name in ("y", "a", "prediction")}
    unit = np.repeat(np.arange(n), copies) if one_unit else np.arange(n * copies)
    return {**repeated, "test_unit": unit.astype(np.int32)}


def sampled(made: RunRecord, data: Arrays | None = None) -> dict[str, Samples]:
    """Bootstrap samples of every metric of one run."""
    return metrics_of([made], [predictions(made) if data is None else data])


def outcome_of(made: list[RunRecord], data: list[Arrays]) -> Outcome:
    """Of runs that were tested on the same images."""
    answers = [arrays["test_prediction"] == arrays["test_y"] for arrays in data]
    return Outcome.of([one.seed for one in made], answers, Layout.of(data[0], made[0].shape))


def metrics_of(made: list[RunRecord], data: list[Arrays]) -> dict[str, Samples]:
    """Bootstrap samples of every metric of runs that differ in their seeds."""
    outcome = outcome_of(made, data)
    drawn = statistics.resampled_accuracies(outcome, statistics.unit_weights(len(outcome.total)))
    return statistics.sample_metrics(*drawn, Line.of(made[0]))


@cache
def base() -> dict[str, Samples]:
    return sampled(RUN)


def interval(samples: Samples) -> NDArray[np.float64]:
    return np.array(statistics.interval(statistics.over_seeds(samples)))


TOTAL = counts(200, 200, 200, 200)
RUN = record(counts(198, 160, 196, 196), TOTAL)  # worst group 0.8 of 200


# ----------------------------------------------------------------------------------------------------------- outcomes


def test_outcome_counts_answers_by_unit_and_group() -> None:
    data = {
        "test_y": np.array([0, 1, 1, 0]),
        "test_a": np.array([[0], [1], [0], [0]]),
        "test_prediction": np.array([0, 1, 0, 1]),
        "test_unit": np.array([7, 7, 3, 7]),
    }
    outcome = outcome_of([RUN], [data])
    assert outcome.total.tolist() == [[0, 0, 1, 0], [2, 0, 0, 1]]
    assert outcome.correct.tolist() == [[[0, 0, 0, 0], [1, 0, 0, 1]]]


def test_the_share_of_correct_images_varies_like_a_share() -> None:
    made = record(counts(90, 40, 10, 60), counts(100, 50, 20, 100))
    (drawn,) = sampled(made)["acc_mean"]
    share = 200 / 270
    assert made.metrics["acc_mean"] == pytest.approx(share)
    assert drawn.mean() == pytest.approx(share, abs=0.003)
    assert drawn.std() == pytest.approx((share * (1 - share) / 270) ** 0.5, rel=0.1)


def test_outcome_keeps_seeds_apart() -> None:
    made = [record(counts(*[c] * 4), counts(*[10] * 4), seed=seed) for seed, c in ((0, 4), (3, 8))]
    outcome = outcome_of(made, [predictions(one) for one in made])
    assert outcome.seeds == (0, 3)
    assert outcome.correct.sum(1).tolist() == [[4] * 4, [8] * 4]


# ---------------------------------------------------------------------------------------------------------- intervals


def test_interval_of_the_worst_group_is_the_binomial_one() -> None:
    low, high = interval(base()["wga"])
    half = 1.96 * (0.8 * 0.2 / 200) ** 0.5
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.004)
    assert (low, high) == pytest.approx(metrics.wilson_interval(160, 200), abs=0.006)


def test_interval_of_the_group_mean_adds_variances() -> None:
    samples = base()["acc_group"][0]
    accuracy = np.array([0.99, 0.8, 0.98, 0.98])
    deviation = (accuracy * (1 - accuracy) / TOTAL).sum() ** 0.5 / 4
    assert samples.mean() == pytest.approx(accuracy.mean(), abs=5e-4)
    assert samples.std() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("name", ["wga", "acc_group", "acc_adj", "gap_bg"])
def test_copies_of_an_image_in_one_unit_add_no_evidence(name: str) -> None:
    copied = interval(sampled(RUN, predictions(RUN, copies=4))[name])
    assert copied.tolist() == pytest.approx(interval(base()[name]).tolist(), abs=1e-7)


def test_copies_that_count_as_units_of_their_own_halve_the_interval() -> None:
    alone, distinct = (
        np.diff(interval(sampled(RUN, predictions(RUN, copies=n, one_unit=False))["wga"])).item() for n in (1, 4)
    )
    assert alone / distinct == pytest.approx(2, rel=0.08)


def test_units_that_span_groups_are_drawn_together() -> None:
    """One unit of each digit in all four groups, right in all or in none: then the groups move together."""
    right = np.arange(200) < 150
    y, a = np.repeat([0, 0, 1, 1], 200), np.repeat([0, 1, 0, 1], 200)[:, None]
    data = {
        "test_y": y,
        "test_a": a,
        "test_prediction": np.where(np.tile(right, 4), y, 1 - y),
        "test_unit": np.tile(np.arange(200), 4),
    }
    made = record(counts(*[150] * 4), counts(*[200] * 4))
    samples = sampled(made, data)
    assert np.allclose(samples["wga"], samples["acc_group"])
    assert np.allclose(samples["gap_bg"], 0, atol=1e-6)
    assert samples["acc_group"].std() == pytest.approx((0.75 * 0.25 / 200) ** 0.5, rel=0.05)


def test_a_perfect_run_has_an_interval_of_one_point() -> None:
    samples = sampled(record(TOTAL, TOTAL))
    for name in ("wga", "acc_group", "acc_adj"):
        assert interval(samples[name]).tolist() == pytest.approx([1, 1])
    assert interval(samples["gap_bg"]).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_a_group_that_was_not_drawn_is_left_out() -> None:
    total = counts(50, 2, 50, 50)
    assert interval(sampled(record(total, total))["acc_group"]).tolist() == pytest.approx([1, 1])


def test_an_empty_group_is_left_out() -> None:
    total = counts(50, 0, 50, 50)
    samples = sampled(record(total, total))
    assert interval(samples["acc_group"]).tolist() == pytest.approx([1, 1])
    assert interval(samples["wga"]).tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------------------- pairing


def test_identical_runs_differ_by_nothing() -> None:
    ours, theirs = base(), sampled(RUN.model_copy(update={"method": "other"}))
    for name, samples in ours.items():
        assert interval(samples - theirs[name]).tolist() == [0, 0]


def test_pairing_narrows_the_difference_of_similar_runs() -> None:
    """The other run is right on 5 more images of the worst group."""
    better = record(counts(198, 165, 196, 196), TOTAL)
    ours, theirs = sampled(better)["acc_group"], base()["acc_group"]
    paired = np.diff(interval(ours - theirs)).item()
    shuffled = np.random.default_rng(0).permutation(theirs[0])[None]
    assert paired < 0.5 * np.diff(interval(ours - shuffled)).item()
    assert interval(ours - theirs)[0] > 0


def test_draws_are_the_same_in_every_call() -> None:
    weights = statistics.unit_weights(30)
    assert weights.shape == (DRAWS, 30)
    assert (weights.sum(1) == 30).all()
    assert np.array_equal(weights, statistics.unit_weights(30))
    shares = statistics.seed_weights(3)
    assert shares.shape == (DRAWS, 3)
    assert np.allclose(shares.sum(1), 1)
    assert set(np.unique(shares * 3).round(9)) == {0, 1, 2, 3}
    statistics.seed_weights.cache_clear()
    assert np.array_equal(shares, statistics.seed_weights(3))
    again = sampled(RUN)
    for name, samples in base().items():
        assert np.array_equal(samples, again[name])


# --------------------------------------------------------------------------------------------------------------- seeds


def test_one_seed_adds_no_variance() -> None:
    samples = base()["wga"]
    assert np.array_equal(statistics.over_seeds(samples), samples[0])


def test_variance_over_seeds_widens_the_interval() -> None:
    """Three seeds at 0.7, 0.8, 0.9 without test noise: means of three draws have a deviation of 0.0816 / sqrt(3)."""
    samples = np.repeat([[0.7], [0.8], [0.9]], DRAWS, axis=1)
    drawn = statistics.over_seeds(samples)
    assert drawn.shape == (DRAWS,)
    assert drawn.mean() == pytest.approx(0.8, abs=0.005)
    assert drawn.std() == pytest.approx((2 / 300 / 3) ** 0.5, rel=0.05)
    assert statistics.interval(drawn) == pytest.approx((0.7, 0.9), abs=0.035)


def test_seeds_of_a_draw_share_its_units() -> None:
    """Two seeds with the same answers say no more than one."""
    both = metrics_of([RUN, record(RUN.counts()["correct_test"], TOTAL, seed=1)], [predictions(RUN)] * 2)["wga"]
    assert np.array_equal(both[0], both[1])
    assert np.allclose(statistics.over_seeds(both), statistics.over_seeds(base()["wga"]))


# ------------------------------------------------------------------------------------------------------ linear metrics


@pytest.mark.parametrize("attributes", [ONE, TWO, make_attributes(["bg", "co"])], ids=["one", "two", "empirical"])
@pytest.mark.parametrize("seed", range(4))
def test_coefficients_reproduce_the_metrics(attributes: tuple[Attribute, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    g = 2 ** (1 + len(attributes))
    total = rng.integers(1, 40, g)
    if seed % 2 and len(attributes) > 1:
        total[3] = 0
    train = rng.integers(1, 500, g)
    made = record(rng.integers(0, total + 1), total, attributes, train)
    found = statistics.linear_metrics(Line.of(made))
    names = {f"gap_{attribute.name}" for attribute in attributes} | {"acc_group", "acc_adj"}
    if len(attributes) > 1:
        names.add("gap_all")
    defined = {name for name in names if made.metrics[name] is not None}
    accuracy = np.divide(made.counts()["correct_test"], total, out=np.zeros(g), where=total > 0)
    assert set(found) == defined >= {"acc_group", "acc_adj"}
    for name, coefficients in found.items():
        assert accuracy @ coefficients == pytest.approx(made.metrics[name], abs=1e-12)


def test_coefficients_are_the_weights_of_the_definition() -> None:
    found = statistics.linear_metrics(Line.of(record(counts(1, 1, 1, 1), counts(2, 9, 4, 7), train=counts(3, 1, 2, 4))))
    assert found["acc_group"].tolist() == [0.25] * 4
    assert found["acc_adj"].tolist() == pytest.approx([0.3, 0.1, 0.2, 0.4])
    assert found["gap_bg"].tolist() == pytest.approx([-0.45, 0.45, 0.45, -0.45])


def test_metrics_that_are_undefined_have_no_coefficients() -> None:
    found = statistics.linear_metrics(Line.of(record(counts(1, 1, 1, 1), counts(2, 9, 4, 7), train=counts(3, 0, 2, 4))))
    assert set(found) == {"acc_group"}
