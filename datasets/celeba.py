"""CelebA: 202,599 aligned faces with 40 attributes, any two of which make a target and a shortcut.

`celeba` is `celeba:Blond_Hair/Male`, the pair of the field; `celeba:TARGET/ATTRIBUTE` is any other, and `celeba:ex2l`
has the two training environments of eX2L. A variant is a card, entered at the end of the file.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..benchmark.errors import UnknownName, require
from ..benchmark.metrics import group_index
from ..benchmark.pictures import Pictures
from ..benchmark.registry import dataset
from ..benchmark.spec import SPLITS, Attribute, Card, Recipe, Source, SplitName, Transform
from ..benchmark.store import Split, Splits
from .celeba_files import MARKS, find_pictures, read_labels
from .environments import draw_disjoint
from .tables import FileDataset, find_folder

_LIST = """
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair Blurry
Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male
Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks
Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
Wearing_Necktie Young
"""
ATTRIBUTES = tuple(_LIST.split())
"""In the order of the official list."""
VALUES = {"Blond_Hair": ("dark", "blond"), "Male": ("female", "male"), "Young": ("old", "young")}
"""What 0 and 1 are called where `not NAME` and `NAME` would read badly; "dark" is any hair that is not blond."""
SIZES: dict[SplitName, int] = {"train": 162_770, "val": 19_867, "test": 19_962}
FOLDERS = ("celeba", "celebA", "CelebA", "celebA/data", "celeba/data", "celebA_v1.0", "celebA/celebA_v1.0", "data")
"""Where the official release, torchvision, JTT, WILDS and group_DRO put it."""
BY_HAND = (
    "CelebA is for non-commercial research and no part of it may be passed on, so no program fetches it. From "
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html get list_attr_celeba.txt, list_eval_partition.txt and "
    "img_align_celeba.zip, put them into $WORSTGROUP_HOME/data/celeba and unpack the archive there. The layouts "
    "of torchvision, Kaggle, WILDS, group_DRO, JTT, DFR and SubpopBench are read as they are."
)

_SHARED: dict[str, Any] = {
    "image": (224, 224, 3),
    "licence": "CelebA agreement: non-commercial research only, no redistribution of any portion",
    "recipe": Recipe(lr=1e-3, weight_decay=1e-4, batch_size=128, epochs=50, augment="crop+flip"),
    "backbone": "resnet50",
    "weights": "imagenet1k_v1",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "adaptable": True,
    "share_labels": False,
    "by_hand": BY_HAND,
    "sources": (
        Source("list_attr_celeba.txt", "75e246fa4810816ffd6ee81facbd244c"),
        Source("list_eval_partition.txt", "d32c9cbf5e040fd4025c592c306e6668"),
        Source("img_align_celeba.zip", "00d2c5bc6d35e252742224ab0c1e8fcb"),
    ),
    "transforms": {
        "group_dro": Transform("crop 178x178, resize 224x224", (224, 224)),
        "dfr": Transform("resize 256x256, crop 224x224", (224, 224)),
        "wilds": Transform("crop 178x178", (178, 178)),
        "bpa": Transform("resize 224", (274, 224)),
        "lff": Transform("resize 224x224", (224, 224)),
    },
}
_LIU = "Liu, Luo, Wang, Tang: Deep Learning Face Attributes in the Wild, ICCV 2015 (CelebA)"
_NOTES = (
    "The evaluation transforms of the field (group_dro: group_DRO, JTT; dfr: DFR, ExMap; wilds: WILDS; bpa: BPA, "
    "ClusterFix; lff: LfF) differ by several points of worst-group accuracy. The default is group_DRO's, the recipe is "
    "DFR's.",
    "The random training crop is drawn from the stored evaluation picture, not from the photograph, and has 70-100 % "
    "of its area; BPA and ClusterFix take 8-100 %.",
    "Groups are numbered 2 y + a as in group_DRO; BPA's code numbers them y + 2 a.",
    "Pictures of one person count as independent: not every packaging says who is shown.",
    "Any other pair of the 40 attributes is celeba:TARGET/ATTRIBUTE.",
    "The PNG release shows pixels from before JPEG compression: the same examples, another fingerprint.",
)


def pair(target: str, attribute: str) -> Card:
    """The card of any pair; its group counts, and which value is aligned with which class, are found in the files."""
    return Card(
        name=f"celeba:{target}/{attribute}",
        title=f"CelebA faces: {target} with {attribute} as its shortcut",
        classes=_values(target),
        attributes=(Attribute(attribute, _values(attribute), aligned=()),),
        counts={},
        sizes=SIZES,
        citation=f"{_LIU}. Capitani, Bolelli, Porrello, Calderara, Ficarra: ClusterFix, WACV 2024 (pairs)",
        notes=(*_NOTES, "The smallest group of a pair can have a few dozen test pictures: read its size beside it."),
        params={"target": target, "attribute": attribute},
        **_SHARED,
    )


def _values(name: str) -> tuple[str, str]:
    return VALUES.get(name, (f"not {name}", name))


BLOND = replace(
    pair("Blond_Hair", "Male"),
    title="CelebA faces: blond hair with gender as its shortcut (group_DRO)",
    attributes=(Attribute("Male", _values("Male"), aligned=(1, 0)),),
    counts={
        "train": (71_629, 66_874, 22_880, 1_387),
        "val": (8_535, 8_276, 2_874, 182),
        "test": (9_767, 7_535, 2_480, 180),
    },
    sizes={},
    citation=f"{_LIU}. Sagawa, Koh, Hashimoto, Liang: Distributionally Robust Neural Networks, ICLR 2020 (groups)",
    notes=(*_NOTES, "The test split has 180 blond men: one picture moves their accuracy by 0.56 points."),
)

EX2L = replace(
    BLOND,
    name="celeba:ex2l",
    title="CelebA faces: blond hair with gender as its shortcut, in two training environments (eX2L)",
    counts={**BLOND.counts, "train": (71_629, 65_810, 22_502, 1_387)},
    citation=f"{BLOND.citation}. eXplaining to Learn (eX2L), arXiv 2605.06368 (environments)",
    environments=("balanced", "fewer males"),
    params={
        **BLOND.params,
        "percent": [[41.77, 46.94, 10.20, 1.08], [46.79, 35.19, 17.36, 0.66]],
        "sizes": [76_896, 84_442],
        "seed": 0,
    },
    notes=(
        "The paper gives each environment's group percentages, not its size; the sizes here use as many training "
        "pictures as the percentages allow without showing one twice (161,328 of 162,770). Validation and test are "
        "the official ones.",
        "The paper starts from ImageNet weights V2; the default here is V1, as for the other variants.",
        *BLOND.notes,
    ),
)


def environment_counts(sizes: ArrayLike, percent: ArrayLike, available: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pictures of each group in each environment (E, G), for sizes (E,) and percentages (E, G).

    Where a group of the files has too few, all counts are reduced by the same factor until none is needed twice, but no
    group of an environment is left without any.
    """
    counts: NDArray[np.int64] = np.rint(np.asarray(sizes)[:, None] * np.asarray(percent) / 100).astype(np.int64)
    wanted = counts.sum(0)
    fits = min(1.0, (available[wanted > 0] / wanted[wanted > 0]).min())
    return np.asarray(np.maximum(counts > 0, np.floor(counts * fits)), np.int64)


def draw_environments(split: Split, card: Card) -> Split:
    """The examples of a split that are drawn for the environments, each for one at most, in the split's order.

    Raises `UserError` where a group has fewer pictures than there are environments that show it.
    """
    params = card.params
    group = group_index(split.y, split.a, card.shape)
    available = np.bincount(group, minlength=card.num_groups)
    counts = environment_counts(params["sizes"], params["percent"], available)
    chosen, env = draw_disjoint(group, counts, card.group_names(), card.name, params["seed"])
    return replace(split.take(chosen), env=env)


def make(variant: str) -> Card | None:
    """The card of `TARGET/ATTRIBUTE`, or of the default pair; raises `UnknownName` for an attribute that is none."""
    target, slash, attribute = variant.partition("/")
    if not variant:
        return BLOND
    if not slash:
        return None
    for name in (target, attribute):
        if name not in ATTRIBUTES:
            raise UnknownName("attribute of CelebA", name, ATTRIBUTES)
    require(target != attribute, f"celeba:{variant}: an attribute is no shortcut to itself; name two")
    return pair(target, attribute)


@dataset("celeba", {card.name.partition(":")[2]: card for card in (BLOND, EX2L)}, make)
class CelebA(FileDataset):
    """The official partition of all pictures; every variant shows them in one order and shares their pixels."""

    def load(self, root: Path | None) -> Splits:
        """Read the lists; raises `MissingData` or `CorruptFile`."""
        params = self.card.params
        names = (params["target"], params["attribute"])
        folder = find_folder(self.card.name, FOLDERS, root, MARKS, BY_HAND)
        table = read_labels(folder, names)
        files = find_pictures(folder, table)
        pictures = Pictures(files, self.card.pixels, where=lambda i: f"line {table.lines[i]} of {table.path.name}")
        y, a = (table.columns[name] for name in names)
        splits: Splits = {}
        for code, split in enumerate(SPLITS):
            rows = np.flatnonzero(table.columns["split"] == code)
            splits[split] = Split(pictures, y[rows], a[rows, None], rows=rows)
        if self.card.environments:
            splits["train"] = draw_environments(splits["train"], self.card)
        return splits
