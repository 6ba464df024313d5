"""Linear heads on standardised features."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

Matrix = NDArray[np.float32]


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


def fit_l1(features: Matrix, y: NDArray[np.int64], num_classes: int, c: float, seed: int) -> tuple[Matrix, Matrix]:
    """L1 logistic regression by liblinear, whose intercept is penalised too: weight (K, d) and bias (K,).

    Minimises `|w|_1 + |b| + C sum_i log(1 + exp(-y_i (w u_i + b)))`; one-vs-rest for more than two classes. For two
    classes the first row is zero, so that the softmax of the logits is the regression's probability.
    """
    weight = np.zeros((num_classes, features.shape[1]), dtype=np.float32)
    bias = np.zeros(num_classes, dtype=np.float32)
    for label in range(1 if num_classes == 2 else 0, num_classes):
        target = y == label
        if target.all() or not target.any():
            bias[label] = 1.0 if target.all() else -1.0
            continue
        solver = LogisticRegression(solver="liblinear", l1_ratio=1.0, C=c, random_state=seed)
        solver.fit(features, target)
        weight[label], bias[label] = solver.coef_[0], solver.intercept_[0]
    return weight, bias


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
