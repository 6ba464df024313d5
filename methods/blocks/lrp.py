"""Relevance maps by layer-wise relevance propagation (LRP), with the rules that ExMap uses.

Chakraborty et al., ExMap: Leveraging Explainability Heatmaps for Unsupervised Group Robustness to Spurious
Correlations, CVPR 2024: generalised gamma rule in convolutions, epsilon rule in linear layers, averages and residual
sums, everything to the largest pixel in max-pooling, and no change in activations.

A network is read as a list of steps in the order in which they run. Each computes what its layer does, and its gradient
is the layer's rule. BatchNorm is folded into the convolution before it. Nothing in the network itself is touched.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ...benchmark.backbones import Backbone
from ...benchmark.errors import UserError

GAMMA = 4.0
"""Of the released code; the paper names no value."""
EPSILON = 1e-6
"""Keeps denominators away from zero; small against the relevances, so the maps barely depend on it."""
NONE = 1e-30
"""An epsilon that only keeps 0 / 0 away."""
EXPLAINABLE = (
    "resnet18, resnet50, resnet18:3x3, resnet50:3x3, alexnet, timm:resnet18, timm:resnet50, "
    "timm:tf_efficientnet_lite0, tiny_cnn or mlp3x100"
)

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Stride, padding, dilation and groups of a convolution."""
Step = Callable[[Tensor], Tensor]
Named = tuple[str, nn.Module]


@dataclass(frozen=True)
class Rules:
    """`gamma` of convolutions, `epsilon` of every denominator; without `biases` relevance is conserved."""

    gamma: float = GAMMA
    epsilon: float = EPSILON
    biases: bool = True


def explain(model: Backbone, x: Tensor) -> Tensor:
    """Relevance of every pixel and channel of images (B, C, H, W) for their predicted class: the same shape, float32.

    The start relevance is 1 at the predicted logit, whatever its value. The model is left as it was, training mode and
    gradients included. Raises `UserError` where `explainer` does.
    """
    return explainer(model, x[:1])(x)


def explainer(model: Backbone, example: Tensor) -> Step:
    """`explain` for many batches: what depends on the model alone is done once, so it must not change meanwhile.

    Raises `UserError` where `require_explainable` does, and where the steps do not give the logits of `example`
    (1, C, H, W): another version of a library may compute a block in another way.
    """
    (trunk, rest), plain = _halves(model, Rules()), frozen_copy(model)
    with torch.no_grad(), torch.autocast(example.device.type, enabled=False):
        wanted = plain.head(plain.neck(plain.trunk.forward(example)))  # past the hooks, which count passes
        error = (rest(trunk(example)) - wanted).abs().max()
    if not error <= 0.01 * wanted.abs().max():  # NaN is refused too
        raise UserError(
            f"{model.name} cannot be explained: its layers, in the known order, give other logits; take {EXPLAINABLE}"
        )
    # A shallow copy has the hooks of the original, which count the passes, but a forward of its own.
    counted = copy.copy(model.trunk)
    setattr(counted, "forward", trunk)  # noqa: B010
    return partial(_relevance, _chain([counted, rest]))


def conservation(model: Backbone, x: Tensor) -> float:
    """Largest |sum of relevance - 1| over images (B, C, H, W), in double precision, with all biases set to zero.

    Only then is relevance conserved: a bias takes its share of it, and so does epsilon, which is put to zero here.
    """
    network = canonical(copy.deepcopy(model).double(), Rules(epsilon=NONE, biases=False))
    return float((_propagated(network, x.double()).sum((1, 2, 3)) - 1).abs().max())


def canonical(model: Backbone, rules: Rules | None = None) -> Step:
    """The function `images (B, C, H, W) -> logits (B, K)` of the model in evaluation mode, whose gradient is relevance.

    The gradient is linear in the start relevance. Raises `UserError` where `require_explainable` does.
    """
    return _chain([*_halves(model, rules or Rules())])


def _halves(model: Backbone, rules: Rules) -> tuple[Step, Step]:
    """The same as two functions: the trunk, and what follows it."""
    trunk = _steps(model, _layers(model.trunk, "trunk"), rules)
    rest = _steps(model, [*_layers(model.neck, "neck"), ("head", model.head)], rules)
    return _chain(trunk), _chain(rest)


def frozen_copy(model: Backbone) -> Backbone:
    """The model in evaluation mode, without gradients of its parameters."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    vars(twin.trunk).pop("forward", None)  # a compiled forward would run the layers of the original
    return twin


def require_explainable(model: Backbone) -> None:
    """Raise `UserError` unless every layer has a rule or needs none, and every BatchNorm can be folded."""
    canonical(model)


def _relevance(network: Step, x: Tensor) -> Tensor:
    return _propagated(network, x).float()


def _propagated(network: Step, x: Tensor) -> Tensor:
    """Relevance of images, given a canonical network."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_()
        logits = network(x)
        start = F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
        (maps,) = torch.autograd.grad(logits, x, start)
    return maps


# --------------------------------------------------------------------------------------------------------------- rules


class GammaRule(torch.autograd.Function):
    """Relevance through `convolve(x, weight, bias)`, of inputs of either sign; the same as zennit's `Gamma`.

    With contributions `z_ij = x_i w_ij`, `P_j = sum_i z_ij+ + b_j+` and `N_j = sum_i z_ij- + b_j-`:
    `R_i = sum_j (a_j z_ij+ + c_j z_ij-) / (a_j P_j + c_j N_j) R_j`, where `1 + gamma` multiplies the stronger sign
    (a if P_j >= -N_j, else c) and 1 the other.

    As z+ and z- are halves of |z| + z and z - |z|, all follows from the layer's own output `z_j = P_j + N_j` and that
    of absolute values, `A_j = P_j - N_j`: with s_j = sign(z_j) and r = gamma / (2 + gamma), up to a common factor,
    `R_i = sum_j (z_ij + r s_j |z_ij|) / (s_j (|z_j| + r A_j)) R_j`. That is two convolutions each way, where zennit
    takes six.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, rules: Rules) -> Tensor:
        """The convolution."""
        z = F.conv2d(x, weight, bias, *geometry)
        amount = F.conv2d(x.abs(), weight.abs(), None if bias is None else bias.abs(), *geometry)
        ctx.ratio = rules.gamma / (2 + rules.gamma)
        total = z.abs().add_(amount, alpha=ctx.ratio).add_(rules.epsilon / (1 + rules.gamma / 2))
        ctx.save_for_backward(x, torch.where(z < 0, -total, total))
        ctx.weight, ctx.geometry = weight, geometry
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        """The rule."""
        x, total = ctx.saved_tensors
        share = relevance / total
        back: Any = partial(conv2d_input, x.shape)
        of_x = back(ctx.weight, share, *ctx.geometry)
        of_size = back(ctx.weight.abs(), share.mul_(total.sign()).mul_(ctx.ratio), *ctx.geometry)
        return x * of_x + x.abs() * of_size, None, None, None, None


class EpsilonRule(torch.autograd.Function):
    """Relevance through a linear map, in proportion to what each input contributes: `R_i = sum_j z_ij / z_j R_j`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Step, epsilon: float) -> Tensor:
        """The map."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z = linear(x)
        ctx.graph, ctx.epsilon = (x, z), epsilon
        return z.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        """The rule."""
        x, z = ctx.graph
        share = relevance / (z + torch.where(z < 0, -ctx.epsilon, ctx.epsilon))
        return x.detach() * torch.autograd.grad(z, x, share)[0], None, None


class PassRule(torch.autograd.Function):
    """Relevance through an activation, unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Step) -> Tensor:
        """The activation."""
        return activation(x)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor, None]:
        """The rule."""
        return relevance, None


# -------------------------------------------------------------------------------------------------- from model to steps

# By exact type, here and below: a subclass may compute something else.
POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
ROUTES = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten)
ACTIVATIONS: dict[type[nn.Module], Step] = {nn.ReLU: F.relu, nn.ReLU6: F.relu6}
NOTHING = (nn.Identity, nn.Dropout)
SAME = "timm.layers.conv2d_same.Conv2dSame"
NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"
_MBCONV = "timm.models._efficientnet_blocks."

PARTS = {
    f"{Backbone.__module__}._TimmTrunk": "model",
    "timm.models.resnet.ResNet": "conv1 bn1 act1 maxpool layer1 layer2 layer3 layer4",
    "timm.models.efficientnet.EfficientNet": "conv_stem bn1 blocks conv_head bn2",
}
"""What runs in a module, in this order and nothing else."""
BLOCKS = {
    "torchvision.models.resnet.BasicBlock": ("conv1 bn1 relu conv2 bn2", "relu"),
    "torchvision.models.resnet.Bottleneck": ("conv1 bn1 relu conv2 bn2 relu conv3 bn3", "relu"),
    "timm.models.resnet.BasicBlock": ("conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path", "act2"),
    "timm.models.resnet.Bottleneck": ("conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path", "act3"),
    f"{_MBCONV}DepthwiseSeparableConv": ("conv_s2d bn_s2d conv_dw bn1 aa se conv_pw bn2 drop_path", ""),
    f"{_MBCONV}InvertedResidual": ("conv_s2d bn_s2d conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3 drop_path", ""),
}
"""What runs in the branch of a residual block, and its activation after the sum. An absent part is None."""


def _kind(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _layers(module: nn.Module, name: str) -> Iterator[Named]:
    """Layers by name, in the order in which they run; residual blocks and what is not known stay whole."""
    parts = [part for part, _ in module.named_children()] if type(module) is nn.Sequential else []
    parts = PARTS[_kind(module)].split() if _kind(module) in PARTS else parts
    if not parts and type(module) is not nn.Sequential:
        yield name, module
    if _kind(module) == NORM_ACT:
        parts = ["drop", "act"]
    yield from _parts(module, name, parts)


def _parts(module: nn.Module, name: str, parts: Iterable[str]) -> Iterator[Named]:
    for part in parts:
        child = getattr(module, part, None)
        if child is not None:
            yield from _layers(child, f"{name}.{part}")


@dataclass
class _Convolution:
    """A convolution, with the norms after it folded in."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    rules: Rules

    def fold(self, norm: Any) -> None:
        """Take over the norm's statistics."""
        mean, var, eps = norm.running_mean, norm.running_var, norm.eps
        fused = fuse_conv_bn_weights(self.weight, self.bias, mean, var, eps, norm.weight, norm.bias)
        self.weight, self.bias = (part.detach() for part in fused)

    def __call__(self, x: Tensor) -> Tensor:
        bias = self.bias if self.rules.biases else None
        return cast(Tensor, GammaRule.apply(x, self.weight, bias, self.geometry, self.rules))


def _steps(model: Backbone, layers: Iterable[Named], rules: Rules) -> list[Step]:
    """Steps that compute what layers of a model do, with their rules as gradients."""
    steps: list[Step] = []
    for name, layer in layers:
        folding = type(layer) is nn.BatchNorm2d or _kind(layer) == NORM_ACT
        if folding and layer.track_running_stats and steps and isinstance(steps[-1], _Convolution):
            steps[-1].fold(layer)
        elif _kind(layer) in BLOCKS:
            steps += _residual(model, name, layer, rules)
        elif _kind(layer) == SAME:
            steps += _same(cast(nn.Conv2d, layer), rules)
        elif type(layer) not in NOTHING:
            steps.append(_step(model, name, layer, rules))
    return steps


def _residual(model: Backbone, name: str, block: nn.Module, rules: Rules) -> Iterator[Step]:
    """A residual block: branch and shortcut, whose sum has a rule, and its activation."""
    branch, after = BLOCKS[_kind(block)]
    inner = _chain(_steps(model, _parts(block, name, branch.split()), rules))
    if getattr(block, "has_skip", True):
        shortcut = _chain(_steps(model, _parts(block, name, ["downsample"]), rules))
        yield lambda x: _epsilon(partial(torch.sum, dim=0), rules, torch.stack([inner(x), shortcut(x)]))
    else:
        yield inner
    yield from _steps(model, _parts(block, name, after.split()), rules)


def _same(layer: nn.Conv2d, rules: Rules) -> list[Step]:
    """timm's convolution that pads as TensorFlow does: more at the bottom and at the right."""
    from timm.layers.padding import pad_same

    def pad(x: Tensor) -> Tensor:
        padded: Tensor = pad_same(x, list(layer.kernel_size), list(layer.stride), list(layer.dilation))
        return padded

    return [pad, _convolution(layer, (0, 0), rules)]


def _step(model: Backbone, name: str, layer: Any, rules: Rules) -> Step:
    """The step of a single layer; raises `UserError` if it has none."""
    kind = type(layer)
    if kind is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return _convolution(layer, layer.padding, rules)
    if kind is nn.Linear:
        bias = _detached(layer.bias) if rules.biases else None
        return partial(_epsilon, partial(F.linear, weight=layer.weight.detach(), bias=bias), rules)
    if kind in POOLS:
        return partial(_epsilon, layer, rules)
    if kind in ACTIVATIONS:
        return partial(_pass, ACTIVATIONS[kind])
    if kind in ROUTES:
        return cast(Step, layer)
    raise _refusal(model, name, layer)


def _refusal(model: Backbone, name: str, layer: nn.Module) -> UserError:
    """What to say about a layer without a rule: of those inside it, the first says more about what is in the way."""
    known = {nn.Conv2d, nn.Linear, nn.Sequential, *POOLS, *ROUTES, *ACTIVATIONS, *NOTHING}
    inner = ((part, found) for part, found in layer.named_modules() if not any(True for _ in found.children()))
    part, found = next(((p, f) for p, f in inner if type(f) not in known and p), ("", layer))
    where = f"{name}.{part}" if part else name
    kind = type(found).__name__
    return UserError(f"{model.name} cannot be explained: no rule for its layer {where} ({kind}); take {EXPLAINABLE}")


def _convolution(layer: nn.Conv2d, padding: tuple[int, ...], rules: Rules) -> _Convolution:
    geometry = layer.stride, padding, layer.dilation, layer.groups
    return _Convolution(layer.weight.detach(), _detached(layer.bias), geometry, rules)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _epsilon(linear: Step, rules: Rules, x: Tensor) -> Tensor:
    return cast(Tensor, EpsilonRule.apply(x, linear, rules.epsilon))


def _pass(activation: Step, x: Tensor) -> Tensor:
    return cast(Tensor, PassRule.apply(x, activation))


def _chain(steps: list[Step]) -> Step:
    """One after the other."""

    def run(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return run
