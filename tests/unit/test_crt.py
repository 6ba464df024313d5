"""CRT, and the training of a head on features on which it rests (`Task.train_head`)."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import plan_tiny
from stubs import ledger, tiny_task
from torch import Tensor, nn
from torch.nn import functional as F
from toys import run_tiny, same, state_of
from worstgroup.benchmark.artifacts import work_folder
from worstgroup.benchmark.backbones import Backbone
from worstgroup.benchmark.budget import Budget, Requires
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.registry import METHODS
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.task import Choice, Decision, Decisions, Predictor, Task
from worstgroup.methods import reweight
from worstgroup.methods.crt import CRT, VARIANTS, Config
from worstgroup.methods.reweight import ReWeight

pytestmark = pytest.mark.usefixtures("tiny")
TRAIN, VAL, EPOCHS = 96, 48, 2


class Watched(Objective[None]):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__(None)
        self.batches: list[Batch] = []

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        self.first = state_of(model.head)

    def loss(self, batch: Batch) -> Tensor:
        self.batches.append(batch)
        return super().loss(batch)


def head_of(predictor: Predictor) -> nn.Linear:
    assert isinstance(predictor.head, nn.Linear)
    return predictor.head


# ------------------------------------------------------------------------------------------------------- head training


def test_an_objective_sees_features_as_images_of_one_pixel() -> None:
    task = tiny_task("crt")
    erm, objective = task.erm(), Watched()
    task.train_head(objective, erm)
    features, y = task.features(erm, "train"), torch.from_numpy(task.y("train"))
    for batch in objective.batches:
        assert torch.equal(batch.x[:, :, 0, 0], features[batch.index])
        assert torch.equal(batch.y, y[batch.index])
        torch.testing.assert_close(objective.model.features(batch.x), features[batch.index])
    assert sum(len(batch.x) for batch in objective.batches) == EPOCHS * TRAIN
    assert (objective.model.feature_dim, objective.model.num_classes) == (64, 2)


def test_it_starts_from_the_checkpoints_head_and_leaves_the_checkpoint_alone() -> None:
    task = tiny_task("crt")
    erm, objective = task.erm(), Watched()
    before = state_of(erm.model)
    predictor = task.train_head(objective, erm)
    assert same(objective.first, state_of(erm.model.head))
    assert not same(objective.first, state_of(head_of(predictor)))
    assert same(before, state_of(erm.model))
    assert predictor.checkpoint is erm


def fresh(seed: int = 0, **settings: str) -> dict[str, Tensor]:
    """The weights that a fresh head starts from."""
    task, objective = tiny_task("crt", **settings), Watched()
    if seed:
        task.spec = replace(task.spec, block=replace(task.spec.block, seed=seed))
    task.train_head(objective, task.erm(), f"head of {seed}", fresh=True)
    return objective.first


def test_a_fresh_head_is_the_same_for_all_methods_of_a_block() -> None:
    first = fresh()
    torch.manual_seed(3)
    assert same(first, fresh(crt__variant="reweight"))
    assert not same(first, fresh(seed=1))
    assert set(first) == {"weight", "bias"}
    assert first["weight"].abs().max() <= 64**-0.5


def test_its_epoch_is_selected_by_the_rung() -> None:
    task = tiny_task("crt", recipe__epochs="5")
    erm = task.erm()
    predictor = task.train_head(Objective(None), erm, fresh=True)
    choice, trajectory = predictor.choice, predictor.trajectory
    assert trajectory is not None
    assert choice.step is not None
    assert (choice.criterion, choice.candidates, len(trajectory.epochs)) == ("val-wga", 5, 5)
    logits = head_of(predictor)(task.features(erm, "val")).detach()
    epoch = trajectory.epochs[choice.step - 1]
    assert np.array_equal(logits.argmax(1).numpy(), epoch.predictions)
    assert F.cross_entropy(logits, torch.from_numpy(task.y("val"))).item() == pytest.approx(epoch.val_loss, rel=1e-5)
    scores = [task.selector()(each.predictions) for each in trajectory.epochs]
    assert scores.index(max(scores)) == choice.step - 1
    assert task.decisions.made == [Decision("head", choice.step, choice)]


def test_it_has_a_recipe_of_its_own_and_nothing_that_is_for_images() -> None:
    plain, dressed = (
        tiny_task("crt", recipe__augment=augment, recipe__precision=precision, recipe__channels_last=last)
        for augment, precision, last in (("none", "fp32", "false"), ("crop+flip", "bf16", "true"))
    )
    erm = plain.erm()
    recipe = replace(plain.recipe, epochs=3, lr=0.1)
    heads = [
        head_of(task.train_head(Objective(None), erm, f"head {i}", recipe=replace(task.recipe, epochs=3, lr=0.1)))
        for i, task in enumerate((plain, dressed))
    ]
    assert same(*map(state_of, heads))
    trajectory = plain.train_head(Objective(None), erm, recipe=recipe).trajectory
    assert trajectory is not None
    assert len(trajectory.epochs) == 3


def test_it_costs_no_pass_beside_the_features() -> None:
    bills = []
    for _ in range(2):
        task = tiny_task("crt")
        task.train_head(Objective(None), task.erm())
        clock = task._lab.clock
        cost = clock.stages["head"]
        assert (cost.n_fwd, cost.n_bwd, cost.n_fwd_nograd, cost.flops) == (0, 0, 0, 0)
        assert (cost.n_updates, cost.n_head_fits) == (EPOCHS * TRAIN // 16, 1)
        assert cost.device_s > 0
        bills.append({key: part.n_fwd_nograd for key, part in clock.shared.items() if "features" in key})
    assert bills[0] == bills[1]  # who finds the features pays like who made them
    assert sorted(bills[0].values()) == [VAL, TRAIN]


def test_two_heads_of_one_stage_are_two() -> None:
    task = tiny_task("crt")
    erm = task.erm()
    first, second = (head_of(task.train_head(Objective(None), erm, fresh=new)) for new in (False, True))
    assert not same(state_of(first), state_of(second))
    assert {file.name for file in work_folder(task.spec.hash).iterdir()} == {"head.pt", "head-2.pt"}
    assert task._lab.clock.stages["head"].n_head_fits == 2


def test_a_second_attempt_goes_on_to_the_same_bits() -> None:
    ends = []
    for stops in ((3,), (1, 3)):
        for epochs in stops:
            task = tiny_task("crt")
            stage = f"head {len(stops)}"
            recipe = replace(task.recipe, epochs=epochs)
            ends.append(state_of(head_of(task.train_head(Watched(), task.erm(), stage, recipe=recipe, fresh=True))))
    assert task._lab.clock.stages["head 2"].n_updates == 3 * TRAIN // 16  # with those of the first attempt
    straight, _, resumed = ends
    assert same(straight, resumed)


def test_it_trains_on_the_rows_of_its_task() -> None:
    whole = tiny_task("crt")
    rows, more, select = np.arange(0, 96, 2), np.arange(10), np.arange(20, 48)
    task, erm, objective = whole.on(rows, more, select=select), whole.erm(), Watched()
    predictor = task.train_head(objective, erm)
    given = torch.cat([whole.features(erm, "train")[rows], whole.features(erm, "val")[more]])
    y = np.concatenate([whole.y("train")[rows], whole.y("val")[more]])
    assert sum(len(batch.x) for batch in objective.batches) == EPOCHS * len(y)
    for batch in objective.batches:
        assert torch.equal(batch.x[:, :, 0, 0], given[batch.index])
        assert batch.y.tolist() == y[batch.index].tolist()
    assert predictor.trajectory is not None
    assert predictor.trajectory.epochs[0].predictions.shape == (VAL,)


def test_a_replayed_head_stops_at_the_decided_epoch() -> None:
    plain = tiny_task("crt", "val", recipe__epochs="3")
    choice = Choice("val-wga-smoothed", 0.25, 2, 3)
    task = Task(plain.spec, plain._lab, plain._annotations, decisions=Decisions([Decision("head", 2, choice)]))
    predictor = task.train_head(Objective(None), task.erm())
    assert predictor.trajectory is not None
    assert (predictor.choice, len(predictor.trajectory.epochs)) == (choice, 2)
    assert not any(ledger(task).values())


def test_a_converged_head_is_weighted_logistic_regression() -> None:
    """The gradient of the weighted loss vanishes there, with that of the weight decay."""
    plain, epochs = tiny_task("crt"), 50
    last = [Decision("head", epochs, Choice("val-wga"))]
    task = Task(plain.spec, plain._lab, plain._annotations, decisions=Decisions(last))
    erm, objective = task.erm(), ReWeight(reweight.Config())
    sgd = replace(task.recipe, optimizer="sgd", lr=1.0, momentum=0.7, weight_decay=0.1)
    recipe = replace(sgd, batch_size=TRAIN, epochs=epochs)
    head = head_of(task.train_head(objective, erm, recipe=recipe, fresh=True))
    losses = F.cross_entropy(head(task.features(erm, "train")), torch.from_numpy(task.y("train")), reduction="none")
    slopes = torch.autograd.grad((objective.weights * losses).mean(), list(head.parameters()))
    for slope, parameter in zip(slopes, head.parameters(), strict=True):
        assert (slope + 0.1 * parameter).abs().max() < 1e-4
        assert slope.abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------------- CRT


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_a_fresh_head_under_the_variants_objective(variant: Any) -> None:
    task = tiny_task("crt")
    found = CRT(Config(variant)).fit(task)
    erm = task.erm()
    expected = task.train_head(VARIANTS[variant](), erm, "expected", fresh=True)
    assert found.checkpoint.key == erm.key
    assert str(erm.key).endswith(f"/{EPOCHS}")  # after the last epoch: chosen by no label
    assert same(state_of(head_of(found)), state_of(head_of(expected)))


def test_variants_differ() -> None:
    heads = [
        state_of(head_of(CRT(Config(variant)).fit(tiny_task("crt", crt__variant=variant)))) for variant in VARIANTS
    ]  # type: ignore[arg-type]
    assert not any(same(heads[i], heads[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_batches_are_group_balanced() -> None:
    task = tiny_task("crt")
    objective = VARIANTS["resample"]()
    draw = objective.make_sampler(task, task.recipe)
    drawn = torch.cat([index for epoch in range(40) for index in draw(torch.Generator().manual_seed(epoch))])
    share = np.bincount(task.groups("train").index[drawn], minlength=8) / len(drawn)
    assert share == pytest.approx(np.full(8, 1 / 8), abs=0.02)


@pytest.mark.parametrize(("variant", "labels"), [("resample", 192), ("reweight", 192), ("vanilla", 0)])
def test_cost_and_labels(variant: str, labels: int) -> None:
    record = run_tiny("crt", "train+val", crt__variant=variant)
    assert record.cost is not None
    assert record.labels is not None
    marginal, scratch = record.cost.marginal, record.cost.scratch
    assert (marginal.n_fwd, marginal.n_bwd, marginal.n_fwd_nograd) == (0, 0, TRAIN + VAL)
    assert scratch.n_fwd == scratch.n_bwd == EPOCHS * TRAIN
    assert record.labels.n_train_a == labels


def test_its_own_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task("crt")
    seen: list[Any] = []
    monkeypatch.setattr(task, "train_head", lambda *_, **options: seen.append(options["recipe"]))
    for config in (Config(), Config(lr=0.3)):
        CRT(config).fit(task)
    assert seen == [task.recipe, replace(task.recipe, lr=0.3)]


def test_the_control_needs_no_attribute() -> None:
    declared = METHODS["crt"].requires
    assert declared == Requires(fit="train", native="train+val", classes="class")
    assert [Config(variant).requires(declared) for variant in VARIANTS] == [declared, declared, Requires()]  # type: ignore[arg-type]
    assert Requires().resolve(Budget("none")).tag == ""
    (planned,) = plan_tiny("crt", crt__variant="vanilla").runs
    assert planned.spec is not None
    assert (str(planned.spec.budget), planned.spec.policy) == ("none", "")


@pytest.mark.parametrize("lr", [0.0, -1.0])
def test_bad_values_are_refused(lr: float) -> None:
    with pytest.raises(UserError, match=f"crt.lr must be positive, got {lr}"):
        plan_tiny("crt", crt__lr=str(lr))
    with pytest.raises(UserError, match=r"crt\.variant must be one of resample, reweight, vanilla, got 'none'"):
        Config("none")  # type: ignore[arg-type]


def test_what_is_searched() -> None:
    ((name, search),) = ranges(Config).items()
    assert (name, search.text, search.of) == ("lr", "10^U(-1,2)", "lr")
