"""Every suite of the package plans on the official formats, and every row of a reproduction takes a step."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from formats.celeba import PACKAGINGS, draw_faces, draw_pictures
from formats.idx import write_mnist
from formats.spawrious import write_spawrious
from formats.urbancars import BALANCED, BIASED, EVAL, TRAIN, write_urbancars
from formats.waterbirds import write_release
from worstgroup.benchmark.home import data_home
from worstgroup.benchmark.planning import Request, plan
from worstgroup.benchmark.registry import DATASETS, METHODS
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.search import ranges
from worstgroup.benchmark.spec import MethodName
from worstgroup.benchmark.suite import read_suite, suite_names

REPRODUCTIONS = [name for name in suite_names() if name.startswith("repro/")]
TABLE_6 = {
    *("irm.weight", "irm.anneal_steps", "mmd.weight", "coral.weight", "groupdro.step_size", "recipe.lr"),
    *("ex2l.lambda1", "ex2l.lambda2", "ex2l.confounder_lr", "ex2l.confounder_weight_decay", "recipe.weight_decay"),
    *("dann.weight", "dann.disc_lr", "dann.disc_weight_decay", "dann.disc_steps", "dann.grad_penalty"),
    *("cdann.weight", "cdann.disc_lr", "cdann.disc_weight_decay", "cdann.disc_steps", "cdann.grad_penalty"),
}
"""What eX2L searches."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for this file, with drawn stand-ins of the official files."""
    return tmp_path_factory.mktemp("suites")


@pytest.fixture(autouse=True)
def official(home: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST, Waterbirds, CelebA, UrbanCars and Spawrious lie where a user would put them."""
    monkeypatch.setenv("WORSTGROUP_HOME", str(shared))
    cards = DATASETS["cmnist"].cards
    for variant, card in list(cards.items()):
        fewer = {"train": 40} if "train" in card.params else {}
        # So few digits are not the official ones.
        monkeypatch.setitem(cards, variant, replace(card, adaptable=True, params=card.params | fewer))
    if data_home().exists():
        return
    write_mnist(data_home() / "mnist", 60, 30)
    write_release(data_home() / "waterbirds", masks="segmentations")
    validations = {f"{tree}/val": EVAL for tree in (BIASED, BALANCED)}
    write_urbancars(data_home(), {f"{BIASED}/train": TRAIN, f"{BALANCED}/test": EVAL} | validations)
    write_spawrious(data_home() / "spawrious", 8)
    faces = draw_faces()
    PACKAGINGS["official"](data_home() / "celeba", faces, draw_pictures(shared / "pictures", faces.names))


@pytest.fixture
def small_digits(official: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits that eX2L enlarges keep their size."""
    cards = DATASETS["cmnist"].cards
    card = replace(cards["ex2l"], image=(28, 28, 3), params=cards["ex2l"].params | {"enlarged": 1})
    monkeypatch.setitem(cards, "ex2l", card)


def small(request: Request) -> Request:
    """The same row, with a network and pictures that take a step within a blink."""
    settings = request.settings | {"recipe.epochs": "2" if request.method == "pgi" else "1"}
    if not request.dataset.startswith("cmnist"):
        settings["data.size"] = "48"
    if settings.get("ex2l.similarity") not in (None, "mae"):
        settings["ex2l.similarity"] = "jsd"  # all eleven take a step in the unit tests
    return replace(request, backbone="tiny_cnn", weights="none", seeds=request.seeds[:1], tuning=0, settings=settings)


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_plans(name: str) -> None:
    suite = read_suite(name)
    requests = list(suite.requests())
    made = plan(requests)
    runs = [planned.spec for planned in [*made.runs, *made.searched()]]
    assert all(runs), [planned.reason for planned in made.runs if planned.spec is None]
    assert len(made.sweeps) == (len(requests) if suite.tuning else 0)
    assert {run.protocol for run in runs if run} == {suite.protocol}
    assert all(len(sweep.candidates) == suite.tuning for sweep in made.sweeps)
    assert len({run.hash for run in runs if run}) == len(requests) * (suite.tuning or len(suite.seeds))


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_reproduction_searches_what_the_paper_did(name: str) -> None:
    for request in read_suite(name).requests():
        if not request.tuning:
            continue
        own = {f"{request.method}.{key}": search.text for key, search in ranges(METHODS[request.method].config).items()}
        searched = {key for key, text in (own | request.ranges).items() if re.search("[U,]", text)}
        assert searched <= TABLE_6


@pytest.mark.parametrize(
    "name", [name for name in suite_names() if not re.match("mini|annotation-budgets|repro/ex2l-cost", name)]
)
def test_ex2l_stands_beside_its_controls(name: str) -> None:
    """On every dataset and network the sampler alone, and maps that cannot change anything."""
    requests = list(read_suite(name).requests())
    rows = {(r.dataset, r.backbone, r.method, r.settings.get("ex2l.gradient")) for r in requests}
    for place in {(r.dataset, r.backbone) for r in requests if r.method == "ex2l"}:
        assert {(*place, "erm", None), (*place, "resample", None), (*place, "ex2l", "static")} <= rows


def test_the_suite_of_all_methods_has_all_of_them() -> None:
    named = {MethodName.parse(request.method).host for request in read_suite("mini-all").requests()}
    assert named == {name for name in METHODS if METHODS[name].cls.__module__.startswith("worstgroup.")}


@pytest.mark.usefixtures("small_digits")
@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_every_row_of_a_reproduction_takes_a_step(name: str) -> None:
    rows = {str(row): row for row in map(small, read_suite(name).requests())}  # backbones fall together
    for planned in (made := plan(rows.values())).runs:
        assert planned.spec is not None
        record = run_spec(planned.spec, made.stores[planned.spec.block.dataset])
        assert record.status == "finished", f"{planned.label}: {record.error}"


def test_a_reproduction_takes_a_step_with_its_own_network_and_pictures() -> None:
    request = next(
        r for r in read_suite("repro/ex2l-main").requests() if (r.dataset, r.method) == ("waterbirds", "ex2l")
    )
    settings = request.settings | {"recipe.epochs": "1", "data.size": "96"}
    made = plan([replace(request, weights="none", seeds=(42,), tuning=0, settings=settings)])
    (planned,) = made.runs
    assert planned.spec is not None
    record = run_spec(planned.spec, made.stores[planned.spec.block.dataset])
    assert record.status == "finished", record.error
    assert record.cost is not None
    assert (record.backbone, record.cost.stages["train"].n_updates) == ("resnet50", 1)
