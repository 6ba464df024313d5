"""Metrics as pure functions of per-group counts (definitions: spec of metrics and protocol, sections 1 and 3).

Groups are the true (y, a) cells in index order, y major. Accuracies are fractions. A group without test images is left
out of every minimum and mean; a value that cannot be defined is None, never 0.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from .spec import Attribute

Counts = NDArray[np.int64]
Values = dict[str, float | None]


def group_index(y: NDArray[np.integer], a: NDArray[np.integer], shape: Sequence[int]) -> NDArray[np.int64]:
    """Group index of each example from labels `y` (n,) and attributes `a` (n, k); `shape` is (K, S_1 .. S_k)."""
    return np.ravel_multi_index((y, *a.T), tuple(shape)).astype(np.int64)


def group_counts(correct: NDArray[np.bool_], group: NDArray[np.int64], num_groups: int) -> tuple[Counts, Counts]:
    """Correct and total examples per group."""
    total = np.bincount(group, minlength=num_groups)
    return np.bincount(group[correct], minlength=num_groups), total


def _accuracy(correct: Counts, total: Counts) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, correct / total, np.nan)


def worst_group_accuracy(correct: Counts, total: Counts) -> float:
    """`wga`: the lowest accuracy over the groups that have examples."""
    return float(np.nanmin(_accuracy(correct, total)))


def mean_accuracy(correct: Counts, total: Counts) -> float:
    """`acc_mean`: share of correct examples."""
    return float(correct.sum() / total.sum())


def adjusted_accuracy(correct: Counts, total: Counts, n_train: Counts) -> float | None:
    """`acc_adj`: group accuracies weighted by train counts; None when training never saw one of the groups."""
    present = total > 0
    if (n_train[present] == 0).any():
        return None
    accuracy = _accuracy(correct, total)[present]
    return float((accuracy * n_train[present]).sum() / n_train[present].sum())


def group_mean_accuracy(correct: Counts, total: Counts) -> float:
    """`acc_group`: unweighted mean of the group accuracies ("unbiased accuracy")."""
    return float(np.nanmean(_accuracy(correct, total)))


def class_recalls(correct: Counts, total: Counts, num_classes: int) -> NDArray[np.float64]:
    """Recall of every class, NaN for a class without examples."""
    return _accuracy(correct.reshape(num_classes, -1).sum(1), total.reshape(num_classes, -1).sum(1))


def alignment_accuracy(
    correct: Counts, total: Counts, shape: Sequence[int], attributes: Sequence[Attribute]
) -> dict[tuple[int, ...], float]:
    """A(v): unweighted mean accuracy of the cells with alignment pattern v (1 = aligned with the class)."""
    accuracy = _accuracy(correct, total)
    cells: dict[tuple[int, ...], list[float]] = {v: [] for v in product((0, 1), repeat=len(attributes))}
    for g, (y, *a) in enumerate(np.ndindex(*shape)):
        if not np.isnan(accuracy[g]):
            pattern = tuple(int(value == attribute.aligned[y]) for value, attribute in zip(a, attributes, strict=True))
            cells[pattern].append(float(accuracy[g]))
    return {v: float(np.mean(values)) for v, values in cells.items() if values}


def alignment_weights(
    n_train: Counts, shape: Sequence[int], attributes: Sequence[Attribute]
) -> dict[tuple[int, ...], float]:
    """w(v): product of the declared train ratios, or the empirical train frequencies where one is undeclared."""
    patterns = list(product((0, 1), repeat=len(attributes)))
    ratios = [attribute.train_ratio for attribute in attributes if attribute.train_ratio is not None]
    if len(ratios) == len(attributes):
        return {
            v: float(np.prod([r if aligned else 1 - r for r, aligned in zip(ratios, v, strict=True)])) for v in patterns
        }
    counts = dict.fromkeys(patterns, 0)
    for g, (y, *a) in enumerate(np.ndindex(*shape)):
        pattern = tuple(int(value == attribute.aligned[y]) for value, attribute in zip(a, attributes, strict=True))
        counts[pattern] += int(n_train[g])
    return {v: count / int(n_train.sum()) for v, count in counts.items()}


def lift(n_train: Counts, shape: Sequence[int], attribute: int) -> tuple[int, ...]:
    """The value of one attribute that each class has more often than images at large: argmax of P(a|y) / P(a)."""
    others = tuple(i for i in range(1, len(shape)) if i != attribute + 1)
    table = n_train.reshape(shape).sum(axis=others)
    return tuple(int(v) for v in (table / np.maximum(table.sum(0), 1)).argmax(1))  # P(y) is one factor for all values


def whac_a_mole(
    accuracy: dict[tuple[int, ...], float], weights: dict[tuple[int, ...], float], names: Sequence[str]
) -> Values:
    """`id_acc`, one `gap_NAME` per attribute and `gap_all`, the gap with every attribute unaligned.

    ID accuracy is the mean of A(v) under the train weights; a gap is A(pattern) minus it (spec 3.1, 3.3).
    """
    needed = [v for v, weight in weights.items() if weight > 0]
    missing = any(v not in accuracy for v in needed)
    id_acc = None if missing else sum(weights[v] * accuracy[v] for v in needed)

    def gap(pattern: tuple[int, ...]) -> float | None:
        return None if id_acc is None or pattern not in accuracy else accuracy[pattern] - id_acc

    k = len(names)
    values: Values = {"id_acc": id_acc}
    for j, name in enumerate(names):
        values[f"gap_{name}"] = gap(tuple(int(i != j) for i in range(k)))
    if k > 1:
        values["gap_all"] = gap((0,) * k)
    return values


def evaluate(
    correct: Counts, total: Counts, n_train: Counts, shape: Sequence[int], attributes: Sequence[Attribute]
) -> Values:
    """Every metric of a split from its group counts (G,) and the train counts (G,); `shape` is (K, S_1 .. S_k)."""
    recalls = class_recalls(correct, total, shape[0])
    wga, mean = worst_group_accuracy(correct, total), mean_accuracy(correct, total)
    unseen = bool((n_train[total > 0] == 0).any())
    gaps = whac_a_mole(
        alignment_accuracy(correct, total, shape, attributes),
        alignment_weights(n_train, shape, attributes),
        [attribute.name for attribute in attributes],
    )
    return {
        "wga": wga,
        "acc_mean": mean,
        "acc_adj": adjusted_accuracy(correct, total, n_train),
        "acc_group": group_mean_accuracy(correct, total),
        "acc_class": float(np.nanmean(recalls)),
        "worst_class": float(np.nanmin(recalls)),
        "gap": mean - wga,
        **(dict.fromkeys(gaps) if unseen else gaps),
    }


def wilson_interval(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95 % by default."""
    p, n = correct / total, total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def worst_group(correct: Counts, total: Counts) -> int:
    """Index of the group with the lowest accuracy, the first among equals."""
    return int(np.nanargmin(_accuracy(correct, total)))
