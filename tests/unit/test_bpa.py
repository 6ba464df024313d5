"""BPA and the source `clusters`: clusters of every class, their weights, and the weighted training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import ledger, tiny_task
from torch import Tensor
from torch.nn import functional as F
from toys import LOGITS, batch, costing, net, run_tiny, same, state_of, toy_task, train
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Task
from worstgroup.methods.blocks.class_clusters import (
    Clustering,
    directions,
    joined_clusters,
    nearest,
    numbered,
    partition,
    per_class_clusters,
)
from worstgroup.methods.blocks.cluster_weights import EVERY, ClusterWeights
from worstgroup.methods.bpa import BPA, Config, Reweighted, sharpened
from worstgroup.methods.groups import clusters

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)
WIDTH = "worstgroup.methods.blocks.barlow_twins.WIDTH"
NINETY = torch.tensor([0] * 90 + [1] * 10)
"""Clusters of 90 and 10 images; a batch of nine and one has the same shares."""
NINE_TO_ONE = torch.tensor([*range(9), 95])


def filled(cluster: Tensor, losses: Tensor, momentum: float = 1.0, **options: Any) -> ClusterWeights:
    """Weights after one update with these losses of all images."""
    weights = ClusterWeights(cluster, momentum=momentum, **options)
    weights.bank[:] = losses
    weights.update()
    return weights


def ninety(losses: tuple[float, float], **options: Any) -> ClusterWeights:
    return filled(NINETY, torch.tensor(losses)[NINETY], **options)


# ---------------------------------------------------------------------------------------------------------- the weights


def test_small_and_hard_clusters_weigh_more() -> None:
    """N = (90, 10), losses (0.1, 0.9): a ratio of 81, and 1/9 and 9 in a batch of nine to one."""
    weights = ninety((0.1, 0.9))
    assert (weights.omega[1] / weights.omega[0]).item() == pytest.approx(81)
    assert weights.of(NINE_TO_ONE).tolist() == pytest.approx([1 / 9] * 9 + [9])


def test_without_the_size_the_ratio_is_that_of_the_losses() -> None:
    weights = ninety((0.1, 0.9), by_size=False)
    assert (weights.omega[1] / weights.omega[0]).item() == pytest.approx(9)


def test_equal_sizes_and_losses_weigh_the_same() -> None:
    cluster = torch.arange(20) % 4
    weights = filled(cluster, torch.full((20,), 0.7), momentum=0.3)
    assert weights.of(torch.arange(7)).tolist() == pytest.approx([1] * 7)


def test_one_cluster_a_class_and_equal_losses_weigh_like_rwy() -> None:
    y = torch.tensor([0] * 6 + [1] * 2)
    found = filled(y, torch.full((8,), 0.4)).of(torch.arange(8))
    inverse = 1 / y.bincount()[y].float()
    torch.testing.assert_close(found, inverse / inverse.mean())


def test_weights_have_mean_one_in_every_batch() -> None:
    weights = filled(torch.arange(30) % 7, torch.rand(30, generator=torch.Generator().manual_seed(0)))
    for index in torch.randperm(30, generator=torch.Generator().manual_seed(1)).split(4):  # type: ignore[no-untyped-call]
        assert weights.of(index).mean().item() == pytest.approx(1, rel=1e-5)


def test_omega_moves_by_its_momentum_from_the_inverse_sizes() -> None:
    weights = ninety((0.1, 0.9), momentum=0.3)
    expected = [0.7 / 90 + 0.3 * 0.1 / 90, 0.7 / 10 + 0.3 * 0.9 / 10]
    assert weights.omega.tolist() == pytest.approx(expected)
    weights.update()
    assert weights.omega.tolist() == pytest.approx([0.7 * expected[0] + 0.3 * 0.1 / 90, 0.7 * expected[1] + 0.3 * 0.09])
    plain = ClusterWeights(NINETY, momentum=0.3, by_size=False)
    assert plain.omega.tolist() == [1, 1]


def test_nothing_moves_until_every_image_has_been_seen_and_then_every_ten_steps() -> None:
    weights = ClusterWeights(torch.tensor([0, 0, 0, 1]), momentum=1.0)
    first = weights.omega.clone()
    for _ in range(2 * EVERY):
        weights.remember(torch.tensor([0, 1, 2]), torch.ones(3))
    assert torch.equal(weights.omega, first)
    weights.remember(torch.tensor([3]), torch.tensor([5.0]))
    for _ in range(EVERY - 2):
        weights.remember(torch.tensor([0]), torch.tensor([4.0]))
    assert torch.equal(weights.omega, first)
    weights.remember(torch.tensor([1]), torch.tensor([1.0]))
    assert weights.omega.tolist() == pytest.approx([2 / 3, 5.0])  # (4 + 1 + 1) / 3 / 3, and 5 / 1


def test_a_cap_bounds_omega() -> None:
    cluster = torch.tensor([0] * 99 + [1])
    losses = torch.ones(100)
    free, capped = filled(cluster, losses), filled(cluster, losses, cap=1.5)
    assert (free.of(torch.tensor([0, 99])) / free.of(torch.tensor([0, 99]))[0]).tolist() == pytest.approx([1, 99])
    mean = (1 / 99 + 1) / 2
    ratio = capped.of(torch.tensor([0, 99]))
    assert (ratio[1] / ratio[0]).item() == pytest.approx(1.5 * mean * 99)


def test_weights_are_finite_where_nothing_is_lost() -> None:
    assert filled(NINETY, torch.zeros(100)).of(NINE_TO_ONE).tolist() == [0] * 10


def test_weights_carry_no_gradient() -> None:
    weights = ClusterWeights(NINETY, momentum=0.3)
    weights.remember(NINE_TO_ONE, torch.ones(10, requires_grad=True) * 2)
    assert not weights.bank.requires_grad
    assert not weights.of(NINE_TO_ONE).requires_grad


def test_the_number_of_a_cluster_does_not_matter() -> None:
    cluster, losses = torch.arange(40) % 5 // 2, torch.rand(40, generator=torch.Generator().manual_seed(0))
    renamed = torch.tensor([2, 0, 1])[cluster]
    torch.testing.assert_close(filled(cluster, losses).of(torch.arange(9)), filled(renamed, losses).of(torch.arange(9)))


def test_the_released_rule_sharpens() -> None:
    """u = (1/9, ..., 9): w = u exp(0.05 u) over its mean."""
    found = sharpened(torch.tensor([1 / 9] * 9 + [9.0]))
    raw = [1 / 9 * np.exp(0.05 / 9)] * 9 + [9 * np.exp(0.45)]
    assert found.tolist() == pytest.approx([10 * value / sum(raw) for value in raw])
    assert sharpened(torch.ones(5)).tolist() == pytest.approx([1] * 5)


# --------------------------------------------------------------------------------------------------------- the training


def on_logits(config: Config, y: list[int], cluster: list[int]) -> Reweighted:
    """The objective for batches of `costing`."""
    objective = Reweighted(config, np.array(cluster))
    sizes = np.bincount(y, minlength=2)
    objective.setup(toy_task((int(sizes[0]), 0, 0, int(sizes[1]))), LOGITS)
    return objective


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_losses_weigh_by_the_inverse_size_at_first(rule: Any) -> None:
    objective = on_logits(Config(rule=rule), [0, 0, 0, 1], [0, 0, 0, 1])
    loss = objective.loss(costing([1.0, 2.0], [0, 1], [0, 3]))
    weights = torch.tensor([0.5, 1.5])
    weights = weights if rule == "paper" else sharpened(weights)
    assert loss.item() == pytest.approx((weights * torch.tensor([1.0, 2.0])).mean().item(), rel=1e-5)
    assert objective.weights.bank.tolist() == pytest.approx([1, -1, -1, 2], rel=1e-5)


def test_a_step_is_weighted_by_what_was_lost_before() -> None:
    objective = on_logits(Config(momentum=1.0), [0, 0, 1, 1], [0, 1, 2, 2])
    for _ in range(EVERY):
        objective.loss(costing([1.0, 2.0, 3.0, 5.0], [0, 0, 1, 1]))
    assert objective.weights.omega.tolist() == pytest.approx([1, 2, 2], rel=1e-5)
    loss = objective.loss(costing([9.0, 1.0], [0, 0], [0, 1]))
    assert loss.item() == pytest.approx((2 / 3 * 9 + 4 / 3 * 1) / 2, rel=1e-5)


def test_one_cluster_of_all_is_erm() -> None:
    """Steps of one cluster have weight 1, whatever its loss."""
    objective, data = made(np.zeros(10, np.int64))
    for _ in range(12):
        loss = objective.loss(data)
    torch.testing.assert_close(loss, F.cross_entropy(objective.model(data.x), data.y))


def made(cluster: Any = None, **config: Any) -> tuple[Reweighted, Batch]:
    """The objective on a toy network without BatchNorm, and a batch of all ten images."""
    task = toy_task(SIZES, budget="select", norm=False)
    objective = Reweighted(Config(**config), np.arange(10) % 4 if cluster is None else cluster)
    objective.setup(task, net(norm=False))
    return objective, batch(task)


def test_the_state_survives_a_restart() -> None:
    first, data = made()
    optimizers = first.optimizers(Recipe(lr=0.01))
    for _ in range(EVERY + 3):
        first.step(data, optimizers)
    second, _ = made()
    second.model.load_state_dict(first.model.state_dict())
    assert second.loss(data).item() != first.loss(data).item()
    second.load_state_dict(first.state_dict())
    assert second.weights.steps == first.weights.steps
    assert second.loss(data).item() == first.loss(data).item()


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_a_training_goes_on_to_the_same_bits(rule: Any, tmp_path: Path) -> None:
    ends = []
    for name, stops in (("straight", (8,)), ("halted", (5, 8))):
        (tmp_path / name).mkdir()
        for epochs in stops:
            model = net()
            objective = Reweighted(Config(rule=rule), np.arange(10) % 4)
            train(objective, toy_task(SIZES), model, Recipe(batch_size=4, epochs=epochs), tmp_path / name)
        assert objective.weights.steps == 24
        ends.append({**state_of(model), **{k: v for k, v in objective.state_dict().items() if k != "steps"}})
    assert same(*ends)


def test_both_runs_and_their_cost() -> None:
    record = run_tiny("bpa")
    assert record.cost is not None
    assert record.labels is not None
    marginal, scratch = record.cost.marginal, record.cost.scratch
    assert (marginal.n_fwd, marginal.n_bwd, marginal.n_fwd_nograd, marginal.n_updates) == (192, 192, 96, 12)
    assert scratch.n_fwd == 2 * 192  # and the shared ERM
    assert (record.labels.n_train_a, record.labels.n_val_a_fit, record.labels.n_y_extra) == (0, 0, 0)


def test_it_trains_on_the_clusters_of_erm_from_the_initial_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = tiny_task("bpa", "none"), []
    monkeypatch.setattr(task, "train", lambda objective, stage: seen.append(objective))
    BPA(Config(clusters=3)).fit(task)
    points = directions(task, task.erm(), "train")
    seed = int(task.rng("class clusters").integers(2**31))
    expected = numbered(task.y("train"), partition(points, task.y("train"), 3, seed))
    assert np.array_equal(seen[0].partition, expected)
    assert not any(ledger(task).values())


# --------------------------------------------------------------------------------------------------------- the clusters


def around(centres: list[list[float]], n: int, seed: int = 0) -> Any:
    """n unit vectors around each direction."""
    points = np.repeat(np.array(centres), n, axis=0)
    points = points + 0.05 * np.random.default_rng(seed).standard_normal(points.shape)
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def test_every_class_has_clusters_of_its_own() -> None:
    points = around([[1, 0], [0, 1], [1, 0], [-1, 0]], 6)
    y = np.repeat([0, 0, 1, 1], 6)
    assert partition(points, y, 2, seed=0).tolist() == [0] * 6 + [1] * 6 + [0] * 6 + [1] * 6
    assert numbered(y, partition(points, y, 2, seed=0)).tolist() == np.repeat([0, 1, 2, 3], 6).tolist()


def test_a_class_with_few_images_or_copies_has_fewer_clusters() -> None:
    points = np.concatenate([around([[1, 0], [0, 1]], 10), around([[1, 0]], 3), np.full((7, 2), 0.5**0.5, np.float32)])
    y = np.repeat([0, 1, 2], [20, 3, 7])
    cluster = partition(points, y, 8, seed=0)
    assert [len(np.unique(cluster[y == label])) for label in range(3)] == [8, 3, 1]
    assert np.array_equal(np.unique(numbered(y, cluster)), np.arange(12))


def test_the_length_of_features_does_not_matter() -> None:
    task = tiny_task("bpa")
    points = directions(task, task.erm(), "train")
    assert np.linalg.norm(points, axis=1) == pytest.approx(np.ones(96), rel=1e-5)


def test_validation_joins_the_nearest_mean_of_its_class() -> None:
    members = around([[1, 0], [0, 1], [0, 1], [-1, 0]], 5)
    label, cluster = np.repeat([0, 0, 1, 1], 5), np.repeat([0, 1, 0, 1], 5)
    points = around([[1, 0], [0, 1], [-1, 0]], 2)
    found = nearest(points, np.array([0, 1, 0, 1, 1, 2]), members, label, cluster)
    assert found.tolist() == [0, 0, 1, 0, 1, 0]  # class 2 has no member


def test_members_are_nearest_to_their_own_mean() -> None:
    task = tiny_task("bpa")
    points, y = directions(task, task.erm(), "train"), task.y("train")
    cluster = per_class_clusters(task, Clustering(4))
    assert (nearest(points, y, points, y, cluster) == cluster).mean() > 0.95


@pytest.mark.parametrize("init", ["erm", "pretrained", "ssl"])
def test_which_network_is_clustered(init: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WIDTH, 32)
    task = tiny_task("groupdro")
    settings = Clustering(4, init, ssl_epochs=2, ssl_lr=0.01)
    network = {"erm": task.erm, "pretrained": task.initial, "ssl": lambda: settings.network(task)}[init]()
    assert same(state_of(settings.network(task).model), state_of(network.model))
    points, y = directions(task, network, "train"), task.y("train")
    expected = partition(points, y, 4, int(task.rng("class clusters").integers(2**31)))
    assert np.array_equal(per_class_clusters(task, settings), expected)
    val = joined_clusters(task, settings)
    assert np.array_equal(val, nearest(directions(task, network, "val"), task.y("val"), points, y, expected))
    assert not any(ledger(task).values())


def test_clusters_are_shared_by_the_runs_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny_task("groupdro+clusters", "none")
    found = {split: first.attributes(split).values for split in ("train", "val")}  # type: ignore[arg-type]
    monkeypatch.setattr(Task, "features", None)
    for method in ("dfr+clusters", "erm+clusters"):
        other = tiny_task(method, "none")
        for split, values in found.items():
            assert np.array_equal(other.attributes(split).values, values)  # type: ignore[arg-type]
    assert np.array_equal(per_class_clusters(tiny_task("bpa"), Clustering()), found["train"][:, 0])


def test_groups_are_class_and_cluster() -> None:
    task = tiny_task("groupdro+clusters", "none")
    found = task.attributes("train")
    assert found.sizes == (8,)
    groups = task.groups("train")
    assert groups.num == 16
    assert np.array_equal(groups.index, task.y("train") * 8 + found.values[:, 0])


@pytest.mark.parametrize("host", ["groupdro", "dfr", "erm"])
def test_it_feeds_its_hosts(host: str) -> None:
    record = run_tiny(f"{host}+clusters", "none")
    assert record.labels is not None
    assert record.labels.total_a == 0


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"clusters": 0}, "bpa.clusters must be at least 1, got 0"),
        ({"momentum": 0.0}, r"bpa.momentum must be in \(0, 1\], got 0.0"),
        ({"momentum": 1.5}, r"bpa.momentum must be in \(0, 1\], got 1.5"),
        ({"rule": "code"}, "bpa.rule"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match="bpa.rule" if key == "rule" else says):
        plan_tiny("bpa", **{f"bpa__{key}": str(value)})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"clusters": 0}, "clusters.clusters must be at least 1, got 0"),
        ({"init": "dino"}, "clusters.init must be one of erm, pretrained, ssl, got 'dino'"),
        ({"ssl_epochs": -1}, "clusters.ssl_epochs must be at least 0, got -1"),
        ({"ssl_lr": 0.0}, "clusters.ssl_lr must be positive, got 0.0"),
    ],
)
def test_bad_values_of_the_source_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        clusters.Config(**config)


def test_what_is_searched() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {
        "clusters": "{8,4,16}",
        "momentum": "{0.3,0.1,1}",
    }
