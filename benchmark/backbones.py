"""Image models split where Grad-CAM and the two-stage methods need it: `trunk -> neck -> head`.

A builder is a function from a `Request` to a `Backbone`, registered with `@backbone(name, weights=...)`. It draws
initial weights from torch's global generator, which the caller seeds. torchvision and timm are imported by the builders
that need them, so that importing this module stays quick.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import CorruptFile, UnknownName, UserError
from .registry import BACKBONES, backbone
from .spec import Card

__all__ = ["FILE", "Backbone", "GradCam", "Request", "build_backbone", "normalization"]

GradCam = Literal["closed", "layernorm", "head"]
FILE = "FILE"
"""In a builder's `weights`: it also takes the path of a state dict."""


class Backbone(nn.Module):
    """A classifier in three parts, `logits = head(neck(trunk(x)))`.

    `trunk` maps images to the Grad-CAM target maps (B, C, H, W), `neck` maps those to penultimate features (B, d), and
    `head` is linear. `mean` and `std` are what the pretrained weights want, or None: then the dataset's card decides.

    `grad_cam` says what the Grad-CAM weights of class y, d logit_y / d maps, cost:
    `closed` - the neck is global average pooling: they are `head.weight[y] / (H * W)` at every pixel;
    `layernorm` - pooling, then the neck's only `nn.LayerNorm`: closed, but different for every sample;
    `head` - they need a backward pass through neck and head (never through the trunk).
    """

    def __init__(
        self,
        name: str,
        trunk: nn.Module,
        neck: nn.Module,
        head: nn.Linear,
        *,
        grad_cam: GradCam,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.trunk, self.neck, self.head = trunk, neck, head
        self.feature_dim, self.num_classes = head.in_features, head.out_features
        self.grad_cam: GradCam = grad_cam
        self.mean, self.std = mean, std

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (B, d) of images (B, C, H, W)."""
        features: Tensor = self.neck(self.trunk(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        logits: Tensor = self.head(self.features(x))
        return logits


@dataclass(frozen=True)
class Request:
    """What a builder is asked for: `name` is `family[:option]`, `image` is (height, width) in pixels where known."""

    name: str
    family: str
    option: str
    num_classes: int
    in_channels: int
    image: tuple[int, int] | None
    weights: str

    def check(self, *options: str, pixels: int = 1) -> None:
        """Raise `UserError` unless option and image size suit, and pretrained weights meet RGB images."""
        if self.option and self.option not in options:
            offer = [self.family, *(f"{self.family}:{option}" for option in options)]
            raise UserError(f"there is no backbone {self.name!r}: write {' or '.join(offer)}")
        if self.image is not None and min(self.image) < pixels:
            small = "take one for small images, such as resnet18:3x3 or tiny_cnn"
            raise UserError(f"{self.name} needs images of {pixels}x{pixels} px or more, not {self.image}: {small}")
        if self.weights != "none" and self.in_channels != 3:
            channels = f"images with 3 channels, these have {self.in_channels}: take weights none"
            raise UserError(f"{self.name}: weights {self.weights!r} are for {channels}")


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


def normalization(model: Backbone, card: Card) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in [0, 1]: the backbone's if it has them, else the card's."""
    if model.mean is not None and model.std is not None:
        return model.mean, model.std
    return card.mean, card.std


def _pooling(norm: nn.LayerNorm | None = None) -> nn.Sequential:
    """Global average pooling (B, C, H, W) -> (B, C), then a LayerNorm that takes over the parameters of `norm`."""
    neck = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1)))
    if norm is not None:  # a plain one, for (B, C), whatever layout `norm` is for
        plain = nn.LayerNorm(norm.weight.numel(), norm.eps, bias=norm.bias is not None)
        plain.weight, plain.bias = norm.weight, norm.bias
        neck.add_module("norm", plain)
    return neck


def _closed(request: Request, layers: Sequence[nn.Module], width: int) -> Backbone:
    """A trunk of `layers` with `width` channels at its end, pooled and classified."""
    head = nn.Linear(width, request.num_classes)
    return Backbone(request.name, nn.Sequential(*layers), _pooling(), head, grad_cam="closed")


@backbone("tiny_cnn")
def tiny_cnn(request: Request) -> Backbone:
    """Four 3x3 convolutions for 32 px images, 64x4x4 target maps; trains in seconds on two cores."""
    request.check()
    layers: list[nn.Module] = []
    # Halving at once costs no accuracy on small digits, and a step takes 11 ms instead of 26 (batch 128, 2 cores).
    for width, channels, stride in ((request.in_channels, 16, 2), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(width, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return _closed(request, layers, 64)


@backbone("mnist_cnn")
def mnist_cnn(request: Request) -> Backbone:
    """DomainBed's MNIST_CNN, 128x14x14 target maps at 28 px; `mnist_cnn:quarter` has a quarter of the width."""
    request.check("quarter")
    half, full = (16, 32) if request.option else (64, 128)
    layers: list[nn.Module] = []
    for width, channels, stride in ((request.in_channels, half, 1), (half, full, 2), (full, full, 1), (full, full, 1)):
        # ReLU before the norm, as in DomainBed: the maps can be negative.
        layers += [nn.Conv2d(width, channels, 3, stride, 1), nn.ReLU(), nn.GroupNorm(8, channels)]
    return _closed(request, layers, full)


@backbone("mlp3x100")
def mlp3x100(request: Request) -> Backbone:
    """Three hidden layers of 100 ReLU units on flattened pixels, the MLP of CM-10; its maps have one pixel."""
    request.check()
    if request.image is None:
        raise UserError(f"{request.name} needs the image size: its first layer has a weight for every pixel")
    layers: list[nn.Module] = [nn.Flatten(1)]
    for width in (request.in_channels * request.image[0] * request.image[1], 100, 100):
        layers += [nn.Linear(width, 100), nn.ReLU()]
    return _closed(request, [*layers, nn.Unflatten(1, (100, 1, 1))], 100)


@backbone("identity")
def identity(request: Request) -> Backbone:
    """A linear classifier on precomputed embeddings (B, d) or (B, d, 1, 1), where d is `in_channels`."""
    request.check()
    if request.image not in (None, (1, 1)):
        raise UserError("identity takes precomputed embeddings, not images: take another backbone, such as resnet18")
    return _closed(request, [nn.Flatten(1), nn.Unflatten(1, (request.in_channels, 1, 1))], request.in_channels)


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file; raises `UserError` or `CorruptFile`."""
    if not path.is_file():
        raise UserError(f"weights {path}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a strange pickle, before it is refused
            safe = path.suffix == ".safetensors"
            state: object = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"weights {path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        # Without torch's own message: it advises `weights_only=False`, which would run whatever the file holds.
        wanted = "needed is what torch.save(model.state_dict(), path) or safetensors writes"
        raise CorruptFile(f"weights {path}: damaged, or not a state dict ({type(error).__name__}); {wanted}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CorruptFile(f"weights {path}: not a state dict, which maps names of parameters to tensors")
    return dict(state)


def _adopt(model: nn.Module, state: dict[str, Tensor], classifier: Sequence[str], source: str) -> None:
    """Load a state dict in official naming, strictly, except that a classifier for other classes is left out.

    `classifier` names submodules. Raises `CorruptFile` with the first key that is missing, foreign or of another shape.
    """
    own = model.state_dict()
    for key, value in own.items():
        if key not in state and key.endswith(".num_batches_tracked"):
            state[key] = value  # older official files lack this counter, and torch itself forgives that
        elif key in state and key.rpartition(".")[0] in classifier and state[key].shape[1:] == value.shape[1:]:
            state[key] = state[key] if state[key].shape == value.shape else value
    for key in chain(own, state):
        found, wanted = (str(tuple(part[key].shape)) if key in part else "missing" for part in (state, own))
        if found != wanted:
            raise CorruptFile(f"{source}: not weights of this model: {key!r} is {found} there, {wanted} in the model")
    model.load_state_dict(state)


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
        state = _read_state(Path(request.weights))
    classifier = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    _adopt(model, dict(state), [classifier], f"weights {request.weights}")
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
    return Backbone(request.name, trunk, _pooling(), model.fc, grad_cam="closed", **norm)


@backbone("convnext_tiny", weights=("none", "imagenet1k_v1", FILE))
@backbone("convnext_base", weights=("none", "imagenet1k_v1", FILE))
def convnext(request: Request) -> Backbone:
    """torchvision's ConvNeXt, with a LayerNorm between pooling and classifier."""
    request.check(pixels=32)
    model, norm = _torchvision(request)
    trunk, (layer_norm, _, head) = model.features, model.classifier
    if request.in_channels != 3:
        _rechannel(trunk[0][0], request.in_channels, partial(nn.init.trunc_normal_, std=0.02))
    return Backbone(request.name, trunk, _pooling(layer_norm), head, grad_cam="layernorm", **norm)


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


# ---------------------------------------------------------------------------------------------------------- timm


class _TimmTrunk(nn.Module):
    """A timm model up to its spatial map, turned to (B, C, H, W) where the model has channels last."""

    def __init__(self, model: Any, channels_last: bool) -> None:
        super().__init__()
        self.model, self.channels_last = model, channels_last

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.model.forward_features(x)
        return maps.permute(0, 3, 1, 2) if self.channels_last else maps


class _TimmNeck(nn.Module):
    """timm's own way from maps to features, with layers that stay in the trunk's model."""

    def __init__(self, trunk: _TimmTrunk) -> None:
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
    trunk = _TimmTrunk(model, maps.shape[3] == model.num_features != maps.shape[1])
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
        _adopt(model, _read_state(Path(request.weights)), classifier, f"weights {request.weights}")
    return model


def _timm_neck(trunk: _TimmTrunk, maps: Tensor) -> tuple[nn.Module, GradCam, int]:
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
    own = _pooling(norm)
    model.train()  # dropout shows in training only; no layer here keeps statistics
    if not all(torch.allclose(out, own(maps), atol=1e-5) for out in (features, neck(maps))):
        return neck, "head", features.shape[1]
    if norm is not None:  # it belongs to the neck alone now
        model.set_submodule(next(name for name, module in model.named_modules() if module is norm), nn.Identity())
    return own, "closed" if norm is None else "layernorm", features.shape[1]
