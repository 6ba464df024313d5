"""Ranks as ties, what the smallest group can tell, and intervals where only group counts are known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from worstgroup.leaderboard import aggregate, render, statistics
from worstgroup.leaderboard.statistics import DRAWS, Estimate
from worstgroup.leaderboard.table import Difference, GroupResult, Resolution, Row


def row(method: str, wga: float, budget: str = "val") -> Row:
    return Row(method, budget, "", (0,), 0, {"wga": Estimate(wga, None, wga - 0.1, wga + 0.1)})


def ranked(rows: list[Row], worse: set[tuple[str, str]], unpaired: set[tuple[str, str]] = frozenset()) -> None:  # type: ignore[assignment]
    """Rank rows, of which those of the pairs `worse` are worse beyond the interval, and `unpaired` share no seed."""

    def difference(cell: str, other: str) -> Difference | None:
        if (cell, other) in unpaired:
            return None
        return Difference(-0.2, -0.3, -0.1) if (cell, other) in worse else Difference(-0.1, -0.2, 0.1)

    estimates: Any = SimpleNamespace(difference=difference)
    aggregate._rank([row.method for row in rows], rows, estimates)  # type: ignore[misc]


def test_rows_that_cannot_be_told_apart_share_a_rank() -> None:
    rows = [row("c", 0.5), row("a", 0.9), row("b", 0.8)]
    ranked(rows, {("c", "a"), ("c", "b")})
    assert [(one.method, one.rank) for one in rows] == [("c", 3), ("a", 1), ("b", 1)]


def test_a_rank_counts_who_is_better_not_who_is_between() -> None:
    """b is worse than a; c, which varies more, is not."""
    rows = [row("a", 0.9), row("b", 0.8), row("c", 0.7)]
    ranked(rows, {("b", "a")})
    assert [one.rank for one in rows] == [1, 2, 1]


def test_budgets_are_ranked_apart() -> None:
    rows = [row("a", 0.5, "none"), row("b", 0.9, "val"), row("c", 0.4, "none")]
    ranked(rows, {("a", "b"), ("c", "b"), ("c", "a")})
    assert [one.rank for one in rows] == [1, 1, 2]


def test_every_row_but_the_best_has_its_difference_to_the_best() -> None:
    rows = [row("a", 0.5), row("b", 0.9)]
    ranked(rows, {("a", "b")})
    assert rows[0].versus_best == Difference(-0.2, -0.3, -0.1)
    assert rows[1].versus_best is None


def test_rows_without_a_common_seed_are_ties() -> None:
    rows = [row("a", 0.5), row("b", 0.9)]
    ranked(rows, {("a", "b")}, unpaired={("a", "b")})
    assert [one.rank for one in rows] == [1, 1]
    assert rows[0].versus_best is None


def test_the_smallest_group_tells_the_resolution() -> None:
    """Waterbirds: one of 642 images is 0.156 points; at 0.9 two standard errors are 2.37 (spec of metrics, 5)."""
    rows = [row("a", 0.9), row("b", 0.5)]
    sizes = {"landbird/land": 2255, "waterbird/land": 642, "absent": 0}
    rows[0].groups = [GroupResult(name, 1, m, None) for name, m in sizes.items()]
    found = aggregate._resolution(rows)
    assert found == Resolution("waterbird/land", 642, 1 / 642, 0.9, pytest.approx(0.0237, abs=1e-4))
    assert "waterbird/land, 642 images; one of them is 0.16 points" in render.resolution(found)


def test_counts_vary_like_counts() -> None:
    """Means and deviations are binomial; a group without images has no accuracy."""
    correct, total = np.array([[150, 90, 0]]), np.array([200, 100, 0])
    accuracies, shares = statistics.accuracies_from_counts(correct, total, "a")
    assert accuracies.shape == (1, DRAWS, 3)
    assert np.isnan(accuracies[:, :, 2]).all()
    for g, p in ((0, 0.75), (1, 0.9)):
        assert accuracies[0, :, g].mean() == pytest.approx(p, abs=0.005)
        assert accuracies[0, :, g].std() == pytest.approx((p * (1 - p) / total[g]) ** 0.5, rel=0.08)
    assert np.allclose(shares, (200 * accuracies[:, :, 0] + 100 * accuracies[:, :, 1]) / 300)


def test_seeds_of_a_row_share_their_draws_and_rows_do_not() -> None:
    correct, total = np.array([[150], [150]]), np.array([200])
    first, _ = statistics.accuracies_from_counts(correct, total, "a")
    other, _ = statistics.accuracies_from_counts(correct, total, "b")
    assert np.array_equal(first[0], first[1])
    assert abs(np.corrcoef(first[0, :, 0], other[0, :, 0])[0, 1]) < 0.1
    assert np.array_equal(first, statistics.accuracies_from_counts(correct, total, "a")[0])
