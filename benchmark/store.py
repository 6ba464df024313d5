"""The store: labels of a dataset variant, beside pools of pixels that were decoded once.

A store lies under `$WORSTGROUP_HOME/data/store/`, keyed by its card and by the dataset's sources, so that changed
sources or a changed generator make a new store. It appears whole or not at all, and several processes may open it.
Variants that show the same pictures share their pools.
"""

import re
import shutil
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from pydantic import BaseModel, ValidationError

from . import metrics
from .download import fetch_dataset
from .errors import CorruptFile, MissingData
from .home import data_home, lock, write_bytes, write_folder
from .pools import Report, ensure_pool, has_pool, open_pool, pool_key
from .registry import package_card
from .spec import SPLITS, Attribute, Card, SplitName, digest
from .split import Split, Splits, labels_of, split_hash, splits_key

__all__ = [
    "Dataset",
    "Split",
    "Splits",
    "Store",
    "check_counts",
    "check_labels",
    "found_card",
    "open_store",
    "prepared",
    "search",
    "splits_key",
]

VERSION = 4
MOST_TOLD = 16
"""Group counts that a message names."""


class Dataset(Protocol):
    """What a dataset class offers, beside its cards.

    It may have `describe(root) -> Card` where the card can only be known from the files.
    """

    def __init__(self, card: Card) -> None: ...

    def source_key(self, root: Path | None) -> str:
        """Identity of the source files, cheap to compute; raises `MissingData` when they are not there."""
        ...

    def load(self, root: Path | None) -> Splits:
        """Read the official files, pictures only when they are asked for; raises `MissingData` or `CorruptFile`."""
        ...


class _Manifest(BaseModel):
    """What a store says of itself: its card and group counts, the SHA-256 of its labels, its pools, its fingerprint,
    and the CRC-32 of all this, which stores of older versions lack.
    """

    card: str
    counts: dict[SplitName, tuple[int, ...]]
    labels: dict[SplitName, str]
    pools: dict[str, str]
    sizes: dict[str, int]
    fingerprint: str
    checksum: int | None = None

    def sum(self) -> int:
        """That CRC-32."""
        return zlib.crc32(self.model_dump_json(exclude={"checksum"}).encode())


@dataclass(frozen=True)
class Store:
    """An opened store: `fingerprint` identifies pixels and labels, `card` says what they mean.

    `pools` names the pixel pool of each split, and under `train:ATTRIBUTE` that of a view.
    """

    path: Path
    card: Card
    fingerprint: str
    pools: dict[str, str]

    def split(self, name: SplitName) -> Split:
        """Memory-mapped images and labels of one split; raises `CorruptFile`."""
        path = self.path / f"{name}.labels.npz"
        try:
            with np.load(path, allow_pickle=False) as labels:
                parts = {key: labels[key] for key in labels.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CorruptFile(f"{path}: cannot be read; delete the folder, it is rebuilt.") from error
        views = {key.removeprefix(f"{name}:"): pool for key, pool in self.pools.items() if key.startswith(f"{name}:")}
        return Split(
            open_pool(self.pools[name]), **parts, views={view: open_pool(pool) for view, pool in views.items()}
        )


def open_store(
    dataset: Dataset,
    card: Card,
    root: Path | None = None,
    *,
    strict: bool = False,
    report: Report = lambda what, done, total: None,
) -> Store:
    """Open a dataset's store, building it first if need be; its card has the counts that were found.

    Without `root` and with the files gone, a store that was built before is opened. Raises `MissingData` with what to
    put where, `CorruptFile` for files that are not what the card says, `DiskError` for too small a disk.
    """
    try:
        source = dataset.source_key(root)
    except MissingData as missing:
        store = None if root else prepared(card, strict)
        if store is not None:
            return store
        if root is not None or not card.fetch_unasked:
            raise MissingData(f"{missing} {_hint(card, str(missing))}".rstrip()) from missing
        _fetch(card, missing, report)
        source = dataset.source_key(root)
    path = data_home() / "store" / f"{_slug(card.name)}-{digest([card.name, _asset(card), source, VERSION])[:16]}"
    if not (path / "manifest.json").exists():
        with lock(path):
            if not (path / "manifest.json").exists():
                _build(path, dataset.load(root), card, strict, report)
    store = _open(path, card, strict)
    if not _has_pools(store) and _ensure_pools(dataset.load(root), card, report) != store.pools:
        raise CorruptFile(f"{path}: its pixels cannot be made again as they were; delete the folder, it is rebuilt.")
    _remember(path, card)
    return store


def prepared(card: Card, strict: bool = False) -> Store | None:
    """The store that was last opened for a card, if it and its pixels are still there."""
    try:
        path = data_home() / "store" / _latest(card).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    if not (path / "manifest.json").exists():
        return None
    store = _open(path, card, strict)
    return store if _has_pools(store) else None


def check_labels(store: Store) -> str:
    """What is wrong with a store's labels, empty when they are those that it was built with; raises `CorruptFile`."""
    labels = {name: split_hash(store.split(name)) for name in SPLITS}
    if _fingerprint(store.card, labels, store.pools) != store.fingerprint:
        return f"{store.path}: its labels were altered; delete the folder, it is rebuilt."
    return ""


def check_counts(card: Card, splits: Splits) -> None:
    """Raise `CorruptFile` unless every split has exactly the group counts of the card."""
    found_card(replace(card, adaptable=False), splits)


def found_card(card: Card, splits: Splits, strict: bool = False) -> Card:
    """The card with the group counts of these splits, and with alignments that only they tell.

    Where these are not the official ones it is called `NAME[custom]`. Raises `CorruptFile` for other counts when they
    may not differ, for labels outside the card, and for an empty split.
    """
    return _counted(card, {name: _counts(card, name, splits[name]) for name in SPLITS}, strict)


def _counted(card: Card, counts: dict[SplitName, tuple[int, ...]], strict: bool) -> Card:
    card = replace(card, attributes=_aligned(card, counts["train"]))
    wrong = [
        f"the {name} split has group counts {_told(found)}, the card says {_told(card.counts[name])}"
        for name, found in counts.items()
        if name in card.counts and found != card.counts[name]
    ] + [
        f"the {name} split has {sum(counts[name]):,} images, the card says {size:,}"
        for name, size in card.sizes.items()
        if sum(counts[name]) != size
    ]
    if not wrong:
        return replace(card, counts=counts)
    if strict or not card.adaptable:
        advice = "Without --strict they are taken as a dataset of their own." if card.adaptable else "Replace them."
        raise CorruptFile(f"{card.name}: {wrong[0]}. The files are not the official ones. {advice}")
    attributes = tuple(replace(attribute, train_ratio=None) for attribute in card.attributes)
    return replace(
        card,
        name=card.called("custom"),
        title=f"{card.title} - not the official files",
        counts=counts,
        sizes={},
        attributes=attributes,
    )


def _told(counts: tuple[int, ...]) -> str:
    more = f", ... of {sum(counts):,} images" if len(counts) > MOST_TOLD else ""
    return f"({', '.join(map(str, counts[:MOST_TOLD]))}{more})"


def search(relative: str, root: Path | None, *, what: str) -> list[Path]:
    """Folders in which a dataset may lie: those of `--root`, else of `$WORSTGROUP_HOME/data` and then of `shared/data`
    beside a checkout. Raises `MissingData` when `root` is given and is no folder.
    """
    if root is not None and not root.is_dir():
        raise MissingData(f"{what}: --root {root} is not a folder.")
    places = [root] if root is not None else [data_home(), Path(__file__).resolve().parents[2] / "shared" / "data"]
    return [folder for place in places for folder in (place / relative, place) if folder.is_dir()]


# ---------------------------------------------------------------------------------------------------------- inside


def _fetch(card: Card, missing: MissingData, report: Report) -> None:
    try:
        fetch_dataset(card, report)
    except MissingData as error:
        raise MissingData(f"{missing} {error}") from error


def _meaning(card: Card) -> list[Any]:
    """What labels mean and, of a plugin's card, how pixels are scaled: the same numbers under others are another
    dataset.

    The package's own cards scale as they always did, and a test sees to it: so their fingerprints stay.
    """
    scale = [] if package_card(card.name) else [[card.mean, card.std]]
    return [card.classes, [asdict(attribute) for attribute in card.attributes], card.environments, *scale]


def _hint(card: Card, missing: str) -> str:
    """What to do about missing files, beyond what the reader said."""
    if card.by_hand:
        return "" if card.by_hand in missing else card.by_hand
    fetchable = card.sources and all(source.urls for source in card.sources)
    name = card.name.partition("[")[0]
    return f"`worstgroup prepare {name} --download` fetches it. Licence: {card.licence}." if fetchable else ""


def _asset(card: Card) -> list[Any]:
    """What of a card decides what is stored."""
    pixels = asdict(card.pixels) if card.transforms else None
    views = [card.interventions] if card.interventions else []  # others keep the key that they always had
    return [_meaning(card), card.image, card.dtype, pixels, card.params, *views]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _latest(card: Card) -> Path:
    """The note of which store was last opened for a card."""
    return data_home() / "store" / f"{_slug(card.name)}-{digest([card.name, _asset(card), VERSION])[:16]}.latest"


def _remember(path: Path, card: Card) -> None:
    note = _latest(card)
    if not note.exists() or note.read_bytes() != path.name.encode():
        write_bytes(note, path.name.encode())


def _has_pools(store: Store) -> bool:
    return all(has_pool(key) for key in store.pools.values())


def _counts(card: Card, name: SplitName, split: Split) -> tuple[int, ...]:
    if len(split) == 0:
        raise CorruptFile(f"{card.name}: the {name} split is empty")
    views = card.interventions if name == "train" else ()
    if set(split.views) != set(views):
        said = " and ".join(views) or "none"
        raise CorruptFile(f"{card.name}: the {name} split has views {sorted(split.views)}, the card says {said}")
    lengths = {part: len(values) for part, values in (*labels_of(split).items(), *split.views.items())}
    if set(lengths.values()) != {len(split)}:
        raise CorruptFile(f"{card.name}: the {name} split has parts of different lengths: {lengths}")
    rows, images = split.image_rows(), len(split.images)
    if rows.min() < 0 or rows.max() >= images or (split.rows is None and images != len(split)):
        raise CorruptFile(f"{card.name}: the {name} split has {len(split)} examples, {images} images do not fit them")
    try:
        group = metrics.group_index(split.y, split.a, card.shape)
    except ValueError as error:
        raise CorruptFile(f"{card.name}: the {name} split has a label or attribute outside {card.shape}") from error
    return tuple(int(n) for n in np.bincount(group, minlength=card.num_groups))


def _aligned(card: Card, train: tuple[int, ...]) -> tuple[Attribute, ...]:
    """The card's attributes; alignments that it does not declare are those of the train counts (G,)."""
    return tuple(
        attribute if attribute.aligned else replace(attribute, aligned=metrics.lift(np.array(train), card.shape, j))
        for j, attribute in enumerate(card.attributes)
    )


def _ensure_pools(splits: Splits, card: Card, report: Report) -> dict[str, str]:
    """Build the pools of all splits and views that lack theirs; the key of each."""
    sources = {name: splits[name].images for name in SPLITS} | {
        f"{name}:{view}": images for name in SPLITS for view, images in splits[name].views.items()
    }
    keys: dict[int, str] = {}
    pools: dict[str, str] = {}
    for name, images in sources.items():
        if id(images) not in keys:
            keys[id(images)] = pool_key(images, card.image, card.dtype, card.name)
            ensure_pool(images, keys[id(images)], card.image, card.dtype, card.name, report)
        pools[name] = keys[id(images)]
    return pools


def _build(path: Path, splits: Splits, card: Card, strict: bool, report: Report) -> None:
    found = found_card(card, splits, strict)
    pools = _ensure_pools(splits, card, report)

    def fill(folder: Path) -> None:
        for name in SPLITS:
            np.savez(folder / f"{name}.labels.npz", **cast(Any, labels_of(splits[name])))
        files = [f"{name}.labels.npz" for name in SPLITS]
        labels: dict[SplitName, str] = {name: split_hash(splits[name]) for name in SPLITS}
        manifest = _Manifest(
            card=card.name,
            counts=found.counts,
            labels=labels,
            pools=pools,
            sizes={file: (folder / file).stat().st_size for file in files},
            fingerprint=_fingerprint(found, labels, pools),
        )
        whole = manifest.model_copy(update={"checksum": manifest.sum()})
        (folder / "manifest.json").write_text(whole.model_dump_json(indent=1))

    shutil.rmtree(path, ignore_errors=True)  # a folder without a manifest is no store
    write_folder(path, fill, "manifest.json")


def _fingerprint(card: Card, labels: dict[SplitName, str], pools: dict[str, str]) -> str:
    return digest([_meaning(card), labels, pools])[:16]


def _open(path: Path, card: Card, strict: bool) -> Store:
    """A store under the card of today; raises `CorruptFile` when it is damaged, or is not what `strict` demands."""
    try:
        manifest = _Manifest.model_validate_json((path / "manifest.json").read_bytes())
    except (ValidationError, OSError) as error:
        raise CorruptFile(f"{path}: its manifest cannot be read; delete the folder, it is rebuilt.") from error
    if manifest.checksum not in (None, manifest.sum()):
        raise CorruptFile(f"{path}: its manifest was altered; delete the folder, it is rebuilt.")
    for name, size in manifest.sizes.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise CorruptFile(f"{path / name}: missing or truncated; delete the folder, it is rebuilt.")
    return Store(path, _counted(card, manifest.counts, strict), manifest.fingerprint, manifest.pools)
