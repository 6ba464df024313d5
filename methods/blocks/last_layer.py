"""Linear heads on standardised features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .l1_logistic import l1_path, liblinear

Matrix = NDArray[np.float32]
Head = tuple[Matrix, Matrix]
"""Weight (K, d) and bias (K,)."""
Solver = Literal["newton", "liblinear"]


@dataclass(frozen=True)
class Scaler:
    """Standardisation of features by a mean and a scale (d,)."""

    mean: Matrix
    scale: Matrix

    @classmethod
    def fit(cls, features: Matrix) -> "Scaler":
        """Mean and standard deviation of each feature; a constant feature gets scale 1."""
        varies = np.ptp(features, axis=0) > 0  # the deviation of a constant is not exactly 0 in float32
        return cls(features.mean(0), np.where(varies, features.std(0), 1).astype(np.float32))

    def __call__(self, features: Matrix) -> Matrix:
        """Standardised features (n, d)."""
        return (features - self.mean) / self.scale


def fit_l1(
    features: Matrix, y: NDArray[np.int64], num_classes: int, c: float, seed: int, solver: Solver = "newton"
) -> Head:
    """L1 logistic regression whose intercept is penalised too: weight (K, d) and bias (K,)."""
    return fit_l1_path(features, y, num_classes, (c,), seed, solver)[0]


def fit_l1_path(
    features: Matrix,
    y: NDArray[np.int64],
    num_classes: int,
    strengths: Sequence[float],
    seed: int,
    solver: Solver = "newton",
    class_weights: Sequence[float] = (),
) -> list[Head]:
    """A head for each strength C.

    Minimises `|w|_1 + |b| + C sum_i v_{y_i} log(1 + exp(-y_i (w u_i + b)))` with class weights v (K,), by default 1;
    one-vs-rest for more than two classes. For two classes the first row is zero, so that the softmax of the logits is
    the regression's probability. The solver `newton` is our own, faster than `liblinear` and nearer to the minimum than
    that by default; only the latter depends on the `seed`.
    """
    weights = np.asarray(class_weights or [1.0] * num_classes, dtype=np.float64)[y]
    weight = np.zeros((len(strengths), num_classes, features.shape[1]), dtype=np.float32)
    bias = np.zeros((len(strengths), num_classes), dtype=np.float32)
    for label in range(1 if num_classes == 2 else 0, num_classes):
        target = y == label
        if target.all() or not target.any():
            bias[:, label] = 1.0 if target.all() else -1.0
            continue
        if solver == "newton":
            found = l1_path(features, target, strengths, weights, seed)
        else:
            found = [liblinear(features, target, c, weights, seed) for c in strengths]
        for i, coefficients in enumerate(found):
            weight[i, label], bias[i, label] = coefficients[:-1], coefficients[-1]
    return list(zip(weight, bias, strict=True))


class StandardisedLinear(nn.Module):
    """Logits `W (x - mean) / scale + b` of features x (n, d)."""

    def __init__(self, scaler: Scaler, weight: Matrix, bias: Matrix) -> None:
        super().__init__()
        for name, value in {"mean": scaler.mean, "scale": scaler.scale, "weight": weight, "bias": bias}.items():
            self.register_buffer(name, torch.from_numpy(np.asarray(value, dtype=np.float32)))
        self.mean: Tensor
        self.scale: Tensor
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale @ self.weight.T + self.bias
