"""The idx format, and where the files of MNIST and Fashion-MNIST may lie."""

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from formats.idx import draw_strokes, idx_bytes, write_idx, write_mnist
from worstgroup.benchmark.errors import CorruptFile, MissingData
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.spec import digest
from worstgroup.datasets import idx
from worstgroup.datasets.idx import FASHION, MNIST, Family

REAL = Path(__file__).parents[3] / "shared/data/mnist"
FAMILIES = pytest.mark.parametrize("family", [MNIST, FASHION], ids=lambda family: family.title)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home."""
    monkeypatch.setenv("WORSTGROUP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the data folder that may lie beside this checkout."""
    monkeypatch.setattr(idx, "search", lambda relative, root, *, what: [root or data_home() / relative])


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
        (gzip.compress(IMAGES[:-1], mtime=0), "2351 follow"),
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
        idx.read_digits(idx.find_digits(MNIST, tmp_path))
    assert str(path) in str(error.value)


# --------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("family", "folder"),
    [(MNIST, folder) for folder in ("mnist/MNIST/raw", "MNIST/raw", "mnist/raw", "mnist", "raw", ".")]
    + [(FASHION, folder) for folder in ("fashion-mnist", "FashionMNIST/raw", "FashionMNIST", "raw", ".")],
)
def test_layouts_under_root(tmp_path: Path, family: Family, folder: str, packed: bool) -> None:
    write_mnist(tmp_path / "root" / folder, 10, 10, packed=packed)
    files = idx.find_digits(family, tmp_path / "root")
    assert tuple(files) == family.names
    assert {path.parent for path in files.values()} == {tmp_path / "root" / folder}


def test_each_family_finds_its_own_files_beside_the_other(tmp_path: Path) -> None:
    for folder in ("MNIST/raw", "FashionMNIST/raw"):
        write_mnist(tmp_path / folder, 10, 10)
    for family, folder in ((MNIST, "MNIST/raw"), (FASHION, "FashionMNIST/raw")):
        assert {path.parent for path in idx.find_digits(family, tmp_path).values()} == {tmp_path / folder}


def test_home_comes_before_the_checkout(home: Path) -> None:
    write_mnist(home / "data/mnist", 10, 10)
    assert {path.parent for path in idx.find_digits(MNIST, None).values()} == {home / "data/mnist"}


def test_packed_and_unpacked_files_may_be_mixed_and_the_packed_wins(tmp_path: Path) -> None:
    write_mnist(tmp_path, 10, 10, packed=False)
    packed = write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(10, np.uint8))
    files = idx.find_digits(MNIST, tmp_path)
    assert files["t10k-labels-idx1-ubyte"] == packed
    assert files["train-images-idx3-ubyte"].suffix == ""


def test_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"--root .*nowhere is not a folder"):
        idx.find_digits(MNIST, tmp_path / "nowhere")


@FAMILIES
def test_root_without_the_files_says_what_to_put_where(tmp_path: Path, family: Family) -> None:
    root = tmp_path / "root"
    write_idx(root / "raw/t10k-labels-idx1-ubyte.gz", np.zeros(10, np.uint8))
    with pytest.raises(MissingData) as error:
        idx.find_digits(family, root)
    message = str(error.value)
    assert message.startswith(f"{family.title} is not on disk")
    assert all(name in message for name in family.names)
    assert f"into {root}:" in message
    assert f"from {family.mirrors[0]}" in message
    assert "--root" in message
    assert f"{root / 'raw'} lacks train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte." in message


# ---------------------------------------------------------------------------------------------------------- identity


def test_an_altered_file_has_another_key(tmp_path: Path) -> None:
    def key() -> str:
        return idx.digits_key(MNIST, idx.find_digits(MNIST, tmp_path))

    write_mnist(tmp_path, 10, 10)
    before = key()
    assert key() == before
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(10, np.uint8))
    assert key() != before


def test_a_repacked_file_has_the_key_of_its_content(tmp_path: Path) -> None:
    """Distributions pack Fashion-MNIST anew, without name and time in the header: its .gz has another MD5."""
    parts = []
    for packing in ({"mtime": 0}, {"mtime": 1, "compresslevel": 1}, None):
        folder = tmp_path / str(len(parts))
        write_mnist(folder, 10, 10, packed=False)
        for path in sorted(folder.iterdir()) if packing else []:
            (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), **packing))
        parts.append(idx.digits_key(FASHION, idx.find_digits(FASHION, folder)))
    assert len(set(parts)) == 1


@pytest.mark.skipif(not (REAL / "MNIST/raw").is_dir(), reason=f"the real MNIST is not in {REAL}")
def test_the_official_files_have_one_key_however_packed(tmp_path: Path) -> None:
    packed = idx.find_digits(MNIST, REAL)
    for name, path in packed.items():
        (tmp_path / name).write_bytes(gzip.decompress(path.read_bytes()))
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    content = gzip.decompress(packed["t10k-images-idx3-ubyte"].read_bytes())
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(content, compresslevel=1))
    mixed = idx.find_digits(MNIST, tmp_path)
    assert [path.suffix for path in mixed.values()] == ["", "", ".gz", ""]
    assert idx.digits_key(MNIST, mixed) == idx.digits_key(MNIST, packed)
    assert idx.digits_key(MNIST, packed) == digest([content for _, _, content, _ in MNIST.files])
    assert {f"{name}.gz": path.stat().st_size for name, path in packed.items()} == {
        source.file: source.size for source in MNIST.sources
    }
    shutil.rmtree(tmp_path)


@FAMILIES
def test_sources_can_be_fetched_over_https(family: Family) -> None:
    assert [source.file for source in family.sources] == [f"{name}.gz" for name in family.names]
    for source in family.sources:
        assert all(url.startswith("https://") and url.endswith(f"/{source.file}") for url in source.urls)
        assert len(source.md5) == 32
        assert source.size
    assert [sum(part) for part in family.sizes] == [60_000, 10_000]


def test_importing_the_dataset_imports_no_torchvision() -> None:
    code = "import sys, worstgroup.datasets.cmnist; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
