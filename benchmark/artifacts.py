"""Content-addressed store of what several runs share: ERM trajectories, features, logits.

An artifact's key is the hash of everything that determines it. It is made once, under a lock, appears whole or not at
all, and carries the cost of its making so that every consumer can bill it, and the CRC-32 of its files, so that none
takes a damaged one.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field
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
from .home import artifacts_home, disk_errors, lock, remove_folder, write_folder
from .spec import digest


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its kind, key, folder, what its making cost, and the CRC-32 of its files."""

    kind: str
    key: str
    path: Path
    cost: StageCost
    files: dict[str, int] = field(default_factory=dict)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read one safetensors file; raises `CorruptFile` when it is damaged."""
        try:
            return load_file(self._sound(f"{name}.safetensors"))
        except (SafetensorError, OSError) as error:
            raise self.corrupt(f"{name}.safetensors") from error

    def array(self, name: str) -> NDArray[Any]:
        """Read one .npy file; raises `CorruptFile` when it is damaged."""
        try:
            array: NDArray[Any] = np.load(self._sound(f"{name}.npy"), allow_pickle=False)
        except (ValueError, OSError, EOFError, BadZipFile) as error:
            raise self.corrupt(f"{name}.npy") from error
        return array

    def json(self, name: str) -> Any:
        """Read one JSON file; raises `CorruptFile` when it is damaged."""
        try:
            return json.loads(self._sound(f"{name}.json").read_text())
        except (ValueError, OSError) as error:
            raise self.corrupt(f"{name}.json") from error

    def corrupt(self, name: str) -> CorruptFile:
        """The error for a damaged file of this artifact."""
        return _damaged(self.path / name)

    def _sound(self, name: str) -> Path:
        """The path of a file that is as it was written; raises `CorruptFile` for another."""
        path = self.path / name
        if name in self.files and checksum(path) != self.files[name]:
            raise self.corrupt(name)
        return path


def _damaged(path: Path) -> CorruptFile:
    return CorruptFile(f"{path} is damaged; delete the folder {path.parent}, it is made again.")


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            total = zlib.crc32(block, total)
    return total


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a state dict as safetensors, contiguous copies of shared or strided tensors included."""
    path.write_bytes(save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}))


def artifact_path(kind: str, identity: Any) -> Path:
    """Folder of the artifact of this identity, made or not; its name is the artifact's key."""
    return artifacts_home() / kind / digest([kind, identity])[:24]


def keep_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """The same for an artifact in the making, with the file's CRC-32 beside it."""
    save_tensors(path, tensors)
    path.with_suffix(".crc32").write_text(str(checksum(path)))


def copy_kept(path: Path, folder: Path) -> None:
    """Copy such a file into the artifact's folder; raises `CorruptFile` for one that has changed since."""
    noted = path.with_suffix(".crc32")
    if not noted.exists() or noted.read_text() != str(checksum(path)):
        raise _damaged(path)
    shutil.copyfile(path, folder / path.name)


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
                with disk_errors(path), suppress(FileNotFoundError):
                    remove_folder(path)

                def fill(folder: Path) -> None:
                    cost = make(folder)
                    files = {file.name: checksum(file) for file in sorted(folder.iterdir())}
                    meta = {"kind": kind, "key": key, "identity": identity, "cost": asdict(cost), "files": files}
                    (folder / "meta.json").write_text(json.dumps(meta | {"checksum": _text_sum(meta)}, indent=1))

                write_folder(path, fill, "meta.json")
    meta = read_meta(path)
    return Artifact(kind, key, path, meta["cost"], meta.get("files", {}))


def read_meta(path: Path) -> dict[str, Any]:
    """What an artifact says of itself; raises `CorruptFile`."""
    try:
        meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
        if meta.pop("checksum", None) not in (None, _text_sum(meta)):  # artifacts of older versions have none
            raise _damaged(path / "meta.json")
        return meta | {"cost": StageCost(**meta["cost"])}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _damaged(path / "meta.json") from error


def _text_sum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta).encode())


def work_folder(key: str) -> Path:
    """Where a run or artifact in the making keeps its full-state checkpoints, so that a restart goes on."""
    return artifacts_home() / "work" / key


def drop_work(key: str) -> None:
    """Delete that folder, as far as the disk lets us."""
    with suppress(OSError):
        remove_folder(work_folder(key))


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
