"""Waterbirds built from its parts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from formats.waterbirds import GREYSCALE, draw_mask, make_rows, save, write_parts
from PIL import Image
from worstgroup.benchmark.errors import CorruptFile, MissingData
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.pictures import Pictures
from worstgroup.benchmark.planning import make_dataset
from worstgroup.benchmark.spec import SPLITS
from worstgroup.benchmark.store import Splits, open_store
from worstgroup.datasets.waterbirds_builder import PARAMS, WATERBIRDS, Birds, assign, build, paste, read_birds

PLACES = ("b/bamboo_forest", "f/forest/broadleaf", "o/ocean", "l/lake/natural")
SPELLINGS = (
    ("bamboo_forest", "forest/broadleaf", "ocean", "lake/natural"),
    ("bamboo-forest", "forest-broadleaf", "ocean", "lake_natural"),
    ("data_large/b/bamboo_forest", "data_large/f/forest/broadleaf", "data_large/o/ocean", "data_large/l/lake/natural"),
    ("places365/b/bamboo_forest", "places365/forest_broadleaf", "places365/ocean", "places365/l/lake-natural"),
)
CARD = make_dataset("waterbirds:built")[1]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return write_parts(tmp_path / "parts", places=PLACES)


def load(root: Path | None, **params: object) -> Splits:
    return build("waterbirds:built", PARAMS | params, CARD.pixels, root)


def sources(splits: Splits) -> list[tuple[Path, ...]]:
    """Photograph, mask and place of every picture."""
    images = splits["train"].images
    assert isinstance(images, Pictures)
    return images.files


def labels(splits: Splits) -> list[list[list[int]]]:
    return [[s.image_rows().tolist(), s.y.tolist(), s.a[:, 0].tolist()] for s in splits.values()]


# ------------------------------------------------------------------------------------------------------ construction


def test_official_sizes_give_the_official_counts() -> None:
    """Class and split sizes are those of CUB; the groups of train vary with the draw of validation, by design."""
    y = np.repeat([0, 1, 0, 1], [4615, 1379, 4510, 1284])
    birds = Birds(names=[], y=y, train=np.repeat([True, False], [5994, 5794]))
    split, place = assign(birds, PARAMS, np.random.RandomState(0))
    counts = np.bincount(4 * split + 2 * y + place, minlength=12).reshape(3, 4)
    assert counts.sum(1).tolist() == [4795, 1199, 5794]
    assert counts[2].tolist() == [2255, 2255, 642, 642]
    for landbirds_on_land, landbirds_on_water, waterbirds_on_land, waterbirds_on_water in counts[1:2]:
        assert abs(landbirds_on_land - landbirds_on_water) <= 1
        assert abs(waterbirds_on_land - waterbirds_on_water) <= 1
    assert counts[0, 1] == round(0.05 * counts[0, :2].sum())
    assert counts[0, 3] == round(0.95 * counts[0, 2:].sum())


def test_splits_and_balance(parts: Path) -> None:
    splits = load(parts)
    assert [len(split) for split in splits.values()] == [16, 4, 20]
    assert sorted(np.concatenate([s.image_rows() for s in splits.values()])) == list(range(40))
    in_train = {row["img_id"] - 1 for row in make_rows() if row["img_id"] % 2}
    assert {int(row) for name in ("train", "val") for row in splits[name].image_rows()} == in_train
    for y in (0, 1):
        test = splits["test"]
        members = test.a[test.y == y, 0]
        assert members.sum() == round(len(members) / 2)


def test_the_confounder_strength_is_a_parameter(parts: Path) -> None:
    train = load(parts, confounder=1.0)["train"]
    assert np.array_equal(train.y, train.a[:, 0])


def test_same_seed_same_dataset(parts: Path, tmp_path: Path) -> None:
    first, again, other = load(parts), load(parts), load(parts, seed=1)
    assert labels(first) == labels(again)
    assert sources(first) == sources(again)
    assert labels(first) != labels(other)
    elsewhere = write_parts(tmp_path / "elsewhere", places=SPELLINGS[1])
    assert first["train"].images.key == load(elsewhere)["train"].images.key  # type: ignore[attr-defined]


def test_a_view_shows_the_bird_on_the_place_of_one_of_the_other_class(parts: Path) -> None:
    splits = load(parts)
    train, files = splits["train"], sources(splits)
    view = train.views["place"]
    assert isinstance(view, Pictures)
    rows = train.image_rows()
    y_at = {files[row][2]: y for row, y in zip(rows, train.y, strict=True)}
    for (photo, mask, place), row, y in zip(view.files, rows, train.y, strict=True):
        assert (photo, mask) == files[row][:2]
        assert y_at[place] != y
    assert not splits["test"].views


def test_every_place_picture_is_of_its_kind_and_used_once(parts: Path) -> None:
    splits = load(parts)
    files = sources(splits)
    assert len({place for _, _, place in files}) == len(files)
    for split in splits.values():
        for row, kind in zip(split.image_rows(), split.a[:, 0], strict=True):
            assert files[row][2].is_relative_to(parts / "o" if kind else parts / "b") or files[row][2].is_relative_to(
                parts / "l" if kind else parts / "f"
            )
    assert {place.parents[-len(parts.parts) - 1].name for _, _, place in files} == {"b", "f", "o", "l"}


def test_photo_mask_and_place_belong_together(parts: Path) -> None:
    for (photo, mask, _), row in zip(sources(load(parts)), make_rows(), strict=True):
        assert photo == parts / "CUB_200_2011/images" / row["img_filename"]
        assert mask == (parts / "segmentations" / row["img_filename"]).with_suffix(".png")


def test_species_are_waterbirds_by_a_part_of_their_name(tmp_path: Path) -> None:
    """The trap of the official labels: "tern" is in Eastern and Western."""
    expected = {
        "021.Eastern_Towhee": 1,
        "088.Western_Meadowlark": 1,
        "102.Western_Wood_Pewee": 1,
        "141.Artic_Tern": 1,
        "086.Pacific_Loon": 1,
        "014.Indigo_Bunting": 0,
        "187.American_Three_toed_Woodpecker": 0,
    }
    (tmp_path / "images.txt").write_text("".join(f"{i} {name}/x_{i}.jpg\n" for i, name in enumerate(expected, 1)))
    (tmp_path / "train_test_split.txt").write_text("".join(f"{i} 1\n" for i in range(1, len(expected) + 1)))
    assert read_birds(tmp_path, WATERBIRDS).y.tolist() == list(expected.values())


def test_order_is_that_of_the_picture_numbers(parts: Path) -> None:
    path = parts / "CUB_200_2011/images.txt"
    before = read_birds(path.parent, WATERBIRDS)
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    after = read_birds(path.parent, WATERBIRDS)
    assert after.names == before.names == [row["img_filename"] for row in make_rows()]
    assert np.array_equal(after.train, before.train)


# ------------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("size", [(30, 90), (400, 90), (60, 40), (61, 300)])
def test_places_cover_the_photo_at_any_size(size: tuple[int, int]) -> None:
    """Red left, white centre, blue right: what is cut off is cut off on both sides alike."""
    place = Image.new("RGB", size, (255, 255, 255))
    place.paste((255, 0, 0), (0, 0, size[0] // 3, size[1]))
    place.paste((0, 0, 255), (size[0] - size[0] // 3, 0, size[0], size[1]))
    photo, mask = Image.new("L", (60, 40), 77), Image.new("L", (60, 40))
    composed = np.asarray(paste(photo, mask, place)).astype(int)
    assert composed.shape == (40, 60, 3)
    assert np.abs(composed[:, ::-1, 0] - composed[:, :, 2]).max() <= 2
    assert composed[20, 30].tolist() == [255, 255, 255]


def test_the_mask_is_the_share_of_the_bird() -> None:
    rng = np.random.RandomState(0)
    photo, place = (Image.fromarray(rng.randint(0, 256, (40, 60, 3), np.uint8)) for _ in range(2))
    mask = draw_mask((60, 40), 0)
    share = np.asarray(mask)[..., None] / 255
    assert {0, 0.6, 0.8, 1} == set(np.unique(share))
    expected = np.asarray(photo) * share + np.asarray(place) * (1 - share)
    assert np.abs(np.asarray(paste(photo, mask, place)) - expected).max() <= 0.51


def test_the_store_of_a_built_set(parts: Path) -> None:
    """A greyscale photograph is pasted in grey onto a coloured place."""
    dataset, card = make_dataset("waterbirds:built", settings={"size": "32"})
    store = open_store(dataset, card, parts)
    assert store.card.name == "waterbirds:built[32px,custom]"
    assert {name: sum(counts) for name, counts in store.card.counts.items()} == {"train": 16, "val": 4, "test": 20}
    assert len({store.pools[name] for name in SPLITS}) == 1
    name, position = next(
        (name, rows.index(GREYSCALE))
        for name in SPLITS
        if GREYSCALE in (rows := store.split(name).image_rows().tolist())
    )
    split = store.split(name)
    image = split.images[GREYSCALE : GREYSCALE + 1][0].astype(int)
    assert np.ptp(image[18, 16]) <= 2
    assert (image[-3, 1, 2] > 150) == bool(split.a[position, 0])
    assert not list((data_home()).rglob("*.jpg"))  # nothing in between is written


# ------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("places", SPELLINGS)
def test_place_folders_are_found_however_they_are_spelled(places: tuple[str, ...]) -> None:
    write_parts(data_home() / "waterbirds_parts", places=places)
    assert len(sources(load(None))) == 40


def test_hidden_files_of_places_are_left_out(parts: Path) -> None:
    for n in range(100):
        (parts / PLACES[0] / f"._{n:08}.jpg").write_bytes(b"what macOS leaves in archives")
    assert not [place for _, _, place in sources(load(parts)) if place.name.startswith(".")]


def test_too_few_places_says_how_many(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts", places=PLACES, each=8)
    with pytest.raises(MissingData, match=r"needs \d+ pictures of (bamboo|ocean).*found 16 in .*(broadleaf|natural)"):
        load(parts)


@pytest.mark.parametrize("folder", ["segmentations", "f/forest", "o"])
def test_a_missing_part_is_named(parts: Path, folder: str) -> None:
    (parts / folder).rename(parts / "away")
    missing = {"segmentations": "segmentations", "f/forest": "forest/broadleaf", "o": "ocean"}[folder]
    with pytest.raises(MissingData, match=f"there is no folder {parts / missing}.*Places365 folders"):
        load(parts)


def test_nothing_there_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"CUB_200_2011/images.txt .*Put CUB_200_2011/ and segmentations/"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("images.txt", lambda lines: [*lines[:4], "5", *lines[5:]], "images.txt: line 5 is '5'"),
        ("images.txt", lambda lines: [*lines[:4], "x y", *lines[5:]], "images.txt: line 5 is 'x y'"),
        ("images.txt", lambda lines: [*lines, lines[0]], "images.txt: line 41 is '1 .*expected a new number"),
        ("images.txt", lambda lines: ["1 bird.jpg", *lines[1:]], "images.txt: line 1: 'bird.jpg' is no picture in a"),
        ("images.txt", lambda lines: ["1 001.Gull/../../x.jpg", *lines[1:]], "images.txt: line 1: .* is not a file"),
        ("images.txt", lambda lines: [], "images.txt: is empty"),
        ("train_test_split.txt", lambda lines: lines[:-1], "no line for picture 40 .*images.txt: line 40"),
        ("train_test_split.txt", lambda lines: ["1 -1", *lines[1:]], "split.txt: line 1: '-1' is neither 0 nor 1"),
    ],
)
def test_a_bad_line_is_named(parts: Path, table: str, change: Callable[[list[str]], list[str]], message: str) -> None:
    path = parts / "CUB_200_2011" / table
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(CorruptFile, match=message):
        load(parts)


def test_a_missing_mask_and_one_of_another_size_are_named(parts: Path) -> None:
    _, mask, place = sources(load(parts))[5]
    save(Image.new("L", (5, 5)), mask)
    name = mask.with_suffix(".jpg").name
    with pytest.raises(CorruptFile, match=rf"{name} \(with mask .* on {place}\).*its mask 5x5"):
        load(parts)["train"].images[5:6]
    mask.unlink()
    with pytest.raises(CorruptFile, match=f"{mask.name} .*cannot be read: No such file"):
        open_store(*make_dataset("waterbirds:built"), parts)
