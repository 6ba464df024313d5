"""How methods run at budgets: natively, under a policy, or not at all (spec: metrics and protocol, section 11)."""

import pytest
from worstgroup.benchmark.budget import RUNGS, Budget, Policy, Requires
from worstgroup.benchmark.planning import native_budget
from worstgroup.benchmark.registry import METHODS, SOURCES
from worstgroup.benchmark.spec import MethodName

COLUMNS = ("none", "select", "val-5", "val-20", "val", "train-10", "train+val")
FREE = "- - carried carried carried carried carried"
"""Needs no attribute: at home up to `select`."""
TRAINS = "pseudo pseudo pseudo pseudo -"
"""Fits on attributes of train, from `val-5` on."""
TABLE: dict[str, str] = {
    "erm": FREE,
    "jtt": FREE,
    "lff": FREE,
    "lle": FREE,
    "mac": FREE,
    **dict.fromkeys(
        ("bpa", "bsoftmax", "clusterfix", "cnc", "cvardro", "divdis", "focal", "ldam", "masktune", "mixup"), FREE
    ),
    "barack": "n/a n/a - - - - carried",
    **dict.fromkeys(("afr", "cbllr", "debian", "pgi", "rwy", "self", "suby"), FREE),
    "dfr": "class class - - - carried carried",
    "groupdro": f"class class {TRAINS}",
    "resample": f"class class {TRAINS}",
    "reweight": f"class class {TRAINS}",
    "cbloss": f"class class {TRAINS}",
    "subg": f"class class {TRAINS}",
    "crt": f"class class {TRAINS}",
    "ex2l": f"n/a n/a {TRAINS}",
    "lisa": f"n/a n/a {TRAINS}",
    "irm": f"n/a n/a {TRAINS}",
    **dict.fromkeys(("dann", "cdann", "cdan", "mmd", "coral"), f"erm erm {TRAINS}"),
}
CASES = [(name, rung, tag) for name, row in TABLE.items() for rung, tag in zip(COLUMNS, row.split(), strict=True)]
NOT_RERUN = "≡ erm: one environment, nothing to match; not rerun"
BLIND = Requires(native="none")
ORACLE = Requires(fit="host", native="train+val")
SUPERVISED = Requires(fit="val", native="val-5")


def resolve(method: str, rung: str, policy: str = "", source: Requires | None = None, extra: bool = False) -> Policy:
    return METHODS[method].requires.resolve(Budget(rung), policy, source, extra)


@pytest.mark.parametrize(("method", "rung", "tag"), CASES)
def test_table_of_methods_and_rungs(method: str, rung: str, tag: str) -> None:
    policy = resolve(method, rung)
    assert policy.tag == tag.replace("-", "") or policy.tag == tag
    assert policy.reason == {"n/a": "needs val-5 or richer", "erm": NOT_RERUN}.get(tag, "")


@pytest.mark.parametrize("method", TABLE)
@pytest.mark.parametrize("share", [1, 5, 20])
def test_a_share_of_a_rung_is_like_the_rung(method: str, share: int) -> None:
    assert resolve(method, f"select-{share}") == resolve(method, "select")
    assert resolve(method, f"val-{share}") == resolve(method, "val-20")


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_native_at_its_native_rung(name: str) -> None:
    assert resolve(name, METHODS[name].requires.native) == Policy("")


@pytest.mark.parametrize("rung", ["none", "select"])
@pytest.mark.parametrize("fit", ["val", "train"])
def test_without_a_fallback_a_method_that_needs_more_does_not_run(fit: str, rung: str) -> None:
    requires = Requires(fit=fit, native="train+val")  # type: ignore[arg-type]
    assert requires.resolve(Budget(rung)) == Policy("n/a", "needs val-5 or richer")


# ----------------------------------------------------------------------------------------------- policies asked for


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("method", ["dfr", "groupdro", "resample", "reweight"])
def test_class_can_be_asked_for_at_every_rung(method: str, rung: str) -> None:
    assert resolve(method, rung, "class") == Policy("class")


@pytest.mark.parametrize("method", ["erm", "jtt", "lff", "mac", "ex2l"])
def test_class_does_not_apply_where_classes_are_no_groups(method: str) -> None:
    lacks = "cannot take classes for groups" if method == "ex2l" else "uses no groups"
    assert resolve(method, "none", "class") == Policy("n/a", f"it {lacks}, so @class does not apply to it")


def test_dann_with_classes_is_erm() -> None:
    assert resolve("dann", "val", "class") == Policy("erm", NOT_RERUN)


SOME = ("val-1", "val-5", "val-20", "val", "train-1", "train-10", "train-33")


@pytest.mark.parametrize("policy", ["pseudo", "subset"])
@pytest.mark.parametrize("method", ["groupdro", "resample", "reweight", "ex2l", "dann"])
def test_a_policy_for_some_attributes_needs_some_and_not_all(method: str, policy: str) -> None:
    assert all(resolve(method, rung, policy) == Policy(policy) for rung in SOME)
    assert all(
        resolve(method, rung, policy) == Policy("n/a", "needs val-5 or richer")
        for rung in ("none", "select-5", "select")
    )
    assert resolve(method, "train+val", policy).reason == f"all attributes are granted, so @{policy} does not apply"


@pytest.mark.parametrize("method", ["ex2l", "dann"])
def test_masked_is_for_methods_that_can_leave_attributes_out(method: str) -> None:
    assert resolve(method, "val-20", "masked") == Policy("masked")
    assert resolve(method, "none", "masked").reason == "needs val-5 or richer"
    assert resolve(method, "train+val", "masked").tag == "n/a"
    assert "@masked does not apply" in resolve("groupdro", "val-20", "masked").reason


@pytest.mark.parametrize("policy", ["pseudo", "subset", "masked"])
@pytest.mark.parametrize("method", ["erm", "jtt", "dfr"])
def test_such_a_policy_is_not_for_methods_that_need_no_train_attributes(method: str, policy: str) -> None:
    assert resolve(method, "val", policy) == Policy("n/a", f"@{policy} is for methods that fit on attributes of train")


# --------------------------------------------------------------------------------------------------- group sources


@pytest.mark.parametrize("method", ["groupdro", "resample", "reweight", "ex2l", "dann", "dfr"])
@pytest.mark.parametrize(
    ("source", "row"),
    [(BLIND, "- - carried carried carried carried carried"), (SUPERVISED, "n/a n/a - - - carried carried")],
)
def test_a_composed_method_is_at_home_where_its_source_is(method: str, source: Requires, row: str) -> None:
    for rung, tag in zip(COLUMNS, row.split(), strict=True):
        reason = "its source needs val-5 or richer" if tag == "n/a" else ""
        assert resolve(method, rung, source=source) == Policy("" if tag == "-" else tag, reason), rung


@pytest.mark.parametrize("method", ["erm", "jtt", "lff", "mac"])
def test_a_source_selects_for_a_method_without_groups(method: str) -> None:
    assert resolve(method, "none", source=BLIND) == Policy("")
    assert resolve(method, "val", source=BLIND) == Policy("carried")
    reason = "it selects by true groups where the budget grants them; no source is needed"
    assert resolve(method, "train+val", source=ORACLE) == Policy("n/a", reason)


@pytest.mark.parametrize(("method", "poorest"), [("dfr", "val"), ("groupdro", "train+val")])
def test_the_oracle_needs_the_true_groups_of_all_images(method: str, poorest: str) -> None:
    for rung, granted in RUNGS.items():
        policy = resolve(method, rung, source=ORACLE)
        if RUNGS[poorest].train <= granted.train and granted.val_fit and granted.val == 1:
            assert policy.tag in ("", "carried")
        else:
            assert policy == Policy("n/a", f"true groups of all images need {poorest}")
    assert native_budget(MethodName(method, "oracle")) == poorest


@pytest.mark.parametrize("policy", ["class", "pseudo", "subset", "masked"])
def test_source_and_policy_exclude_each_other(policy: str) -> None:
    assert resolve("ex2l", "val", policy, BLIND).reason == f"a source says what groups are, so @{policy} does not apply"


def test_the_predictor_needs_the_first_rung_to_fit_on() -> None:
    assert SOURCES["predictor"].requires == SUPERVISED


# ------------------------------------------------------------------------------------------ extra validation images


@pytest.mark.parametrize("method", [name for name in TABLE if name not in ("barack", "cbllr", "dfr", "divdis", "self")])
def test_extra_images_change_no_tag(method: str) -> None:
    for rung in ("val-5", "val-20", "val", "train-10", "train+val"):
        assert resolve(method, rung, extra=True) == resolve(method, rung), rung
    for rung in ("none", "select-20", "select"):
        assert resolve(method, rung, extra=True) == Policy("n/a", "extra val needs val-5 or richer"), rung


@pytest.mark.parametrize(
    ("method", "policy"),
    [("dfr", ""), ("barack", ""), ("divdis", ""), ("groupdro", "subset"), ("dann", "masked")],
)
def test_what_trains_on_validation_anyway_takes_no_extra(method: str, policy: str) -> None:
    assert "extra val does not apply" in resolve(method, "val-20", policy, extra=True).reason


def test_extra_goes_with_classes_and_sources() -> None:
    assert resolve("groupdro", "val-5", "class", extra=True) == Policy("class")
    assert resolve("groupdro", "val-5", source=BLIND, extra=True) == Policy("carried")
    assert resolve("groupdro", "val-5", "pseudo", extra=True) == Policy("pseudo")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("erm(+val)", MethodName("erm", extra="val")),
        ("groupdro+exmap(+val)", MethodName("groupdro", "exmap", extra="val")),
        ("ex2l@masked", MethodName("ex2l", policy="masked")),
        ("groupdro+predictor", MethodName("groupdro", policy="pseudo")),
        ("groupdro@pseudo", MethodName("groupdro", policy="pseudo")),
        ("groupdro+predictor@class", MethodName("groupdro", "predictor", "class")),
    ],
)
def test_names_as_typed(text: str, name: MethodName) -> None:
    assert MethodName.parse(text) == name
