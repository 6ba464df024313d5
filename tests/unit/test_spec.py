import dataclasses
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pytest
from stubs import make_card, make_spec
from worstgroup.benchmark.budget import Budget
from worstgroup.benchmark.errors import UnknownName, UserError
from worstgroup.benchmark.spec import (
    PROTOCOL,
    Attribute,
    Block,
    MethodName,
    Recipe,
    RunSpec,
    derive_seed,
    digest,
    override,
)

# ---------------------------------------------------------------------------------------------------------- identity

SPEC = make_spec()

RECIPE_CHANGES: dict[str, Any] = {
    "optimizer": "adam",
    "lr": 2e-3,
    "momentum": 0.8,
    "weight_decay": 0.0,
    "batch_size": 9,
    "epochs": 4,
    "schedule": "cosine",
    "augment": "flip",
    "precision": "bf16",
    "channels_last": True,
    "compile": True,
    "patience": 2,
}
BLOCK_CHANGES: dict[str, Any] = {
    "dataset": "other",
    "fingerprint": "1" * 12,
    "backbone": "resnet18",
    "weights": "imagenet-v1",
    "recipe": Recipe(),
    "seed": 1,
    "backbone_code": "2" * 16,
}
RUN_CHANGES: dict[str, Any] = {
    "block": replace(SPEC.block, seed=2),
    "method": "other",
    "source": "exmap",
    "policy": "class",
    "config": (("eta", 0.1),),
    "budget": Budget("val"),
    "code": "1" * 16,
    "source_config": (("clusters", 3),),
    "extra": "val",
    "protocol": "wg0",
    "criterion": "val-wga-avg",
    "tuned": (("lr", 0.1),),
    "draw": 1,
    "candidates": ("1" * 64,),
}
CHANGED = [
    *(replace(SPEC, **{name: value}) for name, value in RUN_CHANGES.items()),
    *(replace(SPEC, block=replace(SPEC.block, **{name: value})) for name, value in BLOCK_CHANGES.items()),
    *(
        replace(SPEC, block=replace(SPEC.block, recipe=replace(SPEC.block.recipe, **{name: value})))
        for name, value in RECIPE_CHANGES.items()
    ),
    replace(SPEC, budget=Budget("train+val", ("background",))),
    replace(SPEC, budget=Budget("train+val", ("object",))),
    replace(SPEC, config=(("eta", 0.2),)),
]


@pytest.mark.parametrize(
    ("cls", "changes", "outside"),
    [(RunSpec, RUN_CHANGES, set()), (Block, BLOCK_CHANGES, {"weights_file"}), (Recipe, RECIPE_CHANGES, set())],
)
def test_every_field_is_in_the_list_of_changes(cls: type[Any], changes: dict[str, Any], outside: set[str]) -> None:
    assert {field.name for field in fields(cls)} == set(changes) | outside


def test_every_identity_field_changes_the_hash() -> None:
    hashes = [SPEC.hash, *(spec.hash for spec in CHANGED)]
    assert len(set(hashes)) == len(hashes)


def test_equal_specifications_have_one_hash() -> None:
    assert make_spec() is not SPEC
    assert make_spec().hash == SPEC.hash
    assert len(SPEC.hash) == 64


def test_where_a_weights_file_lies_is_no_part_of_the_identity() -> None:
    block = replace(SPEC.block, weights_file="/tmp/weights.safetensors")
    assert block.key == SPEC.block.key
    assert replace(SPEC, block=block).hash == SPEC.hash


def test_the_block_key_does_not_know_the_method() -> None:
    assert {replace(SPEC, **{name: value}).block.key for name, value in RUN_CHANGES.items() if name != "block"} == {
        SPEC.block.key
    }


def test_streams_know_names_and_seed_but_no_label() -> None:
    relabelled = replace(SPEC.block, fingerprint="1" * 12)
    assert relabelled.stream == SPEC.block.stream == ("toy", "tiny_cnn", "none", 0)
    assert relabelled.key != SPEC.block.key


def test_digest_ignores_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": (2, 3), "a": 1})


def test_labels_for_people() -> None:
    assert SPEC.label == "method on toy · train+val · seed 0"
    assert replace(SPEC, source="exmap", policy="class").method_label == "method+exmap@class"
    assert replace(SPEC, policy="carried").method_label == "method"
    assert replace(SPEC, source="predictor", policy="pseudo").method_label == "method@pseudo"
    assert replace(SPEC, policy="masked", extra="val").method_label == "method@masked(+val)"
    assert SPEC.protocol == PROTOCOL


# ------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        (("digits2", "tiny_cnn", "none", 0, "order", 1), 4915726598916688152),
        (("bootstrap", "units", 447), 5280729173677322653),
    ],
)
def test_seeds_are_frozen(parts: tuple[Any, ...], seed: int) -> None:
    assert derive_seed(*parts) == seed


def test_purposes_have_streams_of_their_own() -> None:
    parts = [
        (seed, purpose, epoch) for seed in range(5) for purpose in ("order", "augment", "init") for epoch in (1, 2)
    ]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "order") != derive_seed("1", "order") != derive_seed("1order")


# ------------------------------------------------------------------------------------------------------- typed knobs


@dataclass(frozen=True)
class Knobs:
    flag: bool = True
    steps: int = 3
    rate: float = 0.1
    mode: Literal["ignore", "renorm"] = "ignore"
    grid: tuple[float, ...] = (1.0,)
    name: str = ""


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("flag", "false", False),
        ("flag", "0", False),
        ("flag", "true", True),
        ("steps", "12", 12),
        ("rate", "1e-3", 0.001),
        ("rate", "2", 2.0),
        ("mode", "renorm", "renorm"),
        ("grid", "[0.3, 1]", (0.3, 1.0)),
        ("grid", "0.3,1", (0.3, 1.0)),
        ("grid", "0.3", (0.3,)),
        ("name", "12", "12"),
    ],
)
def test_text_is_read_as_the_type_of_the_field(key: str, text: str, value: Any) -> None:
    changed, problems = override(Knobs(), {key: text}, "knobs")
    assert problems == []
    assert getattr(changed, key) == value
    assert type(getattr(changed, key)) is type(value)
    assert changed == replace(Knobs(), **{key: value})


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("flag", "maybe", "knobs.flag=maybe: input should be a valid boolean"),
        ("steps", "1.5", "knobs.steps=1.5: input should be a valid integer"),
        ("rate", "fast", "knobs.rate=fast: input should be a valid number"),
        ("mode", "drop", "knobs.mode=drop: input should be 'ignore' or 'renorm'"),
        ("grid", '["x"]', 'knobs.grid=["x"]: input should be a valid number, unable to parse string as a number'),
        ("stps", "1", "unknown knobs key 'stps'. Did you mean steps?"),
    ],
)
def test_a_bad_value_says_key_value_and_what_was_expected(key: str, text: str, says: str) -> None:
    changed, problems = override(Knobs(), {key: text}, "knobs")
    assert changed == Knobs()
    assert len(problems) == 1
    assert problems[0].startswith(says)


def test_all_problems_are_reported_together() -> None:
    changes = {"flag": "maybe", "rates": "1", "steps": "4", "mode": "drop"}
    changed, problems = override(Knobs(), changes, "knobs")
    assert changed == Knobs()
    first = [problem.partition(" ")[0] for problem in problems]
    assert first == ["knobs.flag=maybe:", "unknown", "knobs.mode=drop:"]


def test_a_value_that_the_dataclass_refuses_is_a_problem_too() -> None:
    changed, problems = override(Recipe(), {"epochs": "0"}, "recipe")
    assert changed == Recipe()
    assert problems == ["recipe.epochs must be at least 1, got 0"]


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": 1}, {"lr": 0.0}, {"lr": -1.0}, {"lr": float("nan")}, {"lr": float("inf")}]
)
def test_recipes_that_cannot_train_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="recipe"):
        replace(Recipe(), **change)


# -------------------------------------------------------------------------------------------------------------- cards


def test_card_of_one_attribute() -> None:
    card = replace(
        make_card(),
        classes=("landbird", "waterbird"),
        attributes=(Attribute("place", ("land", "water"), (0, 1)),),
    )
    assert (card.shape, card.num_groups) == ((2, 2), 4)
    assert card.group_names() == ["landbird/land", "landbird/water", "waterbird/land", "waterbird/water"]


def test_card_of_several_attributes() -> None:
    card = replace(
        make_card(),
        classes=("a", "b"),
        attributes=(Attribute("bg", ("x", "y", "z"), (0, 1)), Attribute("co", ("0", "1"), (0, 1))),
    )
    assert (card.shape, card.num_groups) == ((2, 3, 2), 12)
    assert card.group_names()[:6] == ["a/x/0", "a/x/1", "a/y/0", "a/y/1", "a/z/0", "a/z/1"]
    assert card.group_names()[11] == "b/z/1"


def test_cards_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_card().name = "x"  # type: ignore[misc]


# -------------------------------------------------------------------------------------------------------- method names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("erm", ("erm", "", "")),
        ("dfr@class", ("dfr", "", "class")),
        ("groupdro+exmap", ("groupdro", "exmap", "")),
        ("dfr+exmap@class", ("dfr", "exmap", "class")),
    ],
)
def test_method_name(text: str, parts: tuple[str, str, str]) -> None:
    assert MethodName.parse(text) == MethodName(*parts)


@pytest.mark.parametrize("text", ["", "@class", "+exmap", "dfr@", "dfr+", "dfr+@class", "dfr+exmap@"])
def test_a_method_name_that_lacks_a_part(text: str) -> None:
    with pytest.raises(UserError, match="write HOST, HOST"):
        MethodName.parse(text)


@pytest.mark.parametrize("text", ["dfr@clas", "dfr@class@class", "dfr@class+exmap"])
def test_an_unknown_policy_offers_class(text: str) -> None:
    with pytest.raises(UnknownName, match=r"unknown policy .* Did you mean class\?"):
        MethodName.parse(text)
