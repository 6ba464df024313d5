"""`worstgroup show DATASET --images`: a contact sheet, one row of pictures per group with its counts."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..benchmark import metrics
from ..benchmark.errors import require
from ..benchmark.home import write_bytes
from ..benchmark.spec import SPLITS, SplitName
from ..benchmark.store import Store

COLUMNS: dict[SplitName, int] = {"train": 6, "test": 4}
"""Pictures of a group by split; a variant may change the pictures of one of them only."""
VIEWS = 3
"""Of the train pictures, so many are shown again in each view."""
SIDE, GAP, LABEL, HEAD = 96, 4, 260, 48
_INK, _PALE, _PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)


def contact_sheet(store: Store, path: Path) -> None:
    """Write a PNG with six train pictures, some of them again with each shortcut replaced, and four test pictures of
    every group.

    Raises `UserError` for precomputed features, which are no pictures.
    """
    card = store.card
    require(card.dtype == "uint8" and card.image[2] <= 3, f"{card.name} holds {card.dtype} features, no pictures")
    height, width = (max(1, round(SIDE * side / max(card.image[:2]))) for side in card.image[:2])
    rows = [g for g in range(card.num_groups) if any(card.counts[name][g] for name in SPLITS)]
    parts = _parts(store)
    right = LABEL + sum(columns for *_, columns in parts) * (width + GAP) + (len(parts) - 1) * SIDE // 4
    sheet = Image.new("RGB", (right, HEAD + len(rows) * (height + GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(16), ImageFont.load_default(12)
    pen.text((GAP, GAP), fitting(f"{card.name}: {card.title}", title, right - 2 * GAP), _INK, title)
    pen.text((GAP, HEAD - 20), "group, then images in train / val / test", _PALE, small)
    for line, g in enumerate(rows):
        top = HEAD + line * (height + GAP)
        counts = " / ".join(f"{card.counts[name][g]:,}" for name in SPLITS)
        pen.text((GAP, top + 4), fitting(card.group_names()[g], title, LABEL - 2 * GAP), _INK, title)
        pen.text((GAP, top + 26), counts, _PALE, small)
    left = LABEL
    for name, view, columns in parts:
        pen.text((left, HEAD - 20), f"other {view}" if view else name, _PALE, small)
        for line, g in enumerate(rows):
            for column, picture in enumerate(_examples(store, name, g, view)[:columns]):
                shown = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
                sheet.paste(shown, (left + column * (width + GAP), HEAD + line * (height + GAP)))
        left += columns * (width + GAP) + SIDE // 4
    write_bytes(path, png(sheet))


def _parts(store: Store) -> list[tuple[SplitName, str, int]]:
    """What stands side by side: split, view (empty: the images as they are) and number of pictures."""
    parts = [(name, "", columns) for name, columns in COLUMNS.items()]
    return [*parts[:1], *(("train", view, VIEWS) for view in store.card.interventions), *parts[1:]]


def _examples(store: Store, name: SplitName, g: int, view: str) -> list[NDArray[np.uint8]]:
    """Some pictures (h, w, 3) of a group, evenly spaced over the split, as they are or in a view."""
    split, most = store.split(name), COLUMNS[name]
    members = np.flatnonzero(metrics.group_index(split.y, split.a, store.card.shape) == g)
    chosen = members[np.linspace(0, len(members) - 1, min(most, len(members))).astype(int)] if len(members) else []
    images: Any = split.views[view] if view else split.images
    rows = np.arange(len(split)) if view else split.image_rows()
    return [rgb(np.asarray(images[row])) for row in rows[chosen]]


def rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture of 1, 2 or 3 channels as red, green and blue."""
    channels = image.shape[2]
    if channels == 1:
        return np.repeat(image, 3, axis=2)
    return np.concatenate([image, np.zeros((*image.shape[:2], 3 - channels), np.uint8)], axis=2)


def fitting(text: str, font: Any, width: int) -> str:
    """The text, cut with dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def png(sheet: Image.Image) -> bytes:
    """The file's content."""
    content = BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()
