"""Fewer dimensions before clustering. UMAP comes with the extra `umap` and is imported where it is used."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from ...benchmark.errors import UserError

Points = NDArray[np.float32]
Reducer = Callable[[Points], Points]
"""Maps points (m, D) to points (m, d)."""


def unit_length(points: Points) -> Points:
    """Points (n, D) scaled to Euclidean length 1; what is shorter than 1e-6 only grows by that much."""
    scaled: Points = points / np.linalg.norm(points, axis=1, keepdims=True).clip(min=1e-6)
    return scaled


def transform(model: Any) -> Reducer:
    """That of a fitted model, for any number of points, none too."""
    return lambda points: model.transform(points) if len(points) else points


def fit_pca(points: Points, components: int, seed: int) -> Reducer:
    """The first principal components of points (n, D), of which there are n or D at most."""
    return transform(PCA(min(components, *points.shape), random_state=seed).fit(points))


def require_umap() -> None:
    """Raise `UserError` unless the extra is installed."""
    try:
        import umap  # noqa: F401
    except ImportError:
        raise UserError("this clustering needs umap-learn: pip install worstgroup[umap]") from None


def fit_umap(points: Points, neighbours: int, seed: int, components: int = 2, min_dist: float = 0.1) -> Any:
    """A UMAP of points (n, D) with `transform(points) -> (m, components)` and the points' own `embedding_`.

    One thread: only then the same seed gives the same embedding. Raises `UserError` without the extra.
    """
    require_umap()
    from umap import UMAP

    with warnings.catch_warnings():
        # Of few points UMAP says that it takes fewer neighbours, which is what is wanted.
        warnings.filterwarnings("ignore", "n_neighbors is larger than the dataset size")
        solver = UMAP(n_components=components, n_neighbors=neighbours, min_dist=min_dist, random_state=seed, n_jobs=1)
        return solver.fit(points)


# ------------------------------------------------------------------------------------------- what a linear head sees


def hardness(features: Points, weight: Points, bias: Points, label: int) -> Points:
    """How far features (n, d) lie on one side of the decision boundary of a head `W x + b`, as a column (n, 1).

    Of two classes it is their projection on the unit normal (W_1 - W_0) / |W_1 - W_0|, whichever the `label`. Of more
    it is the signed distance from the nearest boundary of class `label`, min_j ((W_y - W_j) x + b_y - b_j) /
    |W_y - W_j| over the other classes j, which for two classes would be the same up to sign and shift.
    """
    if len(weight) == 2:
        normal, shift = weight[1:] - weight[:1], np.zeros(1, np.float32)
    else:
        normal, shift = np.delete(weight[label] - weight, label, axis=0), np.delete(bias[label] - bias, label)
    length = np.linalg.norm(normal, axis=1).clip(min=1e-12)
    distance: Points = ((features @ normal.T + shift) / length).min(axis=1, keepdims=True)
    return distance


def residual(features: Points, weight: Points) -> Points:
    """What of features (n, d) a head with these weights (K, d) does not see: the part orthogonal to all its boundaries.

    Those are where two logits are equal, so their normals span the weights less their mean.
    """
    _, scale, directions = np.linalg.svd(weight - weight.mean(0), full_matrices=False)
    normals = directions[scale > 1e-6 * scale.max(initial=1e-12)]
    unseen: Points = features - features @ normals.T @ normals
    return unseen
