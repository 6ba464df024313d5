"""ExMap: heatmaps of the shared ERM, clustered; what a host makes of clusters does not depend on their names."""

import importlib.util
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from numpy.typing import NDArray
from stubs import ledger, tiny_task
from toys import run_tiny
from worstgroup.benchmark.annotations import Attributes, Held
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.task import Task
from worstgroup.methods import dfr
from worstgroup.methods.blocks.clustering import normalised
from worstgroup.methods.blocks.explainers import Explainer, maps
from worstgroup.methods.groups import exmap
from worstgroup.methods.groups.exmap import Config, ExMap, heatmaps

pytestmark = pytest.mark.usefixtures("tiny")

Clusters = dict[str, NDArray[np.int64]]
SPLITS = get_args(Held)


def truth(task: Task, split: str) -> NDArray[np.int64]:
    """True joint attribute of every image."""
    a = task._lab.store.split(split).a  # type: ignore[arg-type]
    joint: NDArray[np.int64] = a[:, 0] * 2 + a[:, 1]
    return joint


def clusters_of(points: NDArray[Any], y: NDArray[np.int64], **config: Any) -> NDArray[np.int64]:
    """What the source makes of these heatmaps and classes, as groups."""

    class Stub:
        def y(self, split: str) -> NDArray[np.int64]:
            return y

        def rng(self, purpose: str) -> np.random.Generator:
            return np.random.default_rng(0)

    source = ExMap(Config(side=4, **config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exmap, "heatmaps", lambda *_: points)
        return source.clusters(Stub(), "val")  # type: ignore[arg-type]


def clouds(sizes: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Points far apart by cloud, and their clouds."""
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    noise = np.random.default_rng(1).normal(size=(len(label), 8))
    return (100 * np.eye(8)[label] + noise).astype(np.float32), label


def same_partition(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
    pairs = np.unique(np.stack([a, b]), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


# ------------------------------------------------------------------------------------------------------------ heatmaps


@pytest.mark.parametrize("explainer", ["lrp", "xgradcam", "ig"])
def test_heatmaps_are_those_of_the_last_erm_for_every_image(explainer: Explainer, monkeypatch: Any) -> None:
    if explainer == "xgradcam":
        pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)
    monkeypatch.setattr(exmap, "VALUES", 7 * int(np.prod(tiny_task("erm").card.image)))  # batches that do not fit
    task = tiny_task("dfr+exmap")
    for split in SPLITS:
        points = heatmaps(task, split, explainer, 16)
        x = torch.cat(list(task.images(split)))
        wanted = normalised(maps(explainer, task.erm().model, x), 16)
        assert points.shape == (task.size(split), 256 if explainer == "xgradcam" else 768)
        np.testing.assert_allclose(points, wanted, atol=1e-3)


def test_explainers_do_not_share_heatmaps() -> None:
    task = tiny_task("dfr+exmap")
    assert not np.array_equal(heatmaps(task, "val", "lrp", 8), heatmaps(task, "val", "ig", 8))


def test_they_are_computed_once_for_all_who_cluster_them(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ExMap(Config(clustering="kmeans")).attributes(tiny_task("dfr"), "val")
    monkeypatch.setattr(exmap, "prepared", None)
    again = ExMap(Config(clustering="kmeans", clusters=3)).attributes(tiny_task("lff"), "val")
    assert len(first.values) == len(again.values) == 48
    assert (first.sizes, again.sizes) == ((8,), (3,))


def test_no_attribute_goes_in() -> None:
    task = tiny_task("groupdro+exmap")
    for split in SPLITS:
        task.attributes(split)
    assert ledger(task)["total_a"] == 0
    assert ledger(task)["n_y_extra"] == 0


def test_what_heatmaps_cost() -> None:
    record = run_tiny("dfr+exmap")
    assert record.cost is not None
    # One pass there and back for every validation image, and one for its features.
    marginal = record.cost.marginal
    assert (marginal.n_fwd, marginal.n_bwd, marginal.n_fwd_nograd) == (48, 48, 48)


# ------------------------------------------------------------------------------------------------------------ clusters


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("clustering", ["spectral", "kmeans"])
def test_clouds_become_clusters(clustering: str, scope: str) -> None:
    points, cloud = clouds((40, 30, 50, 35))
    y = cloud // 2
    clusters = 0 if clustering == "spectral" else 4 if scope == "global" else 2
    found = clusters_of(points, y, clustering=clustering, scope=scope, clusters=clusters)
    assert same_partition(cloud, 10 * y + found)


def test_global_and_local_coincide_where_classes_share_no_cluster() -> None:
    points, cloud = clouds((40, 30, 50, 35))
    y = cloud // 2
    together, apart = (10 * y + clusters_of(points, y, scope=scope) for scope in ("global", "local"))
    assert same_partition(together, apart)


def test_local_clusters_see_their_class_alone() -> None:
    points, cloud = clouds((40, 40, 40))
    y = (np.arange(120) % 2 == 0).astype(np.int64)
    found = clusters_of(points, y, scope="local")
    other = clusters_of(np.where(y[:, None] == 1, points, np.float32(0)), y, scope="local")
    assert np.array_equal(found[y == 1], other[y == 1])
    assert same_partition(cloud[y == 0], found[y == 0])


@pytest.mark.slow
def test_umap_comes_before_kmeans() -> None:
    if importlib.util.find_spec("umap") is None:
        pytest.skip("needs the extra umap")
    points, cloud = clouds((40, 30, 50))
    found = clusters_of(points, cloud, clustering="umap", clusters=3)
    assert same_partition(cloud, found)
    assert len(np.unique(clusters_of(points, cloud, clustering="umap"))) == 8


def test_umap_is_asked_for_what_the_released_code_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    points, cloud = clouds((40, 30, 50))
    asked: list[int] = []

    class Embedded:
        embedding_ = points[:, :2]

    monkeypatch.setattr(exmap, "fit_umap", lambda points, neighbours, seed: asked.append(neighbours) or Embedded)
    clusters_of(points, cloud, clustering="umap")
    assert asked == [4]  # floor(ln 120)


def test_small_clusters_are_merged() -> None:
    points, cloud = clouds((60, 50, 6))
    whole, less = (clusters_of(points, cloud, clustering="kmeans", clusters=3, merge=merge) for merge in (0, 25))
    assert sorted(np.bincount(whole)) == [6, 50, 60]
    assert sorted(np.bincount(less)) in ([50, 66], [56, 60])


def test_kmeans_makes_eight_clusters_where_none_are_asked_for() -> None:
    points, cloud = clouds((40, 30, 50))
    assert len(np.unique(clusters_of(points, cloud, clustering="kmeans"))) == 8
    assert len(np.unique(clusters_of(points, cloud, clustering="spectral"))) == 3


@pytest.mark.parametrize("clustering", ["spectral", "kmeans"])
@pytest.mark.parametrize("few", [1, 2, 3, 5])
def test_classes_of_few_images_are_no_error(clustering: str, few: int) -> None:
    points, _ = clouds((40, 30))
    y = np.zeros(70, np.int64)
    y[:few] = 1
    found = clusters_of(points, y, clustering=clustering, scope="local", clusters=4)
    assert len(np.unique(found[:few])) <= few


def test_empty_maps_make_a_cluster_of_their_own() -> None:
    points, _ = clouds((40, 30))
    points = np.concatenate([points, np.zeros((20, 8), np.float32)])
    found = clusters_of(points, np.zeros(90, np.int64))
    assert len(np.unique(found[70:])) == 1
    assert not np.isin(found[70], found[:70])


# ---------------------------------------------------------------------------------------------------------------- host


def head(monkeypatch: pytest.MonkeyPatch, made: Any, method: str = "dfr+exmap", budget: str = "") -> dict[str, Any]:
    """The head that DFR fits on groups of the clusters `made(task, split)`."""

    def attributes(self: ExMap, task: Task, split: Held) -> Attributes:
        cluster = made(task, split)
        return Attributes(cluster[:, None], (int(cluster.max()) + 1,))

    monkeypatch.setattr(ExMap, "attributes", attributes)
    predictor = dfr.DFR(dfr.Config(c_grid=(0.1,), refits=2)).fit(tiny_task(method, budget))
    assert predictor.head is not None
    return {name: value.numpy() for name, value in predictor.head.state_dict().items()}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.array_equal(value, b[name]) for name, value in a.items())


def test_clusters_that_are_the_attributes_make_it_dfr(monkeypatch: pytest.MonkeyPatch) -> None:
    found = head(monkeypatch, truth)
    assert equal(found, head(monkeypatch, truth, "dfr", "val"))
    assert not equal(found, head(monkeypatch, truth, "dfr@class"))


def test_one_cluster_makes_it_class_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    found = head(monkeypatch, lambda task, split: np.zeros(task.size(split), np.int64))
    assert equal(found, head(monkeypatch, truth, "dfr@class"))


def test_names_of_clusters_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = np.array([7, 2, 5, 0])
    assert equal(head(monkeypatch, lambda *at: renamed[truth(*at)]), head(monkeypatch, truth))


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", ["side", "clusters", "merge"])
def test_negative_values_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"exmap.{name} must be at least 0, got -1"):
        plan_tiny("dfr+exmap", **{f"exmap__{name}": "-1"})


def test_backbones_are_refused_by_explainer() -> None:
    with pytest.raises(UserError, match="mnist_cnn cannot be explained"):
        plan_tiny_on("mnist_cnn")
    assert plan_tiny_on("mnist_cnn", **{"exmap.explainer": "gradcam"})
    with pytest.raises(UserError, match="mlp3x100 has maps of one pixel"):
        plan_tiny_on("mlp3x100", **{"exmap.explainer": "gradcam"})
    assert plan_tiny_on("mlp3x100")


def plan_tiny_on(backbone: str, **settings: str) -> Any:
    from worstgroup.benchmark.planning import Request, plan

    return plan([Request("tiny", "dfr+exmap", backbone=backbone, settings=settings)]).runs[0].spec


def test_umap_is_asked_for_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(UserError, match=r"pip install worstgroup\[umap\]"):
        plan_tiny("dfr+exmap", exmap__clustering="umap")
    assert plan_tiny("dfr+exmap").runs[0].spec is not None
