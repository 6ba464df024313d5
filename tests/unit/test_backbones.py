"""Every registered backbone is split as it says, and weights of others are taken whole or refused by name."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from worstgroup.benchmark.backbones import FILE, Backbone, build_backbone, normalization
from worstgroup.benchmark.errors import CorruptFile, UnknownName, UserError
from worstgroup.benchmark.registry import BACKBONES
from worstgroup.benchmark.spec import Card, Recipe

CLASSES = 3
LITE0 = Path(__file__).parents[3] / "shared/data/weights/tf_efficientnet_lite0.safetensors"

# The smallest images that leave a map of several pixels; a family that is not here gets 64 px and no option.
SIDE = {"tiny_cnn": 32, "mlp3x100": 8, "mnist_cnn": 12, "alexnet": 127, "resnet18:3x3": 16, "resnet50:3x3": 16}
VARIANTS = {
    "mnist_cnn": ["mnist_cnn", "mnist_cnn:quarter"],
    "resnet18": ["resnet18", "resnet18:3x3"],
    "resnet50": ["resnet50", "resnet50:3x3"],
    "timm": ["timm:test_resnet", "timm:test_convnext", "timm:mobilenetv3_small_050", "timm:test_mambaout"],
}
NAMES = [name for family in BACKBONES for name in VARIANTS.get(family, [family])]
WIDTHS = {
    "tiny_cnn": 64,
    "mlp3x100": 100,
    "mnist_cnn": 128,
    "mnist_cnn:quarter": 32,
    "resnet18": 512,
    "resnet50": 2048,
    "convnext_tiny": 768,
    "convnext_base": 1024,
    "alexnet": 4096,
    "identity": 12,
}
EMBEDDING = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Inputs are so small that threads only wait for each other, for minutes on a machine that is busy otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str, **changes: Any) -> Backbone:
    side = SIDE.get(name, 64)
    given = {"in_channels": EMBEDDING} if name == "identity" else {"image": (side, side)}
    torch.manual_seed(0)
    return build_backbone(name, num_classes=CLASSES, **(given | changes))


@cache
def built(name: str) -> Backbone:
    """Shared by the tests, which leave its parameters and statistics alone."""
    return build(name).eval()


def images(name: str, channels: int = 3) -> Tensor:
    side = SIDE.get(name, 64)
    shape = (2, EMBEDDING) if name == "identity" else (2, channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def maps_of(name: str) -> Tensor:
    """The target maps of two images, as a leaf; never constant over the pixels."""
    with torch.no_grad():
        maps = built(name).trunk(images(name))
    return (maps + torch.randn(maps.shape, generator=torch.Generator().manual_seed(2))).requires_grad_()


def grad_cam_weights(model: Backbone, maps: Tensor, target: int) -> Tensor:
    return torch.autograd.grad(model.head(model.neck(maps))[:, target].sum(), maps)[0]


# ------------------------------------------------------------------------------------------ every registered one


def test_every_family_has_a_case() -> None:
    assert {name.partition(":")[0] for name in NAMES} == set(BACKBONES)


@pytest.mark.parametrize("name", NAMES)
def test_the_three_parts_make_up_the_model(name: str) -> None:
    model, x = built(name), images(name)
    with torch.no_grad():
        maps, features, logits = model.trunk(x), model.features(x), model(x)
    assert maps.ndim == 4
    assert features.shape == (2, model.feature_dim)
    assert model.feature_dim == WIDTHS.get(name, model.feature_dim)
    assert logits.shape == (2, CLASSES)
    assert model.num_classes == CLASSES
    assert model.name == name
    assert torch.equal(model.neck(maps), features)
    assert torch.equal(model.head(features), logits)
    assert model.mean is None
    assert model.std is None


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_part(name: str) -> None:
    model = built(name)
    try:
        model(images(name)).square().sum().backward()
        for part in (model.trunk, model.neck, model.head):
            gradients = [parameter.grad for parameter in part.parameters()]
            assert all(gradient is not None for gradient in gradients)
            assert not gradients or any(bool(gradient.any()) for gradient in gradients if gradient is not None)
    finally:
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_weights_and_state_round_trips(name: str) -> None:
    first, second = built(name), build(name)
    assert all(module.training for module in second.modules())
    second.eval()
    state = first.state_dict()
    assert list(state) == list(second.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in second.state_dict().items())
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
        assert not second(images(name)).any()
        second.load_state_dict(state)
        assert torch.equal(second(images(name)), first(images(name)))


@pytest.mark.parametrize("name", NAMES)
def test_no_parameter_is_saved_twice(name: str) -> None:
    model = built(name)
    parts = sum(len(list(part.parameters())) for part in (model.trunk, model.neck, model.head))
    saved = [key for key, value in model.state_dict().items() if value.is_floating_point()]
    buffers = [key for key, value in model.named_buffers() if value.is_floating_point()]
    assert len(saved) - len(buffers) == parts == len(list(model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_declared_and_others_refused(name: str) -> None:
    family = name.partition(":")[0]
    assert BACKBONES[family].weights[0] == "none"
    assert BACKBONES[family].summary.endswith(".")
    for wrong in ("imagenet22k", FILE):
        with pytest.raises(UserError, match=f"{family} has no weights '{wrong}'; give none"):
            build(name, weights=wrong)
    if FILE in BACKBONES[family].weights and ":3x3" not in name:
        with pytest.raises(UserError, match=r"nowhere/weights\.pth: there is no such file"):
            build(name, weights="nowhere/weights.pth")


# ------------------------------------------------------------------------------------------------------- Grad-CAM


def check_closed(model: Backbone, maps: Tensor) -> None:
    pixels = maps.shape[2] * maps.shape[3]
    for target in range(CLASSES):
        expected = (model.head.weight[target] / pixels).view(1, -1, 1, 1).expand_as(maps)
        torch.testing.assert_close(grad_cam_weights(model, maps, target), expected, rtol=1e-5, atol=1e-8)


def check_layernorm(model: Backbone, maps: Tensor) -> None:
    norm = next(module for module in model.neck.modules() if isinstance(module, nn.LayerNorm))
    pixels = maps.shape[2] * maps.shape[3]
    found = grad_cam_weights(model, maps, 1)
    alpha = found[:, :, 0, 0]
    torch.testing.assert_close(found, alpha[:, :, None, None].expand_as(maps), rtol=1e-5, atol=1e-8)
    assert pixels > 1
    assert not torch.allclose(alpha[0], alpha[1], rtol=1e-2, atol=1e-8)

    pooled = maps.detach().mean((2, 3))
    sigma = (pooled.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    standard = (pooled - pooled.mean(1, keepdim=True)) / sigma
    row = norm.weight * model.head.weight[1]
    expected = (row - row.mean() - standard * (row * standard).mean(1, keepdim=True)) / (pixels * sigma)
    torch.testing.assert_close(alpha, expected, rtol=1e-4, atol=1e-7)
    shortcut = (row / pixels).expand_as(alpha)
    assert (alpha - shortcut).norm() > 0.1 * shortcut.norm()


def check_head(model: Backbone, maps: Tensor) -> None:
    found = grad_cam_weights(model, maps, 1)
    assert found.any()
    assert not torch.allclose(found[0], found[1])  # so neither of the closed forms without a backward pass


@pytest.mark.parametrize("name", NAMES)
def test_grad_cam_weights_are_what_is_declared(name: str) -> None:
    checks = {"closed": check_closed, "layernorm": check_layernorm, "head": check_head}
    checks[built(name).grad_cam](built(name), maps_of(name))


def test_declared_kinds() -> None:
    kinds = {name: built(name).grad_cam for name in NAMES}
    assert {name for name, kind in kinds.items() if kind == "layernorm"} == {
        "convnext_tiny",
        "convnext_base",
        "timm:test_convnext",
    }
    assert {name for name, kind in kinds.items() if kind == "head"} == {
        "alexnet",
        "timm:mobilenetv3_small_050",
        "timm:test_mambaout",
    }


def test_hidden_layers_make_the_gradient_differ_between_pixels() -> None:
    found = grad_cam_weights(built("alexnet"), maps_of("alexnet"), 0)
    assert built("alexnet").grad_cam == "head"
    assert found.flatten(2).std(2).max() > 0.1 * found.abs().max()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("test_resnet", "closed"),
        ("test_efficientnet", "closed"),
        ("test_convnext", "layernorm"),
        ("mobilenetv3_small_050", "head"),
        ("test_mambaout", "head"),  # channels last, with an MLP as head
        ("ghostnet_050", "head"),  # drops features in training
    ],
)
def test_timm_necks_are_told_apart(name: str, kind: str) -> None:
    # At 32 px most maps have one pixel, where the kinds could be confused.
    assert build(f"timm:{name}", image=(32, 32)).grad_cam == kind


def test_timm_maps_with_channels_last_are_turned() -> None:
    model = built("timm:test_mambaout")
    assert model.trunk(images("timm:test_mambaout")).shape == (2, 64, 2, 2)


# ---------------------------------------------------------------------------------------------------- single families


def test_target_maps_of_the_small_models() -> None:
    assert built("tiny_cnn").trunk(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 4, 4)
    assert built("mnist_cnn").trunk(torch.zeros(1, 3, 28, 28)).shape == (1, 128, 14, 14)
    assert built("mlp3x100").trunk(torch.zeros(1, 3, 8, 8)).shape == (1, 100, 1, 1)
    linears = [module for module in built("mlp3x100").modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [
        (192, 100),
        (100, 100),
        (100, 100),
        (100, CLASSES),
    ]


def test_identity_takes_embeddings_in_both_shapes() -> None:
    model, x = built("identity"), images("identity")
    assert torch.equal(model.features(x), x)
    assert torch.equal(model(x[:, :, None, None]), model(x))
    with pytest.raises(UserError, match="not images"):
        build("identity", image=(32, 32))


def test_small_stem_keeps_the_resolution() -> None:
    assert built("resnet18").trunk(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 1, 1)
    assert built("resnet18:3x3").trunk(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)


@pytest.mark.parametrize(
    "name", ["tiny_cnn", "mlp3x100", "resnet18", "resnet18:3x3", "convnext_tiny", "alexnet", "timm:test_resnet"]
)
def test_other_numbers_of_channels(name: str) -> None:
    assert build(name, in_channels=2).eval()(images(name, 2)).shape == (2, CLASSES)


def test_other_channels_are_drawn_as_the_official_ones() -> None:
    for name, layer in (("resnet18", "conv1"), ("alexnet", "0"), ("convnext_tiny", "0.0")):
        official, other = (
            model.trunk.get_submodule(layer).weight.detach() for model in (built(name), build(name, in_channels=6))
        )
        fan = 0.5**0.5 if name == "alexnet" else 1.0  # only there the spread depends on the number of inputs
        assert float(other.std()) == pytest.approx(fan * float(official.std()), rel=0.1)


def test_a_copy_stands_alone() -> None:
    name = "timm:mobilenetv3_small_050"  # its neck works with layers that the trunk owns
    model = copy.deepcopy(built(name))
    with torch.no_grad():
        before = built(name)(images(name))
        for parameter in model.trunk.parameters():
            parameter.zero_()
        assert not model.features(images(name)).any()
        assert torch.equal(built(name)(images(name)), before)


# ------------------------------------------------------------------------------------------------ users' mistakes


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("resnet81", {}, "Did you mean resnet18"),
        ("resnet18:foo", {}, "write resnet18 or resnet18:3x3"),
        ("tiny_cnn:3x3", {}, "write tiny_cnn$"),
        ("resnet18:", {}, "ends in a colon"),
        ("mlp3x100", {"image": None}, "needs the image size"),
        ("alexnet", {"image": (62, 224)}, "63x63 px or more"),
        ("convnext_tiny", {"image": (28, 28)}, "32x32 px or more"),
        ("resnet18", {"weights": "imagenet1k_v2"}, "give none or imagenet1k_v1 or the path"),
        ("resnet18", {"weights": "imagenet1k_v1", "in_channels": 1}, "take weights none"),
        ("resnet50:3x3", {"weights": "imagenet1k_v2"}, "write resnet50"),
        ("timm", {}, "Write timm:NAME"),
        ("timm:resnt50", {}, "Did you mean resnet50"),
        ("timm:resnet50.no_such_tag", {}, "no_such_tag"),
        ("timm:test_resnet", {"weights": "pretrained", "in_channels": 1}, "take weights none"),
        ("timm:test_vit", {"image": None}, "no spatial map"),
        ("timm:vit_tiny_patch16_224", {"image": (32, 32)}, "does not take images of 32x32 px"),
        ("timm:hf_hub:timm/resnet18", {}, "unknown timm model"),
    ],
)
def test_mistakes_are_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **changes)


def test_unknown_names_are_of_their_own_kind() -> None:
    for name in ("resnet81", "timm:resnt50"):
        with pytest.raises(UnknownName):
            build(name)


def test_smallest_images_do_pass() -> None:
    for name, side in (("alexnet", 63), ("convnext_tiny", 32)):
        assert built(name).trunk(torch.zeros(1, 3, side, side)).shape[2:] == (1, 1)


def test_import_is_quick() -> None:
    code = "import sys, worstgroup.benchmark.backbones; sys.exit('timm' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    torch.manual_seed(7)
    state: dict[str, Tensor] = torchvision.models.resnet18().state_dict()
    return state


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_fills_trunk_but_not_a_classifier_of_other_classes(
    tmp_path: Path, official: dict[str, Tensor], suffix: str
) -> None:
    path = tmp_path / f"resnet.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(official, path)
    model = build("resnet18", weights=str(path))
    assert torch.equal(model.trunk.get_submodule("layer4.1.conv2").weight, official["layer4.1.conv2.weight"])
    assert torch.equal(model.trunk.get_submodule("bn1").running_mean, official["bn1.running_mean"])
    assert model.head.weight.shape == (CLASSES, 512)
    assert (model.mean, model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_classifier_of_the_same_classes_is_kept(tmp_path: Path, official: dict[str, Tensor]) -> None:
    path = tmp_path / "resnet.pth"
    torch.save(official, path)
    model = build_backbone("resnet18", num_classes=1000, weights=str(path)).eval()
    reference = torchvision.models.resnet18()
    reference.load_state_dict(official)
    x = images("resnet18")
    assert torch.equal(model(x), reference.eval()(x))


def test_old_files_without_batch_counters_are_taken(tmp_path: Path, official: dict[str, Tensor]) -> None:
    path = tmp_path / "old.pth"
    torch.save({key: value for key, value in official.items() if "num_batches" not in key}, path)
    model = build("resnet18", weights=str(path))
    assert torch.equal(model.trunk.get_submodule("conv1").weight, official["conv1.weight"])


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("layer1.0.conv1.weight", lambda state: state.pop("layer1.0.conv1.weight")),
        ("fc.bias", lambda state: state.pop("fc.bias")),
        ("module.extra", lambda state: state.update({"module.extra": torch.zeros(2)})),
        ("conv1.weight", lambda state: state.update({"conv1.weight": torch.zeros(64, 1, 7, 7)})),
        ("fc.weight", lambda state: state.update({"fc.weight": torch.zeros(1000, 2048)})),
    ],
)
def test_weights_of_another_model_are_refused(
    tmp_path: Path, official: dict[str, Tensor], key: str, change: Callable[[dict[str, Tensor]], object]
) -> None:
    state = dict(official)
    change(state)
    path = tmp_path / "foreign.pth"
    torch.save(state, path)
    with pytest.raises(CorruptFile, match=rf"foreign\.pth.*'{key}'"):
        build("resnet18", weights=str(path))


class Evil:
    """Unpickling it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["resnet18", "timm:test_resnet"])
def test_damaged_and_dangerous_files_are_refused(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    whole = tmp_path / "whole"
    torch.save({"weight": torch.zeros(1000)}, whole)
    save_file({"weight": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    contents = {
        "empty.pth": b"",
        "text.pth": b"404: Not Found",
        "cut.pth": whole.read_bytes()[:1500],
        "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:-9],
        "empty.safetensors": b"",
        "evil.pth": pickle.dumps({"weight": Evil(trace)}, protocol=2),
    }
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "checkpoint.pth")
    for file in (*contents, "list.pth", "checkpoint.pth"):
        with pytest.raises(CorruptFile, match=file.replace(".", r"\.")) as caught:
            build(name, weights=str(tmp_path / file))
        assert "weights_only" not in str(caught.value)
    assert not trace.exists()


def test_named_weights_are_torchvisions(monkeypatch: pytest.MonkeyPatch, official: dict[str, Tensor]) -> None:
    asked: list[str] = []

    def fake(self: Any, **options: Any) -> dict[str, Tensor]:
        assert options["weights_only"]
        assert options["check_hash"]
        asked.append(str(self))
        return dict(official)

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fake)
    model = build("resnet18", weights="imagenet1k_v1")
    assert asked == ["ResNet18_Weights.IMAGENET1K_V1"]
    assert torch.equal(model.trunk.get_submodule("conv1").weight, official["conv1.weight"])
    assert model.mean == (0.485, 0.456, 0.406)
    with pytest.raises(CorruptFile, match="imagenet1k_v2"):
        build("resnet50", weights="imagenet1k_v2")
    assert asked[1:] == ["ResNet50_Weights.IMAGENET1K_V2"]


def test_registered_weights_are_those_of_torchvision() -> None:
    for family in ("resnet18", "resnet50", "convnext_tiny", "convnext_base", "alexnet"):
        known = [member.name.lower() for member in torchvision.models.get_model_weights(family)]
        assert list(BACKBONES[family].weights) == ["none", *known, FILE]


def test_failed_downloads_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(UserError, match=r"resnet18-.*\.pth cannot be fetched.*by hand"):
        build("resnet18", weights="imagenet1k_v1")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"no route to host.*by hand"):
        build("timm:test_resnet", weights="pretrained")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout", "mobilenetv3_small_050"])
def test_a_split_timm_model_computes_what_the_whole_one_does(tmp_path: Path, name: str) -> None:
    torch.manual_seed(3)
    whole = timm.create_model(name, num_classes=CLASSES).eval()
    with torch.no_grad():  # at first a norm is the identity, which would hide it going astray
        for parameter in whole.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    x = images("timm")
    model = build(f"timm:{name}", weights=str(tmp_path / "whole.safetensors")).eval()
    torch.testing.assert_close(model(x), whole(x))
    torch.testing.assert_close(model.features(x), whole.forward_head(whole.forward_features(x), pre_logits=True))


@pytest.mark.skipif(not LITE0.is_file(), reason=f"the real weights {LITE0} are not on this machine")
def test_real_weights_of_a_timm_model() -> None:
    model = build("timm:tf_efficientnet_lite0", weights=str(LITE0)).eval()
    state = load_file(LITE0)
    assert model.mean == model.std == (0.5, 0.5, 0.5)
    assert model.feature_dim == 1280
    assert model.grad_cam == "closed"
    assert model.head.weight.shape == (CLASSES, 1280)
    assert torch.equal(model.trunk.get_submodule("model.conv_stem").weight, state["conv_stem.weight"])
    original = build_backbone("timm:tf_efficientnet_lite0", num_classes=1000, weights=str(LITE0))
    assert torch.equal(original.head.weight, state["classifier.weight"])
    with pytest.raises(CorruptFile, match=r"lite0\.safetensors"):
        build("resnet18", weights=str(LITE0))


def test_normalization_is_the_backbones_or_the_cards() -> None:
    card = Card(
        name="toy",
        title="",
        classes=("a", "b"),
        attributes=(),
        image=(3, 32, 32),
        counts={},
        licence="",
        citation="",
        recipe=Recipe(),
        backbone="tiny_cnn",
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 2.0, 3.0),
    )
    model = build("tiny_cnn")
    assert normalization(model, card) == (card.mean, card.std)
    model.mean, model.std = (0.5,) * 3, (0.25,) * 3
    assert normalization(model, card) == ((0.5,) * 3, (0.25,) * 3)
