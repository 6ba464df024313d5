"""Export of a dataset's features, which `embeddings` reads back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats.embeddings import write_npz
from worstgroup.benchmark.backbones import build_backbone
from worstgroup.benchmark.data import Pixels
from worstgroup.benchmark.embed import _build, export
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.planning import make_dataset
from worstgroup.benchmark.spec import SPLITS
from worstgroup.benchmark.store import open_store


def test_export_writes_the_features_of_the_stored_pixels(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    out = export("tiny", None, "", "", tmp_path / "x.npz", report=lambda *step: told.append(step))
    store = open_store(*make_dataset("tiny"))
    model = _build(store.card, "tiny_cnn", "none").eval()
    expected = []
    for name in SPLITS:
        pixels = torch.from_numpy(store.split(name).images[:].copy()).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            expected.append(model.features((pixels - 0.5) / 0.25))
    with np.load(out, allow_pickle=False) as file:
        assert np.allclose(file["features"], torch.cat(expected).numpy(), atol=1e-5)
        assert file["features"].dtype == np.float32
    assert told[-1] == ("features of test", 48, 48)


def test_export_is_deterministic_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    one, two = (export("tiny", None, "tiny_cnn", "none", tmp_path / f"{k}.npz").read_bytes() for k in (1, 2))
    assert one == two
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["tiny", "digits2"])
def test_an_exported_dataset_is_the_same_dataset(tmp_path: Path, name: str) -> None:
    out = export(name, None, "", "", tmp_path / f"{name}.npz")
    original, found = open_store(*make_dataset(name)), open_store(*make_dataset("embeddings", out), out)
    assert found.card.name == f"embeddings:{name}"
    assert found.card.title == f"{name}, features of tiny_cnn (weights none)"
    for field in ("classes", "attributes", "counts", "licence", "citation"):
        assert getattr(found.card, field) == getattr(original.card, field)
    for split in SPLITS:
        one, two = original.split(split), found.split(split)
        assert np.array_equal(one.y, two.y)
        assert np.array_equal(one.a, two.a)
        assert np.array_equal(one.units(), two.units())


@pytest.mark.usefixtures("tiny")
def test_a_licence_that_keeps_labels_in_keeps_them_in(tmp_path: Path) -> None:
    for name, shared in (("tinyvariants", True), ("tinyvariants:secret", False)):
        out = export(name, None, "", "", tmp_path / "x.npz")
        assert make_dataset("embeddings", out)[1].share_labels is shared


def test_export_takes_a_weights_file(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = build_backbone("resnet18", num_classes=2).state_dict()
    official = {key.replace("trunk.", "").replace("head.", "fc."): value for key, value in state.items()}
    torch.save(official, tmp_path / "w.pt")
    out = export("tiny", None, "resnet18", str(tmp_path / "w.pt"), tmp_path / "x.npz")
    card = make_dataset("embeddings", out)[1]
    assert card.title == "tiny, features of resnet18 (weights w.pt)"
    assert card.image == (1, 1, 512)
    store = open_store(*make_dataset("tiny"))
    model = build_backbone("resnet18", num_classes=2)
    model.load_state_dict(state)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what these weights want, whatever the card says
    pixels = Pixels(store.split("train").images, store.split("train").y, *imagenet, torch.device("cpu"))
    with torch.no_grad(), np.load(out) as file:
        expected = model.eval().features(pixels.batch(torch.arange(4)).x).numpy()
        assert np.allclose(file["features"][:4], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tiny", None, "", "", Path("x.npy")), "x.npy: features are written as .npz"),
        (("tiny", None, "", "", Path("nowhere/x.npz")), "nowhere/x.npz: there is no such folder"),
        (("tiny", None, "vit", "", Path("x.npz")), "unknown backbone 'vit'"),
        (("tiny", None, "resnet18", "best", Path("x.npz")), "no weights 'best'"),
    ],
)
def test_export_refuses_what_it_cannot_do(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        export(*arguments)


def test_features_are_not_exported_again(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "drawn.npz")
    with pytest.raises(UserError, match="embeddings:drawn holds features already"):
        export("embeddings", file, "", "", file.with_name("y.npz"))
