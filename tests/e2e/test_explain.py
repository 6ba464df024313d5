"""`worstgroup explain`: pictures and tables of a finished run's model, and what it refuses."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import Call
from PIL import Image
from worstgroup.benchmark import record
from worstgroup.benchmark.home import runs_home

EPOCH = ("--seeds", "0", "--jobs", "1", "--threads", "1", "--quiet", "--set", "recipe.epochs=1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file lie once the first test has made them."""
    return tmp_path_factory.mktemp("explained")


@pytest.fixture(autouse=True)
def finished(call: Call, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one epoch, and an empty folder to write to."""
    monkeypatch.setenv("WORSTGROUP_HOME", str(made))
    monkeypatch.chdir(tmp_path)
    if not runs_home().exists():
        done = call("run", "--dataset", "digits2", "--method", "erm,dfr+exmap", *EPOCH)
        assert done.code == 0, done.err
        done = call("run", "--dataset", "tiny", "--method", "erm,lle", *EPOCH)
        assert done.code == 0, done.err


def digits(name: str) -> str:
    """The first letters of the hash of a run on digits2."""
    (path,) = (runs_home() / "digits2").rglob(f"{name}-*.json")
    return path.stem.rpartition("-")[2]


def lines(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("explainer", ["gradcam", "lrp"])
def test_a_gallery_has_a_row_for_every_group(call: Call, tmp_path: Path, explainer: str) -> None:
    done = call("explain", digits("dfr+exmap")[:8], "--explainer", explainer, "--columns", 2, "--out", "seen")
    assert done.code == 0, done.err
    assert not done.err
    with Image.open(tmp_path / "seen" / f"gallery-{explainer}.png") as picture:
        assert picture.height > 8 * 96
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_features_are_scored_by_class_and_attributes(call: Call, tmp_path: Path) -> None:
    assert call("explain", digits("dfr+exmap"), "--features", "--split", "val", "--out", "seen").code == 0
    found = lines(tmp_path / "seen" / "features-val.csv")
    assert [(line["model"], line["by"]) for line in found] == [
        (model, by) for model in ("erm", "dfr+exmap") for by in ("class", "background", "object")
    ]
    assert all(0 <= float(line["probe"]) <= 1 for line in found)
    assert (tmp_path / "seen" / "features-val.png").stat().st_size > 10_000


def test_found_groups_tell_whom_they_hold(call: Call, tmp_path: Path) -> None:
    assert call("explain", digits("dfr+exmap"), "--clusters", "--out", "seen").code == 0
    found = lines(tmp_path / "seen" / "clusters.csv")
    assert sum(int(line["images"]) for line in found) == 900
    for line in found:
        assert sum(int(value) for name, value in line.items() if "/" in name) == int(line["images"])


def test_attribution_is_told_by_model_and_group(call: Call, tmp_path: Path) -> None:
    assert call("explain", digits("dfr+exmap"), "--attribution", "--out", "seen").code == 0
    found = lines(tmp_path / "seen" / "attribution.csv")
    assert len(found) == 2 * 8
    assert all(0.02 < float(line["foreground"]) < 0.6 for line in found)


def test_critical_images_are_looked_for(call: Call, tmp_path: Path) -> None:
    assert call("explain", digits("erm"), "--critical", "--out", "seen").code == 0
    found = lines(tmp_path / "seen" / "critical.csv")
    assert {line["model"] for line in found} == {"erm", "ERM as selected"}
    assert all(0 < float(line["auc_loss"]) < 1 for line in found)


def test_one_call_can_ask_for_several(call: Call, tmp_path: Path) -> None:
    assert call("explain", digits("dfr+exmap"), "--clusters", "--features").code == 0
    (folder,) = tmp_path.glob("explain-*")
    assert {path.suffix for path in folder.iterdir()} == {".png", ".csv"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense!",), "no record's path"),
        (("abcdef123456",), "there is no such run"),
        (("missing.json",), "there is no such record"),
    ],
)
def test_what_is_no_run_is_refused(call: Call, arguments: tuple[str, ...], message: str) -> None:
    done = call("explain", *arguments)
    assert done.code == 2
    assert message in done.err


def test_clusters_need_a_source(call: Call) -> None:
    done = call("explain", digits("erm"), "--clusters")
    assert done.code == 2
    assert "no group source" in done.err


def test_attribution_needs_a_dataset_that_knows_its_objects(call: Call) -> None:
    (path,) = (runs_home() / "tiny").rglob("erm-*.json")
    done = call("explain", path, "--attribution")
    assert done.code == 2
    assert "where the objects are" in done.err


def test_a_head_that_is_not_linear_is_refused(call: Call) -> None:
    (path,) = (runs_home() / "tiny").rglob("lle-*.json")
    done = call("explain", path)
    assert done.code == 2
    assert "only linear heads" in done.err


def test_a_run_of_other_code_is_not_passed_off_as_itself(call: Call, tmp_path: Path) -> None:
    (path,) = (runs_home() / "digits2").rglob("erm-*.json")
    told = record.read(path)
    copy = tmp_path / path.name
    copy.write_bytes(told.model_copy(update={"code": "0" * 16}).to_json())
    shutil.copy(path.with_suffix(".npz"), copy.with_suffix(".npz"))
    done = call("explain", copy)
    assert done.code == 2
    assert "has changed since" in done.err
