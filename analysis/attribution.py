"""How much of what a model looks at is the object: MaC's Table 1, for any dataset that knows where its objects are.

HosseiniNoohdani et al., Mitigating Spurious Correlation in Images by Intervention, Table 1.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..benchmark.device import plain_kernels
from ..benchmark.errors import require
from ..benchmark.store import Store
from ..methods.blocks.grad_cam import predicted_cam
from ..methods.blocks.masks import top_mask
from .look import Look

SHARE = 15_000 / 224**2
"""Of the pixels that the mask keeps, as in the paper."""
COLUMNS = ("score_fg", "score_bg", "mask_fg", "mask_bg", "foreground", "images")


def report(look: Look, silhouettes: Store) -> list[dict[str, object]]:
    """One line per model and true group of the test split.

    `score_fg`, `score_bg`: mean over images of the class activation map (XGrad-CAM of the predicted class, scaled to
    [0, 1] by its least and greatest value) inside and outside the object; `mask_fg`, `mask_bg`: shares of the object
    and of the rest that lie in the map's hottest 29.9 %; `foreground`: the object's share of the image. Images in
    which the object has no pixel, or all of them, count in none. `silhouettes` has white objects in place of pictures.
    """
    groups, names = look.groups("test"), look.store.card.group_names()
    objects = silhouettes.split("test")
    require(len(objects) == len(groups), f"{silhouettes.card.name} has {len(objects)} pictures, not {len(groups)}")
    lines = []
    for name, model in look.models.items():
        parts = []
        for rows in np.array_split(np.arange(len(groups)), max(1, len(groups) // 64)):
            white = torch.stack([torch.from_numpy(_white(objects.images, row)) for row in objects.image_rows()[rows]])
            with plain_kernels(look.lab.device):  # as in the run
                heat = predicted_cam(model, look.inputs("test", rows))[1].cpu()
            parts.append(shares(heat, white).numpy())
        values = np.concatenate(parts)
        lines += [{"model": name, "group": names[g], **line} for g, line in _means(values, groups)]
    return lines


def shares(heat: Tensor, objects: Tensor) -> Tensor:
    """Of maps (B, h, w) and objects (B, H, W), bool: (B, 5), the first five of `COLUMNS`; NaN where one is empty."""
    size = (objects.shape[1], objects.shape[2])
    full = F.interpolate(heat[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    low, high = full.amin((1, 2), keepdim=True), full.amax((1, 2), keepdim=True)
    scaled = (full - low) / torch.where(high > low, high - low, 1)
    mask = top_mask(heat, size, SHARE)[:, 0]
    inside, outside = objects.float(), (~objects).float()

    def mean(values: Tensor, weight: Tensor) -> Tensor:
        return (values * weight).sum((1, 2)) / weight.sum((1, 2))

    columns = [mean(part.float(), weight) for part in (scaled, mask) for weight in (inside, outside)]
    return torch.stack([*columns, inside.mean((1, 2))], dim=1)


def _means(values: NDArray[np.float32], groups: NDArray[np.int64]) -> Iterator[tuple[int, dict[str, object]]]:
    """Means of `COLUMNS` over the images of every group that have an object and a background."""
    whole = np.isfinite(values).all(1)
    for g in np.unique(groups):
        own = values[(groups == g) & whole]
        yield int(g), dict(zip(COLUMNS, [*map(float, own.mean(0)), len(own)] if len(own) else [], strict=False))


def _white(images: object, row: int) -> NDArray[np.bool_]:
    return np.asarray(images[row])[:, :, 0] >= 128  # type: ignore[index]
