"""LLE: one head for each shift, of which only an image's own learns, and their mixture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import ledger, tiny_task
from torch import Tensor
from torch.nn import functional as F
from toys import batch, net, run_tiny, same, state_of, toy_task, train
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.planning import Request, plan
from worstgroup.benchmark.registry import METHODS, NoConfig
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods.lle import LLE, Ensemble, Mixture, ensemble_loss, mixed

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = (5, 2, 2, 3)
SHIFT = np.arange(12) % 3
Y = torch.tensor([0, 1, 1, 0, 1, 0])
S = torch.tensor([0, 1, 2, 1, 0, 2])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(shift: Any = SHIFT) -> tuple[Ensemble, Batch]:
    """The objective on a toy network, and a batch of all twelve images."""
    task = toy_task(SIZES)
    objective = Ensemble(shift)
    objective.setup(task, net())
    return objective, batch(task)


def random_logits() -> tuple[Tensor, Tensor]:
    """Logits (6, 3, 2) of three heads, and of the shift (6, 3)."""
    return torch.randn(6, 3, 2, generator=generator()), torch.randn(6, 3, generator=generator(1))


# --------------------------------------------------------------------------------------------------------- the mixture


def test_identical_heads_give_their_output_whatever_the_shift() -> None:
    logits, shift = random_logits()
    one = logits[:, :1].expand(-1, 3, -1)
    torch.testing.assert_close(mixed(one, shift), logits[:, 0])
    torch.testing.assert_close(mixed(one, 100 * shift), logits[:, 0])


@pytest.mark.parametrize("head", [0, 1, 2])
def test_a_sure_predictor_gives_its_head(head: int) -> None:
    logits, _ = random_logits()
    sure = torch.full((6, 3), -1e4).index_fill(1, torch.tensor([head]), 1e4)
    assert torch.equal(mixed(logits, sure), logits[:, head])


def test_logits_are_mixed_and_not_probabilities() -> None:
    logits = torch.tensor([[[8.0, 0.0], [0.0, 2.0]]])
    shift = torch.tensor([[0.25, 0.75]]).log()
    assert mixed(logits, shift)[0].tolist() == pytest.approx([2.0, 1.5])  # probabilities would say class 1


def test_the_network_answers_with_the_mixture() -> None:
    objective, data = made()
    model = objective.model.eval()
    features = model.features(data.x)
    expected = sum(
        p[:, None] * head(features)
        for p, head in zip(objective.mixture.shift(features).softmax(1).T, objective.mixture.heads, strict=True)
    )
    torch.testing.assert_close(model(data.x), expected)


# ------------------------------------------------------------------------------------------------------------ the loss


def test_the_loss_is_that_of_its_formula() -> None:
    logits, shift = random_logits()
    own = torch.stack([logits[i, s] for i, s in enumerate(S)])
    torch.testing.assert_close(ensemble_loss(logits, shift, Y, S), F.cross_entropy(own, Y) + F.cross_entropy(shift, S))


def test_identical_heads_learn_from_the_class_what_erm_learns() -> None:
    logits, shift = random_logits()
    one = logits[:, 0].clone().requires_grad_()
    loss = ensemble_loss(one[:, None].expand(-1, 3, -1), shift, Y, S) - F.cross_entropy(shift, S)
    erm = F.cross_entropy(one, Y)
    torch.testing.assert_close(loss, erm)
    torch.testing.assert_close(torch.autograd.grad(loss, one), torch.autograd.grad(erm, one))


def test_only_the_head_of_the_shift_learns_the_class() -> None:
    logits, shift = random_logits()
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(ensemble_loss(logits, shift, Y, S), logits)
    reached = slope.abs().sum(2) > 0
    assert torch.equal(reached, F.one_hot(S, 3).bool())


def test_a_shift_that_no_image_has_leaves_its_head_alone() -> None:
    objective, data = made(np.where(SHIFT == 1, 2, SHIFT))
    objective.loss(data).backward()  # type: ignore[no-untyped-call]
    learns = [bool(head.weight.grad.any()) for head in objective.mixture.heads]
    assert learns == [True, False, True]


# -------------------------------------------------------------------------------------------------------------- ERM


def test_with_images_as_they_are_alone_it_is_erm(tmp_path: Path) -> None:
    """Its predictor of a constant has nothing to learn: the same bits, at the same cost."""
    recipe, ends, costs = Recipe(lr=0.1, batch_size=5, epochs=3), [], []
    for objective in (Objective(None), Ensemble(np.zeros(12, np.int64))):
        model = net()
        costs.append(train(objective, toy_task(SIZES), model, recipe, tmp_path / type(objective).__name__))
        ends.append({name.replace("heads.0.", ""): value for name, value in state_of(model).items()})
    erm, alone = ends
    assert same(erm, {name: value for name, value in alone.items() if "shift" not in name})
    assert (costs[0].n_fwd, costs[0].n_updates) == (costs[1].n_fwd, costs[1].n_updates)


def test_the_first_head_is_the_blocks_and_the_others_are_their_own() -> None:
    heads = [state_of(head) for head in made()[0].mixture.heads]
    assert same(heads[0], state_of(net().head))
    assert not torch.equal(heads[1]["weight"], heads[2]["weight"])
    assert same(heads[1], state_of(made()[0].mixture.heads[1]))  # drawn for this purpose, the same every time


# -------------------------------------------------------------------------------------------------------------- epochs


def test_an_epoch_has_the_steps_of_erm_and_draws_no_image_twice() -> None:
    task, recipe = toy_task((40, 20, 20, 40)), Recipe(batch_size=16)
    shift = np.repeat([0, 1, 2], 40)
    draw = Ensemble(shift).make_sampler(task, recipe)
    batches = draw(generator())
    assert [len(index) for index in batches] == [16, 16, 8]
    drawn = torch.cat(list(batches))
    assert len(set(drawn.tolist())) == 40
    assert set(shift[drawn]) == {0, 1, 2}
    assert torch.equal(drawn, torch.cat(list(draw(generator()))))
    assert not torch.equal(drawn, torch.cat(list(draw(generator(1)))))


def test_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for name, stops in (("straight", (3,)), ("halted", (1, 3))):
        for epochs in stops:
            model = net()
            train(Ensemble(SHIFT), toy_task(SIZES), model, Recipe(batch_size=4, epochs=epochs), tmp_path / name)
        ends.append(state_of(model))
    assert same(*ends)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_takes_the_steps_of_erm_and_uses_no_attribute() -> None:
    record = run_tiny("lle")
    assert record.cost is not None
    assert record.labels is not None
    assert record.cost.marginal.n_fwd == record.cost.marginal.n_bwd == 2 * 96
    assert record.cost.marginal.n_updates == 2 * 6
    assert {name: n for name, n in record.labels if n} == {"n_rendered": 2 * 96}


def test_it_trains_on_images_and_views_and_keeps_a_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("lle", "select")
    seen: list[int] = []
    loss = Ensemble.loss

    def noted(self: Ensemble, batch: Batch) -> Tensor:
        seen.extend(batch.index.tolist())
        return loss(self, batch)

    monkeypatch.setattr(Ensemble, "loss", noted)
    predictor = LLE(NoConfig()).fit(task)
    assert isinstance(predictor.checkpoint.model.head, Mixture)
    assert len(seen) == 2 * 96
    assert {index // 96 for index in seen} == {0, 1, 2}
    assert predictor.choice.criterion == "val-wga"
    assert ledger(task)["n_rendered"] == 2 * 96
    logits = task.logits(predictor.checkpoint, "val")
    model = predictor.checkpoint.model.eval()
    torch.testing.assert_close(logits, torch.cat([model(x).detach() for x in task.images("val")]))


def test_where_nothing_is_rendered_it_is_not_run() -> None:
    (planned,) = plan([Request("metashift", "lle")]).runs
    assert planned.spec is None
    assert planned.reason == "the dataset renders no interventions"
    (planned,) = plan_tiny("lle@class").runs
    assert planned.reason == "it uses no groups, so @class does not apply to it"
    assert METHODS["lle"].requires.native == "none"
