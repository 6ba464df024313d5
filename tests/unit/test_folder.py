"""Users' own pictures: both layouts, the card that is read from them, and every way in which they can be wrong."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from formats.folder import COUNTS, HEADER, Row, draw_picture, rows, write_folder, write_table, write_tree
from PIL import Image
from worstgroup.benchmark.errors import CorruptFile, MissingData, UserError
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.metrics import lift
from worstgroup.benchmark.planning import Request, make_dataset, plan
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import SPLITS, Card
from worstgroup.benchmark.store import check_counts, open_store
from worstgroup.datasets import folder as module
from worstgroup.datasets.own import read_column, slug

if TYPE_CHECKING:
    from helpers import Call

TINY = {"size": "8"}


def cards(root: Path, name: str = "folder") -> Card:
    return make_dataset(name, root)[1]


# ------------------------------------------------------------------------------------------------------------ layouts


def test_the_card_is_read_from_the_table(tmp_path: Path) -> None:
    dataset, card = make_dataset("folder", write_folder(tmp_path / "my pets"))
    assert card.name == "folder:my-pets"
    assert card.classes == ("cat", "dog")
    (place,) = card.attributes
    assert (place.name, place.values, place.aligned, place.train_ratio) == ("place", ("grass", "sofa"), (0, 1), None)
    assert card.counts == COUNTS
    assert card.share_labels
    splits = dataset.load(tmp_path / "my pets")
    check_counts(card, splits)
    assert len({id(split.images) for split in splits.values()}) == 1  # one pool for all
    assert splits["test"].images[:1].shape == (1, 224, 224, 3)


def test_rows_are_the_pictures_of_their_lines(tmp_path: Path) -> None:
    table = rows()[::-1]
    write_folder(tmp_path, table)
    splits = make_dataset("folder", tmp_path)[0].load(tmp_path)
    for name, number in (("train", 0), ("val", 1), ("test", 2)):
        split = splits[SPLITS[number]]
        for row, y, a in zip(split.image_rows(), split.y, split.a[:, 0], strict=True):
            assert table[row][1:] == (name, ("cat", "dog")[y], ("grass", "sofa")[a])
            assert split.images.files[row] == (tmp_path / table[row][0],)  # type: ignore[attr-defined]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_a_tree_gives_what_the_table_gives(tmp_path: Path, val: str) -> None:
    dataset, card = make_dataset("folder", write_tree(tmp_path / "pets", val))
    assert card.name == "folder:pets"
    assert card.attributes[0].name == "attribute"
    assert (card.classes, card.attributes[0].values) == (("cat", "dog"), ("grass", "sofa"))
    assert card.counts == COUNTS
    check_counts(card, dataset.load(tmp_path / "pets"))


def test_a_tree_is_listed_in_sorted_order_without_hidden_and_foreign_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path)
    (tmp_path / "train/.DS_Store").write_text("")
    (tmp_path / "train/cat/grass/._1.jpg").write_text("")
    (tmp_path / "train/cat/grass/notes.txt").write_text("")
    files = module.read(tmp_path).files
    assert len(files) == sum(map(sum, COUNTS.values()))
    inside = [file for file in files if file.is_relative_to(tmp_path / "train")]
    assert inside == sorted(inside)
    scandir = module.os.scandir
    monkeypatch.setattr(module.os, "scandir", lambda path: reversed(list(scandir(path))))
    assert module.read(tmp_path).files == files


def test_the_table_goes_before_the_tree(tmp_path: Path) -> None:
    write_tree(tmp_path)
    write_folder(tmp_path)
    assert cards(tmp_path).attributes[0].name == "place"


def test_split_names_and_numbers_are_the_same(tmp_path: Path) -> None:
    spelled = {"train": ("train", "0"), "val": ("valid", "1", "validation", "val"), "test": ("2", "test")}
    table = [(f, spelled[s][i % len(spelled[s])], y, a) for i, (f, s, y, a) in enumerate(rows())]
    assert cards(write_folder(tmp_path, table)).counts == COUNTS


def test_numbers_are_sorted_as_numbers_and_several_attributes_are_kept(tmp_path: Path) -> None:
    table = [(f, s, "10" if y == "cat" else "9", a, str(i % 3)) for i, (f, s, y, a) in enumerate(rows())]
    write_table(tmp_path, table, (*HEADER, "camera"))
    card = cards(tmp_path)
    assert card.classes == ("9", "10")
    assert [attribute.name for attribute in card.attributes] == ["place", "camera"]
    assert card.shape == (2, 2, 3)
    assert card.group_names()[0] == "9/grass/0"


def test_texts_are_sorted_as_texts() -> None:
    column = read_column("y", np.array(["b", "10", "9", "b"]), str)
    assert column.values == ("10", "9", "b")
    assert column.codes.tolist() == [2, 0, 1, 2]


def test_aligned_is_the_greatest_lift_not_the_most_frequent_value() -> None:
    """Value 0 is the most frequent one in both classes; value 1 speaks for class 1."""
    assert lift(np.array([80, 5, 60, 40]), (2, 2), 0) == (0, 1)
    assert lift(np.array([80, 5, 0, 60, 40, 0]), (2, 3), 0) == (0, 1)  # a value that train lacks is nobody's


# ------------------------------------------------------------------------------------------------- finding and running


def test_a_folder_of_the_data_home_is_found_by_its_name() -> None:
    write_folder(data_home() / "pets_1")
    assert make_dataset("folder:pets_1")[1].name == "folder:pets_1"
    with pytest.raises(MissingData, match=r"neither metadata.csv nor a folder train lies in .*pets_2"):
        make_dataset("folder:pets_2")


def test_a_name_may_be_given_beside_a_root(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    assert cards(tmp_path, "folder:pets").name == "folder:pets"
    assert cards(tmp_path / "pets", "folder:cats-and-dogs").name == "folder:cats-and-dogs"


def test_no_root_and_an_empty_root_say_what_to_put_there(tmp_path: Path) -> None:
    for root in (None, tmp_path):
        with pytest.raises(MissingData) as error:
            make_dataset("folder", root)
        assert "filename" in str(error.value)
        assert "SPLIT/CLASS/VALUE/*.jpg" in str(error.value)
    with pytest.raises(MissingData, match="--root DIR is missing"):
        make_dataset("folder")


def test_a_name_cannot_lead_out_of_the_data_home() -> None:
    with pytest.raises(UserError, match=r"folder:\.\./x: a name has letters"):
        make_dataset("folder:../x")
    assert slug("../a b.c/") == "a-b-c"
    assert slug("..") == "data"


def test_transform_and_size_are_part_of_the_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    dataset, card = make_dataset("folder", tmp_path / "pets", {"transform": "squeeze", "size": "8"})
    assert card.name == "folder:pets[squeeze,8px]"
    store = open_store(dataset, card, tmp_path / "pets")
    split = store.split("test")
    with Image.open(tmp_path / "pets" / rows()[split.image_rows()[0]][0]) as picture:
        expected = np.asarray(picture.resize((8, 8), Image.Resampling.BILINEAR))
    row = int(split.image_rows()[0])
    assert np.array_equal(split.images[row : row + 1][0], expected)


def test_a_method_runs_on_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    settings = {"data.size": "8", "recipe.epochs": "1", "recipe.batch_size": "8"}
    made = plan([Request("folder", "erm", backbone="tiny_cnn", seeds=(0,), settings=settings)], tmp_path / "pets")
    (planned,) = made.runs
    assert planned.spec is not None
    record = run_spec(planned.spec, made.stores["folder:pets[8px]"])
    assert (record.status, record.dataset) == ("finished", "folder:pets[8px]")
    assert [group.m_test for group in record.groups] == list(COUNTS["test"])


def test_ls_and_show_explain_the_layouts(call: "Call") -> None:
    line = next(line for line in call("ls", "datasets").out.splitlines() if line.startswith("│ folder "))
    assert "as found" in line
    shown = call("show", "folder")
    assert (shown.code, shown.err) == (0, "")
    for text in ("metadata.csv", "SPLIT/CLASS/VALUE/*.jpg", "--dataset folder --root DIR", "greatest lift"):
        assert text in shown.out


# ------------------------------------------------------------------------------------------------------------ mistakes

Change = Callable[[list[Row]], Sequence[Sequence[str]]]


def put(row: int, **changes: str) -> Change:
    """Change cells of one row."""

    def change(table: list[Row]) -> list[Row]:
        cells = dict(zip(HEADER, table[row], strict=True)) | changes
        return [*table[:row], tuple(cells.values()), *table[row + 1 :]]  # type: ignore[list-item]

    return change


WRONG: dict[str, tuple[Change, str]] = {
    "unknown split": (put(3, split="dev"), r"metadata.csv: line 5: split is 'dev', it must be one of train, val, test"),
    "negative label": (put(0, y="-1"), r"metadata.csv: line 2: y is '-1', it must be a name or a number from 0"),
    "negative attribute": (put(4, place="-1.0"), r"metadata.csv: line 6: place is '-1.0'"),
    "two spellings": (
        lambda t: [(f, s, {"cat": "1.0" if i == 4 else "1", "dog": "2"}[y], a) for i, (f, s, y, a) in enumerate(t)],
        r"metadata.csv: line \d+: y is '1(\.0)?', the same number is '1(\.0)?' elsewhere",
    ),
    "quote": (put(8, place='"sofa'), r"metadata.csv: line 10: cannot be split into cells"),
    "no label": (put(1, y=""), r"metadata.csv: line 3: y is ''"),
    "outside": (put(2, filename="../secret.png"), r"metadata.csv: line 4: '../secret.png' is not a file below"),
    "twice": (put(5, filename="./pictures//train-cat-grass-0.png"), r"line 7: '\./pict.* stands in line 2 already"),
    "empty split": (lambda t: [row for row in t if row[1] != "val"], "the val split is empty"),
    "one class": (lambda t: [(f, s, "cat", a) for f, s, _, a in t], "has one class only, 'cat'"),
    "one value": (lambda t: [(f, s, y, "sofa") for f, s, y, _ in t], "attribute place has one value only"),
    "class of test": (put(27, y="fox"), "class 'fox' never occurs in train"),
    "row too short": (lambda t: [*t[:3], t[3][:3], *t[4:]], "line 5 has 3 cells"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_is_refused(tmp_path: Path, name: str) -> None:
    change, says = WRONG[name]
    write_table(tmp_path, change(rows()))
    with pytest.raises(CorruptFile, match=says) as error:
        cards(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (("file", *HEADER[1:]), "has no column filename"),
        (("filename", "split", "label", "place"), "has no column y"),
        (("filename", "split", "y", "split"), "two columns have the same name"),
        (("filename", "split", "y", ""), "a column without a name"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: Sequence[str], says: str) -> None:
    write_table(tmp_path, rows(), header)
    with pytest.raises(CorruptFile, match=says):
        cards(tmp_path)


def test_a_table_without_attributes_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, [row[:3] for row in rows()], HEADER[:3])
    with pytest.raises(CorruptFile, match="needs one or more attributes"):
        cards(tmp_path)


def test_a_column_that_is_no_attribute_is_refused(tmp_path: Path) -> None:
    table = [(f"{i}.png", s, y, a) for i, (_, s, y, a) in enumerate(rows() * 200)]
    write_table(tmp_path, [(*row, f"id{i}") for i, row in enumerate(table)], (*HEADER, "patient"))
    with pytest.raises(CorruptFile, match=r"make 22,400 groups, .* \(patient has 5,600 values\)"):
        cards(tmp_path)


def test_a_missing_picture_is_named_with_its_line(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    (root / rows()[7][0]).unlink()
    dataset, card = make_dataset("folder", root, TINY)
    with pytest.raises(CorruptFile, match=rf"{rows()[7][0]} \(.*metadata.csv: line 9\): cannot be read"):
        open_store(dataset, card, root)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    (root / rows()[7][0]).write_bytes(b"no picture")
    dataset, card = make_dataset("folder", root, TINY)
    with pytest.raises(CorruptFile, match=rf"{rows()[7][0]} \(.*line 9\): cannot be decoded"):
        open_store(dataset, card, root)


def test_files_that_change_between_plan_and_load_are_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    dataset, card = make_dataset("folder", root, TINY)
    with pytest.raises(CorruptFile, match="group counts"):
        check_counts(replace(card, counts={**card.counts, "val": (1, 1, 1, 1)}), dataset.load(root))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: draw_picture(root / "train/cat/loose.png"), "train/cat/loose.png: does not fit"),
        (lambda root: draw_picture(root / "train/loose.png"), "train/loose.png: does not fit"),
        (lambda root: draw_picture(root / "train/cat/grass/more/deep.png"), "grass/more: does not fit"),
        (lambda root: (root / "val").rename(root / "dev"), "one folder val or valid or validation, this one has none"),
        (lambda root: (root / "valid").mkdir(), "this one has val and valid"),
        (lambda root: draw_picture(root / "test/fox/sofa/1.png"), "class 'fox' never occurs in train"),
        (lambda root: (root / "train/cat").rename(root / "train/-1"), r"train/-1/.*: y is '-1'"),
    ],
)
def test_a_wrong_tree_is_refused(tmp_path: Path, change: Callable[[Path], object], says: str) -> None:
    change(write_tree(tmp_path))
    with pytest.raises(CorruptFile, match=says):
        cards(tmp_path)


def test_an_empty_split_of_a_tree_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "test").rename(tmp_path / "rest")
    (tmp_path / "test").mkdir()
    with pytest.raises(CorruptFile, match="the test split is empty"):
        cards(tmp_path)
