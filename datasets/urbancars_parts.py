"""What UrbanCars is made from: cars with masks, objects of COCO pictures outlined by LVIS, backgrounds of Places.

A folder of parts looks like this:

    cars/cars.csv                filename, mask, kind (urban or country) and, if wanted, split; paths relative to cars/
    lvis_v1_train.json           LVIS v1, training part
    coco/train2017/              its pictures, COCO 2017
    places/alley/ ...            one folder for each category of Places, by any of its spellings
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from ..benchmark.errors import CorruptFile, MissingData
from ..benchmark.home import data_home, write_bytes
from ..benchmark.spec import SPLITS, SplitName, digest
from .tables import PICTURES, codes, read_table, safe_path

KINDS = ("urban", "country")
"""Of a car, a background and an object alike."""
LVIS, COCO = "lvis_v1_train.json", "coco/train2017"

ADVICE = (
    "Put `cars/cars.csv` (columns filename, mask, kind and, if wanted, split) with its pictures and masks, "
    f"`{LVIS}`, `{COCO}/` and `places/CATEGORY/` into one folder, $WORSTGROUP_HOME/data/urbancars-parts or --root."
)


@dataclass(frozen=True)
class Part:
    """A car (files: picture, mask), an object (COCO picture, and its outline) or a background.

    Parts of one `source` stay in one split: `split` if that is given.
    """

    kind: int
    files: tuple[Path, ...]
    source: str
    name: str
    split: SplitName | None = None
    outline: Any = None


def read_cars(folder: Path) -> list[Part]:
    """The cars of `cars.csv`, with their split where the table has one."""
    path = folder / "cars.csv"
    table = read_table(path, ("filename", "mask", "kind"))
    kinds = codes(table, "kind", {kind: k for k, kind in enumerate(KINDS)}, path)
    if "split" in table:
        codes(table, "split", {name: k for k, name in enumerate(SPLITS)}, path)
    parts: dict[str, Part] = {}
    for (line, row), kind in zip(table.iterrows(), kinds, strict=True):
        where = f"{path}: line {line}"
        files = tuple(safe_path(folder, row[column], where) for column in ("filename", "mask"))
        if row["filename"] in parts:
            raise CorruptFile(f"{where}: {row['filename']} stands in the table twice")
        parts[row["filename"]] = Part(
            int(kind), files, row["filename"], f"line {line} of cars.csv", row.get("split") or None
        )
    return list(parts.values())


def read_places(folder: Path, categories: dict[str, list[str]]) -> list[Part]:
    """The pictures of every category, sorted by name; raises `MissingData` for a category without any."""
    parts: list[Part] = []
    for kind, category in ((k, category) for k, name in enumerate(KINDS) for category in categories[name]):
        found = _category_folder(folder, category)
        files = sorted(path for path in found.iterdir() if _is_picture(path))
        if not files:
            raise MissingData(f"{found}: has no pictures ({', '.join(PICTURES)}). {ADVICE}")
        parts += [
            Part(kind, (file,), f"{category}/{file.name}", f"background {category}/{file.name}") for file in files
        ]
    return parts


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def _category_folder(folder: Path, category: str) -> Path:
    """The folder of a category: `garage-outdoor` may be `garage_outdoor` or `garage/outdoor`, below `g/` or not."""
    words = re.split(r"[-_/]", category)
    spellings = dict.fromkeys(mark.join(words) for mark in ("-", "_", "/"))
    found = [folder / up / name for up in ("", category[0]) for name in spellings if (folder / up / name).is_dir()]
    if not found:
        raise MissingData(f"{folder}: has no folder {' or '.join(spellings)}. {ADVICE}")
    if len(found) > 1:
        raise CorruptFile(f"{folder}: {' and '.join(map(str, found))} are both {category}; leave one of them")
    return found[0]


def read_objects(lvis: Path, coco: Path, params: dict[str, Any]) -> list[Part]:
    """The objects of LVIS that are large enough and in one piece, sorted by their id.

    A photograph with objects of both kinds is left out: they could come into two splits. What was found in the file, of
    more than a gigabyte, is remembered by its path, size and time of change.
    """
    stat = lvis.stat()
    wanted = [params["objects"], params["least_area"]]
    seen = data_home() / "excerpts" / digest([str(lvis.resolve()), stat.st_size, stat.st_mtime_ns, wanted])[:24]
    try:
        rows = json.loads(seen.read_bytes())
    except OSError:
        rows = sorted(select_objects(lvis, params["objects"], params["least_area"]), key=lambda row: row[0])
        write_bytes(seen, json.dumps(rows).encode())
    shown: list[set[int]] = [{image for _, image, kind, _ in rows if kind == k} for k in range(len(KINDS))]
    both = set.intersection(*shown)
    return [
        Part(kind, (coco / f"{image:012d}.jpg",), str(image), f"object {number} of {lvis.name}", outline=outline)
        for number, image, kind, outline in rows
        if image not in both
    ]


def select_objects(
    lvis: Path, categories: dict[str, list[str]], least_area: dict[str, tuple[str, float]]
) -> Iterator[tuple[int, int, int, Any]]:
    """Number, COCO picture, kind and outline of every annotation that may be used."""
    try:
        content = json.loads(lvis.read_bytes())
        names = {entry["name"]: entry["id"] for entry in content["categories"]}
        annotations = list(content["annotations"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{lvis}: is not the json of LVIS v1: {type(error).__name__}: {error}") from error
    wanted = {name: kind for kind, of in enumerate(KINDS) for name in categories[of]}
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise CorruptFile(f"{lvis}: has no category {', '.join(unknown)}")
    kinds = {names[name]: kind for name, kind in wanted.items()}
    for n, entry in enumerate(annotations):
        try:
            kind = kinds.get(entry["category_id"])
            if kind is None:
                continue
            measure, least = least_area[KINDS[kind]]
            area = entry["area"] if measure == "mask" else entry["bbox"][2] * entry["bbox"][3]
            if area >= least and in_one_piece(entry["segmentation"]):
                yield int(entry["id"]), int(entry["image_id"]), kind, entry["segmentation"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CorruptFile(f"{lvis}: annotation {n} cannot be read: {type(error).__name__}: {error}") from error


# ----------------------------------------------------------------------------------------------------------- objects


def object_mask(outline: Any, size: tuple[int, int]) -> Image.Image:
    """A segmentation of COCO's formats, polygons or uncompressed run lengths, as a mask (0 or 255) of (width, height).

    Raises `ValueError` for anything else.
    """
    if isinstance(outline, dict):
        return _from_runs(outline, size)
    mask = Image.new("L", size)
    for polygon in outline:
        if len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers: each corner is an x and a y")
        if len(polygon) >= 6:  # fewer corners enclose nothing
            ImageDraw.Draw(mask).polygon([float(n) for n in polygon], fill=255)
    return mask


def _from_runs(outline: dict[str, Any], size: tuple[int, int]) -> Image.Image:
    """Run lengths go down the columns, and begin with one of background."""
    counts, shape = outline["counts"], tuple(outline["size"])
    if not isinstance(counts, list):
        raise ValueError("compressed run lengths are not read: write `counts` as a list of numbers")
    if shape != size[::-1] or sum(counts) != size[0] * size[1]:
        raise ValueError(f"run lengths of {sum(counts)} pixels, {shape} declared, for a picture of {size[::-1]}")
    inside = np.repeat(np.arange(len(counts)) % 2, counts).reshape(shape, order="F")
    return Image.fromarray(np.ascontiguousarray(inside * 255).astype(np.uint8))


def in_one_piece(outline: Any) -> bool:
    """Whether the pixels of a segmentation are connected, by sides or corners."""
    if isinstance(outline, dict):
        size = tuple(outline["size"][::-1])
    else:
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in outline])
        size = tuple(int(n) + 2 for n in points.max(axis=0))
    return bool(ndimage.label(np.asarray(object_mask(outline, size)), np.ones((3, 3)))[1] == 1)
