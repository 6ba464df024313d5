"""UrbanCars: urban and country cars, with a background and a co-occurring object as two shortcuts to their kind.

The pictures are read from the tree that the authors' generator writes, or composed from parts (`urbancars_builder`). A
variant says how often each shortcut agrees with the class in each split, and which of them make the groups.

Source: Li et al., A Whac-A-Mole Dilemma, CVPR 2023, and its code (facebookresearch/Whac-A-Mole).
"""

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark.errors import CorruptFile, MissingData
from ..benchmark.pictures import Pictures
from ..benchmark.registry import dataset
from ..benchmark.spec import SPLITS, Attribute, Card, Recipe, SplitName, Transform
from ..benchmark.store import Split, Splits
from .tables import FileDataset, find_folder
from .urbancars_builder import PARTS, build
from .urbancars_parts import KINDS

Ratios = tuple[float, float]
"""Share of pictures whose background, and whose object, agrees with the class."""
SHORTCUTS = ("background", "object")
PER_CLASS: dict[SplitName, int] = {"train": 4000, "val": 500, "test": 500}
CELLS = {
    f"obj-{KINDS[y]}_bg-{KINDS[bg]}_co_occur_obj-{KINDS[co]}": (y, bg, co) for y, bg, co in product((0, 1), repeat=3)
}
"""The folders of a split and what their pictures show: car, background, object; 0 urban, 1 country."""

_GENERATE = (
    "Generate it with the code of the paper (facebookresearch/Whac-A-Mole) from Stanford Cars, LVIS v1 with the "
    "pictures of COCO 2017 and Places365, none of which may be passed on; no pictures are published. Put {trees} into "
    "$WORSTGROUP_HOME/data/urbancars, or name their folder with --root"
)
_TERMS = "the pictures keep the terms of Stanford Cars, COCO, LVIS and Places365"
_COLLECT = (
    "Its parts have licences of their own and may not be passed on. Into $WORSTGROUP_HOME/data/urbancars-parts, or "
    "--root, put: `cars/` with pictures and masks of cars (Stanford Cars, with masks of a segmentation network) and "
    "`cars.csv` with columns filename, mask, kind (urban or country) and, if wanted, split; `lvis_v1_train.json`; "
    "`coco/train2017/`; `places/` with a folder for each of the ten categories of Places365"
)
_TRAPS = (
    "The car is `obj-` in the names of the generator's folders; the attribute `object` is `co_occur_obj-`.",
    "No crop and no resize, in training neither. The authors train in mixed precision; recipe.precision=bf16 is near.",
)
_TEN = "In train both shortcuts disagree with the class in ten pictures of each class."
_REGROUPED = (
    "The same pictures as in urbancars: both shortcuts are there and one of them makes the groups, as in ExMap's code. "
    "Generated with a single shortcut it is another data set, {other}."
)
_SINGLE = (
    "One shortcut only: the other attribute agrees with the class in half of the pictures. Other pictures than "
    "{same}, which regroups those with both shortcuts. The counts follow the generator's rule for these ratios."
)
_VAL95 = (
    "Validation is biased like train, as in ExMap's loader; urbancars, the official protocol, validates on a balanced "
    "split. In validation both shortcuts disagree with the class in one picture of each class.",
    "The published generator does not write this validation folder: run it with its override of the ratio removed.",
)
_BUILT = (
    "Composed by this package from parts, not by the authors' generator: not the official pictures, and not comparable "
    "with results on them.",
    "How often a car is used again depends on how many there are; intervals resample cars.",
    "Each train picture is stored twice more, with the background or the object of a car of the other kind.",
)


def cell_counts(number: int, ratios: Ratios) -> tuple[int, ...]:
    """Pictures (8,) of each cell (class, background, object), `number` to a class, rounded down as the generator does.

    500 to a class at 0.95 and 0.95 make 996 in all.
    """
    shares = (math.prod(r if v == y else 1 - r for r, v in zip(ratios, a, strict=True)) for y, *a in CELLS.values())
    return tuple(math.floor(round(number * share, 6)) for share in shares)


def _tree(ratios: Ratios) -> str:
    """The folder of all pictures that were generated with these ratios."""
    background, thing = ratios
    return f"bg-{background}_co_occur_obj-{thing}"


def _card(
    variant: str,
    title: str,
    notes: tuple[str, ...],
    *,
    train: Ratios = (0.95, 0.95),
    val: Ratios = (0.5, 0.5),
    shown: tuple[int, ...] = (0, 1),
    parts: dict[str, Any] | None = None,
) -> Card:
    """A card: `train` and `val` are the ratios of these splits, `shown` the shortcuts that make its groups."""
    ratios: dict[SplitName, Ratios] = {"train": train, "val": val, "test": (0.5, 0.5)}
    hidden = tuple(1 + j for j in range(len(SHORTCUTS)) if j not in shown)
    counts: dict[SplitName, tuple[int, ...]] = {
        name: tuple(int(n) for n in np.reshape(cell_counts(PER_CLASS[name], ratios[name]), (2, 2, 2)).sum(hidden).flat)
        for name in SPLITS
    }
    return Card(
        name=f"urbancars:{variant}" if variant else "urbancars",
        title=title,
        classes=tuple(f"{kind} car" for kind in KINDS),
        attributes=tuple(Attribute(SHORTCUTS[j], KINDS, aligned=(0, 1), train_ratio=train[j]) for j in shown),
        image=(256, 256, 3),
        counts=counts,
        licence=_TERMS if parts else f"CC BY-NC 4.0 (the authors' repository); {_TERMS}",
        citation=(
            "Li, Evtimov, Gordo, Hazirbas, Hassner, Canton Ferrer, Xu, Ibrahim: A Whac-A-Mole Dilemma: Shortcuts Come "
            "in Multiples Where Mitigating One Amplifies Others, CVPR 2023"
        ),
        recipe=Recipe(lr=1e-3, momentum=0.9, weight_decay=1e-4, batch_size=128, epochs=300, augment="flip"),
        backbone="resnet50",
        weights="imagenet1k_v1",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        notes=(*notes, *([_TEN] if min(train) > 0.5 else []), *_TRAPS),
        params={
            "per_class": dict(PER_CLASS),
            "ratios": {name: list(pair) for name, pair in ratios.items()},
            "shown": list(shown),
            **({"parts": parts} if parts else {}),
        },
        adaptable=parts is None,
        interventions=tuple(SHORTCUTS[j] for j in shown) if parts else (),
        transforms={"whac-a-mole": Transform("", (256, 256))},
        by_hand=_COLLECT if parts else _GENERATE.format(trees=" and ".join(map(_tree, sorted(set(ratios.values()))))),
    )


_NO_OBJECT: Ratios = (0.95, 0.5)
_NO_BACKGROUND: Ratios = (0.5, 0.95)
_CARDS = [
    _card("", "UrbanCars: two shortcuts, background and co-occurring object (Whac-A-Mole)", ()),
    _card(
        "bg",
        "UrbanCars in groups by background: the pictures with both shortcuts (ExMap)",
        (_REGROUPED.format(other="urbancars:bg-only"),),
        shown=(0,),
    ),
    _card(
        "coobj",
        "UrbanCars in groups by co-occurring object: the pictures with both shortcuts (ExMap)",
        (_REGROUPED.format(other="urbancars:coobj-only"),),
        shown=(1,),
    ),
    _card(
        "bg-only",
        "UrbanCars generated with the background as its only shortcut",
        (_SINGLE.format(same="urbancars:bg"),),
        train=_NO_OBJECT,
    ),
    _card(
        "coobj-only",
        "UrbanCars generated with the co-occurring object as its only shortcut",
        (_SINGLE.format(same="urbancars:coobj"),),
        train=_NO_BACKGROUND,
    ),
    _card("val95", "UrbanCars with validation biased like train (ExMap's loader)", _VAL95, val=(0.95, 0.95)),
    _card("built", "UrbanCars composed here from cars, LVIS objects and Places", _BUILT, parts=PARTS),
    _card(
        "built-bg",
        "UrbanCars composed here, the background its only shortcut",
        _BUILT,
        train=_NO_OBJECT,
        parts=PARTS,
    ),
    _card(
        "built-coobj",
        "UrbanCars composed here, the co-occurring object its only shortcut",
        _BUILT,
        train=_NO_BACKGROUND,
        parts=PARTS,
    ),
]


@dataset("urbancars", {card.name.partition(":")[2]: card for card in _CARDS})
class UrbanCars(FileDataset):
    """Cars before a background with an object beside them, urban or country each."""

    def load(self, root: Path | None) -> Splits:
        """List the pictures of the tree, or compose them from parts; raises `MissingData` or `CorruptFile`."""
        params = self.card.params
        if "parts" in params:
            return build(self.card, root)
        trees = {name: _tree(params["ratios"][name]) for name in SPLITS}
        marks = list(dict.fromkeys(trees.values()))
        folder = find_folder(self.card.name, ("urbancars",), root, marks, f"{self.card.by_hand}.")
        shown = [1 + j for j in params["shown"]]
        splits: Splits = {}
        for name in SPLITS:
            files, labels = list_pictures(folder / trees[name] / name, f"{self.card.by_hand}.")
            splits[name] = Split(Pictures(files, self.card.pixels), labels[:, 0], labels[:, shown])
        return splits


def list_pictures(folder: Path, advice: str) -> tuple[list[Path], NDArray[np.int64]]:
    """Pictures of a split in the order of cells and then of their numbers, with labels (n, 3): car, background, object.

    Masks lie beside the pictures as .png. Raises `MissingData` for a folder that is not there, `CorruptFile` for one
    called `obj-...` that is no cell, and for a picture whose name is no number.
    """
    missing = [path for path in (folder, *(folder / cell for cell in CELLS)) if not path.is_dir()]
    if missing:
        raise MissingData(f"{missing[0]}: there is no such folder. {advice}")
    unknown = sorted(path.name for path in folder.glob("obj-*") if path.name not in CELLS)
    if unknown:
        raise CorruptFile(f"{folder / unknown[0]}: is none of the eight cells {', '.join(CELLS)}")
    cells = {cell: _numbered(folder / cell) for cell in CELLS}
    labels = np.repeat(list(CELLS.values()), [len(files) for files in cells.values()], axis=0)
    return [file for files in cells.values() for file in files], labels.astype(np.int64)


def _numbered(folder: Path) -> list[Path]:
    """The .jpg files by their number: after `999.jpg` comes `1000.jpg`."""
    files = [path for path in folder.iterdir() if path.suffix.lower() == ".jpg" and not path.name.startswith(".")]
    strange = sorted(path.name for path in files if not (path.stem.isascii() and path.stem.isdigit()))
    if strange:
        raise CorruptFile(f"{folder / strange[0]}: pictures are called by a number, as 000.jpg")
    return sorted(files, key=lambda path: (int(path.stem), path.name))
