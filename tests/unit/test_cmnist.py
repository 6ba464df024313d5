import gzip
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from formats.idx import draw_strokes, idx_bytes, write_idx, write_mnist
from worstgroup.benchmark.errors import CorruptFile, MissingData, UnknownName, UserError
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.registry import DATASETS
from worstgroup.benchmark.spec import SPLITS
from worstgroup.benchmark.store import Store, open_store
from worstgroup.datasets import idx
from worstgroup.datasets.cmnist import BIN99, ColoredMNIST, draw_colors, paint

REAL = Path(__file__).parents[3] / "shared/data/mnist"
real_mnist = pytest.mark.skipif(
    not (REAL / "MNIST/raw/train-images-idx3-ubyte.gz").exists(), reason=f"the real MNIST is not in {REAL}"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home; nothing may be fetched unless a test says how."""
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(idx, "download", lambda folder: pytest.fail("a test tried to download"))
    return tmp_path / "home"


@pytest.fixture
def no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the data folder that may lie beside this checkout."""
    monkeypatch.setattr(idx, "search", lambda relative, root, *, what: [root or data_home() / relative])


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Store]:
    yield open_store(ColoredMNIST(BIN99), BIN99, REAL)
    shutil.rmtree(data_home())  # 180 MB that pytest would keep


def stores() -> list[Path]:
    """What lies in the store folder beside the lock files."""
    folder = data_home() / "store"
    return [path for path in folder.iterdir() if path.suffix != ".lock"] if folder.exists() else []


# ---------------------------------------------------------------------------------------------------- the real MNIST


@real_mnist
def test_real_store_has_the_published_groups_and_pixels(real: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    train, t10k = idx.read_mnist(idx.find_mnist(REAL))
    digits = {
        "train": (train.images[:50_000], train.labels[:50_000]),
        "val": (train.images[50_000:], train.labels[50_000:]),
        "test": t10k,
    }
    for name in SPLITS:
        split, (pictures, labels) = real.split(name), digits[name]
        y, color = split.y, split.a[:, 0]
        assert tuple(np.bincount(2 * y + color)) == BIN99.counts[name]
        assert np.array_equal(y, labels > 4)
        assert 0.98 < (color == np.array(BIN99.attributes[0].aligned)[y]).mean() < 1
        assert len(split.images) == len(pictures)
        some = np.r_[:300, len(y) - 300 : len(y), np.flatnonzero(color == y)[:50]]
        for i in some:
            image = split.images[int(i) : int(i) + 1][0]
            assert np.array_equal(image[..., color[i]], pictures[i])
            assert not np.delete(image, color[i], axis=-1).any()

    before = (real.path / "train.images.npy").stat().st_mtime_ns
    monkeypatch.setattr(ColoredMNIST, "load", lambda self, root: pytest.fail("the store was built again"))
    again = open_store(ColoredMNIST(BIN99), BIN99, REAL)
    assert (again.path, again.fingerprint) == (real.path, real.fingerprint)
    assert (again.path / "train.images.npy").stat().st_mtime_ns == before
    assert stores() == [real.path]


@real_mnist
def test_unpacked_official_files_have_the_key_of_the_packed_ones(tmp_path: Path) -> None:
    packed = idx.find_mnist(REAL)
    for name, path in packed.items():
        (tmp_path / name).write_bytes(gzip.decompress(path.read_bytes()))
    unpacked = idx.find_mnist(tmp_path)
    assert {path.suffix for path in unpacked.values()} == {""}
    assert idx.mnist_key(unpacked) == idx.mnist_key(packed)
    shutil.rmtree(tmp_path)


# -------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", SPLITS)
def test_drawn_colors_have_the_counts_of_the_card(name: str) -> None:
    """The draws depend only on the number of examples of each class, so no MNIST is needed to repeat them."""
    counts = BIN99.counts[name]  # type: ignore[index]
    y = np.repeat([0, 1], [counts[0] + counts[1], counts[2] + counts[3]])
    np.random.default_rng(0).shuffle(y)
    color = draw_colors(y, BIN99.params["green"], BIN99.params["seed"])
    assert tuple(np.bincount(2 * y + color)) == counts


def test_paint_fills_one_channel() -> None:
    digits, _ = draw_strokes(4)
    images = paint(digits, np.array([0, 1, 1, 0]))
    assert images.shape == (4, 28, 28, 3)
    assert images.dtype == np.uint8
    for image, digit, channel in zip(images, digits, (0, 1, 1, 0), strict=True):
        assert np.array_equal(image[..., channel], digit)
        assert image.sum(dtype=int) == digit.sum(dtype=int)


def test_load_of_a_drawn_mnist(tmp_path: Path) -> None:
    parts = write_mnist(tmp_path)
    splits = ColoredMNIST(BIN99).load(tmp_path)
    assert [len(splits[name].y) for name in SPLITS] == [200, 0, 50]
    for name, part in (("train", "train"), ("test", "t10k")):
        split, (digits, labels) = splits[name], parts[part]
        assert np.array_equal(split.y, labels > 4)
        assert split.a.shape == (len(labels), 1)
        assert np.array_equal(np.asarray(split.images[: len(labels)]).max(axis=-1), digits)


def test_card_is_consistent() -> None:
    assert BIN99.group_names() == ["digit 0-4/red", "digit 0-4/green", "digit 5-9/red", "digit 5-9/green"]
    assert {name: sum(counts) for name, counts in BIN99.counts.items()} == {"train": 50000, "val": 10000, "test": 10000}
    assert [source.file for source in BIN99.sources] == [f"{name}.gz" for name in idx.MNIST]


def test_a_plain_name_offers_the_variants() -> None:
    entry = DATASETS["cmnist"]
    assert entry.cls is ColoredMNIST
    assert entry.card("bin99") is BIN99
    with pytest.raises(UnknownName, match="cmnist:bin99"):
        entry.card("")


# ------------------------------------------------------------------------------------------------------------ format


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_read_idx(tmp_path: Path, name: str) -> None:
    images, labels = draw_strokes(12)
    assert np.array_equal(idx.read_idx(write_idx(tmp_path / name, images)), images)
    assert np.array_equal(idx.read_idx(write_idx(tmp_path / f"labels-{name}", labels)), labels)


def test_a_gz_that_a_browser_unpacked_is_read(tmp_path: Path) -> None:
    images, _ = draw_strokes(3)
    (tmp_path / "images.gz").write_bytes(idx_bytes(images))
    assert np.array_equal(idx.read_idx(tmp_path / "images.gz"), images)


IMAGES = idx_bytes(draw_strokes(3)[0])
PACKED = gzip.compress(IMAGES, mtime=0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "starts with nothing"),
        (b"\x00\x00", "starts with 00 00"),
        (b"<!DOCTYPE html>", "not an idx file"),
        (b"\x00\x00\x0d\x03" + IMAGES[4:], "not an idx file"),
        (IMAGES[:10], "truncated within its header, 10 of 16 bytes"),
        (IMAGES[:-1], "truncated: its header declares 3x28x28 = 2352 bytes, 2351 follow"),
        (IMAGES[:4] + (4).to_bytes(4, "big") + IMAGES[8:], "declares 4x28x28"),
        (IMAGES[:4] + b"\xff" * 12 + IMAGES[16:], "truncated"),
        (IMAGES + b"\x00", "too long: its header declares 3x28x28 = 2352 bytes, 2353 follow"),
        (gzip.compress(IMAGES[:-1]), "2351 follow"),
        (PACKED[: len(PACKED) // 2], "broken or truncated gzip"),
        (PACKED[:5], "broken or truncated gzip"),
        (PACKED[:40] + b"\x55" * 40 + PACKED[80:], "broken or truncated gzip"),
        (PACKED[:-8] + b"\x00" * 8, "broken or truncated gzip"),
        (PACKED + b"garbage", "broken or truncated gzip"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(CorruptFile) as error:
        idx.read_idx(path)
    assert str(path) in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("train-labels-idx1-ubyte", np.zeros(199, np.uint8), "200 pictures"),
        ("train-labels-idx1-ubyte", np.full(200, 10, np.uint8), "labels from 0 to 9"),
        ("t10k-labels-idx1-ubyte", draw_strokes(50)[0], "labels from 0 to 9"),
        ("t10k-images-idx3-ubyte", np.zeros(50, np.uint8), "pictures of 28x28"),
        ("t10k-images-idx3-ubyte", np.zeros((50, 14, 14), np.uint8), "pictures of 28x28"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, name: str, array: np.ndarray, says: str) -> None:
    write_mnist(tmp_path)
    path = write_idx(tmp_path / f"{name}.gz", array)
    with pytest.raises(CorruptFile, match=says) as error:
        ColoredMNIST(BIN99).load(tmp_path)
    assert str(path) in str(error.value)


def test_a_foreign_mnist_is_refused_and_leaves_no_store(tmp_path: Path) -> None:
    write_mnist(tmp_path / "drawn")
    with pytest.raises(CorruptFile) as error:
        open_store(ColoredMNIST(BIN99), BIN99, tmp_path / "drawn")
    found = ColoredMNIST(BIN99).load(tmp_path / "drawn")["train"]
    assert str(tuple(int(n) for n in np.bincount(2 * found.y + found.a[:, 0]))) in str(error.value)
    assert "(254, 25284, 24231, 231)" in str(error.value)
    assert stores() == []


# --------------------------------------------------------------------------------------------------- finding, fetching


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["mnist/MNIST/raw", "MNIST/raw", "mnist/raw", "mnist", "raw", "."])
def test_layouts_under_root(tmp_path: Path, folder: str, packed: bool) -> None:
    write_mnist(tmp_path / "root" / folder, 10, 10, packed=packed)
    files = idx.find_mnist(tmp_path / "root")
    assert list(files) == list(idx.MNIST)
    assert {path.parent for path in files.values()} == {tmp_path / "root" / folder}


def test_home_comes_before_the_checkout(home: Path) -> None:
    write_mnist(home / "data/mnist", 10, 10)
    assert {path.parent for path in idx.find_mnist(None).values()} == {home / "data/mnist"}


def test_packed_and_unpacked_files_may_be_mixed_and_the_packed_wins(tmp_path: Path) -> None:
    write_mnist(tmp_path, 10, 10, packed=False)
    packed = write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(10, np.uint8))
    files = idx.find_mnist(tmp_path)
    assert files["t10k-labels-idx1-ubyte"] == packed
    assert files["train-images-idx3-ubyte"].suffix == ""


def test_an_altered_file_has_another_key(tmp_path: Path) -> None:
    write_mnist(tmp_path, 10, 10)
    before = ColoredMNIST(BIN99).source_key(tmp_path)
    assert ColoredMNIST(BIN99).source_key(tmp_path) == before
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(10, np.uint8))
    assert ColoredMNIST(BIN99).source_key(tmp_path) != before


def test_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"--root .*nowhere is not a folder"):
        ColoredMNIST(BIN99).source_key(tmp_path / "nowhere")


def test_root_without_the_files_says_what_to_put_where(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_idx(root / "raw/t10k-labels-idx1-ubyte.gz", np.zeros(10, np.uint8))
    with pytest.raises(MissingData) as error:
        ColoredMNIST(BIN99).load(root)
    message = str(error.value)
    assert all(name in message for name in idx.MNIST)
    assert f"into {root}:" in message
    assert "--root" in message
    assert f"{root / 'raw'} lacks train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte." in message


@pytest.mark.usefixtures("no_checkout")
def test_a_failed_fetch_says_why_and_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        write_mnist(folder / "MNIST/raw", 10, 10)
        raise RuntimeError("Error downloading train-images:\nTried the mirror, got:\nno route to host\n")

    monkeypatch.setattr(idx, "download", fail)
    with pytest.raises(MissingData) as error:
        ColoredMNIST(BIN99).source_key(None)
    message = str(error.value)
    assert "could not be fetched (Error downloading train-images: Tried the mirror, got: no route to host)" in message
    assert all(name in message for name in idx.MNIST)
    assert f"into {home / 'data/mnist'}:" in message
    assert "--root" in message
    assert [path.name for path in (home / "data").rglob("*")] == []


@pytest.mark.usefixtures("no_checkout")
def test_a_full_disk_is_no_network_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(idx, "download", fail)
    with pytest.raises(UserError, match="no space left on the disk"):
        idx.find_mnist(None)


@pytest.mark.usefixtures("no_checkout")
def test_a_fetch_completes_a_folder_that_holds_some_of_the_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = home / "data/mnist/MNIST/raw"
    write_idx(raw / "t10k-labels-idx1-ubyte.gz", np.zeros(10, np.uint8))
    monkeypatch.setattr(idx, "download", lambda folder: write_mnist(folder / "MNIST/raw", 10, 10))
    files = idx.find_mnist(None)
    assert files == {name: raw / f"{name}.gz" for name in idx.MNIST}
    assert all(path.is_file() for path in files.values())
    assert sorted(path.name for path in (home / "data").iterdir()) == ["mnist"]
    monkeypatch.setattr(idx, "download", lambda folder: pytest.fail("fetched twice"))
    assert idx.find_mnist(None) == files


def test_importing_the_dataset_imports_no_torchvision() -> None:
    code = "import sys, worstgroup.datasets.cmnist; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
