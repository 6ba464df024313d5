"""The store over its pools of pixels, and the embedded dataset in it."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats.drawn import COUNTS, write_drawn
from PIL import Image
from torchvision import transforms
from worstgroup.benchmark import pools
from worstgroup.benchmark import store as module
from worstgroup.benchmark.data import Pixels
from worstgroup.benchmark.errors import CorruptFile, MissingData, UserError
from worstgroup.benchmark.home import TEMPORARY, data_home
from worstgroup.benchmark.pictures import Pictures
from worstgroup.benchmark.planning import Request, make_dataset, plan
from worstgroup.benchmark.pools import pool_path
from worstgroup.benchmark.registry import DATASETS, load_plugin
from worstgroup.benchmark.spec import SPLITS, Card
from worstgroup.benchmark.store import Dataset, Split, Store, check_counts, open_store
from worstgroup.commands import listing

pytestmark = pytest.mark.usefixtures("tiny")

FINGERPRINTS = {"digits2": "4c498dbc86cb8231", "digits2:balval": "c9e8f5758b2ca7af"}
"""Pixels, labels and views of the embedded dataset: these change only with its `version` or its views, on purpose."""


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of `tiny` and its variants in the order in which they were loaded."""
    cls, seen = DATASETS["tiny"].cls, []
    load = cls.load

    def counted(self: Any, root: Path | None) -> Any:
        seen.append(self.card.name)
        return load(self, root)

    monkeypatch.setattr(cls, "load", counted)
    return seen


def open_tiny(name: str = "tiny") -> Store:
    return open_store(*make_dataset(name))


def lying(part: str) -> list[Path]:
    """What lies in `store` or `pixels`, hidden things included, but for the notes of which store was last opened."""
    folder = data_home() / part
    return sorted(path for path in folder.iterdir() if path.suffix != ".latest") if folder.exists() else []


def folders() -> list[Path]:
    """All stores and pools."""
    return [*lying("store"), *lying("pixels")]


# ---------------------------------------------------------------------------------------------------------- building


def test_the_second_opening_loads_nothing(loads: list[str]) -> None:
    first, second = open_tiny(), open_tiny()
    assert loads == ["tiny"]
    assert first == second
    assert lying("store") == [first.path]
    assert lying("pixels") == sorted(pool_path(key) for key in first.pools.values())


def test_the_store_gives_back_what_was_loaded(loads: list[str]) -> None:
    dataset, card = make_dataset("tiny")
    expected = dataset.load(None)
    store = open_store(dataset, card)
    for name in SPLITS:
        split = store.split(name)
        assert np.array_equal(split.images[:], expected[name].images[:])
        assert split.images[:1].dtype == np.uint8
        assert np.array_equal(split.y, expected[name].y)
        assert np.array_equal(split.a, expected[name].a)
        assert np.array_equal(split.units(), np.arange(len(split.y)))


def test_fingerprint_is_that_of_the_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loads: list[str]) -> None:
    first = open_tiny("tinyvariants").fingerprint
    assert open_tiny("tinyvariants:secret").fingerprint == first  # another card, the same pixels and labels
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "elsewhere"))
    assert open_tiny("tinyvariants").fingerprint == first
    assert loads == ["tinyvariants", "tinyvariants:secret", "tinyvariants"]


@pytest.mark.parametrize("part", ["images", "y", "a", "unit"])
def test_fingerprint_changes_with_a_single_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str) -> None:
    dataset, card = make_dataset("tiny")
    card = replace(card, counts={})
    first = open_store(dataset, card).fingerprint
    splits = dataset.load(None)
    images, labels = np.array(splits["test"].images[:]), {"y": splits["test"].y, "a": splits["test"].a}
    labels["unit"] = splits["test"].units().copy()
    (images if part == "images" else labels[part]).flat[-1] ^= 1
    splits["test"] = Split(images, labels["y"], labels["a"], labels["unit"])
    monkeypatch.setattr(dataset, "load", lambda root: splits)
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "elsewhere"))
    assert open_store(dataset, card).fingerprint != first


def test_other_sources_make_another_store(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, card = make_dataset("tiny")
    first = open_store(dataset, card)
    monkeypatch.setattr(dataset, "source_key", lambda root: "tiny, version 2")
    second = open_store(dataset, card)
    assert first.path != second.path
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("error", [MissingData("put it there"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_failing_load_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    dataset, card = make_dataset("tiny")

    def fail(root: Path | None) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "load", fail)
        with pytest.raises(type(error)):
            open_store(dataset, card)
    assert folders() == []
    assert open_store(dataset, card).split("val").y.shape == (48,)


class Breaking:
    """An image source whose second chunk cannot be read."""

    def __init__(self, images: np.ndarray, error: Exception) -> None:
        self.images, self.error = images, error

    key = "breaking"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice) -> np.ndarray:
        if index.start:
            raise self.error
        return self.images[index]


@pytest.mark.parametrize(
    ("error", "says"), [(ValueError("broken JPEG"), "broken JPEG"), (OSError(28, "No space"), "no space left")]
)
def test_a_failing_image_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    dataset, card = make_dataset("tiny")
    splits = dataset.load(None)
    splits["val"] = replace(splits["val"], images=Breaking(np.asarray(splits["val"].images), error))
    monkeypatch.setattr(dataset, "load", lambda root: splits)
    monkeypatch.setattr(pools, "CHUNK_BYTES", 40 * 16 * 16 * 3)
    with pytest.raises((ValueError, UserError), match=says):
        open_store(dataset, card)
    assert lying("store") == []
    assert len(lying("pixels")) == 1  # train was there before


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(CorruptFile) as error:
        open_tiny("tinyvariants:miscounted")
    assert "tinyvariants:miscounted: the val split has group counts (12, 5, 5, 2, 2, 5, 5, 12)" in str(error.value)
    assert "the card says (48, 0, 0, 0, 0, 0, 0, 0)" in str(error.value)
    assert folders() == []


def test_a_label_beyond_the_card_is_refused() -> None:
    dataset, card = make_dataset("tiny")
    splits = dataset.load(None)
    splits["train"].y[0] = 2
    with pytest.raises(CorruptFile, match="train"):
        check_counts(card, splits)


def test_threads_that_open_at_once_build_once(loads: list[str]) -> None:
    found: list[Store] = []
    threads = [threading.Thread(target=lambda: found.append(open_tiny())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert loads == ["tiny"]


# ----------------------------------------------------------------------------------------------------------- damage


def test_a_store_in_the_making_is_not_used(loads: list[str]) -> None:
    """What a killed process leaves: a temporary folder. The next one builds its own."""
    path = open_tiny().path
    path.rename(path.with_name(f"{TEMPORARY}{path.name}-1-abcd"))
    assert open_tiny().path == path
    assert loads == ["tiny", "tiny"]


def test_a_store_without_a_manifest_is_built_again(loads: list[str]) -> None:
    store = open_tiny()
    (store.path / "manifest.json").unlink()
    assert open_tiny() == store
    assert loads == ["tiny", "tiny"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "truncated": truncate,
    "not JSON": lambda path: path.write_text("<html>"),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[]"),
    "an empty object": lambda path: path.write_text("{}"),
    "no fingerprint": lambda path: path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "fingerprint"})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_named(damage: str) -> None:
    path = open_tiny().path
    DAMAGES[damage](path / "manifest.json")
    with pytest.raises(CorruptFile, match="manifest") as error:
        open_tiny()
    assert str(path) in str(error.value)
    assert listing.state(DATASETS["tiny"].card("")) == "damaged"  # `ls` goes on with the others


def part_of(store: Store, name: str) -> Path:
    """The file of the val split that is called so."""
    return (pool_path(store.pools["val"]) if name == "images.npy" else store.path) / name


@pytest.mark.parametrize("name", ["images.npy", "val.labels.npz"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate, lambda path: path.write_bytes(b"")])
def test_a_missing_or_truncated_file_is_named(name: str, damage: Callable[[Path], object]) -> None:
    path = part_of(open_tiny(), name)
    damage(path)
    with pytest.raises(CorruptFile, match="delete the folder, it is rebuilt") as error:
        open_tiny().split("val")
    assert str(path.parent) in str(error.value)


def test_altered_labels_are_named() -> None:
    path = part_of(open_tiny(), "val.labels.npz")
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"val\.labels\.npz: cannot be read; delete the folder"):
        open_tiny().split("val")


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"y": np.zeros(3, int)}, "the val split has parts of different lengths: {'y': 3, 'a': 48, 'unit': 48"),
        ({"rows": np.arange(47)}, "parts of different lengths"),
        ({"rows": np.arange(1, 49)}, "the val split has 48 examples, 48 images do not fit them"),
        ({"rows": np.arange(-1, 47)}, "48 images do not fit them"),
        ({"images": np.zeros((50, 16, 16, 3), np.uint8)}, "the val split has 48 examples, 50 images do not fit them"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(part: dict[str, Any], says: str) -> None:
    dataset, card = make_dataset("tiny")
    splits = dataset.load(None)
    unit = {} if "y" not in part else {"unit": np.arange(48)}
    splits["val"] = replace(splits["val"], **part, **unit)
    with pytest.raises(CorruptFile) as error:
        check_counts(card, splits)
    assert says in str(error.value)


def test_a_store_is_opened_under_the_card_of_today() -> None:
    """What a card says about the same files may be corrected without building anything again."""
    dataset, card = make_dataset("tiny")
    first = open_store(dataset, card)
    today = replace(card, mean=(0.4, 0.4, 0.4), share_labels=False, notes=("corrected",))
    second = open_store(dataset, today)
    assert second.path == first.path
    assert second.card == replace(today, counts=first.card.counts)
    with pytest.raises(CorruptFile, match="the val split has group counts"):
        open_store(dataset, replace(card, counts={"val": (48, 0, 0, 0, 0, 0, 0, 0)}))


# ----------------------------------------------------------------------------------------------- pictures in files

PLUGIN = Path(__file__).parents[1] / "fixtures" / "drawnset.py"
CUSTOM = {**COUNTS, "val": (1, 2, 1, 1)}


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """The folder of the dataset `drawn`, which is registered."""
    if "drawn" not in DATASETS:
        load_plugin(PLUGIN)
    return write_drawn(tmp_path / "raw" / "drawn")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each request for pixels decoded."""
    get, seen = Pictures.__getitem__, list[int]()

    def counted(self: Pictures, index: slice) -> Any:
        found = get(self, index)
        seen.append(len(found))
        return found

    monkeypatch.setattr(Pictures, "__getitem__", counted)
    return seen


def open_drawn(
    root: Path | None, name: str = "drawn", strict: bool = False, unasked: bool = False, **settings: str
) -> Store:
    dataset, card = make_dataset(name, root, settings)
    return open_store(dataset, replace(card, fetch_unasked=unasked), root, strict=strict)


def shown(store: Store, split: Any) -> np.ndarray:
    """The images of a split's examples, in order."""
    data = store.split(split)
    return np.asarray(data.images[:])[data.image_rows()]


@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_batches_are_torchvisions_bits(drawn: Path, split: Any) -> None:
    store = open_drawn(drawn)
    data, mean, std = store.split(split), store.card.mean, store.card.std
    pixels = Pixels(data.images, data.y, mean, std, torch.device("cpu"), rows=data.rows)
    steps = [transforms.Resize((20, 20)), transforms.CenterCrop(16), transforms.ToTensor()]
    reference = transforms.Compose([*steps, transforms.Normalize(mean, std)])
    lines = [line.split(",") for line in (drawn / "table.csv").read_text().splitlines()[1:]]
    files = [drawn / name for name, number, *_ in lines if number == str(SPLITS.index(split))]
    expected = torch.stack([reference(Image.open(path).convert("RGB")) for path in files])
    assert torch.equal(torch.cat([batch.x for batch in pixels.batches(3)]), expected)
    assert data.a[:, 0].tolist() == [int(frame) for _, number, _, frame in lines if number == str(SPLITS.index(split))]


def test_splits_and_variants_share_one_pool(drawn: Path, decoded: list[int]) -> None:
    store, swapped = open_drawn(drawn), open_drawn(drawn, "drawn:swapped")
    assert decoded == [24]
    assert len({*store.pools.values(), *swapped.pools.values()}) == len(lying("pixels")) == 1
    assert store.path != swapped.path
    assert store.fingerprint != swapped.fingerprint
    assert np.array_equal(shown(store, "val"), shown(swapped, "test"))
    assert np.array_equal(store.split("val").y, swapped.split("test").y)
    assert store.card.counts == COUNTS


def test_the_same_files_elsewhere_are_the_same_dataset(drawn: Path, tmp_path: Path, decoded: list[int]) -> None:
    elsewhere = shutil.copytree(drawn, tmp_path / "elsewhere")
    assert open_drawn(drawn) == open_drawn(elsewhere) == open_drawn(drawn.parent)
    assert decoded == [24]


def test_an_altered_picture_makes_another_store(drawn: Path) -> None:
    before = open_drawn(drawn)
    picture = next((drawn / "pictures").iterdir())
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(picture)
    after = open_drawn(drawn)
    assert after.path != before.path
    assert after.fingerprint != before.fingerprint


def test_a_broken_picture_is_named_with_its_line_and_leaves_nothing(drawn: Path) -> None:
    picture = drawn / "pictures" / "val_12.png"
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(CorruptFile, match=r"val_12\.png \(line 14 of the table\): cannot be decoded"):
        open_drawn(drawn)
    assert folders() == []


def test_a_missing_picture_is_named(drawn: Path) -> None:
    (drawn / "pictures" / "val_12.png").unlink()
    with pytest.raises(CorruptFile, match=r"val_12\.png \(line 14 of the table\): cannot be read"):
        open_drawn(drawn)
    assert folders() == []


def test_a_deleted_pool_is_rebuilt_from_the_files(drawn: Path, decoded: list[int]) -> None:
    store = open_drawn(drawn)
    before = shown(store, "test")
    shutil.rmtree(pool_path(store.pools["test"]))
    assert open_drawn(drawn) == store
    assert decoded == [24, 24]
    assert np.array_equal(shown(store, "test"), before)


# ---------------------------------------------------------------------------------------------------- other counts


def test_deleted_pixels_that_come_out_differently_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a generator may, under another version of a library."""
    store = open_tiny()
    shutil.rmtree(data_home() / "pixels")
    cls = DATASETS["tiny"].cls
    load = cls.load

    def darker(self: Any, root: Path | None) -> Any:
        return {name: replace(split, images=split.images[:] // 2) for name, split in load(self, root).items()}

    monkeypatch.setattr(cls, "load", darker)
    with pytest.raises(CorruptFile, match="cannot be made again as they were; delete the folder") as error:
        open_tiny()
    shutil.rmtree(store.path)
    assert str(store.path) in str(error.value)
    assert open_tiny().fingerprint != store.fingerprint


def test_files_with_other_counts_are_a_dataset_of_their_own(drawn: Path, tmp_path: Path) -> None:
    official = open_drawn(drawn)
    custom = open_drawn(write_drawn(tmp_path / "custom", CUSTOM))
    again = open_drawn(tmp_path / "custom")
    assert custom == again
    assert custom.card.name == "drawn[custom]"
    assert custom.card.counts == CUSTOM
    assert custom.card.attributes[0].train_ratio is None
    assert custom.card.title.endswith(" - not the official files")
    assert custom.fingerprint != official.fingerprint
    assert open_drawn(drawn).card.name == "drawn"
    assert open_drawn(tmp_path / "custom", size="8").card.name == "drawn[8px,custom]"


def test_strict_takes_official_files_only(drawn: Path, tmp_path: Path, decoded: list[int]) -> None:
    assert open_drawn(drawn, strict=True).card.name == "drawn"
    custom = write_drawn(data_home() / "drawn", CUSTOM)
    says = r"drawn: the val split has group counts \(1, 2, 1, 1\), the card says \(2, 1, 1, 2\)\. The files are not"
    del decoded[:]
    with pytest.raises(CorruptFile, match=says):
        open_drawn(custom, strict=True)
    assert decoded == []  # told before anything is decoded
    open_drawn(None)
    with pytest.raises(CorruptFile, match=f"{says} the official ones. Without --strict they are taken"):
        open_drawn(None, strict=True)
    shutil.rmtree(custom)
    with pytest.raises(CorruptFile, match=says):  # what was prepared is no better
        open_drawn(None, strict=True)
    assert open_drawn(None).card.name == "drawn[custom]"


def test_a_plan_names_the_custom_dataset_and_may_be_strict(tmp_path: Path, drawn: Path) -> None:
    custom = write_drawn(tmp_path / "custom", CUSTOM)
    request = Request("drawn", "erm", seeds=(0,))
    made = plan([request], custom)
    (store,) = made.stores.values()
    assert list(made.stores) == ["drawn[custom]"]
    spec = made.runs[0].spec
    assert spec is not None
    assert (spec.block.dataset, spec.block.fingerprint) == ("drawn[custom]", store.fingerprint)
    with pytest.raises(CorruptFile, match="Without --strict"):
        plan([request], custom, strict=True)


def test_sizes_are_checked_where_counts_are_not_known(drawn: Path, tmp_path: Path) -> None:
    assert open_drawn(drawn, "drawn:sized").card.counts == COUNTS
    with pytest.raises(CorruptFile, match=r"drawn:sized: the val split has 5 images, the card says 6.* Replace them"):
        open_drawn(write_drawn(tmp_path / "custom", CUSTOM), "drawn:sized")


@pytest.mark.parametrize("split", SPLITS)
def test_an_empty_split_is_refused(tmp_path: Path, drawn: Path, split: str) -> None:
    root = write_drawn(tmp_path / "custom", {**COUNTS, split: (0, 0, 0, 0)})
    with pytest.raises(CorruptFile, match=f"drawn: the {split} split is empty"):
        open_drawn(root)
    assert folders() == []


# ----------------------------------------------------------------------------------------- files that are gone, fetch


def test_a_prepared_store_opens_when_the_files_are_gone(drawn: Path) -> None:
    small = open_drawn(drawn, size="8")
    store = open_drawn(drawn)
    before = shown(store, "train")
    shutil.rmtree(drawn)
    assert open_drawn(None) == store
    assert open_drawn(None, size="8") == small
    assert np.array_equal(shown(open_drawn(None), "train"), before)
    for name, root in (("drawn:swapped", None), ("drawn", drawn), ("drawn", drawn.parent)):
        with pytest.raises(MissingData):
            open_drawn(root, name)


def test_a_store_without_its_pixels_is_not_prepared(drawn: Path) -> None:
    store = open_drawn(drawn)
    shutil.rmtree(drawn)
    shutil.rmtree(pool_path(store.pools["train"]))
    with pytest.raises(MissingData, match="Let a test draw it"):
        open_drawn(None)


def test_the_same_numbers_under_other_names_are_another_dataset(drawn: Path) -> None:
    dataset, card = make_dataset("drawn")
    swapped = replace(card.attributes[0], aligned=card.attributes[0].aligned[::-1])
    cards = [card, replace(card, classes=card.classes[::-1]), replace(card, attributes=(swapped,))]
    stores = [open_store(dataset, each, drawn) for each in cards]
    assert len({store.fingerprint for store in stores}) == 3
    assert len({store.pools["train"] for store in stores}) == 1


def test_fetching_comes_last(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(card: Card, report: object) -> list[Path]:
        fetched.append(card.name)
        return [write_drawn(data_home() / "drawn")]

    monkeypatch.setattr(module, "fetch_dataset", fetch)
    with pytest.raises(MissingData):
        open_drawn(drawn / "pictures", unasked=True)
    store = open_drawn(drawn)
    shutil.rmtree(drawn)
    assert open_drawn(None, unasked=True).path == store.path
    with pytest.raises(MissingData, match="Let a test draw it"):
        open_drawn(None, "drawn:swapped")
    assert fetched == []
    assert open_drawn(None, "drawn:swapped", unasked=True).card.name == "drawn:swapped"
    assert fetched == ["drawn:swapped"]
    assert open_drawn(None) == store  # the same pictures


def test_a_fetch_that_brings_nothing(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fetch_dataset", lambda card, report: [])
    with pytest.raises(MissingData, match="Let a test draw it"):
        open_drawn(None, unasked=True)


# ----------------------------------------------------------------------------------------------------------- digits2


def digits2(name: str) -> tuple[Dataset, Card]:
    return make_dataset(name)


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_the_embedded_pixels_are_the_same_everywhere(name: str) -> None:
    assert open_store(*digits2(name)).fingerprint == FINGERPRINTS[name]


def test_the_tiny_pixels_are_the_same_everywhere() -> None:
    assert open_tiny().fingerprint == "51778d69136f3d2e"


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_every_test_digit_stands_on_both_backgrounds_with_both_objects(name: str) -> None:
    test = digits2(name)[0].load(None)["test"]
    cells: dict[int, list[tuple[int, ...]]] = {}
    for unit, y, a in zip(test.units(), test.y, test.a, strict=True):
        cells.setdefault(int(unit), []).append((int(y), *map(int, a)))
    assert len(cells) == 447
    for found in cells.values():
        y = found[0][0]
        assert sorted(found) == [(y, 0, 0), (y, 0, 1), (y, 1, 0), (y, 1, 1)]


@pytest.mark.parametrize(("name", "share"), [("digits2", 0.83), ("digits2:balval", 0.5)])
def test_the_shortcuts_agree_with_the_class_as_often_as_the_card_says(name: str, share: float) -> None:
    dataset, card = digits2(name)
    splits = dataset.load(None)
    for split, expected in ((splits["train"], 0.83), (splits["val"], share), (splits["test"], 0.5)):
        for j, attribute in enumerate(card.attributes):
            aligned = split.a[:, j] == np.array(attribute.aligned)[split.y]
            noise = (expected * (1 - expected) / len(aligned)) ** 0.5
            assert abs(aligned.mean() - expected) < 3.5 * noise
    assert {attribute.train_ratio for attribute in card.attributes} == {0.83}
    both = (splits["train"].a == splits["train"].y[:, None]).all(1).mean()
    assert both == pytest.approx(0.83**2, abs=0.04)  # the two shortcuts are independent


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_no_digit_is_in_two_splits(name: str) -> None:
    splits = digits2(name)[0].load(None)
    units = [set(splits[part].units().tolist()) for part in SPLITS]
    assert [len(part) for part in units] == [900, 450, 447]
    assert len(set.union(*units)) == 1797
    for part in SPLITS:  # a digit keeps its class
        labels = {(int(u), int(y)) for u, y in zip(splits[part].units(), splits[part].y, strict=True)}
        assert len(labels) == len(set(splits[part].units().tolist()))


def test_the_variants_share_train_and_test() -> None:
    plain, balanced = (digits2(name)[0].load(None) for name in FINGERPRINTS)
    for part, same in (("train", True), ("test", True), ("val", False)):
        assert np.array_equal(plain[part].images[:], balanced[part].images[:]) is same
        assert np.array_equal(plain[part].a, balanced[part].a) is same


def test_shortcuts_are_visible_in_the_pixels() -> None:
    """Stripes along rows vary down the picture and not across it."""
    test = digits2("digits2")[0].load(None)["test"]
    images = np.asarray(test.images[:200], dtype=float).mean(-1)
    down, across = images.mean(2).std(1), images.mean(1).std(1)
    assert ((down > across) == (test.a[:200, 0] == 0)).mean() > 0.9
