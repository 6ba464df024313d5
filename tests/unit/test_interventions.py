"""Interventions: images with one shortcut replaced, from the dataset through the store to a task."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats.idx import write_mnist
from helpers import Call, edit, plan_tiny, put
from numpy.typing import NDArray
from PIL import Image
from stubs import ledger, make_card, make_task, split_of, tiny_task
from toys import NO_VAL
from worstgroup.analysis.contact_sheet import GAP, SIDE, VIEWS, contact_sheet
from worstgroup.benchmark.data import random_order
from worstgroup.benchmark.errors import CorruptFile, UserError
from worstgroup.benchmark.home import runs_home
from worstgroup.benchmark.planning import make_dataset
from worstgroup.benchmark.pools import pool_path
from worstgroup.benchmark.prepare import prepare
from worstgroup.benchmark.record import read
from worstgroup.benchmark.registry import DATASETS
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import Card, Recipe
from worstgroup.benchmark.store import Dataset, Split, Splits, check_counts, open_store
from worstgroup.benchmark.task import Pool, Task
from worstgroup.datasets.cm10 import cm10
from worstgroup.datasets.cmnist import bin99, domainbed
from worstgroup.datasets.digits2 import draw
from worstgroup.datasets.idx import Digits
from worstgroup.datasets.interventions import donors
from worstgroup.leaderboard import render
from worstgroup.leaderboard.aggregate import build, collect
from worstgroup.leaderboard.verify import verify

pytestmark = pytest.mark.usefixtures("tiny")
N = 96
"""Train images of `tiny`."""


def random(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


def shown(images: Any) -> NDArray[np.int64]:
    return np.asarray(images[: len(images)]).astype(int)


# ------------------------------------------------------------------------------------------------------------ datasets


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_donor_is_any_image_of_another_class(classes: int) -> None:
    y = random().randint(classes, size=400)
    donor = donors(y, random(1))
    assert (y[donor] != y).all()
    assert np.array_equal(donor, donors(y, random(1)))
    often = np.bincount(y[donor][y == 0], minlength=classes)
    expected = np.bincount(y, minlength=classes) * (y == 0).sum() / (y != 0).sum()
    assert often[0] == 0
    assert np.abs(often - expected)[1:].max() < 5 * np.sqrt(expected.max())
    assert len(set(donor.tolist())) > 200


def test_of_tiny_only_the_shortcut_changes() -> None:
    train = make_dataset("tiny")[0].load(None)["train"]
    masks = {"stripe": np.s_[:, :, 2:4, 1], "corner": np.s_[:, 12:, 12:, 2]}
    assert set(train.views) == set(masks)
    for j, (name, part) in enumerate(masks.items()):
        before, after = shown(train.images), shown(train.views[name])
        change = (after - before)[part].reshape(N, -1)
        assert set(np.sign(change.max(1))) | set(np.sign(change.min(1))) == {-1, 0, 1}
        before[part] = after[part]
        assert np.array_equal(before, after)
        value = np.where(change.max(1) > 0, 1, np.where(change.min(1) < 0, 0, train.a[:, j]))
        for y in (0, 1):  # a value is as frequent as in the other class
            assert value[train.y == y].mean() == pytest.approx(train.a[train.y == 1 - y, j].mean(), abs=0.15)


def test_layers_of_digits2_are_taken_from_the_donor_and_all_else_is_kept() -> None:
    params = make_dataset("digits2")[1].params
    layers = draw(random().rand(6, 8, 8), random().randint(2, size=(6, 2)), random(), params)
    donor = np.array([3, 4, 5, 0, 1, 2])
    for name in ("background", "object"):
        after = layers.intervened(name, donor)
        for part in ("background", "digit", "object", "noise"):
            expected = getattr(layers, part)[donor] if part == name else getattr(layers, part)
            assert np.array_equal(getattr(after, part), expected)
        assert np.array_equal(after.intervened(name, donor).pictures(), layers.pictures())  # there and back


def test_evaluation_splits_are_not_rendered() -> None:
    for name in ("tiny", "digits2"):
        dataset, card = make_dataset(name)
        splits = dataset.load(None)
        assert [sorted(split.views) for split in splits.values()] == [sorted(card.interventions), [], []]


def drawn(n: int) -> Digits:
    """White pictures of all digits."""
    return Digits(np.full((n, 28, 28), 200, np.uint8), (np.arange(n) % 10).astype(np.uint8))


@pytest.mark.parametrize(("variant", "make"), [("bin99", bin99), ("domainbed", domainbed)])
def test_coloured_digits_are_recoloured(variant: str, make: Any) -> None:
    card = DATASETS["cmnist"].card(variant)
    train = make(replace(card, params={**card.params, "train": 400}), drawn(600), drawn(300))["train"]
    before, after = shown(train.images)[train.image_rows()], shown(train.views["color"])
    assert np.array_equal(before.max(3), after.max(3))
    color = after[:, 0, 0].argmax(1)
    for y in (0, 1):
        assert color[train.y == y].mean() == pytest.approx(train.a[train.y == 1 - y, 0].mean(), abs=0.1)


def test_cm10_takes_the_colour_of_another_digit() -> None:
    train = cm10(DATASETS["cmnist"].card("cm10"), drawn(1_000), drawn(100))["train"]
    before, after = shown(train.images)[train.image_rows(), 0, 0], shown(train.views["color"])[:, 0, 0]
    mean = np.array([before[train.y == digit].mean(0) for digit in range(10)])
    nearest = np.abs(after[:, None] - mean).sum(2).argmin(1)
    assert (nearest == train.y).mean() < 0.05
    assert set(nearest) == set(range(10))


def test_a_mnist_that_is_not_recoloured_says_so(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    dataset, card = make_dataset("cmnist:ex2l", tmp_path)
    assert card.interventions == ()
    assert not dataset.load(tmp_path)["train"].views


# --------------------------------------------------------------------------------------------------------------- store


def tiny(change: Any = lambda splits: None, **fields: Any) -> tuple[Dataset, Card]:
    """The dataset `tiny` whose splits were changed in place, and its card with other fields."""
    dataset, card = make_dataset("tiny")
    splits = dataset.load(None)
    change(splits)
    dataset.load = lambda root: splits  # type: ignore[method-assign]
    return dataset, replace(card, **fields)


def without_views(splits: Splits) -> None:
    splits["train"] = replace(splits["train"], views={})


def test_the_store_gives_views_back() -> None:
    dataset, card = make_dataset("tiny")
    expected, split = dataset.load(None)["train"], open_store(dataset, card).split("train")
    assert sorted(split.views) == ["corner", "stripe"]
    for name, images in split.views.items():
        assert np.array_equal(images[:], expected.views[name][:])
        assert isinstance(images, np.memmap)


def test_what_renders_nothing_keeps_its_identity() -> None:
    """The fingerprint that `tiny` had before there were views."""
    plain = open_store(*tiny(without_views, interventions=()))
    assert plain.fingerprint == "53f6d09853f480a9"
    assert plain.path != open_store(*make_dataset("tiny")).path


def test_a_value_of_a_view_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = open_store(*tiny()).fingerprint

    def flip(splits: Splits) -> None:
        np.asarray(splits["train"].views["corner"]).flat[-1] ^= 1

    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "elsewhere"))
    assert open_store(*tiny(flip)).fingerprint != first


def test_altered_bytes_of_a_view_are_found() -> None:
    store = prepare("tiny")
    file = pool_path(store.pools["train:stripe"]) / "images.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptFile, match="were altered"):
        prepare("tiny")


def shortened(splits: Splits) -> None:
    views = {name: np.asarray(images)[1:] for name, images in splits["train"].views.items()}
    splits["train"] = replace(splits["train"], views=views)


def on_test(splits: Splits) -> None:
    splits["test"] = replace(splits["test"], views={"stripe": splits["test"].images})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_views, r"the train split has views \[\], the card says stripe and corner"),
        (shortened, "the train split has parts of different lengths"),
        (on_test, r"the test split has views \['stripe'\], the card says none"),
    ],
)
def test_views_that_are_not_those_of_the_card_are_refused(change: Any, says: str) -> None:
    dataset, card = tiny(change)
    with pytest.raises(CorruptFile, match=says):
        check_counts(card, dataset.load(None))
    with pytest.raises(CorruptFile, match=says):
        open_store(dataset, card)


def test_a_selection_of_examples_has_no_views() -> None:
    train: Split = make_dataset("tiny")[0].load(None)["train"]
    assert not train.take(np.arange(5)).views


# ---------------------------------------------------------------------------------------------------------------- task


def views(task: Task) -> list[torch.Tensor]:
    """The train images, then the views in card order, as batches have them."""
    split = task._lab.store.split("train")
    stored = [split.images, *(split.views[name] for name in task.card.interventions)]
    return [(torch.from_numpy(np.array(part)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25 for part in stored]


def test_a_task_trains_on_images_and_views() -> None:
    task = tiny_task("lle")
    pool, shift = task.with_interventions()
    assert (task.size("train"), pool.size("train"), pool.size("val")) == (N, 3 * N, task.size("val"))
    assert shift.tolist() == [0] * N + [1] * N + [2] * N
    assert np.array_equal(pool.y("train"), np.tile(task.y("train"), 3))
    torch.testing.assert_close(torch.cat(list(pool.images("train"))), torch.cat(views(task)))
    assert {name: n for name, n in ledger(task).items() if n} == {"n_rendered": 2 * N}


def test_features_of_views_are_those_of_their_pixels() -> None:
    task = tiny_task("lle")
    pool, _ = task.with_interventions()
    checkpoint = task.erm()
    model = checkpoint.model.eval()
    with torch.no_grad():
        features = torch.cat([model.features(part) for part in views(task)])
    torch.testing.assert_close(pool.features(checkpoint, "train"), features)
    torch.testing.assert_close(pool.logits(checkpoint, "train"), model.head(features))
    assert len(pool.features(checkpoint, "val")) == task.size("val")


def test_of_a_view_no_attribute_is_known() -> None:
    pool, _ = tiny_task("groupdro", "train+val").with_interventions()
    assert len(pool.attributes("train", np.arange(N)).values) == N
    with pytest.raises(IndexError):
        pool.attributes("train", np.array([N]))


def test_only_what_is_trained_on_has_views() -> None:
    plain = tiny_task("lle", "val")
    rows, held = np.array([5, 2, 70]), np.array([1, 3])
    task = Task(plain.spec, plain._lab, plain._annotations, pool=Pool(rows, held))
    pool, shift = task.with_interventions()
    assert shift.tolist() == [0] * 5 + [1] * 3 + [2] * 3
    own, val = plain.y("train")[rows].tolist(), plain.y("val")[held].tolist()
    assert pool.y("train").tolist() == [*own, *val, *own, *own]
    expected = views(plain)
    found = torch.cat(list(pool.images("train")))
    torch.testing.assert_close(found[5:], torch.cat([expected[1][rows], expected[2][rows]]))
    assert ledger(plain)["n_rendered"] == 2 * len(rows)


def test_arrays_that_runs_share_are_not_those_of_the_images_alone() -> None:
    task = tiny_task("lle")
    pool, _ = task.with_interventions()

    def sizes(one: Task) -> int:
        return int(one.cached("size", None, lambda: {"n": np.array(one.size("train"))})["n"])

    assert (sizes(task), sizes(pool)) == (N, 3 * N)


def test_a_dataset_that_renders_nothing_is_refused() -> None:
    task = make_task(split_of((2, 1, 1, 2), make_card()), NO_VAL)
    with pytest.raises(UserError, match="toy renders no interventions"):
        task.with_interventions()


def test_the_first_draws_of_a_random_order() -> None:
    recipe = Recipe(batch_size=4)
    every, some = (
        torch.cat(list(random_order(20, recipe, draws)(torch.Generator().manual_seed(0)))) for draws in (None, 9)
    )
    assert sorted(every.tolist()) == list(range(20))
    assert torch.equal(some, every[:9])


# ---------------------------------------------------------------------------------------------------- record and board


@pytest.fixture
def record() -> Path:
    """The record of a run of LLE."""
    plan = plan_tiny("lle")
    assert plan.runs[0].spec is not None
    run_spec(plan.runs[0].spec, plan.stores["tiny"])
    (path,) = runs_home().rglob("lle-*.json")
    return path


def test_the_record_is_verified_and_the_table_shows_what_was_rendered(record: Path) -> None:
    assert verify(record).ok, verify(record).problems
    tables = build(collect([record]))
    assert "0 + 192 rendered" in render.to_markdown(tables)
    (line,) = csv.DictReader(io.StringIO(render.to_csv(tables)))
    assert line["rendered"] == "192"


def test_more_views_than_there_are_images_are_named(record: Path) -> None:
    edit(record, put("labels.n_rendered", 2 * N + 1))
    (problem,) = verify(record).problems
    assert problem == "labels.n_rendered: 193 is more than the 192 images that there are"


def test_records_from_before_there_were_views_are_read(record: Path) -> None:
    edit(record, lambda content: content["labels"].pop("n_rendered"))
    found = read(record)
    assert found.labels is not None
    assert found.labels.n_rendered == 0
    assert verify(record).ok
    assert "rendered" not in render.to_markdown(build(collect([record]))).partition("`wga`")[0]


def test_cards_say_what_is_rendered_and_who_needs_it(call: Call) -> None:
    assert "interventions rendered on train images: background, object" in call("show", "digits2").out
    assert "rendered" not in call("show", "metashift").out
    assert "privileged: trains on rendered interventions" in call("show", "lle").out


def test_a_contact_sheet_shows_views(tmp_path: Path) -> None:
    widths = []
    for dataset, card in (tiny(), tiny(without_views, interventions=())):
        contact_sheet(open_store(dataset, card), tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            widths.append(sheet.width)
    assert widths[0] - widths[1] == 2 * (VIEWS * (SIDE + GAP) + SIDE // 4)
