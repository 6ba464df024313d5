"""`worstgroup prepare`: find a dataset's files, or fetch them where their licence allows; build and check its store."""

import re
from pathlib import Path

from .download import fetch_dataset
from .errors import CorruptFile, MissingData, UserError
from .planning import make_dataset
from .pools import Report, check_pool, pool_path
from .store import Store, check_labels, open_store, prepared


def prepare(
    name: str,
    root: Path | None = None,
    *,
    download: bool = False,
    strict: bool = False,
    settings: dict[str, str] | None = None,
    report: Report = lambda what, done, total: None,
) -> Store:
    """The store of a dataset, built if need be; of one that was there every byte is checked.

    Raises `MissingData` with what to put where, `CorruptFile` for broken or foreign files, `DiskError`.
    """
    if download and root is not None:
        raise UserError(
            "--download fetches into $WORSTGROUP_HOME/data, --root names a folder that is there: give one of them"
        )
    before = {path.name for path in pool_path("").glob("*")}
    try:
        dataset, card = make_dataset(name, root, settings)
        store = open_store(dataset, card, root, strict=strict, report=report)
    except MissingData:
        if not download:
            raise
        dataset, card = make_dataset(name, None, settings)
        fetch_dataset(card, report)
        store = open_store(dataset, card, strict=strict, report=report)
    pools = before.intersection(store.pools.values())  # those made just now need no second look
    for problem in (check_labels(store), *map(check_pool, pools)):
        if problem:
            raise CorruptFile(problem)
    return store


def asked_for(name: str) -> tuple[str, dict[str, str]]:
    """What was asked for to get a dataset of this name: `waterbirds:place[112px,custom]` is `waterbirds:place` with the
    setting `size=112`, on files of one's own.
    """
    base, _, options = name.partition("[")
    settings: dict[str, str] = {}
    for option in filter(None, options.rstrip("]").split(",")):
        if option != "custom":
            size = re.fullmatch(r"(\d+)px", option)
            settings |= {"size": size[1]} if size else {"transform": option}
    return base, settings


def find_store(name: str) -> Store | None:
    """The store of a dataset of this name as records tell it, if it can be had without fetching or decoding files: that
    of a built-in dataset, built if need be, or the one prepared last. Raises `UserError`.
    """
    base, settings = asked_for(name)
    try:
        dataset, card = make_dataset(base, None, settings)
        built_in = not (card.sources or card.by_hand)
        store = open_store(dataset, card) if built_in else prepared(card)
    except MissingData:
        return None
    return store if store and store.card.name == name else None
