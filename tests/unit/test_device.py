"""How a GPU is used, as far as it can be told without one: options, kernels, copies, compiled trunks."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import plan_tiny, predictions
from torch import Tensor, nn
from torch._dynamo.utils import counters
from worstgroup.benchmark import device as devices
from worstgroup.benchmark import engine
from worstgroup.benchmark.backbones import Backbone, build_backbone
from worstgroup.benchmark.determinism import _set
from worstgroup.benchmark.device import (
    GRAPHS,
    all_to_device,
    compile_trunk,
    kernel_options,
    kernels,
    one_ahead,
    optimizer_options,
    to_device,
)
from worstgroup.benchmark.engine import Objective, Players, make_optimizer
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def flags() -> Iterator[None]:
    """Whatever a test sets is as it was afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.deterministic = before[1]


# ------------------------------------------------------------------------------------------------- options and kernels


def test_optimisers_are_fused_on_a_gpu_alone() -> None:
    assert optimizer_options(CUDA) == {"fused": True}
    assert optimizer_options(CPU) == {}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_options_reach_every_optimiser(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(optimizer=name)  # type: ignore[arg-type]
    assert not make_optimizer(nn.Linear(2, 2).parameters(), recipe).defaults["fused"]
    asked: list[torch.device] = []
    monkeypatch.setattr(engine, "optimizer_options", lambda device: asked.append(device) or {"fused": True})
    assert make_optimizer(nn.Linear(2, 2).parameters(), recipe).defaults["fused"]
    assert asked == [CPU]  # where the parameters are


def test_kernels_follow_from_the_precision() -> None:
    assert kernel_options("fp32", CUDA) == {"tf32": False, "autotuning": True}
    assert kernel_options("tf32", CUDA) == {"tf32": True, "autotuning": True}
    assert kernel_options("bf16", CUDA) == {"tf32": False, "autotuning": True}
    assert kernel_options("tf32", CPU) == {}


@pytest.mark.usefixtures("flags")
def test_autotuned_kernels_are_not_deterministic() -> None:
    _set(True)
    assert kernel_options("fp32", CUDA) == {"tf32": False, "autotuning": False}


def test_nothing_is_tuned_to_shapes_that_do_not_come_again() -> None:
    assert kernel_options("tf32", CUDA, autotuning=False) == {"tf32": True, "autotuning": False}
    assert kernel_options("tf32", CPU, autotuning=False) == {}


def state() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.benchmark


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True)])
def test_kernels_hold_inside_alone(precision: str, tf32: bool) -> None:
    before = state()

    def fail() -> None:
        with kernels(precision, CUDA):
            inside.append(state())
            raise KeyError

    inside: list[tuple[bool, bool, bool]] = []
    with pytest.raises(KeyError):
        fail()
    assert inside == [(tf32, tf32, True)]
    assert state() == before
    with kernels(precision, CPU):
        assert state() == before


def test_kernels_within_kernels_give_way_again() -> None:
    before = state()
    with kernels("fp32", CUDA, autotuning=False):
        assert state() == (False, False, False)
        with kernels("tf32", CUDA):
            assert state() == (True, True, True)
        assert state() == (False, False, False)
    assert state() == before


def test_tf32_is_fp32_on_a_processor() -> None:
    made = [plan_tiny("erm", recipe__precision=precision) for precision in ("fp32", "tf32")]
    specs = [plan.runs[0].spec for plan in made]
    found = [predictions(run_spec(spec, plan.stores["tiny"])) for spec, plan in zip(specs, made, strict=True) if spec]
    assert found[0] == found[1]
    assert specs[0] != specs[1]  # a setting of its own nevertheless: a record says what was asked for


# -------------------------------------------------------------------------------------------------------------- copies


def test_on_a_processor_nothing_is_copied() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, CPU) is tensor
    parts = [tensor, tensor[:1]]
    assert all_to_device(parts, CPU) is parts


def test_tensors_of_any_lengths_are_moved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []
    monkeypatch.setattr(devices, "to_device", lambda tensor, _: moved.append(tensor) or tensor)
    parts = [torch.arange(4), torch.arange(4, 5), torch.arange(5, 7)]
    assert [part.tolist() for part in all_to_device(parts, CUDA)] == [[0, 1, 2, 3], [4], [5, 6]]
    assert [tensor.tolist() for tensor in moved] == [list(range(7))]
    assert list(all_to_device([], CUDA)) == []


@pytest.mark.parametrize("n", [0, 1, 4])
def test_each_is_loaded_before_its_predecessor_is_handed_out(n: int) -> None:
    told: list[tuple[str, int]] = []

    def load(i: int) -> int:
        told.append(("load", i))
        return 10 * i

    told.extend(("use", value // 10) for value in one_ahead(range(n), load))
    assert [i for what, i in told if what == "use"] == list(range(n))
    for i in range(n - 1):
        assert told.index(("load", i + 1)) < told.index(("use", i))
    for i in range(n - 2):
        assert told.index(("use", i)) < told.index(("load", i + 2))  # and no more than one ahead


@pytest.mark.parametrize(("kept", "copies"), [(1, 4), (2 * 3 * 4, 4), (2**20, 1), (7 * 3 * 4, 1), (5 * 3 * 4, 2)])
def test_outputs_are_copied_in_few_pieces(kept: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "KEPT", kept)
    made: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: made.append(len(parts)) or cat(parts))
    values = torch.randn(7, 3)
    assert torch.equal(engine.on_host(iter(values.split(2))), values)
    assert len(made) == copies + (copies > 1)


# ----------------------------------------------------------------------------------------------------------- compiling


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Compilation without a compiler, and how many graphs it has made since."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


def network(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone("tiny_cnn", num_classes=2, image=(16, 16))


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def passes(model: Backbone) -> None:
    """An epoch and its evaluation, each with a short last batch, and a step without gradients (DANN's)."""
    model.train()
    for n in (8, 8, 5):
        model(images(n)).sum().backward()
    with torch.no_grad():
        model(images())
        model.eval()
        for n in (16, 16, 3, 7):
            model(images(n))


def test_a_trunk_is_compiled_once_for_each_mode(graphs: Callable[[], int]) -> None:
    model = network()
    compile_trunk(model.trunk)
    passes(model)
    assert graphs() == 3  # training, training without gradients, evaluation
    for _ in range(3):
        passes(model)
    for seed in range(1, 4):  # networks of the same layers share what was compiled
        other = network(seed)
        compile_trunk(other.trunk)
        passes(other)
    compile_trunk(model.trunk)  # and so does another training of the same
    passes(model)
    assert graphs() == 3


def test_a_compiled_trunk_computes_the_same_and_keeps_names_and_hooks(graphs: Callable[[], int]) -> None:
    plain, model = network(), network()
    counted: list[int] = []
    model.trunk.register_forward_hook(lambda _, __, out: counted.append(len(out)))
    names = list(model.state_dict())
    compile_trunk(model.trunk)
    for n in (8, 3):
        assert torch.equal(model(images(n)), plain(images(n)))
    assert graphs() == 1
    assert counted == [8, 3]
    assert list(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_however_many_shapes_a_process_has_their_trunks_are_compiled(graphs: Callable[[], int]) -> None:
    sizes = range(1, 11)  # torch's own limit is 8
    for n in sizes:
        model = network()
        compile_trunk(model.trunk)
        model.eval()(images(n))
    assert graphs() == len(sizes)


@pytest.mark.parametrize("prefix", ["recompile", "cache_size"])  # today's names, and those of torch 2.6
def test_limits_of_graphs_are_raised_and_never_lowered(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(**{f"{prefix}_limit": 8, f"accumulated_{prefix}_limit": 10**6})
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    monkeypatch.setattr(torch._dynamo, "config", known)
    compile_trunk(network().trunk)
    assert vars(known) == {f"{prefix}_limit": GRAPHS, f"accumulated_{prefix}_limit": 10**6}


@pytest.mark.usefixtures("graphs")
def test_all_networks_that_train_are_compiled() -> None:
    class Two(Objective[None]):
        def networks(self) -> dict[str, nn.Module]:
            return {"model": self.model, "other": other, "linear": nn.Linear(2, 2)}

    model, other = network(), network(1)
    objective = Two(None)
    objective.model = model
    Players.of(objective, model, Recipe())
    assert "forward" not in vars(model.trunk)
    Players.of(objective, model, Recipe(compile=True))
    assert "forward" in vars(model.trunk)
    assert "forward" in vars(other.trunk)


@pytest.mark.slow  # a minute of a C++ compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_code_trains_and_evaluates_on_a_processor(layout: torch.memory_format) -> None:
    plain, model = network(), network()
    states: list[Any] = []
    for each in (plain, model):
        each.to(memory_format=layout)
        if each is model:
            compile_trunk(each.trunk)
        optimizer = make_optimizer(each.parameters(), Recipe(lr=0.1))
        each.train()
        for n in (8, 8, 5):
            optimizer.zero_grad()
            each(images(n).to(memory_format=layout)).square().sum().backward()
            optimizer.step()
        each.eval()
        with torch.no_grad():
            states.append([each(images(n)) for n in (16, 3)])
    for ours, theirs in zip(*states, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3)
