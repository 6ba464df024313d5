"""MetaShift, cats and dogs indoors and outdoors, as SubpopBench pools and splits them.

Sources: Liang and Zou, ICLR 2022; Yang, Zhang, Katabi, Ghassemi, ICML 2023, and its code (YyzHarry/SubpopBench).
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..benchmark.pictures import Pictures
from ..benchmark.registry import dataset
from ..benchmark.spec import SPLITS, Attribute, Card, Recipe, Source, Transform
from ..benchmark.store import Split, Splits
from .tables import FileDataset, find_folder, list_folders

FOLDERS: dict[str, tuple[int, int]] = {
    "train/cat/cat(indoor)": (1, 1),
    "train/dog/dog(outdoor)": (0, 0),
    "test/cat/cat(outdoor)": (1, 0),
    "test/dog/dog(indoor)": (0, 1),
}
"""Every folder with the class and the place of its pictures, in the order in which they are pooled."""

_ARCHIVE = "https://www.dropbox.com/s/a7k65rlj4ownyr2/metashift.tar.gz?dl=1"
_NAMES = ("metashift/MetaShift-Cat-Dog-indoor-outdoor", "MetaShift-Cat-Dog-indoor-outdoor", "metashift")
_ADVICE = f"Unpack metashift.tar.gz ({_ARCHIVE}) into $WORSTGROUP_HOME/data/metashift, or give --root DIR."

CARD = Card(
    name="metashift",
    title="MetaShift, cats and dogs indoors and outdoors (SubpopBench)",
    classes=("dog", "cat"),
    attributes=(Attribute("place", ("outdoor", "indoor"), aligned=(0, 1)),),
    image=(224, 224, 3),
    counts={},
    sizes={"train": 2276, "val": 349, "test": 874},
    licence="CC BY 4.0 (pictures of Visual Genome)",
    citation=(
        "Liang, Zou: MetaShift: A Dataset of Datasets for Evaluating Contextual Distribution Shifts and Training "
        "Conflicts, ICLR 2022. Yang, Zhang, Katabi, Ghassemi: Change is Hard: A Closer Look at Subpopulation Shift, "
        "ICML 2023 (the split). Krishna et al.: Visual Genome, IJCV 2017 (the pictures)"
    ),
    recipe=Recipe(lr=1e-3, weight_decay=1e-4, batch_size=108, epochs=237),
    backbone="resnet50",
    weights="imagenet1k_v1",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    sources=(Source("metashift.tar.gz", urls=(_ARCHIVE,), into="metashift"),),
    notes=(
        "The folders train and test are pooled and split anew, in the proportions of SubpopBench: all splits have the "
        "same correlation.",
        "The split is drawn over a listing sorted by name. The original draws over the order in which the file system "
        "lists the files, so its split differs by machine, and so do its group counts.",
        "Pictures are known by their file names, the picture's number in Visual Genome: one that lies in several "
        "folders may be in several splits and with several labels, as in the original; intervals resample it as one.",
        "The recipe is SubpopBench's default, 5,001 steps of 108 images.",
    ),
    params={"val": 0.1, "test": 0.25, "seed": 42},
    adaptable=True,
    transforms={"subpopbench": Transform("resize 256, crop 224x224", (224, 224))},
)


@dataset("metashift", {"": CARD})
class MetaShift(FileDataset):
    """`MetaShift-Cat-Dog-indoor-outdoor/{train,test}/ANIMAL/ANIMAL(PLACE)/*.jpg`, pooled and split anew."""

    def load(self, root: Path | None) -> Splits:
        """List the four folders; raises `MissingData` that names those without pictures."""
        folder = find_folder("MetaShift", _NAMES, root, list(FOLDERS), _ADVICE)
        listed = list_folders("MetaShift", folder, list(FOLDERS), _ADVICE)
        files = [file for found in listed for file in found]
        y, a = np.repeat(list(FOLDERS.values()), [len(found) for found in listed], axis=0).astype(np.int64).T
        _, unit = np.unique([file.name for file in files], return_inverse=True)
        pictures = Pictures(files, self.card.pixels)
        part = draw_parts(len(files), **self.card.params)
        chosen = {name: np.flatnonzero(part == number) for number, name in enumerate(SPLITS)}
        return {
            name: Split(pictures, y[rows], a[rows, None], unit[rows].astype(np.int64), rows)
            for name, rows in chosen.items()
        }


def draw_parts(n: int, val: float, test: float, seed: int) -> NDArray[np.int64]:
    """Split number (n,) of each pooled picture: test is drawn from all, validation from what is left."""
    random = np.random.RandomState(seed)
    part = np.zeros(n, np.int64)
    part[random.choice(n, int(n * test), replace=False)] = 2
    part[random.choice(np.flatnonzero(part == 0), int(n * val), replace=False)] = 1
    return part
