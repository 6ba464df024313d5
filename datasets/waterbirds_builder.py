"""Waterbirds from its parts: birds of CUB-200-2011 cut out and pasted onto Places365, composed when they are decoded.

The construction is group_DRO's (Sagawa et al., ICLR 2020) with a seed, so the same parts give the same dataset.
"""

import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..benchmark.errors import CorruptFile, MissingData
from ..benchmark.pictures import Pictures, plain
from ..benchmark.spec import SPLITS, Transform
from ..benchmark.store import Split, Splits
from .interventions import donors
from .tables import find_folder, list_pictures, safe_path
from .waterbirds_release import check_size

PARTS = "waterbirds_parts"
WATERBIRDS = [
    *("albatross", "auklet", "cormorant", "frigatebird", "fulmar", "gull", "jaeger", "kittiwake", "pelican", "puffin"),
    *("tern", "gadwall", "grebe", "mallard", "merganser", "guillemot", "pacific_loon"),
]
"""Parts of the names of waterbird species."""
PARAMS: dict[str, Any] = {
    "seed": 0,
    "confounder": 0.95,
    "val_fraction": 0.2,
    "waterbirds": WATERBIRDS,
    "places": [["bamboo_forest", "forest/broadleaf"], ["ocean", "lake/natural"]],
    "mask": "0 to 255 as a share of the bird",
}
"""Parameters of the official construction; the places are of land and of water."""
ADVICE = (
    "Places365's training pictures in high resolution are one archive of about 105 GB. "
    f"Put CUB_200_2011/ and segmentations/ of CUB-200-2011 into $WORSTGROUP_HOME/data/{PARTS}, or name their "
    "folder with --root, and beside them the Places365 folders "
    f"{', '.join(name for side in PARAMS['places'] for name in side)}."
)
_TREES = ("", "data_large", "places365", "places")
"""Where folders of Places lie below the parts; the second is how its archive unpacks."""
_FLAGS = {"0": False, "1": True}


@dataclass(frozen=True, eq=False)
class Birds:
    """CUB's pictures in its order: names (n), classes `y` (n,), and whether each is in CUB's training part (n,)."""

    names: list[str]
    y: NDArray[np.int64]
    train: NDArray[np.bool_]


def build(what: str, params: dict[str, Any], transform: Transform, root: Path | None) -> Splits:
    """The splits, every bird on its place; raises `MissingData` or `CorruptFile`."""
    parts = find_folder(what, (PARTS,), root, ("CUB_200_2011/images.txt",), ADVICE)
    cub = parts / "CUB_200_2011"
    masks = _folder((parts, cub), ("segmentations",), what)
    birds = read_birds(cub, params["waterbirds"])
    rng = np.random.RandomState(params["seed"])
    split, place = assign(birds, params, rng)
    backdrops = choose_places(parts, place, params["places"], rng, what)

    def pictures(birds_at: NDArray[np.int64], places_at: NDArray[np.int64]) -> Pictures:
        """These birds, each on the place of another one."""
        files = [
            (cub / "images" / (name := birds.names[bird]), (masks / name).with_suffix(".png"), backdrops[at])
            for bird, at in zip(birds_at, places_at, strict=True)
        ]
        return Pictures(files, transform, draw=paste, where=lambda i: f"with mask {files[i][1]} on {files[i][2]}")

    every = np.arange(len(birds.names))
    images = pictures(every, every)
    rows = {name: np.flatnonzero(split == number) for number, name in enumerate(SPLITS)}
    splits: Splits = {name: Split(images, birds.y[rows], place[rows, None], rows=rows) for name, rows in rows.items()}
    train = rows["train"]
    views = {"place": pictures(train, train[donors(birds.y[train], rng)])}
    splits["train"] = replace(splits["train"], views=views)
    return splits


def paste(photo: Image.Image, mask: Image.Image, place: Image.Image) -> Image.Image:
    """The bird of a photograph on a place, which is scaled to just cover the photograph and cut to it centrally."""
    check_size(photo, mask)
    backdrop = ImageOps.fit(plain(place), photo.size, Image.Resampling.LANCZOS)
    return Image.composite(plain(photo), backdrop, mask.convert("L"))


def assign(
    birds: Birds, params: dict[str, Any], rng: np.random.RandomState
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of the split (n,) and place (n,) of each bird.

    Validation is drawn from CUB's training part. In train a class stands on its own place with the confounder's
    probability; in validation and test every class is on both places equally often.
    """
    split = np.where(birds.train, SPLITS.index("train"), SPLITS.index("test"))
    candidates = np.flatnonzero(birds.train)
    held = rng.choice(candidates, round(params["val_fraction"] * len(candidates)), replace=False)
    split[held] = SPLITS.index("val")
    place = np.zeros(len(split), np.int64)
    aligned = params["confounder"]
    for (number, name), y in product(enumerate(SPLITS), (0, 1)):
        members = np.flatnonzero((split == number) & (birds.y == y))
        on_water = (1 - aligned, aligned)[y] if name == "train" else 0.5
        place[rng.choice(members, round(on_water * len(members)), replace=False)] = 1
    return split, place


# --------------------------------------------------------------------------------------------------------------- CUB


def read_birds(cub: Path, waterbirds: list[str]) -> Birds:
    """CUB's tables, in the order of its picture numbers; raises `CorruptFile` that names the line that is wrong.

    A species is a waterbird when its name contains one of `waterbirds`. So "tern" makes waterbirds of the Eastern
    Towhee, the Western Meadowlark and the Western Wood-Pewee: a mistake of the official labels that is kept.
    """
    images, flags = _read_pairs(cub / "images.txt"), _read_pairs(cub / "train_test_split.txt")
    names, y, train = [], [], []
    for number, (line, name) in sorted(images.items()):
        where = f"{cub / 'images.txt'}: line {line}"
        species = re.match(r"\d+\.([^/]+)/.", name)
        if not species:
            raise CorruptFile(f"{where}: {name!r} is no picture in a species folder such as 001.Black_footed_Albatross")
        if number not in flags:
            raise CorruptFile(f"{cub / 'train_test_split.txt'}: has no line for picture {number} ({where})")
        flag_line, flag = flags[number]
        if flag not in _FLAGS:
            raise CorruptFile(f"{cub / 'train_test_split.txt'}: line {flag_line}: {flag!r} is neither 0 nor 1")
        names.append(str(safe_path(Path(), name, where)))
        y.append(any(part in species[1].lower() for part in waterbirds))
        train.append(_FLAGS[flag])
    return Birds(names, np.array(y, np.int64), np.array(train, bool))


def _read_pairs(path: Path) -> dict[int, tuple[int, str]]:
    """Lines `NUMBER VALUE` as number -> (line, value)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path}: cannot be read as text: {error}") from error
    pairs: dict[int, tuple[int, str]] = {}
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        cells = text.split()
        if len(cells) != 2 or not re.fullmatch(r"[0-9]{1,18}", cells[0]) or int(cells[0]) in pairs:
            raise CorruptFile(f"{path}: line {line} is {text[:200]!r}, expected a new number and one value")
        pairs[int(cells[0])] = line, cells[1]
    if not pairs:
        raise CorruptFile(f"{path}: is empty")
    return pairs


# ------------------------------------------------------------------------------------------------------------ Places


def choose_places(
    parts: Path, place: NDArray[np.int64], categories: list[list[str]], rng: np.random.RandomState, what: str
) -> list[Path]:
    """A picture (n) of the right kind of place for each bird, each used at most once; `MissingData` for too few."""
    chosen: list[Path] = [Path()] * len(place)
    for kind, names in enumerate(categories):
        folders = [_place_folder(parts, name, what) for name in names]
        found = [path for folder in folders for path in list_pictures(folder)]
        birds = np.flatnonzero(place == kind)
        if len(found) < len(birds):
            raise MissingData(
                f"{what}: needs {len(birds):,} pictures of {' and '.join(names)}, each is used once, but found "
                f"{len(found):,} in {', '.join(str(folder) for folder in folders)}"
            )
        for bird, i in zip(birds, rng.permutation(len(found)), strict=False):
            chosen[bird] = found[i]
    return chosen


def _place_folder(parts: Path, name: str, what: str) -> Path:
    """The folder of a category however it was copied: `forest/broadleaf`, `f/forest/broadleaf`, `forest-broadleaf`."""
    spellings = [name, name.replace("/", "_"), name.replace("/", "-"), re.sub("[/_]", "-", name)]
    names = [prefix + spelling for prefix in ("", f"{name[0]}/") for spelling in dict.fromkeys(spellings)]
    return _folder([parts / tree for tree in _TREES], names, what)


def _folder(places: list[Path] | tuple[Path, ...], names: list[str] | tuple[str, ...], what: str) -> Path:
    """The first of these folders that is there; raises `MissingData` that names the first of them."""
    for folder in (place / name for place in places for name in names):
        if folder.is_dir():
            return folder
    raise MissingData(f"{what}: there is no folder {places[0] / names[0]}. {ADVICE}")
