"""The relevance maps of `lrp.py` by zennit, layer by layer, as the released code of ExMap makes them.

For comparison: the same to rounding, several times slower, and only for the networks that zennit's canoniser knows.
zennit is imported where it is used.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...benchmark.backbones import Backbone
from ...benchmark.errors import require
from .lrp import GAMMA, frozen_copy, require_explainable


def by_zennit(model: Backbone, x: Tensor) -> Tensor:
    """Relevance (B, C, H, W) of images (B, C, H, W) for their predicted class; raises `UserError` as below."""
    require_known(model)
    from zennit.core import Composite
    from zennit.rules import Epsilon, Gamma, Norm, Pass
    from zennit.torchvision import ResNetCanonizer

    rules = {
        "Conv2d": lambda: Gamma(GAMMA),
        "Linear": Epsilon,
        "Sum": Norm,
        "AvgPool2d": Norm,
        "AdaptiveAvgPool2d": Norm,
    }
    rules |= {"ReLU": Pass, "BatchNorm2d": Pass}

    def rule(context: object, name: str, layer: nn.Module) -> object:
        return rules.get(type(layer).__name__, lambda: None)()

    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), Composite(rule, [ResNetCanonizer()]).context(frozen_copy(model)) as hooked:
        for layer in hooked.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 0.0  # folded, it still divides by sqrt(1 + eps) otherwise
        logits = hooked(x)
        start = F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
        (maps,) = torch.autograd.grad(logits, x, start)
    return torch.as_tensor(maps)


def require_known(model: Backbone) -> None:
    """Raise `UserError` unless our rules explain the model and none of its layers is of another library's kind."""
    require_explainable(model)
    foreign = [type(layer).__name__ for layer in model.modules() if type(layer).__module__.startswith("timm.")]
    require(not foreign, f"{model.name}: zennit's canoniser does not know timm's {(*foreign, '')[0]}; take lrp")
