"""The contract's checks find what they are there to find: each method here breaks exactly one promise."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from worstgroup import Batch, Objective, Predictor, Requires, Task, method
from worstgroup.authoring.contract import CHECKS, judge, obeys, verdicts
from worstgroup.authoring.trial import (
    OUTPUTS,
    Bench,
    ContractError,
    Made,
    killed_after_epochs,
    killed_after_steps,
    make,
    profile,
    survive,
    without,
)
from worstgroup.benchmark import runner
from worstgroup.benchmark.budget import Budget
from worstgroup.benchmark.device import pick_device
from worstgroup.benchmark.errors import UnknownName
from worstgroup.benchmark.registry import METHODS
from worstgroup.benchmark.store import Store
from worstgroup.benchmark.task import Checkpoint, Choice

GROUPS = Requires(fit="train", native="train+val", classes="class")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """A bench for a class, registered as `broken` for the length of a test."""
    monkeypatch.setattr(METHODS, "_entries", {name: METHODS[name] for name in METHODS})

    def build(cls: type[Any], requires: Requires | None = None, **options: Any) -> Bench:
        method("broken", requires=requires or Requires(), **{"paper": "none", **options})(cls)
        return Bench("broken")

    return build


def assert_fails(bench: Bench, check: str, *says: str) -> None:
    """This check fails with such a message, and those before it that it builds on do not."""
    for name in ("runs", check):
        verdict = judge(bench, name)
        assert verdict.state == ("failed" if name == check else "ok"), verdict
    for text in says:
        assert text in verdict.message


class Weighted(Objective[Any]):
    """ERM with weights (n,) on the images."""

    weights: Tensor

    def loss(self, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.model(batch.x), batch.y, reduction="none")
        return (self.weights[batch.index] * losses).mean()


class Pipeline:
    """The shared ERM."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def fit(self, task: Task) -> Predictor:
        return Predictor(task.erm(), Choice("last"))


# -------------------------------------------------------------------------------------------------------------- leaks


class Peeking(Weighted):
    """Weights from attributes that it takes past the door."""

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        self.weights = torch.from_numpy(1.0 + task._lab.store.split("train").a[:, 0])


class PeekingAtTheOther(Weighted):
    """Weights from groups, and, where one attribute is granted, from the other one too."""

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        self.weights = torch.from_numpy(1.0 + task.groups("train").index)
        if task.spec.budget.attributes:
            self.weights = self.weights + torch.from_numpy(task._lab.store.split("train").a[:, 1])


@pytest.mark.usefixtures("unguarded")
def test_reading_attributes_past_the_door_fails(bench: Callable[..., Bench]) -> None:
    assert_fails(bench(Peeking), "no-leak", "at budget none", "test_logits", "task.groups(split) is the only door")


@pytest.mark.usefixtures("unguarded")
def test_reading_the_attribute_that_was_not_granted_fails(bench: Callable[..., Bench]) -> None:
    assert_fails(bench(PeekingAtTheOther, GROUPS), "no-leak", "at budget train+val:stripe", "val_logits")


def test_what_is_permuted(home: Path) -> None:
    from worstgroup.benchmark.planning import make_dataset

    split = make_dataset("tiny")[0].load(None)["train"]
    for text, name, kept in [
        ("none", "train", []),
        ("none", "val", []),
        ("none", "test", [0, 1]),
        ("select:corner", "train", []),
        ("select:corner", "val", [1]),
        ("val:stripe", "val", [0]),
        ("train+val:stripe", "train", [0]),
        ("train+val", "train", [0, 1]),
    ]:
        changed = without(Budget.parse(text))(name, split)
        assert [j for j in range(2) if np.array_equal(changed.a[:, j], split.a[:, j])] == kept, (text, name)
        assert np.array_equal(np.sort(changed.a, axis=0), np.sort(split.a, axis=0))
        assert changed.y is split.y


class OpeningTest(Pipeline):
    """Looks at the test split while it fits."""

    def fit(self, task: Task) -> Predictor:
        task._lab.store.split("test")
        return super().fit(task)


class OpeningTestQuietly(Pipeline):
    """Tries to."""

    def fit(self, task: Task) -> Predictor:
        with suppress(Exception):
            task._lab.store.split("test")
        return super().fit(task)


class OpeningTestInSetup(Objective[Any]):
    """Looks at the test split before it trains."""

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        task._lab.store.split("test")


class Oracle(Pipeline):
    """A head that looks the answer up when it is asked about test images."""

    def fit(self, task: Task) -> Predictor:
        store = task._lab.store

        class Head(nn.Module):
            def forward(self, features: Tensor) -> Tensor:
                y = torch.from_numpy(np.resize(store.split("test").y, len(features)))
                return F.one_hot(y, 2).float()

        return Predictor(task.erm(), Choice("last"), Head())


@pytest.mark.parametrize("cls", [Peeking, OpeningTest, OpeningTestQuietly, OpeningTestInSetup, Oracle])
def test_a_run_that_opens_labels_past_its_task_fails(bench: Callable[..., Bench], cls: type[Any]) -> None:
    verdict = judge(bench(cls), "runs")
    assert verdict.state == "failed"
    assert "the method reached past its task for" in verdict.message


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("cls", [OpeningTest, OpeningTestQuietly, OpeningTestInSetup])
def test_opening_the_test_split_fails(bench: Callable[..., Bench], cls: type[Any]) -> None:
    assert_fails(bench(cls), "test-unseen", "it asked for the test split before fitting was over")


@pytest.mark.usefixtures("unguarded")
def test_looking_test_labels_up_fails(bench: Callable[..., Bench]) -> None:
    assert_fails(bench(Oracle), "test-unseen", "permuting the labels of the test split changed", "test_prediction")


# ------------------------------------------------------------------------------------------------------------- resume


class Ageing(Objective[Any]):
    """A loss that changes with the steps taken."""

    steps = 0

    def loss(self, batch: Batch) -> Tensor:
        self.steps += 1
        return super().loss(batch) * (1 + self.steps)


class AgeingWell(Ageing):
    """It keeps its age."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class AgeingInCode(AgeingWell):
    """It keeps its age in an object of a class."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": range(self.steps)}


class AgeingBadly(AgeingWell):
    """It cannot read its own age."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["age"]


def test_state_that_is_kept_passes(bench: Callable[..., Bench]) -> None:
    assert judge(bench(AgeingWell), "resume").state == "ok"


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (Ageing, "killed within epochs and started again, it ended at other bytes of val_prediction, val_logits,"),
        (AgeingInCode, "does not load without running code"),
        (AgeingBadly, "killed and started again, the run at budget none failed: KeyError: 'age'"),
    ],
)
def test_state_that_is_lost_fails(bench: Callable[..., Bench], cls: type[Any], says: str) -> None:
    assert_fails(bench(cls), "resume", says)


@pytest.mark.parametrize(
    ("name", "killers", "attempts"),
    [
        ("groupdro", map(killed_after_steps, count(3, 5)), 3),  # at steps 3, 8 and, 6 being left, not any more
        ("groupdro", map(killed_after_epochs, repeat(1)), 3),
        ("jtt", map(killed_after_steps, count(3, 5)), 4),  # in its second training too
        ("jtt", map(killed_after_epochs, repeat(1)), 5),
    ],
)
def test_a_run_is_killed_until_it_survives(name: str, killers: Any, attempts: int) -> None:
    used = []

    def counted() -> Any:
        for killer in killers:
            used.append(killer)
            yield killer

    with profile():
        survive(Bench(name), counted())
    assert len(used) == attempts


# ------------------------------------------------------------------------------------- randomness, labels, cost, words


class TorchRandom(Weighted):
    """Weights from torch's generator before training has seeded it."""

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        self.weights = torch.rand(task.size("train"))


class NumpyRandom(Weighted):
    """Weights from a generator that nobody seeded."""

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        self.weights = torch.from_numpy(np.random.default_rng().random(task.size("train")))


class SeededRandom(Weighted):
    """Weights from the task's generator."""

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        self.weights = torch.from_numpy(task.rng("weights").random(task.size("train")))


@pytest.mark.parametrize("cls", [TorchRandom, NumpyRandom])
def test_unseeded_draws_fail(bench: Callable[..., Bench], cls: type[Any]) -> None:
    broken = bench(cls)
    assert_fails(broken, "deterministic", "task.rng(purpose)")
    assert [verdict.check for verdict in verdicts("broken")][-1] == "deterministic"  # it would muddle all later checks


def test_seeded_draws_pass(bench: Callable[..., Bench]) -> None:
    assert judge(bench(SeededRandom), "deterministic").state == "ok"


class Thrifty(Objective[Any]):
    """Uses groups only where all attributes are granted."""

    def setup(self, task: Task, model: Any) -> None:
        super().setup(task, model)
        if task.spec.policy == "" and not task.spec.budget.attributes:
            task.groups("train")


def test_paying_otherwise_for_one_attribute_fails(bench: Callable[..., Bench]) -> None:
    assert_fails(bench(Thrifty, GROUPS), "budget", "granted 2 attributes it uses", "granted one")


def made_with(bench: Bench, budget: str, **labels: int) -> None:
    """Put a run with another ledger on the bench."""
    made = bench.run(budget)
    bench._made[budget] = replace(made, labels=made.labels.model_copy(update=labels))


@pytest.mark.parametrize(
    ("rung", "labels"),
    [
        ("none", {"n_val_a_select": 1}),
        ("select", {"n_val_a_fit": 1}),
        ("val", {"n_train_a": 1}),
        ("train+val", {"n_train_a": 193}),
    ],
)
def test_a_ledger_beyond_the_grant_fails(rung: str, labels: dict[str, int]) -> None:
    broken = Bench("erm")
    made_with(broken, rung, **labels)
    ((name, used),) = labels.items()
    with pytest.raises(ContractError, match=rf"at budget {rung.replace('+', '.')} it used .*: {name} {used} of "):
        obeys(broken, rung)


class Untrained(Pipeline):
    """A network as it was born."""

    def fit(self, task: Task) -> Predictor:
        return Predictor(Checkpoint(task._lab.model()), Choice("none"))


def test_a_method_that_bills_nothing_fails(bench: Callable[..., Bench]) -> None:
    assert_fails(bench(Untrained), "cost", "it billed no", "n_bwd", "task.train")


@dataclass(frozen=True)
class Silent:
    """`said` is explained, the other is not."""

    said: int = 0
    unsaid: int = 0


def test_an_undocumented_setting_fails(bench: Callable[..., Bench]) -> None:
    assert_fails(bench(Pipeline, config=Silent), "documented", "broken: the docstring of Silent", "backticks: unsaid")


def test_every_missing_word_is_named(bench: Callable[..., Bench]) -> None:
    bare = type("Bare", (Pipeline,), {"__doc__": None})
    assert_fails(bench(bare, paper=""), "documented", "class Bare has no docstring", "`paper` is empty")


def test_metrics_that_are_not_finite_fail() -> None:
    broken = Bench("erm")
    made = broken.run()
    broken._made[broken.home] = Made(
        made.record.model_copy(update={"metrics": {"wga": float("nan"), "gap_all": None}}),
        made.labels,
        made.cost,
        {**made.outputs, "val_logits": made.outputs["val_logits"] * np.inf},
    )
    assert judge(broken, "runs").message == "not finite: wga, val_logits"


def test_predictions_that_differ_are_named() -> None:
    made = Bench("erm").run()
    assert made.differs(made) == ""
    for name in OUTPUTS:
        other = replace(made, outputs={**made.outputs, name: made.outputs[name] + 1})
        assert made.differs(other) == name


# ------------------------------------------------------------------------------------------------------- the workplace


def test_a_trial_leaves_everything_as_it_was(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def picked() -> str:
        with monkeypatch.context() as on_gpu:
            on_gpu.setattr(torch.cuda, "is_available", lambda: True)
            return pick_device().type

    threads, split = torch.get_num_threads(), Store.split
    with suppress(ZeroDivisionError), profile():
        place = Path(os.environ["WORSTGROUP_HOME"])
        assert place != home
        assert picked() == "cpu"
        make("erm")
        assert (place / "runs").is_dir()
        1 / 0  # noqa: B018
    assert not place.exists()
    assert Path(os.environ["WORSTGROUP_HOME"]) == home
    assert not home.exists()
    assert picked() == "cuda"
    assert torch.get_num_threads() == threads
    assert Store.split is split


def test_undisturbed_runs_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("erm")
    first = bench.run("none")
    monkeypatch.setattr(runner, "run_spec", lambda *_: pytest.fail("made again"))
    assert bench.run("none") is first


@pytest.mark.parametrize("name", ["gruopdro", "dfr+nothing"])
def test_an_unknown_method_is_no_failed_check(name: str) -> None:
    with pytest.raises(UnknownName):
        next(verdicts(name))


def test_the_checks_of_a_method_that_fails_to_run_end_there(bench: Callable[..., Bench]) -> None:
    crash = type("Crash", (Pipeline,), {"__doc__": "Crashes.", "fit": lambda self, task: 1 / 0})
    bench(crash)
    found = list(verdicts("broken"))
    assert [verdict.check for verdict in found] == list(CHECKS)[:2] == ["documented", "runs"]
    assert found[1].message.startswith("the run at budget none failed: ZeroDivisionError: division by zero")
