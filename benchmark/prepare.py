"""`worstgroup prepare`: find a dataset's files, or fetch them where their licence allows; build and check its store."""

from pathlib import Path

from .download import fetch_dataset
from .errors import CorruptFile, MissingData, UserError
from .planning import find_card, make_dataset
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
        if not download:
            raise MissingData(_advised(str(missing), find_card(name)[1])) from missing
        fetch_dataset(find_card(name)[1], report)
        dataset, card = make_dataset(name, None, settings)
        store = open_store(dataset, card, strict=strict, report=report)
    for key in before.intersection(store.pools.values()):  # those made just now need no second look
        problem = check_pool(key)
        if problem:
            raise CorruptFile(problem)
    return store


def _advised(message: str, card: Card) -> str:
    """What a reader said of missing files, and what to do about them where it did not say that, too."""
    if card.by_hand:
        return message if card.by_hand in message else f"{message} {card.by_hand}"
    fetchable = card.sources and all(source.urls for source in card.sources)
    hint = f" `worstgroup prepare {card.name} --download` fetches it. Licence: {card.licence}." if fetchable else ""
    return message + hint
