"""eX2L: ReSample plus a pressure on the trunks, and on nothing else."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from helpers import plan_tiny, predictions
from stubs import CPU, make_card
from torch import Tensor, nn
from torch.nn import functional as F
from toys import KINDS, batch, images, net, run_tiny, same, state_of, toy_task
from worstgroup.benchmark.backbones import GradCam
from worstgroup.benchmark.cost import Clock
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.spec import Recipe
from worstgroup.methods.blocks import grad_cam
from worstgroup.methods.blocks.grad_cam import grad_cam as heat
from worstgroup.methods.blocks.similarity import SIMILARITIES, similarity
from worstgroup.methods.ex2l import EX2L, Config

pytestmark = pytest.mark.usefixtures("tiny")
kinds = pytest.mark.parametrize("kind", KINDS)
SIZES = (3, 2, 1, 4)


def made(kind: GradCam = "closed", *, norm: bool = True, classes: int = 2, **config: Any) -> tuple[EX2L, Batch]:
    """The objective on toy networks, and a batch of all images, which are independent without `norm`."""
    task = toy_task(SIZES if classes == 2 else (1,) * classes**2, classes=classes, kind=kind, norm=norm)
    objective = EX2L(Config(**config))
    objective.setup(task, net(kind, classes, norm=norm))
    return objective, batch(task)


def gradients(objective: EX2L, data: Batch) -> dict[str, Tensor | None]:
    """Gradients of the loss by parameter, from the same dropout masks at every call."""
    torch.manual_seed(0)
    networks = nn.ModuleDict(objective.networks())
    loss = objective.loss(data)
    values = torch.autograd.grad(loss, list(networks.parameters()), allow_unused=True) if loss.requires_grad else ()
    found = dict(zip(dict(networks.named_parameters()), values, strict=False))
    return {name: found.get(name) for name, _ in networks.named_parameters()}


def total(found: dict[str, Tensor | None], part: str) -> float:
    """Sum of absolute gradients of a part, e.g. `model.head`."""
    return sum(g.abs().sum().item() for name, g in found.items() if name.startswith(f"{part}.") and g is not None)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes' and the attributes' losses are nothing, so that only the similarity is left."""
    monkeypatch.setattr(F, "cross_entropy", lambda logits, y: logits.new_zeros(()))


# ------------------------------------------------------------------------------------------------------------ the loss


@kinds
@pytest.mark.parametrize("classes", [2, 3])
def test_the_loss_is_the_sum_of_three_terms(kind: GradCam, classes: int) -> None:
    """The classifier's maps are of the class, the confounder's of the attribute."""
    objective, data = made(kind, norm=False, classes=classes, similarity="kl", lambda1=0.5, lambda2=3.0)
    a = objective.a[data.index]
    assert not torch.equal(a, data.y)
    parts = []
    for model, target in ((objective.model, data.y), (objective.confounder, a)):
        maps = model.trunk(data.x)
        logits = model.head(model.neck(maps))
        parts.append((F.cross_entropy(logits, target), heat(model, maps, logits, target)))
    (ce, u), (other_ce, v) = parts
    expected = ce + 0.5 * other_ce + 3.0 * similarity("kl", u, v).mean()
    assert objective.loss(data).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_confounder_knows_every_joint_value_of_the_granted_attributes() -> None:
    def setup(budget: str) -> EX2L:
        task = toy_task((1,) * 8, names=("background", "object"), budget=budget)
        objective = EX2L(Config())
        objective.setup(task, net())
        return objective

    both, one = setup("train+val"), setup("train+val:object")
    assert (both.confounder.num_classes, both.a.tolist()) == (4, [0, 1, 2, 3] * 2)
    assert (one.confounder.num_classes, one.a.tolist()) == (2, [0, 1] * 4)


@kinds
def test_a_step_of_the_similarity_makes_the_maps_differ_more(kind: GradCam, alone: None) -> None:
    objective, data = made(kind, norm=False, lambda1=0.0)
    optimizers = objective.optimizers(Recipe(optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.01))
    values = [objective.step(data, optimizers).item() for _ in range(5)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 1e-5


# ----------------------------------------------------------------------------------------------- what S can and cannot


SAME_AS_RESAMPLE = {
    "lambda2 = 0": {"ex2l__lambda2": "0"},
    "static": {
        "ex2l__gradient": "static",
        "ex2l__similarity": "kl",
        "ex2l__lambda1": "7",
        "ex2l__lambda2": "50",
    },
}


def test_without_similarity_it_is_resample_bit_for_bit() -> None:
    resample = predictions(run_tiny("resample"))
    for case, settings in SAME_AS_RESAMPLE.items():
        assert predictions(run_tiny("ex2l", **settings)) == resample, case
    assert predictions(run_tiny("ex2l")) != resample


@kinds
@pytest.mark.parametrize("gradient", ["joint", "label", "static"])
def test_only_static_leaves_the_classifiers_gradients_alone(
    kind: GradCam, gradient: Literal["joint", "label", "static"]
) -> None:
    plain = gradients(*made(kind, lambda2=0.0))
    found = gradients(*made(kind, gradient=gradient))
    equal = {name: torch.equal(value, found[name]) for name, value in plain.items()}  # type: ignore[arg-type]
    trunks = {name.partition(".")[0] for name, value in equal.items() if ".trunk." in name and not value}
    assert trunks == {"joint": {"model", "confounder"}, "label": {"model"}, "static": set()}[gradient]
    assert all(value for name, value in equal.items() if ".trunk." not in name)  # necks and heads


@kinds
@pytest.mark.parametrize("gradient", ["joint", "label", "static"])
def test_the_similarity_reaches_trunks_only(
    kind: GradCam, gradient: Literal["joint", "label", "static"], alone: None
) -> None:
    found = gradients(*made(kind, gradient=gradient))
    for network in ("model", "confounder"):
        assert total(found, f"{network}.neck") == total(found, f"{network}.head") == 0
    assert (total(found, "model.trunk") > 0) == (gradient != "static")
    assert (total(found, "confounder.trunk") > 0) == (gradient == "joint")


@kinds
def test_gradients_are_finite_differences_at_frozen_weights(kind: GradCam, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, data = made(kind, norm=False, similarity="ncc", lambda1=0.5, lambda2=2.0)
    networks = nn.ModuleDict(objective.networks()).double()
    data = replace(data, x=data.x.double())
    alphas: list[Tensor] = []
    weights = grad_cam.cam_weights
    monkeypatch.setattr(grad_cam, "cam_weights", lambda *given: alphas.append(weights(*given)) or alphas[-1])
    parameters = list(networks.parameters())
    slopes = torch.autograd.grad(objective.loss(data), parameters)
    model, confounder = alphas
    random = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in parameters]

    def along(step: float) -> float:
        frozen = iter((model, confounder))
        monkeypatch.setattr(grad_cam, "cam_weights", lambda *given: next(frozen))
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
            value = objective.loss(data).item()
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter -= step * direction
        return value

    expected = sum((slope * direction).sum().item() for slope, direction in zip(slopes, directions, strict=True))
    assert (along(1e-6) - along(-1e-6)) / 2e-6 == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------------- images without attribute


def test_unannotated_images_have_the_class_loss_only() -> None:
    objective, data = made("head", norm=False, lambda1=0.7, lambda2=2.0)
    objective.a[[0, 4, 5]] = -1
    known = torch.tensor([1, 2, 3, 6, 7, 8, 9])

    def beyond_classes(data: Batch) -> Tensor:
        return objective.loss(data) - F.cross_entropy(objective.model(data.x), data.y)

    alone = beyond_classes(Batch(data.x[known], data.y[known], known))
    assert beyond_classes(data).item() == pytest.approx(alone.item(), rel=1e-5)

    x = data.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective.loss(replace(data, x=x)), x)
    (of_classes,) = torch.autograd.grad(F.cross_entropy(objective.model(x), data.y), x)
    torch.testing.assert_close(slope[[0, 4, 5]], of_classes[[0, 4, 5]], rtol=1e-5, atol=1e-8)
    assert all(not torch.allclose(slope[i], of_classes[i]) for i in known)


@pytest.mark.parametrize("known", [0, 1])
def test_a_batch_with_none_or_one_annotated_image_works(known: int) -> None:
    objective, data = made()
    objective.a[known:] = -1
    optimizers = objective.optimizers(Recipe(optimizer="sgd", lr=0.1))
    before = {name: state_of(network) for name, network in objective.networks().items()}
    loss = objective.step(data, optimizers)
    assert loss.isfinite()
    changed = {name: not same(before[name], state_of(network)) for name, network in objective.networks().items()}
    assert changed == {"model": True, "confounder": known == 1}


# ----------------------------------------------------------------------------------------------------------- hard cases


def test_too_few_pixels_are_refused() -> None:
    card = replace(make_card(), image=(2, 2, 3))
    with pytest.raises(UserError, match="toy ends in maps of 1x1 pixels for toy, too few to compare; take larger"):
        EX2L.check_model(net(), card)
    EX2L.check_model(net(), replace(card, image=(8, 8, 3)))


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("dead", [("model",), ("confounder",), ("model", "confounder")])
def test_empty_maps_give_no_nan(name: str, dead: tuple[str, ...]) -> None:
    objective, data = made(norm=False, similarity=name)
    for network in dead:
        nn.init.constant_(objective.networks()[network].trunk[0].bias, -100.0)  # type: ignore[index,union-attr]
    found = gradients(objective, data)
    assert all(value is not None and value.isfinite().all() for value in found.values())
    assert objective.loss(data).isfinite()


# ----------------------------------------------------------------------------------------------------------------- cost


def test_it_passes_every_image_twice() -> None:
    record = run_tiny("ex2l")
    assert record.cost is not None
    n, epochs, batch_size = 96, 2, 16
    cost = record.cost.scratch
    assert cost.n_fwd == cost.n_bwd == 2 * n * epochs
    assert cost.n_fwd_nograd == 0
    assert cost.n_updates == n * epochs // batch_size


@kinds
def test_the_weights_of_maps_are_no_backward_pass_of_the_trunk(kind: GradCam) -> None:
    objective, data = made(kind)
    clock = Clock(CPU)
    for network in (objective.model, objective.confounder):
        clock.meter(network, network.trunk, images(1))
    with clock.stage("step") as cost:
        objective.step(data, objective.optimizers(Recipe()))
        assert cost.n_fwd == cost.n_bwd == 2 * len(data.y)
        objective.a[:7] = -1
        objective.step(data, objective.optimizers(Recipe()))
        assert cost.n_fwd == cost.n_bwd == 2 * len(data.y) + len(data.y) + 3


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"similarity": "l2"}, r"ex2l.similarity must be one of mae, mse, .*, dice, got 'l2'"),
        ({"lambda1": -1.0}, "ex2l.lambda1 must be at least 0, got -1.0"),
        ({"lambda2": -0.1}, "ex2l.lambda2 must be at least 0, got -0.1"),
        ({"lambda2": float("nan")}, "ex2l.lambda2 must be at least 0, got nan"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)


@pytest.mark.parametrize("setting", ["gradient", "map_norm", "sampler"])
def test_unknown_choices_are_refused_before_any_run(setting: str) -> None:
    with pytest.raises(UserError, match=f"{setting}=other"):
        plan_tiny("ex2l", **{f"ex2l__{setting}": "other"})


@pytest.mark.parametrize("sampler", ["uniform_group", "random"])
def test_the_sampler_is_a_setting(sampler: Literal["uniform_group", "random"]) -> None:
    task, recipe = toy_task(SIZES), Recipe(batch_size=4)
    plain: Objective[None] = Objective(None)
    plain.sampler = sampler
    draws = [
        torch.cat(list(method.make_sampler(task, recipe)(torch.Generator().manual_seed(0)))).tolist()
        for method in (EX2L(Config(sampler=sampler)), plain)
    ]
    assert draws[0] == draws[1]
    assert (sorted(draws[0]) == list(np.arange(10))) == (sampler == "random")
