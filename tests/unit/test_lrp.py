"""Relevance follows the written rules, is conserved where it must be, and leaves the model as it was."""

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from worstgroup.benchmark.backbones import Backbone, build_backbone
from worstgroup.benchmark.errors import UserError
from worstgroup.methods.blocks import lrp
from worstgroup.methods.blocks.clustering import normalised
from worstgroup.methods.blocks.lrp import (
    EPSILON,
    GammaRule,
    Rules,
    canonical,
    conservation,
    explain,
    explainer,
    require_explainable,
)
from worstgroup.methods.blocks.lrp_zennit import by_zennit
from zennit.core import Composite
from zennit.rules import Epsilon, Gamma

LITE0 = Path(__file__).parents[3] / "shared/data/weights/tf_efficientnet_lite0.safetensors"
SIDE = {"tiny_cnn": 32, "resnet50": 32, "resnet18:3x3": 16, "mlp3x100": 8}
EXPLAINED = [
    "tiny_cnn",
    "resnet18",
    "resnet18:3x3",
    "resnet50",
    "alexnet",
    "mlp3x100",
    "timm:resnet18",
    "timm:resnet50",
    "timm:resnet18d",
    "timm:tf_efficientnet_lite0",
]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def built(name: str) -> Backbone:
    """With statistics and offsets of BatchNorm that matter, as after training; the tests leave it alone."""
    torch.manual_seed(0)
    model = build_backbone(name, num_classes=3, image=(SIDE.get(name, 64),) * 2).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.bias, 0, 0.1)
    return model


def images(name: str, count: int = 2) -> Tensor:
    return random(count, 3, SIDE.get(name, 64), SIDE.get(name, 64))


def cnn(*layers: nn.Module, channels: int, bias: bool = False) -> Backbone:
    neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    return Backbone("mine", nn.Sequential(*layers), neck, nn.Linear(channels, 2, bias=bias), grad_cam="closed")


# ------------------------------------------------------------------------------------------------------- gamma rule


def zennit_relevance(rule: object, layer: nn.Module, x: Tensor, relevance: Tensor) -> Tensor:
    """What a rule of zennit gives for a single layer."""
    with Composite(lambda context, name, module: rule).context(layer) as hooked:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(hooked(x), x, relevance)[0]


def gamma_rule(layer: nn.Conv2d, x: Tensor, relevance: Tensor, gamma: float = 4.0) -> Tensor:
    """Relevance of a convolution's input, given that of its output."""
    geometry, x = (layer.stride, layer.padding, layer.dilation, layer.groups), x.clone().requires_grad_()
    z = GammaRule.apply(x, layer.weight.detach(), layer.bias, geometry, Rules(gamma))
    torch.testing.assert_close(z, layer(x))
    return torch.autograd.grad(z, x, relevance)[0]


@pytest.mark.parametrize("gamma", [0.0, 0.25, 4.0])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_gamma_rule_is_its_formula_and_that_of_zennit(gamma: float, signed: bool, bias: bool) -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias).double()
    x = random(2, 4, 5, 5).double()
    x = x if signed else x.relu()
    relevance = random(2, 6, 3, 3, seed=2).double()
    found = gamma_rule(layer, x, relevance, gamma)
    torch.testing.assert_close(found, zennit_relevance(Gamma(gamma), layer, x, relevance))
    if gamma == 0:
        torch.testing.assert_close(found, zennit_relevance(Epsilon(EPSILON), layer, x, relevance))


def test_the_gamma_rule_is_the_written_one_term_by_term() -> None:
    inputs, outputs, gamma = 5, 4, 4.0
    torch.manual_seed(0)  # weights of which some outputs are mostly excited, some mostly inhibited
    layer = nn.Conv2d(inputs, outputs, 1).double()
    x, relevance = random(inputs).double(), random(outputs, seed=2).double()
    weight, bias = layer.weight.detach()[:, :, 0, 0], layer.bias.detach()
    wanted = torch.zeros(inputs).double()
    strong = []
    for j in range(outputs):
        z = x * weight[j]
        p = z.clamp(min=0).sum() + bias[j].clamp(min=0)
        n = z.clamp(max=0).sum() + bias[j].clamp(max=0)
        alpha, beta = (1 + gamma, 1.0) if p >= abs(n) else (1.0, 1 + gamma)
        strong.append(bool(p >= abs(n)))
        total = alpha * p + beta * n
        stable = total + 1e-6 * (1 if total >= 0 else -1)
        wanted += (alpha * z.clamp(min=0) + beta * z.clamp(max=0)) / stable * relevance[j]
    assert set(strong) == {True, False}  # both branches were needed
    found = gamma_rule(layer, x.view(1, -1, 1, 1), relevance.view(1, -1, 1, 1), gamma)
    torch.testing.assert_close(found.flatten(), wanted)


def test_a_dead_output_gives_zero_relevance() -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    assert torch.equal(gamma_rule(layer, torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)), torch.zeros(1, 2, 4, 4))


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", EXPLAINED)
def test_maps_are_finite_and_differ_between_images(name: str) -> None:
    x = images(name)
    maps = explain(built(name), x)
    assert maps.shape == x.shape
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert maps.isfinite().all()
    assert (maps.abs().amax((1, 2, 3)) > 0).all()
    assert not torch.equal(maps[0], maps[1])
    # An image's map does not depend on its batch.
    torch.testing.assert_close(explain(built(name), x[1:]), maps[1:], rtol=1e-3, atol=1e-4 * maps.abs().max().item())


@pytest.mark.parametrize("name", ["tiny_cnn", "resnet18:3x3", "resnet50"])
def test_maps_are_those_of_zennit(name: str) -> None:
    model, x = copy.deepcopy(built(name)).double(), images(name, 1).double()
    wanted = by_zennit(model, x)
    found = lrp._propagated(canonical(model), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * wanted.abs().max().item())
    single = explain(built(name), x.float()).double()
    torch.testing.assert_close(single, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(single, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timms_networks_have_the_maps_of_torchvisions(name: str) -> None:
    theirs = build_backbone(f"timm:{name}", num_classes=3, image=(64, 64)).eval()
    state = built(name).trunk.state_dict()
    theirs.trunk.model.load_state_dict({key: state[key] for key in theirs.trunk.model.state_dict()})
    theirs.head.load_state_dict(built(name).head.state_dict())
    x = images(name)
    assert torch.equal(explain(theirs, x), explain(built(name), x))


@pytest.mark.parametrize("name", EXPLAINED)
def test_the_steps_compute_what_the_model_computes(name: str) -> None:
    """Every BatchNorm is folded, and nothing is left out."""
    x = images(name)
    with torch.no_grad():
        torch.testing.assert_close(canonical(built(name))(x), built(name)(x), rtol=1e-3, atol=1e-3)
        for layer in built(name).modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean.any()


@pytest.mark.parametrize("name", EXPLAINED)
def test_relevance_is_conserved_in_whole_networks(name: str) -> None:
    assert conservation(built(name), images(name)) < 1e-9


def test_relevance_is_conserved_in_a_trained_network() -> None:
    """Biases take nearly all of it in this one: maps are tiny, and no map is empty."""
    if not LITE0.exists():
        pytest.skip("needs the weights of EfficientNet-Lite0, which are not part of the repository")
    model = build_backbone("timm:tf_efficientnet_lite0", num_classes=1000, weights=str(LITE0)).eval()
    x = random(2, 3, 96, 96)
    assert conservation(model, x) < 1e-9
    maps = explain(model, x)
    assert (maps.sum((1, 2, 3)).abs() < 0.01).all()
    assert (maps.abs().amax((1, 2, 3)) < 1e-5).all()
    assert (np.abs(normalised(maps, 32)).max(1) == 1).all()


def test_biases_take_their_share() -> None:
    """By hand: a pixel of 2, weight and bias 1, then a head with weight 1: 2 of 3 parts are the pixel's."""
    layer = nn.Conv2d(1, 1, 1)
    model = cnn(layer, nn.ReLU(), channels=1)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    nn.init.constant_(model.head.weight, 1.0)
    model.head.weight.data[1] = -1
    x = torch.full((1, 1, 2, 2), 2.0)
    assert explain(model, x).sum().item() == pytest.approx(2 / 3, abs=1e-5)
    assert conservation(model, x) < 1e-12


def test_a_residual_sum_is_shared_by_contribution() -> None:
    """By hand, at an image of one pixel: branch 3 x = 6, shortcut 2."""
    from torchvision.models.resnet import BasicBlock

    block = BasicBlock(1, 1)
    for conv, weight in ((block.conv1, 3.0), (block.conv2, 1.0)):
        nn.init.zeros_(conv.weight)
        conv.weight.data[0, 0, 1, 1] = weight
    model = cnn(block, channels=1).eval()
    assert conservation(model, torch.full((1, 1, 1, 1), 2.0)) < 1e-12
    seen: list[Tensor] = []
    both = torch.tensor([[6.0], [2.0]]).requires_grad_()
    total = lrp.EpsilonRule.apply(both, lambda pair: pair.sum(0), 0.0)
    seen += torch.autograd.grad(total, both, torch.tensor([8.0]))
    assert seen[0].flatten().tolist() == [6.0, 2.0]


def test_every_activation_passes_relevance_unchanged() -> None:
    x = torch.tensor([-1.0, 2.0, 9.0], requires_grad=True)
    for activation, expected in lrp.ACTIVATIONS.items():
        y = lrp.PassRule.apply(x, expected)
        assert torch.equal(y, activation()(x))
        assert torch.autograd.grad(y, x, torch.tensor([1.0, 2.0, 3.0]))[0].tolist() == [1, 2, 3]


def test_passes_through_the_trunk_are_counted() -> None:
    model, counted = copy.deepcopy(built("tiny_cnn")), []
    model.trunk.register_forward_hook(lambda module, inputs, out: counted.append(len(out)))
    explain(model, images("tiny_cnn", 3))
    assert sum(counted) == 3  # the comparison of the steps with the model is not


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)])
def test_relevance_is_conserved_without_biases(pool: nn.Module) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), pool, nn.Conv2d(8, 8, 3, bias=False), nn.ReLU())
    x = 100 * random(4, 3, 12, 12)  # far from the denominators' epsilon
    maps = explain(cnn(*layers, channels=8).double(), x.double())
    assert maps.double().sum((1, 2, 3)).sub(1).abs().max() < 1e-6


def test_it_is_the_predicted_class_that_is_explained() -> None:
    model = cnn(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), channels=2).double()
    with torch.no_grad():
        model.trunk[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        model.head.weight.copy_(torch.eye(2))
    x = torch.tensor([[3.0, -1.0], [-3.0, 1.0]]).view(2, 1, 1, 2).double()
    # Class 0 sees the positive pixel only and class 1 the negative one; the start relevance is 1, the logit 1.5.
    torch.testing.assert_close(explain(model, x).flatten(1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), atol=1e-5, rtol=0)


def test_scaling_the_start_relevance_leaves_normalised_maps_unchanged() -> None:
    x = images("tiny_cnn").requires_grad_()
    maps = explain(built("tiny_cnn"), x)
    logits = canonical(built("tiny_cnn"))(x)
    (scaled,) = torch.autograd.grad(logits, x, 7.5 * torch.eye(3)[logits.argmax(1)])
    torch.testing.assert_close(scaled, 7.5 * maps)
    torch.testing.assert_close(torch.from_numpy(normalised(scaled, 16)), torch.from_numpy(normalised(maps, 16)))


# ------------------------------------------------------------------------------------------------ nothing left behind


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = copy.deepcopy(built("resnet18:3x3")).train()
    x = images("resnet18:3x3")
    model(x).sum().backward()
    state, grads = copy.deepcopy(model.state_dict()), copy.deepcopy(gradients(model))
    names, draws = [name for name, _ in model.named_modules()], torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="expected input"):
            explain(model, x[:, :1])
    else:
        explain(model, x)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert all(torch.equal(now, before) for now, before in zip(gradients(model), grads, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert [name for name, _ in model.named_modules()] == names
    assert all(layer.training for layer in model.modules())
    assert not any(layer._forward_hooks or "forward" in vars(layer) for layer in model.modules())
    assert torch.equal(torch.get_rng_state(), draws)
    assert not x.requires_grad


def test_no_surrounding_mode_changes_the_maps() -> None:
    model, x = copy.deepcopy(built("tiny_cnn")), images("tiny_cnn")
    maps = explain(model, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(explain(model, x), maps)
    assert torch.equal(explain(model.requires_grad_(False).train(), x), maps)
    original = model.trunk.forward
    setattr(model.trunk, "forward", lambda x: original(x))  # noqa: B010  # as the engine does to compile the trunk
    assert torch.equal(explain(model, x), maps)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", [*EXPLAINED, "resnet50:3x3"])
def test_these_backbones_can_be_explained(name: str) -> None:
    require_explainable(built(name))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("mnist_cnn", r"trunk\.2 \(GroupNorm\)"),
        ("convnext_tiny", r"trunk\.0\.1 \(LayerNorm2d\)"),
        ("timm:seresnet18", r"trunk\.model\.layer1\.0\.se\.gate \(Sigmoid\)"),
        ("timm:resnetblur18", r"trunk\.model\.maxpool\.1 \(BlurPool2d\)"),
        ("timm:efficientnet_b0", r"trunk\.model\.bn1\.act \(SiLU\)"),
        ("timm:test_convnext", r"trunk\.model\.stem\.1 \(LayerNorm2d\)"),
    ],
)
def test_other_backbones_are_refused_by_layer(name: str, layer: str) -> None:
    model = build_backbone(name, num_classes=2, image=(64, 64))
    with pytest.raises(
        UserError, match=rf"{name} cannot be explained: .* layer {layer}; take resnet18, .* or mlp3x100"
    ):
        explain(model, images(name))


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        (nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),),
        (nn.Conv2d(3, 4, 3, padding="same"),),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        (nn.Conv2d(3, 4, 1), nn.GELU()),
        (type("Mine", (nn.Conv2d,), {})(3, 4, 1),),
    ],
)
def test_a_layer_without_a_rule_is_refused(layers: tuple[nn.Module, ...]) -> None:
    with pytest.raises(UserError, match="mine cannot be explained"):
        require_explainable(cnn(*layers, channels=4))


def test_a_norm_without_parameters_is_folded_too() -> None:
    norm = nn.BatchNorm2d(4, affine=False)
    norm.running_mean.fill_(0.3)
    norm.running_var.fill_(2.0)
    model = cnn(nn.Conv2d(3, 4, 1), norm, nn.ReLU(), channels=4).eval()
    x = random(2, 3, 4, 4)
    torch.testing.assert_close(canonical(model)(x), model(x))


def test_a_model_that_runs_its_layers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of a library may."""
    monkeypatch.setitem(lrp.BLOCKS, "torchvision.models.resnet.BasicBlock", ("conv1 bn1 conv2 bn2", "relu"))
    with pytest.raises(
        UserError, match="resnet18 cannot be explained: its layers, in the known order, give other logits"
    ):
        explainer(built("resnet18"), images("resnet18", 1))


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = copy.deepcopy(built("tiny_cnn"))
    model.head.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="tiny_cnn cannot be explained"):
        explain(model, images("tiny_cnn"))
