"""MetaShift's cats and dogs: pooled in a fixed order, split anew with SubpopBench's draws."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from formats.listings import list_backwards
from formats.metashift import FOLDERS, write_metashift
from PIL import Image
from worstgroup.benchmark.errors import CorruptFile, MissingData
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.pictures import Pictures
from worstgroup.benchmark.planning import Request, make_dataset, plan
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import SPLITS
from worstgroup.benchmark.store import Split, found_card, open_store
from worstgroup.datasets.metashift import CARD, MetaShift, draw_parts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_metashift(tmp_path)


def files(split: Split) -> list[Path]:
    """The file of each example."""
    assert isinstance(split.images, Pictures)
    return [split.images.files[row][0] for row in split.image_rows()]


# ------------------------------------------------------------------------------------------------------------- split


def test_sizes_of_the_split() -> None:
    assert np.bincount(draw_parts(3499, **CARD.params)).tolist() == [CARD.sizes[name] for name in SPLITS]
    assert CARD.counts == {}


def test_the_draws_are_those_of_subpopbench() -> None:
    random, n = np.random.RandomState(42), 3499
    test = random.choice(np.arange(n), size=int(n * 0.25), replace=False)
    val = random.choice(np.setdiff1d(np.arange(n), test), size=int(n * 0.1), replace=False)
    part = draw_parts(n, **CARD.params)
    assert np.array_equal(np.flatnonzero(part == 2), np.sort(test))
    assert np.array_equal(np.flatnonzero(part == 1), np.sort(val))


def test_all_pictures_are_pooled_and_split_once(root: Path) -> None:
    splits = MetaShift(CARD).load(root)
    assert [len(splits[name]) for name in SPLITS] == [26, 4, 10]
    assert len({id(split.images) for split in splits.values()}) == 1
    shown = [path for split in splits.values() for path in files(split)]
    assert sorted(shown) == sorted(root.rglob("*.jpg"))
    assert {path.relative_to(root).parts[0] for path in files(splits["test"])} == {"train", "test"}


def test_the_pool_is_in_the_order_of_the_folders_and_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = MetaShift(CARD)
    images = dataset.load(root)["train"].images
    assert isinstance(images, Pictures)
    pooled = [path for (path,) in images.files]
    assert pooled == [path for folder in FOLDERS for path in sorted((root / folder).iterdir())]
    key = dataset.source_key(root)
    list_backwards(monkeypatch)
    assert dataset.source_key(root) == key


def test_labels_are_those_of_the_folders(root: Path) -> None:
    for split in MetaShift(CARD).load(root).values():
        for path, y, (place,) in zip(files(split), split.y, split.a, strict=True):
            assert path.parent.name == f"{CARD.classes[y]}({CARD.attributes[0].values[place]})"
    assert CARD.classes == ("dog", "cat")
    assert CARD.attributes[0].values == ("outdoor", "indoor")
    assert CARD.attributes[0].aligned == (0, 1)


def test_one_picture_in_two_folders_is_one_unit(root: Path) -> None:
    shutil.copy(root / FOLDERS[0] / "2003.jpg", root / FOLDERS[2] / "2003.jpg")
    splits = MetaShift(CARD).load(root)
    units = {
        path: int(unit) for split in splits.values() for path, unit in zip(files(split), split.units(), strict=True)
    }
    assert len(units) == 41
    assert len(set(units.values())) == 40
    assert units[root / FOLDERS[0] / "2003.jpg"] == units[root / FOLDERS[2] / "2003.jpg"]


# ----------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "inner", ["", "MetaShift-Cat-Dog-indoor-outdoor", "metashift/MetaShift-Cat-Dog-indoor-outdoor"]
)
def test_root_is_the_folder_or_above_it(root: Path, tmp_path: Path, inner: str) -> None:
    (tmp_path / "root" / inner).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root, tmp_path / "root" / inner)
    assert len(MetaShift(CARD).load(tmp_path / "root")["test"]) == 10


def test_without_root_the_data_home_is_searched() -> None:
    with pytest.raises(MissingData, match=r"metashift\.tar\.gz .*data/metashift"):
        MetaShift(CARD).load(None)
    write_metashift(data_home() / "metashift")
    assert len(MetaShift(CARD).load(None)["test"]) == 10


def test_missing_folders_are_named(root: Path) -> None:
    shutil.rmtree(root / FOLDERS[1])
    shutil.rmtree(root / FOLDERS[2])
    with pytest.raises(MissingData, match=r"no picture in train/dog/dog\(outdoor\), test/cat/cat\(outdoor\)\. "):
        MetaShift(CARD).load(root)


def test_other_sizes_make_a_custom_dataset(root: Path) -> None:
    splits = MetaShift(CARD).load(root)
    found = found_card(CARD, splits)
    assert found.name == "metashift[custom]"
    assert {name: sum(counts) for name, counts in found.counts.items()} == {"train": 26, "val": 4, "test": 10}
    with pytest.raises(CorruptFile, match="2,276"):
        found_card(CARD, splits, strict=True)


def test_official_sizes_keep_the_name_and_get_counts() -> None:
    numbers = np.arange(3499)
    part = draw_parts(len(numbers), **CARD.params)
    y, a = numbers % 2, numbers // 2 % 2
    images = np.empty((len(numbers), 1, 1, 3), np.uint8)
    rows = {name: numbers[part == i] for i, name in enumerate(SPLITS)}
    splits = {name: Split(images, y[at], a[at, None], rows=at) for name, at in rows.items()}
    found = found_card(CARD, splits, strict=True)
    assert found.name == "metashift"
    assert {name: sum(found.counts[name]) for name in SPLITS} == CARD.sizes


def test_the_short_side_is_resized_and_the_centre_cut(root: Path) -> None:
    from torchvision.transforms import functional as F

    path = root / FOLDERS[0] / "2000.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(path)
    images = MetaShift(CARD).load(root)["train"].images
    with Image.open(path) as picture:
        expected = F.center_crop(F.resize(picture.convert("RGB"), [256]), [224, 224])
    assert np.array_equal(images[0:1][0], np.asarray(expected))


def test_a_run_of_the_drawn_set(root: Path) -> None:
    settings = {"data.size": "32", "recipe.epochs": "1", "recipe.batch_size": "8"}
    planned = plan([Request("metashift", "erm", "none", "tiny_cnn", seeds=(0,), settings=settings)], root)
    (run,) = planned.runs
    assert run.spec is not None
    record = run_spec(run.spec, planned.stores["metashift[32px,custom]"])
    assert record.status == "finished", record.error
    assert record.metrics["wga"] is not None


def test_the_card_of_the_store_has_the_counts_that_were_found(root: Path) -> None:
    dataset, card = make_dataset("metashift", settings={"size": "32"})
    store = open_store(dataset, card, root)
    for name in SPLITS:
        split = store.split(name)
        assert store.card.counts[name] == tuple(np.bincount(2 * split.y + split.a[:, 0], minlength=4).tolist())
