"""`new-dataset`, `prepare`, `show --images`, `embed` and a run on pictures, as a newcomer with a folder of them."""

import io
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import Call, Result, finish, start
from PIL import Image
from worstgroup.benchmark.home import TEMPORARY
from worstgroup.benchmark.record import find, read
from worstgroup.benchmark.registry import DATASETS

COUNTS = {"train": (9, 3, 3, 9), "val": (3, 3, 3, 3), "test": (4, 4, 4, 4)}


def write_birds(folder: Path, counts: dict[str, tuple[int, ...]] = COUNTS, side: int = 40) -> Path:
    """Pictures and the metadata.csv that the template of `new-dataset` reads; green land, blue water, a bright bird."""
    random = np.random.RandomState(0)
    lines = ["filename,split,y,place"]
    for split, groups in counts.items():
        for g, n in enumerate(groups):
            bird, place = ("landbird", "waterbird")[g // 2], ("land", "water")[g % 2]
            for i in range(n):
                pixels = random.randint(0, 60, (side, side + 10, 3))
                pixels[:, :, 1 + g % 2] += 120
                pixels[side // 4 : side // 2, 5 : 10 + 10 * (g // 2)] = 230
                name = f"{split}/{bird}_{place}_{i}.png"
                (folder / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
                lines.append(f"{name},{split},{bird},{place}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder with pictures beside it; what plugins register is forgotten."""
    write_birds(tmp_path / "birds")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = {name: DATASETS[name] for name in DATASETS}
    yield tmp_path / "here"
    DATASETS._entries = before


def forget(call: Call, *arguments: object) -> Result:
    """A call after which the dataset that its plugin registered is gone, as when a process ends."""
    before = {name: DATASETS[name] for name in DATASETS}
    try:
        return call(*arguments)
    finally:
        DATASETS._entries = before


def test_a_newcomer_with_pictures(call: Call, here: Path) -> None:
    """From `new-dataset` to a leaderboard, with nothing but what the program says to type next."""
    done = call("new-dataset", "my-birds")
    assert done.code == 0
    assert "worstgroup prepare my-birds --root FOLDER --plugin my_birds.py" in done.out
    birds, plugin = here.parent / "birds", ("--plugin", "my_birds.py")

    done = forget(call, "prepare", "my-birds", "--root", birds, *plugin)
    assert done.code == 0, done.err
    assert "my-birds is ready: 52 pictures of 224x224x3" in done.out
    assert "landbird/water   3 / 3 / 4" in done.out

    small = ("--set", "data.size=32")
    done = forget(call, "show", "my-birds", "--images", "--root", birds, *plugin, *small)
    assert done.code == 0, done.err
    sheet = Image.open("my-birds-32px.png")
    rows = [np.asarray(sheet)[48 + 100 * g : 48 + 100 * g + 96, 260:] for g in range(4)]
    assert all((row[:, :, 1] > row[:, :, 2]).mean() > 0.1 for row in rows[::2])  # land is green
    assert all((row[:, :, 2] > row[:, :, 1]).mean() > 0.1 for row in rows[1::2])

    run = ("--method", "erm,groupdro", "--backbone", "tiny_cnn", "--seeds", "0", "--set", "recipe.epochs=1")
    done = forget(call, "run", "--dataset", "my-birds", *run, *small, *plugin, "--jobs", "1")  # without --root
    assert done.code == 0, done.err
    assert "my-birds[32px] · tiny_cnn" in done.out


def test_one_call_prepares_what_lists_show_as_ready(call: Call, here: Path) -> None:
    assert call("new-dataset", "my-birds").code == 0
    plugin = ("--plugin", "my_birds.py")

    def state() -> str:
        (line,) = [line for line in forget(call, "ls", "datasets", *plugin).out.splitlines() if "my-birds" in line]
        return line.split("│")[4].strip()

    assert state() == "by hand"
    assert forget(call, "prepare", "my-birds", "--root", here.parent / "birds", *plugin).code == 0
    assert state() == "ready"


def test_embeddings_of_a_frozen_backbone(call: Call, here: Path) -> None:
    done = call("embed", "--dataset", "tiny", "--backbone", "tiny_cnn", "--output", "tiny.npz")
    assert done.code == 0, done.err
    done = call(
        *("run", "--dataset", "embeddings", "--root", "tiny.npz", "--method", "erm,dfr", "--seeds", "0"),
        *("--set", "recipe.epochs=2", "--jobs", "1"),
    )
    assert done.code == 0, done.err
    assert "embeddings:tiny · identity" in done.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("prepare", "waterbird"), ["unknown dataset 'waterbird'. Did you mean waterbirds"]),
        (("prepare", "waterbirds"), ["metadata.csv", "--download"]),
        (("prepare", "celeba"), ["non-commercial"]),
        (("prepare", "celeba", "--download"), ["non-commercial"]),
        (("prepare", "waterbirds", "--root", "nowhere"), ["nowhere is not a folder"]),
        (("prepare", "waterbirds", "--root", ".", "--download"), ["give one of them"]),
        (("prepare", "tiny", "--set", "data.size=8"), ["no data.size"]),
        (("prepare", "tiny", "--set", "size=8"), ["only data.size and data.transform"]),
        (("prepare", "waterbirds", "--set", "data.transform=nice"), ["no transform 'nice'"]),
        (("prepare", "waterbirds", "--set", "data.size=4"), ["from 8 to 1024"]),
        (("prepare", "waterbirds", "--set", "data.size=big"), ["data.size=big"]),
        (("prepare", "waterbirds", "--set", "data.size=32"), ["`worstgroup prepare waterbirds --download` fetches it"]),
        (("run", "--dataset", "waterbirds", "--method", "erm"), ["`worstgroup prepare waterbirds --download` fetches"]),
        (("prepare", "cmnist"), ["cmnist is a family of datasets: name one of cmnist:bin99, cmnist:domainbed"]),
        (("prepare", "folder", "--root", "."), ["neither metadata.csv nor a folder train lies in ."]),
        (("prepare", "folder", "--download"), ["folder: --root DIR is missing"]),
        (("prepare", "embeddings", "--root", "."), ["no *.npz|.parquet|.safetensors in ."]),
        (("show", "tiny", "--images", "--output", "."), ["cannot write .: a folder stands", "Choose another place."]),
        (("show", "tiny", "--images", "--output", ".."), ["cannot write ..: a folder stands"]),
        (("show", "tiny", "--root", "."), ["go with --images"]),
        (("embed", "--dataset", "tiny", "--backbone", "tiny", "--output", "x.npz"), ["unknown backbone 'tiny'"]),
        (("new-dataset", "tiny"), ["dataset name 'tiny' is taken"]),
        (("new-dataset", "Birds!"), ["dataset name 'Birds!'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_message(
    call: Call, here: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: list[str]
) -> None:
    done = call(*arguments)
    assert done.code == 2, done
    assert "Traceback" not in done.err
    for text in says:
        assert text in done.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["celeba", "urbancars", "urbancars:built", "spuco:birds", "waterbirds:built"])
def test_what_to_put_where_is_said_once(call: Call, here: Path, name: str) -> None:
    base, _, variant = name.partition(":")
    by_hand = DATASETS[base].card(variant).by_hand
    for done in (call("prepare", name), call("run", "--dataset", name, "--method", "erm")):
        assert done.code == 2
        assert done.err.count(by_hand) == 1


def test_the_next_command_quotes_a_path(call: Call, here: Path) -> None:
    done = call("embed", "--dataset", "tiny", "--backbone", "tiny_cnn", "--output", "two words.npz")
    assert "--root 'two words.npz' --method" in done.out


def test_embeddings_are_no_pictures(call: Call, here: Path) -> None:
    assert call("embed", "--dataset", "tiny", "--backbone", "tiny_cnn", "--output", "tiny.npz").code == 0
    done = call("prepare", "embeddings", "--root", "tiny.npz")
    assert re.match(r"embeddings:tiny is ready: 192 rows of \d+ features, ", done.out)


def test_help_names_policies(call: Call) -> None:
    assert "HOST[+SOURCE][@POLICY]" in call("run", "--help").out
    assert "HOST[+SOURCE][@POLICY]" in call("check", "--help").out


def test_prepare_checks_labels(call: Call, here: Path, home: Path) -> None:
    assert call("prepare", "tiny").code == 0
    (path,) = (home / "data" / "store").glob("*/train.labels.npz")
    content = path.read_bytes()
    path.write_bytes(content[:150] + bytes([content[150] ^ 1]) + content[151:])
    done = call("prepare", "tiny")
    assert done.code == 2
    assert "train.labels.npz: cannot be read; delete the folder, it is rebuilt." in done.err
    with np.load(io.BytesIO(content)) as labels:
        parts = {name: labels[name] for name in labels.files}
    np.savez(path, **(parts | {"y": 1 - parts["y"]}))
    assert path.stat().st_size == len(content)
    assert "its labels were altered; delete the folder, it is rebuilt." in call("prepare", "tiny").err


def test_a_damaged_note_of_the_latest_store(call: Call, here: Path, home: Path) -> None:
    assert call("prepare", "tiny").code == 0
    (note,) = (home / "data" / "store").glob("*.latest")
    good = note.read_bytes()
    note.write_bytes(b"\xff\xfe")
    assert call("ls", "datasets").code == 0
    assert call("prepare", "tiny").code == 0
    assert note.read_bytes() == good


def test_a_lock_that_cannot_be_opened(call: Call, home: Path) -> None:
    (home / "locks" / "x.lock").mkdir(parents=True)
    done = call("cache", "--prune")
    assert done.code == 2
    assert "cannot write" in done.err


def test_a_dataset_may_be_called_as_the_folder_of_its_pictures(
    call: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "my_birds").mkdir()
    monkeypatch.syspath_prepend(here)
    assert call("new-dataset", "my-birds").code == 0


def test_strict_refuses_other_counts(call: Call, here: Path) -> None:
    assert call("new-dataset", "my-birds").code == 0
    file = here / "my_birds.py"
    file.write_text(file.read_text().replace("counts={},", 'counts={"train": (3498, 184, 56, 1057)},'))
    arguments = ("prepare", "my-birds", "--root", here.parent / "birds", "--plugin", "my_birds.py")
    for _ in range(2):
        done = forget(call, *arguments, "--strict")
        assert done.code == 2
        assert "(9, 3, 3, 9)" in done.err or "my-birds[custom]" in done.err
        done = forget(call, *arguments)
        assert done.code == 0, done.err
        assert done.out.startswith("my-birds[custom] is ready")


def test_a_truncated_picture_is_named_with_its_line(call: Call, here: Path, home: Path) -> None:
    birds = here.parent / "birds"
    broken = birds / "val" / "waterbird_land_1.png"
    broken.write_bytes(broken.read_bytes()[:-400])
    assert call("new-dataset", "my-birds").code == 0
    done = forget(call, "prepare", "my-birds", "--root", birds, "--plugin", "my_birds.py")
    assert done.code == 2
    assert "waterbird_land_1.png (line 33 of metadata.csv): cannot be decoded" in done.err
    assert not list((home / "data" / "store").rglob("*"))
    assert not list((home / "data" / "pixels").rglob("*"))


def test_an_interrupted_build_goes_on(here: Path, home: Path) -> None:
    """SIGINT while pictures are decoded: exit code 130, and the same command ends at the same fingerprint."""
    from worstgroup.authoring import scaffold

    scaffold.new_dataset("my-birds", here)
    birds = write_birds(here.parent / "many", {name: tuple(30 * n for n in group) for name, group in COUNTS.items()})
    command = ("prepare", "my-birds", "--root", birds, "--plugin", here / "my_birds.py")
    process = start(home, *command)
    pixels = home / "data" / "pixels"
    for _ in range(600):
        if any(path.name.startswith(TEMPORARY) for path in pixels.glob(".*")) if pixels.is_dir() else False:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    stopped = finish(process)
    assert stopped.code in (0, 130), stopped
    if stopped.code == 130:
        assert "interrupted" in stopped.err
    again = finish(start(home, *command))
    undisturbed = finish(start(home.parent / "other", *command))
    assert again.code == undisturbed.code == 0
    assert again.out.splitlines()[2:] == undisturbed.out.splitlines()[2:]
    assert not [path for path in pixels.iterdir() if path.name.startswith(TEMPORARY)]


def test_two_processes_prepare_the_same_set(here: Path, home: Path) -> None:
    from worstgroup.authoring import scaffold

    scaffold.new_dataset("my-birds", here)
    command = ("prepare", "my-birds", "--root", here.parent / "birds", "--plugin", here / "my_birds.py")
    both = [start(home, *command) for _ in range(2)]
    done = [finish(process) for process in both]
    assert [each.code for each in done] == [0, 0], done
    assert done[0].out == done[1].out
    assert len(list((home / "data" / "pixels").iterdir())) == 1


def test_records_name_the_size_of_the_pictures(call: Call, here: Path, home: Path) -> None:
    assert call("new-dataset", "my-birds").code == 0
    done = forget(
        call,
        *("run", "--dataset", "my-birds", "--root", here.parent / "birds", "--plugin", "my_birds.py"),
        *("--method", "erm", "--backbone", "tiny_cnn", "--seeds", "0", "--jobs", "1"),
        *("--set", "data.size=32", "--set", "recipe.epochs=1"),
    )
    assert done.code == 0, done.err
    (path,) = find(home / "runs")
    assert read(path).dataset == "my-birds[32px]"
