"""What every registered method does about a planted shortcut: an improvement over ERM, or the reason why there is none.

Whoever adds a method adds a line to `EXPECTED`: its section of the specification says what it must do here. ERM gets
the method's budget, so that a difference is the method's and not that of a better selected epoch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from worstgroup.benchmark.home import runs_home
from worstgroup.benchmark.planning import Request, plan
from worstgroup.benchmark.record import RunRecord, record_path
from worstgroup.benchmark.registry import DATASETS, METHODS, SOURCES, load_plugin
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.spec import PSEUDO, MethodName
from worstgroup.leaderboard import aggregate
from worstgroup.leaderboard.table import Row

PLANTED = Path(__file__).parents[1] / "fixtures" / "planted.py"
SEEDS = (0, 1, 2)
IMPROVES = "improves"
SUBCLASSES = {"george.reduction": "none", "george.clusterer": "kmeans", "george.clusters": "2"}
"""GEORGE's reduction and clusterer for CelebA, and as many clusters as the square has colours. Hardness alone cannot
tell a misleading square from misleading stripes: with the defaults what DFR gains stays within its interval."""


@dataclass(frozen=True)
class Expectation:
    """`outcome` is `IMPROVES` or a sentence on why no improvement is asserted; the rest is how the method is run.

    `settings` are the method's own: the recipe is the dataset's, as it is ERM's. `dataset` is one on which the method's
    own assumption holds.
    """

    outcome: str
    budget: str = ""
    dataset: str = "planted"
    settings: dict[str, str] = field(default_factory=dict)


# Keys are methods as typed on the command line; an empty budget is the method's native one.
EXPECTED: dict[str, Expectation] = {
    "afr": Expectation(
        "Stripes are so noisy that ERM is unsure of images of all groups; at a rate that suits this head the worst "
        "group gains on two of three seeds only."
    ),
    "barack": Expectation(IMPROVES),
    "bpa": Expectation(IMPROVES),
    "bsoftmax": Expectation("Its classes are equally large, where it is ERM, bit for bit."),
    "cbllr": Expectation("Its classes are equally large, in validation too: there is nothing to balance."),
    "cbloss": Expectation(IMPROVES),
    # Its ramp takes 10,000 steps where nothing else is said, and a training here has 315.
    "cdan": Expectation(IMPROVES, settings={"ramp_steps": "0"}),
    "cdann": Expectation(IMPROVES),
    "clusterfix": Expectation(IMPROVES),
    "cnc": Expectation(IMPROVES),
    # The largest weight of its search range, and that of WILDS: squares of features below 1 weigh little.
    "coral": Expectation(IMPROVES, settings={"weight": "10"}),
    # a rate for whole networks moves a new head too little in five epochs
    "crt": Expectation(IMPROVES, settings={"lr": "0.015"}),
    "cvardro": Expectation(
        "Stripes are so noisy that the largest losses are those of images of all groups that nothing can classify."
    ),
    "dann": Expectation(
        "Its environments differ in how many images of each class they hold, so features that hide the environment "
        "hide the class too; it is known to fail then."
    ),
    "debian": Expectation(IMPROVES),
    "dfr": Expectation(IMPROVES),
    "dfr+clusters": Expectation(IMPROVES),
    "dfr+errors": Expectation(IMPROVES),
    # Heatmaps tell where a model looks: at the same square, red or blue, they look alike.
    "dfr+exmap": Expectation(IMPROVES, dataset="planted:place"),
    "dfr+george": Expectation(IMPROVES, settings=SUBCLASSES),
    # The images that its heads dispute most agree with the shortcut, as most of validation does: their labels choose
    # the head that follows it, attributes the other one.
    "divdis": Expectation(IMPROVES, budget="select"),
    "erm": Expectation("It is the reference."),
    # No more than ReSample, which is lambda2 = 0, does; with `sampler=random` it is worse than ERM.
    "ex2l": Expectation(IMPROVES),
    "ex2l@masked": Expectation(
        "Without attributes of all images its sampler balances classes only, and what it gains here is the group "
        "sampler's: it is worse than ERM, and the more so for the similarity.",
        budget="val-20",
    ),
    "focal": Expectation("It turns to uncertain images, which are those with noisy stripes in all groups."),
    "dfr+class": Expectation("Its classes are equally large, in validation too: there is nothing to balance."),
    "groupdro": Expectation(IMPROVES),
    "groupdro+eiil": Expectation(IMPROVES),
    "groupdro+errors": Expectation(IMPROVES),
    # At `none` it is below ERM: the worst class does not tell when the weights have gone to what nothing can classify.
    "groupdro+george": Expectation(IMPROVES, budget="select", settings=SUBCLASSES),
    "groupdro+oracle": Expectation(IMPROVES),
    "groupdro@pseudo": Expectation(IMPROVES, budget="val-20"),
    # Between attributes the share of each class differs, so no classifier is invariant; between groups it is the
    # environment-balanced batches that help, and the penalty, soon at full weight, must leave them their effect.
    "irm": Expectation(IMPROVES, settings={"env": "group", "anneal_steps": "100"}),
    # lambda = n_majority / n_minority, which makes JTT a group weighting once its errors are the small groups
    "jtt": Expectation(IMPROVES, settings={"upweight": "9"}),
    "ldam": Expectation("Its classes are equally large, so their margins are the same: nothing tells groups apart."),
    "lff": Expectation(IMPROVES),
    "lle": Expectation(IMPROVES),
    "lisa": Expectation(IMPROVES),
    # It takes what ERM attends to for the core: the square would be kept, a tint of the rest is swapped.
    "mac": Expectation(IMPROVES, dataset="planted:tint"),
    "masktune": Expectation(
        "It blackens a tenth of the square, or half of it with `multiplier=1`, and then an eighth of the stripes' side "
        "too: what is left of the square has the same colour."
    ),
    "mixup": Expectation("Mixtures agree with the shortcut as often as images do: it predicts both labels alike."),
    # Hiding the square's colour hides some of the class too, and still the worst group gains.
    "mmd": Expectation(IMPROVES),
    # Its means are those of batches of 512 in the paper. Here a batch holds one or two images of a side, at whose noise
    # the default weight pulls too hard.
    "pgi": Expectation(IMPROVES, settings={"weight": "10"}),
    "resample": Expectation(IMPROVES),
    "reweight": Expectation(IMPROVES),
    "rwy": Expectation("Its classes are equally large, where it is ERM, bit for bit."),
    # 500 images are nearly the whole half. Of the 100 where ERM and its early self disagree most a third are of the
    # small groups under a tint, a fifth with a square (of all, a tenth). A head of 64 features takes a larger rate.
    "self": Expectation(IMPROVES, dataset="planted:tint", settings={"points": "100", "lr": "0.1"}),
    "subg": Expectation(IMPROVES),
    "suby": Expectation("Its classes are equally large, where it is ERM, bit for bit."),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for this file: every method finds the same trainings of ERM."""
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(autouse=True)
def planted(home: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset `planted` is registered, and the shared home is in use."""
    monkeypatch.setenv("WORSTGROUP_HOME", str(shared))
    if "planted" not in DATASETS:
        load_plugin(PLANTED)


def run(dataset: str, method: str, budget: str, settings: dict[str, str]) -> dict[Path, RunRecord]:
    """Records of a method over the seeds, by their path."""
    planned = plan([Request(dataset, method, budget, seeds=SEEDS, settings=settings)])
    found = {}
    for item in planned.runs:
        assert item.spec is not None, item.reason
        record = run_spec(item.spec, planned.stores[dataset])
        assert record.status == "finished", record.error
        found[record_path(runs_home(), item.spec)] = record
    return found


def rows(method: str) -> dict[str, Row]:
    """The table of a method and of ERM at the same budget, by label."""
    expected = EXPECTED[method]
    found = run(expected.dataset, method, expected.budget, expected.settings)
    budget = next(iter(found.values())).budget
    (table,) = aggregate.build(aggregate.collect([*found, *run(expected.dataset, "erm", budget, {})]))
    return {row.method: row for row in table.rows}


def expect(method: str) -> Expectation:
    """A method's entry; fails with what to do for a method that has none."""
    if method not in EXPECTED:
        pytest.fail(
            f"{method} has no entry in EXPECTED in {Path(__file__).name}: "
            "enter IMPROVES, or the sentence of its specification that says why it need not improve on ERM here"
        )
    return EXPECTED[method]


def cases() -> Iterator[Any]:
    """Every method, registered or entered; where nothing but a reason is expected the runs show little: by hand."""
    for method in dict.fromkeys([*METHODS, *EXPECTED]):
        absent = method in EXPECTED and EXPECTED[method].outcome != IMPROVES
        yield pytest.param(method, marks=[pytest.mark.slow] if absent else [])


@pytest.mark.parametrize("method", list(cases()))
def test_does_what_is_expected_of_it(method: str) -> None:
    expected = expect(method)
    row = rows(method)[method]
    estimates = {name: estimate.mean for name, estimate in row.metrics.items() if estimate is not None}
    assert row.seeds == SEEDS
    assert {"wga", "acc_adj"} <= set(estimates)
    assert all(math.isfinite(value) for value in estimates.values())
    if expected.outcome == IMPROVES:
        difference = row.versus_erm["wga"]
        assert difference.low > 0, f"{difference.mean:.3f} [{difference.low:.3f}, {difference.high:.3f}]"
    else:
        assert expected.outcome.endswith("."), "say in a sentence why no improvement is asserted"


def test_plain_training_falls_for_the_shortcut_without_losing_the_class() -> None:
    """Neither floor nor ceiling: otherwise no method could show anything."""
    erm = rows("erm")["erm"].metrics
    assert erm["wga"] is not None
    assert erm["acc_adj"] is not None
    assert 0.2 < erm["wga"].mean < 0.55
    assert erm["acc_adj"].mean > 0.85


def test_every_source_of_groups_has_an_expectation() -> None:
    names = [MethodName.parse(method) for method in EXPECTED]
    entered = {PSEUDO if name.policy == "pseudo" else name.source for name in names}
    assert set(SOURCES) <= entered, "enter HOST+SOURCE in EXPECTED"


def test_every_expectation_names_registered_entries() -> None:
    names = [MethodName.parse(method) for method in EXPECTED]
    assert {name.host for name in names} <= set(METHODS)
    assert {name.source for name in names} <= {"", *SOURCES}
