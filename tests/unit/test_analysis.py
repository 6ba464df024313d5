"""Looking into a run's model: shares of a map on the object, critical samples, separability, colours of maps."""

import numpy as np
import pytest
import torch
from torch import nn
from worstgroup.analysis import attribution, critical, gallery, look, separability
from worstgroup.benchmark.backbones import Backbone
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.task import Checkpoint, Choice, Predictor
from worstgroup.methods.blocks.last_layer import Scaler, StandardisedLinear
from worstgroup.methods.blocks.masks import top_mask

RNG = np.random.default_rng(0)


def shares(heat: torch.Tensor, objects: torch.Tensor) -> dict[str, float]:
    (values,) = attribution.shares(heat[None].float(), objects[None])
    return dict(zip(attribution.COLUMNS, values.tolist(), strict=False))


# ------------------------------------------------------------------------------------------------------- attribution


def test_a_map_that_is_the_object_lies_on_it_alone() -> None:
    objects = torch.zeros(8, 8, dtype=torch.bool)
    objects[2:6, 2:6] = True
    found = shares(objects.float(), objects)
    assert (found["score_fg"], found["score_bg"]) == (1, 0)
    assert found["mask_fg"] == 1
    assert found["foreground"] == pytest.approx(0.25)


def test_the_shares_of_the_mask_add_up_to_its_size() -> None:
    """K / HW = mask_fg f + mask_bg (1 - f); the paper's 0.807 and 0.203 thus mean objects of 16 % of the image."""
    heat, objects = torch.rand(5, 7, 7), torch.rand(5, 56, 56) < 0.3
    for one, shape in zip(heat, objects, strict=True):
        found, f = shares(one, shape), float(shape.float().mean())
        kept = float(top_mask(one[None], (56, 56), attribution.SHARE).float().mean())
        assert found["mask_fg"] * f + found["mask_bg"] * (1 - f) == pytest.approx(kept, abs=1e-6)
    assert pytest.approx(0.16, abs=0.005) == (attribution.SHARE - 0.203) / (0.807 - 0.203)


def test_scores_do_not_depend_on_the_scale_of_a_map() -> None:
    heat, objects = torch.rand(6, 6), torch.rand(24, 24) < 0.4
    assert shares(7 * heat - 3, objects) == pytest.approx(shares(heat, objects), abs=1e-5)


@pytest.mark.parametrize("full", [True, False])
def test_an_image_without_object_or_background_counts_in_no_mean(full: bool) -> None:
    objects = torch.stack([torch.full((8, 8), full), torch.arange(64).view(8, 8) < 20])
    values = attribution.shares(torch.rand(2, 4, 4), objects).numpy()
    assert not np.isfinite(values[0]).all()
    ((group, line),) = attribution._means(values, np.array([3, 3]))
    assert (group, line["images"]) == (3, 1)
    assert line["mask_fg"] == pytest.approx(float(values[1, 2]))


def test_a_constant_map_scores_nothing() -> None:
    found = shares(torch.ones(4, 4), torch.arange(64).view(8, 8) < 20)
    assert (found["score_fg"], found["score_bg"]) == (0, 0)


# -------------------------------------------------------------------------------------------------- critical samples


def test_critical_images_are_in_the_rarer_combination_of_their_class() -> None:
    groups = np.repeat([0, 1, 2, 3], [90, 10, 5, 95])
    assert np.array_equal(critical.critical(groups, groups // 2), np.isin(groups, [1, 2]))


def test_entropy_of_eight_equal_clusters_is_three_bits() -> None:
    assert critical.entropy(np.zeros((2, 8)), 1.0) == pytest.approx([3, 3])
    assert critical.entropy(np.array([[50.0, 0, 0, 0]]), 1.0)[0] < 1e-6


def test_a_higher_temperature_raises_the_entropy_and_flattens_the_loss() -> None:
    logits, cluster = RNG.normal(size=(20, 8)) * 3, RNG.integers(0, 8, 20)
    entropies = [critical.entropy(logits, t).mean() for t in critical.TEMPERATURES]
    assert entropies == sorted(entropies)
    assert critical.loss(logits, cluster, 1e6) == pytest.approx(np.log(8), rel=1e-4)


def test_clusters_that_lie_apart_are_predicted_class_by_class() -> None:
    cluster, y = np.tile(np.arange(4), 30), np.repeat([0, 1], 60)
    features = (np.eye(4)[cluster] * 5 + RNG.normal(size=(120, 4)) * 0.1).astype(np.float32)
    logits = critical.cluster_logits(features, y, cluster)
    assert (logits.argmax(1) == cluster).all()
    assert np.isfinite(critical.entropy(logits, 0.25)).all()


# ------------------------------------------------------------------------------------------------------ separability


def test_features_tell_apart_what_they_were_made_of() -> None:
    labels, noise = RNG.integers(0, 2, 200), RNG.integers(0, 2, 200)
    features = RNG.normal(size=(200, 6)).astype(np.float32)
    features[:, 0] += 8 * labels
    told, untold = separability.scores(features, labels), separability.scores(features, noise)
    assert told["probe"] is not None
    assert untold["probe"] is not None
    assert told["silhouette"] is not None
    assert untold["silhouette"] is not None
    assert told["probe"] > 0.98 > 0.65 > untold["probe"]
    assert told["silhouette"] > 0.1 > abs(untold["silhouette"])


@pytest.mark.parametrize("labels", [[0] * 20, [0] * 18 + [1] * 2])
def test_one_value_or_too_few_of_one_have_no_score(labels: list[int]) -> None:
    found = separability.scores(RNG.normal(size=(20, 3)).astype(np.float32), np.array(labels))
    assert found == {"silhouette": None, "probe": None}


def test_a_projection_is_the_same_every_time() -> None:
    features = RNG.normal(size=(30, 8)).astype(np.float32)
    plane = separability.project(features)
    assert plane.shape == (30, 2)
    assert np.array_equal(plane, separability.project(features))


# ---------------------------------------------------------------------------------------------------------- pictures


def test_relevance_for_is_red_and_against_is_blue() -> None:
    picture = gallery.signed(np.zeros((2, 2, 3), np.uint8), np.array([[1, -1], [0, 0]], np.float32))
    assert picture[0, 0, 0] > picture[0, 0, 2]
    assert picture[0, 1, 2] > picture[0, 1, 0]
    assert (picture[1] == 255).all()


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.full((2, 2), 3.0)])
def test_a_flat_map_colours_nothing(values: np.ndarray) -> None:
    grey = np.full((2, 2, 3), 90, np.uint8)
    assert (gallery.heat(grey, values.astype(np.float32)) == grey).all()


# ------------------------------------------------------------------------------------------------------------- heads


def predictor(head: nn.Module | None) -> Predictor:
    model = Backbone("toy", nn.Identity(), nn.Flatten(1), nn.Linear(6, 2), grad_cam="closed")
    return Predictor(Checkpoint(model), Choice("val-wga"), head)


def test_a_head_on_standardised_features_becomes_one_on_features() -> None:
    features = RNG.normal(3, 2, size=(40, 6)).astype(np.float32)
    weight = np.stack([np.zeros(6), RNG.normal(size=6)]).astype(np.float32)
    head = StandardisedLinear(Scaler.fit(features), weight, np.array([0, -1], np.float32))
    made = predictor(head)
    model = look.explained(made)
    x = torch.from_numpy(features)
    assert torch.allclose(model(x[:, :, None, None]).softmax(1), head(x).softmax(1), atol=1e-5)
    assert (model.head.weight.abs().sum(1) > 0).all()  # a zero row would have empty maps
    assert made.checkpoint.model.head is not model.head


def test_a_head_that_is_not_linear_is_refused() -> None:
    with pytest.raises(UserError, match="only linear heads"):
        look.explained(predictor(nn.Sequential(nn.Linear(6, 2), nn.ReLU())))


@pytest.mark.parametrize("run", ["", "xyz", "12", "no/such.json"])
def test_what_names_no_run_is_refused(run: str) -> None:
    with pytest.raises(UserError):
        look.find_record(run)
