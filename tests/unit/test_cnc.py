"""CnC: what a contrastive set is made of, and the loss that contrasts it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plan_tiny
from stubs import ledger, tiny_task
from torch import Tensor
from torch.nn import functional as F
from toys import images, net, run_tiny, same, state_of, toy_task, train
from worstgroup.benchmark.backbones import Backbone
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Task
from worstgroup.methods.cnc import CnC, Config, Contrast, contrastive_loss, contrastive_sets, slices

pytestmark = pytest.mark.usefixtures("tiny")
Y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
P = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0])
"""Labels and predictions: 0-2 and 4-6 are right, 3 is a 0 taken for 1, 7 and 8 are 1s taken for 0."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_task(pretrained: bool = False, sizes: tuple[int, ...] = (4, 0, 0, 5)) -> Task:
    """A task with the labels of `Y`."""
    task = toy_task(sizes)
    weights = "imagenet1k_v1" if pretrained else "none"
    task.spec = replace(task.spec, block=replace(task.spec.block, weights=weights))
    return task


def made(pretrained: bool = False, **config: Any) -> tuple[Contrast, Batch]:
    """The objective on a toy network, and a batch of three sets."""
    objective = Contrast(Config(**config), Y, P)
    objective.setup(as_task(pretrained), net())
    index = contrastive_sets(objective.slices, P, objective.config.parts, 3, generator()).flatten()
    return objective, Batch(images(len(index)), Y[index], index)


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize(("positives", "negatives"), [(1, 1), (4, 4), (2, 7), (17, 17)])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_identical_embeddings(positives: int, negatives: int, tau: float) -> None:
    one = F.normalize(torch.randn(1, 6, generator=generator()), dim=1)
    loss = contrastive_loss(one.expand(3, -1), one.expand(3, positives, -1), one.expand(3, negatives, -1), tau)
    assert loss.item() == pytest.approx(math.log(positives + negatives), rel=1e-5)


def test_the_loss_is_that_of_its_formula() -> None:
    tau, sets = 0.3, []
    anchors, positives, negatives = (
        F.normalize(torch.randn(2, *shape, generator=generator(len(shape) + sum(shape))), dim=-1)
        for shape in ((5,), (3, 5), (4, 5))
    )
    for a, ps, ns in zip(anchors, positives, negatives, strict=True):
        near = [math.exp(float(a @ p) / tau) for p in ps]
        far = [math.exp(float(a @ n) / tau) for n in ns]
        sets.append(-sum(math.log(e / (sum(near) + sum(far))) for e in near) / len(near))
    assert contrastive_loss(anchors, positives, negatives, tau).item() == pytest.approx(sum(sets) / 2, rel=1e-5)


def test_extremes_of_the_loss() -> None:
    a, b = torch.eye(2)
    far = contrastive_loss(a[None], a.expand(1, 3, 2), -a.expand(1, 2, 2), 0.01)
    assert far.item() == pytest.approx(math.log(3), rel=1e-5)  # positives share a softmax
    assert contrastive_loss(a[None], a.expand(1, 1, 2), b.expand(1, 2, 2), 0.01).item() == pytest.approx(0, abs=1e-6)
    assert contrastive_loss(a[None], -a.expand(1, 1, 2), a.expand(1, 1, 2), 0.01).item() == pytest.approx(200)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_the_two_sides_are_summed_and_all_parts_are_classified(weight: float) -> None:
    objective, data = made(weight=weight, tau=0.5, num_anchor=2, num_positive=3, num_negative=1, num_negative_easy=4)
    objective.model.eval()
    features = objective.model.features(data.x)
    cross_entropy = F.cross_entropy(objective.model.head(features), data.y)
    unit = F.normalize(features).view(3, 10, 6)
    first = contrastive_loss(unit[:, 0], unit[:, 2:5], unit[:, 5:6], 0.5)
    second = contrastive_loss(unit[:, 2], unit[:, :2], unit[:, 6:], 0.5)
    expected = (1 - weight) * cross_entropy + weight * (first + second)
    torch.testing.assert_close(objective.loss(data), expected)


def test_features_of_zero_give_finite_losses_and_gradients() -> None:
    objective, data = made()
    features = torch.zeros(48, 6, requires_grad=True)
    objective.model.features = lambda x: features  # type: ignore[method-assign]
    loss = objective.loss(data)
    expected = 0.25 * F.cross_entropy(objective.model.head(features), data.y) + 0.75 * 2 * math.log(8)
    torch.testing.assert_close(loss, expected)
    (slope,) = torch.autograd.grad(loss, features)
    assert slope.isfinite().all()


def test_the_contrast_teaches_the_trunk_and_not_the_classifier() -> None:
    objective, data = made(weight=1.0)
    objective.loss(data).backward()  # type: ignore[no-untyped-call]
    head, trunk = objective.model.head.weight.grad, next(objective.model.trunk.parameters()).grad
    assert head is not None
    assert trunk is not None
    assert not head.any()
    assert trunk.any()


# ------------------------------------------------------------------------------------------------------------ the sets


def test_slices() -> None:
    found = {label: [part.tolist() for part in own] for label, own in slices(Y, P).items()}
    assert found == {0: [[0, 1, 2], [3], [7, 8]], 1: [[4, 5, 6], [7, 8], [3]]}


def test_a_slice_without_errors_falls_back_to_all_images_of_other_classes() -> None:
    found = slices(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0]))
    assert {label: [part.tolist() for part in own] for label, own in found.items()} == {
        0: [[0, 1], [0, 1], [3]],  # of class 0 all are right: any of them is a positive
        1: [[2], [3], [0, 1]],  # nothing is mistaken for class 1: any of class 0 is a negative
    }


def test_a_class_that_is_never_right_has_no_sets() -> None:
    assert list(slices(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 1]))) == [0, 2]


def parted(y: Tensor, p: Tensor, num: int = 60, seed: int = 0) -> list[Tensor]:
    """Anchors, positives, negatives and easy negatives of many sets."""
    sizes = (2, 3, 4, 5)
    sets = contrastive_sets(slices(y, p), p, sizes, num, generator(seed))
    assert sets.shape == (num, 14)
    return list(sets.split(sizes, dim=1))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_what_the_parts_of_a_set_have_in_common(classes: int) -> None:
    y = torch.randint(classes, (200,), generator=generator())
    p = torch.where(
        torch.rand(200, generator=generator()) < 0.6, y, torch.randint(classes, (200,), generator=generator(1))
    )
    anchors, positives, negatives, easy = parted(y, p)
    label = y[anchors[:, :1]]
    assert ((y[anchors] == label) & (p[anchors] == label)).all()
    assert ((y[positives] == label) & (p[positives] != label)).all()
    assert ((y[negatives] != label) & (p[negatives] == label)).all()
    taken_for = p[positives[:, :1]]
    assert ((y[easy] == taken_for) & (p[easy] == taken_for)).all()


def test_every_image_of_a_part_is_drawn_and_classes_take_turns() -> None:
    anchors, positives, negatives, easy = parted(Y, P)
    assert set(anchors.flatten().tolist()) == set(easy.flatten().tolist()) == {0, 1, 2, 4, 5, 6}
    assert set(positives.flatten().tolist()) == set(negatives.flatten().tolist()) == {3, 7, 8}
    assert (Y[anchors[:, 0]].view(-1, 2).sum(1) == 1).all()  # both classes in every round
    assert 5 < Y[anchors[::2, 0]].sum() < 25  # in an order of its own


def test_easy_negatives_are_of_another_class_whatever_the_first_run_says() -> None:
    # 0 is always right, so its positives are right; 1 is never right, and taken for 2
    y, p = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 0, 2, 2, 0, 1])
    anchors, positives, negatives, easy = parted(y, p)
    assert set(y[anchors[:, 0]].tolist()) == {0, 2}
    for part in (negatives, easy):
        assert (y[part] != y[anchors[:, :1]]).all()
    assert (y[positives] == y[anchors[:, :1]]).all()
    assert set(easy[y[anchors[:, 0]] == 0].flatten().tolist()) == {4}  # negatives of the anchors
    taken_for_one = (y[anchors[:, 0]] == 2) & (p[positives[:, 0]] == 1)
    assert set(easy[taken_for_one].flatten().tolist()) == {2}


def test_sets_depend_on_the_generator_alone() -> None:
    first, again, other = (torch.cat(parted(Y, P, seed=seed), 1) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("size", "batch_size", "lengths"),
    [
        (16, 16, [16] * 4 + [16]),
        (16, 32, [32, 32, 16]),
        (16, 24, [16, 16, 16]),  # as many whole sets as fit
        (8, 16, [16] * 4 + [8]),
        (12, 64, [60, 12]),  # a last batch of 6 images: at least one set
    ],
)
def test_an_epoch_has_the_steps_of_erm(size: int, batch_size: int, lengths: list[int]) -> None:
    sizes = (39, 0, 0, 31) if batch_size == 64 else (40, 0, 0, 32)
    task = toy_task(sizes)
    y = torch.from_numpy(task.y("train"))
    p = torch.where(torch.rand(len(y), generator=generator()) < 0.8, y, 1 - y)
    part = size // 4
    objective = Contrast(Config(1, 0.75, 0.1, part, part, part, part), y, p)
    recipe = Recipe(batch_size=batch_size)
    batches = objective.make_sampler(task, recipe)(generator())
    assert [len(index) for index in batches] == lengths
    assert len(batches) == -(-len(y) // batch_size)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_pretrained_network_keeps_its_statistics(pretrained: bool, tmp_path: Path) -> None:
    model = net()
    before = state_of(model)
    objective = Contrast(Config(), Y, P)
    cost = train(objective, as_task(pretrained), model, Recipe(optimizer="adam", batch_size=16, epochs=2), tmp_path)
    changed = {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}
    statistics = {"trunk.1.running_mean", "trunk.1.running_var", "trunk.1.num_batches_tracked"}
    assert changed & statistics == (set() if pretrained else statistics)
    assert {"trunk.0.weight", "trunk.1.weight", "head.weight"} <= changed
    assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.n_updates) == (32, 32, 0, 2)  # once an image


def test_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for name, stops in (("straight", (3,)), ("halted", (1, 3))):
        (tmp_path / name).mkdir()
        for epochs in stops:
            model: Backbone = net()
            objective = Contrast(Config(), Y, P)
            train(objective, as_task(), model, Recipe(batch_size=16, epochs=epochs), tmp_path / name)
        ends.append(state_of(model))
    assert same(*ends)


def test_both_runs_and_their_cost() -> None:
    record = run_tiny("cnc")
    assert record.cost is not None
    assert record.labels is not None
    n, epochs = 96, 2
    marginal, scratch = record.cost.marginal, record.cost.scratch
    assert (marginal.n_fwd, marginal.n_bwd, marginal.n_fwd_nograd) == (n * epochs, n * epochs, n)
    assert scratch.n_fwd == n * epochs + n  # and one epoch of the shared ERM
    assert marginal.n_updates == epochs * n // 16
    assert (record.labels.n_train_a, record.labels.n_val_a_fit, record.labels.n_y_extra) == (0, 0, 0)


def test_the_first_run_is_the_shared_erm_after_so_many_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("cnc", "none")
    seen: list[Any] = []
    monkeypatch.setattr(task, "train", lambda objective, stage: seen.append((objective, stage)))
    CnC(Config(first_epochs=2)).fit(task)
    ((objective, stage),) = seen
    assert stage == "second"
    assert torch.equal(objective.predicted, task.logits(task.erm(2), "train").argmax(1))
    assert not any(ledger(task).values())


@pytest.mark.parametrize(("right", "says"), [(True, "makes no training error"), (False, "every training image wrong")])
def test_a_first_run_without_contrast_is_an_error(right: bool, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("cnc")
    y = torch.from_numpy(task.y("train"))
    monkeypatch.setattr(task, "logits", lambda checkpoint, split: F.one_hot(y if right else 1 - y, 2).float())
    with pytest.raises(UserError, match=f"cnc: the first run .*{says}"):
        CnC(Config()).fit(task)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"first_epochs": 0}, "cnc.first_epochs must be at least 1, got 0"),
        ({"weight": 1.1}, r"cnc.weight must be in \[0, 1\], got 1.1"),
        ({"tau": 0.0}, "cnc.tau must be positive, got 0.0"),
        ({"num_anchor": 0}, "cnc.num_anchor must be at least 1, got 0"),
        ({"num_positive": 0}, "cnc.num_positive must be at least 1"),
        ({"num_negative": 0}, "cnc.num_negative must be at least 1"),
        ({"num_negative_easy": 0}, "cnc.num_negative_easy must be at least 1"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("cnc", **{f"cnc__{key}": str(value)})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cnc__first_epochs": "3"}, "cnc.first_epochs must be at most the recipe's 2 epochs"),
        ({"cnc__num_anchor": "5"}, "a set of 17 images exceeds the batch of 16"),
        ({"recipe__batch_size": "15"}, "a set of 16 images exceeds the batch of 15"),
    ],
)
def test_values_that_do_not_fit_the_recipe_are_refused(settings: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan_tiny("cnc", **settings)


def test_what_is_searched() -> None:
    assert {name: (search.text, search.of) for name, search in ranges(Config).items()} == {
        "first_epochs": ("U(0.2,0.8)", "epochs"),
        "weight": ("U(0,1)", ""),
        "tau": ("10^U(-2,0)", ""),
    }
