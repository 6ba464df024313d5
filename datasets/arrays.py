"""Named arrays in an .npz, .safetensors or .parquet file, as a dict; nothing in a file is run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..benchmark.errors import CorruptFile, UserError

Arrays = dict[str, NDArray[Any]]


def read_arrays(path: Path) -> Arrays:
    """All arrays of a file; raises `CorruptFile`, and `UserError` where a package is needed that is not installed."""
    try:
        return READERS[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # on damaged files three libraries raise a dozen types
        raise CorruptFile(f"{path}: cannot be read as {path.suffix}: {type(error).__name__}: {error}") from error


def _read_npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_safetensors(path: Path) -> Arrays:
    from safetensors.torch import load_file

    tensors = load_file(path)  # by way of torch: NumPy has no bfloat16
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def _read_parquet(path: Path) -> Arrays:
    """A table as arrays: `f0`, `f1`, ... or lists called `features`, `y`, `split`, and all other columns as `a`."""
    try:
        table = pd.read_parquet(path, engine="pyarrow")
    except ImportError as error:
        raise UserError(
            f"{path}: reading .parquet needs pyarrow: `pip install worstgroup[parquet]`, or save an .npz"
        ) from error
    dims = sorted((name for name in table.columns if re.fullmatch(r"f\d+", name)), key=lambda name: int(name[1:]))
    if dims and ("features" in table or dims != [f"f{i}" for i in range(len(dims))]):
        raise CorruptFile(f"{path}: features must be either one column called so or f0, f1, ... without a gap")
    attributes = [name for name in table.columns if name not in {"y", "split", "features", *dims}]
    for name in ("y", "split", *attributes):
        if name in table and table[name].isna().any():
            raise CorruptFile(f"{path}: row {int(table[name].isna().to_numpy().argmax())}: {name} is empty")
    arrays = {name: _cells(table[name]) for name in ("y", "split") if name in table}
    if dims:
        arrays["features"] = table[dims].to_numpy(np.float32)
    elif "features" in table:
        arrays["features"] = np.stack([np.asarray(row) for row in table["features"]])
    if attributes:
        columns = [_cells(table[name]) for name in attributes]
        arrays["a"] = np.stack([column.astype(str) for column in columns], axis=1)
        arrays["attribute_names"] = np.array(attributes, str)
    return arrays


def _cells(column: "pd.Series[Any]") -> NDArray[Any]:
    """Numbers as they are, anything else as text."""
    cells = column.to_numpy()
    return cells if cells.dtype.kind in "iuf" else cells.astype(str)


READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npz": _read_npz,
    ".parquet": _read_parquet,
    ".safetensors": _read_safetensors,
}
"""By the end of the file's name."""
