"""Heatmaps of a classifier's predictions, one function for all explainers.

Every map has the height and width of its image, is signed, and is not scaled. `lrp` (see `lrp.py`; `lrp-zennit` is the
same by zennit, slower) and `ig`, integrated gradients (Sundararajan et al., ICML 2017), give a value to every pixel and
channel. The class activation maps have one
channel: they are those of pytorch-grad-cam on the trunk's last map for the logit of the predicted class, before its
ReLU, so that evidence against the class is not lost, and resized bilinearly. `gradcam++` and `layercam` rectify
gradients by definition. `ablationcam` (Desai and Ramaswamy, WACV 2020) is our own: the library's puts channels to
-1e7 where maps can be negative, instead of to zero as published, and draws progress bars.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...benchmark.backbones import Backbone
from ...benchmark.errors import UserError, require
from .lrp import explainer as lrp
from .lrp import frozen_copy, require_explainable
from .lrp_zennit import by_zennit, require_known

Explainer = Literal[
    "lrp", "lrp-zennit", "gradcam", "gradcam++", "xgradcam", "layercam", "hirescam", "ablationcam", "ig"
]
LIBRARY = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "hirescam": "HiResCAM",
}
"""Classes of pytorch-grad-cam."""
STEPS = 32
"""Points on the path of integrated gradients."""


def maps(explainer: Explainer, model: Backbone, x: Tensor) -> Tensor:
    """Heatmaps (B, C, H, W), or (B, 1, H, W) of a class activation map, of images (B, C, H, W); float32.

    The model is left as it was. Raises `UserError` where `require_maps` does.
    """
    return prepared(explainer, model, x[:1])(x)


def prepared(explainer: Explainer, model: Backbone, example: Tensor) -> Callable[[Tensor], Tensor]:
    """`maps` for many batches of a model that does not change meanwhile, given one of the images (1, C, H, W)."""
    require_maps(explainer, model, example)
    if explainer == "lrp":
        return lrp(model, example)
    plain = frozen_copy(model)
    if explainer == "lrp-zennit":
        return partial(by_zennit, plain)
    if explainer == "ig":
        return partial(integrated_gradients, plain)
    combine = ablation if explainer == "ablationcam" else partial(_by_library, _library(explainer, plain))
    return partial(_activation_maps, plain, combine)


def require_maps(explainer: Explainer, model: Backbone, example: Tensor) -> None:
    """Raise `UserError` unless the explainer can tell pixels of images like `example` (1, C, H, W) apart."""
    if explainer == "lrp":
        require_explainable(model)
    elif explainer == "lrp-zennit":
        require_known(model)
    elif explainer != "ig":
        with torch.no_grad():
            pixels = frozen_copy(model).trunk.forward(example).shape[2:].numel()  # past the hooks, which count passes
        one = f"{model.name} has maps of one pixel on these images, so {explainer} shows nothing: take lrp or ig"
        require(pixels > 1, one)


def integrated_gradients(model: Backbone, x: Tensor, steps: int = STEPS) -> Tensor:
    """`x * mean of d logit / d x` on the line from zero, the mean colour, to the images (B, C, H, W); midpoint rule.

    The logit is that of the class predicted for the image itself. Sums over an image are the logit minus that of zero.
    """
    with torch.no_grad():
        target = model(x).argmax(1, keepdim=True)
    total = torch.zeros_like(x)
    for step in range(steps):
        point = (x.detach() * ((step + 0.5) / steps)).requires_grad_()
        with torch.enable_grad():
            score = model(point).gather(1, target).sum()
        total += torch.autograd.grad(score, point)[0]
    return (x.detach() * total / steps).float()


Combine = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""From the network behind the maps, the maps and the gradients to heat (B, h, w)."""


def _activation_maps(model: Backbone, combine: Combine, x: Tensor) -> Tensor:
    """Class activation maps (B, 1, H, W): one pass through the trunk, all else behind it."""
    with torch.no_grad():
        activations = model.trunk(x)

    def behind(values: Tensor) -> Tensor:
        logits: Tensor = model.head(model.neck(values))
        return logits

    leaf = activations.requires_grad_()
    with torch.enable_grad():
        logits = behind(leaf)
        score = logits.max(1).values.sum()
    (gradients,) = torch.autograd.grad(score, leaf)
    with torch.no_grad():
        heat = combine(behind, leaf.detach(), gradients)
    return F.interpolate(heat[:, None].float(), x.shape[2:], mode="bilinear", align_corners=False)


def ablation(behind: Callable[[Tensor], Tensor], maps: Tensor, gradients: Tensor) -> Tensor:
    """Channels weighted by `(z - z_k) / |z|`, with z_k the predicted class's logit z without channel k.

    As published, but for the sign of z, which would turn the map of a negative logit inside out.
    """
    logit, target = behind(maps).max(1, keepdim=True)
    lost = torch.empty(maps.shape[:2]).to(maps)
    for k in range(maps.shape[1]):
        without = maps.clone()
        without[:, k] = 0
        lost[:, k : k + 1] = logit - behind(without).gather(1, target)
    return torch.einsum("bc,bchw->bhw", lost / logit.abs(), maps)


def _by_library(cam: Any, behind: Callable[[Tensor], Tensor], maps: Tensor, gradients: Tensor) -> Tensor:
    """Before the library rectifies, scales and resizes it."""
    arrays = (part.numpy(force=True) for part in (maps, gradients))
    return torch.from_numpy(cam.get_cam_image(None, None, None, *arrays, False)).to(maps)


def _library(explainer: str, model: Backbone) -> Any:
    """An object of the library for this model, imported here: it needs OpenCV and matplotlib."""
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise UserError(f"{explainer} needs pytorch-grad-cam, which cannot be imported: {error}") from error
    return getattr(pytorch_grad_cam, LIBRARY[explainer])(model, [nn.Identity()])
