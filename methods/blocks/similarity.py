"""The eleven similarities of two heatmaps that eX2L compares, each to be minimised (arXiv 2605.06368).

Maps are non-negative (B, n) with n >= 2 pixels. Values and gradients are finite for equal and for all-zero maps.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

EPS = 1e-8
ROOT_EPS = 1e-12
"""Under a square root, whose slope at 0 is infinite."""

MapNorm = Literal["max", "none", "minmax", "l1"]


def normalise(maps: Tensor, kind: MapNorm) -> Tensor:
    """Each map (B, n) by its own maximum, range or sum; an all-zero map stays zero, for `l1` it becomes uniform.

    The normaliser keeps its gradient: a similarity can then not be lowered by rescaling a map.
    """
    if kind == "none":
        return maps
    if kind == "l1":
        # An epsilon relative to the maximum: beside an absolute one, a map could raise its KL for ever by growing.
        maps = normalise(maps, "max") + EPS
        return maps / maps.sum(1, keepdim=True)
    if kind == "minmax":
        maps = maps - maps.amin(1, keepdim=True)
    return maps / (maps.amax(1, keepdim=True) + EPS)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q) of positive distributions, in nats."""
    return (p * (p / q).log()).sum(1)


def _mae(u: Tensor, v: Tensor) -> Tensor:
    return -(u - v).abs().mean(1)


def _mse(u: Tensor, v: Tensor) -> Tensor:
    return -(u - v).square().mean(1)


def _rmse(u: Tensor, v: Tensor) -> Tensor:
    return -(ROOT_EPS - _mse(u, v)).sqrt()


def _iou(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(1) / ((u + v - u * v).sum(1) + EPS)


def _dice(u: Tensor, v: Tensor) -> Tensor:
    return 2 * (u * v).sum(1) / ((u + v).sum(1) + EPS)


def _reverse_kl(u: Tensor, v: Tensor) -> Tensor:
    """The reference is the second map, the confounder's."""
    return -_kl(normalise(v, "l1"), normalise(u, "l1"))


def _js(u: Tensor, v: Tensor) -> Tensor:
    p, q = normalise(u, "l1"), normalise(v, "l1")
    middle = (p + q) / 2
    return -(_kl(p, middle) + _kl(q, middle)) / 2


def _js_distance(u: Tensor, v: Tensor) -> Tensor:
    return -(ROOT_EPS - _js(u, v).clamp(max=0)).sqrt()  # rounding can turn the sign for nearly equal maps


def _cosine(u: Tensor, v: Tensor) -> Tensor:
    return F.cosine_similarity(normalise(u, "l1"), normalise(v, "l1"))


def _ncc(u: Tensor, v: Tensor) -> Tensor:
    """Pearson correlation; 0 where a map is constant, which shows as a deviation of rounding size."""
    return F.cosine_similarity(u - u.mean(1, keepdim=True), v - v.mean(1, keepdim=True), eps=1e-6)


def _ssim(u: Tensor, v: Tensor) -> Tensor:
    """SSIM over one window, the whole map, with sample moments and a dynamic range of 1."""
    c1, c2 = 0.01**2, 0.03**2
    mean_u, mean_v = u.mean(1), v.mean(1)
    covariance = ((u - mean_u[:, None]) * (v - mean_v[:, None])).sum(1) / (u.shape[1] - 1)
    luminance = (2 * mean_u * mean_v + c1) / (mean_u.square() + mean_v.square() + c1)
    return luminance * (2 * covariance + c2) / (u.var(1) + v.var(1) + c2)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mae": _mae,
    "mse": _mse,
    "rmse": _rmse,
    "iou": _iou,
    "kl": _reverse_kl,
    "js": _js,
    "jsd": _js_distance,
    "cosine": _cosine,
    "ncc": _ncc,
    "ssim": _ssim,
    "dice": _dice,
}
"""Of maps of the label model and the confounder's, (B, n) each, to (B,); differences and divergences are negated."""

DISTRIBUTIONS = ("kl", "js", "jsd", "cosine")
"""These are defined on maps of sum 1 and normalise by themselves."""


def similarity(name: str, u: Tensor, v: Tensor, map_norm: MapNorm = "max") -> Tensor:
    """Similarity `name` (B,) of the label model's maps u and the confounder's v, (B, H, W) or (B, n) each."""
    kind: MapNorm = "none" if name in DISTRIBUTIONS else map_norm
    return SIMILARITIES[name](normalise(u.flatten(1), kind), normalise(v.flatten(1), kind))
