"""Which device runs are made on, and how a GPU is used: copies that the host does not wait for, fused optimisers,
kernels by precision, compiled trunks.

On a processor nothing of this changes a bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

_told: ContextVar[torch.device | None] = ContextVar("_told", default=None)


def pick_device() -> torch.device:
    """The first GPU, else the CPU."""
    return _told.get() or torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def running_on(device: torch.device) -> Iterator[None]:
    """Inside, `pick_device` gives this device."""
    token = _told.set(device)
    try:
        yield
    finally:
        _told.reset(token)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; from the host to a GPU through pinned memory, so that the host goes on at once."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def all_to_device(parts: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Tensors of any lengths on the device, in a single copy to a GPU."""
    if device.type == "cpu" or not parts:
        return parts
    sizes = [len(part) for part in parts]
    return list(to_device(torch.cat(list(parts)), device).split(sizes))  # type: ignore[no-untyped-call]


def one_ahead(items: Sequence[Item], load: Callable[[Item], Loaded]) -> Iterator[Loaded]:
    """What `load` makes of the items in order, each before its predecessor is handed out: two exist at a time.

    On a GPU the host then gathers the next batch while the device is busy with the present one.
    """
    ahead: list[Loaded] = []
    for item in items:
        ahead.append(load(item))
        if len(ahead) > 1:
            yield ahead.pop(0)
    yield from ahead


# ---------------------------------------------------------------------------------------------------------- kernels


def optimizer_options(device: torch.device) -> dict[str, bool]:
    """Options of torch's optimisers for parameters on this device: on a GPU one kernel updates many of them."""
    return {"fused": True} if device.type == "cuda" else {}


def kernel_options(precision: str, device: torch.device, autotuning: bool = True) -> dict[str, bool]:
    """Which kernels a GPU takes: `tf32` ones for convolutions and matrix products, those that `autotuning` finds.

    Nothing on a processor. By itself PyTorch would round to TF32 in convolutions and not in matrix products, whatever
    a recipe says. Under bf16, what autocast leaves in float32 is left there for a reason. Autotuning times kernels anew
    for every shape of a batch: it pays where shapes come again and again, and is not to be had with determinism.
    """
    if device.type != "cuda":
        return {}
    autotuning = autotuning and not torch.are_deterministic_algorithms_enabled()
    return {"tf32": precision == "tf32", "autotuning": autotuning}


@contextmanager
def kernels(precision: str, device: torch.device, autotuning: bool = True) -> Iterator[None]:
    """Take those of `kernel_options`; what held before holds again afterwards."""
    options = kernel_options(precision, device, autotuning)
    if not options:
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = options["tf32"]
        cudnn.benchmark = options["autotuning"]
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def plain_kernels(device: torch.device) -> AbstractContextManager[None]:
    """Those of a run outside of the engine's loops, whatever its recipe: single precision, not tuned to shapes."""
    return kernels("fp32", device, autotuning=False)


# --------------------------------------------------------------------------------------------------------- compiling

GRAPHS = 1024
"""Graphs that torch may make of one piece of code. All trunks of a kind are one, whatever their block; at its own limit
of 8 it silently runs further ones uncompiled. Nothing runs away: a trunk meets one shape in each mode.
"""


def compile_trunk(trunk: nn.Module) -> None:
    """Compile a trunk's forward in place: hooks on it stay outside, and its state keeps its names.

    It is compiled for the first shape that it meets in each mode (training or not, with gradients or not), and runs as
    it is on all others: a short last batch is not worth a minute of compiling, and after some more shapes torch would
    give up on all of them. No CUDA graphs: their outputs are overwritten by the next pass, and some methods pass a
    trunk twice in a step.
    """
    _allow_graphs()
    trunk.__dict__.pop("forward", None)  # of an earlier training
    plain = trunk.forward
    fast = torch.compile(plain, dynamic=False)
    shapes: dict[tuple[bool, bool], torch.Size] = {}

    def forward(x: Tensor) -> Tensor:
        shape = shapes.setdefault((trunk.training, torch.is_grad_enabled()), x.shape)
        out: Tensor = fast(x) if x.shape == shape else plain(x)
        return out

    setattr(trunk, "forward", forward)  # noqa: B010


def _allow_graphs() -> None:
    from torch._dynamo import config  # a second to import, for those who compile

    for name, older in (
        ("recompile_limit", "cache_size_limit"),
        ("accumulated_recompile_limit", "accumulated_cache_size_limit"),
    ):
        limit = name if hasattr(config, name) else older
        setattr(config, limit, max(GRAPHS, getattr(config, limit)))
