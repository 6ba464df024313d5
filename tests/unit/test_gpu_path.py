"""The GPU path without a GPU: whole runs on a pretended one wait for nothing in a step and give the CPU's bits.

`pretend.py` refuses tensors of two devices, as CUDA does, and notes what would make the host wait.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import plan_tiny, predictions
from pretend import CUDA, Pretence, gpu
from torch import Tensor, nn
from torch.nn import functional as F
from worstgroup.analysis.gallery import gallery
from worstgroup.analysis.look import look
from worstgroup.benchmark import engine, runner
from worstgroup.benchmark.data import Joined, Pixels, augment
from worstgroup.benchmark.home import runs_home
from worstgroup.benchmark.lab import Lab
from worstgroup.benchmark.record import RunRecord, find
from worstgroup.benchmark.registry import METHODS
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import Recipe
from worstgroup.benchmark.steps import Side, find_training, interleave
from worstgroup.benchmark.yardsticks import bare_loop

WAITS = {
    "ex2l@masked": {"nonzero"},  # the second network sees annotated images alone: their number decides shapes
    "dann@masked": {"nonzero"},  # so does the discriminator
}
"""What waits in a step, and why it may: at the native budgets, where all images are annotated, nothing does."""
COMPOSED = (*WAITS, "coral@masked", "groupdro+exmap", "erm(+val)")
QUICK = ("erm", "ex2l", "mac", "masktune", "divdis", "lle", "dann", "erm(+val)")
"""These have what others lack: two networks, draws in the loss or the transform, several splits, players in turn."""


@pytest.fixture
def plain_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimisers as on a CPU: fused ones differ in the last bits."""
    monkeypatch.setattr(engine, "optimizer_options", lambda device: {})
    for name in ("adam", "sgd"):
        module = importlib.import_module(f"torch.optim.{name}")
        monkeypatch.setattr(module, "_default_to_fused_or_foreach", lambda *_, **__: (False, False))


def run(method: str, **settings: str) -> RunRecord:
    """A finished run on `tiny`."""
    made = plan_tiny(method, **settings)
    assert made.runs[0].spec is not None, made.runs[0].reason
    record = run_spec(made.runs[0].spec, made.stores["tiny"])
    assert record.status == "finished", record.error
    return record


def waits(pretended: Pretence) -> set[str]:
    """What would have waited within an epoch."""
    return {what for place, what in pretended.waits if place in ("step", "batch")}


# --------------------------------------------------------------------------------------------------------- every step


@pytest.mark.parametrize("method", [*METHODS, *COMPOSED])
def test_no_step_waits_for_the_device(method: str) -> None:
    with gpu() as pretended:
        record = run(method)
    assert record.env["device_type"] == "cuda"
    assert waits(pretended) == WAITS.get(method, set())


def test_views_are_made_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worstgroup.methods.blocks.barlow_twins.WIDTH", 32)
    with gpu() as pretended:
        run("clusterfix", clusterfix__init="ssl", clusterfix__ssl_lr="0.006")
    assert waits(pretended) == set()
    assert any(place == "batch" for place, _ in pretended.copied)


@pytest.mark.usefixtures("plain_optimizers")
@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in [*METHODS, *COMPOSED]]
)
def test_the_path_of_a_gpu_gives_the_cpus_bits(method: str, tmp_path: Path) -> None:
    assert_same_bits(method, tmp_path)


@pytest.mark.usefixtures("plain_optimizers")
def test_augmentation_of_a_gpu_gives_the_cpus_bits(tmp_path: Path) -> None:
    assert_same_bits("erm", tmp_path, recipe__augment="crop+flip", recipe__channels_last="true")
    assert_same_bits("erm", tmp_path / "flip", recipe__augment="flip")


def assert_same_bits(method: str, folder: Path, free: int = 2**40, **settings: str) -> Pretence:
    """Run it on the CPU and on a pretended GPU, in two homes."""
    with patch.dict(os.environ, WORSTGROUP_HOME=str(folder / "cpu")):
        expected = predictions(run(method, **settings))
    with patch.dict(os.environ, WORSTGROUP_HOME=str(folder / "gpu")):
        with gpu(free=free) as pretended:
            found = run(method, **settings)
        assert predictions(found) == expected
    return pretended


# ------------------------------------------------------------------------------------------------------------ kernels

Flags = tuple[bool, bool]


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[Flags]]:
    """Flags (TF32, autotuning) that convolutions were computed under in training, in evaluation, and outside both."""
    found: dict[str, set[Flags]] = {"training": set(), "evaluation": set(), "outside": set()}
    depth, convolve = [0], F.conv2d

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        place = "outside" if not depth[0] else "training" if torch.is_grad_enabled() else "evaluation"
        found[place].add((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark))
        return convolve(*args, **kwargs)

    def inner(loop: Callable[..., Any]) -> Callable[..., Any]:
        def within(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            try:
                return loop(*args, **kwargs)
            finally:
                depth[0] -= 1

        return within

    monkeypatch.setattr(F, "conv2d", noted)
    for name in ("fit", "predict"):
        monkeypatch.setattr(engine, name, inner(getattr(engine, name)))
    return found


@pytest.mark.parametrize("method", ["groupdro+exmap", "afr"])  # they convolve in loops of their own: LRP, features
def test_outside_the_engines_loops_all_is_single_precision(method: str, convolutions: dict[str, set[Flags]]) -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with gpu():
        run(method, recipe__precision="tf32")
    assert convolutions == {"training": {(True, True)}, "evaluation": {(True, True)}, "outside": {(False, False)}}
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before


def test_a_run_is_looked_at_in_single_precision_too(tmp_path: Path, convolutions: dict[str, set[Flags]]) -> None:
    with gpu():
        run("erm", recipe__precision="tf32")
        seen = look(next(find(runs_home())))
        convolutions["outside"].clear()
        gallery(seen, tmp_path / "gallery.png", "lrp", "test", columns=2)
    assert convolutions["outside"] == {(False, False)}


def test_kernels_are_not_tuned_to_shapes_of_a_single_step(convolutions: dict[str, set[Flags]]) -> None:
    with gpu():
        record = run("ex2l@masked")
    assert convolutions["training"] == {(False, False)}
    assert record.env["autotuning"] is False


# --------------------------------------------------------------------------------------------------------------- room


@pytest.mark.parametrize(("sharers", "resident"), [(1, ["train"]), (2, ["val"])])
def test_a_runs_splits_have_one_share_of_its_part_of_the_device(
    sharers: int, resident: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labs: list[Lab] = []
    monkeypatch.setattr(runner, "Lab", lambda *args: labs.append(Lab(*args)) or labs[-1])
    made = plan_tiny("erm")
    assert made.runs[0].spec is not None
    with gpu(free=130 * 2**10):  # of which 78 are for images: those of train are 72 KiB, of validation 36
        record = run_spec(made.runs[0].spec, made.stores["tiny"], sharers=sharers)
        assert record.status == "finished", record.error
        (lab,) = labs
        assert [split for (split, _), pixels in lab._pixels.items() if pixels.resident] == resident


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.usefixtures("plain_optimizers")
@pytest.mark.parametrize("method", ["erm", "divdis"])  # of one split, of two
def test_images_that_do_not_fit_come_a_batch_ahead_without_waiting(method: str, tmp_path: Path) -> None:
    pretended = assert_same_bits(method, tmp_path, free=0)
    assert waits(pretended) == set()
    assert sum(size for place, size in pretended.copied if place == "batch") > 96 * 16 * 16 * 3


def pixels(n: int = 20, device: torch.device = CUDA) -> Pixels:
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 10, 3), dtype=np.uint8)
    return Pixels(images, np.arange(n), (0.5,) * 3, (0.25,) * 3, device)


def test_an_epoch_moves_its_indices_at_once_and_then_boxes_alone() -> None:
    batches = torch.randperm(20).split(8)
    with gpu() as pretended:
        train = pixels()
        before = len(pretended.copied)
        list(train.epoch(batches))
        assert [size for _, size in pretended.copied[before:]] == [20 * 8]
        before = len(pretended.copied)
        list(train.epoch(batches, augment("crop+flip", torch.Generator())))
        assert [size for _, size in pretended.copied[before:]] == [20 * 8, *(5 * 4 * size for size in (8, 8, 4))]
    assert "copy to the device" not in waits(pretended)


@pytest.mark.parametrize("free", [0, 2**40])
def test_a_batch_is_what_it_is_on_a_cpu_wherever_the_images_lie(free: int) -> None:
    index, cpu = torch.tensor([3, 19, 3, 0]), torch.device("cpu")
    parts = [np.array([5, 1]), np.array([0, 7, 19])]

    def made(device: torch.device) -> list[Tensor]:
        one, other = (pixels(device=device) for _ in range(2))
        joined = Joined([(one, parts[0]), (other, parts[1])], labels=[True, False])
        chosen = torch.tensor([4, 0, 2, 1])
        batches = [one.batch(index), *one.epoch([index, index[:2]]), joined.batch(chosen), *joined.epoch([chosen])]
        return [part for batch in batches for part in (batch.x, batch.y, batch.index)]

    expected = made(cpu)
    with gpu(free=free):
        found = made(CUDA)
        assert {value.device for value in found} == {CUDA}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------ profile


def test_profiled_steps_wait_for_nothing_either() -> None:
    with gpu() as pretended:
        made = plan_tiny("groupdro", recipe__augment="crop+flip")
        assert made.runs[0].spec is not None
        sides = []
        for _ in range(2):
            setup = find_training(made.runs[0].spec, made.stores["tiny"])
            assert setup is not None
            sides.append(Side(setup))
        blocks = interleave((sides[0], sides[1]), rounds=1, steps=3)
        assert sides[0].peak_memory() is not None
    assert waits(pretended) == set()
    assert blocks[0][0].seconds.tolist() == [0.001] * 3  # of CUDA events, in milliseconds


def test_the_bare_loop_does_not_wait_either() -> None:
    images = torch.zeros((16, 16, 16, 3), dtype=torch.uint8)
    with gpu() as pretended:
        recipe = Recipe(batch_size=4, augment="crop+flip")
        bare_loop(images, "tiny_cnn", recipe, CUDA, steps=1, warmup=1)
        setup = len(pretended.waits)
        pretended.waits.clear()
        bare_loop(images, "tiny_cnn", recipe, CUDA, steps=5, warmup=1)
    assert len(pretended.waits) == setup  # as many however many steps there are


# ------------------------------------------------------------------------------------------------------- the pretence


def test_numpy_and_generators_of_the_host_are_refused() -> None:
    with gpu():
        there, here = torch.ones(3, device="cuda"), torch.Generator()
        for convert in (Tensor.numpy, np.asarray):
            with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
                convert(there)
        assert there.numpy(force=True).tolist() == there.cpu().numpy().tolist() == [1, 1, 1]
        for draw in (
            lambda: torch.rand(3, device="cuda", generator=here),
            lambda: torch.randperm(3, device="cuda", generator=here),
            lambda: there.multinomial(1, generator=here),
            lambda: there.uniform_(generator=here),
            lambda: torch.bernoulli(there, generator=here),
        ):
            with pytest.raises(RuntimeError, match="expected a 'cuda' device type for generator but found 'cpu'"):
                draw()
        assert torch.rand(3, generator=here).to("cuda").is_cuda
        assert torch.rand(3, device="cuda").is_cuda


def test_devices_are_not_mixed() -> None:
    with gpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device == CUDA
        assert there.is_cuda
        assert not here.is_cuda
        assert (there + torch.tensor(2.0)).is_cuda  # a number may come from anywhere
        with pytest.raises(RuntimeError, match=r"add.*cuda.*cpu"):
            torch.add(there, here)
        with pytest.raises(RuntimeError, match="linear"):
            nn.Linear(3, 2)(there)
        assert nn.Linear(3, 2).to("cuda")(there).is_cuda
        assert not there.cpu().is_cuda
    assert there.device.type == "cpu"


@pytest.mark.parametrize(
    ("look", "what"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: bool(x.any()), "__bool__"),
        (lambda x: float(x[0]), "__float__"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "__getitem__"),
        (lambda x: x.__setitem__(x > 0, x[:2] + 1), "__setitem__"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.long().bincount(), "bincount"),
        (lambda x: x.multinomial(1), "multinomial"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: x + torch.tensor([1.0], device="cuda"), "copy to the device"),
        (lambda x: x + torch.ones(3).to("cuda"), "copy to the device"),
        (lambda x: x + torch.ones(3).to("cuda", non_blocking=True), "copy to the device"),
        (lambda x: x.copy_(torch.ones(3)), "copy between devices"),
        (lambda x: torch.isin(x, x).all().item(), "item"),
    ],
)
def test_what_waits_is_noted(look: Callable[[Tensor], object], what: str) -> None:
    with gpu() as pretended:
        look(torch.tensor([0.0, 1.0, 2.0]).pin_memory().to("cuda", non_blocking=True))
    assert what in {name for _, name in pretended.waits}


def test_what_does_not_wait_is_not_noted() -> None:
    with gpu() as pretended:
        x = torch.arange(6.0, device="cuda").view(2, 3).requires_grad_()
        y = torch.randint(3, (2,), device="cuda")
        loss = F.cross_entropy(x[torch.randperm(2, device="cuda")], y)
        (loss + F.one_hot(y, 3).sum()).backward()
        assert x.grad is not None
        assert x.grad.is_cuda
        x.detach()[x.detach() > 2] = 0.0  # a masked fill
        torch.where(x > 1, x, 0.0).repeat_interleave(2)
        len(x), x.shape, x.numel()
    assert pretended.waits == []
