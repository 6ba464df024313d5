"""Relevance maps by layer-wise relevance propagation (LRP), with the rules that ExMap uses.

Chakraborty et al., ExMap: Leveraging Explainability Heatmaps for Unsupervised Group Robustness to Spurious
Correlations, CVPR 2024: epsilon rule in linear layers, generalised gamma rule in convolutions. zennit, which supplies
canonisation and hooks, is imported where it is used: it imports all of torchvision.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...benchmark.backbones import Backbone
from ...benchmark.errors import UserError

GAMMA = 4.0
"""Of the released code; the paper names no value."""
EPSILON = 1e-6
"""Keeps denominators away from zero; small against the relevances, so the maps barely depend on it."""
EXPLAINABLE = "resnet18, resnet50, resnet18:3x3, resnet50:3x3, alexnet, tiny_cnn or mlp3x100"


def explain(model: Backbone, x: Tensor) -> Tensor:
    """Relevance of every pixel and channel of images (B, C, H, W) for their predicted class: the same shape, float32.

    The start relevance is 1 at the predicted logit, whatever its value. The model is left as it was, training mode and
    gradients included. Raises `UserError` where `require_explainable` does.
    """
    require_explainable(model)
    with canonical(model) as twin, torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_()
        logits = twin(x)
        start = F.one_hot(logits.argmax(1), twin.num_classes).to(logits)
        (maps,) = torch.autograd.grad(logits, x, start)
    return maps.float()


@contextmanager
def canonical(model: Backbone) -> Iterator[Backbone]:
    """A copy of the model in evaluation mode whose gradient is the relevance, linear in the start relevance.

    BatchNorm is folded into the convolution before it and residual additions are modules of their own.
    """
    # A copy, not the model itself with everything undone afterwards: nothing can be left behind by an error.
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    vars(twin.trunk).pop("forward", None)  # a compiled forward would run the layers of the original, without rules
    with _rules().context(twin):
        yield twin


def gamma_rule(layer: nn.Conv2d, x: Tensor, relevance: Tensor, gamma: float = GAMMA) -> Tensor:
    """Relevance of a convolution's input x (B, C, H, W), given that of its output; inputs of either sign.

    With contributions `z_ij = x_i w_ij`, `P_j = sum_i z_ij+ + b_j+` and `N_j = sum_i z_ij- + b_j-`:
    `R_i = sum_j (a_j z_ij+ + c_j z_ij-) / (a_j P_j + c_j N_j) R_j`, where `1 + gamma` multiplies the stronger sign
    (a if P_j >= -N_j, else c) and 1 the other. The same as zennit's `Gamma`, which convolves ten times instead of four
    also where no input is negative: ResNet-18 takes a third of the time.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        bias = torch.zeros_like(layer.weight[:, 0, 0, 0]) if layer.bias is None else layer.bias
        positive, negative = (part.clamp(min=0) for part in (x, -x))
        excite, inhibit = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        p = layer._conv_forward(positive, excite, bias.clamp(min=0))
        n = layer._conv_forward(positive, inhibit, bias.clamp(max=0))
        if negative.any():  # behind a ReLU never
            p = p - layer._conv_forward(negative, inhibit, None)
            n = n - layer._conv_forward(negative, excite, None)
    strong = p >= -n
    a, c = 1 + gamma * strong.to(p), 1 + gamma * (~strong).to(p)
    total = (a * p + c * n).detach()
    share = relevance / (total + EPSILON * torch.where(total < 0, -1.0, 1.0).to(total))
    (gradient,) = torch.autograd.grad([p, n], x, [a * share, c * share])
    return (x * gradient).detach()


def _rules() -> Any:
    """zennit's composite: which rule each type of layer has. Layers that are not listed pass their plain gradient."""
    from zennit.composites import LayerMapComposite
    from zennit.core import Hook
    from zennit.layer import Sum
    from zennit.rules import Epsilon, Norm, Pass
    from zennit.torchvision import ResNetCanonizer

    class Gamma(Hook):  # type: ignore[misc]
        """`gamma_rule` in place of a convolution's gradient."""

        def forward(self, module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
            (self.stored_tensors["input"],) = inputs

        def backward(self, module: nn.Conv2d, grad_input: object, grad_output: tuple[Tensor]) -> tuple[Tensor]:
            return (gamma_rule(module, self.stored_tensors["input"], grad_output[0]),)

    rules = [
        ((nn.Conv2d,), Gamma()),
        ((nn.Linear,), Epsilon(EPSILON)),
        ((Sum, nn.AvgPool2d, nn.AdaptiveAvgPool2d), Norm(EPSILON)),
        ((nn.ReLU, nn.BatchNorm2d), Pass()),
    ]
    return LayerMapComposite(rules, canonizers=[ResNetCanonizer()])


def require_explainable(model: Backbone) -> None:
    """Raise `UserError` unless every layer has a rule or needs none, and every BatchNorm is folded."""
    # Layers before the blocks that hold them: they say more about what is in the way.
    refused = sorted(_refused(model), key=lambda found: len(list(found[1].children())) > 0)
    for name, layer in refused[:1]:
        kind = type(layer).__name__
        raise UserError(f"{model.name} cannot be explained: no rule for its layer {name} ({kind}); take {EXPLAINABLE}")


def _refused(model: Backbone) -> Iterator[tuple[str, nn.Module]]:
    """Modules, by name, that are of no known type, and BatchNorms that do not directly follow their convolution.

    Types are compared exactly: a subclass may compute something else.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck

    blocks = {Backbone, nn.Sequential, BasicBlock, Bottleneck}
    pools = {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d}
    layers = {nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout}
    previous: nn.Module = model
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            foldable = layer.affine and layer.track_running_stats and type(previous) is nn.Conv2d
            if type(layer) is not nn.BatchNorm2d or not foldable:
                yield name, layer
        elif type(layer) not in blocks | pools | layers:
            yield name, layer
        previous = layer
