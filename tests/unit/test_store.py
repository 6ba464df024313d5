"""The uint8 store, and the embedded dataset in it."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worstgroup.benchmark.errors import CorruptFile, MissingData, UserError
from worstgroup.benchmark.home import TEMPORARY, data_home
from worstgroup.benchmark.planning import make_dataset
from worstgroup.benchmark.registry import DATASETS
from worstgroup.benchmark.spec import SPLITS, Card
from worstgroup.benchmark.store import Dataset, Split, Store, check_counts, open_store

pytestmark = pytest.mark.usefixtures("tiny")

FINGERPRINTS = {"digits2": "00a2bb86e35d895a", "digits2:balval": "a30f4cb1e9f6dbdf"}
"""Pixels and labels of the embedded dataset: these change only together with its `version`, and then on purpose."""


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of `tiny` and its variants in the order in which they were loaded."""
    cls, seen = DATASETS["tiny"].cls, []
    load = cls.load

    def counted(self: Any, root: Path | None) -> Any:
        seen.append(self.card.name)
        return load(self, root)

    monkeypatch.setattr(cls, "load", counted)
    return seen


def open_tiny(name: str = "tiny") -> Store:
    return open_store(*make_dataset(name))


def folders() -> list[Path]:
    """What lies in the store folder, hidden things included."""
    folder = data_home() / "store"
    return sorted(folder.iterdir()) if folder.exists() else []


# ---------------------------------------------------------------------------------------------------------- building


def test_the_second_opening_loads_nothing(loads: list[str]) -> None:
    first, second = open_tiny(), open_tiny()
    assert loads == ["tiny"]
    assert first == second
    assert folders() == [first.path]


def test_the_store_gives_back_what_was_loaded(loads: list[str]) -> None:
    dataset, card = make_dataset("tiny")
    expected = dataset.load(None)
    store = open_store(dataset, card)
    for name in SPLITS:
        split = store.split(name)
        assert np.array_equal(split.images[:], expected[name].images[:])
        assert split.images[:1].dtype == np.uint8
        assert np.array_equal(split.y, expected[name].y)
        assert np.array_equal(split.a, expected[name].a)
        assert np.array_equal(split.units(), np.arange(len(split.y)))


def test_a_write_into_the_mapped_images_does_not_reach_the_disk() -> None:
    store = open_tiny()
    images: Any = store.split("val").images
    before = images[:].copy()
    images[:] = 0
    assert np.array_equal(store.split("val").images[:], before)


def test_fingerprint_is_that_of_the_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loads: list[str]) -> None:
    first = open_tiny().fingerprint
    assert open_tiny("tinyvariants:secret").fingerprint == first  # another card, the same pixels and labels
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "elsewhere"))
    assert open_tiny().fingerprint == first
    assert loads == ["tiny", "tinyvariants:secret", "tiny"]


@pytest.mark.parametrize("part", ["images", "y", "a", "unit"])
def test_fingerprint_changes_with_a_single_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str) -> None:
    dataset, card = make_dataset("tiny")
    card = replace(card, counts={})
    first = open_store(dataset, card).fingerprint
    splits = dataset.load(None)
    images, labels = np.array(splits["test"].images[:]), {"y": splits["test"].y, "a": splits["test"].a}
    labels["unit"] = splits["test"].units().copy()
    (images if part == "images" else labels[part]).flat[-1] ^= 1
    splits["test"] = Split(images, labels["y"], labels["a"], labels["unit"])
    monkeypatch.setattr(dataset, "load", lambda root: splits)
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "elsewhere"))
    assert open_store(dataset, card).fingerprint != first


def test_other_sources_make_another_store(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, card = make_dataset("tiny")
    first = open_store(dataset, card)
    monkeypatch.setattr(dataset, "source_key", lambda root: "tiny, version 2")
    second = open_store(dataset, card)
    assert first.path != second.path
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("error", [MissingData("put it there"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_failing_load_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    dataset, card = make_dataset("tiny")

    def fail(root: Path | None) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "load", fail)
        with pytest.raises(type(error)):
            open_store(dataset, card)
    assert folders() == []
    assert open_store(dataset, card).split("val").y.shape == (48,)


class Breaking:
    """An image source whose second chunk cannot be read."""

    def __init__(self, images: np.ndarray, error: Exception) -> None:
        self.images, self.error = images, error

    def __len__(self) -> int:
        return 2 * 4096

    def __getitem__(self, index: slice) -> np.ndarray:
        if index.start:
            raise self.error
        return np.resize(self.images, (4096, *self.images.shape[1:]))


@pytest.mark.parametrize(
    ("error", "says"), [(ValueError("broken JPEG"), "broken JPEG"), (OSError(28, "No space"), "no space left")]
)
def test_a_failing_image_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    dataset, card = make_dataset("tiny")
    splits = dataset.load(None)
    splits["val"] = replace(splits["val"], images=Breaking(np.asarray(splits["val"].images), error))
    monkeypatch.setattr(dataset, "load", lambda root: splits)
    with pytest.raises((ValueError, UserError), match=says):
        open_store(dataset, card)
    assert folders() == []


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(CorruptFile) as error:
        open_tiny("tinyvariants:miscounted")
    assert "tinyvariants:miscounted: the val split has group counts (12, 5, 5, 2, 2, 5, 5, 12)" in str(error.value)
    assert "the card says (48, 0, 0, 0, 0, 0, 0, 0)" in str(error.value)
    assert folders() == []


def test_a_label_beyond_the_card_is_refused() -> None:
    dataset, card = make_dataset("tiny")
    splits = dataset.load(None)
    splits["train"].y[0] = 2
    with pytest.raises(CorruptFile, match="train"):
        check_counts(card, splits)


def test_threads_that_open_at_once_build_once(loads: list[str]) -> None:
    found: list[Store] = []
    threads = [threading.Thread(target=lambda: found.append(open_tiny())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert loads == ["tiny"]


# ----------------------------------------------------------------------------------------------------------- damage


def test_a_store_in_the_making_is_not_used(loads: list[str]) -> None:
    """What a killed process leaves: a temporary folder. The next one builds its own."""
    path = open_tiny().path
    path.rename(path.with_name(f"{TEMPORARY}{path.name}-1-abcd"))
    assert open_tiny().path == path
    assert loads == ["tiny", "tiny"]


def test_a_store_without_a_manifest_is_built_again(loads: list[str]) -> None:
    store = open_tiny()
    (store.path / "manifest.json").unlink()
    assert open_tiny() == store
    assert loads == ["tiny", "tiny"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "truncated": truncate,
    "not JSON": lambda path: path.write_text("<html>"),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[]"),
    "an empty object": lambda path: path.write_text("{}"),
    "no fingerprint": lambda path: path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "fingerprint"})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_named(damage: str) -> None:
    path = open_tiny().path
    DAMAGES[damage](path / "manifest.json")
    with pytest.raises(CorruptFile, match="manifest") as error:
        open_tiny()
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["val.images.npy", "test.labels.npz"])
def test_a_missing_file_is_named(name: str) -> None:
    path = open_tiny().path
    (path / name).unlink()
    with pytest.raises(CorruptFile, match=name) as error:
        open_tiny()
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["val.images.npy", "val.labels.npz"])
def test_a_truncated_file_is_named(name: str) -> None:
    store = open_tiny()
    truncate(store.path / name)
    with pytest.raises(CorruptFile, match=name):
        open_tiny().split("val")


# ----------------------------------------------------------------------------------------------------------- digits2


def digits2(name: str) -> tuple[Dataset, Card]:
    return make_dataset(name)


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_the_embedded_pixels_are_the_same_everywhere(name: str) -> None:
    assert open_store(*digits2(name)).fingerprint == FINGERPRINTS[name]


def test_the_tiny_pixels_are_the_same_everywhere() -> None:
    assert open_tiny().fingerprint == "37a0e594d376c6b4"


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_every_test_digit_stands_on_both_backgrounds_with_both_objects(name: str) -> None:
    test = digits2(name)[0].load(None)["test"]
    cells: dict[int, list[tuple[int, ...]]] = {}
    for unit, y, a in zip(test.units(), test.y, test.a, strict=True):
        cells.setdefault(int(unit), []).append((int(y), *map(int, a)))
    assert len(cells) == 447
    for found in cells.values():
        y = found[0][0]
        assert sorted(found) == [(y, 0, 0), (y, 0, 1), (y, 1, 0), (y, 1, 1)]


@pytest.mark.parametrize(("name", "share"), [("digits2", 0.83), ("digits2:balval", 0.5)])
def test_the_shortcuts_agree_with_the_class_as_often_as_the_card_says(name: str, share: float) -> None:
    dataset, card = digits2(name)
    splits = dataset.load(None)
    for split, expected in ((splits["train"], 0.83), (splits["val"], share), (splits["test"], 0.5)):
        for j, attribute in enumerate(card.attributes):
            aligned = split.a[:, j] == np.array(attribute.aligned)[split.y]
            noise = (expected * (1 - expected) / len(aligned)) ** 0.5
            assert abs(aligned.mean() - expected) < 3.5 * noise
    assert {attribute.train_ratio for attribute in card.attributes} == {0.83}
    both = (splits["train"].a == splits["train"].y[:, None]).all(1).mean()
    assert both == pytest.approx(0.83**2, abs=0.04)  # the two shortcuts are independent


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_no_digit_is_in_two_splits(name: str) -> None:
    splits = digits2(name)[0].load(None)
    units = [set(splits[part].units().tolist()) for part in SPLITS]
    assert [len(part) for part in units] == [900, 450, 447]
    assert len(set.union(*units)) == 1797
    for part in SPLITS:  # a digit keeps its class
        labels = {(int(u), int(y)) for u, y in zip(splits[part].units(), splits[part].y, strict=True)}
        assert len(labels) == len(set(splits[part].units().tolist()))


def test_the_variants_share_train_and_test() -> None:
    plain, balanced = (digits2(name)[0].load(None) for name in FINGERPRINTS)
    for part, same in (("train", True), ("test", True), ("val", False)):
        assert np.array_equal(plain[part].images[:], balanced[part].images[:]) is same
        assert np.array_equal(plain[part].a, balanced[part].a) is same


def test_shortcuts_are_visible_in_the_pixels() -> None:
    """Stripes along rows vary down the picture and not across it."""
    test = digits2("digits2")[0].load(None)["test"]
    images = np.asarray(test.images[:200], dtype=float).mean(-1)
    down, across = images.mean(2).std(1), images.mean(1).std(1)
    assert ((down > across) == (test.a[:200, 0] == 0)).mean() > 0.9
