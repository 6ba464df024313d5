"""Fewer dimensions before clustering. UMAP comes with the extra `umap` and is imported where it is used."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...benchmark.errors import UserError

Points = NDArray[np.float32]


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
