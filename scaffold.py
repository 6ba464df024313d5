"""`worstgroup new-method`: a new method's file, which passes `worstgroup check` as it is."""

import keyword
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .benchmark.errors import UserError, require
from .benchmark.home import write_bytes
from .benchmark.registry import METHODS

PACKAGE = Path(__file__).resolve().parent
NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")

INSIDE = """\
from ..benchmark.backbones import Backbone
from ..benchmark.budget import Requires
from ..benchmark.data import Batch
from ..benchmark.engine import Objective
from ..benchmark.errors import UserError
from ..benchmark.registry import method
from ..benchmark.task import Task"""

OUTSIDE = """\
from worstgroup import Batch, Objective, Requires, Task, UserError, method
from worstgroup.benchmark.backbones import Backbone"""

TEMPLATE = '''\
"""{name}: ERM with the loss of every image weighted by a power of its group's size."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

{imports}


@dataclass(frozen=True)
class Config:
    """`power` p: an image in a group of n weighs 1/n^p; 0 is ERM, at 1 all groups weigh the same."""

    power: float = 0.5

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


class Written(NamedTuple):
    """A new method's file, and the commands to type next."""

    path: Path
    commands: tuple[str, str]


def new_method(name: str, here: Path, package: Path = PACKAGE) -> Written:
    """Write a method's file into `methods/` of the checkout that `here` lies in, else into `here`.

    Raises `UserError` for a name that cannot be one or is taken, and never overwrites a file.
    """
    module = name.replace("-", "_")
    require(
        NAME.fullmatch(name) is not None and not keyword.iskeyword(module),
        f"method name {name!r}: write up to 40 lowercase letters, digits, - and _, beginning with a letter, "
        "and no word of Python's own",
    )
    require(name not in METHODS, f"method name {name!r} is taken; `worstgroup ls methods` lists all")
    checkout = in_checkout(here, package)
    path = (package / "methods" if checkout else here) / f"{module}.py"
    for there in (path, *((path.with_suffix(""),) if checkout else ())):  # a folder `methods/NAME` would win
        require(not there.exists(), f"{there} exists already; choose another name, or move it away")
    if not checkout and find_spec(module) is not None:
        raise UserError(f"method name {name!r}: a file {module}.py would hide the Python module {module!r}")
    imports = INSIDE if checkout else OUTSIDE
    text = TEMPLATE.format(name=name, cls=class_name(name), imports=imports)
    write_bytes(path, text.encode())
    plugin = "" if checkout else f" --plugin {path.name}"
    run = f"worstgroup run --dataset digits2 --method erm,{name}{plugin}"
    return Written(path, (f"worstgroup check {name}{plugin}", run))


def in_checkout(here: Path, package: Path) -> bool:
    """Whether a folder lies in a checkout of the package that is running."""
    inside = here.resolve().is_relative_to(package.resolve())
    return inside and (package / "pyproject.toml").is_file() and (package / ".git").exists()


def class_name(name: str) -> str:
    """`sqrt-reweight` becomes `SqrtReweight`; names that the file uses already get `Method` behind them."""
    camel = "".join(part.capitalize() for part in re.split("[-_]", name))
    return f"{camel}Method" if re.search(rf"\b{camel}\b", INSIDE + OUTSIDE + TEMPLATE) else camel
