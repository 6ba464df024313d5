"""Our solver of L1 logistic regression against liblinear run to its end."""

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from worstgroup.methods.blocks import l1_logistic
from worstgroup.methods.blocks.l1_logistic import Data, l1_path, liblinear
from worstgroup.methods.blocks.last_layer import Matrix, Scaler, fit_l1, fit_l1_path

Example = tuple[Matrix, NDArray[np.bool_]]
GRID = (1.0, 0.3, 0.1, 0.03, 0.01)
BOUND = 1e-4
"""How far above liblinear's an objective may be, as a share of it."""


def features(n: int, d: int, wrong: float, seed: int = 0, factors: int = 30) -> Example:
    """Standardised correlated non-negative features (n, d), and classes of which a share is `wrong`."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, factors)) / np.arange(1, factors + 1) ** 0.5
    positive = z[:, 0] + 0.3 * rng.standard_normal(n) > 0
    x = z @ rng.standard_normal((factors, d)) / 2 + 0.5 * rng.standard_normal((n, d))
    x = np.maximum(x - 0.5, 0).astype(np.float32)
    return Scaler.fit(x)(x), positive ^ (rng.random(n) < wrong)


SHAPES = {
    "narrow": (400, 10, 0.1),
    "square": (300, 300, 0.0),
    "separable": (100, 1000, 0.0),
    "few": (50, 2048, 0.0),
    "noise": (120, 600, 0.5),
    "tall": (1500, 150, 0.2),
}


@cache
def drawn(shape: str) -> Example:
    return features(*SHAPES[shape])


def margins(w: NDArray[np.float64], x: Matrix, positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    signed: NDArray[np.float64] = np.where(positive, 1, -1) * (x.astype(np.float64) @ w[:-1] + w[-1])
    return signed


def objective(
    w: NDArray[np.float64], x: Matrix, positive: NDArray[np.bool_], c: float, weights: NDArray[np.float64] | float = 1.0
) -> float:
    return float(np.abs(w).sum() + c * (weights * np.logaddexp(0, -margins(w, x, positive))).sum())


def least(x: Matrix, positive: NDArray[np.bool_], c: float) -> NDArray[np.float64]:
    solver = LogisticRegression(solver="liblinear", l1_ratio=1.0, C=c, random_state=0, tol=1e-8, max_iter=2000)
    solver.fit(x, positive)
    return np.append(solver.coef_[0], solver.intercept_[0])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """liblinear may not help out."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("not converged")

    monkeypatch.setattr(l1_logistic, "liblinear", refuse)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("shape", SHAPES)
def test_objectives_are_liblinears_and_predictions_agree(shape: str) -> None:
    x, positive = drawn(shape)
    for c, w in zip(GRID, l1_path(x, positive, GRID, np.ones(len(x)), 0), strict=True):
        best = least(x, positive, c)
        assert objective(w, x, positive, c) <= (1 + BOUND) * objective(best, x, positive, c)
        agree = (margins(w, x, positive) > 0) == (margins(best, x, positive) > 0)
        assert agree.mean() >= 0.99
        assert np.abs(w - best).max() < 0.05 * max(1.0, np.abs(best).max())


@pytest.mark.usefixtures("alone")
def test_as_many_examples_as_celebas_validation_has() -> None:
    x, positive = features(728, 2048, 0.1)
    for c, w in zip((0.3, 0.03), l1_path(x, positive, (0.3, 0.03), np.ones(728), 0), strict=True):
        assert objective(w, x, positive, c) <= (1 + BOUND) * objective(least(x, positive, c), x, positive, c)


@pytest.mark.usefixtures("alone")
def test_the_gap_proves_it() -> None:
    """No solution of another solver is needed: the dual bound holds for any."""
    x, positive = drawn("tall")
    w = l1_path(x, positive, (0.1,), np.ones(len(x)), 0)[0]
    dual = 0.1 / (1 + np.exp(margins(w, x, positive)))
    slope = np.append(x.T, np.ones((1, len(x))), axis=0) @ (np.where(positive, 1, -1) * dual)
    share = dual / max(1, np.abs(slope).max()) / 0.1
    bound = -0.1 * (share * np.log(share) + (1 - share) * np.log1p(-share)).sum()
    assert 0 <= 1 - bound / objective(w, x, positive, 0.1) < 2 * l1_logistic.TOLERANCE
    assert bound <= objective(least(x, positive, 0.1), x, positive, 0.1)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("shape", ["narrow", "few"])
def test_up_to_where_the_first_feature_enters_all_is_zero(shape: str) -> None:
    x, positive = drawn(shape)
    slope = np.abs(np.where(positive, 0.5, -0.5) @ np.c_[x, np.ones(len(x))].astype(np.float64)).max()
    below, at, above = l1_path(x, positive, (1e-9, 0.999 / slope, 1.01 / slope), np.ones(len(x)), 0)
    assert not below.any()
    assert not at.any()
    assert above.any()


def test_the_intercept_is_penalised() -> None:
    x, positive = np.zeros((100, 3), np.float32), np.arange(100) < 80
    (w,) = l1_path(x, positive, (1.0,), np.ones(100), 0)
    assert not w[:-1].any()
    p = 1 / (1 + np.exp(-w[-1]))
    assert 100 * p - 80 == pytest.approx(-1, abs=0.05)  # its slope is that of |b|; without a penalty it would be 0


@pytest.mark.usefixtures("alone")
def test_a_weight_is_that_many_copies() -> None:
    x, positive = drawn("narrow")
    weights = np.where(positive, 3.0, 1.0)
    copied = np.repeat(np.arange(len(x)), weights.astype(int))
    (weighted,) = l1_path(x, positive, (0.1,), weights, 0)
    (repeated,) = l1_path(x[copied], positive[copied], (0.1,), np.ones(len(copied)), 0)
    assert weighted == pytest.approx(repeated, abs=5e-3)
    assert objective(weighted, x, positive, 0.1, weights) == pytest.approx(
        objective(repeated, x, positive, 0.1, weights), rel=BOUND
    )
    assert weighted == pytest.approx(liblinear(x, positive, 0.1, weights, 0, tol=1e-6), abs=5e-3)


def test_a_path_is_in_the_order_asked_for() -> None:
    x, positive = drawn("narrow")
    there = l1_path(x, positive, (0.01, 0.3, 0.1), np.ones(len(x)), 0)
    back = l1_path(x, positive, (0.3, 0.1, 0.01, 0.3), np.ones(len(x)), 0)
    for i, j in ((0, 2), (1, 0), (2, 1), (1, 3)):
        assert np.array_equal(there[i], back[j])
    assert np.abs(there[1]).sum() > np.abs(there[2]).sum() > np.abs(there[0]).sum()


@pytest.mark.usefixtures("alone")
def test_copies_of_a_feature_and_a_constant_one_do_no_harm() -> None:
    x, positive = drawn("narrow")
    doubled = np.concatenate([x, x, np.zeros((len(x), 1), np.float32), np.ones((len(x), 1), np.float32)], axis=1)
    plain, more = (l1_path(part, positive, (1.0,), np.ones(len(x)), 0)[0] for part in (x, doubled))
    assert objective(more, doubled, positive, 1.0) == pytest.approx(objective(plain, x, positive, 1.0), rel=BOUND)


def test_what_does_not_converge_is_left_to_liblinear(monkeypatch: pytest.MonkeyPatch) -> None:
    x, positive = drawn("narrow")
    monkeypatch.setattr(l1_logistic, "ITERATIONS", 2)
    one = np.ones(len(x))
    assert Data.of(x, positive).solve(0.3 * one, np.zeros(11)) is None
    found = l1_path(x, positive, (0.3, 1.0), one, 7)
    for c, w in zip((0.3, 1.0), found, strict=True):
        assert np.array_equal(w, liblinear(x, positive, c, one, 7, 1e-6, 5000))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_features_that_are_no_numbers_are_refused() -> None:
    x, positive = features(60, 5, 0.1)
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        l1_path(x, positive, (0.3,), np.ones(60), 0)


@pytest.mark.parametrize("solver", ["newton", "liblinear"])
def test_a_head_of_a_path_is_that_of_its_c(solver: str) -> None:
    x, positive = drawn("narrow")
    y = positive.astype(np.int64) + (x[:, 0] > 1)
    for classes, labels in ((2, positive.astype(np.int64)), (3, y)):
        path = fit_l1_path(x, labels, classes, (0.3, 0.03), 0, solver)  # type: ignore[arg-type]
        for c, (weight, bias) in zip((0.3, 0.03), path, strict=True):
            alone = fit_l1(x, labels, classes, c, 0, solver)  # type: ignore[arg-type]
            assert weight.shape == (classes, 10)
            assert weight == pytest.approx(alone[0], abs=5e-3)
            assert bias == pytest.approx(alone[1], abs=5e-3)


def test_the_same_bits_again() -> None:
    x, positive = drawn("square")
    first, again = (l1_path(x, positive, GRID, np.ones(len(x)), seed) for seed in (0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
