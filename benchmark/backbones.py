"""The registered image models, beside those of plugins: small ones of our own and torchvision's; timm's are in
`timm_models`.

A builder is a function from a `Request` to a `Backbone`, registered with `@backbone(name, weights=...)`. It draws
initial weights from torch's global generator, which the caller seeds. torchvision and timm are imported by the builders
that need them, so that importing this module stays quick.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import timm_models
from .backbone import FILE, Backbone, GradCam, Request, adopt, normalization, pooled, pooling, read_state
from .errors import UserError
from .registry import BACKBONES, backbone
from .spec import Card

__all__ = ["BUILT_IN", "FILE", "Backbone", "GradCam", "Request", "build_backbone", "check_backbone", "normalization"]

BUILT_IN = (__name__, timm_models.__name__)
"""Modules of the builders that are no plugin's: their code belongs to the engine's fingerprint."""


def build_backbone(
    name: str, *, num_classes: int, in_channels: int = 3, image: tuple[int, int] | None = None, weights: str = "none"
) -> Backbone:
    """Build `FAMILY[:OPTION]` with initial weights from torch's global generator, or with pretrained `weights`.

    Raises `UnknownName` for a family that is not registered, `UserError` for an option, weights, an image size or
    channels that the family does not take, `CorruptFile` for a weights file that is damaged or of another model.
    """
    family, colon, option = name.partition(":")
    entry = BACKBONES[family]
    if colon and not option:
        raise UserError(f"backbone {name!r} ends in a colon: write {family!r}, or {name}OPTION")
    path = Path(weights)
    may_be_file = FILE in entry.weights and (path.is_file() or len(path.parts) > 1 or path.suffix != "")
    if (weights not in entry.weights or weights == FILE) and not may_be_file:
        offer = ["the path of a weights file" if item == FILE else item for item in entry.weights]
        raise UserError(f"{family} has no weights {weights!r}; give {' or '.join(offer)}")
    built: Backbone = entry.build(Request(name, family, option, num_classes, in_channels, image, weights))
    return built


def check_backbone(name: str, card: Card, weights: str) -> Backbone:
    """Raise what `build_backbone` would for this dataset, without fetching anything or touching any generator.

    Returns a model of the same layers.
    """
    height, width, channels = card.image
    official = weights in BACKBONES[name.partition(":")[0]].weights and weights not in ("none", FILE)
    if official and channels != 3:
        raise UserError(f"{name}: weights {weights!r} are for images with 3 channels, these have {channels}")
    # A suite asks for the same model a hundred times; a weights file is read anew, since it may change.
    named = official or weights == "none"
    build = BACKBONES[name.partition(":")[0]].build
    arguments = (name, len(card.classes), channels, (height, width), "none" if official else weights)
    return _checked(build, *arguments) if named else _checked.__wrapped__(build, *arguments)


@lru_cache(maxsize=4)
def _checked(
    build: Callable[..., Any], name: str, num_classes: int, channels: int, image: tuple[int, int], weights: str
) -> Backbone:
    """A model that is built once per process; `build` is there to tell registries apart."""
    with torch.random.fork_rng(devices=[]):
        return build_backbone(name, num_classes=num_classes, in_channels=channels, image=image, weights=weights)


@backbone("tiny_cnn")
def tiny_cnn(request: Request) -> Backbone:
    """Four 3x3 convolutions for 32 px images, 64x4x4 target maps; trains in seconds on two cores."""
    request.check()
    layers: list[nn.Module] = []
    # Halving at once costs no accuracy on small digits, and a step takes 11 ms instead of 26 (batch 128, 2 cores).
    for width, channels, stride in ((request.in_channels, 16, 2), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(width, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return pooled(request, layers, 64)


@backbone("mnist_cnn")
def mnist_cnn(request: Request) -> Backbone:
    """DomainBed's MNIST_CNN, 128x14x14 target maps at 28 px; `mnist_cnn:quarter` has a quarter of the width."""
    request.check("quarter")
    half, full = (16, 32) if request.option else (64, 128)
    layers: list[nn.Module] = []
    for width, channels, stride in ((request.in_channels, half, 1), (half, full, 2), (full, full, 1), (full, full, 1)):
        # ReLU before the norm, as in DomainBed: the maps can be negative.
        layers += [nn.Conv2d(width, channels, 3, stride, 1), nn.ReLU(), nn.GroupNorm(8, channels)]
    return pooled(request, layers, full)


@backbone("mlp3x100")
def mlp3x100(request: Request) -> Backbone:
    """Three hidden layers of 100 ReLU units on flattened pixels, the MLP of CM-10; its maps have one pixel."""
    request.check()
    if request.image is None:
        raise UserError(f"{request.name} needs the image size: its first layer has a weight for every pixel")
    layers: list[nn.Module] = [nn.Flatten(1)]
    for width in (request.in_channels * request.image[0] * request.image[1], 100, 100):
        layers += [nn.Linear(width, 100), nn.ReLU()]
    return pooled(request, [*layers, nn.Unflatten(1, (100, 1, 1))], 100)


@backbone("identity")
def identity(request: Request) -> Backbone:
    """A linear classifier on precomputed embeddings (B, d) or (B, d, 1, 1), where d is `in_channels`."""
    request.check()
    if request.image not in (None, (1, 1)):
        raise UserError("identity takes precomputed embeddings, not images: take another backbone, such as resnet18")
    return pooled(request, [nn.Flatten(1), nn.Unflatten(1, (request.in_channels, 1, 1))], request.in_channels)


# --------------------------------------------------------------------------------------------------- torchvision


def _torchvision(request: Request) -> tuple[Any, dict[str, tuple[float, ...]]]:
    """torchvision's model with `num_classes` outputs and its weights loaded, and the `mean` and `std` these want."""
    from torchvision import models

    model = models.get_model(request.family, weights=None, num_classes=request.num_classes)
    if request.weights == "none":
        return model, {}
    known: Any = models.get_model_weights(request.family)
    official = known.__members__.get(request.weights.upper(), known.DEFAULT)
    if request.weights == official.name.lower():
        try:
            state = official.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
        except Exception as error:  # network, disk, hash and pickle errors share no base, and all end the same way
            failed = f"the weights {official.url} cannot be fetched ({type(error).__name__})"
            raise UserError(f"{failed}. Fetch the file by hand and pass its path as weights.") from error
    else:
        state = read_state(Path(request.weights))
    classifier = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    adopt(model, dict(state), [classifier], f"weights {request.weights}")
    preset = official.transforms()
    return model, {"mean": tuple(preset.mean), "std": tuple(preset.std)}


def _rechannel(first: nn.Conv2d, in_channels: int, init: Callable[[Tensor], Any]) -> None:
    """Give a first convolution other channels; `init` draws its weights as the official model does."""
    first.in_channels = in_channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, in_channels, *first.kernel_size))
    init(first.weight)


@backbone("resnet18", weights=("none", "imagenet1k_v1", FILE))
@backbone("resnet50", weights=("none", "imagenet1k_v1", "imagenet1k_v2", FILE))
def resnet(request: Request) -> Backbone:
    """torchvision's ResNet; with option `:3x3` its stem is 3x3 without pooling, for small images."""
    request.check("3x3")
    if request.option and request.weights != "none":
        raise UserError(f"{request.name}: weights {request.weights!r} have a 7x7 stem: write {request.family}")
    model, norm = _torchvision(request)
    if request.option:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    if request.option or request.in_channels != 3:
        he_normal = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
        _rechannel(model.conv1, request.in_channels, he_normal)
    parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    trunk = nn.Sequential(OrderedDict((part, getattr(model, part)) for part in parts))
    return Backbone(request.name, trunk, pooling(), model.fc, grad_cam="closed", **norm)


@backbone("convnext_tiny", weights=("none", "imagenet1k_v1", FILE))
@backbone("convnext_base", weights=("none", "imagenet1k_v1", FILE))
def convnext(request: Request) -> Backbone:
    """torchvision's ConvNeXt, with a LayerNorm between pooling and classifier."""
    request.check(pixels=32)
    model, norm = _torchvision(request)
    trunk, (layer_norm, _, head) = model.features, model.classifier
    if request.in_channels != 3:
        _rechannel(trunk[0][0], request.in_channels, partial(nn.init.trunc_normal_, std=0.02))
    return Backbone(request.name, trunk, pooling(layer_norm), head, grad_cam="layernorm", **norm)


@backbone("alexnet", weights=("none", "imagenet1k_v1", FILE))
def alexnet(request: Request) -> Backbone:
    """torchvision's AlexNet; its two hidden layers with dropout are the neck."""
    request.check(pixels=63)
    model, norm = _torchvision(request)
    if request.in_channels != 3:
        _rechannel(model.features[0], request.in_channels, partial(nn.init.kaiming_uniform_, a=5**0.5))
    *hidden, head = model.classifier
    neck = nn.Sequential(model.avgpool, nn.Flatten(1), *hidden)
    return Backbone(request.name, model.features, neck, head, grad_cam="head", **norm)
