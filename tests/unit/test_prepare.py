"""Missing files: what a run fetches unasked, what `prepare` fetches on request, and what it says of the rest."""

from pathlib import Path

import pytest
from formats.idx import write_mnist
from formats.waterbirds import write_release
from worstgroup.benchmark import prepare as module
from worstgroup.benchmark import store
from worstgroup.benchmark.errors import CorruptFile, MissingData, UserError
from worstgroup.benchmark.planning import find_card, make_dataset
from worstgroup.benchmark.pools import IMAGES, Report, pool_path
from worstgroup.benchmark.prepare import asked_for, find_store, prepare
from worstgroup.benchmark.registry import DATASETS
from worstgroup.benchmark.spec import Card
from worstgroup.benchmark.store import open_store
from worstgroup.datasets import idx

CARDS = [card for name in DATASETS for card in DATASETS[name].cards.values()]


@pytest.fixture(autouse=True)
def nothing_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the data folder that may lie beside this checkout."""
    monkeypatch.setattr(idx, "search", lambda relative, root, *, what: [root or store.data_home() / relative])


def fetches(monkeypatch: pytest.MonkeyPatch, place: Path | None = None) -> list[str]:
    """Replace fetching: it notes the cards, and puts ten digits into `place` or fails."""
    seen: list[str] = []

    def fetch(card: Card, report: Report) -> list[Path]:
        seen.append(card.name)
        if place is None:
            raise MissingData("train-images could not be fetched (https://mirror: no route). Put it into FOLDER.")
        write_mnist(place, 10, 10)
        return [place]

    monkeypatch.setattr(store, "fetch_dataset", fetch)
    monkeypatch.setattr(module, "fetch_dataset", fetch)
    return seen


def test_a_run_fetches_small_free_files_unasked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fetches(monkeypatch, home / "data/mnist/MNIST/raw")
    with pytest.raises(
        CorruptFile, match="cmnist:bin99: the val split"
    ):  # ten digits are found, and are not the official ones
        open_store(*make_dataset("cmnist:bin99"))
    assert seen == ["cmnist:bin99"]


def test_a_failed_fetch_says_why_and_where_files_go(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches(monkeypatch)
    with pytest.raises(MissingData) as error:
        open_store(*make_dataset("cmnist:bin99"))
    message = str(error.value)
    assert "no route" in message
    assert all(name in message for name in idx.MNIST.names)
    assert f"into {home / 'data/mnist'}" in message


def test_nothing_is_fetched_where_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fetches(monkeypatch)
    with pytest.raises(MissingData, match="MNIST is not on disk"):
        open_store(*make_dataset("cmnist:bin99"), tmp_path)
    assert seen == []


def test_large_files_are_fetched_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fetches(monkeypatch)
    with pytest.raises(MissingData, match=r"prepare waterbirds --download` fetches it\. Licence: "):
        prepare("waterbirds")
    assert seen == []
    with pytest.raises(MissingData, match="no route"):
        prepare("waterbirds", download=True)
    assert seen == ["waterbirds"]


def test_what_no_program_may_fetch_is_explained() -> None:
    for download in (False, True):
        with pytest.raises(MissingData, match="non-commercial") as error:
            prepare("celeba", download=download)
        assert str(error.value).count("non-commercial") == 1


def test_a_root_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=f"lies in {tmp_path}") as error:
        prepare("folder", tmp_path)
    assert "--root DIR is missing" not in str(error.value)
    assert str(error.value).count("Layout 1") == 1


def test_what_is_missing_is_said_of_the_folder_that_was_named(tmp_path: Path) -> None:
    with pytest.raises(
        MissingData, match=r"^folder: neither metadata.csv nor a folder train lies in .*/gone\. The pict"
    ):
        prepare("folder", tmp_path / "gone")
    with pytest.raises(MissingData, match=r"gone is not a folder\. `worstgroup prepare waterbirds --download` fetches"):
        prepare("waterbirds", tmp_path / "gone", settings={"size": "16"})


@pytest.mark.parametrize("name", ["folder", "embeddings", "urbancars", "spuco:birds", "celeba"])
def test_what_to_do_by_hand_is_said_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingData) as error:
        prepare(name, tmp_path)
    assert str(error.value).count(find_card(name)[1].by_hand) == 1


def test_a_folder_and_a_download_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give one of them"):
        prepare("waterbirds", tmp_path, download=True)


def test_every_byte_is_checked(tmp_path: Path) -> None:
    write_release(tmp_path / "release")
    made = prepare("waterbirds", tmp_path / "release", settings={"size": "16"})
    file = pool_path(made.pools["train"]) / IMAGES
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptFile, match="were altered; delete the folder, it is rebuilt"):
        prepare("waterbirds", tmp_path / "release", settings={"size": "16"})


@pytest.mark.parametrize("card", [card for card in CARDS if card.sources], ids=lambda card: card.name)
def test_sources_are_safe_and_land_where_they_are_looked_for(card: Card) -> None:
    for source in card.sources:
        assert source.into or not source.urls, "what is fetched into `downloads` is not found"
        assert ".." not in source.into
        assert all(url.startswith("https://") for url in source.urls)
    assert card.by_hand or all(source.urls for source in card.sources)
    assert not (card.fetch_unasked and card.by_hand)
    assert not card.fetch_unasked or all(source.md5 and 0 < source.size < 2**25 for source in card.sources)


# ---------------------------------------------------------------------------------------------- by the name in a record


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("digits2", ("digits2", {})),
        ("cmnist:bin99", ("cmnist:bin99", {})),
        ("waterbirds:place[112px,custom]", ("waterbirds:place", {"size": "112"})),
        ("celeba:Blond_Hair/Male[square,64px]", ("celeba:Blond_Hair/Male", {"transform": "square", "size": "64"})),
    ],
)
def test_what_was_asked_for(name: str, asked: tuple[str, dict[str, str]]) -> None:
    assert asked_for(name) == asked


def test_a_built_in_store_is_found_and_built(home: Path) -> None:
    found = find_store("tiny")
    assert found is not None
    assert found.fingerprint == prepare("tiny").fingerprint
    assert (home / "data" / "store").is_dir()


def test_a_store_is_found_where_it_was_prepared(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fetches(monkeypatch)
    assert find_store("cmnist:bin99") is None
    assert find_store("waterbirds[48px,custom]") is None
    write_release(home / "data" / "waterbirds")
    assert find_store("waterbirds[48px,custom]") is None  # nothing is decoded for a look
    made = prepare("waterbirds", settings={"size": "48"})
    found = find_store("waterbirds[48px,custom]")
    assert found is not None
    assert (found.fingerprint, found.card.name) == (made.fingerprint, "waterbirds[48px,custom]")
    assert find_store("waterbirds[48px]") is None  # these are not the official files
    assert seen == []
