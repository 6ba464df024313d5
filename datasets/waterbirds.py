"""Waterbirds: birds whose background, land or water, is a shortcut to what they are.

A variant is a card and a function that makes its splits; both are entered at the end of the file.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark.pictures import Draw
from ..benchmark.registry import dataset
from ..benchmark.spec import Attribute, Card, Recipe, Source, SplitName, Transform
from ..benchmark.store import Split, Splits
from .environments import draw_disjoint
from .tables import FileDataset
from .waterbirds_builder import ADVICE, PARAMS, PARTS, build
from .waterbirds_release import (
    ARCHIVE,
    GREY,
    INTO,
    THRESHOLD,
    cut_out_birds,
    drawn_birds,
    on_black,
    on_grey,
    on_nothing,
    read_release,
)

COUNTS: dict[SplitName, tuple[int, ...]] = {
    "train": (3_498, 184, 56, 1_057),
    "val": (467, 466, 133, 133),
    "test": (2_255, 2_255, 642, 642),
}
ENVIRONMENTS = [[262, 78, 35, 49], [157, 106, 21, 67]]
"""Pictures of the two environments by group: together every one of the minority groups' 184 and 56, each once."""

_RELEASE = Source(
    f"{ARCHIVE}.tar.gz",
    urls=(
        f"https://nlp.stanford.edu/data/dro/{ARCHIVE}.tar.gz",
        f"https://downloads.cs.stanford.edu/nlp/data/dro/{ARCHIVE}.tar.gz",
    ),
    into=INTO,
)
_MASKS = Source(
    "segmentations.tgz",
    md5="4d47ba1228eae64f2fa547c47bc65255",
    urls=("https://data.caltech.edu/records/w9d68-gec53/files/segmentations.tgz",),
    size=39_272_883,
    into=INTO,
)
_CUB = Source(
    "CUB_200_2011.tgz",
    md5="97eceeb196236b17998738112f37df78",
    urls=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
    size=1_150_585_339,
    into=PARTS,
)
_PLACES = Source("train_large_places365standard.tar", md5="67e186b496a84c929568076ed01a8aa1")

WATERBIRDS = Card(
    name="waterbirds",
    title="Waterbirds: landbirds and waterbirds on land and water, 95 % aligned in train",
    classes=("landbird", "waterbird"),
    attributes=(Attribute("place", ("land", "water"), aligned=(0, 1), train_ratio=0.95),),
    image=(224, 224, 3),
    counts=COUNTS,
    licence=(
        "None of its own; WILDS: non-commercial research and education. Parts: CUB-200-2011 (Caltech; pictures belong "
        "to their photographers) and Places365"
    ),
    citation=(
        "Sagawa, Koh, Hashimoto, Liang: Distributionally Robust Neural Networks for Group Shifts, ICLR 2020. Wah et "
        "al.: The Caltech-UCSD Birds-200-2011 Dataset, 2011. Zhou et al.: Places, TPAMI 2018"
    ),
    recipe=Recipe(weight_decay=1e-3, batch_size=32, epochs=100, augment="crop+flip"),
    backbone="resnet50",
    weights="imagenet1k_v1",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    sources=(_RELEASE,),
    adaptable=True,
    transforms={"group_dro": Transform("resize 256x256, crop 224x224", (224, 224))},
    notes=(
        "Eastern Towhee, Western Meadowlark and Western Wood-Pewee are labelled waterbird ('tern' is in their names): "
        "the official labels, kept as released.",
        "Validation and test are balanced within each class, not across classes; the average accuracy of group_DRO, "
        "WILDS, DFR and ExMap weights groups by the train counts (here acc_adj).",
        "The recipe is DFR's: SGD at 1e-3, weight decay 1e-3, batch 32, 100 epochs, crops of 70-100 % and flips.",
        "The random crop of training is drawn from the stored evaluation picture, not from the photograph.",
        "WILDS' transform is the same arithmetic as group_DRO's; its copy gives the same pixels and labels.",
        "Sets made anew with the public script have other counts (it is not seeded): they are waterbirds[custom].",
    ),
)


def _variant(name: str, title: str, note: str = "", **changes: Any) -> Card:
    facts: dict[str, Any] = {"name": f"waterbirds:{name}", "title": title, "notes": (note, *WATERBIRDS.notes)}
    return replace(WATERBIRDS, **(facts | changes))


_PLACE = _variant(
    "place",
    "Waterbirds reversed: the place is the class, the bird the shortcut (ClusterFix)",
    "ClusterFix trains a ResNet-18; its text counts 4,791 train pictures where the release has 4,795. Its unbiased "
    "accuracy is acc_group.",
    classes=("land", "water"),
    attributes=(Attribute("bird", ("landbird", "waterbird"), aligned=(0, 1), train_ratio=0.95),),
    counts={split: (n[0], n[2], n[1], n[3]) for split, n in COUNTS.items()},
    params={"target": "place"},
)
_FG_BLACK = _variant(
    "fg-black",
    "Waterbirds, foreground only: test birds cut out on black (ExMap)",
    "Train and validation are the usual ones; test pictures are multiplied by (mask > 200), CUB's masks. Black is not "
    "the grey of DFR's birds: the two are different tests. ExMap's drop is acc_adj on waterbirds minus acc_adj here.",
    sources=(_RELEASE, _MASKS),
    params={"background": 0, "threshold": THRESHOLD},
)
_FG_GREY = _variant(
    "fg-grey",
    "Waterbirds, foreground only: test birds on grey 150 (after DFR)",
    "Train and validation are the usual ones. Test pictures come from DFR's birds/ where that tree is there, else the "
    "bird is cut out with CUB's mask > 200. DFR's own trees are another random split than the release.",
    sources=(_RELEASE, _MASKS),
    params={"background": GREY, "threshold": THRESHOLD},
)
_MASK = _variant(
    "mask",
    "Waterbirds, where the birds are: test pictures are white where the bird is and black elsewhere",
    "Train and validation are the usual ones; test pictures are CUB's masks > 200, for reports on what a model looks "
    "at (`worstgroup explain RUN --attribution`). It is no test set.",
    sources=(_RELEASE, _MASKS),
    params={"silhouette": True, "threshold": THRESHOLD},
)
_BIASED = _variant(
    "biased-val",
    "Waterbirds with validation biased like train",
    "Of each class validation keeps the pictures on its usual place and, drawn with a seed, as many on the other as "
    "in train; train and test are the usual ones. Where validation is balanced within each class, balancing classes "
    "does what balancing groups does; here sources of groups can matter.",
    counts=COUNTS | {"val": (467, 25, 7, 133)},
    params={"seed": 0, "val": "biased"},
)
_NO_MINORITY = _variant(
    "no-minority",
    "Waterbirds, trained without landbirds on water and waterbirds on land",
    "Train has the two aligned groups only (4,555 pictures); validation and test are the usual ones.",
    attributes=(replace(WATERBIRDS.attributes[0], train_ratio=1.0),),
    counts=COUNTS | {"train": (3_498, 0, 0, 1_057)},
    params={"dropped_groups": [1, 2]},
)
_EX2L = _variant(
    "ex2l",
    "Waterbirds with two training environments, land-centric and balanced (eX2L)",
    "The paper gives shares, not sizes: these are the disjoint environments nearest to them that use every minority "
    "picture once, drawn with a seed; train holds their 775 pictures only. In other folders both environments are "
    "scaled by what the scarcest group allows, with at least one picture of each group. The paper's group-sampled "
    "methods seem to have run on the whole train split (by the fractions it prints): use waterbirds for them.",
    attributes=(replace(WATERBIRDS.attributes[0], train_ratio=round(535 / 775, 3)),),
    counts=COUNTS | {"train": (419, 184, 56, 116)},
    environments=("land-centric", "balanced"),
    params={"environments": ENVIRONMENTS, "seed": 0},
)
_BUILT = _variant(
    "built",
    "Waterbirds built anew from CUB-200-2011 and Places365, with a seed",
    notes=(
        "Not the official pictures: the draws are others, and those went through one more JPEG compression (quality "
        "75). Here birds are composed when they are decoded; a place is scaled to just cover its photograph.",
        *WATERBIRDS.notes[:4],
    ),
    counts={},
    sizes={"train": 4_795, "val": 1_199, "test": 5_794},
    interventions=("place",),
    sources=(_CUB, replace(_MASKS, into=PARTS), _PLACES),
    by_hand=ADVICE,
    params=PARAMS,
)


# ---------------------------------------------------------------------------------------------------------- variants


def official(card: Card, root: Path | None) -> Splits:
    """The splits of the release."""
    return read_release(card.name, root).splits(card.pixels)


def by_place(card: Card, root: Path | None) -> Splits:
    """y is the place and a the bird."""
    splits = official(card, root)
    return {name: replace(split, y=split.a[:, 0], a=split.y[:, None]) for name, split in splits.items()}


def foreground_black(card: Card, root: Path | None) -> Splits:
    """Test birds on black; train and validation share the usual pool."""
    return _cut_out(card, root, on_black)


def foreground_grey(card: Card, root: Path | None) -> Splits:
    """Test birds on grey, DFR's own where they are there; train and validation share the usual pool."""
    return _cut_out(card, root, on_grey, own=True)


def silhouettes(card: Card, root: Path | None) -> Splits:
    """Where the birds of the test pictures are; train and validation share the usual pool."""
    return _cut_out(card, root, on_nothing)


def _cut_out(card: Card, root: Path | None, draw: Draw, own: bool = False) -> Splits:
    """The release with test birds drawn from pictures and masks; with `own` DFR's, where they are there."""
    release = read_release(card.name, root)
    splits = release.splits(card.pixels)
    rows = splits["test"].image_rows()
    drawn = drawn_birds(release, rows, card.pixels) if own else None
    images = drawn or cut_out_birds(release, rows, draw, card.pixels)
    return splits | {"test": replace(splits["test"], images=images, rows=None)}


def biased_validation(card: Card, root: Path | None) -> Splits:
    """Validation with the shares of train within each class."""
    splits = official(card, root)
    train, val = splits["train"], splits["val"]
    return splits | {"val": val.take(draw_biased(_group(train), _group(val), card.params["seed"]))}


def draw_biased(train: NDArray[np.int64], val: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Examples of validation, ascending: all of each class's larger train group, of its other one the share of train.

    `train` and `val` are groups (n,), two of each class; at least one example of every group is kept.
    """
    shares, random = np.bincount(train, minlength=4), np.random.RandomState(seed)
    kept = []
    for pair in ([0, 1], [2, 3]):
        major, minor = sorted(pair, key=lambda g: -shares[g])
        usual, other = np.flatnonzero(val == major), np.flatnonzero(val == minor)
        wanted = max(1, round(len(usual) * shares[minor] / shares[major]))
        kept += [usual, random.permutation(other)[:wanted]]
    return np.sort(np.concatenate(kept))


def without_minority(card: Card, root: Path | None) -> Splits:
    """Train without the groups of the card's parameters."""
    splits = official(card, root)
    train = splits["train"]
    return splits | {"train": train.take(np.flatnonzero(~np.isin(_group(train), card.params["dropped_groups"])))}


def two_environments(card: Card, root: Path | None) -> Splits:
    """Train as the environments of the card's parameters."""
    splits = official(card, root)
    train = splits["train"]
    names = card.group_names()
    chosen, env = draw_environments(_group(train), names, card.params["environments"], card.params["seed"])
    return splits | {"train": replace(train.take(chosen), env=env)}


def draw_environments(
    group: NDArray[np.int64], names: list[str], wanted: list[list[int]], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chosen examples (m,), ascending, and the environment (m,) of each; no example is in two.

    `wanted[e][g]` pictures of group g make environment e; all are scaled by what the scarcest group allows, which for
    the official files is 1. Raises `UserError` when a group has fewer pictures than there are environments.
    """
    targets = np.array(wanted)
    total, found = targets.sum(0), np.bincount(group, minlength=len(names))
    scarcest = int(np.argmin(found / total))
    counts = np.maximum(1, targets * found[scarcest] // total[scarcest])
    return draw_disjoint(group, counts, names, "waterbirds:ex2l", seed)


def built(card: Card, root: Path | None) -> Splits:
    """The construction from parts."""
    return build(card.name, card.params, card.pixels, root)


def _group(split: Split) -> NDArray[np.int64]:
    return 2 * split.y + split.a[:, 0]


_VARIANTS: dict[str, tuple[Card, Callable[[Card, Path | None], Splits]]] = {
    "": (WATERBIRDS, official),
    "place": (_PLACE, by_place),
    "fg-black": (_FG_BLACK, foreground_black),
    "fg-grey": (_FG_GREY, foreground_grey),
    "mask": (_MASK, silhouettes),
    "biased-val": (_BIASED, biased_validation),
    "no-minority": (_NO_MINORITY, without_minority),
    "ex2l": (_EX2L, two_environments),
    "built": (_BUILT, built),
}


@dataset("waterbirds", {variant: card for variant, (card, _) in _VARIANTS.items()})
class Waterbirds(FileDataset):
    """Birds of CUB-200-2011 on places of Places365."""

    def load(self, root: Path | None) -> Splits:
        """Read the table; raises `MissingData`, or `CorruptFile` that names what is wrong."""
        return _VARIANTS[self.card.variant][1](self.card, root)
