"""UrbanCars: its cards, and the tree of the authors' generator."""

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.urbancars import (
    BALANCED,
    BIASED,
    EVAL,
    cell_folder,
    color,
    write_split,
    write_urbancars,
)
from worstgroup.benchmark import metrics
from worstgroup.benchmark.errors import CorruptFile, MissingData
from worstgroup.benchmark.planning import make_dataset
from worstgroup.benchmark.registry import DATASETS
from worstgroup.benchmark.spec import SPLITS
from worstgroup.benchmark.store import Splits, check_counts, open_store
from worstgroup.datasets.urbancars import UrbanCars, cell_counts

CARDS = DATASETS["urbancars"].cards
ALL = (20, 3, 3, 1, 1, 3, 3, 20)
"""Counts of the drawn train split in group order."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official tree, drawn; read only. Its parent is what Whac-A-Mole calls the root."""
    return write_urbancars(tmp_path_factory.mktemp("drawn"))


def load(variant: str, root: Path) -> Splits:
    return UrbanCars(CARDS[variant]).load(root)


def count(splits: Splits, name: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    group = metrics.group_index(splits[name].y, splits[name].a, shape)
    return tuple(np.bincount(group, minlength=int(np.prod(shape))))


# ------------------------------------------------------------------------------------------------------------- cards


def test_counts_of_the_cards() -> None:
    both = (3610, 190, 190, 10, 10, 190, 190, 3610)
    assert CARDS[""].counts == {"train": both, "val": (125,) * 8, "test": (125,) * 8}
    assert CARDS["built"].counts == CARDS[""].counts
    for variant in ("bg", "coobj"):
        assert CARDS[variant].counts == {"train": (3800, 200, 200, 3800), "val": (250,) * 4, "test": (250,) * 4}
    assert CARDS["val95"].counts == {**CARDS[""].counts, "val": (451, 23, 23, 1, 1, 23, 23, 451)}
    assert CARDS["bg-only"].counts["train"] == (1900, 1900, 100, 100, 100, 100, 1900, 1900)
    assert CARDS["coobj-only"].counts["train"] == (1900, 100, 1900, 100, 100, 1900, 100, 1900)
    assert all(card.counts["test"] in {(125,) * 8, (250,) * 4} for card in CARDS.values())


def test_cells_are_rounded_down_as_by_the_generator() -> None:
    assert sum(cell_counts(500, (0.95, 0.95))) == 996  # 23.75 becomes 23, so 500 to a class are not reached
    assert cell_counts(4000, (0.95, 0.95))[0] == 3610  # though 4000 * 0.95 * 0.95 is a little less in floats


@pytest.mark.parametrize("variant", CARDS)
def test_cards_name_attributes_and_train_ratios(variant: str) -> None:
    card = CARDS[variant]
    expected = {"background": 0.95, "object": 0.95}
    if variant in {"bg", "coobj"}:
        del expected[{"bg": "object", "coobj": "background"}[variant]]
    elif variant.partition("-")[0] == "bg" or variant == "built-bg":
        expected["object"] = 0.5
    elif variant.partition("-")[0] == "coobj" or variant == "built-coobj":
        expected["background"] = 0.5
    assert {attribute.name: attribute.train_ratio for attribute in card.attributes} == expected
    shape = card.shape
    for j, attribute in enumerate(card.attributes):  # the declared share is that of the counts
        cells = np.reshape(card.counts["train"], shape)
        aligned = sum(cells[(y, *(slice(None),) * j, y)].sum() for y in (0, 1))
        assert aligned / cells.sum() == pytest.approx(attribute.train_ratio)
    assert card.adaptable == (not variant.startswith("built"))
    assert card.by_hand
    assert not card.sources


def test_gaps_are_those_of_the_paper() -> None:
    """Formulas of Whac-A-Mole on made-up accuracies: A(v) is the mean of the two classes, weights are train ratios."""
    card, total = CARDS[""], np.full(8, 1000)
    correct = np.array([990, 820, 860, 250, 350, 840, 780, 970])
    urban, country = correct[:4] / 1000, correct[4:] / 1000
    a11, a10 = (urban[0] + country[3]) / 2, (urban[1] + country[2]) / 2
    a01, a00 = (urban[2] + country[1]) / 2, (urban[3] + country[0]) / 2
    id_acc = 0.9025 * a11 + 0.0475 * a01 + 0.0475 * a10 + 0.0025 * a00
    values = metrics.evaluate(correct, total, np.array(card.counts["train"]), card.shape, card.attributes)
    assert values["id_acc"] == pytest.approx(id_acc)
    assert values["gap_background"] == pytest.approx(a01 - id_acc)
    assert values["gap_object"] == pytest.approx(a10 - id_acc)
    assert values["gap_all"] == pytest.approx(a00 - id_acc)


# -------------------------------------------------------------------------------------------------------------- tree


def test_pictures_have_the_labels_of_their_folders(tree: Path) -> None:
    splits = load("", tree)
    assert {name: count(splits, name, (2, 2, 2)) for name in SPLITS} == {
        "train": ALL,
        "val": (3,) * 8,
        "test": (3,) * 8,
    }
    for split in splits.values():
        seen: dict[tuple[int, ...], int] = {}
        for image, y, a in zip(split.images[:], split.y, split.a, strict=True):
            cell = (int(y), *map(int, a))
            expected = color(*cell, seen.get(cell, 0))  # the order within a cell is that of the numbers
            seen[cell] = seen.get(cell, 0) + 1
            assert np.abs(image[100, 100].astype(int) - expected).max() < 6


def test_the_folder_or_its_parent_is_the_root(tree: Path, home: Path) -> None:
    assert count(load("", tree.parent), "train", (2, 2, 2)) == ALL
    (home / "data").mkdir(parents=True)
    (home / "data/urbancars").symlink_to(tree)
    assert count(UrbanCars(CARDS[""]).load(None), "train", (2, 2, 2)) == ALL


def test_the_regrouped_variants_show_the_same_pictures(tree: Path) -> None:
    """ExMap's (BG) and (CoObj) are no other pictures: they share the decoded pools."""
    stores = {variant: open_store(*make_dataset(CARDS[variant].name, tree), tree) for variant in ("", "bg", "coobj")}
    assert stores[""].pools == stores["bg"].pools == stores["coobj"].pools
    assert len({store.fingerprint for store in stores.values()}) == 3
    both = stores[""].split("train")
    for j, variant in enumerate(("bg", "coobj")):
        split = stores[variant].split("train")
        assert np.array_equal(split.a[:, 0], both.a[:, j])
        assert np.array_equal(split.y, both.y)
        assert stores[variant].card.counts["train"] == (23, 4, 4, 23)


def test_other_counts_make_a_dataset_of_their_own(tree: Path) -> None:
    store = open_store(*make_dataset("urbancars", tree), tree)
    assert store.card.name == "urbancars[custom]"
    assert store.card.counts["train"] == ALL
    with pytest.raises(CorruptFile, match="not the official ones"):
        open_store(*make_dataset("urbancars", tree), tree, strict=True)


def test_the_official_counts_keep_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full size in labels; the pictures are empty files, as nothing decodes them."""
    for tree, counts in (
        (f"{BIASED}/train", (3610, 190, 190, 10)),
        *((f"{BALANCED}/{s}", (125,) * 4) for s in SPLITS[1:]),
    ):
        for y, background, thing in product((0, 1), repeat=3):
            folder = tmp_path / tree / cell_folder(y, background, thing)
            folder.mkdir(parents=True)
            for n in range(counts[2 * (background != y) + (thing != y)]):
                (folder / f"{n:03d}.jpg").touch()
    splits = load("", tmp_path)
    check_counts(CARDS[""], splits)
    files = [path.name for (path,) in splits["train"].images.files[:3610]]  # type: ignore[attr-defined]
    assert files[998:1002] == ["998.jpg", "999.jpg", "1000.jpg", "1001.jpg"]
    monkeypatch.setattr(Path, "iterdir", reverse_of(Path.iterdir))
    again = [path.name for (path,) in load("", tmp_path)["train"].images.files[:3610]]  # type: ignore[attr-defined]
    assert again == files
    shutil.rmtree(tmp_path)


def reverse_of(listing: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A file system that lists its folders the other way round."""
    return lambda path: sorted(listing(path), reverse=True)


def test_masks_and_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    root = write_urbancars(tmp_path, masks=True)
    cell = root / BIASED / "train" / cell_folder(0, 0, 0)
    assert len(list(cell.iterdir())) == 4 * 20
    (cell / "._000.jpg").touch()
    (root / BIASED / "train" / "logs").mkdir()
    assert count(load("", root), "train", (2, 2, 2)) == ALL


def test_val95_validates_on_the_biased_folder(tmp_path: Path) -> None:
    root = write_urbancars(tmp_path, masks=False)
    with pytest.raises(MissingData) as error:
        load("val95", root)
    assert str(root / BIASED / "val") in str(error.value)
    write_split(root / BIASED / "val", (8, 2, 2, 1), masks=False)
    assert count(load("val95", root), "val", (2, 2, 2)) == (8, 2, 2, 1, 1, 2, 2, 8)
    assert count(load("", root), "val", (2, 2, 2)) == (3,) * 8
    biased, usual = load("val95", root), load("", root)
    assert biased["test"].images.key == usual["test"].images.key  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("variant", "folder"), [("bg-only", "bg-0.95_co_occur_obj-0.5"), ("coobj-only", "bg-0.5_co_occur_obj-0.95")]
)
def test_single_shortcuts_are_other_pictures(tmp_path: Path, variant: str, folder: str) -> None:
    trees = {f"{folder}/train": (7, 6, 2, 1), f"{BALANCED}/val": EVAL, f"{BALANCED}/test": EVAL}
    root = write_urbancars(tmp_path, trees, masks=False)
    splits = load(variant, root)
    assert count(splits, "train", (2, 2, 2)) == (7, 6, 2, 1, 1, 2, 6, 7)
    assert count(splits, "test", (2, 2, 2)) == (3,) * 8
    with pytest.raises(MissingData, match=f"{BIASED}/train"):
        load(variant.removesuffix("-only"), root)


def test_smaller_pictures_are_read_on_request(tree: Path) -> None:
    dataset, card = make_dataset("urbancars", tree, {"size": "64"})
    assert card.name == "urbancars[64px]"
    assert dataset.load(tree)["val"].images[:2].shape == (2, 64, 64, 3)


def test_pictures_of_another_size_are_refused(tmp_path: Path) -> None:
    root = write_urbancars(tmp_path, side=64, masks=False)
    with pytest.raises(CorruptFile, match=r"000\.jpg: is 64x64 px, expected 256x256"):
        load("", root)["val"].images[:1]


@pytest.mark.parametrize("gone", [BIASED, f"{BALANCED}/test", f"{BIASED}/train/{cell_folder(1, 0, 1)}"])
def test_a_missing_folder_is_named(tmp_path: Path, gone: str) -> None:
    root = write_urbancars(tmp_path, masks=False)
    shutil.rmtree(root / gone)
    with pytest.raises(MissingData) as error:
        load("", root)
    assert str(root / gone) in str(error.value)
    assert "facebookresearch/Whac-A-Mole" in str(error.value)


def test_without_any_folder_the_advice_names_those_of_the_variant(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"Put bg-0\.5_co_occur_obj-0\.5 and bg-0\.95_co_occur_obj-0\.5 into"):
        load("bg-only", tmp_path)


def test_strange_names_are_refused(tmp_path: Path) -> None:
    root = write_urbancars(tmp_path, masks=False)
    strange = root / BIASED / "train/obj-urban_bg-desert_co_occur_obj-urban"
    strange.mkdir()
    with pytest.raises(CorruptFile, match="obj-urban_bg-desert_co_occur_obj-urban: is none of the eight"):
        load("", root)
    strange.rmdir()
    (root / BALANCED / "val" / cell_folder(0, 0, 0) / "car.jpg").touch()
    with pytest.raises(CorruptFile, match=r"car\.jpg: pictures are called by a number"):
        load("", root)
