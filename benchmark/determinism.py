"""Runs that give the same bits again on a GPU: what is asked of PyTorch, and what a record says of it.

On a processor every run does, given the number of threads; nothing is asked there.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACE = ":4096:8"
"""cuBLAS sums in a fixed order in workspaces of a fixed size only; it reads this once, when it starts."""
BY_DEFAULT = ("cuDNN chooses its algorithms by timing them", "kernels that add atomically add in any order")
"""What is not deterministic on a GPU unless it is asked for."""
_WARNING = re.compile(r"^(\S+) does not have a deterministic implementation")


def deterministic(on: bool) -> None:
    """From now on take deterministic kernels on a GPU wherever there are some, or the fastest again.

    Operations without any are not refused, they are noted (see `noted`).
    """
    if torch.cuda.is_available():
        _set(on)


def _set(on: bool) -> None:
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.backends.cudnn.deterministic = on


def facts(device: torch.device) -> dict[str, Any]:
    """What a record says: whether a run is `deterministic`, and what on a GPU is not (`not_deterministic`).

    Where determinism is on the latter is empty; `noted` adds the operations that turn out to have no such kernel.
    """
    if device.type != "cuda":
        return {"deterministic": True}
    on = torch.are_deterministic_algorithms_enabled()
    return {"deterministic": on, "not_deterministic": [] if on else list(BY_DEFAULT)}


@contextmanager
def noted(env: dict[str, Any]) -> Iterator[None]:
    """Add to `env` the operations that PyTorch warns of inside; other warnings are shown as ever."""
    if not env.get("deterministic") or "not_deterministic" not in env:
        yield
        return
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.filterwarnings("always", _WARNING.pattern)

        def note(message: Warning | str, *where: Any, **more: Any) -> None:
            found = _WARNING.match(str(message))
            if found is None:
                show(message, *where, **more)
            elif found[1] not in env["not_deterministic"]:
                env["not_deterministic"].append(found[1])

        warnings.showwarning = note
        yield
