"""Precomputed features: three formats, the card that is read from them, and training on them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from formats.embeddings import COUNTS, Arrays, draw, write_npz
from safetensors.numpy import save_file
from worstgroup.benchmark.backbones import check_backbone, normalization
from worstgroup.benchmark.data import Joined, Pixels
from worstgroup.benchmark.errors import CorruptFile, MissingData, UserError
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.planning import Request, make_dataset, plan
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import SPLITS, Card
from worstgroup.benchmark.store import Store, check_counts, open_store
from worstgroup.datasets import arrays, embeddings

if TYPE_CHECKING:
    from helpers import Call

CPU = torch.device("cpu")


def cards(root: Path | None, name: str = "embeddings") -> Card:
    return make_dataset(name, root)[1]


def opened(root: Path, name: str = "embeddings") -> Store:
    return open_store(*make_dataset(name, root), root)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "drawn.npz")


def write_frame(path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """A table as pandas would read it; what writes and reads real .parquet need not be installed."""
    drawn = draw()
    columns: dict[str, Any] = {f"f{i}": drawn["features"][:, i] for i in range(drawn["features"].shape[1])}
    columns |= {"y": np.array(["cat", "dog"])[drawn["y"]], "split": np.array(SPLITS)[drawn["split"]]}
    columns |= {"place": drawn["a"], **changes}
    frame = pd.DataFrame({name: column for name, column in columns.items() if column is not None})
    path.write_bytes(b"PAR1")
    monkeypatch.setattr(arrays.pd, "read_parquet", lambda path, engine: frame)
    return path


# ------------------------------------------------------------------------------------------------------------ formats


def test_the_card_is_read_from_the_file(file: Path) -> None:
    dataset, card = make_dataset("embeddings", file)
    drawn = draw()
    train = drawn["features"][drawn["split"] == 0]
    assert (card.name, card.backbone, card.dtype, card.image) == ("embeddings:drawn", "identity", "float32", (1, 1, 6))
    assert (card.classes, card.attributes[0].values) == (("0", "1"), ("0", "1"))
    assert (card.attributes[0].name, card.attributes[0].aligned) == ("attribute", (0, 1))
    assert card.counts == COUNTS
    assert card.share_labels
    assert np.allclose(card.mean, train.mean(0), atol=1e-6)
    assert np.allclose(card.std, np.where(np.arange(6) == 2, 1, train.std(0)), atol=1e-6)
    check_counts(card, dataset.load(file))
    model = check_backbone(card.backbone, card, card.weights)
    assert normalization(model, card) == (card.mean, card.std)


def as_safetensors(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_file({name: np.ascontiguousarray(array) for name, array in draw().items()}, path)
    return path


def as_parquet(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_frame(path, monkeypatch)


def as_lists(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    features = {f"f{i}": None for i in range(6)} | {"features": list(draw()["features"])}
    return write_frame(path, monkeypatch, **features)


def as_real_parquet(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("pyarrow")
    drawn = draw()
    place = np.array(["grass", "sofa"])[drawn["a"]]
    frame = pd.DataFrame(
        {"features": list(drawn["features"]), "y": drawn["y"], "place": place, "split": drawn["split"]}
    )
    frame.to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("end", "write"),
    [("safetensors", as_safetensors), ("parquet", as_parquet), ("parquet", as_lists), ("parquet", as_real_parquet)],
)
def test_every_format_gives_what_npz_gives(
    file: Path, end: str, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write(file.with_name(f"other.{end}"), monkeypatch)
    (first, card), (second, found) = make_dataset("embeddings", file), make_dataset("embeddings", other)
    assert found.name == "embeddings:other"
    assert (found.counts, found.mean, found.std) == (card.counts, card.mean, card.std)
    if end == "parquet":
        assert found.attributes[0].name == "place"
    for name in SPLITS:
        one, two = first.load(file)[name], second.load(other)[name]
        assert np.array_equal(one.images[:], two.images[:])
        for part in ("y", "a", "rows"):
            assert np.array_equal(getattr(one, part), getattr(two, part))


def test_without_pyarrow_a_parquet_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"x.parquet: reading .parquet needs pyarrow: `pip install worstgroup"):
        cards(tmp_path / "x.parquet")


def test_names_come_from_the_file(tmp_path: Path) -> None:
    drawn = draw()
    a = np.stack([drawn["a"], np.arange(len(drawn["y"])) % 3], axis=1)
    named = {
        "classes": np.array(["wolf", "dog"]),
        "attribute_names": np.array(["place", "camera"]),
        "values_0": np.array(["snow", "grass"]),
    }
    card = cards(write_npz(tmp_path / "x.npz", a=a, **named))
    assert card.classes == ("wolf", "dog")
    assert [(attribute.name, attribute.values) for attribute in card.attributes] == [
        ("place", ("snow", "grass")),
        ("camera", ("0", "1", "2")),
    ]
    assert [tuple(np.reshape(card.counts[s], (4, 3)).sum(1)) for s in SPLITS] == [COUNTS[s] for s in SPLITS]


def test_labels_may_be_names_and_classes_give_their_order(tmp_path: Path) -> None:
    names, splits = np.array(["wolf", "dog"])[draw()["y"]], np.array(["train", "valid", "test"])[draw()["split"]]
    card = cards(write_npz(tmp_path / "x.npz", y=names, split=splits))
    assert card.classes == ("dog", "wolf")
    assert card.counts["train"] == (6, 40, 40, 6)
    assert cards(write_npz(tmp_path / "y.npz", y=names, classes=np.array(["wolf", "dog"]))).counts == COUNTS


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_features_of_other_precision_become_float32(tmp_path: Path, kind: type[Any]) -> None:
    path = write_npz(tmp_path / "x.npz", features=draw()["features"].astype(kind), y=draw()["y"].astype(np.float64))
    images = make_dataset("embeddings", path)[0].load(path)["test"].images[:]
    assert images.dtype == np.float32
    assert np.array_equal(images[:, 0, 0], draw()["features"].astype(kind).astype(np.float32))


# ------------------------------------------------------------------------------------------------------------ finding


def test_a_root_is_the_file_or_a_folder_with_one(file: Path) -> None:
    (file.parent / "notes.txt").write_text("")
    assert cards(file.parent).name == "embeddings:drawn"
    write_npz(file.with_name("two.npz"))
    with pytest.raises(UserError, match=r"holds drawn.npz, two.npz; name one of them"):
        cards(file.parent)
    assert cards(file.parent, "embeddings:two").name == "embeddings:two"
    assert opened(file).card.name == "embeddings:drawn"


def test_a_file_of_the_data_home_is_found_by_its_name() -> None:
    write_npz(data_home() / "embeddings" / "a.b.npz")
    assert cards(None, "embeddings:a-b").name == "embeddings:a-b"


def test_nothing_there_says_what_a_file_holds(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("")
    for root in (None, tmp_path, tmp_path / "x.csv", tmp_path / "gone.npz"):
        with pytest.raises(MissingData, match=r"arrays features \(n, d\), y \(n,\)"):
            cards(root)
    with pytest.raises(UserError, match="a name has letters"):
        cards(None, "embeddings:../x")


def test_there_is_no_picture_to_transform(file: Path) -> None:
    with pytest.raises(UserError, match=r"has no data.transform and no data.size"):
        make_dataset("embeddings", file, {"size": "8"})


def test_ls_and_show_explain_the_formats(call: "Call") -> None:
    assert any(line.startswith("│ embeddings ") for line in call("ls", "datasets").out.splitlines())
    shown = call("show", "embeddings")
    assert (shown.code, shown.err) == (0, "")
    for text in ("features (n, d)", "f0, f1", "--dataset embeddings --root FILE", "identity"):
        assert text in shown.out


# ----------------------------------------------------------------------------------------------------------- mistakes


def bad(name: str, row: int, value: Any) -> Arrays:
    array = draw()[name].copy()
    array[row] = value
    return {name: array}


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "nan": (lambda: bad("features", 7, np.nan), r"row 7: its features are not finite \(1 such rows\)"),
    "inf": (lambda: bad("features", 3, np.inf), "row 3: its features are not finite"),
    "too large": (lambda: {"features": draw()["features"].astype(float) * 1e39}, "row 0: its features are not finite"),
    "axes": (lambda: {"features": draw()["features"][:, :, None]}, r"features must be numbers of shape \(n, d\)"),
    "no rows": (lambda: {"features": np.empty((0, 6), np.float32)}, "features must be numbers"),
    "fewer y": (lambda: {"y": draw()["y"][1:]}, r"y has shape \(159,\), features has 160 rows"),
    "fewer a": (lambda: {"a": draw()["a"][1:]}, r"a has shape \(159, 1\), features has 160 rows"),
    "y axes": (lambda: {"y": draw()["y"][:, None]}, r"y has shape \(160, 1\)"),
    "scalar": (lambda: {"split": np.array(0)}, r"split has shape \(\)"),
    "no split": (lambda: {"split": None}, "lacks split; it has features, y, a"),
    "unknown split": (lambda: bad("split", 5, 3), "row 5: split is '3', it must be one of train"),
    "negative y": (lambda: bad("y", 5, -1), "row 5: y is '-1', it must be a name or a number from 0"),
    "negative a": (lambda: bad("a", 9, -1), "row 9: attribute is '-1'"),
    "huge": (lambda: {"y": draw()["y"] * 1e30}, r"y is 1e\+30, it must be a name or a whole number"),
    "half": (lambda: {"y": draw()["y"] / 2}, r"y is 0.5, it must be a name or a whole number"),
    "outside": (lambda: {"classes": np.array(["cat"])}, "y is 1, the file names 1: cat"),
    "one name": (lambda: {"classes": np.array("ab")}, "classes must be names in an array of text"),
    "number of classes": (lambda: {"classes": np.array(2)}, "classes must be names in an array of text"),
    "bytes": (lambda: {"values_0": np.array([b"a", b"b"])}, "values_0 must be names in an array of text"),
    "nameless": (lambda: {"attribute_names": np.array([" "])}, "attribute_names must be names in an array of text"),
    "same names": (lambda: {"classes": np.array(["cat", "cat"])}, "two names of y are the same"),
    "unused class": (lambda: {"classes": np.array(["a", "b", "c"])}, "class 'c' never occurs in train"),
    "one value": (lambda: {"a": draw()["a"] * 0}, "attribute attribute has one value only"),
    "one class": (lambda: {"y": draw()["y"] * 0}, "has one class only"),
    "attribute names": (lambda: {"attribute_names": np.array(["p", "q"])}, "1 attributes in a and 2 attribute_names"),
    "comma": (lambda: {"attribute_names": np.array(["p,q"])}, "'p,q' is no name of an attribute"),
    "empty split": (lambda: {"split": np.minimum(draw()["split"], 1)}, "the test split is empty"),
    "objects": (lambda: {"y": draw()["y"].astype(object)}, "cannot be read as .npz: ValueError: Object arrays"),
    "aligned": (lambda: {"aligned": np.array([[0, 2]])}, "aligned must number a value of each class"),
    "share": (
        lambda: {"aligned": np.array([[0, 1]]), "train_ratio": np.array([9.0])},
        "train_ratio must be 1 numbers from 0 to 1",
    ),
    "unit": (lambda: {"unit": draw()["y"] / 2}, "unit must hold whole numbers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused(tmp_path: Path, name: str) -> None:
    changes, says = WRONG[name]
    path = write_npz(tmp_path / "x.npz", **changes())
    with pytest.raises(CorruptFile, match=says) as error:
        cards(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no file of this kind", b"PK\x03\x04 truncated"])
def test_a_foreign_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptFile, match=f"{name}: cannot be read as"):
        cards(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"f3": None}, "f0, f1, ... without a gap"),
        ({"features": 1.0}, "either one column called so or f0"),
        ({"place": None}, "lacks a; it has"),
        ({"y": None}, "lacks y; it has"),
        ({"place": [None] * 3 + [1.0] * 157}, "row 0: place is empty"),
        ({f"f{i}": None for i in range(6)} | {"features": [[1.0]] * 159 + [[1.0, 2.0]]}, "cannot be read as .parquet"),
    ],
)
def test_a_wrong_parquet_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CorruptFile, match=says):
        cards(write_frame(tmp_path / "x.parquet", monkeypatch, **changes))


# ----------------------------------------------------------------------------------------------------------- training


def test_batches_are_the_standardised_features(file: Path) -> None:
    store, drawn = opened(file), draw()
    split = store.split("train")
    assert split.images[:1].dtype == np.float32
    pixels = Pixels(split.images, split.y, store.card.mean, store.card.std, CPU, rows=split.rows)
    features = drawn["features"][drawn["split"] == 0]
    varies = np.arange(6) != 2
    for found in (pixels, Joined([(pixels, np.arange(len(features)))])):
        x = found.batch(torch.arange(len(features))).x
        assert x.shape == (len(features), 6, 1, 1)
        expected = (features - features.mean(0)) / np.where(varies, features.std(0), 1)
        assert torch.allclose(x[:, :, 0, 0], torch.from_numpy(expected), atol=1e-5)
        assert not x[:, 2].any()  # a constant dimension is zero, not noise blown up
    assert np.array_equal(split.images[:][:, 0, 0][split.image_rows()], features)  # batches left the store as it was


def test_methods_run_on_a_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], embeddings.read
    monkeypatch.setattr(embeddings, "read", lambda path: reads.append(path) or read(path))  # type: ignore[func-returns-value]
    settings = {"recipe.epochs": "20", "recipe.lr": "0.01", "recipe.batch_size": "16"}
    requests = [Request("embeddings", name, seeds=(0,), settings=settings) for name in ("erm", "groupdro", "dfr")]
    made = plan(requests, file)
    assert reads == [file, file]  # for the card and for the store, however many runs there are
    records = {}
    for planned in made.runs:
        assert planned.spec is not None
        records[planned.spec.method] = run_spec(planned.spec, made.stores["embeddings:drawn"])
    for record in records.values():
        assert record.status == "finished"
        assert (record.dataset, record.backbone) == ("embeddings:drawn", "identity")
        assert [group.m_test for group in record.groups] == list(COUNTS["test"])
    assert records["erm"].metrics["wga"] < 0.5 < records["dfr"].metrics["wga"]


def test_another_backbone_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match=r"resnet18 needs|channels|images"):
        plan([Request("embeddings", "erm", backbone="resnet18", weights="imagenet1k_v1")], file)
