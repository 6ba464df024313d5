"""A GPU that is none: tensors of the CPU that say they are on one, and notes of what the host would wait for.

Only what Python asks of torch is watched: a mixture of devices is refused as CUDA refuses it, and values are those of
the CPU, so that a whole run can be compared with one that was really made there.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from worstgroup.benchmark import engine
from worstgroup.benchmark.data import Pixels
from worstgroup.benchmark.device import running_on

CUDA = torch.device("cuda", 0)
WAITING = {
    *("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"),
    *("nonzero", "argwhere", "unique", "unique_consecutive", "_unique2", "unique_dim", "bincount", "masked_select"),
    *("equal", "allclose", "is_nonzero", "multinomial", "histc", "__format__", "__repr__"),
}
"""Functions whose result, or its shape, the host must have."""
INSIDE = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::bincount"}
"""Operations that make the host wait inside a function of several."""
ON_CPU_ALONE = (F.one_hot,)
"""Functions that look at their values on a CPU and not on a GPU."""
MOVES = {"to", "cuda", "cpu"}
FREE = {
    "__set__",
    "_has_compatible_shallow_copy_type",
    "copy_",
    "backward",
    "record_stream",
    "register_hook",
    "__deepcopy__",
}
"""Of these the tensors may be on different devices."""


class Pretence(TorchFunctionMode):
    """While it is on, devices are as the program believes them to be.

    In order: `waits` are (place, function), `copied` (place, bytes) from the host to the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = ""
        self.waits: list[tuple[str, str]] = []
        self.copied: list[tuple[str, int]] = []
        self._moved = WeakTensorKeyDictionary()
        self._pinned = WeakTensorKeyDictionary()

    def on_gpu(self, tensor: Tensor) -> bool:
        return tensor in self._moved

    def wait(self, what: str) -> None:
        self.waits.append((self.place, what))

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Waits inside belong to this place."""
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "__get__" and getattr(func, "__self__", None) in (Tensor.device, Tensor.is_cuda):
            on_gpu = self.on_gpu(args[0])
            if func.__self__ is Tensor.is_cuda:
                return on_gpu
            return CUDA if on_gpu else func(*args)
        if name in MOVES and isinstance(args[0], Tensor):
            return self._move(func, args, kwargs)
        if name == "pin_memory":
            pinned = args[0].clone()
            self._pinned[pinned] = True
            return pinned
        return self._called(func, name, args, kwargs)

    def _called(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        self._refuse(name, args, kwargs)
        asked = kwargs.pop("device", None)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [self.on_gpu(tensor) for tensor in tensors]
        strangers = [t for t, on_gpu in zip(tensors, there, strict=True) if not on_gpu and t.ndim > 0]
        if any(there) and strangers and name not in FREE:
            raise RuntimeError(f"{name}: tensors on cuda and on cpu, of shapes {[tuple(t.shape) for t in tensors]}")
        on_gpu = any(there) if asked is None else torch.device(asked).type == "cuda"
        if any(there) and (name in WAITING or self._looks_at_values(name, args, kwargs)):
            self.wait(name)
        if name == "tensor" and on_gpu:
            self.wait("copy to the device")
        if name == "copy_" and len(set(there)) > 1:
            self.wait("copy between devices")
        watch = any(there) and name not in WAITING and func not in ON_CPU_ALONE
        with _Inside(self, name) if watch else nullcontext():
            out = func(*args, **kwargs)
        if name == "__set__" and func.__self__ is Tensor.data:
            self.mark(args[0], self.on_gpu(args[1]))
        elif (on_gpu or asked is not None) and name not in FREE - {"__deepcopy__"}:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.mark(leaf, on_gpu)
        return out

    def _refuse(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise what CUDA does: NumPy sees no device, and a device draws from generators of its own."""
        there = any(self.on_gpu(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if there and name in ("numpy", "__array__") and not kwargs.get("force"):
            raise TypeError(f"{name}: can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        drawn_there = there if kwargs.get("device") is None else torch.device(kwargs["device"]).type == "cuda"
        if drawn_there and any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))):
            raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")

    def mark(self, tensor: Tensor, on_gpu: bool) -> None:
        if on_gpu:
            self._moved[tensor] = True
        else:
            self._moved.pop(tensor, None)

    def _looks_at_values(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [i for i in index if isinstance(i, Tensor) and (i.dtype == torch.bool or i.ndim == 0)]
            fills = name == "__setitem__" and not (isinstance(args[2], Tensor) and args[2].numel() > 1)
            return bool(masks) and not fills
        if name == "where":
            return len(args) + len(kwargs) == 1
        if name == "repeat_interleave":
            counts = [*args[1:], kwargs.get("repeats")]
            return any(isinstance(count, Tensor) for count in counts) and kwargs.get("output_size") is None
        return False

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, *values = args
        here, there, changes = self.on_gpu(tensor), self.on_gpu(tensor), {}
        waits = not kwargs.pop("non_blocking", False)
        for value in [*values, kwargs.pop("device", None), kwargs.pop("dtype", None), kwargs.pop("other", None)]:
            if isinstance(value, bool):
                waits = not value
            elif isinstance(value, torch.device | str):
                there = torch.device(value).type == "cuda"
            elif isinstance(value, Tensor):
                there, changes["dtype"] = self.on_gpu(value), value.dtype
            elif isinstance(value, torch.dtype):
                changes["dtype"] = value
        if func.__name__ != "to":
            there = func.__name__ == "cuda"
        if there and not here:
            self.copied.append((self.place, tensor.nbytes))
            if waits or tensor not in self._pinned:
                self.wait("copy to the device")
        if here and not there:
            self.wait("copy to the host")
        changes |= kwargs
        moved: Tensor = tensor.to(**changes) if changes else tensor
        if there != here and moved is tensor:
            moved = tensor.clone()
        self.mark(moved, there)
        return moved


class _Inside(TorchDispatchMode):
    """Notes operations inside a function that would make the host wait."""

    def __init__(self, gpu: Pretence, name: str) -> None:
        super().__init__()
        self.gpu, self.name = gpu, name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in INSIDE:
            self.gpu.wait(f"{func.name()} in {self.name}")
        return func(*args, **(kwargs or {}))


class _Stream:
    """A stream, or an event; everything happens in order here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def elapsed_time(self, _: Any) -> float:
        return 1.0


@contextmanager
def gpu(*, free: int = 2**40) -> Iterator[Pretence]:
    """Runs inside take a GPU of so many bytes, all `free`; waits lie in a `step`, in making a `batch` or in neither."""
    pretence = Pretence()
    of, epoch = engine.Players.of.__func__, Pixels.epoch  # type: ignore[attr-defined]

    def players(cls: Any, objective: Any, *rest: Any) -> Any:
        step = type(objective).step

        def placed(*arguments: Any) -> Tensor:
            with pretence.at("step"):
                made: Tensor = step(objective, *arguments)
                return made

        objective.step = placed
        return of(cls, objective, *rest)

    def batches(*arguments: Any) -> Iterator[Any]:
        made = epoch(*arguments)
        while True:
            with pretence.at("batch"):
                batch = next(made, None)
            if batch is None:
                return
            yield batch

    make = Tensor._make_subclass

    def subclass(cls: Any, data: Tensor, *rest: Any) -> Tensor:
        made: Tensor = make(cls, data, *rest)  # a parameter, which torch makes past its function modes
        pretence.mark(made, pretence.on_gpu(data))
        return made

    stubs: dict[str, Callable[..., Any]] = {
        "synchronize": lambda *_: None,
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "mem_get_info": lambda *_: (free, free),
        "get_device_name": lambda *_: "Pretended",
        "get_rng_state": lambda *_: None,
        "set_rng_state": lambda *_: None,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: nullcontext(),
        "Event": _Stream,
    }
    with ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(patch.object(torch.cuda, name, stub))
        stack.enter_context(patch.object(engine.Players, "of", classmethod(players)))
        stack.enter_context(patch.object(Pixels, "epoch", batches))
        stack.enter_context(patch.object(Tensor, "_make_subclass", staticmethod(subclass)))
        stack.enter_context(patch.object(Tensor, "record_stream", lambda *_: None))
        stack.enter_context(running_on(torch.device("cuda")))
        stack.enter_context(pretence)
        yield pretence
