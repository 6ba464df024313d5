"""Spawrious: its six challenges, their environments and cuts, and what test groups without training do to metrics."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from formats.listings import list_backwards
from formats.spawrious import CELLS, write_spawrious
from PIL import Image
from worstgroup.benchmark import metrics
from worstgroup.benchmark.errors import CorruptFile, MissingData
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.pictures import Pictures
from worstgroup.benchmark.planning import Request, make_dataset, plan
from worstgroup.benchmark.registry import DATASETS
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import SPLITS
from worstgroup.benchmark.store import Split, found_card, open_store
from worstgroup.datasets import spawrious
from worstgroup.datasets.spawrious import FULL, Cell, cells, held_out

VARIANTS = tuple(DATASETS["spawrious"].cards)
TABLE = ("bulldog", "dachshund", "labrador", "corgi")
"""The order of the tables below, which is not that of the class index."""
O2O = {
    "o2o-easy": ("desert jungle dirt snow", "dirt snow desert jungle", "beach"),
    "o2o-medium": ("mountain beach dirt jungle", "jungle dirt beach snow", "desert"),
    "o2o-hard": ("jungle mountain snow desert", "mountain snow desert jungle", "beach"),
}
M2M = {
    "m2m-easy": ("desert mountain dirt jungle", "dirt jungle mountain desert"),
    "m2m-medium": ("beach snow mountain desert", "desert mountain beach snow"),
    "m2m-hard": ("dirt jungle snow beach", "snow beach dirt jungle"),
}
"""Places p, q, r, s: bulldog p then q, dachshund q then p, labrador r then s, corgi s then r."""


def name(variant: str) -> str:
    return f"spawrious:{variant}"


def files(split: Split) -> list[Path]:
    """The file of each example."""
    assert isinstance(split.images, Pictures)
    return [split.images.files[row][0] for row in split.image_rows()]


def cell_of(path: Path) -> tuple[str, str, str]:
    """Copy, place and breed of a file."""
    copy, place, breed = path.parts[-4:-1]
    return copy, place, breed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_spawrious(tmp_path)


# ------------------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize("variant", O2O)
def test_one_to_one_places(variant: str) -> None:
    train, test, filler = O2O[variant]
    params = make_dataset(name(variant))[1].params
    assert params["train"] == {breed: [place] * 2 for breed, place in zip(TABLE, train.split(), strict=True)}
    assert params["test"] == {breed: [place] * 2 for breed, place in zip(TABLE, test.split(), strict=True)}
    assert params["filler"] == filler


@pytest.mark.parametrize("variant", M2M)
def test_many_to_many_places(variant: str) -> None:
    params = make_dataset(name(variant))[1].params
    for part, places in zip(("train", "test"), M2M[variant], strict=True):
        p, q, r, s = places.split()
        assert params[part] == {"bulldog": [p, q], "dachshund": [q, p], "labrador": [r, s], "corgi": [s, r]}
    assert params["filler"] == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_classes_are_in_index_order_and_their_main_place_is_aligned(variant: str) -> None:
    _, card = make_dataset(name(variant))
    assert card.classes == ("bulldog", "corgi", "dachshund", "labrador")
    (place,) = card.attributes
    assert place.values == ("desert", "jungle", "dirt", "mountain", "snow", "beach")
    for y, breed in enumerate(card.classes):
        assert place.values[place.aligned[y]] == card.params["train"][breed][0]
    assert place.train_ratio is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_counts(variant: str) -> None:
    _, card = make_dataset(name(variant))
    train, val, test = (np.array(card.counts[split]).reshape(4, 6) for split in SPLITS)
    assert (train.sum(), val.sum(), test.sum()) == (21_544, 3_800, 25_344)
    assert ((train + val).sum(1) == 2 * FULL).all()
    assert (test.sum(1) == 2 * FULL).all()
    assert not ((train + val > 0) & (test > 0)).any()
    assert ((val > 0) == (train > 0)).all()
    sizes = {int(n) for n in (train + val).ravel() if n}
    assert sizes == ({3072 + 2756, 96 + 412} if card.params["filler"] else {FULL})


def test_counts_of_single_groups() -> None:
    groups = make_dataset("spawrious:o2o-easy")[1].group_names()
    easy, hard = (make_dataset(f"spawrious:{variant}")[1].counts for variant in ("o2o-easy", "m2m-hard"))
    at = {group: index for index, group in enumerate(groups)}
    assert [easy[split][at["corgi/snow"]] for split in SPLITS] == [4954, 874, 0]
    assert [easy[split][at["corgi/beach"]] for split in SPLITS] == [432, 76, 0]
    assert [easy[split][at["corgi/jungle"]] for split in SPLITS] == [0, 0, 6336]
    assert [hard[split][at["corgi/beach"]] for split in SPLITS] == [2693, 475, 0]
    assert [hard[split][at["corgi/dirt"]] for split in SPLITS] == [0, 0, 3168]


@pytest.mark.parametrize(
    ("n", "percent", "main", "filler"),
    [(3168, 97, 3072, 96), (3168, 87, 2756, 412), (100, 97, 97, 3), (4, 97, 3, 1), (4, 87, 3, 1), (4, 100, 4, 0)],
)
def test_limits_are_scaled_with_the_folder(n: int, percent: int, main: int, filler: int) -> None:
    assert Cell(0, 0, 0, 0, percent).size(n) == main
    assert Cell(0, 0, 0, 0, percent, filler=True).size(n) == filler


def test_every_challenge_names_its_archive() -> None:
    for variant in VARIANTS:
        (source,) = make_dataset(name(variant))[1].sources
        part = "entire_dataset" if variant in M2M else variant.replace("-", "_")
        assert source.file == f"spawrious224__{part}.tar.gz"
        assert source.urls[0].endswith(f"/{source.file}?dl=1")


# ----------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_are_those_of_the_folders(root: Path, variant: str) -> None:
    dataset, card = make_dataset(name(variant))
    splits = dataset.load(root)
    assert len({id(split.images) for split in splits.values()}) == 1
    for part in SPLITS:
        split = splits[part]
        for path, y, (place,) in zip(files(split), split.y, split.a, strict=True):
            assert cell_of(path)[1:] == (card.attributes[0].values[place], card.classes[y])
    shown = [path for part in SPLITS for path in files(splits[part])]
    assert len(set(shown)) == len(shown) == len(splits["train"].images)
    assert len(splits["test"]) == 8 * 4


def test_one_to_one_environments_read_a_copy_each_and_test_reads_both(root: Path) -> None:
    splits = make_dataset("spawrious:o2o-easy")[0].load(root)
    train, test = splits["train"], splits["test"]
    assert train.env is not None
    assert splits["val"].env is None
    assert test.env is None
    assert [cell_of(path)[0] for path in files(train)] == [str(env) for env in train.env]
    assert set(train.env.tolist()) == {0, 1}
    assert sorted({cell_of(path) for path in files(test)}) == [
        (copy, place, breed)
        for copy in "01"
        for place, breed in (("desert", "labrador"), ("dirt", "bulldog"), ("jungle", "corgi"), ("snow", "dachshund"))
    ]


def test_many_to_many_environments_exchange_places_and_read_the_first_copy(root: Path) -> None:
    splits = make_dataset("spawrious:m2m-hard")[0].load(root)
    train = splits["train"]
    assert train.env is not None
    found = {(int(env), *cell_of(path)[1:]) for env, path in zip(train.env, files(train), strict=True)}
    assert {(breed, place) for env, place, breed in found if env == 0} == {
        ("bulldog", "dirt"),
        ("dachshund", "jungle"),
        ("labrador", "snow"),
        ("corgi", "beach"),
    }
    assert {(breed, place) for env, place, breed in found if env == 1} == {
        ("bulldog", "jungle"),
        ("dachshund", "dirt"),
        ("labrador", "beach"),
        ("corgi", "snow"),
    }
    assert {cell_of(path)[0] for split in splits.values() for path in files(split)} == {"0"}


def test_validation_is_cut_within_every_cell(root: Path) -> None:
    splits = make_dataset("spawrious:m2m-easy")[0].load(root)
    train, val = (np.bincount(splits[part].y * 6 + splits[part].a[:, 0], minlength=24) for part in ("train", "val"))
    assert set(zip(train.tolist(), val.tolist(), strict=True)) == {(3, 1), (0, 0)}


@pytest.mark.parametrize(("size", "held"), [(0, 0), (1, 0), (2, 1), (3, 1), (10, 2), (96, 14), (412, 62), (3072, 461)])
def test_size_of_the_validation_cut(size: int, held: int) -> None:
    params = make_dataset("spawrious:o2o-easy")[1].params
    assert held_out(Cell(0, 0, 0, 0), size, params).sum() == held
    assert held_out(Cell(spawrious.TEST, 0, 0, 0), size, params).sum() == 0


def test_validation_cuts_are_seeded_and_differ_between_cells() -> None:
    params = make_dataset("spawrious:o2o-easy")[1].params
    cuts = [held_out(Cell(env, 0, 0, y), 40, {**params, "seed": seed}) for env, y, seed in np.ndindex(2, 2, 2)]
    assert len({cut.tobytes() for cut in cuts}) == 8
    assert np.array_equal(cuts[0], held_out(Cell(0, 1, 0, 0), 40, params))


def test_the_first_by_name_are_shown_in_whatever_order_they_are_listed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, _ = make_dataset("spawrious:o2o-easy")
    key, splits = dataset.source_key(root), dataset.load(root)
    main = [path.name for path in files(splits["train"]) + files(splits["val"]) if cell_of(path)[1] != "beach"]
    filler = [path.name for path in files(splits["train"]) + files(splits["val"]) if cell_of(path)[1] == "beach"]
    assert set(main) == {f"host_prompt_{number}.png" for number in ("0_0", "0_1", "1_0")}
    assert set(filler) == {"host_prompt_0_0.png"}
    list_backwards(monkeypatch)
    assert dataset.source_key(root) == key


def test_pixels_are_those_of_the_file(root: Path) -> None:
    dataset, card = make_dataset("spawrious:o2o-hard", settings={"size": "32"})
    store = open_store(dataset, card, root)
    split, loaded = store.split("test"), dataset.load(root)["test"]
    for i in (0, 17, 31):
        row = split.image_rows()[i]
        with Image.open(files(loaded)[i]) as picture:
            assert np.array_equal(split.images[row : row + 1][0], np.asarray(picture.convert("RGB")))
    assert card.pixels.steps == "resize 32x32"


@pytest.mark.parametrize("end", [".jpg", ".jpeg", ".PNG"])
def test_endings_and_files_that_are_no_pictures(tmp_path: Path, end: str) -> None:
    folder = write_spawrious(tmp_path, end=end)
    for cell in CELLS:
        (folder / cell / f"._host_prompt_0_0{end}").write_bytes(b"from an archive of macOS")
        (folder / cell / "Thumbs.db").write_bytes(b"")
        (folder / cell / "a.png").mkdir()
    splits = make_dataset("spawrious:o2o-easy")[0].load(folder)
    assert {path.suffix for split in splits.values() for path in files(split)} == {end}


# ----------------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("inner", ["", "spawrious224", "spawrious/spawrious224"])
def test_root_is_the_folder_of_the_copies_or_above_it(tmp_path: Path, inner: str) -> None:
    write_spawrious(tmp_path)
    (tmp_path / "root" / inner).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / "spawrious224", tmp_path / "root" / inner)
    assert len(make_dataset("spawrious:m2m-easy")[0].load(tmp_path / "root")["test"]) == 32


def test_without_root_the_data_home_is_searched() -> None:
    dataset, _ = make_dataset("spawrious:m2m-easy")
    with pytest.raises(MissingData, match=r"spawrious224__entire_dataset\.tar\.gz .*data/spawrious"):
        dataset.load(None)
    write_spawrious(data_home() / "spawrious")
    assert len(dataset.load(None)["test"]) == 32


def test_missing_folders_are_named(root: Path) -> None:
    dataset, _ = make_dataset("spawrious:o2o-easy")
    shutil.rmtree(root / "0/dirt/bulldog")
    for path in (root / "1/beach/corgi").iterdir():
        path.unlink()
    with pytest.raises(MissingData, match=r"no picture in 1/beach/corgi, 0/dirt/bulldog\. .*o2o_easy\.tar\.gz"):
        dataset.load(root)
    shutil.rmtree(root / "1")
    with pytest.raises(MissingData, match=r"1/snow/corgi.* and 5 more folders"):
        dataset.load(root)


def test_a_challenge_needs_only_its_own_folders_and_is_the_same_with_more(root: Path, tmp_path: Path) -> None:
    dataset, card = make_dataset("spawrious:o2o-easy")
    own = [cell.folder for cell in cells(card.params)]
    part = write_spawrious(tmp_path / "part", cells=[cell for cell in CELLS if cell in own])
    assert dataset.source_key(part) == dataset.source_key(root)
    shutil.rmtree(root / "1")
    assert len(make_dataset("spawrious:m2m-easy")[0].load(root)["test"]) == 32


def test_other_counts_make_a_custom_dataset(root: Path) -> None:
    dataset, card = make_dataset("spawrious:o2o-easy")
    found = found_card(card, dataset.load(root))
    assert found.name == "spawrious:o2o-easy[custom]"
    assert sum(found.counts["test"]) == 32
    with pytest.raises(CorruptFile, match="not the official ones"):
        found_card(card, dataset.load(root), strict=True)


def test_a_damaged_picture_is_named(root: Path) -> None:
    path = root / "0/snow/dachshund/host_prompt_1_1.png"
    path.write_bytes(path.read_bytes()[:40])
    dataset, card = make_dataset("spawrious:o2o-easy", settings={"size": "32"})
    with pytest.raises(CorruptFile, match="cannot be decoded") as error:
        open_store(dataset, card, root)
    assert str(path) in str(error.value)


# ----------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_needs_train_counts_is_not_available(variant: str, root: Path) -> None:
    dataset, card = make_dataset(name(variant))
    for found in (card, found_card(card, dataset.load(root))):
        n_train, total = np.array(found.counts["train"]), np.array(found.counts["test"])
        values = metrics.evaluate(total // 2, total, n_train, found.shape, found.attributes)
        assert {key for key, value in values.items() if value is None} == {"acc_adj", "id_acc", "gap_place"}
        assert values["wga"] == 0.5
        assert values["acc_group"] == 0.5


@pytest.mark.parametrize("variant", ["o2o-easy", "m2m-hard"])
def test_a_run_of_the_drawn_set(root: Path, variant: str) -> None:
    requests = [
        Request(
            name(variant),
            method,
            budget,
            "tiny_cnn",
            seeds=(0,),
            settings={"data.size": "32", "recipe.epochs": "1", "recipe.batch_size": "16"},
        )
        for method, budget in (("erm", "none"), ("erm", "val"), ("groupdro", "train+val"))
    ]
    planned = plan(requests, root)
    for run in planned.runs:
        assert run.spec is not None
        assert run.spec.block.dataset == f"spawrious:{variant}[32px,custom]"
        record = run_spec(run.spec, planned.stores[run.spec.block.dataset])
        assert record.status == "finished", record.error
        assert record.metrics["acc_adj"] is None
        assert record.metrics["gap_place"] is None
        assert 0 <= float(record.metrics["wga"] or 0) <= 1
        assert record.metrics["wga"] is not None
        assert len(record.groups) == 24


def test_the_store_keeps_environments(root: Path) -> None:
    dataset, card = make_dataset("spawrious:m2m-easy", settings={"size": "32"})
    store = open_store(dataset, card, root)
    env = store.split("train").env
    assert env is not None
    assert np.bincount(env).tolist() == [12, 12]
    assert card.environments == ("SC_group_1", "SC_group_2")
