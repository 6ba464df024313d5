"""Clustering of heatmaps as ExMap does it: kNN graph, eigengap, spectral clustering with cluster_qr; or k-means.

Chakraborty et al., ExMap: Leveraging Explainability Heatmaps for Unsupervised Group Robustness to Spurious
Correlations, CVPR 2024, section 3.2, with the constants of the released code.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh, qr, svd
from scipy.sparse import csgraph, csr_array, eye_array
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans
from sklearn.neighbors import kneighbors_graph
from torch import Tensor
from torch.nn import functional as F

Points = NDArray[np.float32]
Labels = NDArray[np.int64]

DENSE = 1000
"""Up to so many points eigenvalues are computed without sparsity: exact, and below half a second."""


def normalised(maps: Points | Tensor, side: int) -> Points:
    """Heatmaps (n, C, H, W) as points (n, C * side * side) whose largest absolute value is 1.

    They are resized bilinearly, without anti-aliasing, before they are scaled. A map that is zero stays zero.
    """
    maps = torch.as_tensor(maps).float()
    if maps.shape[2:] != (side, side):
        maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False, antialias=False)
    points = maps.flatten(1)
    largest = points.abs().amax(1, keepdim=True)
    # Exactly zero: a deep model's maps can be as small as 1e-7 everywhere and still tell images apart.
    scaled: Points = (points / torch.where(largest == 0, 1, largest)).numpy(force=True)
    return scaled


def default_neighbours(n: int) -> int:
    """floor(ln n) neighbours for n points, itself included; 2 for the few points that would be left alone by that."""
    return max(2, math.floor(math.log(n)))


def knn_graph(points: Points, neighbours: int) -> csr_array:
    """Symmetric connectivity `(C + C^T) / 2` (n, n) of the nearest points (n, D) by Euclidean distance, itself first.

    Raises `ValueError` unless 2 <= neighbours <= n.
    """
    # The point itself is put in by hand: among exact copies, such as empty maps, a search may return only others.
    others = kneighbors_graph(points, neighbours - 1, mode="connectivity", include_self=False)
    directed = csr_array(others) + eye_array(len(points), format="csr")
    graph = csr_array((directed + directed.T) / 2)
    # scikit-learn clusters no graph with 64-bit indices, and that is what its own neighbours have.
    return csr_array((graph.data, graph.indices.astype(np.int32), graph.indptr.astype(np.int32)), graph.shape)


def eigengap(graph: csr_array, most: int = 10) -> int:
    """Number of clusters k in 2..most with the largest gap between the k-th and next eigenvalue, the first if tied.

    The eigenvalues are those of the symmetric normalised Laplacian with diagonal 1, in ascending order. k is below the
    number of points; two points or fewer are a cluster each. k = 1 is excluded, so a single blob is split too.
    """
    gaps = np.diff(_spectrum(graph, most + 1)[0])[1:]
    return int(gaps.argmax()) + 2 if len(gaps) else graph.shape[0]


def spectral(graph: csr_array, k: int) -> Labels:
    """Spectral clustering of a graph's points (n,) into k clusters, from k eigenvectors by cluster_qr.

    Damle, Minden and Ying, Simple, direct and efficient multi-way spectral clustering, Information and Inference 2019.
    The partition is scikit-learn's, without factorising the Laplacian, which takes minutes and gigabytes for 20,000
    points. Of more components than clusters the largest have one each, and the others are with the largest.
    """
    degree = np.asarray(graph.sum(0)).ravel() - graph.diagonal()
    embedding = _spectrum(graph, k)[1] / np.sqrt(np.where(degree == 0, 1, degree))[:, None]
    pivots = qr(embedding.T, mode="r", pivoting=True)[1]
    u, _, v = svd(embedding[pivots[:k]].T)
    return compact(np.abs(embedding @ u @ v).argmax(1))


def _spectrum(graph: csr_array, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The smallest `count` eigenvalues, or all, of the Laplacian in ascending order, and their vectors (n, count).

    Component by component: the Lanczos method may miss copies of an eigenvalue, and 0 has one for each component.
    """
    label = csgraph.connected_components(graph, directed=False)[1]
    # The largest first, whose eigenvectors win where many components have the same eigenvalue.
    members = [np.flatnonzero(label == component) for component in np.bincount(label).argsort(kind="stable")[::-1]]
    found = [_connected(graph[rows][:, rows], count) for rows in members]
    values = np.concatenate([part for part, _ in found])
    owner = np.repeat(np.arange(len(found)), [len(part) for part, _ in found])
    column = np.concatenate([np.arange(len(part)) for part, _ in found])
    chosen = values.round(9).argsort(kind="stable")[:count]  # zeros are equal up to rounding
    vectors = np.zeros((len(label), len(chosen)))
    for position, (component, own) in enumerate(zip(owner[chosen], column[chosen], strict=True)):
        vectors[members[component], position] = found[component][1][:, own]
    return values[chosen], vectors


def _connected(graph: csr_array, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same of a connected graph. An isolated point has its diagonal, 1; any other has one eigenvalue 0."""
    laplacian = csr_array(csgraph.laplacian(graph, normed=True))
    laplacian.setdiag(1)
    n = graph.shape[0]
    if n <= DENSE:
        values, vectors = eigh(laplacian.toarray(), subset_by_index=(0, min(count, n) - 1))
    else:
        # From 2 down instead of 0 up: the tolerance is relative to the eigenvalue.
        start = np.random.default_rng(0).uniform(-1, 1, n)
        values, vectors = eigsh(2 * eye_array(n) - laplacian, count, which="LA", v0=start, tol=1e-9)
        values, vectors = 2 - values[::-1], vectors[:, ::-1]
    return values, vectors


def kmeans(points: Points, k: int, seed: int) -> Labels:
    """The best of 10 runs of k-means on points (n, D): labels (n,)."""
    return compact(KMeans(k, n_init=10, random_state=seed).fit_predict(points))


def merged(points: Points, labels: Labels, fewest: int) -> Labels:
    """The partition (n,) of points (n, D) after clusters of fewer than `fewest` points have joined others.

    The smallest joins the one with the nearest mean, until all are large enough or one is left.
    """
    labels = compact(labels)
    while True:
        sizes = np.bincount(labels)
        if len(sizes) < 2 or sizes.min() >= fewest:
            return labels
        means = np.stack([points[labels == cluster].mean(0) for cluster in range(len(sizes))])
        small = int(sizes.argmin())
        distance = np.linalg.norm(means - means[small], axis=1)
        distance[small] = np.inf
        labels = compact(np.where(labels == small, distance.argmin(), labels))


def compact(labels: NDArray[np.integer]) -> Labels:
    """The same partition, numbered 0, 1, ... by first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank: Labels = first.argsort().argsort()[inverse].astype(np.int64)
    return rank
