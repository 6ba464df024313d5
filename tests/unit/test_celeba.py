"""CelebA: every packaging, every trap of its files, its pairs and its environments, on drawn faces."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.celeba import (
    BLOND,
    MALE,
    PACKAGINGS,
    SIZES,
    Faces,
    draw_faces,
    draw_pictures,
    link_pictures,
    write_attributes,
    write_csv_lists,
    write_pair,
    write_partition,
)
from worstgroup.benchmark import pictures as engine
from worstgroup.benchmark.errors import CorruptFile, MissingData, UnknownName, UserError
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.metrics import group_index, lift
from worstgroup.benchmark.planning import Request, find_card, make_dataset, plan
from worstgroup.benchmark.registry import DATASETS, METHODS
from worstgroup.benchmark.spec import SPLITS, MethodName
from worstgroup.benchmark.store import Split, Splits, found_card, open_store
from worstgroup.benchmark.suite import read_suite
from worstgroup.commands import listing
from worstgroup.datasets import celeba, celeba_files
from worstgroup.datasets.celeba import ATTRIBUTES, EX2L, CelebA

CARD = celeba.BLOND
SMALL = engine.with_pixels(CARD, size=8)
"""Pixels in small, where only their identity matters."""


@pytest.fixture(scope="module")
def faces() -> Faces:
    return draw_faces()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, faces: Faces) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("celeba") / "jpg", faces.names)


@pytest.fixture
def official(tmp_path: Path, faces: Faces, pictures: Path) -> Path:
    """A folder with the two official lists and the pictures."""
    PACKAGINGS["official"](tmp_path / "root", faces, pictures)
    return tmp_path / "root"


def load(root: Path, name: str = "celeba") -> Splits:
    """Splits of a variant."""
    return CelebA(find_card(name)[1]).load(root)


def key(splits: Splits) -> str:
    """Identity of the pixels, which all splits share."""
    (images,) = {id(split.images): split.images for split in splits.values()}.values()
    assert isinstance(images, engine.Pictures)
    return images.key


def official_splits(train: tuple[int, ...]) -> Splits:
    """Labels without pictures: the official sizes, with these groups in train and one in the others."""
    splits: Splits = {}
    for name, counts in {"train": train, "val": (19_867, 0, 0, 0), "test": (19_962, 0, 0, 0)}.items():
        group = np.repeat(np.arange(4), counts)
        splits[name] = Split(np.empty(len(group)), group // 2, group[:, None] % 2)  # type: ignore[index]
    return splits


# -------------------------------------------------------------------------------------------------------- packagings


def test_every_packaging_gives_the_same_store(tmp_path: Path, faces: Faces, pictures: Path) -> None:
    stores = {}
    for packaging, write in PACKAGINGS.items():
        write(tmp_path / packaging, faces, pictures)
        stores[packaging] = open_store(CelebA(SMALL), SMALL, tmp_path / packaging)
    assert len({store.fingerprint for store in stores.values()}) == 1
    assert len([path for path in (data_home() / "pixels").iterdir() if path.is_dir()]) == 1
    for store in stores.values():
        assert store.card.name == "celeba:Blond_Hair/Male[8px,custom]"
        assert [sum(store.card.counts[name]) for name in SPLITS] == list(SIZES)
    first = stores["official"]
    for code, name in enumerate(SPLITS):
        split = first.split(name)
        rows = np.flatnonzero(faces.split == code)
        assert np.array_equal(split.image_rows(), rows)  # the partition is contiguous
        assert np.array_equal(split.y, faces.bits[rows, BLOND])
        assert np.array_equal(split.a[:, 0], faces.bits[rows, MALE])
        groups = np.bincount(2 * split.y + split.a[:, 0], minlength=4)
        assert first.card.counts[name] == tuple(groups)
        assert groups.min() > 0


def test_the_official_list_has_its_quirks(official: Path) -> None:
    """Else the fixture would prove nothing: a count, a blank behind the names, double blanks, CRLF."""
    count, names, first = (official / "list_attr_celeba.txt").read_bytes().split(b"\n")[:3]
    assert count == b"60\r"
    assert names.endswith(b"Young \r")
    assert len(names.split()) == 40
    assert b"  1" in first
    assert first.startswith(b"000001.jpg ")


def test_rows_are_joined_by_name(official: Path, faces: Faces) -> None:
    expected = load(official)
    order = np.random.default_rng(1).permutation(60)
    write_attributes(official / "list_attr_celeba.txt", faces.taken(order))
    write_partition(official / "list_eval_partition.txt", faces.taken(order[::-1]))
    found = load(official)
    for name in SPLITS:
        assert np.array_equal(found[name].y, expected[name].y)
        assert np.array_equal(found[name].a, expected[name].a)
        assert np.array_equal(found[name].image_rows(), expected[name].image_rows())
    assert key(found) == key(expected)


def test_lists_are_split_once_for_all_pairs_and_never_stale(official: Path) -> None:
    celeba_files._rows.cache_clear()
    before = load(official, "celeba:Bangs/Male")["train"]
    load(official, "celeba:Bald/Young")
    assert celeba_files._rows.cache_info().misses == 2  # the two lists
    path = official / "list_attr_celeba.txt"
    stat, text = path.stat(), path.read_bytes()
    head, rows = text.split(b"Young ", 1)
    path.write_bytes(head + b"Young " + rows.replace(b" -1", b" +0").replace(b"  1", b" -1").replace(b" +0", b"  1"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = load(official, "celeba:Bangs/Male")["train"]
    assert np.array_equal(after.y, 1 - before.y)
    assert np.array_equal(after.a, 1 - before.a)
    assert path.stat().st_size == stat.st_size


def test_values_may_be_0_and_1(official: Path, faces: Faces) -> None:
    expected = load(official)
    path = official / "list_attr_celeba.txt"
    path.write_text(path.read_text().replace("-1", " 0"))
    assert np.array_equal(load(official)["train"].y, expected["train"].y)


def test_png_twins_are_read_at_the_same_stems(tmp_path: Path, faces: Faces, official: Path) -> None:
    write_csv_lists(tmp_path / "png", faces)
    draw_pictures(tmp_path / "png/img_align_celeba_png", faces.names, ".png")
    twins, originals = load(tmp_path / "png"), load(official)
    assert np.array_equal(twins["test"].y, originals["test"].y)
    assert key(twins) != key(originals)  # pixels from before JPEG compression
    assert twins["test"].images[:1].shape == (1, 224, 224, 3)


def test_a_jpg_comes_before_its_twin_and_case_does_not_matter(official: Path, faces: Faces) -> None:
    folder = official / "img_align_celeba"
    expected = key(load(official))
    (folder / "000001.jpg").rename(folder / "000001.JPG")
    (folder / "000002.png").write_bytes(b"no picture")
    (folder / "._000003.jpg").write_bytes(b"what a Mac leaves")
    assert key(load(official)) == expected


def test_lists_come_before_a_table_of_one_pair(official: Path, faces: Faces) -> None:
    write_pair(official / "metadata.csv", faces)
    assert load(official, "celeba:Smiling/Young")["val"].y.shape == (12,)


@pytest.mark.parametrize("packaging", ["dfr", "subpop"])
def test_a_table_of_one_pair_refuses_others(tmp_path: Path, faces: Faces, pictures: Path, packaging: str) -> None:
    PACKAGINGS[packaging](tmp_path, faces, pictures)
    says = (
        r"metadata\w*.csv: has no Smiling: its columns y and (place|a) are Blond_Hair and Male for good. Put list_attr"
    )
    with pytest.raises(MissingData, match=says):
        load(tmp_path, "celeba:Smiling/Male")
    swapped, usual = load(tmp_path, "celeba:Male/Blond_Hair"), load(tmp_path)
    assert np.array_equal(swapped["train"].y, usual["train"].a[:, 0])
    assert np.array_equal(swapped["train"].a[:, 0], usual["train"].y)


# ------------------------------------------------------------------------------------------------------- bad files


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace a text in a file once; it must be there."""

    def change(root: Path) -> None:
        text = (root / file).read_bytes().decode()
        assert old in text
        (root / file).write_bytes(text.replace(old, new, 1).encode())

    return change


ATTR, EVAL, JPG = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit(ATTR, "000007.jpg  1", "000007.jpg 1  1"), f"{ATTR}: line 9 has 42 cells, expected 41"),
        (edit(ATTR, "000007.jpg  1", "000007.jpg"), f"{ATTR}: line 9 has 40 cells, expected 41"),
        (edit(ATTR, "60\r\n", "61\r\n"), f"{ATTR}: its first line says 61 pictures, 60 rows follow"),
        (edit(ATTR, "Blond_Hair", "Fair_Hair"), f"{ATTR}: has no column Blond_Hair; its header is"),
        (edit(ATTR, "Bangs", "Male"), f"{ATTR}: two columns have the same name; its header is"),
        (edit(ATTR, "000007", "000006"), f"{ATTR}: line 9: picture 000006 stands there a second time"),
        (edit(ATTR, "000007", "000099"), f"{ATTR}: line 9: picture 000099 is not in"),
        (edit(ATTR, "000007.jpg", "../000007.jpg"), f"{ATTR}: line 9: '../000007.jpg' is not a picture beside"),
        (edit(EVAL, "000060.jpg 2\n", ""), f"{ATTR}: line 62: picture 000060 is not in"),
        (edit(EVAL, "000060.jpg 2\n", "000060.jpg 2\n000061.jpg 2\n"), f"{EVAL}: line 61: picture 000061 is not in"),
        (edit(EVAL, "000060.jpg 2", "000060.jpg 3"), f"{EVAL}: line 60: partition is '3', it must be one of 0, 1, 2"),
        (edit(EVAL, "000060.jpg 2", "000060.jpg"), f"{EVAL}: line 60 has 1 cells, expected 2"),
        (lambda root: (root / EVAL).write_text(""), f"{EVAL}: has no column image_id, partition"),
        (lambda root: (root / EVAL).write_bytes(b"\xff\xfe\x00"), f"{EVAL}: cannot be read as text"),
        (lambda root: (root / ATTR).write_text("\u00b2\nBlond_Hair Male\n"), f"{ATTR}: has no column image_id"),
        (
            lambda root: (root / EVAL).write_text('image_id,partition\n"000001.jpg,0\n'),
            f"{EVAL}: line 2: cannot be split",
        ),
        (lambda root: (root / JPG / "000033.jpg").unlink(), f"{ATTR}: line 35: there is no 000033.jpg or .png in"),
    ],
)
def test_a_bad_file_is_named_with_its_line(official: Path, change: Callable[[Path], None], says: str) -> None:
    text = (official / ATTR).read_bytes().decode()  # makes line 9 the same in every test
    (official / ATTR).write_bytes(text.replace("000007.jpg -1", "000007.jpg  1").encode())
    change(official)
    with pytest.raises(CorruptFile) as error:
        load(official)
    assert says in str(error.value)
    assert str(official) in str(error.value)


def test_a_value_that_is_none_is_named(official: Path, faces: Faces) -> None:
    path = official / ATTR
    lines = path.read_text().splitlines()
    cells = lines[6].split()
    cells[1 + MALE] = "2"
    path.write_text("\n".join([*lines[:6], " ".join(cells), *lines[7:]]))
    with pytest.raises(CorruptFile, match=r"line 7: Male is '2', it must be one of -1, 0, 1"):
        load(official)
    assert len(load(official, "celeba:Bangs/Young")["test"]) == 12


def test_a_negative_label_of_a_pair_is_refused(tmp_path: Path, faces: Faces, pictures: Path) -> None:
    PACKAGINGS["dfr"](tmp_path, replace(faces, bits=np.where(faces.bits, 1, -1)), pictures)
    with pytest.raises(CorruptFile, match=r"metadata.csv: line \d+: (y|place) is '-1', it must be one of 0, 1"):
        load(tmp_path)


def test_names_that_lead_out_are_refused(tmp_path: Path, faces: Faces, pictures: Path) -> None:
    write_pair(tmp_path / "root/metadata.csv", faces, folder="../outside/")
    link_pictures(pictures, tmp_path / "outside")
    with pytest.raises(CorruptFile, match=r"line 2: '../outside' is not a file below"):
        load(tmp_path / "root")


def test_a_broken_picture_is_named_with_its_line(official: Path) -> None:
    broken = official / JPG / "000005.jpg"
    content = broken.read_bytes()
    broken.unlink()  # its bytes are shared with other tests
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFile, match=rf"{broken} \(line 7 of list_attr_celeba.txt\): cannot be decoded"):
        load(official)["train"].images[:8]


def test_a_foreign_table_is_refused(tmp_path: Path, faces: Faces) -> None:
    write_pair(tmp_path / "metadata.csv", faces, "filename,y")
    with pytest.raises(CorruptFile, match=r"metadata.csv: is no table of CelebA"):
        load(tmp_path)


def test_what_is_missing_is_said(official: Path, tmp_path: Path) -> None:
    (official / EVAL).rename(tmp_path / EVAL)
    with pytest.raises(MissingData, match=rf"there is {ATTR}, but no list_eval_partition.txt or .csv"):
        load(official)
    (tmp_path / EVAL).rename(official / EVAL)
    (official / JPG).rename(tmp_path / JPG)
    with pytest.raises(MissingData, match=r"there are no pictures; unpack img_align_celeba.zip"):
        load(official)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingData, match=r"celeba:Blond_Hair/Male: .*non-commercial.*list_eval_partition.txt"):
        load(tmp_path / "empty")


# ------------------------------------------------------------------------------------------------------------- pairs


def test_the_plain_name_is_the_pair_of_the_field(official: Path) -> None:
    assert make_dataset("celeba")[1] is make_dataset("celeba:Blond_Hair/Male")[1] is CARD
    assert CARD.group_names() == ["dark/female", "dark/male", "blond/female", "blond/male"]
    names = ("celeba", "celeba:Blond_Hair/Male")
    made = plan([Request(name, "erm", seeds=(0,), settings={"data.size": "8"}) for name in names], official)
    short, full = (run.spec for run in made.runs)
    assert short == full
    assert list(made.stores) == ["celeba:Blond_Hair/Male[8px,custom]"]


def test_the_official_counts_add_up_to_the_partition() -> None:
    assert {name: sum(counts) for name, counts in CARD.counts.items()} == celeba.SIZES
    assert sum(celeba.SIZES.values()) == 202_599
    assert len(ATTRIBUTES) == len(set(ATTRIBUTES)) == 40
    assert (ATTRIBUTES[9], ATTRIBUTES[20], ATTRIBUTES[39]) == ("Blond_Hair", "Male", "Young")


def test_any_pair_shares_the_pixels(official: Path, faces: Faces) -> None:
    stores = []
    for name in ("celeba", "celeba:Wearing_Hat/Smiling", "celeba:Male/Heavy_Makeup", "celeba:ex2l"):
        dataset, card = make_dataset(name, official, {"size": "8"})
        stores.append(open_store(dataset, card, official))
    assert len({pool for store in stores for pool in store.pools.values()}) == 1
    assert len({store.fingerprint for store in stores}) == 4
    hat = stores[1]
    assert hat.card.classes == ("not Wearing_Hat", "Wearing_Hat")
    columns = [ATTRIBUTES.index("Wearing_Hat"), ATTRIBUTES.index("Smiling")]
    y, a = faces.bits[:36, columns].T
    assert np.array_equal(hat.split("train").y, y)
    assert np.array_equal(hat.split("train").a[:, 0], a)
    together = np.cov(y, a)[0, 1] > 0
    assert hat.card.attributes[0].aligned == ((0, 1) if together else (1, 0))


def test_a_pair_is_opened_again_without_its_files(home: Path, official: Path) -> None:
    files = home / "data/celeba"
    files.parent.mkdir(parents=True)
    official.rename(files)
    dataset, card = make_dataset("celeba:Bangs/Smiling", None, {"size": "8"})
    store = open_store(dataset, card)
    files.rename(official)
    again = open_store(dataset, card)
    assert again.card == store.card
    assert len(again.card.attributes[0].aligned) == 2


def test_a_pair_of_the_official_sizes_keeps_its_name_and_finds_its_counts() -> None:
    card = celeba.pair("Bangs", "Male")
    train = (75_200, 62_991, 18_881, 5_698)
    found = found_card(card, official_splits(train), strict=True)
    assert (found.name, found.counts["train"], found.sizes) == ("celeba:Bangs/Male", train, celeba.SIZES)
    assert found.attributes[0].aligned == (1, 0)
    with pytest.raises(CorruptFile, match="the train split has 162,769 images, the card says 162,770"):
        found_card(card, official_splits((75_199, *train[1:])), strict=True)


def test_drawn_files_are_not_the_official_ones(official: Path) -> None:
    with pytest.raises(CorruptFile, match=r"card says \(71629, 66874, 22880, 1387\).*not the official ones"):
        open_store(CelebA(SMALL), SMALL, official, strict=True)
    assert not (data_home() / "pixels").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("celeba:Blonde_Hair/Male", r"unknown attribute of CelebA 'Blonde_Hair'. Did you mean Blond_Hair"),
        ("celeba:Male/Wearing_Leapstick", "Did you mean Wearing_Lipstick"),
        ("celeba:Male/", "unknown attribute of CelebA ''"),
        ("celeba:exl2", "unknown dataset variant 'celeba:exl2'. Did you mean celeba:ex2l"),
    ],
)
def test_unknown_names_get_close_ones_offered(name: str, says: str) -> None:
    with pytest.raises(UnknownName, match=says):
        find_card(name)


def test_an_attribute_is_no_shortcut_to_itself() -> None:
    with pytest.raises(UserError, match="celeba:Male/Male: an attribute is no shortcut to itself"):
        find_card("celeba:Male/Male")


def test_a_pair_is_shown_without_its_files() -> None:
    shown = listing.card("celeba:Bangs/Male")
    assert "attribute Male: female, male; aligned: found in train\n" in shown
    assert "images: train 162,770, val 19,867, test 19,962\n" in shown


SHARES = {
    "Double_Chin/Male": ((57.3, 38.1, 0.56, 4.1), (0, 1)),
    "Pale_Skin/Male": ((54.7, 41.0, 3.2, 1.15), (1, 0)),
    "Wearing_Necklace/Male": ((46.4, 41.4, 11.5, 0.76), (1, 0)),
    "Wearing_Hat/Male": ((56.4, 38.6, 1.4, 3.5), (0, 1)),
    "Big_Lips/Male": ((40.3, 35.8, 17.5, 6.4), (1, 0)),
    "Receding_Hairline/Male": ((55.0, 37.2, 2.9, 4.9), (0, 1)),
    "Wavy_Hair/Male": ((32.1, 36.3, 25.8, 5.9), (1, 0)),
    "Male/Heavy_Makeup": ((19.5, 38.4, 42.0, 0.13), (1, 0)),
    "Heavy_Makeup/Male": ((19.5, 42.0, 38.4, 0.13), (1, 0)),
}
"""Percent of the groups among the first 20,000 training pictures."""


@pytest.mark.parametrize("name", SHARES)
def test_alignment_is_the_lift(name: str) -> None:
    """By frequency both classes of a rare target would be aligned with one gender."""
    percent, aligned = SHARES[name]
    assert lift(np.rint(100 * np.array(percent)).astype(int), (2, 2), 0) == aligned


def test_lift_with_two_attributes_and_an_empty_value() -> None:
    counts = np.array([[[6, 2], [1, 0], [0, 0]], [[5, 5], [8, 1], [0, 0]]])
    assert lift(counts.ravel(), (2, 3, 2), 0) == (0, 1)
    assert lift(counts.ravel(), (2, 3, 2), 1) == (0, 1)


# ------------------------------------------------------------------------------------------------------ environments


def test_environments_have_the_published_shares_and_waste_little() -> None:
    available = np.array(CARD.counts["train"])
    sizes, percent = EX2L.params["sizes"], EX2L.params["percent"]
    counts = celeba.environment_counts(sizes, percent, available)
    assert tuple(counts.sum(0)) == EX2L.counts["train"]
    shares = 100 * counts / counts.sum(1, keepdims=True)
    assert np.abs(shares - percent).max() < 0.0101
    best = 0
    for first in range(70_000, 85_000, 7):  # the largest second environment beside any first
        left = available - np.rint(first * np.array(percent[0]) / 100)
        best = max(best, first + int(((left + 0.5) / np.array(percent[1]) * 100).min()))
    assert sum(sizes) >= best - 1


def test_environments_are_drawn_once_and_for_good(official: Path, faces: Faces) -> None:
    card = replace(EX2L, params={**EX2L.params, "percent": [[50, 25, 15, 10], [25, 50, 0, 25]], "sizes": [20, 8]})
    splits, again = (CelebA(card).load(official) for _ in range(2))
    train = splits["train"]
    assert train.env is not None
    assert np.array_equal(train.env, again["train"].env)
    assert np.array_equal(train.image_rows(), again["train"].image_rows())
    assert np.all(np.diff(train.image_rows()) > 0)  # each picture once, in the official order
    assert train.image_rows().max() < 36
    assert np.array_equal(train.y, faces.bits[train.image_rows(), BLOND])
    counts = [
        np.bincount(group_index(train.y, train.a, card.shape)[train.env == e], minlength=4).tolist() for e in (0, 1)
    ]
    assert counts == [[10, 5, 3, 2], [2, 4, 0, 2]]
    assert (splits["val"].env, splits["test"].env) == (None, None)
    other = CelebA(replace(card, params={**card.params, "seed": 1})).load(official)["train"]
    assert not np.array_equal(other.image_rows(), train.image_rows())


def test_few_pictures_make_small_environments_of_the_same_shares() -> None:
    percent = [[50.0, 50.0], [25.0, 75.0]]
    assert celeba.environment_counts([40, 40], percent, np.array([15, 100])).tolist() == [[10, 10], [5, 15]]
    assert celeba.environment_counts([40, 40], percent, np.array([30, 50])).tolist() == [[20, 20], [10, 30]]
    assert celeba.environment_counts([40, 40], [[100, 0]] * 2, np.array([40, 0])).tolist() == [[20, 0], [20, 0]]
    assert celeba.environment_counts([40, 40], [[95, 5]] * 2, np.array([10, 9])).tolist() == [[5, 1], [5, 1]]


def test_a_group_too_small_for_the_environments_is_named(official: Path, faces: Faces) -> None:
    bits = faces.bits.copy()
    bits[:, BLOND] &= 1 - bits[:, MALE]
    write_attributes(official / "list_attr_celeba.txt", replace(faces, bits=bits))
    with pytest.raises(UserError, match=r"celeba:ex2l: 2 environments need as many train pictures of blond/male, .* 0"):
        CelebA(EX2L).load(official)


# ------------------------------------------------------------------------------------------------- pixels and suites


@pytest.mark.parametrize("name", CARD.transforms)
def test_every_transform_gives_the_size_it_says(official: Path, name: str) -> None:
    card = engine.with_pixels(CARD, name)
    image = CelebA(card).load(official)["train"].images[:1]
    assert image.shape == (1, *card.image)
    assert card.name == ("celeba:Blond_Hair/Male" if name == "group_dro" else f"celeba:Blond_Hair/Male[{name}]")
    sizes = {"group_dro": (224, 224), "dfr": (224, 224), "wilds": (178, 178), "bpa": (274, 224), "lff": (224, 224)}
    assert card.image[:2] == sizes[name]


def test_labels_stay_out_of_records() -> None:
    for card in (CARD, EX2L, celeba.pair("Bangs", "Male")):
        assert not card.share_labels
        assert card.by_hand
        assert not any(source.urls for source in card.sources)


def test_the_suites_of_clusterfix_have_fourteen_pairs_that_can_be_run() -> None:
    suites = ("repro/clusterfix-celeba", "repro/clusterfix-celeba-more")
    requests: list[Any] = [request for name in suites for request in read_suite(name).requests()]
    pairs = list(dict.fromkeys(request.dataset for request in requests))
    assert len(pairs) == 14
    assert sum(name.endswith("/Male") for name in pairs) == 12
    for request in requests:
        card = make_dataset(request.dataset, None, {"transform": request.settings["data.transform"]})[1]
        assert card.image == (274, 224, 3)
        assert MethodName.parse(request.method).host in METHODS
    assert DATASETS["celeba"].cls is CelebA
