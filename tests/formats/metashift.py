"""Drawn cats and dogs of MetaShift, indoors and outdoors."""

from pathlib import Path

from PIL import Image

FOLDERS = ("train/cat/cat(indoor)", "train/dog/dog(outdoor)", "test/cat/cat(outdoor)", "test/dog/dog(indoor)")


def write_metashift(root: Path, pictures: int = 10) -> Path:
    """Write the four folders below `root/MetaShift-Cat-Dog-indoor-outdoor`; returns that folder.

    Every picture has its own number as its name, as in Visual Genome.
    """
    folder = root / "MetaShift-Cat-Dog-indoor-outdoor"
    for number, name in enumerate(FOLDERS):
        (folder / name).mkdir(parents=True)
        for i in reversed(range(pictures)):
            picture = Image.new("RGB", (50, 30), (60 * number, 2 * i, 90))
            picture.save(folder / name / f"{2000 + pictures * number + i}.jpg")
    return folder
