"""eX2L: ReSample plus a pressure on the trunks, and on nothing else."""

from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from helpers import plan_tiny, predictions
from stubs import CPU, make_card, make_task, split_of
from torch import Tensor, nn
from torch.nn import functional as F
from toys import KINDS, batch, images, net, run_tiny, same, state_of, toy_task
from worstgroup.benchmark.backbones import Backbone, GradCam
from worstgroup.benchmark.cost import Clock
from worstgroup.benchmark.data import Batch
from worstgroup.benchmark.engine import Objective
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.search import draw
from worstgroup.benchmark.spec import Recipe, override
from worstgroup.methods import ex2l
from worstgroup.methods.blocks import grad_cam
from worstgroup.methods.blocks.grad_cam import grad_cam as heat
from worstgroup.methods.blocks.similarity import SIMILARITIES, MapNorm, similarity
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
    a = objective.a[0, data.index]
    assert not torch.equal(a, data.y)
    parts = []
    for model, target in ((objective.model, data.y), (objective.confounders["confounder"], a)):
        maps = model.trunk(data.x)
        logits = model.head(model.neck(maps))
        parts.append((F.cross_entropy(logits, target), heat(model, maps, logits, target)))
    (ce, u), (other_ce, v) = parts
    expected = ce + 0.5 * other_ce + 3.0 * similarity("kl", u, v).mean()
    assert objective.loss(data).item() == pytest.approx(expected.item(), rel=1e-6)


@kinds
def test_a_step_of_the_similarity_makes_the_maps_differ_more(kind: GradCam, alone: None) -> None:
    objective, data = made(kind, norm=False, lambda1=0.0)
    optimizers = objective.optimizers(Recipe(optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.01))
    values = [objective.step(data, optimizers).item() for _ in range(5)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 1e-5


def test_the_similarity_is_computed_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, data = made("layernorm")
    types: list[torch.dtype] = []

    def noted(name: str, u: Tensor, v: Tensor, map_norm: MapNorm) -> Tensor:
        value = similarity(name, u, v, map_norm)
        types.extend([u.dtype, v.dtype, value.dtype])
        return value

    monkeypatch.setattr(ex2l, "similarity", noted)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(data)
    assert {*types, loss.dtype} == {torch.float32}


# ------------------------------------------------------------------------------------------------- several attributes


def with_two(confounders: str, budget: str = "train+val", **config: Any) -> tuple[EX2L, Batch]:
    """The objective on a dataset with the attributes background and object, one image in each of eight groups."""
    task = toy_task((1,) * 8, names=("background", "object"), budget=budget, norm=False)
    objective = EX2L(Config(confounders=confounders, **config))  # type: ignore[arg-type]
    objective.setup(task, net(norm=False))
    return objective, batch(task)


@pytest.mark.parametrize(
    ("confounders", "budget", "sizes", "a"),
    [
        ("joint", "train+val", [4], [[0, 1, 2, 3] * 2]),
        ("joint", "train+val:object", [2], [[0, 1] * 4]),
        ("each", "train+val", [2, 2], [[0, 0, 1, 1] * 2, [0, 1] * 4]),
        ("each", "train+val:object", [2], [[0, 1] * 4]),
    ],
)
def test_what_the_confounders_learn(confounders: str, budget: str, sizes: list[int], a: list[list[int]]) -> None:
    objective, _ = with_two(confounders, budget)
    assert [network.num_classes for network in objective.confounders.values()] == sizes
    assert objective.a.tolist() == a
    assert objective.complete
    assert set(objective.networks()) == {"model", "confounder", "confounder1"} - (
        {"confounder1"} if len(a) < 2 else set()
    )


def test_losses_of_several_confounders_add_up_and_their_similarities_are_averaged() -> None:
    objective, data = with_two("each", lambda1=0.5, lambda2=3.0, similarity="ncc")
    first, second = objective.confounders.values()
    assert not same(state_of(first), state_of(second))
    u = heat_of(objective.model, data.x, data.y)
    expected = F.cross_entropy(objective.model(data.x), data.y)
    for network, a in zip((first, second), objective.a, strict=True):
        expected = expected + 0.5 * F.cross_entropy(network(data.x), a)
        expected = expected + 3.0 / 2 * similarity("ncc", u, heat_of(network, data.x, a)).mean()
    assert objective.loss(data).item() == pytest.approx(expected.item(), rel=1e-6)


def heat_of(model: Backbone, x: Tensor, target: Tensor) -> Tensor:
    maps = model.trunk(x)
    return heat(model, maps, model.head(model.neck(maps)), target)


@kinds
def test_with_one_attribute_both_readings_are_the_same_bit_for_bit(kind: GradCam) -> None:
    trained = []
    for confounders in ("joint", "each"):
        objective, data = made(kind, confounders=confounders, lambda2=0.3)
        torch.manual_seed(0)
        optimizers = objective.optimizers(Recipe(lr=0.01))
        losses = [objective.step(data, optimizers).item() for _ in range(3)]
        trained.append((losses, state_of(nn.ModuleDict(objective.networks()))))
    (losses, states), (other_losses, other_states) = trained
    assert losses == other_losses
    assert same(states, other_states)


def test_an_image_may_lack_one_of_two_attributes() -> None:
    """It is left out where that one is compared, and only there."""
    objective, data = with_two("each", lambda1=0.5, lambda2=3.0)
    objective.a[0, [2, 5]] = -1
    objective.a[1, [0]] = -1
    objective.complete = False
    u = heat_of(objective.model, data.x, data.y)
    expected = F.cross_entropy(objective.model(data.x), data.y)
    for network, a, missing in zip(objective.confounders.values(), objective.a, ([2, 5], [0]), strict=True):
        rows = torch.tensor([i for i in range(8) if i not in missing])
        expected = expected + 0.5 * F.cross_entropy(network(data.x[rows]), a[rows])
        v = heat_of(network, data.x[rows], a[rows])
        expected = expected + 3.0 / 2 * similarity("mae", u[rows], v).mean()
    assert objective.loss(data).item() == pytest.approx(expected.item(), rel=1e-6)


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
@pytest.mark.parametrize("config", [{"lambda2": 0.0}, {"gradient": "static", "lambda2": 9.0}, {"lambda1": 0.0}])
def test_the_classifiers_updates_are_resamples_also_with_dropout(kind: GradCam, config: dict[str, Any]) -> None:
    """A confounder draws dropout masks of its own, and the classifier's next ones are as if it had not."""
    objective, data = made(kind, **config)
    resample: Objective[None] = Objective(None)
    resample.setup(toy_task(SIZES, kind=kind), net(kind))
    trained = []
    for player in (objective, resample):
        torch.manual_seed(0)
        optimizers = player.optimizers(Recipe(lr=0.01))
        for _ in range(4):
            player.step(data, optimizers)
        trained.append((state_of(player.model), torch.rand(3)))
    (states, draws), (expected, expected_draws) = trained
    assert torch.equal(draws, expected_draws)
    assert same(states, expected) == ("lambda1" not in config)


def test_masks_of_confounders_differ() -> None:
    """They draw from one stream, one after the other."""
    objective, data = with_two("each")
    drawn: list[Tensor] = []
    for network in objective.confounders.values():
        network.trunk.register_forward_hook(lambda *_: drawn.append(torch.rand(3)))
    objective.loss(data)
    first, second = drawn
    assert not torch.equal(first, second)


@kinds
@pytest.mark.parametrize("gradient", ["joint", "label", "static"])
def test_maps_have_a_graph_only_where_it_is_used(
    kind: GradCam, gradient: Literal["joint", "label", "static"], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, data = made(kind, gradient=gradient)
    graphs: list[bool] = []
    monkeypatch.setattr(
        ex2l, "similarity", lambda _, u, v, __: graphs.extend([u.requires_grad, v.requires_grad]) or (u * v).sum()
    )
    objective.loss(data)
    assert graphs == {"joint": [True, True], "label": [True, False], "static": [False, False]}[gradient]


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
@pytest.mark.parametrize("name", SIMILARITIES)
def test_gradients_are_finite_differences_at_frozen_weights(
    kind: GradCam, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, data = made(kind, norm=False, similarity=name, lambda1=0.5, lambda2=2.0)
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


def forget(objective: EX2L, rows: list[int]) -> None:
    """Let the attribute of these images be unknown."""
    objective.a[:, rows] = -1
    objective.complete = False


def test_whether_all_attributes_are_known_is_found_once() -> None:
    for policy, complete in (("", True), ("masked", False)):
        card = make_card()
        task = make_task(split_of(SIZES, card), split_of(SIZES, card), card=card, budget="train-33", policy=policy)
        cast(Any, task)._lab.model = lambda num, purpose: net("closed", num, purpose)
        if complete:
            task = toy_task(SIZES)
        objective = EX2L(Config())
        objective.setup(task, net())
        assert objective.complete == complete
        assert bool((objective.a >= 0).any())


@kinds
def test_looking_for_unknown_attributes_changes_nothing_where_there_are_none(kind: GradCam) -> None:
    losses = []
    for rows in (None, []):
        objective, data = made(kind)
        if rows is not None:
            forget(objective, rows)
        losses.append(gradients(objective, data))
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())  # type: ignore[arg-type]


def test_unannotated_images_have_the_class_loss_only() -> None:
    objective, data = made("head", norm=False, lambda1=0.7, lambda2=2.0)
    forget(objective, [0, 4, 5])
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
    forget(objective, list(range(known, 10)))
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
    for network in (objective.model, *objective.confounders.values()):
        clock.meter(network, network.trunk, images(1))
    with clock.stage("step") as cost:
        objective.step(data, objective.optimizers(Recipe()))
        assert cost.n_fwd == cost.n_bwd == 2 * len(data.y)
        forget(objective, list(range(7)))
        objective.step(data, objective.optimizers(Recipe()))
        assert cost.n_fwd == cost.n_bwd == 2 * len(data.y) + len(data.y) + 3


# ----------------------------------------------------------------------------------------------------------- optimisers


@pytest.mark.parametrize(
    ("config", "lr", "weight_decay"),
    [
        ({}, 0.1, 0.02),
        ({"confounder_lr": 0.003}, 0.003, 0.02),
        ({"confounder_weight_decay": 0.0}, 0.1, 0.0),
        ({"confounder_lr": 0.5, "confounder_weight_decay": 1e-3}, 0.5, 1e-3),
    ],
)
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_confounders_may_have_a_rate_and_a_decay_of_their_own(
    config: dict[str, Any], lr: float, weight_decay: float, kind: Literal["sgd", "adam", "adamw"]
) -> None:
    objective, _ = with_two("each", **config)
    recipe = Recipe(optimizer=kind, lr=0.1, weight_decay=0.02, momentum=0.7)
    optimizers = objective.optimizers(recipe)
    plain = Objective.optimizers(objective, recipe)
    assert list(optimizers) == list(plain) == ["model", "confounder", "confounder1"]
    for name, optimizer in optimizers.items():
        (group,), (usual,) = optimizer.param_groups, plain[name].param_groups
        assert type(optimizer) is type(plain[name])
        own = {} if name == "model" else {"lr": lr, "weight_decay": weight_decay}
        assert group == usual | own


def test_rates_of_confounders_do_not_touch_the_classifier_without_similarity() -> None:
    settings = {"ex2l__lambda2": "0", "ex2l__confounder_lr": "0.3", "ex2l__confounder_weight_decay": "0.1"}
    assert predictions(run_tiny("ex2l", **settings)) == predictions(run_tiny("resample"))


def test_what_is_searched() -> None:
    recipe = Recipe(lr=0.002)
    for number in range(1, 20):
        values = draw(Config, {}, "ex2l", number, recipe)
        assert list(values) == ["lambda1", "lambda2", "confounder_lr", "confounder_weight_decay"]
        config, problems = override(Config(), values, "ex2l")
        assert not problems
        assert 0.1 <= config.lambda1 <= 100
        assert 0.1 <= config.lambda2 <= 100
        assert 0.0002 <= cast(float, config.confounder_lr) <= 0.02
        assert 1e-6 <= cast(float, config.confounder_weight_decay) <= 1e-2


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"similarity": "l2"}, r"ex2l.similarity must be one of mae, mse, .*, dice, got 'l2'"),
        ({"lambda1": -1.0}, "ex2l.lambda1 must be at least 0, got -1.0"),
        ({"lambda2": -0.1}, "ex2l.lambda2 must be at least 0, got -0.1"),
        ({"lambda2": float("nan")}, "ex2l.lambda2 must be at least 0, got nan"),
        ({"confounder_lr": 0.0}, "ex2l.confounder_lr must be positive, got 0.0"),
        ({"confounder_weight_decay": -1.0}, "ex2l.confounder_weight_decay must be at least 0, got -1.0"),
    ],
)
def test_bad_values_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Config(**config)


@pytest.mark.parametrize("setting", ["confounders", "gradient", "map_norm", "sampler"])
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
