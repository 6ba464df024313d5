"""Every explainer gives maps of the images' size, signed, for the predicted class, and leaves the model as it was."""

import copy
import sys
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from toys import KINDS, images, net
from worstgroup.benchmark.backbones import Backbone, GradCam, build_backbone
from worstgroup.benchmark.errors import UserError
from worstgroup.methods.blocks import explainers
from worstgroup.methods.blocks.explainers import Explainer, ablation, integrated_gradients, maps, prepared
from worstgroup.methods.blocks.grad_cam import cam_weights, xgrad_cam
from worstgroup.methods.blocks.lrp import explain

torch.set_num_threads(1)
EVERY: tuple[Explainer, ...] = get_args(Explainer)
CAMS = tuple(name for name in EVERY if name not in ("lrp", "lrp-zennit", "ig"))
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    """Its plotting needs OpenCV, which some systems cannot load."""
    pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)


def built() -> Backbone:
    torch.manual_seed(0)
    return build_backbone("tiny_cnn", num_classes=3, image=(32, 32)).eval()


def pictures(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def coarse(model: Backbone, name: Explainer, x: Tensor) -> Tensor:
    """Class activation maps (B, h, w) at the trunk's resolution."""
    same = Backbone("same", model.trunk, model.neck, model.head, grad_cam=model.grad_cam)
    found: list[Tensor] = []
    resize = nn.functional.interpolate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explainers.F, "interpolate", lambda heat, *a, **k: found.append(heat) or resize(heat, *a, **k))
        maps(name, same, x)
    return found[-1][:, 0]


@pytest.mark.parametrize("name", EVERY)
def test_maps_have_the_size_of_their_images(name: Explainer) -> None:
    x = pictures()
    heat = maps(name, built(), x)
    assert heat.shape == ((3, 3, 32, 32) if name in ("lrp", "lrp-zennit", "ig") else (3, 1, 32, 32))
    assert heat.dtype == torch.float32
    assert not heat.requires_grad
    assert heat.isfinite().all()
    assert (heat.abs().amax((1, 2, 3)) > 0).all()
    torch.testing.assert_close(maps(name, built(), x[1:2]), heat[1:2], rtol=1e-3, atol=1e-3 * heat.abs().max().item())


@pytest.mark.parametrize("name", EVERY)
def test_the_model_is_left_as_it_was(name: Explainer) -> None:
    model, x = built().train(), pictures()
    model(x).sum().backward()
    state, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    draws = torch.get_rng_state()
    with torch.no_grad():
        heat = maps(name, model, x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert all(layer.training for layer in model.modules())
    assert not any(layer._forward_hooks for layer in model.modules())
    assert torch.equal(torch.get_rng_state(), draws)
    assert not x.requires_grad
    torch.testing.assert_close(heat, maps(name, model.eval(), x))  # evaluation mode it was


@pytest.mark.parametrize("name", EVERY)
def test_one_preparation_serves_many_batches(name: Explainer) -> None:
    model, x = built(), pictures(4)
    explain_batch = prepared(name, model, x[:1])
    parts = torch.cat([explain_batch(x[:3]), explain_batch(x[3:])])
    torch.testing.assert_close(parts, maps(name, model, x), rtol=1e-3, atol=1e-3 * parts.abs().max().item())


@pytest.mark.parametrize("name", EVERY)
def test_passes_through_the_trunk_are_counted_and_few(name: Explainer) -> None:
    model, passes = built(), []
    model.trunk.register_forward_hook(lambda module, inputs, out: passes.append(len(out)))
    maps(name, model, pictures(5))
    assert sum(passes) == 5 * {"ig": explainers.STEPS + 1}.get(name, 1)


def test_lrp_is_the_block() -> None:
    assert torch.equal(maps("lrp", built(), pictures()), explain(built(), pictures()))


# ------------------------------------------------------------------------------------------------ class activation maps


@kinds
def test_cams_are_those_of_our_own_blocks(kind: GradCam) -> None:
    model, x = net(kind, 3).eval(), images(4)
    leaf = model.trunk(x).detach().requires_grad_()
    logits = model.head(model.neck(leaf))
    y = logits.argmax(1)
    alpha = cam_weights(model, leaf, logits, torch.eye(3)[y])
    plain = torch.einsum("bc,bchw->bhw", alpha, leaf.detach())
    assert (plain < 0).any()
    torch.testing.assert_close(coarse(model, "gradcam", x), plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(coarse(model, "xgradcam", x), xgrad_cam(model, leaf, logits, y), rtol=1e-3, atol=1e-5)


@kinds
def test_cams_follow_their_papers(kind: GradCam) -> None:
    model, x = net(kind, 3).eval(), images(4)
    a = model.trunk(x).detach().requires_grad_()
    logits = model.head(model.neck(a))
    (g,) = torch.autograd.grad(logits.max(1).values.sum(), a)
    a = a.detach()
    torch.testing.assert_close(coarse(model, "hirescam", x), (g * a).sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(coarse(model, "layercam", x), (g.relu() * a).sum(1), rtol=1e-4, atol=1e-6)
    share = g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6)
    weights = (share * g.relu()).sum((2, 3))
    torch.testing.assert_close(
        coarse(model, "gradcam++", x), torch.einsum("bc,bchw->bhw", weights, a), rtol=1e-3, atol=1e-5
    )


def test_ablation_behind_pooling_is_what_each_channel_adds() -> None:
    model, x = net("closed", 3).eval(), images(4)
    a = model.trunk(x).detach()
    logits = model.head(model.neck(a))
    logit, y = logits.max(1)
    weights = model.head.weight[y] * a.mean((2, 3)) / logit.abs()[:, None]
    torch.testing.assert_close(
        coarse(model, "ablationcam", x), torch.einsum("bc,bchw->bhw", weights, a), rtol=1e-4, atol=1e-5
    )


@kinds
def test_ablation_is_the_librarys_where_maps_are_rectified(kind: GradCam) -> None:
    from pytorch_grad_cam import AblationCAM
    from pytorch_grad_cam.ablation_layer import AblationLayer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = net(kind, 3).eval(), images(2)
    a = model.trunk(x).detach()
    logits = model.head(model.neck(a))
    targets = [ClassifierOutputTarget(y) for y in logits.argmax(1).tolist()]
    library = AblationCAM(model, [model.trunk], ablation_layer=AblationLayer())
    wanted = torch.from_numpy(library.get_cam_image(x, model.trunk, targets, a.numpy(), None))
    found = ablation(lambda maps: model.head(model.neck(maps)), a, a)
    torch.testing.assert_close(
        found, wanted * logits.max(1).values.sign()[:, None, None].detach(), rtol=1e-3, atol=1e-4
    )


def test_a_negative_logit_does_not_turn_an_ablation_map() -> None:
    model, x = net("closed", 3).eval(), images(4)
    a = model.trunk(x).detach()
    heat = ablation(lambda maps: model.head(model.neck(maps)), a, a)
    lowered = ablation(lambda maps: model.head(model.neck(maps)) - 100, a, a)
    assert (torch.cosine_similarity(heat.flatten(1), lowered.flatten(1)) > 0.99).all()


def test_maps_of_one_pixel_are_refused() -> None:
    model = build_backbone("mlp3x100", num_classes=3, image=(8, 8))
    for name in CAMS:
        with pytest.raises(UserError, match=f"mlp3x100 has maps of one pixel on these images, so .*{name[:7]}"):
            maps(name, model, images(2))
    assert maps("ig", model, images(2)).any()


def test_a_library_that_cannot_be_loaded_is_a_users_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(UserError, match="gradcam needs pytorch-grad-cam, which cannot be imported"):
        maps("gradcam", built(), pictures())
    assert maps("ablationcam", built(), pictures()).any()


# ------------------------------------------------------------------------------------------------- integrated gradients


def test_integrated_gradients_sum_to_the_logit() -> None:
    model, x = built().double(), pictures().double()
    with torch.no_grad():
        logits, zero = model(x), model(torch.zeros_like(x[:1]))
    wanted = (logits - zero).gather(1, logits.argmax(1, keepdim=True))[:, 0].float()
    found = integrated_gradients(model, x, steps=400).sum((1, 2, 3))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


def test_integrated_gradients_of_a_linear_model_are_its_terms() -> None:
    model = Backbone("linear", nn.Identity(), nn.Flatten(1), nn.Linear(12, 2), grad_cam="head")
    x = images(3)[:, :, :2, :2]
    y = model(x).argmax(1)
    torch.testing.assert_close(maps("ig", model, x), x * model.head.weight.detach()[y].view(3, 3, 2, 2))
