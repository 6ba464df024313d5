"""Weights without a backward pass are those of autograd and of pytorch-grad-cam, for every kind of backbone."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from worstgroup.benchmark.backbones import Backbone, build_backbone
from worstgroup.methods.blocks.grad_cam import cam_weights, grad_cam, target_direction, xgrad_cam

torch.set_num_threads(1)  # on tiny batches several threads only wait for each other

SIDES = {"tiny_cnn": 32, "mnist_cnn:quarter": 12, "resnet18": 64, "convnext_tiny": 64, "alexnet": 127}
"""Pixels that leave a map of several pixels; the others' sides are 64."""
SMALL = {"closed": "tiny_cnn", "layernorm": "timm:test_convnext", "head": "timm:test_mambaout"}
NAMES = [*SIDES, *(name for name in SMALL.values() if name not in SIDES)]
LARGE = ("resnet50", "convnext_base")
names = pytest.mark.parametrize("name", NAMES)
and_large = pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
kinds = pytest.mark.parametrize("kind", SMALL)


@cache
def built(name: str, classes: int = 3) -> Backbone:
    """In float64 and evaluation mode, with norms that scale; shared by the tests, which leave it so."""
    torch.manual_seed(0)
    side = SIDES.get(name, 64)
    model = build_backbone(name, num_classes=classes, image=(side, side)).eval()
    for module in model.neck.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
    return model.double()


def images(name: str, count: int = 2) -> Tensor:
    side = SIDES.get(name, 64)
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@cache
def trunk_maps(name: str) -> Tensor:
    with torch.no_grad():
        return built(name).trunk(images(name))


def forward(name: str, classes: int = 3) -> tuple[Backbone, Tensor, Tensor]:
    """A model, the maps of two images as a leaf, and their logits."""
    model, maps = built(name, classes), trunk_maps(name).clone().requires_grad_()
    return model, maps, model.head(model.neck(maps))


def gradient(model: Backbone, maps: Tensor, direction: Tensor) -> Tensor:
    """d score / d maps by plain autograd."""
    leaf = maps.detach().requires_grad_()
    return torch.autograd.grad((direction * model.head(model.neck(leaf))).sum(), leaf)[0]


Y = torch.tensor([2, 1])

# ------------------------------------------------------------------------------------------------------------ weights


def test_every_kind_is_covered() -> None:
    assert {built(name).grad_cam for name in NAMES} == {"closed", "layernorm", "head"}
    assert {kind: built(name).grad_cam for kind, name in SMALL.items()} == {kind: kind for kind in SMALL}
    assert all(trunk_maps(name).shape[2] > 1 for name in NAMES)


def test_target_directions() -> None:
    assert target_direction(torch.tensor([0, 1]), 2).tolist() == [[1, -1], [-1, 1]]
    assert target_direction(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


@and_large
@pytest.mark.parametrize("direction", [[[0, 0, 1], [0, 1, 0]], [[0.5, -2, 0], [1, 1, 1]]])
def test_weights_are_autograds(name: str, direction: list[list[float]]) -> None:
    model, maps, logits = forward(name)
    towards = torch.tensor(direction)
    expected = gradient(model, maps, towards).mean((2, 3))
    found = cam_weights(model, maps, logits, towards)
    assert not found.requires_grad
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@names
def test_maps_are_rectified_sums(name: str) -> None:
    model, maps, logits = forward(name)
    alpha = gradient(model, maps, target_direction(Y, 3)).mean((2, 3))
    expected = (alpha[:, :, None, None] * maps).sum(1).relu()
    assert expected.any()
    torch.testing.assert_close(grad_cam(model, maps, logits, Y), expected, rtol=1e-9, atol=1e-12)


def test_mass_of_a_resnets_map_is_its_logit() -> None:
    model, maps, logits = forward("resnet18")
    alpha = cam_weights(model, maps, logits, target_direction(Y, 3))
    mass = torch.einsum("bc,bchw->b", alpha, maps)
    torch.testing.assert_close(mass, logits.gather(1, Y[:, None])[:, 0] - model.head.bias[Y])


def test_evidence_in_a_convnext_balances() -> None:
    """LayerNorm ignores shifts and scales of the pooled features."""
    model, maps, logits = forward("convnext_tiny")
    alpha = cam_weights(model, maps, logits, target_direction(Y, 3))
    mass = torch.einsum("bc,bchw->b", alpha, maps)
    assert alpha.sum(1).abs().max() < 1e-12 * alpha.abs().sum(1).min()
    # Up to the norm's epsilon, 1e-6 beside the variance of the pooled features.
    assert mass.abs().max() < 1e-3 * (alpha[:, :, None, None] * maps).abs().sum((1, 2, 3)).min()


@kinds
def test_margin_of_two_logits_is_the_single_logit(kind: str) -> None:
    model, maps, logits = forward(SMALL[kind], 2)
    y = torch.tensor([1, 0])
    single = logits[:, 1] - logits[:, 0]
    alpha = torch.autograd.grad(((2 * y - 1) * single).sum(), maps, retain_graph=True)[0].mean((2, 3))
    expected = (alpha[:, :, None, None] * maps).sum(1).relu()
    torch.testing.assert_close(grad_cam(model, maps, logits, y), expected, rtol=1e-9, atol=1e-12)
    opposite = grad_cam(model, maps, logits, 1 - y)
    assert not (expected * opposite).any()  # disjoint support
    assert (expected + opposite).any()


# --------------------------------------------------------------------------------------------------- inside of a loss


@kinds
def test_gradients_reach_the_trunk_but_not_the_head(kind: str) -> None:
    model, x = built(SMALL[kind]), images(SMALL[kind])
    maps = model.trunk(x)
    logits = model.head(model.neck(maps))
    heat = grad_cam(model, maps, logits, Y)
    assert all(parameter.grad is None for parameter in model.parameters())
    inputs = [model.head.weight, next(model.trunk.parameters())]
    head, trunk = torch.autograd.grad(heat.square().sum(), inputs, retain_graph=True, allow_unused=True)
    assert head is None
    assert trunk.any()
    assert torch.autograd.grad(F.cross_entropy(logits, Y), model.head.weight)[0].any()  # the graph is still there


@kinds
def test_maps_without_a_graph_are_the_same(kind: str) -> None:
    model, maps, logits = forward(SMALL[kind])
    with torch.no_grad():
        heat = grad_cam(model, maps, logits, Y)
    assert not heat.requires_grad
    assert torch.equal(heat, grad_cam(model, maps, logits, Y))


@kinds
def test_gradients_are_those_of_frozen_weights(kind: str) -> None:
    model, maps, logits = forward(SMALL[kind])
    alpha = cam_weights(model, maps, logits, target_direction(Y, 3))
    frozen = (alpha[:, :, None, None] * maps).sum(1).relu()
    expected = torch.autograd.grad(frozen.square().sum(), maps)[0]
    found = torch.autograd.grad(grad_cam(model, maps, logits, Y).square().sum(), maps)[0]
    torch.testing.assert_close(found, expected)


def test_dropout_masks_are_those_of_the_forward_pass() -> None:
    model, maps, _ = forward("alexnet")
    direction = target_direction(Y, 3)

    def logits_of(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.head(model.neck(maps))

    try:
        model.train()
        first, second = (cam_weights(model, maps, logits_of(seed), direction) for seed in (0, 1))
        torch.manual_seed(0)
        expected = gradient(model, maps, direction).mean((2, 3))
    finally:
        model.eval()
    torch.testing.assert_close(first, expected)
    assert not torch.allclose(first, second)


@kinds
def test_maps_are_in_float32_under_autocast(kind: str) -> None:
    name = SMALL[kind]
    torch.manual_seed(0)
    model = build_backbone(name, num_classes=3, image=(64, 64)).eval()
    x = images(name).float()
    with torch.autocast("cpu", torch.bfloat16):
        maps = model.trunk(x)
        logits = model.head(model.neck(maps))
        alpha = cam_weights(model, maps, logits, target_direction(Y, 3))
        heat, ranked = grad_cam(model, maps, logits, Y), xgrad_cam(model, maps, logits, Y)
    assert {alpha.dtype, heat.dtype, ranked.dtype} == {torch.float32}
    torch.testing.assert_close(heat, torch.einsum("bc,bchw->bhw", alpha, maps.float()).relu())
    expected = gradient(model, maps.float(), target_direction(Y, 3)).mean((2, 3))
    tolerance = 0.05 if kind == "head" else 1e-5  # only there the backward pass is autocast's
    assert (alpha - expected).norm() < tolerance * expected.norm()


# ---------------------------------------------------------------------------------------------------------- XGrad-CAM


@names
def test_xgrad_cam_is_autograds(name: str) -> None:
    model, maps, logits = forward(name)
    slope, a = gradient(model, maps, F.one_hot(Y, 3)), maps.detach()
    weights = (slope * a).sum((2, 3)) / (a.sum((2, 3)) + 1e-7)
    expected = (weights[:, :, None, None] * a).sum(1)
    found = xgrad_cam(model, maps, logits, Y)
    assert not found.requires_grad
    assert (found < 0).any()
    # The closed form lacks the 1e-7.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@names
def test_xgrad_cam_is_grad_cam_behind_pooling(name: str) -> None:
    model, maps, logits = forward(name)
    same = torch.allclose(xgrad_cam(model, maps, logits, Y).relu(), grad_cam(model, maps, logits, Y))
    assert same == (name != "alexnet")


def test_xgrad_cam_of_two_classes_explains_one_logit() -> None:
    model, maps, logits = forward("tiny_cnn", 2)
    y = torch.tensor([1, 0])
    expected = torch.einsum("bc,bchw->bhw", model.head.weight[y], maps) / 16
    torch.testing.assert_close(xgrad_cam(model, maps, logits, y), expected)


# --------------------------------------------------------------------------------------------------- pytorch-grad-cam


@and_large
@pytest.mark.parametrize(("method", "classes"), [("GradCAM", 3), ("GradCAM", 2), ("XGradCAM", 3)])
def test_maps_agree_with_pytorch_grad_cam(name: str, method: str, classes: int) -> None:
    """Of two classes, Grad-CAM explains the margin."""
    # Its plotting needs OpenCV, which some systems cannot load.
    package: Any = pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)
    y = Y if classes == 3 else torch.tensor([0, 1])
    model, x = built(name, classes), images(name)
    maps = model.trunk(x)
    margin = method == "GradCAM" and classes == 2
    with getattr(package, method)(model, [model.trunk]) as cam:
        targets = [lambda output, y=y: output[y] - margin * output[1 - y] for y in y.tolist()]
        cam(x, targets)
        (activations,), (slopes,) = (
            [part.numpy() for part in parts]
            for parts in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
        )
        # Before it scales each map to [0, 1] and resizes it.
        raw = torch.from_numpy(cam.get_cam_image(x, model.trunk, targets, activations, slopes))
    model.zero_grad(set_to_none=True)
    logits = model.head(model.neck(maps))
    if method == "GradCAM":
        found, raw = grad_cam(model, maps, logits, y).detach(), raw.relu()
    else:
        found = xgrad_cam(model, maps, logits, y)
    assert raw.any()
    assert (found - raw).norm() < 1e-5 * raw.norm()
