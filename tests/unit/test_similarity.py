"""The eleven similarities have the printed values, and gradients that neither explode into NaN nor rescale a map."""

from typing import cast, get_args

import pytest
import torch
from torch import Tensor
from worstgroup.methods.blocks.similarity import DISTRIBUTIONS, SIMILARITIES, MapNorm, normalise, similarity

U, V, E1, E2 = (torch.tensor([row]) for row in ((1, 0.5, 0, 0), (0, 0.5, 1, 0), (1.0, 0, 0, 0), (0, 1.0, 0, 0)))
ORACLES = {  # single-stage methods, 8.6: of U and V, of U and U, of E1 and E2
    "mae": (-0.5, 0, -0.5),
    "mse": (-0.5, 0, -0.5),
    "rmse": (-0.707107, 0, -0.707107),
    "iou": (0.090909, 0.714286, 0),
    "kl": (-12.280454, 0, -18.420680),
    "js": (-0.462098, 0, -0.693147),
    "jsd": (-0.679778, 0, -0.832554),
    "cosine": (0.2, 1, 0),
    "ncc": (-0.454545, 1, -1 / 3),
    "ssim": (-0.451695, 1, -0.330938),
    "dice": (0.166667, 0.833333, 0),
}
MAP_NORMS = cast(tuple[MapNorm, ...], get_args(MapNorm))
names = pytest.mark.parametrize("name", SIMILARITIES)
map_norms = pytest.mark.parametrize("map_norm", MAP_NORMS)


def random_maps(seed: int, scale: float = 1.0) -> Tensor:
    """Rectified maps of 49 pixels, half of them zero."""
    noise = torch.randn(5, 49, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * noise).relu()


def test_all_eleven_have_a_line() -> None:
    assert list(SIMILARITIES) == list(ORACLES)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_the_specification(name: str, dtype: torch.dtype) -> None:
    u, v = torch.cat([U, U, E1]).to(dtype), torch.cat([V, U, E2]).to(dtype)
    # 1.5e-6: the root's epsilon leaves 1e-6 at equal maps, and the table is rounded to 1e-6.
    tolerance = 2e-6 if name == "kl" and dtype == torch.float32 else 1.5e-6
    assert similarity(name, u, v, "none").tolist() == pytest.approx(ORACLES[name], abs=tolerance, rel=0)


@names
def test_maps_with_two_axes_are_flattened(name: str) -> None:
    u, v = random_maps(0), random_maps(1)
    square = similarity(name, u.view(5, 7, 7), v.view(5, 7, 7))
    assert square.shape == (5,)
    assert torch.equal(square, similarity(name, u, v))


@names
def test_only_kl_depends_on_the_order(name: str) -> None:
    u, v = random_maps(0), random_maps(1)
    assert torch.allclose(similarity(name, u, v), similarity(name, v, u), atol=1e-12) == (name != "kl")


def test_reference_of_kl_is_the_confounder() -> None:
    """Mass of the label map outside the confounder's support costs nothing, missing mass a lot."""
    wide, narrow = torch.ones(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert similarity("kl", wide, narrow).item() == pytest.approx(-torch.tensor(2.0).log().item(), abs=1e-6)
    assert similarity("kl", narrow, wide).item() < -8


@names
def test_equal_maps_are_the_most_similar(name: str) -> None:
    u = random_maps(0)
    with_itself = similarity(name, u, u)
    assert all((similarity(name, u, random_maps(seed)) < with_itself).all() for seed in range(1, 6))


# ------------------------------------------------------------------------------------------------------------- norms


def test_norms() -> None:
    maps = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, 0.0]])
    assert normalise(maps, "none") is maps
    for kind, rows in {
        "max": [[0.2, 0.4, 1.0], [0, 0, 0]],
        "minmax": [[0.0, 0.25, 1.0], [0, 0, 0]],
        "l1": [[0.125, 0.25, 0.625], [1 / 3, 1 / 3, 1 / 3]],
    }.items():
        torch.testing.assert_close(normalise(maps, cast(MapNorm, kind)), torch.tensor(rows))


NORMALISED = [(name, kind) for name in SIMILARITIES for kind in MAP_NORMS if kind != "none" or name in DISTRIBUTIONS]


@pytest.mark.parametrize(("name", "map_norm"), NORMALISED)
def test_rescaling_a_map_changes_nothing(name: str, map_norm: MapNorm) -> None:
    """Neither in value nor in slope: the derivative along each of the two maps vanishes."""
    u, v = random_maps(0).requires_grad_(), random_maps(1).requires_grad_()
    value = similarity(name, u, v, map_norm)
    torch.testing.assert_close(similarity(name, 3 * u, v, map_norm), value, rtol=0, atol=1e-6)
    torch.testing.assert_close(similarity(name, u, 3 * v, map_norm), value, rtol=0, atol=1e-6)
    for maps, gradient in zip((u, v), torch.autograd.grad(value.sum(), (u, v)), strict=True):
        assert gradient.any()
        assert (gradient * maps).sum(1).abs().max() < 1e-6


def test_slope_along_the_map_would_not_vanish_with_a_detached_norm() -> None:
    u = random_maps(0).requires_grad_()
    norm = u.detach().amax(1, keepdim=True)
    (gradient,) = torch.autograd.grad(SIMILARITIES["mae"](u / norm, normalise(random_maps(1), "max")).sum(), u)
    assert (gradient * u).sum(1).abs().max() > 0.01


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_ignore_the_norm(name: str) -> None:
    u, v = random_maps(0), random_maps(1, scale=7)
    assert len({tuple(similarity(name, u, v, kind).tolist()) for kind in MAP_NORMS}) == 1


# ------------------------------------------------------------------------------------------------------- hard cases


@names
@map_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_nan_for_equal_zero_flat_and_disjoint_maps(name: str, map_norm: MapNorm, dtype: torch.dtype) -> None:
    some, zero, flat = random_maps(0).to(dtype), torch.zeros(5, 49, dtype=dtype), torch.full((5, 49), 0.3, dtype=dtype)
    nearly = some * (1 + 1e-6 * torch.rand(some.shape, generator=torch.Generator().manual_seed(2), dtype=dtype))
    left, right = torch.eye(49, dtype=dtype)[:5], torch.eye(49, dtype=dtype)[5:10]  # one pixel each, never the same
    for pair in (
        (some, some),
        (some, nearly),
        (left, right),
        (left, left),
        (zero, zero),
        (some, zero),
        (zero, some),
        (flat, flat),
        (flat, some),
    ):
        u, v = (maps.clone().requires_grad_() for maps in pair)
        value = similarity(name, u, v, map_norm)
        assert value.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value.sum(), (u, v)))


@names
def test_gradients_are_those_of_the_values(name: str) -> None:
    u, v = (0.1 + random_maps(seed) for seed in (0, 1))
    assert torch.autograd.gradcheck(
        lambda a, b: similarity(name, a, b), (u.requires_grad_(), v.requires_grad_()), atol=1e-6
    )
