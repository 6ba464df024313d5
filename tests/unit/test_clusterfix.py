"""ClusterFix: the joint loss of classes and clusters, and what the clusters' weights follow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import ledger, make_card, tiny_task
from torch.nn import functional as F
from toys import batch, net, run_tiny, same, state_of, toy_task, train
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods import bpa
from worstgroup.methods.blocks.class_clusters import numbered, per_class_clusters
from worstgroup.methods.blocks.cluster_weights import EVERY
from worstgroup.methods.clusterfix import ClusterFix, Config, Joint, cluster_losses, with_new_head

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (3, 2, 1, 4)
WIDTH = "worstgroup.methods.blocks.barlow_twins.WIDTH"
PARTITION = np.array([0, 0, 1, 1, 0, 2, 3, 3, 2, 2])
"""Two clusters of each class: 0 and 1 of the first five images, 2 and 3 of the others."""


def made(partition: Any = PARTITION, **config: Any) -> tuple[Joint, Batch]:
    """The objective on a toy network without BatchNorm, and a batch of all ten images."""
    task = toy_task(SIZES, budget="select", norm=False)
    objective = Joint(Config(**config), partition)
    objective.setup(task, net(norm=False))
    return objective, batch(task)


def both_losses(objective: Joint, data: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (B,) of the classes and of the clusters."""
    with torch.no_grad():
        features = objective.model.features(data.x)
        of_class = F.cross_entropy(objective.model.head(features), data.y, reduction="none")
        logits = objective.auxiliary(features)
        return of_class, cluster_losses(logits, data.y, objective.cluster[data.index], objective.class_of)


# ------------------------------------------------------------------------------------------------------------ the loss


def test_a_cluster_is_told_from_those_of_its_class() -> None:
    """As by a classifier for each class, of which an image sees its own."""
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y, cluster, class_of = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 4, 2, 0]), torch.tensor([0, 0, 1, 1, 1])
    found = cluster_losses(logits, y, cluster, class_of)
    own = [F.cross_entropy(logits[i, :2] if y[i] == 0 else logits[i, 2:], cluster[i] - 2 * y[i]) for i in range(4)]
    torch.testing.assert_close(found, torch.stack(own))
    (slope,) = torch.autograd.grad(found.sum(), logits)
    assert slope.isfinite().all()
    assert not slope[0, 2:].any()
    assert not slope[1, :2].any()


def test_a_class_of_one_cluster_loses_nothing() -> None:
    y = torch.tensor([0, 1])
    assert cluster_losses(torch.randn(2, 2), y, y, torch.tensor([0, 1])).tolist() == [0, 0]


@pytest.mark.parametrize("gamma", [0.0, 0.01, 50.0])
def test_the_loss_of_the_first_step(gamma: float) -> None:
    """alpha = omega / sum omega with omega = 1 / N; the task's loss is a sum, the clusters' a mean."""
    objective, data = made(gamma=gamma)
    of_class, of_cluster = both_losses(objective, data)
    omega = 1 / torch.tensor([3.0, 2.0, 3.0, 2.0])[torch.from_numpy(PARTITION)]
    expected = (omega / omega.sum() * of_class).sum() + gamma * of_cluster.mean()
    torch.testing.assert_close(objective.loss(data), expected)
    torch.testing.assert_close(objective.weights.bank, of_class + gamma * of_cluster)


def test_equal_clusters_give_erm_and_the_clusters_loss() -> None:
    objective, data = made(np.array([0, 1, 0, 1, 0, 2, 3, 2, 3, 2]))
    data = Batch(data.x[1:9], data.y[1:9], data.index[1:9])
    objective.weights.omega[:] = 0.3
    of_class, of_cluster = both_losses(objective, data)
    torch.testing.assert_close(objective.loss(data), of_class.mean() + 0.5 * of_cluster.mean())


@pytest.mark.parametrize(("rule", "sizes"), [("eq8", [3.0, 2.0, 3.0, 2.0]), ("alg1", [1.0] * 4)])
def test_what_omega_follows(rule: Any, sizes: list[float]) -> None:
    objective, data = made(gamma=2.0, momentum=0.25, rule=rule)
    first = [1 / size for size in sizes]
    assert objective.weights.omega.tolist() == pytest.approx(first)
    of_class, of_cluster = both_losses(objective, data)
    difficulty = of_class + 2.0 * of_cluster
    means = [difficulty[torch.from_numpy(k == PARTITION)].mean().item() for k in range(4)]
    for _ in range(EVERY):
        objective.loss(data)
    moved = [0.75 * before + 0.25 * mean / size for before, mean, size in zip(first, means, sizes, strict=True)]
    assert objective.weights.omega.tolist() == pytest.approx(moved, rel=1e-5)


def test_one_cluster_a_class_weighs_classes_by_loss_and_size() -> None:
    objective, data = made(np.repeat([0, 1], 5)[[0, 0, 0, 0, 0, 9, 9, 9, 9, 9]], momentum=1.0)
    of_class, _ = both_losses(objective, data)
    for _ in range(EVERY):
        objective.loss(data)
    expected = [of_class[:5].mean().item() / 5, of_class[5:].mean().item() / 5]
    assert objective.weights.omega.tolist() == pytest.approx(expected, rel=1e-5)


def test_weights_have_no_gradient() -> None:
    objective, data = made(gamma=0.3)
    alpha = objective.weights.of(data.index) / 10
    assert alpha.sum().item() == pytest.approx(1)
    (slope,) = torch.autograd.grad(objective.loss(data), objective.model.head.weight)
    logits = objective.model(data.x)
    constant = (alpha * F.cross_entropy(logits, data.y, reduction="none")).sum()
    torch.testing.assert_close(slope, torch.autograd.grad(constant, objective.model.head.weight)[0])


def test_names_of_clusters_do_not_matter() -> None:
    """Renaming clusters within a class, and the columns with them, is a symmetry."""
    first, data = made()
    swap = torch.tensor([1, 0, 3, 2])
    second, _ = made(swap.numpy()[PARTITION])
    with torch.no_grad():
        second.auxiliary.weight.copy_(first.auxiliary.weight[swap])
        second.auxiliary.bias.copy_(first.auxiliary.bias[swap])
    optimizers = [objective.optimizers(Recipe(lr=0.05)) for objective in (first, second)]
    for _ in range(EVERY + 3):
        one, other = (o.step(data, own) for o, own in zip((first, second), optimizers, strict=True))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.weights.omega[swap], second.weights.omega)


# ------------------------------------------------------------------------------------------------------ against others


@pytest.mark.parametrize("momentum", [0.3, 1.0])
def test_without_gamma_it_is_bpa_step_by_step(momentum: float) -> None:
    ours, data = made(gamma=0.0, momentum=momentum)
    theirs = bpa.Reweighted(bpa.Config(momentum=momentum), PARTITION)
    theirs.setup(toy_task(SIZES, budget="select", norm=False), net(norm=False))
    recipe = Recipe(optimizer="adam", lr=0.01, weight_decay=0.01)
    optimizers = ours.optimizers(recipe), theirs.optimizers(recipe)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3 * EVERY):
        index = torch.randperm(10, generator=generator)[:6]
        part = Batch(data.x[index], data.y[index], index)
        assert torch.equal(ours.step(part, optimizers[0]), theirs.step(part, optimizers[1]))
        assert same(state_of(ours.model), state_of(theirs.model))
    assert torch.equal(ours.weights.omega, theirs.weights.omega)
    assert not torch.equal(ours.weights.omega, 1 / ours.weights.sizes)


def test_without_gamma_whole_trainings_are_the_same_bits(tmp_path: Path) -> None:
    ends = []
    objectives: tuple[Any, ...] = (Joint(Config(gamma=0.0), PARTITION), bpa.Reweighted(bpa.Config(), PARTITION))
    for objective in objectives:
        (tmp_path / type(objective).__name__).mkdir()
        model = net("head")  # with dropout: the cluster classifiers disturb no draw
        task = toy_task(SIZES, kind="head")
        train(objective, task, model, Recipe(batch_size=4, epochs=6), tmp_path / type(objective).__name__)
        ends.append(state_of(model))
    assert same(*ends)


# --------------------------------------------------------------------------------------------------------------- whole


def test_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for name, stops in (("straight", (8,)), ("halted", (5, 8))):
        (tmp_path / name).mkdir()
        for epochs in stops:
            model, objective = net(), Joint(Config(), PARTITION)
            train(objective, toy_task(SIZES), model, Recipe(batch_size=4, epochs=epochs), tmp_path / name)
        state = {key: value for key, value in objective.state_dict().items() if key != "steps"}
        ends.append({**state_of(model), **state_of(objective.auxiliary), **state})
    assert same(*ends)


@pytest.mark.parametrize("init", ["erm", "pretrained", "ssl"])
def test_it_starts_from_the_network_that_was_clustered_with_a_new_head(
    init: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WIDTH, 32)
    task, seen = tiny_task("clusterfix", "none"), []
    config = Config(clusters=3, init=init, ssl_epochs=2, ssl_lr=0.01)
    monkeypatch.setattr(task, "train", lambda objective, start: seen.append((objective, start.model)))
    ClusterFix(config).fit(task)
    ((objective, model),) = seen
    clustered, initial = config.network(task).model, task.initial().model
    assert same(state_of(model.trunk), state_of(clustered.trunk))
    assert same(state_of(model.head), state_of(initial.head))
    assert same(state_of(model.trunk), state_of(initial.trunk)) == (init == "pretrained")
    assert np.array_equal(objective.partition, numbered(task.y("train"), per_class_clusters(task, config)))
    assert not any(ledger(task).values())


def test_the_network_keeps_its_own_head() -> None:
    task = tiny_task("clusterfix")
    erm = task.erm()
    before = state_of(erm.model)
    with_new_head(task, erm)
    assert same(state_of(erm.model), before)


@pytest.mark.parametrize(
    ("settings", "before"),
    [({"init": "pretrained"}, 0), ({"init": "erm"}, 192), ({"init": "ssl", "ssl_epochs": "3"}, 2 * 3 * 96)],
)
def test_what_it_costs(settings: dict[str, str], before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One training of two epochs beside the network, and a pass over train."""
    monkeypatch.setattr(WIDTH, 32)
    record = run_tiny("clusterfix", **{f"clusterfix__{key}": value for key, value in settings.items()})
    assert record.cost is not None
    assert record.labels is not None
    scratch = record.cost.scratch
    assert (scratch.n_fwd, scratch.n_bwd, scratch.n_fwd_nograd) == (192 + before, 192 + before, 96)
    assert (record.labels.n_train_a, record.labels.n_val_a_fit, record.labels.n_y_extra) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"gamma": -0.1}, "clusterfix.gamma must be at least 0, got -0.1"),
        ({"clusters": 0}, "clusterfix.clusters must be at least 1, got 0"),
        ({"momentum": 0.0}, r"clusterfix.momentum must be in \(0, 1\], got 0.0"),
        ({"ssl_epochs": -1}, "clusterfix.ssl_epochs must be at least 0, got -1"),
        ({"ssl_lr": 0.0}, "clusterfix.ssl_lr must be positive, got 0.0"),
        ({"cap": 0.5}, "clusterfix.cap must be 0 or at least 1, got 0.5"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("clusterfix", **{f"clusterfix__{key}": str(value)})


@pytest.mark.parametrize("config", [{"init": "dino"}, {"rule": "eq9"}])
def test_unknown_choices_are_refused(config: dict[str, Any]) -> None:
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=f"clusterfix.{key} must be .*, got '{value}'"):
        Config(**config)


def test_features_have_no_views() -> None:
    card = replace(make_card(), name="embeddings:mine", image=(1, 1, 512))
    Config(init="erm").check(Recipe(), card)
    with pytest.raises(UserError, match=r"clusterfix.init: embeddings:mine has no images; take erm or pretrained"):
        Config(init="ssl").check(Recipe(), card)


def test_what_is_searched() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {
        "clusters": "{8,4,16}",
        "init": "{pretrained,ssl}",
        "gamma": "{0.5,0.01,0.1,1,10,50}",
    }
