"""Galleries: pictures of every group, and what ERM and the run's model look at in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from ..benchmark.device import plain_kernels
from ..benchmark.home import write_bytes
from ..benchmark.spec import SplitName
from ..methods.blocks.explainers import Explainer, prepared
from .contact_sheet import fitting, png, rgb
from .look import Look

SIDE, GAP, LABEL, HEAD = 96, 4, 200, 56
_INK, _PALE, _PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)
Picture = NDArray[np.uint8]


def gallery(look: Look, path: Path, explainer: Explainer, split: SplitName, columns: int) -> None:
    """Write a PNG with a row for each true group: pictures, evenly spaced over it, each beside the models' maps."""
    names, groups = look.store.card.group_names(), look.groups(split)
    rows = {names[g]: np.flatnonzero(groups == g) for g in range(len(names)) if (groups == g).any()}
    draw_rows(look, path, explainer, split, rows, columns, f"{look.record.label} on {look.record.dataset}")


def draw_rows(
    look: Look,
    path: Path,
    explainer: Explainer,
    split: SplitName,
    rows: dict[str, NDArray[np.int64]],
    columns: int,
    title: str,
) -> None:
    """Write a PNG with a named row for each set of examples; up to `columns` of each are shown."""
    chosen = {name: _spread(members, columns) for name, members in rows.items()}
    flat = np.concatenate(list(chosen.values()))
    with plain_kernels(look.lab.device):  # as in the run
        cells = dict(zip(flat.tolist(), _cells(look, explainer, split, flat), strict=True))
    block = (1 + len(look.models)) * (SIDE + GAP)
    sheet = Image.new("RGB", (LABEL + columns * (block + 2 * GAP), HEAD + len(rows) * (SIDE + GAP)), _PAPER)
    pen, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(16), ImageFont.load_default(12)
    pen.text((GAP, GAP), fitting(f"{title}: {explainer} of the predicted class", large, sheet.width), _INK, large)
    for column in range(columns):
        for place, name in enumerate(["picture", *look.models]):
            left = LABEL + column * (block + 2 * GAP) + place * (SIDE + GAP)
            pen.text((left, HEAD - 18), fitting(name, small, SIDE), _PALE, small)
    for line, (name, members) in enumerate(chosen.items()):
        top = HEAD + line * (SIDE + GAP)
        pen.text((GAP, top + 4), fitting(name, large, LABEL - 2 * GAP), _INK, large)
        pen.text((GAP, top + 26), f"{len(rows[name]):,} {split} images", _PALE, small)
        for column, example in enumerate(members.tolist()):
            for place, (picture, right) in enumerate(cells[example]):
                left = LABEL + column * (block + 2 * GAP) + place * (SIDE + GAP)
                sheet.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR), (left, top))
                if not right:
                    pen.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=(210, 30, 30), width=3)
    write_bytes(path, png(sheet))


def _spread(members: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Up to `most` of the members, evenly spaced."""
    places = np.unique(np.linspace(0, len(members) - 1, min(most, len(members))).round().astype(np.int64))
    spread: NDArray[np.int64] = members[places]
    return spread


def _cells(
    look: Look, explainer: Explainer, split: SplitName, rows: NDArray[np.int64]
) -> list[list[tuple[Picture, bool]]]:
    """For each example its picture, then every model's map over it, and whether that model is right."""
    part = look.split(split)
    images: Any = part.images
    pictures = [rgb(np.asarray(images[row])) for row in part.image_rows()[rows]]
    cells = [[(picture, True)] for picture in pictures]
    paint: Callable[[Picture, NDArray[np.float32]], Picture] = (
        signed if explainer in ("lrp", "lrp-zennit", "ig") else heat
    )
    for model in look.models.values():
        explain = prepared(explainer, model, look.inputs(split, rows[:1]))
        for start in range(0, len(rows), 32):
            x = look.inputs(split, rows[start : start + 32])
            found = F.interpolate(explain(x), size=x.shape[2:], mode="bilinear", align_corners=False)
            with torch.no_grad():
                predicted = model(x).argmax(1).cpu().numpy()
            for i, values in enumerate(found.sum(1).cpu().numpy()):
                right = bool(predicted[i] == part.y[rows[start + i]])
                cells[start + i].append((paint(pictures[start + i], values), right))
    return cells


def signed(picture: Picture, values: NDArray[np.float32]) -> Picture:
    """A map (H, W) of relevance for (red) and against (blue) the prediction, white where there is none (h, w, 3)."""
    scale = np.quantile(np.abs(values), 0.99) or 1.0  # a few pixels can hold most of the relevance
    strength = np.clip(values / scale, -1, 1)[:, :, None]
    red, blue = np.array([200, 20, 30]), np.array([20, 60, 200])
    shade = np.where(strength > 0, red, blue)
    return np.asarray(255 + (shade - 255) * np.abs(strength)).round().astype(np.uint8)


def heat(picture: Picture, values: NDArray[np.float32]) -> Picture:
    """A map (H, W) from its least (nothing) to its greatest value (red), laid over a grey picture (H, W, 3)."""
    low, high = float(values.min()), float(values.max())
    share = ((values - low) / (high - low) if high > low else np.zeros_like(values))[:, :, None]
    grey = np.repeat(picture.mean(2, keepdims=True), 3, axis=2)
    return np.asarray(grey * (1 - 0.7 * share) + np.array([255, 60, 0]) * 0.7 * share).round().astype(np.uint8)
