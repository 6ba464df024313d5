"""An image model in three parts, where Grad-CAM and the two-stage methods need it split: `trunk -> neck -> head`.

Beside it what builders of such models share: what they are asked for, the usual neck, and weights read from files.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import CorruptFile, UserError
from .spec import Card

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


class _TimmTrunk(nn.Module):
    """A timm model up to its spatial map, turned to (B, C, H, W) where the model has channels last."""

    def __init__(self, model: Any, channels_last: bool) -> None:
        super().__init__()
        self.model, self.channels_last = model, channels_last

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.model.forward_features(x)
        return maps.permute(0, 3, 1, 2) if self.channels_last else maps


TimmTrunk = _TimmTrunk
"""ExMap's rules know the class by its first name and this module; a file of methods is not edited for a name."""


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


def normalization(model: Backbone, card: Card) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in [0, 1]: the backbone's if it has them, else the card's."""
    if model.mean is not None and model.std is not None:
        return model.mean, model.std
    return card.mean, card.std


def pooling(norm: nn.LayerNorm | None = None) -> nn.Sequential:
    """Global average pooling (B, C, H, W) -> (B, C), then a LayerNorm that takes over the parameters of `norm`."""
    neck = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1)))
    if norm is not None:  # a plain one, for (B, C), whatever layout `norm` is for
        plain = nn.LayerNorm(norm.weight.numel(), norm.eps, bias=norm.bias is not None)
        plain.weight, plain.bias = norm.weight, norm.bias
        neck.add_module("norm", plain)
    return neck


def pooled(request: Request, layers: Sequence[nn.Module], width: int) -> Backbone:
    """A trunk of `layers` with `width` channels at its end, pooled and classified."""
    head = nn.Linear(width, request.num_classes)
    return Backbone(request.name, nn.Sequential(*layers), pooling(), head, grad_cam="closed")


def read_state(path: Path) -> dict[str, Tensor]:
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


def adopt(model: nn.Module, state: dict[str, Tensor], classifier: Sequence[str], source: str) -> None:
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
