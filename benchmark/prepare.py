"""`worstgroup prepare`: find a dataset's files, or fetch them where their licence allows; build and check its store."""

from pathlib import Path

from .download import fetch_dataset
from .errors import CorruptFile, MissingData, UserError
from .planning import make_dataset
from .pools import Report, check_pool, pool_path
from .spec import Card
from .store import Store, open_store


def prepare(
    name: str,
    root: Path | None = None,
    *,
    download: bool = False,
    strict: bool = False,
    settings: dict[str, str] | None = None,
    report: Report = lambda what, done, total: None,
) -> Store:
    """The store of a dataset, built if need be; of one that was there every byte of the pixels is checked.

    Raises `MissingData` with what to put where, `CorruptFile` for broken or foreign files, `DiskError`.
    """
    if download and root is not None:
        raise UserError("--download fetches into the data home, --root names a folder that is there: give one of them")
    before = {path.name for path in pool_path("").glob("*")}
    try:
        dataset, card = make_dataset(name, root, settings)
        store = open_store(dataset, card, root, strict=strict, report=report)
    except MissingData as missing:
        dataset, card = make_dataset(name, None, settings)
        if not download:
            raise MissingData(f"{missing} {_hint(card)}".rstrip()) from missing
        fetch_dataset(card, report)
        store = open_store(dataset, card, strict=strict, report=report)
    for key in before.intersection(store.pools.values()):  # those made just now need no second look
        problem = check_pool(key)
        if problem:
            raise CorruptFile(problem)
    return store


def _hint(card: Card) -> str:
    """What to do about missing files, beyond what the reader said."""
    if card.by_hand:
        return card.by_hand
    fetchable = card.sources and all(source.urls for source in card.sources)
    return f"`worstgroup prepare {card.name} --download` fetches it. Licence: {card.licence}." if fetchable else ""
