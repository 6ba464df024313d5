"""Class activation maps that a loss can use: no backward pass through the trunk, and weights without a graph.

Grad-CAM is `ReLU(sum_k alpha_k A_k)`, with alpha_k the mean over pixels of d score / d A_k (Selvaraju et al., ICCV
2017); XGrad-CAM weighs the pixels of that mean by A_k (Fu et al., BMVC 2020). Here `maps` A (B, C, H, W) are what a
backbone's trunk gives, and `logits` (B, K) are `head(neck(maps))`. Only where `grad_cam` is `head` need the logits a
graph down to the maps. All results are in float32, or wider where the maps are.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...benchmark.backbones import Backbone
from ...benchmark.spec import Card
from .precision import wide


def target_direction(y: Tensor, num_classes: int) -> Tensor:
    """The explained score of targets y (B,) as `direction` (B, K) over logits: z_y, or z_y - z_other for two classes.

    The margin is what the single logit of a binary classifier gives, so that the two classes' maps of one image do not
    overlap (eX2L).
    """
    one_hot = F.one_hot(y, num_classes).float()
    return 2 * one_hot - 1 if num_classes == 2 else one_hot


def cam_weights(model: Backbone, maps: Tensor, logits: Tensor, direction: Tensor) -> Tensor:
    """Grad-CAM weights alpha (B, C), detached, of the scores `sum_k direction_bk logits_bk`."""
    if model.grad_cam == "head":
        return _gradient(maps, logits, direction).mean((2, 3))
    pixels = maps.shape[2] * maps.shape[3]
    with torch.no_grad(), torch.autocast(maps.device.type, enabled=False):
        row = direction.to(model.head.weight.dtype) @ model.head.weight
        if model.grad_cam == "closed":
            return row / pixels
        norm = next(module for module in model.neck.modules() if isinstance(module, nn.LayerNorm))
        pooled = wide(maps).mean((2, 3))
        sigma = (pooled.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
        standard = (pooled - pooled.mean(1, keepdim=True)) / sigma
        row = row * norm.weight
        # The backward pass of LayerNorm, which makes alpha different for every sample.
        return (row - row.mean(1, keepdim=True) - standard * (row * standard).mean(1, keepdim=True)) / (pixels * sigma)


def grad_cam(model: Backbone, maps: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Grad-CAM maps (B, H, W) of targets y (B,), differentiable through `maps` but not through their weights."""
    return _weighted_sum(cam_weights(model, maps, logits, target_direction(y, model.num_classes)), maps).relu()


def xgrad_cam(model: Backbone, maps: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """XGrad-CAM maps (B, H, W) of logit y (B,), detached and without a ReLU, so that every pixel has a rank."""
    one_hot, detached = F.one_hot(y, model.num_classes), maps.detach()
    if model.grad_cam != "head":  # then the gradient is the same at every pixel, and both kinds of CAM agree
        return _weighted_sum(cam_weights(model, maps, logits, one_hot), detached)
    gradient, total = _gradient(maps, logits, one_hot), wide(detached).sum((2, 3))
    return _weighted_sum((gradient * detached).sum((2, 3)) / (total + 1e-7), detached)


def predicted_cam(model: Backbone, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, d) of images x, and the XGrad-CAM maps (B, h, w) of the classes that `model` predicts; detached.

    One forward pass without a graph of the trunk.
    """
    with torch.no_grad():
        maps = model.trunk(x)
    features = model.neck(maps.requires_grad_(model.grad_cam == "head"))
    logits = model.head(features)
    return features.detach(), xgrad_cam(model, maps, logits, logits.argmax(1))


@torch.no_grad()
def map_size(model: Backbone, card: Card) -> tuple[int, int]:
    """Rows and columns of the maps of a dataset's images."""
    height, width, channels = card.image
    rows, columns = model.eval().trunk(torch.zeros(1, channels, height, width)).shape[2:]
    return rows, columns


def _gradient(maps: Tensor, logits: Tensor, direction: Tensor) -> Tensor:
    """d score / d maps (B, C, H, W) by a backward pass that ends at the maps and leaves every `.grad` alone.

    It goes through the graph of `logits` itself, hence through the dropout masks of that very forward pass; whether
    gradients are enabled here does not matter.
    """
    (gradient,) = torch.autograd.grad(logits, maps, direction.to(logits), retain_graph=True)
    return wide(gradient)


def _weighted_sum(weights: Tensor, maps: Tensor) -> Tensor:
    """`sum_k weights_k maps_k` (B, H, W)."""
    with torch.autocast(maps.device.type, enabled=False):
        return torch.einsum("bc,bchw->bhw", weights, wide(maps))
