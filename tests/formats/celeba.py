"""Drawn stand-ins for CelebA: 60 small faces of noise, their attributes written in every packaging in use."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from worstgroup.datasets.celeba import ATTRIBUTES

BLOND, MALE = ATTRIBUTES.index("Blond_Hair"), ATTRIBUTES.index("Male")
SIZES = (36, 12, 12)


@dataclass(frozen=True)
class Faces:
    """File names (n), attributes (n, 40) as 0 and 1, and splits (n,) as 0, 1, 2."""

    names: list[str]
    bits: NDArray[np.int64]
    split: NDArray[np.int64]

    def taken(self, rows: Iterable[int]) -> "Faces":
        """Some of the rows, in this order."""
        index = list(rows)
        return replace(self, names=[self.names[i] for i in index], bits=self.bits[index], split=self.split[index])


def draw_faces(seed: int = 0) -> Faces:
    """Sixty faces in a contiguous partition 36/12/12; every split has all four groups of blond hair and gender."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (sum(SIZES), 40))
    order = np.concatenate([rng.permutation(n) for n in SIZES])
    bits[:, BLOND] = (order % 6 == 5) | (order % 6 == 4)
    bits[:, MALE] = order % 2
    names = [f"{i + 1:06d}.jpg" for i in range(len(bits))]
    return Faces(names, bits, np.repeat([0, 1, 2], SIZES))


def draw_pictures(folder: Path, names: list[str], kind: str = ".jpg") -> Path:
    """Write one picture of 178x218 pixels per name, coarse noise of its own; returns the folder."""
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        noise = np.random.default_rng(i).integers(0, 256, (11, 9, 3), np.uint8)
        Image.fromarray(noise).resize((178, 218)).save(folder / (name.removesuffix(".jpg") + kind))
    return folder


def link_pictures(source: Path, folder: Path) -> None:
    """Give a folder the pictures of another."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        os.link(path, folder / path.name)


def _write(path: Path, lines: Iterable[str], end: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())


def _signed(row: NDArray[np.int64]) -> list[str]:
    return [str(2 * bit - 1) for bit in row]


def write_attributes(path: Path, faces: Faces) -> None:
    """The official text: a count, names with a blank behind, values padded to two places, CRLF."""
    rows = (
        f"{name} {' '.join(f'{v:>2}' for v in _signed(row))}" for name, row in zip(faces.names, faces.bits, strict=True)
    )
    _write(path, [str(len(faces.names)), " ".join(ATTRIBUTES) + " ", *rows], "\r\n")


def write_partition(path: Path, faces: Faces) -> None:
    """The official text, without a header."""
    _write(path, (f"{name} {split}" for name, split in zip(faces.names, faces.split, strict=True)), "\n")


def write_csv_lists(folder: Path, faces: Faces, separator: str = ",") -> None:
    """Both lists as on Kaggle, or as in the copies that are separated by blanks."""
    rows = ([name, *_signed(row)] for name, row in zip(faces.names, faces.bits, strict=True))
    _write(folder / "list_attr_celeba.csv", map(separator.join, [["image_id", *ATTRIBUTES], *rows]), "\r\n")
    pairs = ([name, str(split)] for name, split in zip(faces.names, faces.split, strict=True))
    _write(folder / "list_eval_partition.csv", map(separator.join, [["image_id", "partition"], *pairs]), "\r\n")


def write_jtt(path: Path, faces: Faces) -> None:
    """One table with every attribute, an index column without a name before it."""
    rows = (
        [str(i), *_signed(row), name, str(split)]
        for i, (name, row, split) in enumerate(zip(faces.names, faces.bits, faces.split, strict=True))
    )
    _write(path, map(",".join, [["", *ATTRIBUTES, "image_id", "split"], *rows]), "\n")


def write_pair(path: Path, faces: Faces, columns: str = "img_filename,y,split,place", folder: str = "") -> None:
    """A table of blond hair and gender with its own column names, `folder` before the names of the pictures."""
    values = {"filename": [folder + name for name in faces.names], "split": faces.split}
    values |= {"img_filename": values["filename"], "id": range(len(faces.names)), "y": faces.bits[:, BLOND]}
    values |= {"place": faces.bits[:, MALE], "a": faces.bits[:, MALE]}
    rows = zip(*(values[name] for name in columns.split(",")), strict=True)
    _write(path, [columns, *(",".join(map(str, row)) for row in rows)], "\n")


def _official(root: Path, faces: Faces, pictures: Path) -> None:
    write_attributes(root / "list_attr_celeba.txt", faces)
    write_partition(root / "list_eval_partition.txt", faces)
    link_pictures(pictures, root / "img_align_celeba")


def _torchvision(root: Path, faces: Faces, pictures: Path) -> None:
    _official(root / "celeba", faces, pictures)


def _release(root: Path, faces: Faces, pictures: Path) -> None:
    write_attributes(root / "CelebA/Anno/list_attr_celeba.txt", faces)
    write_partition(root / "CelebA/Eval/list_eval_partition.txt", faces)
    link_pictures(pictures, root / "CelebA/Img/img_align_celeba")


def _kaggle(root: Path, faces: Faces, pictures: Path) -> None:
    write_csv_lists(root, faces)
    link_pictures(pictures, root / "img_align_celeba/img_align_celeba")


def _blanks(root: Path, faces: Faces, pictures: Path) -> None:
    write_csv_lists(root, faces, " ")
    link_pictures(pictures, root / "img_align_celeba")


def _group_dro(root: Path, faces: Faces, pictures: Path) -> None:
    write_csv_lists(root / "data", faces)
    link_pictures(pictures, root / "data/img_align_celeba")


def _wilds(root: Path, faces: Faces, pictures: Path) -> None:
    write_csv_lists(root / "celebA_v1.0", faces)
    _write(root / "celebA_v1.0/RELEASE_v1.0.txt", [], "")
    link_pictures(pictures, root / "celebA_v1.0/img_align_celeba")


def _jtt(root: Path, faces: Faces, pictures: Path) -> None:
    write_jtt(root / "celebA/data/metadata.csv", faces)
    link_pictures(pictures, root / "celebA/data/img_align_celeba")


def _dfr(root: Path, faces: Faces, pictures: Path) -> None:
    write_pair(root / "metadata.csv", faces)
    link_pictures(pictures, root)


def _dfr_prefix(root: Path, faces: Faces, pictures: Path) -> None:
    write_pair(root / "celeba_metadata.csv", faces, folder="faces/jpg/")
    link_pictures(pictures, root / "faces/jpg")


def _subpop(root: Path, faces: Faces, pictures: Path) -> None:
    write_pair(root / "celeba/metadata_celeba.csv", faces, "id,filename,split,y,a")
    link_pictures(pictures, root / "celeba/img_align_celeba")


Writer = Callable[[Path, Faces, Path], None]
PACKAGINGS: dict[str, Writer] = {
    "official": _official,
    "release": _release,
    "torchvision": _torchvision,
    "kaggle": _kaggle,
    "blank-separated csv": _blanks,
    "group_dro": _group_dro,
    "wilds": _wilds,
    "jtt": _jtt,
    "dfr": _dfr,
    "dfr with a prefix": _dfr_prefix,
    "subpop": _subpop,
}
"""Writers of the lists and pictures below a root."""
