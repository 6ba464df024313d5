"""GEORGE: mixtures whose size the silhouette finds, what over-clustering keeps, and the groups that come of both."""

import sys
import warnings
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import plan_tiny, predictions
from numpy.typing import NDArray
from stubs import ledger, tiny_task
from toys import run_tiny
from worstgroup.benchmark.annotations import Held
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.task import Task
from worstgroup.methods.blocks import mixtures
from worstgroup.methods.blocks.clustering import compact
from worstgroup.methods.blocks.mixtures import (
    Kind,
    Mixture,
    Overclustered,
    better,
    fit_mixture,
    merged,
    overcluster,
    part_means,
    sample,
    score,
    silhouettes,
)
from worstgroup.methods.blocks.reduction import fit_pca, hardness, residual, unit_length
from worstgroup.methods.groups.george import Config, George, embedding, example_losses

pytestmark = pytest.mark.usefixtures("tiny", "quick")
KINDS: tuple[Kind, ...] = ("gmm", "kmeans")
HELD: tuple[Held, ...] = ("train", "val")
Points = NDArray[np.float32]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for a number of clusters ends early."""
    monkeypatch.setattr(mixtures, "MOST", 5)


def cloud(n: int, *centre: float, seed: int = 0, spread: float = 0.5) -> Points:
    return (np.array(centre) + spread * np.random.default_rng(seed).normal(size=(n, len(centre)))).astype(np.float32)


def blobs(*sizes: int) -> tuple[Points, NDArray[np.int64]]:
    """Clouds far from each other, in random order, and which cloud each point is of."""
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return (20 * np.eye(5)[label] + cloud(len(label), 0, 0, 0, 0, 0)).astype(np.float32), label


# -------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(40, 40), (90, 12), (30, 60, 20, 45)])
def test_separate_blobs_are_counted_and_recovered_and_take_in_new_points(kind: Kind, sizes: tuple[int, ...]) -> None:
    points, label = blobs(*sizes)
    found = fit_mixture(points, 0, kind, seed=3)
    assert found.num == len(sizes)
    assert np.array_equal(compact(found.predict(points)), compact(label))
    again = found.predict(points[::-1] + 0.1)
    assert np.array_equal(compact(again), compact(label[::-1]))
    assert again.dtype == np.int64
    assert found.predict(points[:0]).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_number_is_not_searched_for(kind: Kind) -> None:
    points, _ = blobs(40, 40)
    for k in (1, 3, 5):
        found = fit_mixture(points, k, kind, seed=0)
        assert found.num == k
        assert len(np.unique(found.predict(points))) == k


def test_the_score_is_the_mean_over_clusters_and_not_over_points() -> None:
    points = np.array([[0.0], [2], [10], [14], [12], [15]], np.float32)
    labels = np.array([0, 0, 1, 1, 1, 1])
    distances = np.abs(points - points.T)
    values = []
    for i, label in enumerate(labels):
        inner = distances[i, labels == label].sum() / ((labels == label).sum() - 1)
        outer = distances[i, labels != label].mean()
        values.append((outer - inner) / max(inner, outer))
    assert silhouettes(points, labels) == pytest.approx(np.array(values), rel=1e-6)
    assert score(points, labels) == pytest.approx((np.mean(values[:2]) + np.mean(values[2:])) / 2, rel=1e-6)


def test_without_a_second_cluster_there_is_no_silhouette() -> None:
    points = cloud(5, 0, 0)
    assert silhouettes(points, np.zeros(5, np.int64)).tolist() == [0] * 5
    assert silhouettes(points, np.arange(5)).tolist() == [0] * 5
    assert score(points, np.zeros(5, np.int64)) == -1


def test_of_equal_scores_the_most_clusters_win(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = blobs(30, 30)
    monkeypatch.undo()
    assert mixtures.MOST == 10
    monkeypatch.setattr(mixtures, "score", lambda points, labels: 0.25)
    assert fit_mixture(points, 0, "kmeans", seed=0).num == 10
    monkeypatch.setattr(mixtures, "score", lambda points, labels: 1 / len(np.unique(labels)))
    assert fit_mixture(points, 0, "kmeans", seed=0).num == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 2, 7])
@pytest.mark.parametrize("n", range(6))
def test_few_points_have_fewer_clusters(n: int, k: int, kind: Kind) -> None:
    points = cloud(n, 0, 0)
    found = fit_mixture(points, k, kind, seed=0)
    assert found.num <= max(1, n - 1)
    if k:
        assert found.num == max(1, min(k, n - 1))
    labels = found.predict(points)
    assert labels.shape == (n,)
    assert not n or labels.max() < found.num


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_one_point_are_one_cluster(kind: Kind) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = fit_mixture(np.ones((8, 2), np.float32), 0, kind, seed=0).predict(np.ones((8, 2), np.float32))
    assert len(np.unique(labels)) == 1


def test_silhouettes_are_those_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.array_equal(sample(10_000, 0), np.arange(10_000))
    rows = sample(10_001, 0)
    assert len(np.unique(rows)) == 10_000
    assert np.array_equal(rows, sample(10_001, 0))
    assert not np.array_equal(rows, sample(10_001, 1))
    monkeypatch.setattr(mixtures, "SAMPLE", 30)
    seen: list[int] = []

    def noted(points: Points, labels: NDArray[np.int64]) -> float:
        seen.append(len(points))
        return score(points, labels)

    monkeypatch.setattr(mixtures, "score", noted)
    points, label = blobs(100, 60, 80)
    found = fit_mixture(points, 0, "gmm", seed=0)
    assert set(seen) == {30}
    assert np.array_equal(compact(found.predict(points)), compact(label))


# ------------------------------------------------------------------------------------------------- over-clustering

BASE = Mixture.fit(np.repeat(np.array([[0.0, 0], [100, 0]], np.float32), 5, axis=0), 2, "kmeans", 0)
"""Points left and right of 50 are its clusters."""


def split_again(few: int = 40, loss: float = 2.0, held: int | None = 30, gap: float = 20) -> NDArray[np.int64]:
    """Final clusters of two clouds left, of 200 points with loss 1 and of `few` with another, and of one cloud right.

    `held` is how many validation points lie in the small cloud (None: there is no validation), `gap` how far it lies.
    """
    clouds = [cloud(200, 0, 0), cloud(few, 0, gap, seed=1), cloud(150, 100, 0, seed=2)]
    points, losses = np.concatenate(clouds), np.repeat([1.0, loss, 1.0], [200, few, 150])
    others = None if held is None else np.concatenate([cloud(60, 0, 0), cloud(held, 0, gap), cloud(60, 100, 0)])
    found = overcluster(BASE, points, losses, others, 2, "kmeans", seed=0)
    labels = found.predict(points)
    assert np.array_equal(np.unique(labels), np.arange(found.num))
    assert np.array_equal(found.predict(points[::-1]), labels[::-1])
    ends = np.cumsum([0, 200, few, 150])
    return np.array([len(np.unique(labels[a:b])) for a, b in pairwise(ends)] + [found.num])


def test_a_part_that_pays_becomes_a_cluster_and_the_rest_one_again() -> None:
    # A round cloud does not pay: split in two, its points lie nearer to others than before.
    assert split_again().tolist() == [1, 1, 1, 3]
    assert split_again(held=None).tolist() == [1, 1, 1, 3]


def test_a_part_needs_the_loss_and_the_numbers() -> None:
    merged_again = [1, 1, 1, 2]
    assert split_again(loss=0.5).tolist() == merged_again
    assert split_again(loss=1.0).tolist() == [1, 1, 1, 3]
    assert split_again(few=24, held=None).tolist() == merged_again
    assert split_again(few=25, held=None).tolist() == [1, 1, 1, 3]
    assert split_again(held=24).tolist() == merged_again
    assert split_again(held=25).tolist() == [1, 1, 1, 3]


def test_a_part_needs_a_share_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "SMALLEST_SHARE", 40 / 390)
    assert split_again().tolist()[-1] == 3
    monkeypatch.setattr(mixtures, "SMALLEST_SHARE", 40.5 / 390)
    assert split_again().tolist()[-1] == 2


def test_a_part_needs_a_silhouette_that_is_positive_and_higher() -> None:
    before, after = np.array([0.3, 0.5, -0.3, -0.3, 0.2, 0.0]), np.array([0.4, 0.4, -0.1, 0.1, 0.2, 0.0])
    assert better(before, after).tolist() == [True, False, False, True, False, False]


def test_parts_that_are_not_kept_are_their_clusters_rest() -> None:
    keep = np.array([[True, False, False], [False, False, False], [True, True, True], [False, True, True]])
    ids = merged(keep)
    assert np.unique(ids).tolist() == list(range(9))
    assert len({ids[0, 0], ids[0, 1]}) == 2
    assert ids[0, 1] == ids[0, 2]
    assert len(set(ids[1])) == 1
    assert len(set(ids[2])) == 3
    assert len(set(ids[3])) == 3


def test_means_of_parts() -> None:
    assert part_means(np.array([1.0, 3, 5]), np.array([2, 2, 0]), 4).tolist() == [5, 0, 2, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_one_cluster_and_few_points_can_be_split(kind: Kind) -> None:
    for n in (1, 2, 3, 6):
        points = cloud(n, 0, 0)
        found = overcluster(Mixture(), points, np.ones(n), points[:0], 5, kind, seed=0)
        assert isinstance(found, Overclustered)
        assert found.num == 1
        assert found.predict(points).tolist() == [0] * n
    points = np.concatenate([cloud(100, 0, 0), cloud(50, 0, 20)])
    found = overcluster(Mixture(), points, np.repeat([1.0, 2], [100, 50]), None, 2, kind, seed=0)
    assert found.num == 2
    assert found.predict(points).tolist() == [found.predict(points)[0]] * 100 + [found.predict(points)[-1]] * 50


# ------------------------------------------------------------------------------------------------------- reductions


def head(classes: int, seed: int = 0) -> tuple[Points, Points]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(classes, 5)).astype(np.float32), rng.normal(size=classes).astype(np.float32)


@pytest.mark.parametrize("label", [0, 1])
def test_hardness_is_the_difference_of_two_logits_over_the_length_of_the_normal(label: int) -> None:
    (weight, bias), x = head(2), cloud(20, 0, 0, 0, 0, 0)
    z = x @ weight.T + bias
    wanted = (z[:, 1] - z[:, 0] - (bias[1] - bias[0])) / np.linalg.norm(weight[1] - weight[0])
    np.testing.assert_allclose(hardness(x, weight, bias, label)[:, 0], wanted, rtol=1e-4, atol=1e-5)


def test_hardness_of_more_classes_is_the_distance_from_the_nearest_boundary() -> None:
    (weight, bias), x = head(3), cloud(20, 0, 0, 0, 0, 0)
    z = x @ weight.T + bias
    for y, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        distances = [(z[:, y] - z[:, j]) / np.linalg.norm(weight[y] - weight[j]) for j in others]
        found = hardness(x, weight, bias, y)
        assert found.shape == (20, 1)
        np.testing.assert_allclose(found[:, 0], np.min(distances, axis=0), rtol=1e-4, atol=1e-5)
        assert np.array_equal(found[:, 0] > 0, z.argmax(1) == y)


def test_hardness_of_two_classes_is_that_distance_up_to_sign_and_shift() -> None:
    (weight, bias), x = head(2), cloud(20, 0, 0, 0, 0, 0)
    far = np.concatenate([weight, -1e-6 * np.ones((1, 5), np.float32)]), np.append(bias, np.float32(-1e9))
    assert np.ptp(hardness(x, *far, 1) - hardness(x, weight, bias, 1)) < 1e-5
    assert np.ptp(hardness(x, *far, 0) + hardness(x, weight, bias, 0)) < 1e-5


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_the_residual_is_what_no_logit_difference_depends_on(classes: int) -> None:
    (weight, bias), x = head(classes), cloud(20, 0, 0, 0, 0, 0)
    rest = residual(x, weight)
    z = rest @ weight.T
    np.testing.assert_allclose(z - z[:, :1], 0, atol=1e-5)
    assert np.linalg.matrix_rank(x - rest, tol=1e-4) == classes - 1
    np.testing.assert_allclose(residual(rest, weight), rest, atol=1e-5)
    if classes == 2:
        normal = (weight[1] - weight[0]) / np.linalg.norm(weight[1] - weight[0])
        np.testing.assert_allclose(x - hardness(x, weight, bias, 0) * normal, rest, atol=1e-5)


def test_points_of_length_one() -> None:
    points = np.array([[3, 4], [0, 0], [0, -2]], np.float32)
    np.testing.assert_allclose(unit_length(points), [[0.6, 0.8], [0, 0], [0, -1]], rtol=1e-6)


def test_there_are_no_more_components_than_points() -> None:
    points = cloud(3, 0, 0, 0, 0)
    assert fit_pca(points, 2, 0)(points).shape == (3, 2)
    assert fit_pca(points[:, :1], 2, 0)(points[:, :1]).shape == (3, 1)
    assert len(fit_pca(points, 2, 0)(points[:0])) == 0
    assert embedding(points, 2, 0)(points).shape == (3, 2)


# ----------------------------------------------------------------------------------------------------------- source


def fake_task(features: dict[str, Points], y: dict[str, NDArray[np.int64]], classes: int = 2) -> Task:
    """What the source takes from a task, with these features of its ERM."""
    weight, bias = map(torch.from_numpy, head(classes))
    layer = torch.nn.Linear(5, classes)
    layer.load_state_dict({"weight": weight, "bias": bias})
    task = SimpleNamespace(
        erm=lambda: SimpleNamespace(model=SimpleNamespace(head=layer)),
        rng=lambda purpose: np.random.default_rng(0),
        y=lambda split, fit=False: y[split],
        features=lambda checkpoint, split: torch.from_numpy(features[split]),
        logits=lambda checkpoint, split: layer(torch.from_numpy(features[split])).detach(),
    )
    return cast(Task, task)


def subclasses(*sizes: int) -> tuple[Points, NDArray[np.int64], NDArray[np.int64]]:
    """Features, classes and subclasses of two classes: the first two clouds are class 0, the others class 1."""
    points, cloud_of = blobs(*sizes)
    return points, cloud_of // 2, cloud_of % 2


@pytest.mark.parametrize(
    "settings",
    [
        {"reduction": "none", "clusterer": "kmeans"},
        {"reduction": "none", "normalise": False},
        {"reduction": "pca"},
        {"reduction": "hardness"},
        {"reduction": "hardness", "clusters": 2, "clusterer": "kmeans"},
    ],
)
def test_two_blobs_in_a_class_are_its_two_clusters_without_an_error(settings: dict[str, Any]) -> None:
    points, y, a = subclasses(60, 20, 30, 50)
    others, other_y, other_a = subclasses(30, 12, 10, 20)
    task = fake_task({"train": points, "val": others}, {"train": y, "val": other_y})
    for fit_on in ("split", "train"):
        source = George(Config(**settings, fit_on=fit_on))  # type: ignore[arg-type]
        found = {split: source.clusters(task, split) for split in HELD}
        for label in (0, 1):
            assert np.array_equal(compact(found["train"][y == label]), compact(a[y == label]))
            assert np.array_equal(compact(found["val"][other_y == label]), compact(other_a[other_y == label]))
            if fit_on == "train":
                name = dict(zip(a[y == label], found["train"][y == label], strict=True))
                assert found["val"][other_y == label].tolist() == [name[i] for i in other_a[other_y == label]]


@pytest.mark.parametrize("factor", [1, 5])
@pytest.mark.parametrize("reduction", ["hardness", "none", "pca", "umap"])
def test_classes_of_few_images_or_none(reduction: str, factor: int) -> None:
    sizes = {"train": (5, 3, 2, 1, 0, 6), "val": (0, 2, 1, 3, 4, 7)}
    y = {split: np.repeat(np.arange(6), n) for split, n in sizes.items()}
    features = {split: cloud(len(label), 0, 0, 0, 0, 0) for split, label in y.items()}
    for fit_on in ("split", "train"):
        for clusters in (0, 4):
            config = Config(reduction, clusters=clusters, factor=factor, fit_on=fit_on)  # type: ignore[arg-type]
            for split, label in y.items():
                found = George(config).clusters(fake_task(features, y, 6), split)  # type: ignore[arg-type]
                fitted = sizes["train" if fit_on == "train" else split]
                for k in np.unique(label):
                    assert found[label == k].max() <= max(0, fitted[k] - 2)


@pytest.mark.parametrize("reduction", ["umap", "hardness"])
def test_blobs_are_found_in_an_embedding(reduction: str) -> None:
    pytest.importorskip("umap")
    points, y, a = subclasses(60, 20, 30, 50)
    task = fake_task({"train": points}, {"train": y})
    components = 0 if reduction == "umap" else 3
    source = George(Config(reduction, clusters=2, components=components))  # type: ignore[arg-type]
    found = source.clusters(task, "train")
    assert np.array_equal(found, source.clusters(task, "train"))
    for label in (0, 1):
        assert np.array_equal(compact(found[y == label]), compact(a[y == label]))


def test_over_clustering_asks_the_loss_of_train_and_the_number_of_validation() -> None:
    points, y, a = subclasses(90, 40, 80, 50)
    few, few_y, _ = subclasses(90, 10, 80, 10)
    config = Config("none", "kmeans", clusters=1, factor=2, normalise=False)
    task = fake_task({"train": points, "val": points}, {"train": y, "val": y})
    losses = example_losses(task, task.erm(), "train")
    found = George(config).clusters(task, "train")
    for label in (0, 1):
        parts, whole = [(y == label) & (a == i) for i in (0, 1)], y == label
        # A cluster alone has no silhouette before it is split, so that what is left to decide is the loss.
        assert [losses[part].mean() >= losses[whole].mean() for part in parts].count(True) == 1
        assert np.array_equal(compact(found[whole]), compact(a[whole]))
    for val, val_y in ((few, few_y), (points[:0], y[:0])):
        task = fake_task({"train": points, "val": val}, {"train": y, "val": val_y})
        assert not George(config).clusters(task, "train").any()


def test_one_cluster_each_is_the_classes() -> None:
    task = tiny_task("groupdro+george", george__clusters="1")
    source = George(Config(clusters=1))
    for split in HELD:
        groups = source.attributes(task, split).groups(task.y(split), 2)
        assert (groups.num, groups.index.tolist()) == (2, task.y(split).tolist())
    ours, classes = run_tiny("dfr+george", "none", george__clusters="1"), run_tiny("dfr@class", "none")
    assert predictions(ours) == predictions(classes)


def test_true_clusters_are_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    true = tiny_task("groupdro", "train+val")
    joint = {split: true.attributes(split).joint().index for split in HELD}
    monkeypatch.setattr(George, "clusters", lambda self, task, split: joint[split])
    task = tiny_task("groupdro+george")
    for split in HELD:
        assert np.array_equal(task.groups(split).index, true.groups(split).index)


def test_no_attribute_goes_in_and_validation_classes_are_billed_where_clusters_are_found_there() -> None:
    task = tiny_task("groupdro+george")
    for config, extra in ((Config(), 0), (Config(fit_on="split"), 48)):
        source = George(config)
        assert source.attributes(task, "train").values.shape == (96, 1)
        assert source.attributes(task, "val").values.shape == (48, 1)
        assert ledger(task) == {**dict.fromkeys(ledger(task), 0), "n_y_extra": extra}
    counted = tiny_task("groupdro+george", george__factor="5")
    George(Config(factor=5)).attributes(counted, "train")
    assert ledger(counted)["n_y_extra"] == 48


def test_only_images_that_are_clustered_pass_the_network() -> None:
    task = tiny_task("groupdro+george")
    task.groups("train")
    passes = [cost.n_fwd_nograd for key, cost in task._lab.clock.shared.items() if key.startswith("features")]
    assert passes == [96]


def test_it_is_shared_by_the_runs_of_a_block_and_the_same_when_made_again(
    home: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tiny_task("groupdro+george").attributes("train").values
    with monkeypatch.context() as patch:
        patch.setattr(George, "clusters", None)
        assert np.array_equal(tiny_task("resample+george").attributes("train").values, found)
    monkeypatch.setenv("WORSTGROUP_HOME", f"{home}-2")
    assert np.array_equal(tiny_task("groupdro+george").attributes("train").values, found)


@pytest.mark.parametrize("settings", [{"reduction": "umap"}, {"components": "2"}])
def test_umap_is_asked_for_before_any_work(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {f"george__{key}": value for key, value in settings.items()}
    pytest.importorskip("umap")
    plan_tiny("dfr+george", **changes)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match=r"needs umap-learn: pip install worstgroup\[umap\]"):
        plan_tiny("dfr+george", **changes)
    plan_tiny("dfr+george")
    plan_tiny("dfr+george", george__reduction="pca", george__components="3")


@pytest.mark.parametrize(("name", "value"), [("clusters", -1), ("components", -1), ("factor", 0)])
def test_impossible_settings_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"george.{name} must be at least \d, got {value}"):
        Config(**{name: value})  # type: ignore[arg-type]


def test_search_ranges() -> None:
    found = {name: str(search) for name, search in ranges(Config).items()}
    assert found == {"reduction": "{hardness,umap}", "clusterer": "{gmm,kmeans}"}
    assert (Config().reduction, Config().clusterer) == ("hardness", "gmm")
