"""UrbanCars composed from drawn parts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.urbancars import (
    CAR,
    CATEGORIES,
    PLACES,
    THING,
    TRAIN,
    annotation,
    box_polygon,
    tall_things,
    write_cars,
    write_lvis,
    write_parts,
)
from PIL import Image
from worstgroup.benchmark.errors import CorruptFile, MissingData
from worstgroup.benchmark.registry import DATASETS
from worstgroup.benchmark.spec import SPLITS, Card
from worstgroup.benchmark.store import Splits, check_counts
from worstgroup.datasets.urbancars import UrbanCars
from worstgroup.datasets.urbancars_builder import divide, sequence
from worstgroup.datasets.urbancars_parts import Part, in_one_piece, object_mask

CARDS = DATASETS["urbancars"].cards


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parts; read only."""
    return write_parts(tmp_path_factory.mktemp("parts"))


COUNTS = {"train": TRAIN, "val": (1, 1, 1, 1), "test": (2, 2, 2, 2)}


def small(variant: str = "built") -> Card:
    """A card of the builder with counts for drawn parts; `TRAIN` is in group order of a class."""
    counts = {name: (*cells, *reversed(cells)) for name, cells in COUNTS.items()}
    return replace(CARDS[variant], counts=counts)  # type: ignore[arg-type]


def built(root: Path) -> Splits:
    return UrbanCars(small()).load(root)


def files_of(splits: Splits, name: Any, position: int) -> list[str]:
    """The source files of a split: 0 cars, 2 photographs of objects, 3 backgrounds."""
    return [files[position].as_posix() for files in splits[name].images.files]  # type: ignore[attr-defined]


def test_built_splits_have_the_counts_and_labels_of_the_card(parts: Path) -> None:
    splits = built(parts)
    check_counts(small(), splits)
    urban = [name.replace("-", "_").split("/")[0] for name in PLACES["urban"]]
    for name, split in splits.items():
        for car, photo, place, y, (background, thing) in zip(
            *(files_of(splits, name, position) for position in (0, 2, 3)), split.y, split.a, strict=True
        ):
            assert Path(car).name.startswith(("urban", "country")[y])
            assert int(Path(photo).stem) // 1000 == 1 + thing
            category = Path(place).relative_to(parts / "places").parts[0].replace("-", "_")
            assert (category in urban) == (background == 0)


def test_views_take_one_part_from_a_car_of_the_other_kind(parts: Path) -> None:
    train = built(parts)["train"]
    assert list(train.views) == ["background", "object"]
    before = train.images.files  # type: ignore[attr-defined]
    for name, changed in (("background", (3,)), ("object", (2,))):
        view = train.views[name].files  # type: ignore[attr-defined]
        for position in range(4):
            if position not in changed:
                assert [files[position] for files in view] == [files[position] for files in before]
        assert [files[changed[0]] for files in view] != [files[changed[0]] for files in before]
    of = {files[3]: set() for files in before}  # type: ignore[var-annotated]
    for files, y in zip(before, train.y, strict=True):
        of[files[3]].add(y)
    assert all(1 - y in of[files[3]] for files, y in zip(train.views["background"].files, train.y, strict=True))  # type: ignore[attr-defined]
    assert not built(parts)["val"].views


def test_splits_share_no_source_and_use_each_evenly(parts: Path) -> None:
    splits = built(parts)
    for position in (0, 2, 3):
        used = {name: files_of(splits, name, position) for name in SPLITS}
        assert not set(used["train"]) & set(used["val"])
        assert not set(used["train"]) & set(used["test"])
        assert not set(used["val"]) & set(used["test"])
    cars = files_of(splits, "train", 0)
    times = [cars.count(car) for car in set(cars) if "urban" in Path(car).name]
    assert len(times) == 4  # of six cars, one each is kept for val and test
    assert max(times) - min(times) <= 1
    assert len(set(splits["train"].units())) == len(set(cars))
    assert len(set(zip(cars, splits["train"].units(), strict=True))) == len(set(cars))


def test_the_table_may_say_the_splits(tmp_path: Path) -> None:
    folder = write_parts(tmp_path, splits=("test", "train", "val", "train", "val", "train"))
    splits = built(folder)
    for name, numbers in (("train", {1, 3, 5}), ("val", {2, 4}), ("test", {0})):
        assert {int(Path(car).stem[-1]) for car in files_of(splits, name, 0)} <= numbers


def test_building_is_deterministic_and_follows_seed_and_layout(parts: Path) -> None:
    first, second = UrbanCars(small()), UrbanCars(small())
    assert first.source_key(parts) == second.source_key(parts)
    assert np.array_equal(first.load(parts)["val"].images[:], second.load(parts)["val"].images[:])

    def changed(**change: Any) -> str:
        card = small()
        return UrbanCars(replace(card, params={"parts": {**card.params["parts"], **change}})).source_key(parts)

    layout = small().params["parts"]["layout"]
    keys = {first.source_key(parts), changed(seed=1), changed(layout={**layout, "row": 100})}
    assert len(keys) == 3


def test_built_variants_share_their_evaluation_splits(parts: Path) -> None:
    both, single = built(parts), UrbanCars(small("built-bg")).load(parts)
    assert both["test"].images.key == single["test"].images.key  # type: ignore[attr-defined]


def test_car_and_object_lie_where_the_layout_says(parts: Path) -> None:
    """The drawn car is 60 x 30, so 128 x 64 in the centre; the object 50 x 100, so 32 x 64 around row 128, col 224."""
    split = built(parts)["test"]
    for image in split.images[:].astype(int):
        car = np.abs(image - CAR).max(axis=-1) < 40
        thing = np.abs(image - THING).max(axis=-1) < 60
        for shape, top, bottom, left, right in ((car, 96, 160, 64, 192), (thing, 96, 160, 208, 240)):
            rows, cols = np.flatnonzero(shape.any(axis=1)), np.flatnonzero(shape.any(axis=0))
            assert abs(rows[0] - top) <= 1
            assert abs(rows[-1] + 1 - bottom) <= 1
            assert abs(cols[0] - left) <= 1
            assert abs(cols[-1] + 1 - right) <= 1
            assert shape[top + 1 : bottom - 1, left + 1 : right - 1].all()
        assert image.min(axis=-1).max() < 200  # none of the white around car and object came along
    assert split.images[:1].shape == (1, 256, 256, 3)


def with_objects(folder: Path, *more: dict[str, Any]) -> set[str]:
    """Photographs of the objects that are used once these annotations are added."""
    write_lvis(folder, [*tall_things(), *more])
    splits = built(folder)
    return {Path(photo).stem.lstrip("0") for name in SPLITS for photo in files_of(splits, name, 2)}


USUAL = {str(number) for number in (*range(1000, 1006), *range(2000, 2006))}


def test_small_broken_and_foreign_objects_are_left_out(tmp_path: Path) -> None:
    folder = write_parts(tmp_path)
    small_sign = annotation(90, 3000, "stop_sign", (10, 10, 67, 67))  # box area 4,489 < 4,500
    small_cow = annotation(91, 3001, "cow", (10, 10, 59, 59))  # mask area 3,481 < 3,500
    thin_cow = {**annotation(92, 3002, "cow", (10, 10, 90, 90)), "area": 3499.0}  # its box would do
    cat = annotation(93, 3003, "cat", (10, 10, 100, 100))
    halves = annotation(94, 3004, "street_sign", (10, 10, 100, 100))
    halves["segmentation"] = [box_polygon(10, 10, 40, 100), box_polygon(60, 10, 50, 100)]
    mixed = [annotation(95, 3005, "cow", (10, 10, 70, 90)), annotation(96, 3005, "fireplug", (85, 10, 70, 90))]
    assert with_objects(folder, small_sign, small_cow, thin_cow, cat, halves, *mixed) == USUAL


def test_objects_of_the_least_size_and_of_other_notations_are_used(tmp_path: Path) -> None:
    folder = write_parts(tmp_path)
    sign = {**annotation(90, 3000, "stop_sign", (10, 10, 45, 100)), "area": 100.0}  # box area 4,500; mask is not asked
    cow = annotation(91, 3001, "cow", (10, 10, 50, 70))  # mask area 3,500
    touching = annotation(92, 3002, "sheep", (10, 10, 100, 100))
    touching["segmentation"] = [box_polygon(10, 10, 60, 100), box_polygon(69, 10, 41, 100), [1.0, 2.0, 3.0, 4.0]]
    assert with_objects(folder, sign, cow, touching) <= USUAL | {"3000", "3001", "3002"}
    card = small()
    parts = {**card.params["parts"], "pools": {"train": 1, "val": 0, "test": 0}}
    counts = dict.fromkeys(SPLITS, (40,) * 8)
    splits = UrbanCars(replace(card, counts=counts, params={"parts": parts})).load(folder)  # type: ignore[arg-type]
    used = {Path(photo).stem.lstrip("0") for name in SPLITS for photo in files_of(splits, name, 2)}
    assert used == USUAL | {"3000", "3001", "3002"}


def test_run_lengths_go_down_the_columns() -> None:
    outline = {"size": [3, 4], "counts": [4, 2, 1, 2, 3]}
    mask = np.asarray(object_mask(outline, (4, 3)))
    assert np.array_equal(mask // 255, [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]])
    polygon = np.asarray(object_mask([box_polygon(1, 1, 2, 2)], (4, 3)))
    assert np.array_equal(mask, polygon)
    assert in_one_piece(outline)
    assert not in_one_piece({"size": [3, 4], "counts": [0, 1, 5, 2, 4]})


@pytest.mark.parametrize(
    ("outline", "says"),
    [
        ({"size": [3, 4], "counts": "PPY1"}, "compressed"),
        ({"size": [4, 3], "counts": [12]}, r"for a picture of \(3, 4\)"),
        ({"size": [3, 4], "counts": [11]}, "run lengths of 11 pixels"),
        ([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], "polygon of 7 numbers"),
    ],
)
def test_an_outline_that_cannot_be_drawn(outline: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        object_mask(outline, (4, 3))


def test_the_excerpt_of_lvis_is_remembered_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_parts(tmp_path)
    key = UrbanCars(small()).source_key(folder)
    with monkeypatch.context() as patch:
        patch.setattr("worstgroup.datasets.urbancars_parts.select_objects", lambda *_: pytest.fail("read again"))
        assert UrbanCars(small()).source_key(folder) == key
    write_lvis(folder, [{**thing, "segmentation": [box_polygon(30, 10, 50, 90)]} for thing in tall_things()])
    assert UrbanCars(small()).source_key(folder) != key


def test_missing_parts_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"no cars/cars\.csv"):
        built(tmp_path)
    folder = write_parts(tmp_path)
    shutil.rmtree(folder / "coco")
    (folder / "lvis_v1_train.json").unlink()
    with pytest.raises(MissingData, match=r"there is no lvis_v1_train\.json, no coco/train2017 in"):
        built(folder)


def test_too_few_parts_are_named(tmp_path: Path) -> None:
    folder = write_parts(tmp_path)
    write_lvis(folder, [*tall_things()[:2], *tall_things()[6:]])
    with pytest.raises(MissingData, match=r"urban objects in .*: 2 sources are too few, none is left for train"):
        built(folder)
    write_lvis(folder, tall_things())
    write_cars(folder / "cars", splits=["train", "train", "test", "test", "test", "test"])
    with pytest.raises(MissingData, match=r"urban cars in .*none is left for val"):
        built(folder)


def test_places_without_a_folder_or_with_two(tmp_path: Path) -> None:
    folder = write_parts(tmp_path)
    (folder / "places/gas_station").mkdir()
    with pytest.raises(CorruptFile, match="are both gas_station"):
        built(folder)
    (folder / "places/gas_station").rmdir()
    for picture in (folder / "places/forest/road").iterdir():
        picture.unlink()
    with pytest.raises(MissingData, match="forest/road: has no pictures"):
        built(folder)
    shutil.rmtree(folder / "places/garage")
    with pytest.raises(MissingData, match="has no folder garage-outdoor or garage_outdoor or garage/outdoor"):
        built(folder)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("urban9.png,m.png,rural", "line 14: kind is 'rural', it must be one of urban, country"),
        ("../urban9.png,m.png,urban", r"line 14: '../urban9\.png' is not a file below"),
        ("urban0.png,masks/urban0.png,urban", r"line 14: urban0\.png stands in the table twice"),
        ("urban9.png,m.png", "line 14 has 2 cells"),
    ],
)
def test_a_wrong_line_of_the_cars_is_named(tmp_path: Path, line: str, says: str) -> None:
    folder = write_parts(tmp_path)
    with (folder / "cars/cars.csv").open("a") as table:
        table.write(line + "\n")
    with pytest.raises(CorruptFile, match=says):
        built(folder)


def test_a_wrong_split_of_a_car_is_named(tmp_path: Path) -> None:
    folder = write_parts(tmp_path, splits=("train", "val", "test", "train", "train", "valid"))
    with pytest.raises(CorruptFile, match="line 7: split is 'valid'"):
        built(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not the json of LVIS v1"),
        ("[" * 100_000, "is not the json of LVIS v1: RecursionError"),
        ('{"annotations": null, "categories": []}', "is not the json of LVIS v1: TypeError"),
        ('{"annotations": []}', "KeyError: 'categories'"),
        ('{"annotations": [], "categories": [{"id": 1, "name": "cow"}]}', "has no category fireplug, stop_sign"),
    ],
)
def test_a_foreign_json_is_named(tmp_path: Path, content: str, says: str) -> None:
    folder = write_parts(tmp_path)
    (folder / "lvis_v1_train.json").write_text(content)
    with pytest.raises(CorruptFile, match=says):
        built(folder)


def test_a_broken_annotation_is_numbered(tmp_path: Path) -> None:
    folder = write_parts(tmp_path)
    broken = annotation(99, 3000, "cow", (10, 10, 100, 100))
    del broken["area"]
    categories = [{"id": 100 + n, "name": name} for n, name in enumerate(CATEGORIES)]
    content = {"categories": categories, "annotations": [*tall_things(), broken]}
    (folder / "lvis_v1_train.json").write_text(json.dumps(content))
    with pytest.raises(CorruptFile, match="annotation 12 cannot be read: KeyError: 'area'"):
        built(folder)


def test_a_mask_of_another_size_or_without_a_car_is_named(tmp_path: Path) -> None:
    folder = write_parts(tmp_path)
    for says, mask in (
        (r"the mask of the car is 50x40 px, its picture 100x80", Image.new("L", (50, 40), 255)),
        ("the mask of the car is empty", Image.new("L", (100, 80))),
    ):
        for path in (folder / "cars/masks").iterdir():
            mask.save(path)
        with pytest.raises(CorruptFile, match=rf"line \d+ of cars\.csv, object \d+ .*{says}"):
            built(folder)["val"].images[:1]


def test_a_missing_photograph_is_named(tmp_path: Path) -> None:
    folder = write_parts(tmp_path)
    (folder / "coco/train2017/000000001003.jpg").unlink()
    with pytest.raises(CorruptFile, match=r"000000001003\.jpg \(.*object 3 of lvis_v1_train\.json.*cannot be read"):
        UrbanCars(small()).source_key(folder)


def test_parts_of_one_source_stay_together() -> None:
    pieces = [Part(0, (), str(n // 3), str(n)) for n in range(30)]
    pools = divide(pieces, {"train": 0.8, "val": 0.1, "test": 0.1}, np.random.RandomState(0), "objects")
    assert [len(pools[name]) for name in SPLITS] == [24, 3, 3]
    sources = [{part.source for part in pools[name]} for name in SPLITS]
    assert sum(map(len, sources)) == len(set.union(*sources)) == 10


def test_a_part_is_used_again_only_after_all_others() -> None:
    pool = [Part(0, (), str(n), str(n)) for n in range(4)]
    names = [part.name for part in sequence(pool, 10, np.random.RandomState(0))]
    assert len(names) == 10
    assert set(names[:4]) == set(names[4:8]) == set("0123")
