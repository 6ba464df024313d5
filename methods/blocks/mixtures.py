"""Gaussian mixtures and k-means whose number of clusters is found by the silhouette, and their over-clustering.

Partitions assign new points too. Sohoni et al., No Subclass Left Behind, NeurIPS 2020.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_samples
from sklearn.mixture import GaussianMixture

Points = NDArray[np.float32]
Values = NDArray[np.float64]
Labels = NDArray[np.int64]
Kind = Literal["gmm", "kmeans"]

MOST = 10
"""The number of clusters is searched for from 2 to this."""
SAMPLE = 10_000
"""Silhouettes are those among so many points at most: they take the square of it in time."""
SMALLEST, SMALLEST_SHARE = 25, 0.005
"""What over-clustering keeps has at least so many points, of train also at least this share of all."""


class Partition(Protocol):
    """Clusters 0 to `num` - 1, of which some may be empty."""

    @property
    def num(self) -> int:
        """Number of clusters."""
        ...

    def predict(self, points: Points) -> Labels:
        """Cluster (n,) of points (n, D)."""
        ...


@dataclass(frozen=True)
class Mixture:
    """The clusters of a fitted model; without one there is a single cluster."""

    num: int = 1
    model: Any = None

    @classmethod
    def fit(cls, points: Points, k: int, kind: Kind, seed: int) -> "Mixture":
        """The best of 3 runs on points (n, D); fewer than k clusters where there are not more points than k."""
        k = min(k, len(points) - 1)
        if k < 2:
            return cls()
        model = (
            GaussianMixture(k, covariance_type="full", n_init=3, random_state=seed)
            if kind == "gmm"
            else KMeans(k, n_init=3, random_state=seed)
        )
        with warnings.catch_warnings():
            # Copies of a point cannot be told apart, and of a poor k it is the silhouette that says so.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return cls(k, model.fit(points.astype(np.float64)))

    def predict(self, points: Points) -> Labels:
        if self.model is None or not len(points):
            return np.zeros(len(points), np.int64)
        found: Labels = self.model.predict(points.astype(np.float64)).astype(np.int64)
        return found


def fit_mixture(points: Points, k: int, kind: Kind, seed: int) -> Mixture:
    """k clusters of points (n, D); for k = 0 as many, from 2 to 10, as give the best score, the most if tied."""
    if k > 0:
        return Mixture.fit(points, k, kind, seed)
    rows = sample(len(points), seed)
    best, highest = Mixture(), -1.0  # the least that a silhouette can be
    for number in range(2, min(MOST, len(points) - 1) + 1):
        mixture = Mixture.fit(points, number, kind, seed)
        value = score(points[rows], mixture.predict(points[rows]))
        if value >= highest:
            best, highest = mixture, value
    return best


def sample(n: int, seed: int) -> Labels:
    """Positions of the points, of n, whose silhouettes are computed; sorted."""
    return np.arange(n) if n <= SAMPLE else np.sort(np.random.default_rng(seed).permutation(n)[:SAMPLE])


def score(points: Points, labels: Labels) -> float:
    """Mean over the clusters of points (n, D) of their mean silhouette; -1 for a single cluster."""
    present = np.unique(labels)
    if len(present) < 2:
        return -1.0
    values = silhouettes(points, labels)
    return float(np.mean([values[labels == cluster].mean() for cluster in present]))


def silhouettes(points: Points, labels: Labels) -> Values:
    """Silhouette (n,) of each point (n, D), in -1 to 1; 0 where there is no other cluster, or only clusters of one."""
    if not 2 <= len(np.unique(labels)) < len(points):
        return np.zeros(len(points))
    values: Values = silhouette_samples(points.astype(np.float64), labels)
    return values


# --------------------------------------------------------------------------------------------------- over-clustering


@dataclass(frozen=True)
class Overclustered:
    """Clusters split in parts, of which some stand for themselves and the others are one cluster again.

    `ids` (clusters, factor) says which cluster a part of a cluster ends in.
    """

    base: Partition
    parts: tuple[Partition, ...]
    ids: Labels

    @property
    def num(self) -> int:
        """Number of clusters."""
        return int(self.ids.max()) + 1

    def predict(self, points: Points) -> Labels:
        return self.ids.reshape(-1)[fine(points, self.base, self.parts, self.ids.shape[1])]


def overcluster(
    base: Partition, points: Points, losses: Values, held: Points | None, factor: int, kind: Kind, seed: int
) -> Overclustered:
    """Split each cluster of points (n, D), whose losses are (n,), in `factor` parts and undo what does not pay.

    `held` are points of another split, of which a part has to have enough too; None asks that of no other.
    """
    coarse = base.predict(points)
    parts = tuple(Mixture.fit(points[coarse == i], factor, kind, seed) for i in range(base.num))
    part = fine(points, base, parts, factor)
    rows = sample(len(points), seed)
    before, after = (silhouettes(points[rows], labels[rows]) for labels in (coarse, part))
    total = base.num * factor
    keep = better(part_means(before, part[rows], total), part_means(after, part[rows], total))
    keep &= part_means(losses, part, total) >= part_means(losses, coarse, base.num).repeat(factor)
    keep &= np.bincount(part, minlength=total) >= max(SMALLEST, SMALLEST_SHARE * len(points))
    if held is not None:
        keep &= np.bincount(fine(held, base, parts, factor), minlength=total) >= SMALLEST
    return Overclustered(base, parts, merged(keep.reshape(-1, factor)))


def fine(points: Points, base: Partition, parts: tuple[Partition, ...], factor: int) -> Labels:
    """Part (n,) that points (n, D) lie in: number `factor * i + j` is the j-th part of cluster i."""
    coarse = base.predict(points)
    part = factor * coarse
    for i, inner in enumerate(parts):
        part[coarse == i] += inner.predict(points[coarse == i])
    return part


def part_means(values: Values, labels: Labels, num: int) -> Values:
    """Mean (num,) of the values (n,) in each part, 0 for an empty one."""
    means: Values = np.bincount(labels, values, minlength=num) / np.bincount(labels, minlength=num).clip(min=1)
    return means


def better(before: Values, after: Values) -> NDArray[np.bool_]:
    """Parts whose silhouette is positive and higher than before the split."""
    return after > before.clip(min=0)


def merged(keep: NDArray[np.bool_]) -> Labels:
    """Final cluster of each part (clusters, factor): its own where it is kept, else that of its cluster's rest."""
    own, rest = np.arange(keep.size).reshape(keep.shape), keep.size + np.arange(len(keep))[:, None]
    ids: Labels = np.unique(np.where(keep, own, rest), return_inverse=True)[1].reshape(keep.shape).astype(np.int64)
    return ids
