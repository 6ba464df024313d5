"""Coloured MNIST and Fashion-MNIST with two classes: ExMap's, DomainBed's and IRM's variants."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats.idx import draw_strokes, write_mnist
from worstgroup.benchmark.errors import CorruptFile, UserError
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.pools import pool_path
from worstgroup.benchmark.registry import DATASETS
from worstgroup.benchmark.spec import SPLITS, Card, SplitName
from worstgroup.benchmark.store import Split, Splits, Store, open_store
from worstgroup.datasets import idx
from worstgroup.datasets.cmnist import ColoredFashion, ColoredMNIST, domainbed, draw_colors, irm14
from worstgroup.datasets.coloring import hold_out, paint
from worstgroup.datasets.idx import FASHION, MNIST, Digits

REAL = Path(__file__).parents[3] / "shared/data/mnist"
real_mnist = pytest.mark.skipif(
    not (REAL / "MNIST/raw/train-images-idx3-ubyte.gz").exists(), reason=f"the real MNIST is not in {REAL}"
)
BIN99, DOMAINBED, IRM14 = (DATASETS["cmnist"].card(variant) for variant in ("bin99", "domainbed", "irm14"))
BOTH = pytest.mark.parametrize("name", ["cmnist", "cfmnist"])
NOISY = pytest.mark.parametrize(("card", "make"), [(DOMAINBED, domainbed), (IRM14, irm14)], ids=["domainbed", "irm14"])


@pytest.fixture
def real() -> Iterator[Store]:
    yield open_store(ColoredMNIST(BIN99), BIN99, REAL)
    shutil.rmtree(data_home())  # 180 MB that pytest would keep


def stores() -> list[Path]:
    """The store folders, without the notes beside them."""
    folder = data_home() / "store"
    return [path for path in folder.iterdir() if path.is_dir()] if folder.exists() else []


def short(card: Card, train: int) -> Card:
    """The card for a drawn MNIST: `train` examples before those that are cut off."""
    return replace(card, params={**card.params, "train": train})


# -------------------------------------------------------------------------------------------------------------- bin99


@real_mnist
def test_real_store_has_the_published_groups_and_pixels(real: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    train, t10k = idx.read_digits(idx.find_digits(MNIST, REAL))
    digits = {
        "train": (train.images[:50_000], train.labels[:50_000]),
        "val": (train.images[50_000:], train.labels[50_000:]),
        "test": t10k,
    }
    for name in SPLITS:
        split, (pictures, labels) = real.split(name), digits[name]
        y, color = split.y, split.a[:, 0]
        assert tuple(np.bincount(2 * y + color)) == BIN99.counts[name]
        assert np.array_equal(y, labels > 4)
        assert 0.98 < (color == np.array(BIN99.attributes[0].aligned)[y]).mean() < 1
        assert len(split.images) == len(pictures)
        some = np.r_[:300, len(y) - 300 : len(y), np.flatnonzero(color == y)[:50]]
        for i in some:
            image = split.images[int(i) : int(i) + 1][0]
            assert np.array_equal(image[..., color[i]], pictures[i])
            assert not np.delete(image, color[i], axis=-1).any()

    pixels = pool_path(real.pools["train"]) / "images.npy"
    before = pixels.stat().st_mtime_ns
    monkeypatch.setattr(ColoredMNIST, "load", lambda self, root: pytest.fail("the store was built again"))
    again = open_store(ColoredMNIST(BIN99), BIN99, REAL)
    assert (again.path, again.fingerprint) == (real.path, real.fingerprint)
    assert pixels.stat().st_mtime_ns == before
    assert stores() == [real.path]


@pytest.mark.parametrize("name", SPLITS)
def test_drawn_colors_have_the_counts_of_the_card(name: SplitName) -> None:
    """The draws depend only on the number of examples of each class, so no MNIST is needed to repeat them."""
    counts = BIN99.counts[name]
    y = np.repeat([0, 1], [counts[0] + counts[1], counts[2] + counts[3]])
    np.random.default_rng(0).shuffle(y)
    color = draw_colors(y, BIN99.params["green"], BIN99.params["seed"])
    assert tuple(np.bincount(2 * y + color)) == counts


def test_load_of_a_drawn_mnist(tmp_path: Path) -> None:
    parts = write_mnist(tmp_path)
    splits = ColoredMNIST(BIN99).load(tmp_path)
    assert [len(splits[name].y) for name in SPLITS] == [200, 0, 50]
    drawn: tuple[tuple[SplitName, str], ...] = (("train", "train"), ("test", "t10k"))
    for name, part in drawn:
        split, (digits, labels) = splits[name], parts[part]
        assert np.array_equal(split.y, labels > 4)
        assert split.a.shape == (len(labels), 1)
        assert np.array_equal(np.asarray(split.images[: len(labels)]).max(axis=-1), digits)


@pytest.mark.parametrize("cls", [ColoredMNIST, ColoredFashion])
def test_foreign_files_are_refused_and_leave_no_store(tmp_path: Path, cls: type[ColoredMNIST]) -> None:
    name = "cmnist" if cls is ColoredMNIST else "cfmnist"
    write_mnist(tmp_path / "drawn")
    card = short(DATASETS[name].card("bin99"), 150)
    with pytest.raises(CorruptFile) as error:
        open_store(cls(card), card, tmp_path / "drawn")
    found = cls(card).load(tmp_path / "drawn")["train"]
    assert str(tuple(int(n) for n in np.bincount(2 * found.y + found.a[:, 0]))) in str(error.value)
    assert str(card.counts["train"]) in str(error.value)
    assert stores() == []


# --------------------------------------------------------------------------------------------------- domainbed, irm14


def drawn_digits(n: int) -> Digits:
    """n digits whose picture says which one it is: its first pixels are the bytes of its number."""
    images = np.full((n, 28, 28), 255, np.uint8)
    images[:, 0, 0], images[:, 0, 2] = np.arange(n) // 256, np.arange(n) % 256
    return Digits(images, (np.arange(n) % 10).astype(np.uint8))


def numbers(split: Split, column: int) -> list[int]:
    """Which of the drawn digits a split shows; `column` is where its second byte lies."""
    shown = np.asarray(split.images[: len(split.images)]).max(axis=-1)[split.image_rows()].astype(int)
    return [int(n) for n in shown[:, 0, 0] * 256 + shown[:, 0, column]]


def by_part(splits: Splits, flips: int) -> list[tuple[float, int]]:
    """Share of unaligned examples and number of examples of each environment, validation left out."""
    train, test = splits["train"], splits["test"]
    assert train.env is not None
    parts = [(train.y[train.env == e], train.a[train.env == e, 0]) for e in range(flips - 1)]
    return [(float((y != color).mean()), len(y)) for y, color in [*parts, (test.y, test.a[:, 0])]]


@NOISY
def test_environments_have_their_correlations_and_label_noise(card: Card, make: type) -> None:
    train, t10k = drawn_digits(6_000), drawn_digits(1_000)
    splits = make(short(card, 5_000), train, t10k)
    for (found, _), expected in zip(by_part(splits, 3), card.params["flip"], strict=True):
        assert found == pytest.approx(expected, abs=0.03)
    labels = np.concatenate([train.labels, t10k.labels])
    clean = np.concatenate([labels[split.image_rows()] < 5 for split in splits.values()])
    noisy = np.concatenate([split.y for split in splits.values()])
    assert (clean != noisy).mean() == pytest.approx(0.25, abs=0.02)


@NOISY
def test_every_digit_is_shown_once_on_the_channel_of_its_colour(card: Card, make: type) -> None:
    splits = make(short(card, 500), drawn_digits(600), drawn_digits(90))
    column = 2 if card is DOMAINBED else 1  # IRM keeps every other pixel
    seen = sorted(n for split in splits.values() for n in numbers(split, column))
    assert seen == (sorted([*range(600), *range(90)]) if card is DOMAINBED else list(range(600)))
    for split in splits.values():
        images = np.asarray(split.images[: len(split.images)])[split.image_rows()]
        assert images.shape[1:] == card.image
        rows = np.arange(len(images))
        assert (images[rows, 5, 5, split.a[:, 0]] == 255).all()
        assert not images[rows, :, :, 1 - split.a[:, 0]].any()


@NOISY
def test_validation_is_a_fifth_of_each_class_of_each_environment(card: Card, make: type) -> None:
    splits = make(short(card, 5_000), drawn_digits(6_000), drawn_digits(999))
    assert splits["val"].env is None
    assert len(splits["val"]) / (len(splits["train"]) + len(splits["val"])) == pytest.approx(0.2, abs=0.001)
    assert splits["val"].y.mean() == pytest.approx(splits["train"].y.mean(), abs=0.005)
    assert splits["train"].images is splits["val"].images is splits["test"].images


def test_domainbed_deals_every_third_digit() -> None:
    """23,334 / 23,333 / 23,333 of 70,000: the first environment gets what is left over."""
    splits = domainbed(DOMAINBED, drawn_digits(60), drawn_digits(10))
    train = splits["train"]
    assert train.env is not None
    order = np.random.RandomState(DOMAINBED.params["seed"]).permutation(70)
    assert sorted(splits["test"].image_rows()) == sorted(order[2::3])
    for e in (0, 1):
        assert set(train.image_rows()[train.env == e]) <= set(order[e::3])


def test_irm14_tests_on_the_digits_behind_the_cut() -> None:
    splits = irm14(short(IRM14, 50), drawn_digits(60), drawn_digits(10))
    assert splits["test"].image_rows().tolist() == list(range(50, 60))
    assert splits["train"].images[:1].shape == (1, 14, 14, 2)


@NOISY
def test_draws_are_those_of_the_seed(card: Card, make: type) -> None:
    def labels(seed: int) -> list[bytes]:
        changed = replace(card, params={**card.params, "train": 500, "seed": seed})
        splits = make(changed, drawn_digits(600), drawn_digits(90))
        return [part.tobytes() for split in splits.values() for part in (split.y, split.a, split.image_rows())]

    assert labels(0) == labels(0)
    assert labels(0) != labels(1)


# ------------------------------------------------------------------------------------------------------------ sharing


def test_paint_fills_one_channel() -> None:
    digits, _ = draw_strokes(4)
    images = paint(digits, np.array([0, 1, 1, 0]))
    assert images.shape == (4, 28, 28, 3)
    assert images.dtype == np.uint8
    for image, digit, channel in zip(images, digits, (0, 1, 1, 0), strict=True):
        assert np.array_equal(image[..., channel], digit)
        assert image.sum(dtype=int) == digit.sum(dtype=int)


def test_hold_out_takes_a_share_of_each_stratum_wherever_its_rows_lie() -> None:
    strata = np.repeat([0, 1, -1], [40, 20, 100])
    held = hold_out(strata, 0.25, np.random.RandomState(0))
    assert np.bincount(strata[held], minlength=2).tolist() == [10, 5]
    order = np.argsort(np.random.default_rng(0).permutation(len(strata)), kind="stable")
    moved = hold_out(strata[order], 0.25, np.random.RandomState(0))
    for stratum in (0, 1):  # the same positions within the stratum
        assert np.array_equal(held[strata == stratum], moved[strata[order] == stratum])


# -------------------------------------------------------------------------------------------------------------- cards


@BOTH
def test_cards_count_all_images(name: str) -> None:
    sizes = {
        variant: [sum(DATASETS[name].card(variant).counts[split]) for split in SPLITS]
        for variant in ("bin99", "domainbed", "irm14")
    }
    assert sizes["bin99"] == [50_000, 10_000, 10_000]
    assert sizes["irm14"] == [40_000, 10_000, 10_000]
    assert sum(sizes["domainbed"]) == 70_000
    assert sizes["domainbed"][2] == 23_333


@BOTH
def test_cards_name_what_is_shown(name: str) -> None:
    family, noun = (MNIST, "digit") if name == "cmnist" else (FASHION, "item")
    bin99, noisy = DATASETS[name].card("bin99"), DATASETS[name].card("domainbed")
    assert bin99.group_names() == [f"{noun} {part}/{color}" for part in ("0-4", "5-9") for color in ("red", "green")]
    assert noisy.classes == (f"{noun} 5-9", f"{noun} 0-4")
    assert noisy.environments == ("+90%", "+80%")
    assert DATASETS[name].card("irm14").environments == ("+80%", "+90%")
    assert bin99.sources == family.sources
    assert family.licence in bin99.licence
    assert ("MIT" in bin99.licence) == (name == "cfmnist")


def test_a_plain_name_offers_the_variants() -> None:
    entry = DATASETS["cmnist"]
    assert entry.cls is ColoredMNIST
    with pytest.raises(UserError, match="cmnist is a family of datasets: name one of cmnist:bin99"):
        entry.card("")
