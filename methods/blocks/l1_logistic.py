"""Logistic regression with an L1 penalty of weights and intercept, solved to a duality gap.

`min_w |w|_1 + sum_i c_i log(1 + exp(-y_i w u_i))`, where the last feature is the constant 1: liblinear's problem. As in
newGLMNET (Yuan, Ho and Lin, JMLR 2012), which liblinear is, each step minimises a quadratic model of the loss plus the
norm by coordinate descent. Here the model has a matrix, that of few coefficients (a working set: those in use, and
those whose slopes are the largest), so that a sweep costs nothing per example and Newton steps can end it. The dual
point of a model's slope (Koh, Kim and Boyd, JMLR 2007) bounds how far its objective is from the least.

Related problems share less than they seem to: the solution of the next smaller C is a good start, but that of another
subset of the same examples is a worse one than zero, since it uses other features and is sure of its answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import daxpy
from scipy.linalg.lapack import dpotrf, dpotrs, spotrf, spotrs
from scipy.special import expit, xlogy
from sklearn.linear_model import LogisticRegression
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

Matrix = NDArray[np.float32]
Array = NDArray[np.float64]
Indices = NDArray[np.int64]

TOLERANCE = 1e-5
"""Largest duality gap of a solution, relative to its objective."""
INNER = 0.3
"""How far a model is minimised: largest violation of its optimality conditions, relative to that before."""
ITERATIONS, ROUNDS, SWEEPS = 100, 20, 2
"""Models, rounds of descent and Newton step in each, sweeps over the coefficients in each of those."""
NEWCOMERS, FEWEST = 0.4, 32
"""How many coefficients enter the working set at once: relative to those in use, and at least."""
LENGTHS = np.array([1.0, 0.5, 0.2, 0.05])
"""Lengths at which a Newton step is tried."""
SINGLE = 400
"""Systems of more unknowns are solved in single precision: their solution is a direction."""


def l1_path(
    features: Matrix, positive: NDArray[np.bool_], strengths: Sequence[float], weights: Array, seed: int
) -> list[Array]:
    """Coefficients (d + 1,), the intercept last, for each strength C, where `c_i = C weights_i`.

    Features are (n, d), `positive` (n,) says which of the two classes an example is of. What does not converge is left
    to liblinear, for which the `seed` is.
    """
    found, w = {}, np.zeros(features.shape[1] + 1)
    data = Data.of(features, positive)
    with _blas().limit(limits=1):  # the same bits everywhere; on a busy machine threads wait for each other
        for c in sorted(set(strengths)):
            solution = data.solve(c * weights, w)
            w = liblinear(features, positive, c, weights, seed, 1e-6, 5000) if solution is None else solution
            found[c] = w
    return [found[c] for c in strengths]


@cache
def _blas() -> ThreadpoolController:
    """The linear algebra libraries that are loaded, of which NumPy and SciPy have one each."""
    return ThreadpoolController().select(user_api="blas")


def liblinear(
    features: Matrix,
    positive: NDArray[np.bool_],
    c: float,
    weights: Array,
    seed: int,
    tol: float = 1e-4,
    steps: int = 100,
) -> Array:
    """The same by liblinear, which stops by the slope at its start."""
    solver = LogisticRegression(solver="liblinear", l1_ratio=1.0, C=c, random_state=seed, tol=tol, max_iter=steps)
    solver.fit(features, positive, sample_weight=weights)
    return np.append(solver.coef_[0], solver.intercept_[0])


@dataclass(frozen=True, eq=False)
class Data:
    """Features with the constant 1 as `rows` (d + 1, n), and the `sign` (n,) of the examples, +1 or -1."""

    rows: Matrix
    sign: Array

    @classmethod
    def of(cls, features: Matrix, positive: NDArray[np.bool_]) -> "Data":
        """Features (n, d) transposed: a working set is then a few rows."""
        rows = np.ones((features.shape[1] + 1, len(features)), dtype=np.float32)
        for start in range(0, len(features), 64):  # what fits in a cache: four times as fast as all at once
            part = slice(start, start + 64)
            rows[:-1, part] = features[part].T
        return cls(rows, np.where(positive, 1.0, -1.0))

    def solve(self, c: Array, start: Array) -> Array | None:
        """Coefficients (d + 1,) for the strengths c (n,) of the examples; None if the gap stays too large."""
        w, used = start, np.flatnonzero(start)
        margins = self.sign * (w[used].astype(np.float32) @ self.rows[used])
        for _ in range(ITERATIONS):
            dual = c * expit(-margins)  # minus the slope of each loss in its margin
            slope = -(self.rows @ (self.sign * dual).astype(np.float32)).astype(np.float64)
            value = _objective(w, margins, c)
            if value - _dual_objective(dual / np.maximum(1, np.abs(slope).max()), c) <= TOLERANCE * value:
                return w
            violation = _violation(w, slope)
            working = _working_set(w, violation)
            features = self.rows[working]
            hessian = _hessian(features, dual * (1 - dual / c))
            end = _minimum(hessian, w[working], slope[working], INNER * float(np.abs(violation).max()))
            step = end - w[working]
            change = self.sign * (step.astype(np.float32) @ features)
            length = _length(w[working], step, slope[working], margins, change, c)
            if not length:
                return None
            w, margins = w.copy(), margins + length * change
            w[working] += length * step
        return None


def _objective(w: Array, margins: Array, c: Array) -> float:
    return float(np.abs(w).sum() + c @ np.logaddexp(0, -margins))


def _dual_objective(dual: Array, c: Array) -> float:
    """A bound of the objective from below by a dual point whose slope is nowhere above 1."""
    share = dual / c
    return -float(c @ (xlogy(share, share) + xlogy(1 - share, 1 - share)))


def _violation(w: Array, slope: Array) -> Array:
    """The smallest subgradient of loss and norm: zero where both are least."""
    return np.where(w != 0, slope + np.sign(w), np.sign(slope) * np.maximum(np.abs(slope) - 1, 0))


def _working_set(w: Array, violation: Array) -> Indices:
    """Coefficients in use, and of the others those of the largest violations."""
    used, others = np.flatnonzero(w), np.flatnonzero((w == 0) & (violation != 0))
    room = max(FEWEST, int(NEWCOMERS * len(used)))
    if len(others) > room:
        others = others[np.argpartition(-np.abs(violation[others]), room)[:room]]
    return np.sort(np.concatenate([used, others]))


def _hessian(features: Matrix, curvature: Array) -> Array:
    """`features diag(curvature) features'` (k, k)."""
    scaled = features * np.sqrt(curvature).astype(np.float32)
    return (scaled @ scaled.T).astype(np.float64)


def _minimum(hessian: Array, start: Array, slope: Array, tolerance: float) -> Array:
    """Where the quadratic model with this slope at the start is least together with the norm, nearly."""
    x, linear = start, slope - hessian @ start
    for _ in range(ROUNDS):
        x = _descended(hessian, x, slope)
        slope = hessian @ x + linear
        if np.abs(_violation(x, slope)).max() <= tolerance:
            break
        x, slope = _polished(hessian, linear, x, slope)
    return x


def _descended(hessian: Array, start: Array, slope: Array) -> Array:
    """The start after some sweeps of coordinate descent."""
    x, slope, rows, diagonal = start.tolist(), slope.copy(), list(hessian), np.diagonal(hessian).tolist()
    size = len(x)
    for _ in range(SWEEPS):
        for j in np.flatnonzero((np.array(x) != 0) | (np.abs(slope) > 1)).tolist():
            curvature, old = diagonal[j], x[j]
            if curvature <= 0:
                continue
            target = curvature * old - slope.item(j)
            x[j] = (target - 1) / curvature if target > 1 else (target + 1) / curvature if target < -1 else 0.0
            if x[j] != old:
                daxpy(rows[j], slope, size, x[j] - old)  # in place, without a temporary: the time of a sweep
    return np.array(x)


def _polished(hessian: Array, linear: Array, x: Array, slope: Array) -> tuple[Array, Array]:
    """x and the model's slope after a Newton step of the coefficients in use, or as they are if none is better.

    Coefficients that would change their sign become zero.
    """
    free = np.flatnonzero(x)
    step = _newton_step(hessian[np.ix_(free, free)], slope[free] + np.sign(x[free])) if len(free) else None
    if step is None:
        return x, slope
    tried = np.zeros((len(x), 1 + len(LENGTHS)))
    tried[free] = x[free, None] + np.append(0, LENGTHS) * step[:, None]
    tried[tried * x[:, None] < 0] = 0
    slopes = hessian @ tried + linear[:, None]
    values = 0.5 * (tried * (slopes + linear[:, None])).sum(0) + np.abs(tried).sum(0)
    best = values.argmin()
    return tried[:, best], slopes[:, best]


def _newton_step(hessian: Array, slope: Array) -> Array | None:
    """`-hessian^-1 slope`, None if the matrix is singular."""
    factorise, substitute = (spotrf, spotrs) if len(hessian) > SINGLE else (dpotrf, dpotrs)
    factor, failed = factorise(hessian.T, clean=False)
    return None if failed else substitute(factor, -slope)[0].astype(np.float64)


def _length(w: Array, step: Array, slope: Array, margins: Array, change: Array, c: Array) -> float:
    """The first of 1, 1/2, 1/4, ... at which the objective falls by a part of what was expected; 0 if none is."""
    value = _objective(w, margins, c)
    expected = slope @ step + np.abs(w + step).sum() - np.abs(w).sum()
    for length in 0.5 ** np.arange(20):
        found = _objective(w + length * step, margins + length * change, c)
        if found <= value * (1 + 1e-12) + 1e-3 * length * expected:
            return float(length)
    return 0.0
