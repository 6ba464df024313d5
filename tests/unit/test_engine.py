"""The training loop: exact resume, determinism, selection, schedules, counters."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stubs import quiet, tiny_task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode
from worstgroup.benchmark import engine
from worstgroup.benchmark.backbones import Backbone, build_backbone
from worstgroup.benchmark.cost import Clock, StageCost
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective, Trajectory
from worstgroup.benchmark.errors import NonFiniteLoss
from worstgroup.benchmark.lab import Progress
from worstgroup.benchmark.registry import METHODS, NoConfig
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.task import Task

pytestmark = pytest.mark.usefixtures("tiny")

TRAIN, VAL, BATCH = 96, 48, 16
STEPS = TRAIN // BATCH
COUNTERS = ("n_fwd", "n_bwd", "n_fwd_nograd", "n_updates", "n_head_fits", "flops")


class Killed(Exception):
    """Stands for whatever ends a process."""


@dataclass
class Outcome:
    """Everything that a resumed training must have in common with an undisturbed one."""

    weights: dict[str, Tensor]
    trajectory: Trajectory
    extra: dict[str, Any]
    cost: StageCost


class Noisy(Objective[NoConfig]):
    """Draws in the forward pass, has a second network with its own optimiser, and remembers its losses."""

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        torch.manual_seed(0)
        self.critic = nn.Linear(model.feature_dim, 2)
        self.memory = torch.zeros(())

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model, "critic": self.critic}

    def loss(self, batch: Batch) -> Tensor:
        features = self.model.features(batch.x + 0.1 * torch.randn_like(batch.x))
        logits = self.model.head(F.dropout(features, 0.3)) + self.critic(features)
        loss = F.cross_entropy(logits, batch.y)
        self.memory = 0.9 * self.memory + loss.detach()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory = state["memory"]


class Explosive(Objective[tuple[int, int]]):
    """Not finite at one (epoch, step), both from 1."""

    done = 0

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        self.done += 1
        epoch, step = self.config
        loss = super().step(batch, optimizers)
        return loss * torch.inf if self.done == (epoch - 1) * STEPS + step else loss


class Watched(Objective[NoConfig]):
    """Notes the learning rate of every step."""

    def __init__(self, config: NoConfig) -> None:
        super().__init__(config)
        self.rates: list[float] = []

    def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
        self.rates.append(optimizers["model"].param_groups[0]["lr"])
        return super().step(batch, optimizers)


def killer(epoch: int) -> Progress:
    def progress(stage: str, done: int, epochs: int) -> None:
        if done == epoch:
            raise Killed

    return progress


def train(
    state: Path,
    method: str = "groupdro",
    *,
    objective: Callable[[], Objective[Any]] | None = None,
    epochs: int = 3,
    progress: Progress = quiet,
    selector: Any = "rung",
    keep: Callable[[int, nn.Module], None] | None = None,
    **settings: str,
) -> Outcome:
    """Train a method's objective (or another one under that method's budget) on `tiny`."""
    task = tiny_task(method, progress=progress, recipe__epochs=str(epochs), **settings)
    lab = task._lab
    made = objective() if objective else METHODS[method].cls(METHODS[method].config())
    model = lab.model()
    made.setup(task, model)
    chosen = task.selector() if selector == "rung" else selector
    training = lab.training("train", state, selector=chosen, keep=keep)
    trajectory = engine.fit(made, model, made.make_sampler(task, task.recipe), training)
    return Outcome(model.state_dict(), trajectory, made.state_dict(), lab.clock.stages["train"])


def assert_same(a: Outcome, b: Outcome) -> None:
    assert a.weights.keys() == b.weights.keys()
    for name, value in a.weights.items():
        assert torch.equal(value, b.weights[name]), name
    assert (a.trajectory.step, a.trajectory.score) == (b.trajectory.step, b.trajectory.score)
    for ours, theirs in zip(a.trajectory.epochs, b.trajectory.epochs, strict=True):
        assert (ours.train_loss, ours.val_loss) == (theirs.train_loss, theirs.val_loss)
        assert np.array_equal(ours.predictions, theirs.predictions)
        assert ours.predictions.dtype == theirs.predictions.dtype
    assert a.extra.keys() == b.extra.keys()
    for name, value in a.extra.items():
        assert torch.equal(value, b.extra[name]), name


def counters(outcome: Outcome) -> dict[str, float]:
    return {name: getattr(outcome.cost, name) for name in COUNTERS}


# ------------------------------------------------------------------------------------------------------------ resume


CASES: dict[str, dict[str, Any]] = {
    "groupdro": {},
    "resample with sgd, cosine and crops": {
        "method": "resample",
        "recipe__optimizer": "sgd",
        "recipe__schedule": "cosine",
        "recipe__augment": "crop+flip",
        "recipe__lr": "0.05",
    },
    "reweight with adamw, flips and channels last": {
        "method": "reweight",
        "recipe__optimizer": "adamw",
        "recipe__augment": "flip",
        "recipe__channels_last": "true",
    },
    "two networks and noise": {"objective": lambda: Noisy(NoConfig())},
    "the last epoch kept": {"selector": None},
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path, case: str) -> None:
    straight = train(tmp_path / "straight.pt", **CASES[case])
    for epoch in (1, 2):
        with pytest.raises(Killed):
            train(tmp_path / "killed.pt", progress=killer(epoch), **CASES[case])
    resumed = train(tmp_path / "killed.pt", **CASES[case])
    assert_same(straight, resumed)


def test_a_killed_training_counts_like_an_undisturbed_one(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", progress=killer(1))
    assert counters(train(tmp_path / "killed.pt")) == counters(train(tmp_path / "straight.pt"))


def test_a_training_killed_within_an_epoch_repeats_that_epoch(tmp_path: Path) -> None:
    class Dies(Noisy):
        steps = 0

        def step(self, batch: Batch, optimizers: dict[str, Optimizer]) -> Tensor:
            self.steps += 1
            if self.steps == STEPS + 3:
                raise Killed
            return super().step(batch, optimizers)

    straight = train(tmp_path / "straight.pt", objective=lambda: Noisy(NoConfig()))
    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", objective=lambda: Dies(NoConfig()))
    resumed = train(tmp_path / "killed.pt", objective=lambda: Noisy(NoConfig()))
    assert_same(straight, resumed)
    assert resumed.cost.n_updates == straight.cost.n_updates == 3 * STEPS
    assert resumed.cost.n_fwd == straight.cost.n_fwd


def test_a_training_killed_after_its_last_epoch_only_reads_its_state(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight.pt")
    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", progress=killer(3))
    assert_same(straight, train(tmp_path / "killed.pt", progress=killer(3)))


def test_group_weights_survive(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", progress=killer(1))
    q = torch.load(tmp_path / "killed.pt", weights_only=True)["objective"]["log_q"].exp()
    assert q.sum().item() == pytest.approx(1)
    assert q.max() - q.min() > 1e-4  # no longer uniform
    again, straight = (train(tmp_path / f"{name}.pt").extra["log_q"] for name in ("killed", "straight"))
    assert torch.equal(again, straight)


def test_the_seconds_before_an_interrupt_are_billed(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", progress=killer(2))
    before = StageCost(**torch.load(tmp_path / "killed.pt", weights_only=True)["cost"])
    after = train(tmp_path / "killed.pt").cost
    assert 0 < before.wall_s < after.wall_s
    assert 0 < before.device_s < after.device_s


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "foreign": lambda old: b"not a checkpoint",
    "truncated": lambda old: old[: len(old) // 2],
    "altered": lambda old: old[:1000] + bytes(500) + old[1500:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_state_starts_anew(tmp_path: Path, damage: str) -> None:
    straight = train(tmp_path / "straight.pt")
    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", progress=killer(2))
    (tmp_path / "killed.pt").write_bytes(DAMAGES[damage]((tmp_path / "killed.pt").read_bytes()))
    again = train(tmp_path / "killed.pt")
    assert_same(straight, again)
    assert counters(straight) == counters(again)


def test_the_state_is_written_whole(tmp_path: Path) -> None:
    train(tmp_path / "state.pt")
    assert [path.name for path in tmp_path.glob("state*")] == ["state.pt"]


# ------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("noise", [1, 2])
def test_two_runs_are_bit_equal_whatever_the_global_generators(tmp_path: Path, noise: int) -> None:
    objective = lambda: Noisy(NoConfig())  # noqa: E731
    first = train(tmp_path / "first.pt", objective=objective, recipe__augment="crop+flip")
    torch.manual_seed(noise)
    np.random.seed(noise)  # noqa: NPY002
    assert_same(first, train(tmp_path / "second.pt", objective=objective, recipe__augment="crop+flip"))


def test_building_a_lab_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    tiny_task("erm")._lab.model()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_earlier_epoch_does_not_depend_on_how_many_follow(tmp_path: Path) -> None:
    short, long = (train(tmp_path / f"{epochs}.pt", epochs=epochs).trajectory for epochs in (1, 2))
    assert short.epochs[0].train_loss == long.epochs[0].train_loss
    assert np.array_equal(short.epochs[0].predictions, long.epochs[0].predictions)


def test_every_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Seen(Objective[NoConfig]):
        def loss(self, batch: Batch) -> Tensor:
            seen.append(batch.index.tolist())
            return super().loss(batch)

    train(tmp_path / "state.pt", objective=lambda: Seen(NoConfig()))
    orders = [list(chain(*seen[i * STEPS : (i + 1) * STEPS])) for i in range(3)]
    assert all(sorted(order) == list(range(TRAIN)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


# -------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("check_every", [1, 4, 6, 50])
@pytest.mark.parametrize(("epoch", "step"), [(1, 1), (1, 5), (2, 4), (3, 6)])
def test_a_divergence_names_its_epoch_and_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_every: int, epoch: int, step: int
) -> None:
    monkeypatch.setattr(engine, "CHECK_EVERY", check_every)
    with pytest.raises(NonFiniteLoss, match=rf"stage 'train': .* at epoch {epoch}, step {step}$") as error:
        train(tmp_path / "state.pt", objective=lambda: Explosive((epoch, step)))
    assert error.value.step == step


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_every_kind_of_value_that_is_not_finite_counts(value: float) -> None:
    with pytest.raises(NonFiniteLoss, match="epoch 7, step 2"):
        engine._check_finite([torch.tensor(1.0), torch.tensor(value), torch.tensor(value)], "train", 7)


# --------------------------------------------------------------------------------------------------------- schedules


def rates(tmp_path: Path, schedule: str) -> list[float]:
    objective = Watched(NoConfig())
    train(tmp_path / f"{schedule}.pt", objective=lambda: objective, recipe__schedule=schedule, recipe__lr="0.01")
    return objective.rates


def test_the_constant_schedule_is_constant(tmp_path: Path) -> None:
    assert rates(tmp_path, "constant") == [0.01] * 3 * STEPS


def test_the_cosine_schedule_goes_from_the_rate_to_nearly_zero(tmp_path: Path) -> None:
    found = np.array(rates(tmp_path, "cosine"))
    total = 3 * STEPS
    assert found[0] == 0.01
    assert found[total // 2] == pytest.approx(0.005)
    assert found[-1] == pytest.approx(0.005 * (1 + np.cos(np.pi * (total - 1) / total)))
    assert 0 < found[-1] < 1e-4
    assert (np.diff(found) < 0).all()


# --------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5,), (0.7,), (0.7,), (0.6,)], 2),
        ([(0.5, 0.1), (0.5, 0.3), (0.5, 0.3), (0.4, 0.9)], 2),
        ([(0.0,), (0.0,), (0.0,), (0.0,)], 1),
        ([(0.1,), (0.2,), (0.3,), (0.4,)], 4),
        (None, 4),
    ],
)
def test_the_earliest_best_epoch_is_kept(tmp_path: Path, scores: list[tuple[float, ...]] | None, best: int) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    remaining = iter(scores or ())
    outcome = train(
        tmp_path / "state.pt",
        epochs=4,
        selector=(lambda predictions: next(remaining)) if scores else None,
        keep=lambda epoch, model: seen.update({epoch: {k: v.clone() for k, v in model.state_dict().items()}}),
    )
    assert outcome.trajectory.step == best
    assert outcome.trajectory.score == (scores[best - 1] if scores else None)
    assert list(seen) == [1, 2, 3, 4]
    assert all(torch.equal(value, seen[best][name]) for name, value in outcome.weights.items())
    assert not all(torch.equal(value, seen[best % 4 + 1][name]) for name, value in outcome.weights.items())


@pytest.mark.parametrize(
    ("patience", "scores", "epochs", "best"),
    [
        (2, [0.5, 0.7, 0.7, 0.6, 0.9], 4, 2),
        (3, [0.5, 0.7, 0.7, 0.6, 0.9], 5, 5),
        (1, [0.5, 0.5, 0.9], 2, 1),
        (0, [0.5, 0.4, 0.3], 3, 1),
    ],
)
def test_a_training_ends_when_its_patience_is_over(
    tmp_path: Path, patience: int, scores: list[float], epochs: int, best: int
) -> None:
    remaining = iter(scores)
    outcome = train(
        tmp_path / "state.pt",
        epochs=len(scores),
        recipe__patience=str(patience),
        selector=lambda predictions: (next(remaining),),
    )
    assert (len(outcome.trajectory.epochs), outcome.trajectory.step) == (epochs, best)
    assert outcome.cost.n_updates == epochs * STEPS


def test_where_nothing_is_selected_patience_does_not_count(tmp_path: Path) -> None:
    outcome = train(tmp_path / "state.pt", epochs=3, recipe__patience="1", selector=None)
    assert len(outcome.trajectory.epochs) == 3


def test_a_training_killed_in_its_last_epoch_of_patience_does_not_go_on(tmp_path: Path) -> None:
    remaining = cycle([(0.5,), (0.4,), (0.3,)])  # a training that goes on scores its finished epochs anew
    options: dict[str, Any] = {"epochs": 5, "recipe__patience": "2", "selector": lambda predictions: next(remaining)}
    first = train(tmp_path / "state.pt", **options)
    again = train(tmp_path / "state.pt", **options)
    assert_same(first, again)
    assert len(again.trajectory.epochs) == 3


def test_who_watches_sees_every_epoch_of_a_training_that_goes_on(tmp_path: Path) -> None:
    def watched(state: Path, epochs: int) -> list[float]:
        seen: list[float] = []
        task = tiny_task("groupdro", recipe__epochs=str(epochs))
        task._lab.watch = seen.append
        made, model = METHODS["groupdro"].make(), task._lab.model()
        made.setup(task, model)
        training = task._lab.training("train", state, selector=task.selector())
        engine.fit(made, model, made.make_sampler(task, task.recipe), training)
        return seen

    first = watched(tmp_path / "state.pt", 2)
    assert len(first) == 2
    assert watched(tmp_path / "state.pt", 4) == watched(tmp_path / "whole.pt", 4)


def test_the_score_is_that_of_the_kept_epochs_predictions(tmp_path: Path) -> None:
    task = tiny_task("groupdro")
    trajectory = train(tmp_path / "state.pt").trajectory
    scores = [task.selector()(epoch.predictions) for epoch in trajectory.epochs]
    assert trajectory.score == max(scores)
    assert trajectory.step == scores.index(max(scores)) + 1


# -------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("epochs", [1, 3])
def test_erm_counts_one_forward_and_one_backward_per_image_and_epoch(epochs: int) -> None:
    task = tiny_task("erm", recipe__epochs=str(epochs))
    cost = task._lab.erm().cost
    assert cost.n_fwd == cost.n_bwd == TRAIN * epochs
    assert cost.n_updates == STEPS * epochs
    assert (cost.n_fwd_nograd, cost.n_head_fits) == (0, 0)
    assert cost.wall_s > 0
    assert cost.device_s > 0


def test_evaluation_is_not_billed(tmp_path: Path) -> None:
    """The counters are those of the training images alone, though the validation split was predicted every epoch."""
    task = tiny_task("groupdro")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task._lab.model().eval()(task._lab.pixels("train").batch(torch.tensor([0])).x)
    forward = counter.get_total_flops() / 2  # `model()` itself counts one forward
    cost = train(tmp_path / "state.pt", epochs=2).cost
    assert cost.n_fwd_nograd == 0
    assert cost.n_fwd == 2 * TRAIN
    assert cost.flops == 3 * forward * 2 * TRAIN
    assert cost.eval_s > 0


@pytest.mark.parametrize("name", ["tiny_cnn", "mnist_cnn"])
def test_flops_agree_with_torchs_counter_within_5_percent(name: str) -> None:
    model = build_backbone(name, num_classes=2, image=(32, 32))
    x = torch.rand(8, 3, 32, 32)
    clock = Clock(torch.device("cpu"))
    clock.meter(model, model.trunk, x[:1])
    with FlopCounterMode(display=False) as counter, clock.stage("train") as cost:
        model(x).sum().backward()
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert (cost.n_fwd, cost.n_bwd) == (8, 8)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_recipe_reaches_the_optimizer(optimizer: str) -> None:
    recipe = Recipe(optimizer=optimizer, lr=0.02, weight_decay=0.3, momentum=0.7)  # type: ignore[arg-type]
    made = engine.make_optimizer(iter([nn.Parameter(torch.zeros(1))]), recipe)
    assert type(made).__name__.lower() == optimizer
    assert (made.defaults["lr"], made.defaults["weight_decay"]) == (0.02, 0.3)
    assert made.defaults.get("momentum", 0.7) == 0.7


# ------------------------------------------------------------------------------------------------ precision and layout

BF16 = Recipe(precision="bf16", lr=0.1)


class Island(Objective[NoConfig]):
    """A product that is kept in float32: a small difference of large sums."""

    def setup(self, task: Task | None, model: Backbone) -> None:
        super().setup(task, model)  # type: ignore[arg-type]
        self.weight = nn.Linear(64, 8, bias=False)

    def networks(self) -> dict[str, nn.Module]:
        return {"weight": self.weight}

    def loss(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return (batch.x @ self.weight.weight.T).square().mean()


def test_gradients_of_what_is_kept_in_float32_are_not_rounded() -> None:
    torch.manual_seed(0)
    objective = Island(NoConfig())
    objective.setup(None, build_backbone("tiny_cnn", num_classes=2, image=(16, 16)))
    x = torch.randn(32, 64)
    batch = Batch(x, torch.zeros(32, dtype=torch.long), torch.arange(32))
    objective.loss(batch).backward()  # type: ignore[no-untyped-call]
    assert objective.weight.weight.grad is not None
    expected = objective.weight.weight.grad.clone()
    players = engine.Players.of(objective, objective.model, BF16)
    with engine.autocast(BF16, torch.device("cpu")):
        objective.step(batch, players.optimizers)
    assert torch.equal(objective.weight.weight.grad, expected)


def test_players_in_turn_see_each_other_as_they_are_now() -> None:
    player = nn.Linear(4, 2)
    x, optimizer = torch.randn(8, 4), torch.optim.SGD(player.parameters(), lr=1.0)
    with engine.autocast(BF16, torch.device("cpu")):
        before = player(x)
        before.square().mean().backward()
        optimizer.step()
        assert not torch.equal(player(x), before)


def test_channels_last_reaches_what_a_player_stands_on() -> None:
    class HeadAlone(Objective[None]):
        def networks(self) -> dict[str, nn.Module]:
            return {"head": self.model.head}

    for wanted in (False, True):
        objective, model = HeadAlone(None), build_backbone("tiny_cnn", num_classes=2, image=(16, 16))
        objective.model = model
        engine.Players.of(objective, model, Recipe(channels_last=wanted))
        weights = [p for p in model.trunk.parameters() if p.ndim == 4]
        assert weights
        assert all(p.is_contiguous(memory_format=torch.channels_last) == wanted for p in weights)
