"""Heatmaps become points of one scale, and clusters that lie apart are counted and recovered."""

import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import eigvalsh
from scipy.sparse import csgraph, csr_array
from sklearn.cluster import SpectralClustering
from sklearn.neighbors import kneighbors_graph
from torch.nn import functional as F
from worstgroup.methods.blocks import clustering
from worstgroup.methods.blocks.clustering import (
    compact,
    default_neighbours,
    eigengap,
    kmeans,
    knn_graph,
    merged,
    normalised,
    spectral,
)

SIZES = (40, 25, 60, 31, 50, 28, 45, 33, 27, 38)


def blobs(count: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Clouds of different sizes far from each other, in random order, and which cloud each point is of."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.repeat(np.arange(count), SIZES[:count]))
    return (100 * np.eye(10)[label] + rng.normal(size=(len(label), 10))).astype(np.float32), label


def graph_of(points: NDArray[np.float32]) -> csr_array:
    return knn_graph(points, default_neighbours(len(points)))


# --------------------------------------------------------------------------------------------------------- heatmaps


def test_maps_are_resized_then_scaled_by_their_largest_value() -> None:
    maps = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    points = normalised(maps, 5)
    assert points.shape == (4, 75)
    assert points.dtype == np.float32
    assert np.array_equal(np.abs(points).max(1), np.ones(4))
    small = F.interpolate(maps, size=(5, 5), mode="bilinear", antialias=False).flatten(1).numpy()
    np.testing.assert_allclose(points, small / np.abs(small).max(1, keepdims=True), rtol=1e-6)
    assert np.array_equal(points, normalised(maps.numpy(), 5))


def test_maps_of_the_wanted_side_are_not_resampled() -> None:
    maps = np.array([[[[1, -4], [2, 0]]]], dtype=np.float32)
    before = maps.copy()
    assert normalised(maps, 2).tolist() == [[0.25, -1, 0.5, 0]]
    assert np.array_equal(maps, before)


def test_only_an_exactly_empty_map_stays_empty() -> None:
    maps = torch.zeros(3, 1, 2, 2)
    maps[1, 0, 0, 0], maps[2, 0, 1, 1] = 1e-9, -1e-30
    assert normalised(maps, 2).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1]]


def test_the_scale_of_a_map_does_not_matter() -> None:
    maps = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(normalised(maps, 4), normalised(maps * torch.tensor([2.0, 0.5, 64, 1]).view(4, 1, 1, 1), 4))


# ------------------------------------------------------------------------------------------------------------ graph


def test_the_graph_is_the_symmetric_part_of_the_nearest_neighbours() -> None:
    points, _ = blobs(2)
    graph = knn_graph(points, 6).toarray()
    directed = kneighbors_graph(points, 6, include_self=True).toarray()
    assert np.array_equal(graph, (directed + directed.T) / 2)
    assert np.array_equal(np.diag(graph), np.ones(len(points)))


def test_a_point_among_its_copies_still_has_itself() -> None:
    points = np.concatenate([np.zeros((8, 3)), np.ones((4, 3))]).astype(np.float32)
    graph = knn_graph(points, 3).toarray()
    assert np.array_equal(np.diag(graph), np.ones(12))
    assert np.array_equal(graph, graph.T)
    assert graph.sum() == 3 * 12


@pytest.mark.parametrize(("n", "neighbours"), [(3, 2), (10, 2), (1199, 7), (19867, 9), (10000, 9), (996, 6)])
def test_the_number_of_neighbours_is_the_floored_logarithm(n: int, neighbours: int) -> None:
    assert default_neighbours(n) == neighbours


# --------------------------------------------------------------------------------------------------------- eigengap


@pytest.mark.parametrize("count", [2, 3, 4, 6, 10])
@pytest.mark.parametrize("dense", [clustering.DENSE, 40])
def test_separate_components_are_counted_and_recovered(count: int, dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "DENSE", dense)  # 40: the larger components take the sparse solver
    points, label = blobs(count)
    graph = graph_of(points)
    assert eigengap(graph) == count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(spectral(graph, count), compact(label))


@pytest.mark.parametrize("count", range(2, 11))
def test_cliques_are_counted(count: int) -> None:
    label = np.repeat(np.arange(count), 5)
    graph = csr_array((label[:, None] == label).astype(float))
    assert eigengap(graph) == count
    assert np.array_equal(spectral(graph, count), label)


def test_the_eigengap_is_the_largest_gap_from_two_on(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(1).normal(size=(150, 2)).astype(np.float32)
    graph = graph_of(points)
    laplacian = csgraph.laplacian(graph, normed=True).toarray()
    np.fill_diagonal(laplacian, 1)
    values = eigvalsh(laplacian)
    for most in (2, 3, 5, 10):
        wanted = max(range(2, most + 1), key=lambda k: values[k] - values[k - 1])
        assert eigengap(graph, most) == wanted
    exact = eigengap(graph)
    monkeypatch.setattr(clustering, "DENSE", 20)
    assert eigengap(graph) == exact


def test_the_sparse_solver_finds_the_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(1).normal(size=(300, 4)).astype(np.float32)
    exact = clustering._spectrum(graph_of(points), 11)[0]
    monkeypatch.setattr(clustering, "DENSE", 20)
    found, vectors = clustering._spectrum(graph_of(points), 11)
    np.testing.assert_allclose(found, exact, atol=1e-8)
    assert np.array_equal(clustering._spectrum(graph_of(points), 11)[0], found)
    laplacian = csgraph.laplacian(graph_of(points), normed=True).tolil()
    laplacian.setdiag(1)
    np.testing.assert_allclose(laplacian @ vectors, vectors * found, atol=1e-7)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(11), atol=1e-7)


def test_a_single_blob_is_split_all_the_same() -> None:
    points, _ = blobs(1)
    graph = graph_of(points)
    k = eigengap(graph)
    assert 2 <= k <= 10
    assert len(np.unique(spectral(graph, k))) == k


@pytest.mark.parametrize("n", [2, 3, 4, 10, 11])
def test_few_points_bound_the_number_of_clusters(n: int) -> None:
    points = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    graph = graph_of(points)
    k = eigengap(graph)
    assert 2 <= k <= max(2, n - 1)
    if n > 2:
        labels = spectral(graph, k)
        assert labels.shape == (n,)
        assert labels.max() < k


@pytest.mark.parametrize("k", [2, 5, 9])
@pytest.mark.parametrize("dense", [clustering.DENSE, 40])
@pytest.mark.parametrize("count", [1, 3])
def test_the_partition_is_scikit_learns(k: int, dense: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a graph in one piece, and in as many pieces as there are clusters."""
    rng = np.random.default_rng(3)
    points = np.concatenate([rng.normal(size=(80, 3)), rng.normal(size=(80, 3)) + 3]).astype(np.float32)
    points, k = (points, k) if count == 1 else (blobs(3)[0], 3)
    graph = graph_of(points)
    solver = SpectralClustering(k, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = compact(solver.fit_predict(graph))
    monkeypatch.setattr(clustering, "DENSE", dense)
    assert np.array_equal(spectral(graph, k), wanted)


def test_isolated_points_are_no_error() -> None:
    graph = csr_array(np.diag(np.ones(5)) + np.pad(np.ones((3, 3)), (0, 2)))
    assert spectral(graph, 3).tolist() == [0, 0, 0, 1, 2]
    assert len(np.unique(spectral(graph, 2))) == 2


def test_more_components_than_clusters_are_no_error() -> None:
    points = np.repeat(1000 * np.random.default_rng(0).normal(size=(14, 3)), 8, axis=0).astype(np.float32)
    points += np.random.default_rng(1).normal(size=points.shape).astype(np.float32)
    graph = knn_graph(points, 4)
    k = eigengap(graph)
    labels = spectral(graph, k)
    assert 2 <= k <= 10
    assert labels.shape == (112,)
    assert len(np.unique(labels)) == k


def test_of_too_many_components_the_largest_are_clusters() -> None:
    points = np.concatenate([np.full((n, 1), 1000.0 * i) for i, n in enumerate((5, 9, 4, 7))]).astype(np.float32)
    points += np.random.default_rng(0).normal(size=points.shape).astype(np.float32)
    labels = spectral(knn_graph(points, 4), 2)
    assert len(np.unique(labels[5:14])) == len(np.unique(labels[18:])) == 1
    assert labels[5] != labels[18]


def test_small_clusters_join_the_nearest() -> None:
    points = np.array([0, 0, 0, 1, 9, 10, 10, 10, 11], np.float32)[:, None]
    labels = np.array([4, 4, 4, 7, 2, 3, 3, 3, 3])
    assert merged(points, labels, 0).tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 3]
    assert merged(points, labels, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert merged(points, labels, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert merged(points, labels, 99).tolist() == [0] * 9
    assert merged(points, labels, 2).dtype == np.int64


# ---------------------------------------------------------------------------------------------------------- labels


def test_permuted_points_get_the_same_clusters() -> None:
    points, _ = blobs(4)
    order = np.random.default_rng(3).permutation(len(points))
    labels, permuted = (spectral(graph_of(p), 4) for p in (points, points[order]))
    assert np.array_equal(permuted, compact(labels[order]))
    labels, permuted = (kmeans(p, 4, seed=0) for p in (points, points[order]))
    assert np.array_equal(permuted, compact(labels[order]))


def test_kmeans_recovers_clouds() -> None:
    points, label = blobs(6)
    assert np.array_equal(kmeans(points, 6, seed=0), compact(label))


def test_the_seed_decides() -> None:
    points = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
    graph = graph_of(points)
    assert np.array_equal(graph.toarray(), graph_of(points).toarray())
    assert eigengap(graph) == eigengap(graph)
    for labels in (lambda seed: spectral(graph, 5), lambda seed: kmeans(points, 5, seed)):
        assert labels(7).dtype == np.int64
        assert np.array_equal(labels(7), labels(7))


def test_labels_are_numbered_by_first_appearance() -> None:
    labels = compact(np.array([7, 7, -1, 3, 7, -1]))
    assert labels.tolist() == [0, 0, 1, 2, 0, 1]
    assert labels.dtype == np.int64
    assert compact(np.zeros(0, np.int64)).shape == (0,)
