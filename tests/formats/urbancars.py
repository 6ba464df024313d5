"""Drawn stand-ins for UrbanCars: the tree that the authors' generator writes, and parts to build it from."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("urban", "country")
BIASED, BALANCED = "bg-0.95_co_occur_obj-0.95", "bg-0.5_co_occur_obj-0.5"
TRAIN, EVAL = (20, 3, 3, 1), (3, 3, 3, 3)
"""Pictures of a class with both shortcuts aligned, the background only, the object only, neither."""


def cell_folder(y: int, background: int, thing: int) -> str:
    """The folder of a cell."""
    return f"obj-{KINDS[y]}_bg-{KINDS[background]}_co_occur_obj-{KINDS[thing]}"


def color(*numbers: int) -> tuple[int, int, int]:
    """A colour for what a picture shows, far enough from the next one to survive JPEG."""
    y, background, thing, n = numbers
    return 40 + 120 * y, 40 + 80 * background + 40 * thing, 8 * (n % 30)


def write_split(folder: Path, cells: Sequence[int], side: int = 256, masks: bool = True) -> None:
    """Write the eight folders of a split; `cells` are counts per class as in `TRAIN`."""
    for y, background, thing in product((0, 1), repeat=3):
        into = folder / cell_folder(y, background, thing)
        into.mkdir(parents=True, exist_ok=True)
        for n in range(cells[2 * (background != y) + (thing != y)]):
            Image.new("RGB", (side, side), color(y, background, thing, n)).save(into / f"{n:03d}.jpg")
            for name in ("mask", "co_occur_obj_mask", "bg_only") if masks else ():
                Image.new("L", (side, side), 255).save(into / f"{n:03d}_{name}.png")


def write_urbancars(root: Path, trees: dict[str, Sequence[int]] | None = None, **options: Any) -> Path:
    """Write the splits of `trees` (path to counts), by default the official ones, below `root/urbancars`."""
    trees = trees or {f"{BIASED}/train": TRAIN, f"{BALANCED}/val": EVAL, f"{BALANCED}/test": EVAL}
    for path, cells in trees.items():
        write_split(root / "urbancars" / path, cells, **options)
    return root / "urbancars"


# ------------------------------------------------------------------------------------------------------------- parts

CAR, PLACE, THING = (200, 30, 30), (20, 90, 20), (30, 30, 220)
"""Colours of drawn cars, backgrounds and objects; everything around a car or an object is white."""
PLACES = {
    "urban": ("alley", "street", "downtown", "crosswalk", "gas-station", "garage/outdoor", "d/driveway"),
    "country": ("desert_road", "f/field_road", "forest/road"),
}
CATEGORIES = ("fireplug", "stop_sign", "street_sign", "parking_meter", "traffic_light", "cow", "horse", "sheep", "cat")


def box_polygon(left: int, top: int, width: int, height: int) -> list[float]:
    """A rectangle as a polygon of LVIS."""
    right, bottom = left + width - 1, top + height - 1
    return [float(n) for n in (left, top, right, top, right, bottom, left, bottom)]


def annotation(number: int, image: int, category: str, box: tuple[int, int, int, int]) -> dict[str, Any]:
    """A rectangular object (left, top, width, height) as an annotation of LVIS."""
    return {
        "id": number,
        "image_id": image,
        "category_id": 100 + CATEGORIES.index(category),
        "bbox": [float(n) for n in box],
        "area": float(box[2] * box[3]),
        "segmentation": [box_polygon(*box)],
    }


def write_cars(folder: Path, number: int = 6, splits: Sequence[str] = ()) -> None:
    """`number` cars of each kind, a rectangle 60 x 30 at (20, 40) of a picture of 100 x 80; masks of 0 and 1 or 255."""
    rows = [("filename", "mask", "kind", *(["split"] if splits else []))]
    for kind, n in product(KINDS, range(number)):
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        picture, mask = Image.new("RGB", (100, 80), "white"), Image.new("L", (100, 80))
        box = (20, 40, 79, 69)
        ImageDraw.Draw(picture).rectangle(box, (CAR[0], CAR[1] + n, CAR[2] + KINDS.index(kind)))
        ImageDraw.Draw(mask).rectangle(box, (255, 1)[n % 2])
        name = f"{kind}{n}.png"
        picture.save(folder / name)
        mask.save(folder / "masks" / name)
        rows.append((name, f"masks/{name}", kind, *([splits[n]] if splits else [])))
    (folder / "cars.csv").write_text("".join(",".join(row) + "\n" for row in rows))


def write_lvis(root: Path, annotations: Sequence[dict[str, Any]]) -> None:
    """The json, and a COCO picture of 160 x 120 for every image in it on which its objects are drawn."""
    (root / "coco/train2017").mkdir(parents=True, exist_ok=True)
    categories = [{"id": 100 + n, "name": name} for n, name in enumerate(CATEGORIES)]
    content = {"categories": categories, "annotations": list(annotations), "images": []}
    (root / "lvis_v1_train.json").write_text(json.dumps(content))
    for image in {entry["image_id"] for entry in annotations}:
        photo = np.full((120, 160, 3), 255, np.uint8)
        for left, top, width, height in (e["bbox"] for e in annotations if e["image_id"] == image):
            photo[int(top) : int(top + height), int(left) : int(left + width)] = THING
        Image.fromarray(photo).save(root / f"coco/train2017/{image:012d}.jpg", quality=95)


def tall_things(number: int = 6) -> list[dict[str, Any]]:
    """`number` objects of each kind, 50 x 100 each, in a photograph of their own."""
    things = [annotation(n, 1000 + n, CATEGORIES[n % 5], (30, 10, 50, 100)) for n in range(number)]
    return things + [annotation(50 + n, 2000 + n, CATEGORIES[5 + n % 3], (30, 10, 50, 100)) for n in range(number)]


def write_places(folder: Path, number: int = 2) -> None:
    """`number` pictures in every category, under various spellings, each of one colour."""
    for k, kind in enumerate(KINDS):
        for c, category in enumerate(PLACES[kind]):
            (folder / category).mkdir(parents=True, exist_ok=True)
            for n in range(number):
                tone = (PLACE[0] + 20 * n, PLACE[1] + 60 * k, PLACE[2] + 10 * c)
                Image.new("RGB", (64, 48), tone).save(folder / category / f"{n:08d}.jpg", quality=95)


def write_parts(root: Path, splits: Sequence[str] = ()) -> Path:
    """A folder of parts below `root`."""
    folder = root / "urbancars-parts"
    write_cars(folder / "cars", splits=splits)
    write_lvis(folder, tall_things())
    write_places(folder / "places")
    return folder
