"""CM-10: generated from MNIST, or read from a folder of LfF's generator."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats.cm10 import NAME, write_published
from formats.idx import write_mnist
from worstgroup.benchmark.errors import CorruptFile, MissingData, UnknownName
from worstgroup.benchmark.planning import make_dataset
from worstgroup.benchmark.registry import DATASETS
from worstgroup.benchmark.spec import SPLITS, Card
from worstgroup.benchmark.store import open_store
from worstgroup.datasets.cm10 import SEVERITIES, SKEWS, cm10, colors_by_position
from worstgroup.datasets.cmnist import ColoredMNIST
from worstgroup.datasets.coloring import Tinted
from worstgroup.datasets.idx import Digits

PUBLISHED = {"": (57_000, 3_000), "-2": (58_801, 1_199), "-1": (59_402, 598), "-0.5": (59_700, 300)}
"""Aligned and other training images of LfF's sets."""
CELLS = {"": (30, 38), "-2": (12, 15), "-1": (6, 8), "-0.5": (3, 4)}


def cells(card: Card, *splits: str) -> np.ndarray:
    """Images per digit and colour (10, 10) of some splits together."""
    return np.sum([np.reshape(card.counts[split], (10, 10)) for split in splits], axis=0)  # type: ignore[index]


def digits(n: int, seed: int = 0) -> Digits:
    """White pictures of all digits in random order."""
    labels = np.random.default_rng(seed).permutation(np.arange(n) % 10).astype(np.uint8)
    return Digits(np.full((n, 28, 28), 255, np.uint8), labels)


# -------------------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize("ending", SKEWS)
def test_cards_have_the_published_counts(ending: str) -> None:
    card = DATASETS["cmnist"].card(f"cm10{ending}")
    train = cells(card, "train", "val")
    aligned = int(np.trace(train))
    assert (aligned, int(train.sum()) - aligned) == PUBLISHED[ending]
    others = train[~np.eye(10, dtype=bool)]
    assert (others.min(), others.max()) == CELLS[ending]
    assert sum(card.counts["val"]) == 5_999
    assert cells(card, "train").min() > 0
    test = cells(card, "test")
    assert (test.sum(), np.trace(test), test.min(), test.max()) == (10_000, 1_000, 89, 114)


@pytest.mark.parametrize("name", ["cmnist", "cfmnist"])
def test_every_ratio_and_severity_has_one_name(name: str) -> None:
    made = {f"cm10{skew}{severity}" for skew in SKEWS for severity in SEVERITIES}
    assert len(made) == 16
    seen = {(card := DATASETS[name].card(v)).name: (card.params["skew"], card.params["severity"]) for v in made}
    assert set(seen) == {f"{name}:{variant}" for variant in made}
    assert len(set(seen.values())) == 16
    assert DATASETS[name].card("cm10-0.5-s2").params["std"] == 0.02
    for spelling in ("cm10-5", "cm10-s4", "cm10-0.1"):
        with pytest.raises(UnknownName):
            DATASETS[name].card(spelling)


# --------------------------------------------------------------------------------------------------------- generation


def test_colors_go_by_position_within_a_class() -> None:
    y = np.tile(np.arange(10), 100)
    color = colors_by_position(y, 0.55)
    assert color[y == 0].tolist() == [0] * 55 + [c for c in range(1, 10) for _ in range(5)]
    assert color[y == 9].tolist() == [c for c in range(9) for _ in range(5)] + [9] * 55
    assert (color == y).mean() == 0.55


def test_cells_of_a_generated_set_are_rounded_borders() -> None:
    """Rounding each share by itself would give 9 x 3 of 30 and lose three images."""
    color = colors_by_position(np.full(30, 2), 0.1)
    assert len(color) == 30
    assert np.bincount(color, minlength=10).sum() == 30
    assert (np.diff(color) >= 0).all()


def test_tints_multiply_and_round_down() -> None:
    grey = np.array([[[0, 255, 101]], [[7, 7, 7]]], np.uint8)
    tints = np.array([[1.0, 0.5, 0.0], [0.999, 0.0, 1.0]])
    source = Tinted(grey, tints)
    assert len(source) == 2
    assert source[:1].tolist() == [[[[0, 0, 0], [255, 127, 0], [101, 50, 0]]]]
    assert source[1:2][0, 0, 0].tolist() == [6, 0, 7]
    assert np.array_equal(np.concatenate([source[:1], source[1:2]]), source[:2])


def test_colours_vary_around_their_mean_by_the_severity() -> None:
    for variant, std in (("cm10-s1", 0.05), ("cm10", 0.005)):
        card = DATASETS["cmnist"].card(variant)
        splits = cm10(card, digits(4_000), digits(500, seed=1))
        for split in (splits["train"], splits["test"]):
            pixels = np.asarray(split.images[: len(split.images)])[split.image_rows(), 0, 0] / 255
            mean = np.array(card.params["mean_colors"])[split.a[:, 0]]
            away = (pixels - mean)[(mean > 0.2) & (mean < 0.8)]  # elsewhere they are clamped
            assert away.std() == pytest.approx(std, rel=0.1)
            assert away.mean() == pytest.approx(-0.5 / 255, abs=4 * std / 50)


def test_validation_is_a_tenth_of_each_digit_of_train() -> None:
    train, t10k = digits(1_000), digits(100)
    splits = cm10(DATASETS["cmnist"].card("cm10"), train, t10k)
    assert np.bincount(splits["val"].y).tolist() == [10] * 10
    assert splits["train"].images is splits["val"].images
    rows = np.concatenate([splits["train"].image_rows(), splits["val"].image_rows()])
    assert sorted(rows) == list(range(1_000))
    for name in ("train", "val"):
        assert np.array_equal(splits[name].y, train.labels[splits[name].image_rows()])
    assert np.array_equal(splits["test"].y, t10k.labels)
    assert np.trace(np.histogram2d(splits["test"].y, splits["test"].a[:, 0], bins=10)[0]) == 10


def test_a_foreign_mnist_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    dataset, card = make_dataset("cmnist:cm10", tmp_path)
    says = r"cmnist:cm10: the train split has group counts .*, \.\.\. of [0-9,]+ images\)"
    with pytest.raises(CorruptFile, match=says):
        open_store(dataset, card, tmp_path)


# -------------------------------------------------------------------------------------------------- published folders


@pytest.mark.parametrize("place", ["cmnist", ".", NAME])
def test_a_published_folder_is_read_under_another_name(tmp_path: Path, place: str) -> None:
    folder = write_published(tmp_path / ("" if place == NAME else place))
    root = tmp_path / NAME if place == NAME else tmp_path
    dataset, card = make_dataset("cmnist:cm10", root)
    assert card.name == "cmnist:cm10[published]"
    store = open_store(dataset, card, root)
    assert store.card.name == "cmnist:cm10[published,custom]"  # not as many pictures as LfF's
    pictures = {name: np.load(folder / name / "images.npy") for name in ("train", "valid")}
    attrs = {name: np.load(folder / name / "attrs.npy") for name in ("train", "valid")}
    for name in SPLITS:
        split, part = store.split(name), "valid" if name == "test" else "train"
        rows = split.image_rows()
        assert np.array_equal(split.images[rows], pictures[part][rows])
        assert np.array_equal(np.column_stack([split.y, split.a]), attrs[part][rows])
    assert np.bincount(store.split("val").y).tolist() == [1] * 10


def test_only_the_card_s_own_folder_counts_and_only_for_mnist(tmp_path: Path) -> None:
    write_published(tmp_path)
    for name in ("cmnist:cm10-2", "cmnist:cm10-s3", "cmnist:bin99", "cfmnist:cm10"):
        assert make_dataset(name, tmp_path)[1].name == name
    write_published(tmp_path, "ColoredMNIST-Skewed0.005-Severity3")
    assert make_dataset("cmnist:cm10-0.5-s3", tmp_path)[1].name == "cmnist:cm10-0.5-s3[published]"


def test_an_altered_folder_has_another_key(tmp_path: Path) -> None:
    folder = write_published(tmp_path)
    dataset, _ = make_dataset("cmnist:cm10", tmp_path)
    before = dataset.source_key(tmp_path)
    assert dataset.source_key(tmp_path) == before
    attrs = np.load(folder / "valid" / "attrs.npy")
    np.save(folder / "valid" / "attrs.npy", attrs[::-1])
    assert dataset.source_key(tmp_path) != before


def test_a_folder_that_went_away(tmp_path: Path) -> None:
    folder = write_published(tmp_path)
    dataset, _ = make_dataset("cmnist:cm10", tmp_path)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(MissingData, match=NAME):
        dataset.load(tmp_path)


def damage(folder: Path, name: str, array: np.ndarray) -> None:
    np.save(folder / "train" / f"{name}.npy", array, allow_pickle=True)


def truncate(folder: Path, name: str) -> None:
    path = folder / "train" / f"{name}.npy"
    os.truncate(path, path.stat().st_size - 1)


ATTRS = np.zeros((100, 2), np.uint8)
BAD = {
    "images.npy: holds float64 (100, 28, 28, 3)": lambda f: damage(f, "images", np.zeros((100, 28, 28, 3))),
    "images.npy: holds uint8 (100, 28, 28)": lambda f: damage(f, "images", np.zeros((100, 28, 28), np.uint8)),
    "images.npy: missing, truncated": lambda f: truncate(f, "images"),
    "attrs.npy: missing, truncated": lambda f: (f / "train/attrs.npy").unlink(),
    "attrs.npy: holds uint8 (99, 2), not whole numbers (100, 2)": lambda f: damage(f, "attrs", ATTRS[:99]),
    "attrs.npy: holds float64": lambda f: damage(f, "attrs", ATTRS / 2),
    "attrs.npy: row 0: digit is -1": lambda f: damage(f, "attrs", ATTRS.astype(np.int64) - 1),
    "attrs.npy: row 3: colour is 10": lambda f: damage(f, "attrs", np.eye(200, dtype=int)[7].reshape(100, 2) * 10),
    "not a NumPy array": lambda f: damage(f, "attrs", np.array([[print, 1]] * 100, dtype=object)),
}


@pytest.mark.parametrize("says", BAD)
def test_a_damaged_folder_is_named(tmp_path: Path, says: str) -> None:
    folder = write_published(tmp_path)
    BAD[says](folder)
    dataset, _ = make_dataset("cmnist:cm10", tmp_path)
    with pytest.raises(CorruptFile) as error:
        dataset.load(tmp_path)
    assert says in str(error.value)
    assert str(folder / "train") in str(error.value)


def test_another_seed_draws_other_colours_and_another_validation_split() -> None:
    card = DATASETS["cmnist"].card("cm10")
    one, two = (cm10(replace(card, params={**card.params, "seed": s}), digits(200), digits(100)) for s in (0, 1))
    assert not np.array_equal(one["val"].image_rows(), two["val"].image_rows())
    assert not np.array_equal(one["test"].images[:100], two["test"].images[:100])
    again = ColoredMNIST(card)
    assert np.array_equal(cm10(again.card, digits(200), digits(100))["test"].images[:100], one["test"].images[:100])
