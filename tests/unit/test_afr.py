"""AFR: which images weigh how much, the descent from ERM's head, and what the two stages train on."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from numpy.typing import NDArray
from stubs import ledger, make_card, make_task, split_of, tiny_task
from torch import Tensor, nn
from torch.nn import functional as F
from toys import run_tiny, same, state_of
from worstgroup.benchmark.annotations import Held
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.home import artifacts_home
from worstgroup.benchmark.lab import Checkpoint
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.task import Choice, Decision, Decisions, Pool, Predictor, Task
from worstgroup.methods.afr import AFR, Config, confidence_weights, descend, erm_of, split_by_class
from worstgroup.methods.cbllr import CBLLR
from worstgroup.methods.cbllr import Config as CBConfig

pytestmark = pytest.mark.usefixtures("tiny")
TRAIN, VAL, EPOCHS = 96, 48, 2
FIRST = 76
"""Images of the first stage: 80 % of the 96, class by class."""


def logits_of(p: list[float], y: Tensor) -> Tensor:
    """Two logits for each image that give its class this probability."""
    own = torch.tensor(p).logit()
    return torch.zeros(len(p), 2).scatter_(1, y[:, None], own[:, None])


def head_of(predictor: Predictor) -> nn.Linear:
    assert isinstance(predictor.head, nn.Linear)
    return predictor.head


# ------------------------------------------------------------------------------------------------------------- weights


def test_the_unsure_weigh_most() -> None:
    y = torch.tensor([1, 1])
    found = confidence_weights(logits_of([0.9, 0.1], y), y, 4.0)
    assert found.tolist() == pytest.approx([0.0392, 0.9608], abs=5e-5)


@pytest.mark.parametrize(("gamma", "p"), [(0.0, [0.9, 0.2, 0.6, 0.5]), (4.0, [0.7] * 4)])
def test_at_equal_confidence_or_without_gamma_classes_are_balanced(gamma: float, p: list[float]) -> None:
    y = torch.tensor([0, 0, 0, 1])
    assert confidence_weights(logits_of(p, y), y, gamma).tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])


def test_a_weight_is_that_of_its_formula() -> None:
    y, p, gamma = torch.tensor([0, 1, 1, 0, 1]), [0.3, 0.8, 0.1, 0.99, 0.5], 7.0
    raw = np.array([5 / n * np.exp(-gamma * value) for n, value in zip([2, 3, 3, 2, 3], p, strict=True)])
    assert confidence_weights(logits_of(p, y), y, gamma).tolist() == pytest.approx(list(raw / raw.sum()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- descent


def problem(n: int = 40, scale: float = 1.0) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A head, features (n, 3), labels that they do not separate, and weights."""
    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    y = torch.arange(n) % 2
    x = scale * (torch.randn(n, 3, generator=draw) + 0.5 * (2 * y[:, None] - 1))
    return head, x, y, confidence_weights(head(x), y, 4.0)


def flat(head: nn.Linear) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in head.parameters()])


def last(config: Config, scale: float = 1.0) -> tuple[nn.Linear, nn.Linear]:
    """ERM's head and the one after all steps."""
    head, *data = problem(scale=scale)
    *_, found = descend(head, *data, config)
    return head, found


def test_a_step_is_that_of_gradient_descent() -> None:
    head, x, y, weights = problem(scale=0.3)
    config = Config(lr=0.1, lam=0.3, steps=2, every=1)
    zero, one, two = descend(head, x, y, weights, config)
    assert same(state_of(zero), state_of(head))
    theta = [head.weight.detach(), head.bias.detach()]
    for found in (one, two):
        residual = weights[:, None] * ((x @ theta[0].T + theta[1]).softmax(1) - F.one_hot(y))
        slopes = [residual.T @ x, residual.sum(0)]
        slopes = [s + 0.6 * (now - then) for s, now, then in zip(slopes, theta, head.parameters(), strict=True)]
        assert torch.cat([s.flatten() for s in slopes]).norm() < 1  # nothing to clip
        theta = [now - 0.1 * s for now, s in zip(theta, slopes, strict=True)]
        torch.testing.assert_close(found.weight.detach(), theta[0])
        torch.testing.assert_close(found.bias.detach(), theta[1])


def test_the_norm_of_a_gradient_is_clipped_at_one() -> None:
    head, found = last(Config(lr=0.1, steps=1), scale=100.0)
    assert (flat(found) - flat(head)).norm().item() == pytest.approx(0.1, rel=1e-5)


def test_without_a_step_it_is_erm() -> None:
    head, x, y, weights = problem()
    (only,) = descend(head, x, y, weights, Config(steps=0))
    assert same(state_of(only), state_of(head))


def test_the_penalty_holds_it_at_erm() -> None:
    distance = []
    for lam in (0.0, 1.0, 10.0, 100.0):
        head, found = last(Config(lam=lam, lr=0.004, steps=400, every=400))
        distance.append((flat(found) - flat(head)).norm().item())
    assert distance == sorted(distance, reverse=True)
    assert distance[3] < 0.02 < distance[0]
    assert distance[2] / distance[3] == pytest.approx(10, rel=0.1)  # as 1 / lambda


@pytest.mark.parametrize(("steps", "every", "candidates"), [(500, 10, 51), (25, 10, 4), (3, 1, 4), (5, 10, 2)])
def test_candidates_are_erm_every_so_many_steps_and_the_last(steps: int, every: int, candidates: int) -> None:
    head, *data = problem()
    found = list(descend(head, *data, Config(steps=steps, every=every)))
    straight = list(descend(head, *data, Config(steps=steps, every=1)))
    assert len(found) == candidates
    taken = [*straight[:-1][::every], straight[-1]]
    assert all(same(state_of(a), state_of(b)) for a, b in zip(found, taken, strict=True))


def planted(task: Task, monkeypatch: pytest.MonkeyPatch) -> dict[Held, Tensor]:
    """Give the task features (n, 64) that do not separate the classes, of which three are not zero."""
    draw, made = torch.Generator().manual_seed(0), {}
    splits: tuple[Held, ...] = ("train", "val")
    for split in splits:
        y = torch.from_numpy(task.y(split))
        made[split] = torch.zeros(len(y), 64)
        made[split][:, :3] = torch.randn(len(y), 3, generator=draw) + 0.5 * (2 * y[:, None] - 1)

    def features(self: Task, checkpoint: Checkpoint, split: Held) -> Tensor:
        return torch.cat([made[part][rows] for part, rows in self._seen.rows(split)])

    monkeypatch.setattr(Task, "features", features)
    return made


def test_without_gamma_and_penalty_it_minimises_what_cbllr_does(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = 80
    plain = tiny_task("cbllr", recipe__batch_size="48", recipe__weight_decay="0")
    decided = [Decision("head", epochs, Choice("val-wga"))]
    task = Task(plain.spec, plain._lab, plain._annotations, decisions=Decisions(decided))
    pool, _ = task.halves(np.arange(VAL), attributes=False)
    x, y = planted(task, monkeypatch)["val"][pool], torch.from_numpy(task.y("val")[pool])
    assert y.bincount().tolist() == [12, 12]  # so that a batch is the pool
    theirs = head_of(CBLLR(CBConfig(lr=1.0, epochs=epochs)).fit(task))
    start = task.erm().model.head
    weights = confidence_weights(start(x), y, 0.0)
    *_, ours = descend(start, x, y, weights, Config(gamma=0.0, lam=0.0, lr=1.0, steps=800, every=800))
    losses = [F.cross_entropy(head(x), y).item() for head in (start, theirs, ours)]
    assert losses[1] == pytest.approx(losses[2], abs=1e-4)
    assert losses[2] < losses[0] - 0.05


# -------------------------------------------------------------------------------------------------------------- stages


def test_the_parts_of_train_are_disjoint_and_drawn_by_class() -> None:
    y = np.repeat([0, 1, 2], [100, 11, 3])
    first, rest = split_by_class(y, 0.8, np.random.default_rng(0))
    assert np.array_equal(np.union1d(first, rest), np.arange(114))
    assert not set(first) & set(rest)
    assert np.bincount(y[first]).tolist() == [80, 9, 2]
    assert (np.diff(first) > 0).all()
    assert not np.array_equal(first, split_by_class(y, 0.8, np.random.default_rng(1))[0])


def stages(task: Task) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return split_by_class(task.y("train"), 0.8, task.rng("erm80"))


def test_the_first_stage_is_erm_on_its_part() -> None:
    task = tiny_task("afr")
    first, rest = stages(task)
    assert (len(first), len(rest)) == (FIRST, TRAIN - FIRST)
    found = erm_of(task.part(first))
    clock = task._lab.clock
    (cost,) = (part for key, part in clock.shared.items() if key.startswith("erm80:"))
    assert (cost.n_fwd, cost.n_bwd) == (EPOCHS * FIRST,) * 2
    assert found.key != task.erm().key
    changed = [
        not torch.equal(a, b) for a, b in zip(found.model.parameters(), task.initial().model.parameters(), strict=True)
    ]
    assert all(changed)


def test_without_a_step_it_predicts_like_the_first_stage() -> None:
    task = tiny_task("afr")
    found = AFR(Config(steps=0)).fit(task)
    erm = erm_of(task.part(stages(task)[0]))
    assert found.checkpoint.key == erm.key
    assert same(state_of(head_of(found)), state_of(erm.model.head))
    assert (found.choice.criterion, found.choice.candidates) == ("val-wga", 1)


def test_the_head_is_chosen_by_the_rung_and_fitted_on_the_other_part() -> None:
    task, config = tiny_task("afr"), Config(lr=0.5, steps=60)
    found = AFR(config).fit(task)
    first, rest = stages(task)
    erm = erm_of(task.part(first))
    x, y = task.features(erm, "train")[rest], torch.from_numpy(task.y("train")[rest])
    weights = confidence_weights(erm.model.head(x), y, config.gamma)
    heads = list(descend(erm.model.head, x, y, weights, config))
    scores = [task.selector()(head(task.features(erm, "val")).argmax(1).numpy()) for head in heads]
    assert len(set(scores)) > 1
    best = scores.index(max(scores))
    assert (found.choice.value, found.choice.candidates) == (max(scores)[0], 7)
    torch.testing.assert_close(flat(head_of(found)), flat(heads[best]))


def test_all_settings_share_the_first_stage_and_pass_no_image_needlessly() -> None:
    first, second = (run_tiny("afr", afr__gamma=gamma) for gamma in ("4", "10"))
    assert first.cost is not None
    assert second.cost is not None
    for cost in (first.cost.scratch, second.cost.scratch):
        assert (cost.n_fwd, cost.n_bwd, cost.n_head_fits) == (EPOCHS * FIRST, EPOCHS * FIRST, 1)
        assert cost.n_fwd_nograd == TRAIN - FIRST + VAL
    assert len([path for path in (artifacts_home() / "erm80").iterdir() if path.is_dir()]) == 1
    assert not (artifacts_home() / "erm").exists()
    assert first.selection is not None
    assert first.selection.candidates == 51


@pytest.mark.parametrize(("budget", "labels"), [("none", 0), ("select", 96)])
def test_it_fits_on_no_attribute(budget: str, labels: int) -> None:
    used = run_tiny("afr", budget).labels
    assert used is not None
    assert (used.n_train_a, used.n_val_a_fit, used.n_val_a_select, used.n_y_extra) == (0, 0, labels, 0)


def test_added_validation_images_are_parted_like_train() -> None:
    record = run_tiny("afr(+val)", "val")
    assert record.cost is not None
    assert record.labels is not None
    parts = [sum(round(0.8 * n / 2) for _ in "01") for n in (TRAIN + VAL // 2, TRAIN + VAL)]
    assert record.cost.scratch.n_fwd == EPOCHS * sum(parts)
    assert record.labels.n_y_extra == VAL


# ---------------------------------------------------------------------------------------------------- parts of a task


def test_a_part_of_a_task_trains_on_some_of_its_images() -> None:
    card = make_card()
    plain = make_task(split_of((4, 4, 4, 4), card), split_of((2, 2, 2, 2), card), card=card, budget="val")
    task = Task(plain.spec, plain._lab, plain._annotations, pool=Pool(np.arange(1, 16, 2), np.array([5, 6])))
    part = task.part(np.array([0, 7, 9]))
    assert part._seen.pool is not None
    assert (part._seen.pool.train.tolist(), part._seen.pool.val.tolist()) == ([1, 15], [6])
    assert part.y("train").tolist() == task.y("train")[[0, 7, 9]].tolist()
    assert plain.part(np.array([3, 2])).size("train") == 2
    assert ledger(task)["n_y_extra"] == 1


def test_a_part_hides_the_labels_that_its_task_hides() -> None:
    card = make_card()
    plain = make_task(split_of((4, 4, 4, 4), card), split_of((2, 2, 2, 2), card), card=card, budget="val")
    part = plain.on(np.arange(2), np.arange(8), labels=False).part(np.array([1, 2, 3]))
    assert part.y("train").tolist() == [0, -1, -1]
    assert ledger(plain)["n_y_extra"] == 0


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"gamma": -1.0}, "afr.gamma must be at least 0, got -1.0"),
        ({"lam": -0.1}, "afr.lam must be at least 0, got -0.1"),
        ({"steps": -1}, "afr.steps must be at least 0, got -1"),
        ({"lr": 0.0}, "afr.lr must be positive, got 0.0"),
        ({"every": 0}, "afr.every must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=says):
        plan_tiny("afr", **{f"afr__{key}": str(value)})


def test_what_is_searched() -> None:
    found = {name: search.text for name, search in ranges(Config).items()}
    assert found == {
        "gamma": "{4,6,8,10,12,14,16,18,20,1,1.5,2,2.5,3}",
        "lam": "{0,0.001,0.01,0.1,0.3}",
    }
