"""SpuCo: animals in folders, of whose groups half are empty, and digits on coloured backgrounds."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats.idx import draw_strokes, write_mnist
from formats.listings import list_backwards
from formats.spuco import HALVES, write_spuco
from PIL import Image
from worstgroup.benchmark import metrics, store
from worstgroup.benchmark.errors import CorruptFile, MissingData
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.pictures import Pictures
from worstgroup.benchmark.planning import Request, make_dataset, plan
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import SPLITS
from worstgroup.benchmark.store import Split, check_counts, found_card, open_store
from worstgroup.datasets import idx
from worstgroup.datasets.spuco import COLORS, MNIST_CARD, SpuCo, draw_backgrounds, held_out, paint

REAL = Path(__file__).parents[3] / "shared/data/mnist"
real_mnist = pytest.mark.skipif(
    not (REAL / "MNIST/raw/train-images-idx3-ubyte.gz").exists(), reason=f"the real MNIST is not in {REAL}"
)
ANIMALS = ("birds", "dogs", "animals")
SMALL = replace(MNIST_CARD, params={**MNIST_CARD.params, "val": 50})
"""The card for a drawn MNIST, which is smaller than the official validation split."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_spuco(tmp_path / "root")


def files(split: Split) -> list[Path]:
    """The file of each example."""
    assert isinstance(split.images, Pictures)
    return [split.images.files[row][0] for row in split.image_rows()]


# ----------------------------------------------------------------------------------------------------------- animals


@pytest.mark.parametrize(("variant", "sizes"), [("birds", 1), ("dogs", 1), ("animals", 2)])
def test_official_counts(variant: str, sizes: int) -> None:
    _, card = make_dataset(f"spuco:{variant}")
    assert {name: sum(card.counts[name]) for name in SPLITS} == {
        "train": 21_000 * sizes,
        "val": 1_050 * sizes,
        "test": 2_000 * sizes,
    }
    (place,) = card.attributes
    for name, (aligned, other) in {"train": (10_000, 500), "val": (500, 25), "test": (500, 500)}.items():
        table = np.array(card.counts[name]).reshape(card.shape)  # type: ignore[index]
        assert table[np.arange(len(card.classes)), place.aligned].tolist() == [aligned] * len(card.classes)
        assert sorted(table[table > 0].tolist()) == sorted([aligned, other] * len(card.classes))
    assert place.train_ratio == pytest.approx(10_000 / 10_500)


def test_animals_are_birds_and_dogs_at_four_places() -> None:
    _, card = make_dataset("spuco:animals")
    assert card.classes == ("landbirds", "waterbirds", "small_dogs", "big_dogs")
    assert card.attributes[0].values == ("land", "water", "indoor", "outdoor")
    groups = card.group_names()
    for counts in card.counts.values():
        empty = {groups[g] for g, n in enumerate(counts) if n == 0}
        assert len(empty) == 8
        assert {"landbirds/indoor", "waterbirds/outdoor", "small_dogs/land", "big_dogs/water"} <= empty


@pytest.mark.parametrize("variant", ANIMALS)
def test_labels_are_those_of_the_folders(root: Path, variant: str) -> None:
    dataset, card = make_dataset(f"spuco:{variant}")
    splits = dataset.load(root)
    assert len({id(split.images) for split in splits.values()}) == 1
    for name in SPLITS:
        split = splits[name]
        for path, y, (place,) in zip(files(split), split.y, split.a, strict=True):
            assert path.parts[-4:-1] == (name, card.classes[y], card.attributes[0].values[place])
    halves = len(card.classes) // 2
    assert [len(splits[name]) for name in SPLITS] == [16 * halves, 8 * halves, 8 * halves]


def test_other_counts_make_a_custom_dataset(root: Path) -> None:
    dataset, card = make_dataset("spuco:animals")
    found = found_card(card, dataset.load(root))
    assert found.name == "spuco:animals[custom]"
    assert found.counts["train"] == (6, 2, 0, 0, 2, 6, 0, 0, 0, 0, 6, 2, 0, 0, 2, 6)
    with pytest.raises(CorruptFile, match="not the official ones"):
        found_card(card, dataset.load(root), strict=True)


def test_a_listing_in_another_order_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _ = make_dataset("spuco:animals")
    key = dataset.source_key(root)
    list_backwards(monkeypatch)
    assert dataset.source_key(root) == key


@pytest.mark.parametrize("inner", ["", "spuco"])
def test_root_holds_the_halves_or_spuco(tmp_path: Path, inner: str) -> None:
    write_spuco(tmp_path / "root" / inner)
    assert len(make_dataset("spuco:animals")[0].load(tmp_path / "root")["test"]) == 16


def test_root_may_be_the_only_half_that_is_needed(tmp_path: Path) -> None:
    root = write_spuco(tmp_path, "spuco_dogs", end=".png")
    for folder in (root, root / "spuco_dogs"):
        assert len(make_dataset("spuco:dogs")[0].load(folder)["test"]) == 8
    with pytest.raises(MissingData, match="spuco/spuco_birds"):
        make_dataset("spuco:animals")[0].load(root)


def test_without_root_the_data_home_is_searched_and_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "fetch_dataset", lambda card, report: pytest.fail("a test tried to download"))
    dataset, card = make_dataset("spuco:birds", settings={"size": "32"})
    with pytest.raises(MissingData, match=r"terms of access .*spuco_birds\.tar\.gz"):
        open_store(dataset, card)
    write_spuco(data_home() / "spuco")
    assert len(open_store(dataset, card).split("test")) == 8


def test_missing_folders_are_named(root: Path) -> None:
    shutil.rmtree(root / "spuco_dogs/val")
    with pytest.raises(MissingData, match=r"spuco_dogs has no picture in val/small_dogs/indoor, val/small_dogs/outd"):
        make_dataset("spuco:animals")[0].load(root)


def test_pictures_are_squeezed_and_the_centre_is_cut(root: Path) -> None:
    from torchvision.transforms import functional as F

    path = root / "spuco_birds/train/landbirds/land/n00.JPEG"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50), dtype=np.uint8)).save(path)  # a grey one
    images = make_dataset("spuco:animals")[0].load(root)["train"].images
    with Image.open(path) as picture:
        expected = F.center_crop(F.resize(picture.convert("RGB"), [256, 256]), [224, 224])
    assert np.array_equal(images[0:1][0], np.asarray(expected))


def test_empty_groups_are_left_out_of_metrics() -> None:
    _, card = make_dataset("spuco:animals")
    n_train, total = np.array(card.counts["train"]), np.array(card.counts["test"])
    correct = np.where(n_train == 500, 250, total)
    values = metrics.evaluate(correct, total, n_train, card.shape, card.attributes)
    assert values["wga"] == 0.5
    assert values["acc_group"] == 0.75
    assert values["acc_adj"] == pytest.approx((20 + 0.5) / 21)
    assert values["gap_place"] == pytest.approx(0.5 - (20 + 0.5) / 21)


@pytest.mark.parametrize(("method", "budget"), [("erm", "val"), ("groupdro", "train+val"), ("dfr", "val")])
def test_a_run_of_the_drawn_animals(root: Path, method: str, budget: str) -> None:
    settings = {"data.size": "32", "recipe.epochs": "1", "recipe.batch_size": "16"}
    planned = plan([Request("spuco:animals", method, budget, "tiny_cnn", seeds=(0,), settings=settings)], root)
    (run,) = planned.runs
    assert run.spec is not None
    record = run_spec(run.spec, planned.stores["spuco:animals[32px,custom]"])
    assert record.status == "finished", record.error
    assert record.metrics["wga"] is not None
    assert record.metrics["acc_adj"] is not None
    assert sum(group.m_test > 0 for group in record.groups) == 8


# ------------------------------------------------------------------------------------------------------------- mnist


@real_mnist
def test_real_mnist_gives_the_counts_and_pixels_of_the_card() -> None:
    splits = SpuCo(MNIST_CARD).load(REAL)
    check_counts(MNIST_CARD, splits)
    assert [len(splits[name]) for name in SPLITS] == [48_004, 11_996, 10_000]
    _, t10k = idx.read_digits(idx.find_digits(idx.MNIST, REAL))
    test = splits["test"]
    assert np.array_equal(test.y, t10k.labels // 2)
    for i in range(20):
        image, digit = test.images[i : i + 1][0], t10k.images[i]
        assert (image[digit == 0] == COLORS[test.a[i, 0]]).all()
        assert (image[digit > 0] == digit[digit > 0][:, None]).all()


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_drawn_backgrounds_have_the_shares_of_the_card(name: str) -> None:
    """Shares of a class are exact: aligned ones in train, all in validation and test."""
    table = np.array(MNIST_CARD.counts[name]).reshape(5, 5)  # type: ignore[index]
    if name == "train":
        assert np.diag(table).tolist() == [int(0.995 * n) for n in table.sum(1)]
        assert (table > 0).all()
    else:
        assert (table.max(1) - table.min(1) <= 1).all()
        assert (np.diff(table, axis=1) <= 0).all()


def test_the_other_backgrounds_are_any_but_the_own() -> None:
    y = np.repeat(np.arange(5), 200)
    background = draw_backgrounds(y, 0.9, np.random.RandomState(0))
    table = np.bincount(5 * y + background, minlength=25).reshape(5, 5)
    assert np.diag(table).tolist() == [180] * 5
    assert (table > 0).all()
    assert len({background[y == c].tobytes() for c in range(5)}) == 5
    assert not np.array_equal(background, draw_backgrounds(y, 0.9, np.random.RandomState(1)))


def test_validation_takes_the_same_share_of_every_digit() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 40 + 10 * np.arange(10))).astype(np.uint8)
    held = held_out(labels, 170, seed=0)
    assert held.sum() == 170
    share = np.bincount(labels[held], minlength=10) / np.bincount(labels)
    assert np.allclose(share, 0.2, atol=0.02)
    assert np.array_equal(held, held_out(labels, 170, seed=0))
    assert not np.array_equal(held, held_out(labels, 170, seed=1))


def test_paint_colours_black_pixels_only() -> None:
    digits, _ = draw_strokes(5)
    images = paint(digits, np.arange(5))
    assert images.dtype == np.uint8
    for image, digit, color in zip(images, digits, COLORS, strict=True):
        assert (image[digit == 0] == color).all()
        assert (image[digit > 0] == digit[digit > 0][:, None]).all()


def test_colors_are_those_of_matplotlib() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    found = [matplotlib.colormaps["hsv"](value)[:3] for value in np.arange(0, 1, step=1 / 5)]
    assert np.array_equal(np.rint(255 * np.array(found)), COLORS)


def test_a_drawn_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    splits = SpuCo(SMALL).load(tmp_path)
    assert [len(splits[name]) for name in SPLITS] == [150, 50, 50]
    assert (np.bincount(5 * splits["val"].y + splits["val"].a[:, 0]) == 2).all()
    again = SpuCo(SMALL).load(tmp_path)
    for name in SPLITS:
        assert np.array_equal(again[name].images[:50], splits[name].images[:50])
        assert np.array_equal(again[name].a, splits[name].a)


def test_a_mnist_that_is_too_small_or_foreign_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with pytest.raises(CorruptFile, match="has 200 train digits, validation alone takes 11996"):
        SpuCo(MNIST_CARD).load(tmp_path)
    with pytest.raises(CorruptFile, match="group counts"):
        open_store(SpuCo(SMALL), SMALL, tmp_path)


def test_the_key_of_mnist_is_that_of_its_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    assert SpuCo(MNIST_CARD).source_key(tmp_path) == idx.digits_key(idx.MNIST, idx.find_digits(idx.MNIST, tmp_path))


def test_halves_of_the_drawn_tree_are_those_of_the_cards() -> None:
    found = [make_dataset(f"spuco:{variant}")[1] for variant in ("birds", "dogs")]
    assert [(card.classes, card.attributes[0].values) for card in found] == list(HALVES.values())
