"""Waterbirds in its packagings, its variants, and what is wrong with files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from formats.waterbirds import (
    COUNTS,
    GREYSCALE,
    SIZES,
    draw_mask,
    make_rows,
    save,
    write_aligned,
    write_release,
    write_table,
)
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize
from worstgroup.benchmark.errors import CorruptFile, MissingData, UserError
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.planning import make_dataset
from worstgroup.benchmark.spec import SPLITS
from worstgroup.benchmark.store import Split, Store, found_card, open_store
from worstgroup.datasets.waterbirds import COUNTS as OFFICIAL
from worstgroup.datasets.waterbirds import ENVIRONMENTS, WATERBIRDS, draw_biased, draw_environments
from worstgroup.datasets.waterbirds_release import FOLDERS, on_black, on_grey, on_nothing

MINI = Path(__file__).parents[3] / "shared/data/waterbirds_mini"
NAMES = ("place", "fg-black", "fg-grey", "mask", "biased-val", "no-minority", "ex2l")
VARIANTS = ("waterbirds", *(f"waterbirds:{variant}" for variant in NAMES))
GREY = (150, 150, 150)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "release")


def opened(name: str, root: Path | None) -> Store:
    """A store of small pictures."""
    return open_store(*make_dataset(name, settings={"size": "16"}), root)


def pools() -> int:
    return len([path for path in (data_home() / "pixels").iterdir() if not path.name.startswith(".")])


def corner(image: np.ndarray) -> list[int]:
    """Colour of the lower left of a picture, where the place is."""
    return [int(value) for value in image[-3:, :3].mean((0, 1)).round()]


# ------------------------------------------------------------------------------------------------------------- cards


def test_cards_have_the_official_counts() -> None:
    counts = {name: make_dataset(name)[1].counts for name in VARIANTS}
    for name, variant in counts.items():
        val = 632 if name == "waterbirds:biased-val" else 1199
        assert [sum(variant[split]) for split in ("val", "test")] == [val, 5794]
    assert sum(counts["waterbirds"]["train"]) == 4795
    assert counts["waterbirds:place"]["train"] == (3498, 56, 184, 1057)
    assert counts["waterbirds:place"]["test"] == (2255, 642, 2255, 642)
    assert sum(counts["waterbirds:no-minority"]["train"]) == 4555
    assert counts["waterbirds:ex2l"]["train"] == tuple(np.sum(ENVIRONMENTS, axis=0))


def test_a_table_with_the_official_groups_is_the_official_set(tmp_path: Path) -> None:
    """Also: reading it opens no picture, for here is none."""
    cells = [(s, g) for s, name in enumerate(SPLITS) for g, n in enumerate(WATERBIRDS.counts[name]) for _ in range(n)]
    rows = [
        {"img_id": i, "img_filename": f"001.X/{i}.jpg", "y": g // 2, "split": split, "place": g % 2}
        for i, (split, g) in enumerate(np.random.RandomState(0).permutation(cells), start=1)
    ]
    write_table(tmp_path / "metadata.csv", rows, ("img_id", "img_filename", "y", "split", "place"))
    for name in ("waterbirds", "waterbirds:place", "waterbirds:no-minority", "waterbirds:ex2l"):
        dataset, card = make_dataset(name)
        assert found_card(card, dataset.load(tmp_path), strict=True) == card


def test_environments_have_the_shares_of_the_paper() -> None:
    printed = [[61.80, 18.37, 8.26, 11.58], [44.77, 30.20, 5.98, 19.05]]
    shares = 100 * np.array(ENVIRONMENTS) / np.sum(ENVIRONMENTS, axis=1, keepdims=True)
    assert np.abs(shares - printed).max() < 0.06


# ----------------------------------------------------------------------------------------------------------- reading


def test_splits_groups_and_order(release: Path) -> None:
    dataset, card = make_dataset("waterbirds")
    splits = dataset.load(release)
    assert found_card(card, splits).counts == COUNTS
    assert found_card(card, splits).name == "waterbirds[custom]"
    assert len({id(split.images) for split in splits.values()}) == 1
    rows = make_rows()
    for number, name in enumerate(SPLITS):
        expected = [i for i, row in enumerate(rows) if row["split"] == number]
        assert splits[name].image_rows().tolist() == expected
        assert splits[name].y.tolist() == [rows[i]["y"] for i in expected]
        assert splits[name].a[:, 0].tolist() == [rows[i]["place"] for i in expected]


def test_pixels_are_those_of_torchvision_whatever_size_and_mode(release: Path) -> None:
    images = make_dataset("waterbirds")[0].load(release)["train"].images
    usual = Compose([Resize((256, 256)), CenterCrop(224)])
    pictures = [Image.open(release / row["img_filename"]) for row in make_rows()[: GREYSCALE + 1]]
    assert {picture.size for picture in pictures} == set(SIZES)
    assert pictures[GREYSCALE].mode == "L"
    assert np.array_equal(images[: GREYSCALE + 1], [np.asarray(usual(picture.convert("RGB"))) for picture in pictures])


def test_the_tern_trap_is_kept(release: Path) -> None:
    """The loader repairs no label: the Eastern Towhee is a waterbird, as released."""
    splits = make_dataset("waterbirds")[0].load(release)
    towhees = {i for i, row in enumerate(make_rows()) if "Towhee" in row["img_filename"]}
    labels = {int(r): int(y) for split in splits.values() for r, y in zip(split.image_rows(), split.y, strict=True)}
    assert towhees
    assert {labels[i] for i in towhees} == {1}


def test_every_packaging_and_row_order_gives_the_same_fingerprint(release: Path, tmp_path: Path) -> None:
    wilds = write_release(tmp_path / "elsewhere" / "waterbirds_v1.0", wilds=True)
    shuffled = write_release(tmp_path / "shuffled")
    rows = make_rows()
    write_table(shuffled / "metadata.csv", [rows[i] for i in np.random.RandomState(0).permutation(len(rows))])
    aligned = write_aligned(tmp_path / "aligned")
    moved = write_aligned(tmp_path / "moved")
    (moved / "metadata.csv").rename(moved / "combined" / "metadata.csv")
    roots = [release, wilds, wilds.parent, shuffled, aligned, moved]
    assert len({opened("waterbirds", root).fingerprint for root in roots}) == 1
    assert pools() == 1


def test_only_the_five_columns_that_are_used_are_needed(release: Path) -> None:
    """`place_filename` names pictures that are no part of the release."""
    before = opened("waterbirds", release).fingerprint
    write_table(release / "metadata.csv", make_rows(), ("img_id", "img_filename", "y", "split", "place"))
    assert opened("waterbirds", release).fingerprint == before


@pytest.mark.parametrize("folder", FOLDERS)
def test_found_in_the_data_home(folder: str) -> None:
    write_release(data_home() / folder)
    assert len(make_dataset("waterbirds")[0].load(None)["train"]) == 16


def test_missing_data_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"metadata.csv.*Unpack waterbird_complete95_forest2water2.tar.gz"):
        make_dataset("waterbirds")[0].load(tmp_path)


def test_wrong_counts_are_refused_when_strict(release: Path) -> None:
    dataset, card = make_dataset("waterbirds:place")
    with pytest.raises(CorruptFile, match=r"train split has group counts \(8, 2, 2, 4\).*not the official"):
        open_store(dataset, card, release, strict=True)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("split", "3", "line 6: split is '3'"),
        ("split", "train", "line 6: split is 'train'"),
        ("y", "-1", "line 6: y is '-1'"),
        ("y", "2", "line 6: y is '2'"),
        ("place", "", "line 6: place is ''"),
        ("img_id", "-4", "line 6: img_id is '-4'"),
        ("img_id", "1", "line 6: img_id '1' stands in an earlier line"),
        ("img_filename", make_rows()[0]["img_filename"], "line 6: img_filename .* stands in an earlier line"),
        ("img_filename", "../secret.jpg", r"line 6: '\.\./secret.jpg' is not a file below"),
        ("img_filename", "a\0.jpg", r"line 6: 'a\\x00.jpg' is not a file below"),
    ],
)
def test_a_bad_cell_is_named_with_its_line(release: Path, column: str, value: str, message: str) -> None:
    rows = make_rows()
    rows[4][column] = value
    write_table(release / "metadata.csv", rows)
    with pytest.raises(CorruptFile, match=f"metadata.csv: {message}"):
        make_dataset("waterbirds")[0].load(release)


@pytest.mark.parametrize("long", [0, 200_000])
def test_a_quote_that_is_not_closed_swallows_no_rows(release: Path, long: int) -> None:
    table = release / "metadata.csv"
    head, tail = table.read_text().split(",/", 1)  # in a column that is not read
    table.write_text(f'{head},"/{tail}' + "x" * long)
    with pytest.raises(CorruptFile, match=r"metadata.csv: line 2: cannot be split"):
        make_dataset("waterbirds")[0].load(release)


def test_a_folder_in_place_of_the_table_is_named(release: Path) -> None:
    (release / "metadata.csv").unlink()
    (release / "metadata.csv").mkdir()
    with pytest.raises(CorruptFile, match=r"metadata.csv: cannot be read as text"):
        make_dataset("waterbirds")[0].load(release)


def test_another_datasets_table_is_refused(release: Path) -> None:
    write_table(release / "metadata.csv", make_rows(), ("img_id", "y", "split", "place"))
    with pytest.raises(CorruptFile, match="has no column img_filename"):
        make_dataset("waterbirds")[0].load(release)


def test_a_missing_picture_is_named_with_its_line(release: Path) -> None:
    name = make_rows()[7]["img_filename"]
    (release / name).unlink()
    with pytest.raises(CorruptFile, match=rf"{name} \(line 9 of metadata.csv\): cannot be read: No such file"):
        opened("waterbirds", release)


def test_a_truncated_picture_is_named_with_its_line(release: Path) -> None:
    path = release / make_rows()[7]["img_filename"]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CorruptFile, match=rf"{path.name} \(line 9 of metadata.csv\): cannot be decoded"):
        opened("waterbirds", release)
    assert not list((data_home() / "pixels").iterdir())


# ---------------------------------------------------------------------------------------------------------- variants


def test_variants_share_decoded_pictures(tmp_path: Path) -> None:
    root = write_release(tmp_path / "release", masks="segmentations")
    stores = {name: opened(name, root) for name in VARIANTS}
    usual = stores["waterbirds"].pools["train"]
    for name, store in stores.items():
        own = name in ("waterbirds:fg-black", "waterbirds:fg-grey", "waterbirds:mask")
        assert [store.pools[split] == usual for split in SPLITS] == [True, True, not own]
    assert pools() == 4  # the usual one, and the test birds on black, on grey and in white
    assert len({store.fingerprint for store in stores.values()}) == len(VARIANTS)


def test_place_swaps_class_and_attribute_at_every_size(release: Path) -> None:
    usual, swapped = opened("waterbirds", release), opened("waterbirds:place", release)
    assert swapped.card.name == "waterbirds:place[16px,custom]"
    assert swapped.card.counts["train"] == (8, 2, 2, 4)
    assert swapped.card.group_names() == ["land/landbird", "land/waterbird", "water/landbird", "water/waterbird"]
    for name in SPLITS:
        assert np.array_equal(swapped.split(name).y, usual.split(name).a[:, 0])
        assert np.array_equal(swapped.split(name).a[:, 0], usual.split(name).y)


def test_cut_out_is_the_picture_times_the_mask_above_200() -> None:
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 60, 3), np.uint8))
    mask = draw_mask(photo.size, 1)
    assert {0, 153, 204, 255} == set(np.unique(mask))
    bird = np.asarray(mask)[..., None] > 200
    assert np.array_equal(on_black(photo, mask), np.asarray(photo) * bird)
    assert np.array_equal(on_grey(photo, mask.convert("RGBA")), np.where(bird, np.asarray(photo), 150))


def group_of(split: Split) -> NDArray[np.int64]:
    return 2 * split.y + split.a[:, 0]


def test_a_silhouette_is_white_where_the_mask_is_above_200() -> None:
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 60, 3), np.uint8))
    mask = draw_mask(photo.size, 1)
    white = np.asarray(on_nothing(photo, mask))
    assert np.array_equal(white, np.repeat(255 * (np.asarray(mask)[..., None] > 200), 3, axis=2))
    with pytest.raises(ValueError, match="its mask"):
        on_nothing(photo, mask.resize((10, 10)))


def test_biased_validation_has_the_shares_of_train_within_each_class() -> None:
    train, val = np.repeat(range(4), [90, 10, 5, 100]), np.repeat(range(4), [40, 40, 20, 20])
    kept = draw_biased(train, val, 0)
    assert np.bincount(val[kept]).tolist() == [40, 4, 1, 20]
    assert (np.diff(kept) > 0).all()
    assert np.array_equal(kept, draw_biased(train, val, 0))
    official = draw_biased(*(np.repeat(range(4), OFFICIAL[name]) for name in ("train", "val")), 0)
    assert len(official) == sum(make_dataset("waterbirds:biased-val")[1].counts["val"])


@pytest.mark.parametrize(("variant", "colour"), [("fg-black", (0, 0, 0)), ("fg-grey", GREY)])
def test_only_test_pictures_lose_their_place(tmp_path: Path, variant: str, colour: tuple[int, int, int]) -> None:
    root = write_release(tmp_path / "release", masks="beside")
    usual, store = opened("waterbirds", root), opened(f"waterbirds:{variant}", root)
    for name in SPLITS:
        before, after = usual.split(name), store.split(name)
        assert np.array_equal(before.y, after.y)
        assert np.array_equal(before.a, after.a)
        for i, j in zip(before.image_rows(), after.image_rows(), strict=True):
            if name != "test":
                assert np.array_equal(before.images[i : i + 1], after.images[j : j + 1])
            else:
                assert corner(after.images[j : j + 1][0]) == list(colour)
                centre = np.s_[0, 9:11, 7:9]
                assert np.allclose(before.images[i : i + 1][centre], after.images[j : j + 1][centre], atol=3)


def test_masks_are_found_beside_pictures_in_a_tree_and_beside_the_folder(tmp_path: Path) -> None:
    roots = [write_release(tmp_path / place, masks=place) for place in ("beside", "segmentations")]
    roots.append(write_release(tmp_path / "third" / "release", masks="segmentations"))
    (roots[2] / "segmentations").rename(roots[2].parent / "segmentations")
    assert len({opened("waterbirds:fg-black", root).fingerprint for root in roots}) == 1


def test_a_missing_mask_names_its_picture(tmp_path: Path) -> None:
    root = write_release(tmp_path / "release", masks="segmentations")
    line, row = next((i + 2, row) for i, row in enumerate(make_rows()) if row["split"] == 2)
    (root / "segmentations" / row["img_filename"]).with_suffix(".png").unlink()
    with pytest.raises(MissingData, match=rf"{row['img_filename']} \(line {line} of .*has no mask.*segmentations.tgz"):
        opened("waterbirds:fg-black", root)
    assert opened("waterbirds", root)


def test_a_mask_of_another_size_names_its_picture(tmp_path: Path) -> None:
    root = write_release(tmp_path / "release", masks="segmentations")
    row = next(row for row in make_rows() if row["split"] == 2)
    save(Image.new("L", (7, 5)), (root / "segmentations" / row["img_filename"]).with_suffix(".png"))
    with pytest.raises(CorruptFile, match=rf"{row['img_filename']}.*its mask 7x5"):
        opened("waterbirds:fg-black", root)


def test_a_png_picture_is_not_its_own_mask(release: Path) -> None:
    rows = make_rows()
    for row in rows:
        path = release / row["img_filename"]
        save(Image.open(path), path.with_suffix(".png"))
        row["img_filename"] = row["img_filename"].replace(".jpg", ".png")
    write_table(release / "metadata.csv", rows)
    with pytest.raises(MissingData, match="has no mask"):
        opened("waterbirds:fg-black", release)


def test_grey_takes_the_birds_tree_where_it_is_there(tmp_path: Path) -> None:
    root = write_aligned(tmp_path / "aligned")
    test = opened("waterbirds:fg-grey", root).split("test")
    assert len(test.images) == len(test) == 12
    assert {tuple(corner(image)) for image in test.images} == {GREY}
    shutil.rmtree(root / "birds")
    with pytest.raises(MissingData, match="has no mask"):
        make_dataset("waterbirds:fg-grey")[0].load(root)


def test_no_minority_drops_two_groups_of_train_only(release: Path) -> None:
    card = opened("waterbirds:no-minority", release).card
    assert card.counts == COUNTS | {"train": (8, 0, 0, 4)}


# ------------------------------------------------------------------------------------------------------ environments


def test_official_environments_are_disjoint_exact_and_seeded() -> None:
    group = np.random.RandomState(1).permutation(np.repeat(np.arange(4), WATERBIRDS.counts["train"]))
    chosen, env = draw_environments(group, WATERBIRDS.group_names(), ENVIRONMENTS, seed=0)
    assert len(chosen) == 775
    assert np.all(np.diff(chosen) > 0)
    cells = np.bincount(4 * env + group[chosen], minlength=8)
    assert cells.tolist() == [262, 78, 35, 49, 157, 106, 21, 67]
    assert np.isin(np.flatnonzero(np.isin(group, (1, 2))), chosen).all()
    again, other = (draw_environments(group, WATERBIRDS.group_names(), ENVIRONMENTS, seed)[0] for seed in (0, 1))
    assert np.array_equal(again, chosen)
    assert not np.array_equal(other, chosen)


def test_environments_of_a_smaller_set_are_scaled(release: Path) -> None:
    store = opened("waterbirds:ex2l", release)
    train = store.split("train")
    assert store.card.environments == ("land-centric", "balanced")
    assert train.env is not None
    # the scarcest group, landbirds on water, has 2 pictures for 184 wanted
    cells = np.bincount(4 * train.env + 2 * train.y + train.a[:, 0], minlength=8)
    assert cells.tolist() == [2, 1, 1, 1, 1, 1, 1, 1]
    assert store.split("val").env is None
    assert store.card.counts["test"] == COUNTS["test"]


def test_a_group_too_small_for_the_environments_is_named() -> None:
    group = np.repeat(np.arange(4), (5, 1, 5, 5))
    with pytest.raises(UserError, match="2 environments need as many train pictures of landbird/water, there are 1"):
        draw_environments(group, WATERBIRDS.group_names(), ENVIRONMENTS, seed=0)


# ------------------------------------------------------------------------------------------------ the real small set


@pytest.mark.skipif(not (MINI / "metadata.csv").is_file(), reason=f"the reduced Waterbirds is not in {MINI}")
def test_the_real_reduced_set() -> None:
    dataset, card = make_dataset("waterbirds")
    splits = dataset.load(MINI)
    found = found_card(card, splits)
    assert found.name == "waterbirds[custom]"
    assert found.counts == {"train": (665, 35, 15, 285), "val": (149, 149, 61, 61), "test": (359, 359, 136, 136)}
    assert splits["test"].images[2408:].shape == (2, 224, 224, 3)
    assert np.bincount(group_of(make_dataset("waterbirds:biased-val")[0].load(MINI)["val"])).tolist() == [149, 8, 3, 61]
    black = make_dataset("waterbirds:fg-black")[0].load(MINI)["test"]
    assert len(black.images) == 990
    assert 0.2 < (black.images[:20] == 0).mean() < 0.99
