"""Search ranges: how they are written, and what is drawn from them."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.registry import METHODS, SOURCES, MethodEntry
from worstgroup.benchmark.search import RECIPE, Search, draw, ranges
from worstgroup.benchmark.spec import Recipe, override


def drawn(search: Search, n: int = 2_000, **options: Any) -> list[str]:
    rng = np.random.default_rng(0)
    return [search.draw(rng, Recipe(lr=1e-3), **options) for _ in range(n)]


@pytest.mark.parametrize(
    ("text", "low", "high", "median"),
    [
        ("10^U(-1,5)", 0.1, 1e5, 100),
        ("2^U(3, 9)", 8, 512, 64),
        ("U(0.1,100)", 0.1, 100, 50),
        ("10^U(-4.5,-2.5)", 10**-4.5, 10**-2.5, 10**-3.5),
    ],
)
def test_draws_fill_the_range(text: str, low: float, high: float, median: float) -> None:
    values = np.array([float(value) for value in drawn(Search(text))])
    assert low <= values.min() * 1.001
    assert values.max() <= high * 1.001
    assert np.median(values) == pytest.approx(median, rel=0.2)


def test_choices_are_equally_likely() -> None:
    values, counts = np.unique(drawn(Search("{0, 0.1,0.5}")), return_counts=True)
    assert values.tolist() == ["0", "0.1", "0.5"]
    assert counts.min() > 600


def test_whole_numbers_are_rounded_down() -> None:
    assert set(drawn(Search("2^U(0,3)"), whole=True)) == {str(i) for i in range(1, 8)}


def test_a_range_can_be_a_factor_on_the_recipe() -> None:
    values = [float(value) for value in drawn(Search("10^U(-1,1)", of="lr"))]
    assert 1e-4 <= min(values) < 1.2e-4
    assert 0.8e-2 < max(values) <= 1e-2


def test_a_share_of_few_is_at_least_one() -> None:
    """Or a search of CnC would end in an error wherever a training has less than five epochs."""
    share, rng = Search("U(0.2,0.8)", of="epochs"), np.random.default_rng(0)
    values = {share.draw(rng, Recipe(epochs=3), whole=True) for _ in range(200)}
    assert values == {"1", "2"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.1",
        "10^U(1)",
        "10^U(5,-1)",
        "U(a,b)",
        "{}",
        "1^U(0,1)",
        "0^U(0,1)",
        "10^U(1e,2)",
        "10**2",
        "10^U(300,400)",
        "U(0,1e999)",
    ],
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="search range"):
        Search(text)


@dataclass(frozen=True)
class Config:
    """Settings of every kind."""

    weight: Annotated[float, Search("10^U(-1,5)")] = 100.0
    steps: Annotated[int, Search("2^U(0,3)")] = 1
    mode: Annotated[Literal["a", "b"], Search("{a,b}")] = "a"
    fixed: float = 0.5


def test_the_settings_with_a_range_are_found() -> None:
    assert list(ranges(Config)) == ["weight", "steps", "mode"]


def test_draws_are_repeated_and_differ_from_each_other() -> None:
    first, again, second = (draw(Config, {}, "m", number, Recipe()) for number in (1, 1, 2))
    assert first == again
    assert first["weight"] != second["weight"]
    assert draw(Config, {}, "other", 1, Recipe())["weight"] != first["weight"]


def test_a_changed_range_changes_no_other_draw() -> None:
    usual, changed = (draw(Config, ranges, "m", 3, Recipe()) for ranges in ({}, {"fixed": Search("U(0,1)")}))
    assert {name: changed[name] for name in usual} == usual
    assert 0 <= float(changed["fixed"]) <= 1


def test_the_usual_recipe_is_searched_where_subpopbench_searches() -> None:
    values = [RECIPE["lr"].draw(np.random.default_rng(i), Recipe(lr=1e-3)) for i in range(500)]
    assert 1e-4 <= min(map(float, values)) < 1.2e-4
    assert 0.8e-2 < max(map(float, values)) <= 1e-2
    values = [RECIPE["weight_decay"].draw(np.random.default_rng(i), Recipe(weight_decay=1e-4)) for i in range(500)]
    assert 1e-6 <= min(map(float, values)) < 1.3e-6
    assert 0.8e-3 < max(map(float, values)) <= 1e-3


@pytest.mark.parametrize(
    "entry", [*(METHODS[m] for m in METHODS), *(SOURCES[s] for s in SOURCES)], ids=lambda e: e.name
)
def test_every_draw_of_every_method_is_a_valid_setting(entry: MethodEntry) -> None:
    found = ranges(entry.config)
    assert set(found) <= {field.name for field in dataclasses.fields(entry.config)}
    for number in range(1, 33):
        texts = draw(entry.config, {}, entry.name, number, Recipe())
        _, problems = override(entry.config(), texts, entry.name)
        assert not problems, (texts, problems)
