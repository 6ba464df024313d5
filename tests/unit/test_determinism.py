"""`--deterministic`: what is asked of PyTorch on a GPU, what a record says, and that a run stays the same run."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers import plan_tiny
from pretend import gpu
from worstgroup.benchmark import determinism, executors
from worstgroup.benchmark.determinism import BY_DEFAULT, deterministic, facts, noted
from worstgroup.benchmark.record import find, read
from worstgroup.benchmark.runner import run_spec

if TYPE_CHECKING:
    from helpers import Call

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_KERNEL = "{} does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms'."


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test sets is as it was afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def warn(*messages: str) -> None:
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=1)


@pytest.mark.usefixtures("with_gpu")
def test_it_is_asked_of_kernels_cudnn_and_cublas_and_taken_back() -> None:
    deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


@pytest.mark.usefixtures("with_gpu")
def test_a_workspace_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_on_a_processor_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    deterministic(True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert facts(CPU) == {"deterministic": True}


def test_a_record_says_what_is_not_deterministic() -> None:
    assert facts(CUDA) == {"deterministic": False, "not_deterministic": list(BY_DEFAULT)}
    determinism._set(True)
    assert facts(CUDA) == {"deterministic": True, "not_deterministic": []}


def test_operations_without_such_a_kernel_are_noted_once_and_other_warnings_shown() -> None:
    env: dict[str, Any] = {"deterministic": True, "not_deterministic": []}
    names = ("cumsum_cuda_kernel", "cumsum_cuda_kernel", "upsample_bilinear2d_backward_out_cuda")
    with pytest.warns(UserWarning, match="something else") as shown, noted(env):
        warn(*(NO_KERNEL.format(name) for name in names), "something else")
    assert env["not_deterministic"] == ["cumsum_cuda_kernel", "upsample_bilinear2d_backward_out_cuda"]
    assert [str(warning.message) for warning in shown] == ["something else"]


@pytest.mark.parametrize("env", [facts(CPU), {"deterministic": False, "not_deterministic": list(BY_DEFAULT)}])
def test_without_it_warnings_are_left_alone(env: dict[str, Any]) -> None:
    before = json.dumps(env)
    with pytest.warns(UserWarning, match="deterministic implementation"), noted(env):
        warn(NO_KERNEL.format("cumsum_cuda_kernel"))
    assert json.dumps(env) == before


@pytest.mark.usefixtures("with_gpu")
def test_workers_take_it_over(monkeypatch: pytest.MonkeyPatch) -> None:
    deterministic(True)
    pool = executors._pool(2, 1, ())
    pool.shutdown()
    given = pool._initargs  # type: ignore[attr-defined]
    deterministic(False)
    monkeypatch.setattr(executors.signal, "signal", lambda *_: None)
    executors._initialise(*given)
    assert torch.are_deterministic_algorithms_enabled()


def test_the_record_of_a_gpu_names_kernels_and_libraries() -> None:
    determinism._set(True)
    made = plan_tiny("erm", recipe__precision="tf32")
    assert made.runs[0].spec is not None
    with gpu():
        env = run_spec(made.runs[0].spec, made.stores["tiny"]).env
    expected = {"deterministic": True, "not_deterministic": [], "tf32": True, "autotuning": False}
    assert {key: env[key] for key in expected} == expected
    assert {"cuda", "cudnn"} <= set(env["versions"])


def test_it_does_not_make_another_run(call: "Call", home: Path) -> None:
    options = ("--dataset", "tiny", "--method", "erm", "--seeds", 0, "--jobs", 1, "--quiet")
    assert call("run", *options, "--deterministic").code == 0
    (path,) = find(home / "runs")
    before = path.read_bytes()
    assert call("run", *options).code == 0
    assert list(find(home / "runs")) == [path]
    assert path.read_bytes() == before
    assert read(path).env["deterministic"] is True
    assert "tf32" not in read(path).env  # there are no such kernels on a processor
