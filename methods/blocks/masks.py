"""Images with their low-attention pixels removed or swapped, as in MaC (HosseiniNoohdani et al.).

Images are (B, C, H, W), masks (B, 1, H, W) with True on the pixels that stay, `fill` is anything that broadcasts to
the images: MaC takes the mean of each channel over the batch (1, C, 1, 1).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def top_mask(heat: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """True on the round(share * H * W) hottest pixels of `heat` (B, h, w), resized to H x W; bilinear, exactly so many.

    Of equally hot pixels the first in reading order is taken.
    """
    height, width = size
    resized = F.interpolate(heat[:, None], size, mode="bilinear", align_corners=False).flatten(1)
    hottest = resized.argsort(dim=1, descending=True, stable=True)[:, : round(share * height * width)]
    mask = torch.zeros_like(resized, dtype=torch.bool).scatter_(1, hottest, True)
    return mask.view(-1, 1, height, width)


def patch_mask(heat: Tensor, size: tuple[int, int], share: float, patches: int = 7) -> Tensor:
    """True on the round(share * patches^2) patches of `heat` (B, h, w), resized to H x W, with the highest mean heat.

    Patches are 32 pixels wide at 224. Of equally hot ones the first in reading order is taken.
    """
    resized = F.interpolate(heat[:, None], size, mode="bilinear", align_corners=False)
    means = F.adaptive_avg_pool2d(resized, patches).flatten(1)
    hottest = means.argsort(dim=1, descending=True, stable=True)[:, : round(share * patches**2)]
    chosen = torch.zeros_like(means).scatter_(1, hottest, 1.0).view(-1, 1, patches, patches)
    return F.interpolate(chosen, size, mode="nearest") > 0


def removed(x: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """`m X + (1 - m) b`."""
    return torch.where(mask, x, fill)


def combined(x: Tensor, mask: Tensor, partner: Tensor, fill: Tensor) -> Tensor:
    """`m_i X_i + (1 - m_i)(1 - m_j) X_j + (1 - m_i) m_j b` with j = partner_i (B,): j's background around i's core."""
    return torch.where(mask, x, torch.where(mask[partner], fill, x[partner]))


def partners(y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each label (B,) the position of a random example with another one, drawn with replacement.

    Every other class in the batch is equally likely. In a batch of one class it is a random permutation. A generator
    must be on the device of `y`; by default it is torch's global one.
    """
    other = y[:, None] != y
    if y.device.type == "cpu" and not other.any():  # of a GPU this is not asked: the host would wait for the answer
        return torch.randperm(len(y), generator=generator)
    weight = other / (~other).sum(0)
    noise = torch.empty_like(weight).exponential_(generator=generator)
    drawn = (weight / noise).argmax(1)  # what multinomial draws, which would look at the weights first
    return drawn if y.device.type == "cpu" else torch.where(other.any(), drawn, noise[0].argsort())
