"""Pictures against torchvision's own results on PIL pictures; their identity; transforms at other sizes."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats.drawn import photograph
from PIL import Image
from torchvision import transforms as T
from worstgroup.benchmark.errors import CorruptFile, UserError
from worstgroup.benchmark.pictures import Pictures, parse, plain, scaled, with_pixels
from worstgroup.benchmark.spec import Card, Transform
from worstgroup.datasets.tiny import make_card

SIZES = [(37, 23), (23, 37), (64, 48), (101, 33)]
SMALL = Transform("resize 12x12", (12, 12))


def write(path: Path, size: tuple[int, int] = (37, 23), mode: str = "RGB", seed: int = 0) -> Path:
    """A drawn picture of (width, height) in a mode of PIL; what it is written as follows from the name."""
    picture = Image.fromarray(photograph(*size, seed))
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(photograph(*size, seed + 1)[:, :, 0]))
    (picture if mode == "RGBA" else picture.convert(mode)).save(path)
    return path


def written(folder: Path) -> list[Path]:
    """One picture of every kind that datasets hold."""
    files = [write(folder / f"rgb{i}.jpg", size, seed=i) for i, size in enumerate(SIZES)]
    files += [write(folder / f"{mode}.jpg", SIZES[0], mode) for mode in ("L", "CMYK")]
    return files + [write(folder / f"{mode}.png", SIZES[1], mode) for mode in ("L", "P", "RGBA", "1", "LA")]


# -------------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    ("steps", "image", "reference"),
    [
        ("resize 32x32, crop 28x28", (28, 28), [T.Resize((32, 32)), T.CenterCrop(28)]),
        ("resize 20x30", (20, 30), [T.Resize((20, 30))]),
        ("resize 24, crop 20x20", (20, 20), [T.Resize(24), T.CenterCrop(20)]),
        ("crop 16x16", (16, 16), [T.CenterCrop(16)]),
        ("crop 50x60", (50, 60), [T.CenterCrop((50, 60))]),  # larger than most: padded with black
        ("crop 21x19, resize 32x32", (32, 32), [T.CenterCrop((21, 19)), T.Resize((32, 32))]),
    ],
)
def test_pixels_are_torchvisions_bits(
    tmp_path: Path, steps: str, image: tuple[int, int], reference: list[object]
) -> None:
    files = written(tmp_path)
    ours = Pictures(files, Transform(steps, image))[:]
    assert ours.shape == (len(files), *image, 3)
    assert ours.dtype == np.uint8
    for path, picture in zip(files, ours, strict=True):
        with Image.open(path) as opened:
            expected = np.asarray(T.Compose(reference)(opened.convert("RGB")))
        assert np.array_equal(picture, expected), path.name


def test_without_steps_the_picture_is_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    assert np.array_equal(Pictures([path], Transform("", (23, 37)))[:][0], photograph(37, 23))
    with pytest.raises(CorruptFile, match=r"a\.png \(row 7\): is 23x37 px, expected 23x38 after 'no step'"):
        Pictures([path], Transform("", (23, 38)), where=lambda i: "row 7")[:]


def test_slices_are_those_of_the_whole(tmp_path: Path) -> None:
    pictures = Pictures(written(tmp_path), SMALL)
    whole = pictures[:]
    assert len(pictures) == len(whole) == 11
    assert np.array_equal(np.concatenate([pictures[0:4], pictures[4:8], pictures[8:20]]), whole)


def blend(picture: Image.Image, mask: Image.Image, share: float) -> Image.Image:
    return Image.blend(picture.convert("RGB"), mask.convert("RGB"), share)


def test_a_drawing_gets_the_pictures_and_its_detail(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.png"), write(tmp_path / "b.png", seed=5)
    same = Transform("", (23, 37))
    drawn = Pictures([(first, second), (second, first)], same, draw=blend, details=[1.0, 1.0])[:]
    assert np.array_equal(drawn, Pictures([second, first], same)[:])


# -------------------------------------------------------------------------------------------------------------- damage


def test_a_truncated_picture_is_named_with_its_row(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.jpg", (200, 150), seed=i) for i in range(3)]
    files[1].write_bytes(files[1].read_bytes()[:-2000])
    pictures = Pictures(files, SMALL, where=lambda i: f"line {i + 2} of table.csv")
    with pytest.raises(CorruptFile, match=r"1\.jpg \(line 3 of table\.csv\): cannot be decoded: .*truncated"):
        pictures[:]


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\xff\xd8\xff\xe0" + bytes(50), b"\x89PNG\r\n"])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"a\.jpg: cannot be decoded"):
        Pictures([tmp_path / "a.jpg"], SMALL)[:]


@pytest.mark.parametrize("use", [lambda pictures: pictures[:], lambda pictures: pictures.key])
def test_a_missing_picture_is_named_with_its_row(tmp_path: Path, use: object) -> None:
    pictures = Pictures([write(tmp_path / "a.png"), tmp_path / "b.png"], SMALL, where=lambda i: f"row {i}")
    with pytest.raises(CorruptFile, match=r"b\.png \(row 1\): cannot be read: No such file"):
        use(pictures)  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------------ identity


def test_the_key_is_that_of_the_content(tmp_path: Path) -> None:
    files = written(tmp_path)
    key = Pictures(files, SMALL).key
    (tmp_path / "other").mkdir()
    moved = [tmp_path / "other" / f"{i}{path.suffix}" for i, path in enumerate(files)]
    for old, new in zip(files, moved, strict=True):
        new.write_bytes(old.read_bytes())
        os.utime(new, (1, 1))
    assert Pictures(moved, SMALL).key == key
    assert Pictures(moved[::-1], SMALL).key != key
    assert Pictures(moved[:-1], SMALL).key != key
    content = bytearray(moved[0].read_bytes())
    content[-1] ^= 1
    moved[0].write_bytes(content)
    assert Pictures(moved, SMALL).key != key


def test_no_file_is_read_twice_for_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = written(tmp_path)
    read, seen = Path.read_bytes, list[str]()

    def counted(path: Path) -> bytes:
        seen.append(path.name)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    keys = {Pictures(files, SMALL).key for _ in range(3)}
    assert len(keys) == 1
    assert sorted(seen) == sorted(path.name for path in files)


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    before, stat = Pictures([path], SMALL).key, path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert Pictures([path], SMALL).key == before  # touched, the same content
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 2))
    assert Pictures([path], SMALL).key != before


def test_transform_drawing_and_details_are_part_of_the_key(tmp_path: Path) -> None:
    pair = (write(tmp_path / "a.png"), write(tmp_path / "b.png", seed=5))
    keys = [
        Pictures([pair], SMALL, draw=blend, details=[0.5]).key,
        Pictures([pair], SMALL, draw=blend, details=[0.6]).key,
        Pictures([pair], SMALL, draw=blend).key,
        Pictures([pair], Transform("crop 12x12", (12, 12)), draw=blend, details=[0.5]).key,
        Pictures([pair], SMALL, draw=plain, details=[0.5]).key,
        Pictures(list(pair), SMALL, draw=blend, details=[0.5, 0.5]).key,
    ]
    assert len(set(keys)) == len(keys)


# ---------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    ("steps", "image", "side", "expected"),
    [
        ("resize 256x256, crop 224x224", (224, 224), 112, "resize 128x128, crop 112x112"),
        ("resize 256x256, crop 224x224", (224, 224), 64, "resize 73x73, crop 64x64"),
        ("crop 178x178, resize 224x224", (224, 224), 112, "crop 178x178, resize 112x112"),
        ("crop 178x178, resize 256x256, crop 224x224", (224, 224), 112, "crop 178x178, resize 128x128, crop 112x112"),
        ("crop 178x178", (178, 178), 64, "crop 178x178, resize 64x64"),
        ("resize 256, crop 224x224", (224, 224), 112, "resize 128, crop 112x112"),
        ("resize 218x178", (218, 178), 89, "resize 109x89"),
        ("resize 224", (274, 224), 112, "resize 137x112"),
        ("", (28, 28), 14, "resize 14x14"),
    ],
)
def test_a_scaled_transform_shows_the_same_part(steps: str, image: tuple[int, int], side: int, expected: str) -> None:
    small = scaled(Transform(steps, image), side)
    assert small.steps == expected
    assert min(small.image) == side
    assert small.image[0] / small.image[1] == pytest.approx(image[0] / image[1], abs=0.01)


@pytest.mark.parametrize(
    "steps", ["resize 256x256, crop 224x224", "crop 178x178", "resize 256, crop 224x224", "", "resize 224"]
)
@pytest.mark.parametrize("side", [16, 40, 49, 112])
def test_a_scaled_transform_gives_its_size(tmp_path: Path, steps: str, side: int) -> None:
    image = {"crop 178x178": (178, 178), "": (218, 178), "resize 224": (274, 224)}.get(steps, (224, 224))
    path = write(tmp_path / "a.jpg", (178, 218))
    assert Pictures([path], Transform(steps, image))[:].shape == (1, *image, 3)
    small = scaled(Transform(steps, image), side)
    assert Pictures([path], small)[:].shape == (1, *small.image, 3)


@pytest.mark.parametrize("step", ["shrink 8x8", "resize", "crop 8 x 8", "resize 0x8", "resize 8x8x8", "crop -8x8"])
def test_a_mistyped_step_is_no_fault_of_the_pictures(step: str) -> None:
    with pytest.raises(UserError, match=f"transform step '{step}': write `resize HxW`") as error:
        Pictures([], Transform(f"resize 9x9, {step}", (8, 8)))
    assert not isinstance(error.value, CorruptFile)


def test_steps_are_parsed_with_blanks() -> None:
    assert parse(" resize  8x9 ,crop 7") == [("resize", [8, 9]), ("crop", [7])]
    assert parse("") == []


TWO = {"big": Transform("resize 32x32, crop 28x28", (28, 28)), "center": Transform("crop 16x20", (16, 20))}


def card(**changes: object) -> Card:
    return make_card("pets", **{"image": (28, 28, 3), "transforms": TWO, **changes})


def test_the_card_says_which_pixels_it_means() -> None:
    assert with_pixels(card()) == card()
    assert with_pixels(card(), "big", 28) == replace(card(), transform="big")
    center = with_pixels(card(), "center")
    assert (center.name, center.image, center.pixels) == ("pets[center]", (16, 20, 3), TWO["center"])
    small = with_pixels(card(), size=14)
    assert (small.name, small.image, small.pixels.steps) == ("pets[14px]", (14, 14, 3), "resize 16x16, crop 14x14")
    both = with_pixels(card(), "center", 8)
    assert (both.name, both.image) == ("pets[center,8px]", (8, 10, 3))
    assert both.transforms["big"] == TWO["big"]


def test_a_card_with_a_transform_of_its_own_is_not_renamed_for_it() -> None:
    own = card(transform="center", image=(16, 20, 3))
    assert with_pixels(own, size=8).name == "pets[8px]"
    assert with_pixels(own, size=8).image == (8, 10, 3)
    assert with_pixels(own, "big").name == "pets[big]"


@pytest.mark.parametrize(
    ("changes", "transform", "size", "says"),
    [
        ({"transforms": {}}, "", 64, "pets has no data.transform and no data.size: its pixels are not read from"),
        ({"transforms": {}}, "center", 0, "pets has no data.transform"),
        ({}, "centre", 0, "pets has no transform 'centre': give data.transform one of big, center"),
        ({}, "", 7, "data.size must be from 8 to 1024 pixels, got 7"),
        ({}, "", -8, "data.size must be from 8 to 1024 pixels, got -8"),
        ({}, "", 1025, "data.size must be from 8 to 1024 pixels, got 1025"),
    ],
)
def test_pixels_that_a_card_does_not_have(changes: dict[str, object], transform: str, size: int, says: str) -> None:
    with pytest.raises(UserError) as error:
        with_pixels(card(**changes), transform, size)
    assert str(error.value).startswith(says)
