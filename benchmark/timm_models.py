"""Any model of timm that has a spatial map, as `timm:NAME`, split into trunk, neck and head.

timm is imported by the builder, so that importing this module stays quick.
"""

from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import FILE, Backbone, GradCam, Request, TimmTrunk, adopt, pooling, read_state
from .errors import UnknownName, UserError
from .registry import backbone


class _TimmNeck(nn.Module):
    """timm's own way from maps to features, with layers that stay in the trunk's model."""

    def __init__(self, trunk: TimmTrunk) -> None:
        super().__init__()
        self._trunk = (trunk,)  # in a tuple, so that the shared parameters are listed and saved once

    def forward(self, maps: Tensor) -> Tensor:
        (trunk,) = self._trunk
        maps = maps.permute(0, 2, 3, 1) if trunk.channels_last else maps
        features: Tensor = trunk.model.forward_head(maps, pre_logits=True)
        return features.flatten(1)


@backbone("timm", weights=("none", "pretrained", FILE))
@torch.no_grad()
def timm_model(request: Request) -> Backbone:
    """Any timm model with a spatial map, as `timm:NAME`; `pretrained` lets timm fetch its own weights.

    A classifier that is not one linear layer (a 1x1 convolution, two heads) is replaced by a fresh linear one.
    """
    model = _timm_create(request).eval()
    height, width = request.image or model.pretrained_cfg["input_size"][1:]
    try:
        maps = model.forward_features(torch.zeros(1, request.in_channels, height, width))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{request.name} does not take images of {height}x{width} px: {error}") from error
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        raise UserError(f"{request.name} has no spatial map, its features are tokens: take a convolutional model")
    trunk = TimmTrunk(model, maps.shape[3] == model.num_features != maps.shape[1])
    head = model.get_classifier()
    model.reset_classifier(0)
    neck, grad_cam, features = _timm_neck(trunk, maps.permute(0, 3, 1, 2) if trunk.channels_last else maps)
    if not isinstance(head, nn.Linear) or head.in_features != features:
        head = nn.Linear(features, request.num_classes)
    norm = {key: tuple(model.pretrained_cfg[key]) for key in ("mean", "std") if request.weights != "none"}
    return Backbone(request.name, trunk, neck, head, grad_cam=grad_cam, **norm).train()


def _timm_create(request: Request) -> Any:
    """The timm model with `num_classes` outputs and its weights loaded."""
    import timm

    request.check(request.option)
    if not timm.is_model(request.option):
        near = get_close_matches(request.option, timm.list_models(), n=5, cutoff=0.0)
        raise UnknownName("timm model", request.option, near, "Write timm:NAME; `timm.list_models()` has all names.")
    fetch = request.weights == "pretrained"
    try:
        model: Any = timm.create_model(
            request.option, pretrained=fetch, num_classes=request.num_classes, in_chans=request.in_channels
        )
    except Exception as error:  # a thousand builders and several download routes raise whatever they like
        hint = ". Fetch its weights by hand and pass the file's path as weights." if fetch else ""
        raise UserError(f"{request.name} cannot be built: {type(error).__name__}: {error}{hint}") from error
    if request.weights not in ("none", "pretrained"):
        names = model.pretrained_cfg["classifier"]
        classifier = [names] if isinstance(names, str) else names
        adopt(model, read_state(Path(request.weights)), classifier, f"weights {request.weights}")
    return model


def _timm_neck(trunk: TimmTrunk, maps: Tensor) -> tuple[nn.Module, GradCam, int]:
    """Neck for maps of this shape, its kind and the width of its features.

    Pooling, alone or with a LayerNorm, is recognised by the layers that run and by what comes out; such a neck is
    replaced by our own, which then holds the norm's parameters.
    """
    model, neck = trunk.model, _TimmNeck(trunk)
    # At least 2x2 pixels: on a single one, every order of pooling and other layers looks alike.
    size = (2, maps.shape[1], *(max(side, 2) for side in maps.shape[2:]))
    maps = torch.randn(size, generator=torch.Generator().manual_seed(0))
    used: list[nn.Module] = []
    stateful = [m for m in model.modules() if any(True for _ in chain(m.parameters(False), m.buffers(False)))]
    hooks = [module.register_forward_hook(lambda module, *_: used.append(module)) for module in stateful]
    features = neck(maps)
    for hook in hooks:
        hook.remove()
    norm = next((layer for layer in used if isinstance(layer, nn.LayerNorm) and layer.weight is not None), None)
    if any(layer is not norm for layer in used) or features.shape != maps.shape[:2]:
        return neck, "head", features.shape[1]
    own = pooling(norm)
    model.train()  # dropout shows in training only; no layer here keeps statistics
    if not all(torch.allclose(out, own(maps), atol=1e-5) for out in (features, neck(maps))):
        return neck, "head", features.shape[1]
    if norm is not None:  # it belongs to the neck alone now
        model.set_submodule(next(name for name, module in model.named_modules() if module is norm), nn.Identity())
    return own, "closed" if norm is None else "layernorm", features.shape[1]
