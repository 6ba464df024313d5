"""Two random views of every image, as Barlow Twins makes them: crop and mirror, colours, grey, blur, solarise.

Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021, with the constants of the
released code. Each image has parameters of its own; only the order of the colour changes is one for a batch.
Deviations: crops are resized bilinearly (there bicubically), and blur is in proportion to the image, since the two
pixels that it has at 224 would leave nothing of a digit. Of images that are not RGB, brightness and contrast change.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...benchmark.data import crop_boxes, resized_crop
from ...benchmark.device import to_device

VIEWS = ((1.0, 0.0), (0.1, 0.2))
"""Of either view, the chances of blur and of being solarised."""
CROP = (0.08, 1.0)
"""Share of the area that a crop keeps."""
JITTER, GREY = 0.8, 0.2
"""Chances that the colours change, and that they go."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
BLUR, BLUR_SIDE = (0.1, 2.0), 224
"""Deviation of the blur in pixels, for images of this side."""
LUMA = (0.2989, 0.587, 0.114)
SOLARISED = 128 / 255
"""From this value on a solarised image is inverted."""

Change = Callable[[Tensor], Tensor]


def two_views(generator: torch.Generator) -> Change:
    """The transform of images (B, C, H, W) in [0, 1] to two views (B, 2, C, H, W), drawn from a CPU generator."""
    return lambda x: torch.stack([_view(x, *chances, generator) for chances in VIEWS], 1)


def _view(x: Tensor, blur: float, solarise: float, generator: torch.Generator) -> Tensor:
    boxes = crop_boxes(len(x), x.shape[2], x.shape[3], generator, CROP)
    x = resized_crop(x, *boxes, mirrored=torch.rand(len(x), generator=generator) < 0.5)
    x = some(x, JITTER, partial(jittered, generator=generator), generator)
    if x.shape[1] == 3:
        x = some(x, GREY, lambda chosen: grey(chosen).expand_as(chosen), generator)
    x = some(x, blur, partial(blurred, generator=generator), generator)
    return some(x, solarise, solarised, generator)


def some(x: Tensor, chance: float, change: Change, generator: torch.Generator) -> Tensor:
    """Images of which each is changed with this chance; nothing is computed for the others."""
    chosen = (torch.rand(len(x), generator=generator) < chance).nonzero()[:, 0]
    if len(chosen) == 0:
        return x
    chosen = to_device(chosen, x.device)
    return x.index_copy(0, chosen, change(x[chosen]))


def jittered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue changed at random, in a random order."""

    def factor(strength: float) -> Tensor:
        drawn = 1 + strength * (2 * torch.rand(len(x), generator=generator) - 1)
        return to_device(drawn, x.device).view(-1, 1, 1, 1)

    changes: list[Change] = [lambda x: brightened(x, factor(BRIGHTNESS)), lambda x: contrasted(x, factor(CONTRAST))]
    if x.shape[1] == 3:
        changes += [lambda x: saturated(x, factor(SATURATION)), lambda x: turned(x, factor(HUE) - 1)]
    for i in torch.randperm(len(changes), generator=generator).tolist():
        x = changes[i](x)
    return x


def brightened(x: Tensor, factor: Tensor) -> Tensor:
    """Pixels times a factor (B, 1, 1, 1)."""
    return (x * factor).clamp(0, 1)


def contrasted(x: Tensor, factor: Tensor) -> Tensor:
    """Distances from the image's mean grey times a factor (B, 1, 1, 1)."""
    return grey(x).mean((2, 3), keepdim=True).lerp(x, factor).clamp(0, 1)


def saturated(x: Tensor, factor: Tensor) -> Tensor:
    """Distances of RGB pixels from their grey times a factor (B, 1, 1, 1)."""
    return grey(x).lerp(x, factor).clamp(0, 1)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """RGB pixels whose hue went on by a share (B, 1, 1, 1) of the colour circle; value and saturation stay."""
    (red, green, blue), top = x.unbind(1), x.amax(1)
    chroma = top - x.amin(1)
    divisor = torch.where(chroma == 0, 1, chroma)
    sixths = torch.where(top == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    sixths = torch.where(top == red, (green - blue) / divisor, sixths)
    # A channel is `top` in the third of the circle around its colour, `top - chroma` in the third opposite.
    channels = to_device(torch.tensor([5.0, 3.0, 1.0]), x.device).view(1, 3, 1, 1)
    place = (channels + sixths[:, None] + 6 * turns) % 6
    return top[:, None] - chroma[:, None] * place.minimum(4 - place).clamp(0, 1)


def grey(x: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of RGB pixels, the mean of any other channels."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * to_device(torch.tensor(LUMA), x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


def blurred(x: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian blur of random width for each image."""
    scale, (low, high) = min(x.shape[2:]) / BLUR_SIDE, BLUR
    sigma = scale * (low + (high - low) * torch.rand(len(x), generator=generator))
    return blur(x, to_device(sigma, x.device), reach=math.ceil(3 * high * scale))


def blur(x: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """Gaussian blurs of deviations (B,), cut off after `reach` pixels; borders are mirrored."""
    at = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.softmax(-((at / sigma[:, None]) ** 2) / 2, 1).view(len(x), -1, 1, 1, 1)
    for dim, padding in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        padded, size = F.pad(x, padding, mode="reflect"), x.shape[dim]
        x = sum((kernel[:, k] * padded.narrow(dim, k, size) for k in range(2 * reach + 1)), torch.zeros_like(x))
    return x


def solarised(x: Tensor) -> Tensor:
    """Pixels whose bright values are inverted."""
    return torch.where(x < SOLARISED, x, 1 - x)
