"""Clustering of heatmaps as ExMap does it: kNN graph, eigengap, spectral clustering with cluster_qr; or k-means.

Chakraborty et al., ExMap: Leveraging Explainability Heatmaps for Unsupervised Group Robustness to Spurious
Correlations, CVPR 2024, section 3.2, with the constants of the released code.
"""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigvalsh
from scipy.sparse import csgraph, csr_array, eye_array
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.neighbors import kneighbors_graph
from torch import Tensor
from torch.nn import functional as F

Points = NDArray[np.float32]
Labels = NDArray[np.int64]

DENSE = 1000
"""Up to so many points all eigenvalues are computed: exact, and below half a second."""


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
    # An isolated point counts with its diagonal, 1, like any eigenvalue; every other component has one that is 0.
    values = np.sort(np.concatenate([_smallest(part, most + 1) for part in _components(graph)]))[: most + 1]
    gaps = np.diff(values)[1:]
    return int(gaps.argmax()) + 2 if len(gaps) else graph.shape[0]


def _components(graph: csr_array) -> Iterator[csr_array]:
    """Its connected components, each a graph of its own."""
    count, label = csgraph.connected_components(graph, directed=False)
    for component in range(count):
        members = np.flatnonzero(label == component)
        yield graph[members][:, members]


def _smallest(graph: csr_array, count: int) -> NDArray[np.float64]:
    """The smallest `count` eigenvalues, or all, of a connected graph's Laplacian.

    Connected, because the Lanczos method may miss copies of an eigenvalue, and 0 has one for each component.
    """
    laplacian = csr_array(csgraph.laplacian(graph, normed=True))
    laplacian.setdiag(1)
    n = graph.shape[0]
    values: NDArray[np.float64]
    if n <= DENSE:
        values = eigvalsh(laplacian.toarray(), subset_by_index=(0, min(count, n) - 1))
    else:
        # From 2 down instead of 0 up: the tolerance is relative to the eigenvalue.
        start = np.random.default_rng(0).uniform(-1, 1, n)
        values = 2 - eigsh(2 * eye_array(n) - laplacian, count, which="LA", v0=start, tol=1e-9)[0]
    return values


def spectral(graph: csr_array, k: int, seed: int) -> Labels:
    """Spectral clustering of a graph's points (n,) into k clusters, from k eigenvectors by cluster_qr."""
    solver = SpectralClustering(k, affinity="precomputed", assign_labels="cluster_qr", random_state=seed)
    with warnings.catch_warnings():
        # Clusters that lie apart are what we are after, and cluster_qr then finds exactly the components.
        warnings.filterwarnings("ignore", "Graph is not fully connected")
        return compact(solver.fit_predict(graph))


def kmeans(points: Points, k: int, seed: int) -> Labels:
    """The best of 10 runs of k-means on points (n, D): labels (n,)."""
    return compact(KMeans(k, n_init=10, random_state=seed).fit_predict(points))


def compact(labels: NDArray[np.integer]) -> Labels:
    """The same partition, numbered 0, 1, ... by first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank: Labels = first.argsort().argsort()[inverse].astype(np.int64)
    return rank
