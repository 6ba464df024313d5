"""Content-addressed store of what several runs share: ERM trajectories, features, logits.

An artifact's key is the hash of everything that determines it. It is made once, under a lock, appears whole or not at
all, and carries the cost of its making so that every consumer can bill it.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .cost import StageCost
from .errors import CorruptFile
from .home import artifacts_home, lock, write_folder
from .spec import digest


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its kind, key, folder and what its making cost."""

    kind: str
    key: str
    path: Path
    cost: StageCost

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one safetensors file; raises `CorruptFile` when it is damaged."""
        try:
            return load_file(self.path / f"{name}.safetensors")
        except (SafetensorError, OSError) as error:
            raise self.corrupt(f"{name}.safetensors") from error

    def array(self, name: str) -> NDArray[Any]:
        """Read one .npy file; raises `CorruptFile` when it is damaged."""
        try:
            array: NDArray[Any] = np.load(self.path / f"{name}.npy", allow_pickle=False)
        except (ValueError, OSError, EOFError, BadZipFile) as error:
            raise self.corrupt(f"{name}.npy") from error
        return array

    def json(self, name: str) -> Any:
        """Read one JSON file; raises `CorruptFile` when it is damaged."""
        try:
            return json.loads((self.path / f"{name}.json").read_text())
        except (ValueError, OSError) as error:
            raise self.corrupt(f"{name}.json") from error

    def corrupt(self, name: str) -> CorruptFile:
        """The error for a damaged file of this artifact."""
        return CorruptFile(f"{self.path / name} is damaged; delete the folder {self.path}, it is made again.")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a state dict as safetensors, contiguous copies of shared or strided tensors included."""
    path.write_bytes(save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}))


def artifact_path(kind: str, identity: Any) -> Path:
    """Folder of the artifact of this identity, made or not; its name is the artifact's key."""
    return artifacts_home() / kind / digest([kind, identity])[:24]


def artifact(
    kind: str,
    identity: Any,
    make: Callable[[Path], StageCost],
    waiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Artifact:
    """Return the artifact of this identity, letting `make` fill its folder first if it does not exist.

    A second process that wants the same artifact waits for the first, inside `waiting()`.
    """
    path = artifact_path(kind, identity)
    key = path.name
    if not (path / "meta.json").exists():
        with ExitStack() as held:
            with waiting():
                held.enter_context(lock(path))
            if not (path / "meta.json").exists():
                shutil.rmtree(path, ignore_errors=True)

                def fill(folder: Path) -> None:
                    cost = make(folder)
                    meta = {"kind": kind, "key": key, "identity": identity, "cost": asdict(cost)}
                    (folder / "meta.json").write_text(json.dumps(meta, indent=1))

                write_folder(path, fill)
    try:
        cost = StageCost(**json.loads((path / "meta.json").read_text())["cost"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path / 'meta.json'} is damaged; delete the folder {path}, it is made again.") from error
    return Artifact(kind, key, path, cost)


def work_folder(key: str) -> Path:
    """Where a run or artifact in the making keeps its full-state checkpoints, so that a restart goes on."""
    return artifacts_home() / "work" / key


def load_state(path: Path) -> dict[str, Any] | None:
    """A full-state checkpoint, or None when there is none or it is damaged (training then starts anew)."""
    if not path.exists():
        return None
    try:
        with ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch itself does not look at the checksums
                return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises a dozen types for damaged files; a lost checkpoint only costs time
        return None
    return state
