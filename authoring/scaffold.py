"""`worstgroup new-method` and `new-dataset`: files to start from, which work as they are."""

import keyword
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..benchmark.errors import UserError, require
from ..benchmark.home import write_bytes
from ..benchmark.registry import DATASETS, METHODS

PACKAGE = Path(__file__).resolve().parents[1]
NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")

INSIDE = """\
from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import UserError
from ..benchmark.registry import method
from ..benchmark.search import Search
from ..benchmark.task import Task"""

OUTSIDE = """\
from worstgroup import Batch, Objective, Requires, Search, Task, UserError, method
from worstgroup.benchmark.backbones import Backbone"""

TEMPLATE = '''\
"""{name}: ERM with the loss of every image weighted by a power of its group's size."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

{imports}


@dataclass(frozen=True)
class Config:
    """`power` p: an image in a group of n weighs 1/n^p; 0 is ERM, at 1 all groups weigh the same."""

    power: Annotated[float, Search("U(0,1)")] = 0.5  # its default, and what `worstgroup tune` draws it from

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise UserError(f"{name}.power must be from 0 to 1, got {{self.power}}")


@method(
    "{name}",
    paper="none",
    requires=Requires(fit="train", native="train+val", classes="class"),
    config=Config,
)
class {cls}(Objective[Config]):
    """`mean_i w_i CE_i`, where `w_i` is proportional to `1/n_g^p` for the group g of image i, with mean 1.

    Say here what the algorithm is, in the paper's notation, and every deviation from the paper.
    """

    def setup(self, task: Task, model: Backbone) -> None:
        super().setup(task, model)
        groups = task.groups("train")  # the only door to attributes; it is metered
        weights = 1 / groups.counts()[groups.index] ** self.config.power
        self.weights = torch.from_numpy(weights / weights.mean()).float().to(task.device)

    def loss(self, batch: Batch) -> Tensor:
        losses = F.cross_entropy(self.model(batch.x), batch.y, reduction="none")
        return (self.weights[batch.index] * losses).mean()
'''


DATASET_INSIDE = """\
from ..benchmark.pictures import Pictures
from ..benchmark.registry import dataset
from ..benchmark.spec import Attribute, Card, Recipe, SplitName, Transform
from ..benchmark.store import Split, Splits
from .tables import FileDataset, codes, find_folder, read_table, safe_path"""

DATASET_OUTSIDE = """\
from worstgroup import Attribute, Card, Recipe, Split, Splits, dataset
from worstgroup.benchmark.pictures import Pictures
from worstgroup.benchmark.spec import SplitName, Transform
from worstgroup.datasets.tables import FileDataset, codes, find_folder, read_table, safe_path"""

DATASET_TEMPLATE = '''\
"""{name}: pictures listed in a metadata.csv with the columns filename, split, y and place."""

from pathlib import Path

import numpy as np

{imports}

CARD = Card(
    name="{name}",
    title="Say here what the task is and what the shortcut",
    classes=("landbird", "waterbird"),  # as they are spelt in the column y
    attributes=(Attribute("place", ("land", "water"), aligned=(0, 1)),),  # its column's values; the one of each class
    image=(224, 224, 3),
    transforms={{"standard": Transform("resize 256x256, crop 224x224", (224, 224))}},
    counts={{}},  # once they are known: images per group of each split, such as {{"train": (3498, 184, 56, 1057), ...}}
    adaptable=True,  # files with other counts are taken, as {name}[custom]
    licence="say who may use the pictures",
    share_labels=False,  # whether the licence lets records carry labels
    citation="say whom to cite",
    by_hand="Put metadata.csv and the pictures that it names into one folder, and give --root FOLDER.",
    recipe=Recipe(lr=1e-3, weight_decay=1e-4, batch_size=32, epochs=30, augment="crop+flip"),
    backbone="resnet18",
    weights="imagenet1k_v1",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
SPLITS: dict[SplitName, str] = {{"train": "train", "val": "val", "test": "test"}}
"""A split's name in the column split."""


@dataset("{name}", {{"": CARD}})
class {cls}(FileDataset):
    """One row per picture; pictures are decoded once, when the store is built."""

    def load(self, root: Path | None) -> Splits:
        """Read the table; raises `MissingData` or `CorruptFile`."""
        folder = find_folder("{name}", ["{name}"], root, ["metadata.csv"], self.card.by_hand)
        path = folder / "metadata.csv"
        table = read_table(path, ["filename", "split", "y", "place"])
        lines = table.index
        files = [safe_path(folder, name, f"{{path}}: line {{line}}") for line, name in table["filename"].items()]
        images = Pictures(files, self.card.pixels, where=lambda i: f"line {{lines[i]}} of {{path.name}}")
        y = codes(table, "y", {{name: i for i, name in enumerate(self.card.classes)}}, path)
        place = codes(table, "place", {{name: i for i, name in enumerate(self.card.attributes[0].values)}}, path)
        split = codes(table, "split", {{text: i for i, text in enumerate(SPLITS.values())}}, path)
        rows = [np.flatnonzero(split == i) for i in range(len(SPLITS))]
        return {{name: Split(images, y[r], place[r][:, None], rows=r) for name, r in zip(SPLITS, rows, strict=True)}}
'''


class Written(NamedTuple):
    """A new entry's file, and the commands to type next."""

    path: Path
    commands: tuple[str, ...]


def new_method(name: str, here: Path, package: Path = PACKAGE) -> Written:
    """Write a method's file into `methods/` of the checkout that `here` lies in, else into `here`.

    Raises `UserError` for a name that cannot be one or is taken, and never overwrites a file.
    """
    require(name not in METHODS, f"method name {name!r} is taken; `worstgroup ls methods` lists all")
    path, plugin = _write("method", name, here, package, TEMPLATE, (INSIDE, OUTSIDE))
    run = f"worstgroup run --dataset digits2 --method erm,{name}{plugin}"
    return Written(path, (f"worstgroup check {name}{plugin}", run))


def new_dataset(name: str, here: Path, package: Path = PACKAGE) -> Written:
    """Write a dataset's file into `datasets/` of the checkout that `here` lies in, else into `here`.

    Raises `UserError` for a name that cannot be one or is taken, and never overwrites a file.
    """
    require(name not in DATASETS, f"dataset name {name!r} is taken; `worstgroup ls datasets` lists all")
    path, plugin = _write("dataset", name, here, package, DATASET_TEMPLATE, (DATASET_INSIDE, DATASET_OUTSIDE))
    commands = (f"prepare {name}", f"show {name} --images", f"run --dataset {name} --method erm,dfr")
    return Written(path, tuple(f"worstgroup {command} --root FOLDER{plugin}" for command in commands))


def _write(
    kind: str, name: str, here: Path, package: Path, template: str, imports: tuple[str, str]
) -> tuple[Path, str]:
    """Fill a template in; returns the file's path and the option that names it, which a checkout does not need."""
    module = name.replace("-", "_")
    require(
        NAME.fullmatch(name) is not None and not keyword.iskeyword(module),
        f"{kind} name {name!r}: write up to 40 lowercase letters, digits, - and _, beginning with a letter, "
        "and no word of Python's own",
    )
    checkout = in_checkout(here, package)
    path = (package / f"{kind}s" if checkout else here) / f"{module}.py"
    for there in (path, *((path.with_suffix(""),) if checkout else ())):  # a folder of this name would win
        require(not there.exists(), f"{there} exists already; choose another name, or move it away")
    if not checkout and getattr(find_spec(module), "origin", None):  # a folder here, say of pictures, has none
        raise UserError(f"{kind} name {name!r}: a file {module}.py would hide the Python module {module!r}")
    inside, outside = imports
    cls = class_name(name, kind, template + inside + outside)
    text = template.format(name=name, cls=cls, imports=inside if checkout else outside)
    write_bytes(path, text.encode())
    return path, "" if checkout else f" --plugin {path.name}"


def in_checkout(here: Path, package: Path) -> bool:
    """Whether a folder lies in a checkout of the package that is running."""
    inside = here.resolve().is_relative_to(package.resolve())
    return inside and (package / "pyproject.toml").is_file() and (package / ".git").exists()


def class_name(name: str, kind: str = "method", text: str = TEMPLATE + INSIDE + OUTSIDE) -> str:
    """`sqrt-reweight` becomes `SqrtReweight`; names that the file's text uses already get `Method` behind them."""
    camel = "".join(part.capitalize() for part in re.split("[-_]", name))
    return f"{camel}{kind.capitalize()}" if re.search(rf"\b{camel}\b", text) else camel
