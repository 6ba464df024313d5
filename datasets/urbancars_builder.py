"""UrbanCars made from its parts: cars with masks, objects cut out of COCO by LVIS, backgrounds of Places.

An implementation of our own of the composition that the paper describes. Nothing is written: pictures are composed when
they are asked for. A source picture of a car, of objects or of a background serves one split only; within the split it
is used again, as often as the numbers of the card ask for.

Source: Li et al., A Whac-A-Mole Dilemma, CVPR 2023, section on UrbanCars.
"""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..benchmark.errors import MissingData
from ..benchmark.pictures import Pictures
from ..benchmark.spec import SPLITS, Card, SplitName
from ..benchmark.store import Split, Splits
from .interventions import donors
from .tables import find_folder
from .urbancars_parts import ADVICE, COCO, KINDS, LVIS, Part, object_mask, read_cars, read_objects, read_places

ROLES = ("car", "background", "object")
PARTS: dict[str, Any] = {
    "version": 1,
    "seed": 0,
    "pools": {"train": 0.8, "val": 0.1, "test": 0.1},
    "places": {
        "urban": ["alley", "street", "downtown", "crosswalk", "gas_station", "garage-outdoor", "driveway"],
        "country": ["desert_road", "field_road", "forest_road"],
    },
    "objects": {
        "urban": ["fireplug", "stop_sign", "street_sign", "parking_meter", "traffic_light"],
        "country": ["cow", "horse", "sheep"],
    },
    "least_area": {"urban": ["box", 4500], "country": ["mask", 3500]},
    "layout": {"size": 256, "car": 128, "object": 64, "row": 128, "column": 224},
}
"""Parameters of the builder, in pixels. `pools` are shares of the sources, objects have one connected component and at
least `least_area`, and `layout` is the picture's side, the longer side of car and object, and the object's centre."""


def build(card: Card, root: Path | None) -> Splits:
    """Compose every split with the counts of the card; raises `MissingData` or `CorruptFile`."""
    params = card.params["parts"]
    folder = find_folder(card.name, ("urbancars-parts",), root, ("cars/cars.csv", LVIS), ADVICE)
    missing = [name for name in ("cars/cars.csv", LVIS, COCO, "places") if not (folder / name).exists()]
    if missing:
        raise MissingData(f"{card.name}: there is no {', no '.join(missing)} in {folder}. {ADVICE}")
    parts = {
        "car": read_cars(folder / "cars"),
        "background": read_places(folder / "places", params["places"]),
        "object": read_objects(folder / LVIS, folder / COCO, params),
    }
    pools = {
        (role, kind): divide(
            [part for part in parts[role] if part.kind == kind],
            params["pools"],
            np.random.RandomState([params["seed"], ROLES.index(role), kind]),
            f"{card.name}: {KINDS[kind]} {role}s in {folder}",
        )
        for role, kind in product(ROLES, range(len(KINDS)))
    }
    return {name: _compose_split(card, name, pools) for name in SPLITS}


# ------------------------------------------------------------------------------------------------------- composition


def compose(
    car: Image.Image, mask: Image.Image, photo: Image.Image, place: Image.Image, detail: tuple[Any, dict[str, int]]
) -> Image.Image:
    """The background with the car in its centre and the object at its right edge.

    `detail` is the object's outline in `photo` and the layout. Raises `ValueError` where they do not fit each other.
    """
    outline, layout = detail
    if car.size != mask.size:
        mask_size, size = ("x".join(map(str, picture.size)) for picture in (mask, car))
        raise ValueError(f"the mask of the car is {mask_size} px, its picture {size}")
    side = layout["size"]
    canvas = place.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    _paste(canvas, car, _binary(mask), layout["car"], (side // 2, side // 2), "car")
    centre = layout["column"], layout["row"]
    _paste(canvas, photo, object_mask(outline, photo.size), layout["object"], centre, "object")
    return canvas


def _binary(mask: Image.Image) -> Image.Image:
    """The mask with values 0 and 255, whether it was written as 0 and 1, as 0 and 255 or as a JPEG."""
    grey = np.asarray(mask.convert("L"))
    return Image.fromarray(np.where(grey > grey.max() / 2, 255, 0).astype(np.uint8))


def _paste(
    canvas: Image.Image, picture: Image.Image, mask: Image.Image, longer: int, centre: tuple[int, int], what: str
) -> None:
    """Put what the mask shows on the canvas, its longer side `longer` px, its box centred at (x, y)."""
    box = mask.getbbox()
    if box is None:
        raise ValueError(f"the mask of the {what} is empty")
    width, height = box[2] - box[0], box[3] - box[1]
    scale = longer / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    cut, alpha = (layer.crop(box).resize(size, Image.Resampling.BILINEAR) for layer in (picture.convert("RGB"), mask))
    canvas.paste(cut, (centre[0] - size[0] // 2, centre[1] - size[1] // 2), alpha)


# ------------------------------------------------------------------------------------------------------------ splits

Pools = dict[SplitName, list[Part]]


def divide(parts: Sequence[Part], shares: dict[str, float], random: np.random.RandomState, what: str) -> Pools:
    """The parts of each split: by the split that they name, else drawn so that no two splits share a source.

    Raises `MissingData` when a split would get none.
    """
    sources = sorted({part.source for part in parts})
    order = [sources[i] for i in random.permutation(len(sources))]
    val, test = (max(1, int(len(order) * shares[name])) for name in ("val", "test"))
    drawn: dict[str, SplitName] = dict.fromkeys(order, "train")
    drawn |= dict.fromkeys(order[:val], "val") | dict.fromkeys(order[val : val + test], "test")
    pools: Pools = {name: [part for part in parts if (part.split or drawn[part.source]) == name] for name in SPLITS}
    empty = [name for name in SPLITS if not pools[name]]
    if empty:
        raise MissingData(
            f"{what}: {len(sources)} sources are too few, none is left for {' and '.join(empty)}. Splits share none; "
            "add some, at least three in all."
        )
    return pools


def sequence(pool: Sequence[Part], number: int, random: np.random.RandomState) -> list[Part]:
    """`number` parts in random order: each is used once before any is used again."""
    rounds = -(-number // len(pool))
    order = np.concatenate([random.permutation(len(pool)) for _ in range(rounds)]) if rounds else ()
    return [pool[i] for i in order[:number]]


def _compose_split(card: Card, name: SplitName, pools: dict[tuple[str, int], Pools]) -> Split:
    """A split with the group counts of the card, and its views; a car is the independent unit of its pictures."""
    params = card.params["parts"]
    labels: NDArray[np.int64] = np.repeat(list(product((0, 1), repeat=len(ROLES))), card.counts[name], axis=0)
    chosen = {role: _choose(labels[:, r], pools, name, role, params["seed"]) for r, role in enumerate(ROLES)}
    donor = donors(labels[:, 0], np.random.RandomState([params["seed"], len(ROLES) + len(SPLITS)]))
    views = {
        role: _pictures(card, chosen | {role: [chosen[role][i] for i in donor]})
        for role in (card.interventions if name == "train" else ())
    }
    unit = np.unique([car.source for car in chosen["car"]], return_inverse=True)[1]
    return Split(_pictures(card, chosen), labels[:, 0], labels[:, 1:], unit.astype(np.int64), views=views)


def _pictures(card: Card, chosen: dict[str, list[Part]]) -> Pictures:
    """Pictures composed of the parts of each role."""
    cars, places, things = (chosen[role] for role in ROLES)
    together = list(zip(cars, things, places, strict=True))
    return Pictures(
        [car.files + thing.files + place.files for car, thing, place in together],
        card.pixels,
        draw=compose,
        details=[(thing.outline, card.params["parts"]["layout"]) for thing in things],
        where=_where(together),
    )


def _choose(
    kinds: NDArray[np.int64], pools: dict[tuple[str, int], Pools], name: SplitName, role: str, seed: int
) -> list[Part]:
    """The part of a role for each picture of a split. A stream each: variants share splits of the same counts."""
    column = np.empty(len(kinds), object)
    for kind in range(len(KINDS)):
        random = np.random.RandomState([seed, len(ROLES) + SPLITS.index(name), ROLES.index(role), kind])
        rows = np.flatnonzero(kinds == kind)
        for row, part in zip(rows, sequence(pools[role, kind][name], len(rows), random), strict=True):
            column[row] = part
    return list(column)


def _where(parts: list[tuple[Part, Part, Part]]) -> Callable[[int], str]:
    return lambda i: ", ".join(part.name for part in parts[i])
