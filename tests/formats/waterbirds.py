"""Drawn stand-ins for Waterbirds: ellipses and triangles on green and blue, in the formats of the field."""

import csv
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SPECIES = {
    0: ("014.Indigo_Bunting", "047.American_Goldfinch"),
    1: ("001.Black_footed_Albatross", "021.Eastern_Towhee"),
}
"""Two of each class; the towhee is no waterbird but for the letters of its name."""
COUNTS = {"train": (8, 2, 2, 4), "val": (3, 3, 3, 3), "test": (3, 3, 3, 3)}
SIZES = ((60, 40), (40, 60), (50, 50))
PLACES = {0: (30, 160, 40), 1: (40, 70, 190)}
HEADER = ("img_id", "img_filename", "y", "split", "place", "place_filename")
GREYSCALE = 3
"""The row whose picture is greyscale, as eight of CUB's are."""
Row = dict[str, Any]


def make_rows() -> list[Row]:
    """The table's rows in the order of `img_id`."""
    rows = [
        {"y": g // 2, "split": split, "place": g % 2, "species": SPECIES[g // 2][i % 2]}
        for split, counts in enumerate(COUNTS.values())
        for g, count in enumerate(counts)
        for i in range(count)
    ]
    rows.sort(key=lambda row: row["species"])
    for i, row in enumerate(rows):
        species = row["species"]
        row["img_id"] = i + 1
        row["img_filename"] = f"{species}/{species.partition('.')[2].title()}_{i:04}_{100 + i}.jpg"
        row["place_filename"] = f"/o/ocean/{i:08}.jpg" if row["place"] else f"/b/bamboo_forest/{i:08}.jpg"
    return rows


def draw_bird(picture: Image.Image, y: int, fill: Any) -> Image.Image:
    """Draw an ellipse (landbird) or a triangle (waterbird) into a picture."""
    width, height = picture.size
    pen = ImageDraw.Draw(picture)
    box = [width // 4, height // 4, 3 * width // 4, 3 * height // 4]
    if y:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), (width // 2, box[1])], fill=fill)
    else:
        pen.ellipse(box, fill=fill)
    return picture


def draw_mask(size: tuple[int, int], y: int) -> Image.Image:
    """The bird's mask; its upper corners have two of the levels on which annotators did not agree."""
    mask = draw_bird(Image.new("L", size), y, 255)
    mask.paste(204, (0, 0, 6, 6))
    mask.paste(153, (size[0] - 6, 0, size[0], 6))
    return mask


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture, and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=90)


def draw_row(row: Row, background: tuple[int, int, int] | None = None) -> Image.Image:
    """A row's picture, on its place or on another colour."""
    i = row["img_id"] - 1
    place = Image.new("RGB", SIZES[i % 3], background or PLACES[row["place"]])
    picture = draw_bird(place, row["y"], (200, 60 + 4 * i, 90))
    return picture.convert("L") if i == GREYSCALE and background is None else picture


def write_table(path: Path, rows: list[Row], columns: tuple[str, ...] = HEADER) -> Path:
    """Write metadata.csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_release(folder: Path, *, wilds: bool = False, masks: str = "") -> Path:
    """The release, or its twin in WILDS' packaging; `masks` (a folder below it, or "beside") adds CUB's masks."""
    rows = make_rows()
    write_table(folder / "metadata.csv", rows)
    for row in rows:
        save(draw_row(row), folder / row["img_filename"])
        if masks:
            tree = folder if masks == "beside" else folder / masks
            mask = draw_mask(SIZES[(row["img_id"] - 1) % 3], row["y"])
            save(mask, (tree / row["img_filename"]).with_suffix(".png"))
    if wilds:
        (folder / "RELEASE_v1.0.txt").touch()
    return folder


def write_aligned(folder: Path) -> Path:
    """DFR's aligned trees and their one table."""
    rows = make_rows()
    write_table(folder / "metadata.csv", rows)
    for row in rows:
        save(draw_row(row), folder / "combined" / row["img_filename"])
        save(draw_row(row, (150, 150, 150)), folder / "birds" / row["img_filename"])
        save(Image.new("RGB", (20, 20), PLACES[row["place"]]), folder / "places" / row["img_filename"])
    return folder


def write_parts(folder: Path, *, places: tuple[str, ...], each: int = 15) -> Path:
    """CUB-200-2011 and `each` pictures in each of four Places folders, the first two of land; half of CUB is train."""
    rows = make_rows()
    cub = folder / "CUB_200_2011"
    for row in rows:
        i = row["img_id"] - 1
        photo = draw_bird(Image.new("RGB", SIZES[i % 3], (250, 250, 250)), row["y"], (200, 60 + 4 * i, 90))
        save(photo.convert("L") if i == GREYSCALE else photo, cub / "images" / row["img_filename"])
        mask = draw_mask(SIZES[i % 3], row["y"])
        save(mask, (folder / "segmentations" / row["img_filename"]).with_suffix(".png"))
    (cub / "images.txt").write_text("".join(f"{row['img_id']} {row['img_filename']}\n" for row in rows))
    (cub / "train_test_split.txt").write_text("".join(f"{row['img_id']} {row['img_id'] % 2}\n" for row in rows))
    for k, name in enumerate(places):
        for i in range(each):  # some smaller than the photographs, some larger; each of its own shade
            shade = Image.new("RGB", ((30, 90), (100, 45), (64, 64))[i % 3], (10 * i, 100 + k, 200 * (k // 2)))
            save(shade, folder / name / f"{i:08}.jpg")
    return folder
