"""How a card scales pixels belongs to what a run is: to keys of artifacts, and to a plugin's data and run hashes."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import plan_tiny, register_tiny
from worstgroup.benchmark.home import artifacts_home, runs_home
from worstgroup.benchmark.lab import erm_identity
from worstgroup.benchmark.planning import Request, find_card, plan
from worstgroup.benchmark.registry import DATASETS, load_plugin, package_card
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import Card, RunSpec, digest
from worstgroup.benchmark.store import Store, prepared

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
UNSCALED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
TWO_CHANNELS = (0.0, 0.0), (1.0, 1.0)
FROZEN = {
    "celeba": IMAGENET,
    "cfmnist": UNSCALED,
    "cfmnist:domainbed": TWO_CHANNELS,
    "cfmnist:ex2l": IMAGENET,
    "cfmnist:irm14": TWO_CHANNELS,
    "cmnist": UNSCALED,
    "cmnist:domainbed": TWO_CHANNELS,
    "cmnist:ex2l": IMAGENET,
    "cmnist:irm14": TWO_CHANNELS,
    "digits2": HALF,
    "embeddings": ((0.0,), (1.0,)),
    "folder": IMAGENET,
    "generated": IMAGENET,
    "metashift": IMAGENET,
    "spawrious": IMAGENET,
    "spuco": IMAGENET,
    "spuco:mnist": UNSCALED,
    "tiny": HALF,
    "urbancars": IMAGENET,
    "waterbirds": IMAGENET,
}
"""Mean and std of the package's own cards; a variant that is not here has those of its dataset."""
MADE = ["celeba:Smiling/Young", "embeddings:mine", "folder:mine", "generated:16", "cmnist:cm10-s1", "cfmnist:cm10-1-s2"]
"""One of each family whose cards are made when they are asked for."""


def own_names() -> list[str]:
    """Names of all cards of the package, however many plugins other tests have registered."""
    own = [DATASETS[name] for name in DATASETS if DATASETS[name].of_package]
    return [f"{entry.name}:{variant}" if variant else entry.name for entry in own for variant in entry.cards] + MADE


@pytest.mark.parametrize("name", own_names())
def test_the_packages_own_cards_scale_pixels_as_ever(name: str) -> None:
    family = name.partition(":")[0]
    assert name in FROZEN or family in FROZEN, f"{name} is new: note its mean and std in FROZEN, they stay for good"
    card = find_card(name)[1]
    assert (card.mean, card.std) == FROZEN.get(name, FROZEN.get(family)), (
        f"{name}: its mean or std changed. That changes results, but no fingerprint and no run's hash: finished runs "
        "would stand for what they are not. Take the old values back, or give the new ones to a new variant."
    )


def test_what_is_frozen_is_there() -> None:
    assert {name.partition(":")[0] for name in FROZEN} == {name.partition(":")[0] for name in own_names()}
    assert {name for name in FROZEN if ":" in name} <= set(own_names())


# ---------------------------------------------------------------------------------------------- the package's own

Edit = Callable[..., None]


@pytest.fixture
def edit_tiny(monkeypatch: pytest.MonkeyPatch) -> Edit:
    """Changes the card of `tiny`, as an author does in a checkout."""

    def edit(**changes: object) -> None:
        entry = DATASETS["tiny"]
        cards: dict[str, Card] = {"": replace(entry.cards[""], **changes)}  # type: ignore[arg-type]
        monkeypatch.setitem(DATASETS._entries, "tiny", replace(entry, cards=cards))

    return edit


def test_an_edited_scale_addresses_another_erm(edit_tiny: Edit) -> None:
    spec = plan_tiny("erm").runs[0].spec
    assert spec is not None
    found = [erm_identity(spec.block)]
    for changes in ({"mean": (0.4, 0.5, 0.5)}, {"std": (0.2, 0.25, 0.25)}, {"title": "of the same"}):
        edit_tiny(mean=HALF[0], std=HALF[1])
        edit_tiny(**changes)
        found.append(erm_identity(spec.block))
    assert len({digest(identity) for identity in found}) == 3
    assert found[0] == found[-1]


def test_what_is_made_under_an_edited_scale_is_not_shared(edit_tiny: Edit) -> None:
    """Features, and what methods cache, are of images as they were scaled."""
    made: list[Counter[str]] = []
    for mean in (HALF[0], (0.1, 0.1, 0.1)):
        edit_tiny(mean=mean)
        planned = plan_tiny("dfr+exmap")
        assert planned.runs[0].spec is not None
        assert run_spec(planned.runs[0].spec, planned.stores["tiny"]).status == "finished"
        made.append(Counter(path.parts[-3] for path in artifacts_home().glob("*/*/meta.json")))
        shutil.rmtree(runs_home())  # the run's hash is the same, which is why the values are frozen
    first, both = made
    assert len(first.keys() - {"erm", "features"}) > 0 < first["erm"]
    assert both == {kind: 2 * n for kind, n in first.items()}


# ---------------------------------------------------------------------------------------------------------- plugins

PLUGIN = '''"""A dataset of one's own."""
from worstgroup import dataset
from worstgroup.datasets.tiny import Tiny, make_card

@dataset("mine", {{"": make_card("mine", {changes})}})
class Mine(Tiny):
    """The pixels of `tiny`."""
'''


@pytest.fixture
def write_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[RunSpec, Store]]:
    """Writes a plugin whose card has these changes; gives its run of ERM and its store."""
    others = {name: DATASETS[name] for name in DATASETS}
    monkeypatch.setattr("sys.dont_write_bytecode", True)  # which an import within a second would take for fresh

    def write(changes: str) -> tuple[RunSpec, Store]:
        path = tmp_path / "mine.py"
        path.write_text(PLUGIN.format(changes=changes))
        monkeypatch.setattr(DATASETS, "_entries", dict(others))
        load_plugin(path)
        made = plan([Request("mine", "erm", seeds=(0,))])
        assert made.runs[0].spec is not None
        return made.runs[0].spec, made.stores["mine"]

    return write


@pytest.mark.parametrize("changes", ["mean=(0.4, 0.5, 0.5)", "std=(0.25, 0.25, 0.2)"])
def test_a_plugin_that_scales_otherwise_is_another_dataset(
    write_mine: Callable[[str], tuple[RunSpec, Store]], changes: str
) -> None:
    (first, before), (second, after), (same, again) = map(write_mine, ("", changes, "title='the same'"))
    assert before.fingerprint == first.block.fingerprint
    assert before.fingerprint != after.fingerprint
    assert first.hash != second.hash
    assert digest(erm_identity(first.block)) != digest(erm_identity(second.block))
    assert after.pools == before.pools  # nothing is decoded again
    assert again.fingerprint == before.fingerprint
    assert same == first
    assert prepared(again.card) == again


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("waterbirds:place[112px,custom]", True),
        ("celeba:Smiling/Young", True),
        ("folder:pets", True),
        ("digits2:mine", False),  # a plugin may call its card so
        ("tinyvariants", False),
        ("nowhere:x", False),
    ],
)
def test_only_the_packages_own_cards_are_trusted(name: str, known: bool) -> None:
    register_tiny()
    assert (package_card(name) is not None) is known


def test_a_plugin_that_scales_otherwise_is_run_again(write_mine: Callable[[str], tuple[RunSpec, Store]]) -> None:
    first, second = (run_spec(*write_mine(changes)) for changes in ("", "mean=(0.1, 0.1, 0.1)"))
    assert (first.status, second.status) == ("finished", "finished")
    assert first.run != second.run
    assert first.history != second.history
    assert len(list((artifacts_home() / "erm").iterdir())) == 2
