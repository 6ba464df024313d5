"""DivDis: heads that are independent where there are no labels, and the one that a few labels choose."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import ledger, tiny_task
from torch import Tensor, nn
from torch.nn import functional as F
from toys import images, net, run_tiny, same, state_of, toy_task
from worstgroup.benchmark.backbones import Backbone
from worstgroup.benchmark.data import Batch, random_order
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Predictor, Task
from worstgroup.methods.divdis import (
    Config,
    DivDis,
    Diverse,
    divergence,
    most_disputed,
    mutual_information,
    one_head,
    with_more_heads,
    with_targets,
)

pytestmark = pytest.mark.usefixtures("tiny")
TRAIN, VAL, EPOCHS = 96, 48, 2
BATCH = 6


def confident(*classes: list[int], num: int = 2) -> Tensor:
    """Predictions (B, H, K) of heads that are sure of these classes."""
    return F.one_hot(torch.tensor(classes).T, num).float()


def made(norm: bool = True, **config: Any) -> tuple[Diverse, Batch]:
    """The objective on a toy network of three classes, and a batch of 6 train and 6 validation images."""
    objective = Diverse(Config(**config), BATCH)
    model = net(classes=3, norm=norm)
    torch.manual_seed(0)
    model.head = with_more_heads(model.head, objective.config.heads)
    nn.init.normal_(model.head.weight, std=3.0)  # predictions differ from image to image
    objective.setup(toy_task((2,) * 9, classes=3, budget="none"), model)
    y = torch.cat([torch.arange(BATCH) % 3, torch.full((BATCH,), -1)])
    return objective, Batch(images(2 * BATCH), y, torch.arange(2 * BATCH))


def gradients(objective: Diverse, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(objective.model.parameters()), retain_graph=True))


# -------------------------------------------------------------------------------------------------- mutual information


@pytest.mark.parametrize(
    ("p", "value"),
    [
        (confident([0, 0, 1, 1], [0, 0, 1, 1]), math.log(2)),  # identical
        (confident([0, 0, 1, 1], [1, 1, 0, 0]), math.log(2)),  # opposite
        (confident([0, 0, 1, 1], [0, 1, 0, 1]), 0.0),  # independent
        (confident([0, 0, 0, 0], [0, 1, 0, 1]), 0.0),  # one is constant
        (torch.full((4, 2, 2), 0.5), 0.0),
        (torch.tensor([0.3, 0.7]).expand(4, 2, 2), 0.0),
        (confident([0, 1, 2], [0, 1, 2], num=3), math.log(3)),
        (confident([0, 1, 2], [1, 2, 0], num=3), math.log(3)),
        (confident([0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1]), math.log(2) / 3),  # one pair of three
        (confident([0, 1, 0, 1]), 0.0),  # no pair
    ],
)
def test_mutual_information(p: Tensor, value: float) -> None:
    p = p.clone().requires_grad_()
    found = mutual_information(p)
    assert found.item() == pytest.approx(value, abs=1e-6)
    (slope,) = torch.autograd.grad(found, p, allow_unused=True)
    assert slope is None or slope.isfinite().all()


def test_mutual_information_is_that_of_the_joint_table() -> None:
    p = torch.randn(9, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(2)
    total = 0.0
    for h, other in ((0, 1), (0, 2), (1, 2)):
        joint = np.mean([np.outer(a, b) for a, b in zip(p[:, h].numpy(), p[:, other].numpy(), strict=True)], axis=0)
        total += float((joint * np.log(joint / np.outer(joint.sum(1), joint.sum(0)))).sum())
    assert mutual_information(p).item() == pytest.approx(total / 3)


def test_divergence_from_the_source_marginal() -> None:
    q = torch.tensor([0.5, 0.5])
    assert divergence(torch.stack([q, q]), q).item() == 0
    assert divergence(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), q).item() == pytest.approx(math.log(2) / 2)
    assert divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0])).item() == pytest.approx(-math.log(1e-12))


# ------------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_sum_of_three_terms() -> None:
    objective, data = made(heads=3, lambda1=0.5, lambda2=2.0)
    reference, _ = made(heads=3)
    z, targets = (reference.model(x).view(BATCH, 3, 3) for x in data.x.chunk(2))  # one pass of each
    q = targets.softmax(2)
    ce = sum(F.cross_entropy(z[:, h], data.y[:BATCH]).item() for h in range(3)) / 3
    mi, kl = mutual_information(q).item(), divergence(q.mean(0), z.softmax(2).mean((0, 1))).item()
    assert min(mi, kl) > 1e-3
    assert objective.loss(data).item() == pytest.approx(ce + 0.5 * mi + 2.0 * kl, rel=1e-6)


def test_batchnorm_sees_both_kinds_of_images_together_on_request() -> None:
    (apart, data), (joint, _) = made(), made(joint_batches=True)
    assert apart.loss(data).item() != joint.loss(data).item()
    (apart, data), (joint, _) = made(norm=False), made(norm=False, joint_batches=True)
    assert apart.loss(data).item() == pytest.approx(joint.loss(data).item(), rel=1e-6)


def test_the_source_marginal_has_no_gradient() -> None:
    objective, data = made(norm=False, lambda1=0.0, lambda2=3.0)
    z, targets = (objective.logits(x) for x in data.x.chunk(2))
    fixed = z.detach().softmax(2).mean((0, 1))
    expected = objective.cross_entropy(z, data.y[:BATCH]) + 3.0 * divergence(targets.softmax(2).mean(0), fixed)
    for found, slope in zip(gradients(objective, objective.loss(data)), gradients(objective, expected), strict=True):
        torch.testing.assert_close(found, slope)


def test_labels_of_targets_do_not_enter() -> None:
    objective, data = made()
    before = objective.loss(data).item()
    other = torch.cat([data.y[:BATCH], torch.arange(BATCH) % 3])
    objective, _ = made()
    assert objective.loss(Batch(data.x, other, data.index)).item() == before


def test_without_weights_every_head_is_an_erm() -> None:
    objective, data = made(norm=False, heads=3, lambda1=0.0, lambda2=0.0)
    assert not objective.config.uses_targets
    own = Batch(data.x[:BATCH], data.y[:BATCH], data.index[:BATCH])
    z = objective.logits(own.x)
    losses = [F.cross_entropy(z[:, h], own.y) for h in range(3)]
    assert objective.loss(own).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    head, slopes = objective.model.head.weight, []
    for h, loss in enumerate(losses):
        (slope,) = torch.autograd.grad(loss, head, retain_graph=True)
        slopes.append(slope[3 * h : 3 * h + 3])
        assert not slope.abs().sum(1).view(3, 3).sum(1)[torch.arange(3) != h].any()
    (found,) = torch.autograd.grad(objective.loss(own), head)
    torch.testing.assert_close(found, torch.cat(slopes) / 3)


def test_one_head_is_erm_and_a_divergence() -> None:
    objective, data = made(norm=False, heads=1, lambda1=100.0, lambda2=2.0)
    z, targets = (objective.model(x).softmax(1).mean(0) for x in data.x.chunk(2))
    plain = F.cross_entropy(objective.model(data.x[:BATCH]), data.y[:BATCH]).item()
    assert objective.loss(data).item() == pytest.approx(plain + 2 * divergence(targets[None], z).item(), rel=1e-6)
    assert Config(heads=1, lambda2=1.0).uses_targets
    assert not Config(heads=1, lambda2=0.0).uses_targets


def test_terms_are_in_float32_where_autocast_is_on() -> None:
    objective, data = made()
    with torch.autocast("cpu", torch.bfloat16):
        assert objective.logits(data.x).dtype == objective.loss(data).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("n", "m"), [(50, 7), (50, 49), (10, 30)])
def test_a_batch_is_erms_and_as_many_targets(n: int, m: int) -> None:
    recipe = Recipe(batch_size=8)
    source = random_order(n, recipe)
    batches = with_targets(source, n, n + m)(torch.Generator().manual_seed(1))
    expected = source(torch.Generator().manual_seed(1))
    assert len(batches) == len(expected)
    for batch, own in zip(batches, expected, strict=True):
        assert torch.equal(batch[: len(own)], own)
        assert len(batch) == 2 * len(own)
    targets = torch.cat([batch[len(batch) // 2 :] for batch in batches]) - n
    assert (targets.min() >= 0, targets.max() < m) == (True, True)
    counts = targets.bincount(minlength=m)
    assert counts.max() - counts.min() <= 1


def test_targets_come_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = tiny_task("divdis"), []
    loss = Diverse.loss

    def note(self: Diverse, batch: Batch) -> Tensor:
        seen.append(batch)
        return loss(self, batch)

    monkeypatch.setattr(Diverse, "loss", note)
    DivDis(Config()).fit(task)
    assert len(seen) == EPOCHS * TRAIN // 16
    for batch in seen:
        (_, y), (own, others) = batch.y.chunk(2), batch.index.chunk(2)
        assert (y == -1).all()
        assert own.max() < TRAIN <= others.min()


# --------------------------------------------------------------------------------------------------------------- heads


def test_the_first_head_is_the_given_one() -> None:
    first = nn.Linear(5, 3)
    heads = with_more_heads(first, 3)
    x = images().flatten(1)[:, :5]
    assert heads.out_features == 9
    for h in range(3):
        torch.testing.assert_close(one_head(heads, h, 3)(x), heads(x)[:, 3 * h : 3 * h + 3])
    assert same(state_of(one_head(heads, 0, 3)), state_of(first))
    assert len({tuple(row.tolist()) for row in heads.weight}) == 9


def test_disputed_images() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.2, 0.3], [0.1, 0.9]])
    both = torch.stack([p, 1 - p], 2)
    assert most_disputed(both, 2).tolist() == [1, 4]
    assert most_disputed(both, 3).tolist() == [1, 3, 4]
    assert most_disputed(both, 4).tolist() == [0, 1, 3, 4]
    assert most_disputed(both, 99).tolist() == [0, 1, 2, 3, 4]
    assert most_disputed(both[:, :1], 2).tolist() == [0, 1]  # one head disputes nothing
    three = torch.stack([torch.tensor([[0.5, 0.5, 0.9], [0.1, 0.5, 0.9]])] * 2, 2)
    assert most_disputed(three, 1).tolist() == [1]


# ---------------------------------------------------------------------------------------------------------------- runs


def fitted(task: Task, **config: Any) -> tuple[Predictor, Backbone]:
    predictor = DivDis(Config(**config)).fit(task)
    return predictor, predictor.checkpoint.model


def test_one_head_without_weights_is_erm_bit_for_bit() -> None:
    task = tiny_task("divdis", recipe__augment="flip")
    predictor, model = fitted(task, heads=1, lambda2=0.0)
    erm = task.erm().model
    assert same(state_of(model), state_of(erm))
    assert predictor.head is not None
    assert same(state_of(predictor.head), state_of(erm.head))
    assert predictor.trajectory is None


def test_trunks_start_alike_and_further_heads_are_the_blocks() -> None:
    starts = []
    for seed in range(2):
        torch.manual_seed(seed)
        task = tiny_task("divdis")
        (start,) = starting(task)
        starts.append(start)
    first, second = starts
    assert same(first, second)
    assert torch.equal(first.pop("head")[:2], task.initial().model.head.weight)
    assert same(first, state_of(task.initial().model.trunk))


def starting(task: Task) -> list[dict[str, Tensor]]:
    """Weights of the trunk and of the heads with which the training starts."""
    found = []

    class Stop(Exception):
        """The training has begun."""

    def note(objective: Diverse, model: Backbone, stage: str) -> None:
        found.append({**state_of(model.trunk), "head": model.head.weight.detach().clone()})
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "train_network", lambda self, *arguments: note(*arguments))
        with pytest.raises(Stop):
            DivDis(Config()).fit(task)
    return found


@pytest.mark.parametrize("budget", ["none", "select"])
def test_the_head_is_the_best_one_by_the_rungs_rule(budget: str) -> None:
    task = tiny_task("divdis", budget)
    predictor, model = fitted(task, heads=4)
    logits = task.logits(predictor.checkpoint, "val").view(VAL, 4, 2)
    rows = most_disputed(logits.softmax(2), 16) if budget == "none" else None
    scores = [task.selector(rows)(logits[:, h].argmax(1).numpy()) for h in range(4)]
    best = scores.index(max(scores))
    assert predictor.head is not None
    assert same(state_of(predictor.head), state_of(one_head(model.head, best, 2)))
    assert (predictor.choice.value, predictor.choice.candidates) == (max(scores)[0], 4)


@pytest.mark.parametrize(
    ("budget", "extra", "attributes"), [("none", 16, 0), ("select", 0, 2 * VAL), ("val", 0, 2 * VAL)]
)
def test_only_what_chooses_is_billed(budget: str, extra: int, attributes: int) -> None:
    task = tiny_task("divdis", budget)
    fitted(task)
    used = ledger(task)
    assert (used["n_y_extra"], used["n_val_a_select"]) == (extra, attributes)
    assert used["total_a"] == attributes


def test_more_queries_than_images_are_all_images() -> None:
    task = tiny_task("divdis")
    fitted(task, queries=64)
    assert ledger(task)["n_y_extra"] == VAL


@pytest.mark.parametrize(("settings", "passes"), [({}, 2), ({"lambda1": "0", "lambda2": "0"}, 1)])
def test_what_it_costs(settings: dict[str, str], passes: int) -> None:
    record = run_tiny("divdis", **settings)
    assert record.cost is not None
    marginal, scratch = record.cost.marginal, record.cost.scratch
    assert marginal.n_fwd == marginal.n_bwd == scratch.n_fwd == passes * EPOCHS * TRAIN
    assert marginal.n_fwd_nograd == VAL
    assert marginal.n_updates == EPOCHS * TRAIN // 16


def test_a_source_of_groups_chooses_by_them() -> None:
    record = run_tiny("divdis+exmap")
    assert record.selection is not None
    assert record.labels is not None
    assert record.selection.criterion == "val-pseudo-wga"
    assert (record.labels.n_y_extra, record.labels.total_a) == (0, 0)


# ------------------------------------------------------------------------------------------------------------ settings


def test_ranges_of_the_search() -> None:
    assert {name: search.text for name, search in ranges(Config).items()} == {
        "heads": "{2,4}",
        "lambda1": "{10,0.1,1,100}",
        "lambda2": "{10,1}",
        "queries": "{16,64}",
    }


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"heads": 0}, "divdis.heads must be at least 1, got 0"),
        ({"lambda1": -1.0}, "divdis.lambda1 must be at least 0, got -1.0"),
        ({"lambda2": -1.0}, "divdis.lambda2 must be at least 0, got -1.0"),
        ({"queries": 0}, "divdis.queries must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("divdis", **{f"divdis__{key}": str(value)})
