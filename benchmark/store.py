"""The uint8 store: every image decoded once into a memory-mapped NHWC file beside its labels.

A store lies under `$WORSTGROUP_HOME/data/store/` and is keyed by the dataset's sources, so that changed sources or a
changed generator make a new store. It appears whole or not at all, and several processes may open it.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from . import metrics
from .errors import CorruptFile, MissingData
from .home import data_home, lock, write_folder
from .spec import SPLITS, Card, SplitName, digest

VERSION = 1
_CHUNK = 4096


class ImageSource(Protocol):
    """Decoded pixels of a split: `len()` images, and slices of them as uint8 (n, h, w, c). A NumPy array is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: slice, /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, eq=False)
class Split:
    """Images, labels `y` (n,), attributes `a` (n, k), and the independent unit of each example (n,).

    Examples that show the same object (one digit on several backgrounds) share a unit; intervals resample units.
    """

    images: ImageSource
    y: NDArray[np.int64]
    a: NDArray[np.int64]
    unit: NDArray[np.int64] | None = None

    def units(self) -> NDArray[np.int64]:
        """Unit of each example; by default each is its own."""
        return np.arange(len(self.y)) if self.unit is None else self.unit


Splits = dict[SplitName, Split]


class Dataset(Protocol):
    """What a dataset class offers, beside its cards."""

    def __init__(self, card: Card) -> None: ...

    def source_key(self, root: Path | None) -> str:
        """Identity of the source files, cheap to compute; raises `MissingData` when they are not there."""
        ...

    def load(self, root: Path | None) -> Splits:
        """Read the official files; raises `MissingData` or `CorruptFile`."""
        ...


class _Manifest(BaseModel):
    """What a store says of itself: SHA-256 of its contents, sizes of its files, and the fingerprint of all of it."""

    card: str
    content: dict[str, str]
    sizes: dict[str, int]
    fingerprint: str


@dataclass(frozen=True)
class Store:
    """An opened store: `fingerprint` identifies pixels and labels, `card` says what they mean."""

    path: Path
    card: Card
    fingerprint: str

    def split(self, name: SplitName) -> Split:
        """Memory-mapped images and labels of one split."""
        labels = np.load(self.path / f"{name}.labels.npz", allow_pickle=False)
        images = np.load(self.path / f"{name}.images.npy", mmap_mode="c", allow_pickle=False)
        return Split(images, labels["y"], labels["a"], labels["unit"])


def open_store(dataset: Dataset, card: Card, root: Path | None = None) -> Store:
    """Open a dataset's store, building it first if need be.

    Raises `MissingData` with what to put where, `CorruptFile` for files that are not what the card says.
    """
    key = digest([card.name, _asset(card), dataset.source_key(root), VERSION])[:16]
    path = data_home() / "store" / f"{card.name.replace(':', '_').replace('/', '-')}-{key}"
    if not (path / "manifest.json").exists():
        with lock(path):
            if not (path / "manifest.json").exists():
                splits = dataset.load(root)
                check_counts(card, splits)
                shutil.rmtree(path, ignore_errors=True)  # a folder without a manifest is no store
                write_folder(path, _writer(splits, card))
    return Store(path, card, _read_manifest(path).fingerprint)


def check_counts(card: Card, splits: Splits) -> None:
    """Raise `CorruptFile` unless every split has exactly the group counts of the card."""
    for name in SPLITS:
        try:
            group = metrics.group_index(splits[name].y, splits[name].a, card.shape)
        except ValueError as error:
            raise CorruptFile(f"{card.name}: the {name} split has a label or attribute outside {card.shape}") from error
        found = tuple(int(n) for n in np.bincount(group, minlength=card.num_groups))
        if name in card.counts and found != card.counts[name]:
            raise CorruptFile(
                f"{card.name}: the {name} split has group counts {found}, the card says {card.counts[name]}. "
                "The files are not the official ones; replace them."
            )


def _asset(card: Card) -> list[Any]:
    """What of a card decides the stored bytes."""
    return [card.classes, [asdict(attribute) for attribute in card.attributes], card.image, card.params]


def _writer(splits: Splits, card: Card) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        files = {}
        for name in SPLITS:
            split = splits[name]
            files[f"{name}.images.npy"] = _write_images(folder / f"{name}.images.npy", split.images, card.image)
            np.savez(folder / f"{name}.labels.npz", y=split.y, a=split.a, unit=split.units())
            labels = b"".join(np.ascontiguousarray(part).tobytes() for part in (split.y, split.a, split.units()))
            files[f"{name}.labels.npz"] = hashlib.sha256(labels).hexdigest()
        sizes = {file: (folder / file).stat().st_size for file in files}
        manifest = _Manifest(card=card.name, content=files, sizes=sizes, fingerprint=digest(files)[:16])
        (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1))

    return fill


def _write_images(path: Path, source: ImageSource, image: tuple[int, int, int]) -> str:
    """Copy an image source into a .npy file chunk by chunk; returns the SHA-256 of the pixels."""
    content = hashlib.sha256()
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(source), *image)}
    with path.open("wb") as file:  # not through a memory map: on a full disk that ends in SIGBUS, not in an error
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(source), _CHUNK):
            chunk = np.ascontiguousarray(source[start : start + _CHUNK], dtype=np.uint8)
            if chunk.shape[1:] != image:
                raise CorruptFile(f"{path.stem}: images of shape {chunk.shape[1:]}, the card says {image}")
            file.write(chunk.data)
            content.update(chunk.data)
    return content.hexdigest()


def _read_manifest(path: Path) -> _Manifest:
    try:
        manifest = _Manifest.model_validate_json((path / "manifest.json").read_bytes())
    except (ValidationError, OSError) as error:
        raise CorruptFile(f"{path}: its manifest cannot be read; delete the folder, it is rebuilt.") from error
    for name, size in manifest.sizes.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise CorruptFile(f"{path / name}: missing or truncated; delete the folder, it is rebuilt.")
    return manifest


def search(relative: str, root: Path | None, *, what: str) -> list[Path]:
    """Folders in which a dataset may lie: those of `--root`, else of `$WORSTGROUP_HOME/data` and then of `shared/data`
    beside a checkout. Raises `MissingData` when `root` is given and is no folder.
    """
    if root is not None and not root.is_dir():
        raise MissingData(f"{what}: --root {root} is not a folder")
    places = [root] if root is not None else [data_home(), Path(__file__).parents[2] / "shared" / "data"]
    return [folder for place in places for folder in (place / relative, place) if folder.is_dir()]
