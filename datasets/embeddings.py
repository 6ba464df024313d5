"""Precomputed embeddings in one file, for which a linear head is trained; the card is read from the file.

.npz or .safetensors: `features` (n, d), `y` (n,), `a` (n,) or (n, k), `split` (n,); .parquet: columns y, split, f0, f1,
... or one of lists called features, and one per attribute. What `worstgroup.benchmark.embed` writes is such a file.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..benchmark.errors import CorruptFile, MissingData, UserError
from ..benchmark.home import data_home
from ..benchmark.registry import dataset
from ..benchmark.spec import Attribute, Card, Recipe
from ..benchmark.store import Splits
from .arrays import READERS, Arrays, read_arrays
from .own import SPLIT_NAMES, Column, Ints, Labels, Where, check, check_variant, read_column, slug

_REQUIRED = ("features", "y", "a", "split")
_ARRAYS = (
    ".npz or .safetensors: arrays features (n, d), y (n,), a (n,) or (n, k) for k attributes, split (n,) with 0, 1, 2 "
    "or train, val, test. An .npz may name things, in arrays of text: classes, attribute_names, values_0, values_1, ..."
)
_TABLE = ".parquet: columns y, split, f0, f1, ... (or one of lists called features), all others are attributes."

CARD = Card(
    name="embeddings",
    title="Your own precomputed features: --root FILE (.npz, .parquet or .safetensors)",
    classes=(),
    attributes=(),
    image=(1, 1, 1),
    counts={},
    licence="the user's",
    citation="none",
    recipe=Recipe(optimizer="adam", lr=1e-3, weight_decay=1e-4, batch_size=128, epochs=100),
    backbone="identity",
    mean=(0.0,),
    std=(1.0,),
    notes=(
        _ARRAYS,
        _TABLE,
        "Use: --dataset embeddings --root FILE, or --dataset embeddings:STEM for $WORSTGROUP_HOME/data/embeddings/"
        "STEM.npz.",
        "Features are standardised with the mean and deviation of each dimension over train.",
        "The aligned value of a class is the one of the greatest lift P(a|y) / P(a) in train, unless the file says it.",
        "Records carry labels and attributes, as intervals need them, unless the file says that it may not be so.",
    ),
    by_hand=f"The features are yours. {_ARRAYS} {_TABLE}",
    dtype="float32",
)


class Table(NamedTuple):
    """Features (n, d) float32, labels, the unit of each example (n,), and what the file changes in the card."""

    features: NDArray[np.float32]
    labels: Labels
    unit: Ints | None
    changes: dict[str, Any]


def make(name: str) -> Card:
    """What stands for `embeddings:STEM` until its file is read."""
    check_variant("embeddings", name)
    return replace(CARD, name=f"embeddings:{name}")


@dataset("embeddings", {"": CARD}, make)
class Embeddings:
    """Features and labels of a file."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def describe(self, root: Path | None) -> Card:
        """The card of what is in the file; raises `MissingData` or `CorruptFile`."""
        path = find(self.card, root)
        features, labels, _, changes = read(path)
        n, d = features.shape
        train = features[labels.rows("train")]
        constant = (train == train[0]).all(axis=0)
        return replace(
            self.card,
            name=f"embeddings:{self.card.variant or slug(path.stem)}",
            image=(1, 1, d),
            mean=tuple(train.mean(axis=0, dtype=np.float64).tolist()),
            std=tuple(np.where(constant, 1.0, train.std(axis=0, dtype=np.float64)).tolist()),
            **({"title": f"{path.name}: {n:,} precomputed features of {d} dimensions"} | labels.facts() | changes),
        )

    def source_key(self, root: Path | None) -> str:
        """SHA-256 of the file; raises `MissingData` when it is not there."""
        with find(self.card, root).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def load(self, root: Path | None) -> Splits:
        """Read the file; raises `MissingData` or `CorruptFile`."""
        features, labels, unit, _ = read(find(self.card, root))
        return labels.splits(features[:, None, None, :], unit)


def find(card: Card, root: Path | None) -> Path:
    """The file of a card: `root`, or one in the folder `root` or `embeddings` of the data home, called as its variant.

    Raises `MissingData`, and `UserError` where more than one file would do.
    """
    name = card.variant
    folder = root if root or not name else data_home() / "embeddings"
    if folder is not None and folder.is_file():
        found = [folder] if folder.suffix in READERS else []
    else:
        files = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
        found = [path for path in files if path.suffix in READERS and (not name or slug(path.stem) == name)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{card.name}: {folder} holds {names}; name one of them by --root FILE")
    if not found:
        looked = f"no {name or '*'}{'|'.join(READERS)} in {folder}" if folder else "--root FILE is missing"
        raise MissingData(f"{card.name}: {looked}. {CARD.by_hand}")
    return found[0]


# ------------------------------------------------------------------------------------------------------------ content


def read(path: Path) -> Table:
    """What is in a file, checked; rows are counted from 0 in messages. Raises `CorruptFile`."""
    arrays = read_arrays(path)
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing:
        found = ", ".join(arrays) or "nothing"
        raise CorruptFile(f"{path}: lacks {', '.join(missing)}; it has {found}. {_ARRAYS} {_TABLE}")
    features, unit = _features(arrays["features"], path), arrays.get("unit")
    if arrays["a"].ndim == 1:
        arrays["a"] = arrays["a"][:, None]
    for name, axes in {"y": 1, "split": 1, "a": 2, "unit": 1}.items():
        if name in arrays and (arrays[name].ndim != axes or len(arrays[name]) != len(features)):
            raise CorruptFile(f"{path}: {name} has shape {arrays[name].shape}, features has {len(features):,} rows")
    if unit is not None and unit.dtype.kind not in "iu":
        raise CorruptFile(f"{path}: unit must hold whole numbers, got {unit.dtype}")
    labels = _labels(arrays, path)
    check(labels, str(path))
    return Table(features, labels, None if unit is None else unit.astype(np.int64), _changes(arrays, labels, path))


def _features(found: NDArray[Any], path: Path) -> NDArray[np.float32]:
    if found.ndim != 2 or 0 in found.shape or found.dtype.kind not in "fiu":
        raise CorruptFile(f"{path}: features must be numbers of shape (n, d), got {found.dtype} of {found.shape}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        features = np.asarray(found, np.float32)
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise CorruptFile(f"{path}: row {row}: its features are not finite ({int(bad.sum()):,} such rows)")
    return features


def _labels(arrays: Arrays, path: Path) -> Labels:
    a = arrays["a"]
    usual = ["attribute"] if a.shape[1] == 1 else [f"attribute_{k}" for k in range(a.shape[1])]
    names = _names(arrays, "attribute_names", path) or usual
    if not names or len(names) != a.shape[1]:
        raise CorruptFile(f"{path}: has {a.shape[1]} attributes in a and {len(names)} attribute_names")
    y = _column("y", arrays["y"], _names(arrays, "classes", path), path)
    attributes = tuple(_column(n, a[:, k], _names(arrays, f"values_{k}", path), path) for k, n in enumerate(names))
    splits = read_column("split", _texts("split", arrays["split"], path), _row(path))
    unknown = [i for i, name in enumerate(splits.values) if name not in SPLIT_NAMES]
    if unknown:
        row, value = int((splits.codes == unknown[0]).argmax()), splits.values[unknown[0]]
        raise CorruptFile(f"{path}: row {row}: split is {value!r}, it must be one of {', '.join(SPLIT_NAMES)}")
    return Labels(y, attributes, np.array([SPLIT_NAMES[name] for name in splits.values])[splits.codes])


def _names(arrays: Arrays, key: str, path: Path) -> list[str] | None:
    """The names in an array of text (n,), or None where the file has no such array."""
    found = arrays.get(key)
    if found is None:
        return None
    if found.ndim != 1 or found.dtype.kind != "U" or not all(map(str.strip, found.tolist())):
        raise CorruptFile(f"{path}: {key} must be names in an array of text (n,), got {found.dtype} {found.tolist()!r}")
    return list(map(str, found.tolist()))


def _column(name: str, cells: NDArray[Any], values: list[str] | None, path: Path) -> Column:
    """A column of names, or of numbers of the names in `values`."""
    column = read_column(name, _texts(name, cells, path), _row(path))
    if values is None:
        return column
    if len(set(values)) < len(values):
        raise CorruptFile(f"{path}: two names of {name} are the same: {', '.join(values)}")
    known = {value if cells.dtype.kind == "U" else str(i): i for i, value in enumerate(values)}
    for code, value in enumerate(column.values):
        if value not in known:
            row = int((column.codes == code).argmax())
            raise CorruptFile(
                f"{path}: row {row}: {name} is {value}, the file names {len(values)}: {', '.join(values)}"
            )
    return Column(name, tuple(values), np.array([known[value] for value in column.values], np.int64)[column.codes])


def _texts(name: str, cells: NDArray[Any], path: Path) -> NDArray[np.str_]:
    """Names as they are, whole numbers as text."""
    if cells.dtype.kind == "f":
        whole = (cells == np.floor(cells)) & (np.abs(cells) < 2**53)  # NaN and what int64 cannot hold are not
        if not whole.all():
            row = int((~whole).argmax())
            raise CorruptFile(f"{path}: row {row}: {name} is {cells[row]}, it must be a name or a whole number")
        cells = cells.astype(np.int64)
    elif cells.dtype.kind == "b":
        cells = cells.astype(np.int64)
    if cells.dtype.kind not in "iuU":
        raise CorruptFile(f"{path}: {name} must hold names or whole numbers, got {cells.dtype}")
    return cells.astype(str)


def _row(path: Path) -> Where:
    return lambda i: f"{path}: row {i}"


def _changes(arrays: Arrays, labels: Labels, path: Path) -> dict[str, Any]:
    """Fields of the card that the file gives itself, as one that was exported from a dataset does."""
    changes: dict[str, Any] = {key: str(arrays[key]) for key in ("title", "licence", "citation") if key in arrays}
    changes["share_labels"] = bool(np.all(arrays.get("share_labels", True)))
    if "aligned" not in arrays:
        return changes
    table = arrays["aligned"]  # (k, K)
    ratio = arrays.get("train_ratio", np.full(len(labels.attributes), np.nan))  # (k,)
    most = np.array([[len(attribute.values)] for attribute in labels.attributes])
    shape = (len(labels.attributes), len(labels.y.values))
    if table.shape != shape or table.dtype.kind not in "iu" or (table < 0).any() or (table >= most).any():
        raise CorruptFile(f"{path}: aligned must number a value of each class, for each attribute: {shape}")
    if ratio.shape != shape[:1] or ratio.dtype.kind != "f" or (ratio < 0).any() or (ratio > 1).any():
        raise CorruptFile(f"{path}: train_ratio must be {len(labels.attributes)} numbers from 0 to 1 (NaN: none)")
    attributes = tuple(
        Attribute(column.name, column.values, tuple(row.tolist()), None if np.isnan(share) else float(share))
        for column, row, share in zip(labels.attributes, table, ratio, strict=True)
    )
    return {**changes, "attributes": attributes}
