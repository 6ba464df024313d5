"""What a record says it spent and chose: its ledger, its selected epoch and its search, checked against each other."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..benchmark import metrics
from ..benchmark import record as records
from ..benchmark.annotations import Attributes, Indices, grant_by_class, granted, halves, most_labels
from ..benchmark.budget import Budget
from ..benchmark.predictions import Arrays
from ..benchmark.record import EpochRow, RunRecord
from ..benchmark.search import RECIPE
from ..benchmark.selection import CRITERIA, PSEUDO_WGA, Criterion, first_best
from ..benchmark.spec import PAPER, derive_seed
from ..benchmark.tuning import cost_of, score_of
from ..benchmark.tuning import first_best as best_draw

SEARCHED = (
    *("protocol", "dataset", "fingerprint", "backbone", "weights", "backbone_code", "recipe"),
    *("method", "source", "policy", "extra", "budget", "criterion", "code"),
)
"""Fields that all candidates of a search share with the runs that follow from it."""
SETTINGS = ("config", "source_config", "tuned")
"""Fields that those runs take over from the chosen one."""


def ledger(record: RunRecord) -> Iterator[str]:
    """No more labels than the budget grants, and not fewer than selection has seen."""
    if record.labels is None:
        yield "labels: missing"
        return
    counts, budget = record.counts(), Budget.parse(record.budget)
    k = len(budget.attributes) or len(record.attributes)
    train, val = (_by_class(record, counts[name]) for name in ("n_train", "m_val"))
    for name, limit in most_labels(budget, k, train, val).items():
        if getattr(record.labels, name) > limit:
            yield f"labels.{name}: {getattr(record.labels, name)} is more than the {limit} that budget {budget} grants"
    used, chosen = record.labels, record.selection
    by_groups = chosen and chosen.step is not None and getattr(CRITERIA.get(chosen.criterion), "needs_groups", False)
    least = k * sum(chosen.seen) if chosen and by_groups else 0
    if used.n_val_a_select < least:
        yield f"labels.n_val_a_select: {used.n_val_a_select}, the epoch was selected by {least}"
    images = {"n_env": int(train.sum() + val.sum()), "n_y_extra": int(val.sum())}
    images["n_rendered"] = len(record.attributes) * int(train.sum())
    for name, limit in images.items():
        if getattr(used, name) > limit:
            yield f"labels.{name}: {getattr(used, name)} is more than the {limit} images that there are"
    low = used.n_train_a + max(used.n_val_a_fit, used.n_val_a_select)
    if not low <= used.total_a <= used.n_train_a + used.n_val_a_fit + used.n_val_a_select:
        yield f"labels.total_a: {used.total_a} does not agree with the columns it sums"


def selection(record: RunRecord, arrays: Arrays) -> Iterator[str]:
    """The rung's rule was used, and an epoch chosen by it is the first best of the training it was chosen in."""
    chosen, budget = record.selection, Budget.parse(record.budget)
    rule = record.criterion or budget.grant.criterion
    by_source = bool(record.source) and record.criterion == PSEUDO_WGA
    if record.criterion and record.protocol != PAPER and not by_source:
        yield f"criterion: {record.criterion}, protocol {record.protocol} selects by the budget's rule"
    if chosen is None or chosen.criterion != rule:
        found = chosen and chosen.criterion
        yield f"selection.criterion: {found} is not {rule}, the rule of budget {budget}"
        return
    if chosen.step is None:
        return
    field, epochs = ("search", record.search) if record.search else ("history", record.history)
    if not 1 <= chosen.step <= len(epochs):
        yield f"selection.step: {chosen.step} is not among the {len(epochs)} epochs of {field}"
        return
    if record.search and len(record.history) != chosen.step:
        yield f"history: {len(record.history)} epochs, the model was to be fitted for {chosen.step}"
        return
    if record.history[chosen.step - 1].correct_val != record.counts()["correct_val"].tolist():
        yield f"history.{chosen.step - 1}.correct_val: not the counts of the selected model"
    yield from _seen(record, epochs, field, arrays)
    seen = np.array(chosen.seen)
    counts = [np.array(epoch.correct_seen) for epoch in epochs]
    if any(len(correct) != len(seen) or (correct > seen).any() for correct in counts):
        yield f"{field}: correct_seen does not fit selection.seen"
        return
    scores = [CRITERIA[chosen.criterion].score(correct, seen) for correct in counts]
    best = first_best(scores)
    if best + 1 != chosen.step:
        yield f"selection.step: the record says {chosen.step}, {chosen.criterion} chooses {best + 1} from {field}"
    value, *ties = scores[chosen.step - 1]
    if chosen.value is None or not math.isclose(value, chosen.value, abs_tol=1e-9):
        yield f"selection.value: the record says {chosen.value}, {field} gives {value}"
    if len(ties) != len(chosen.ties) or not np.allclose(ties, chosen.ties, rtol=0, atol=1e-9):
        yield f"selection.ties: the record says {chosen.ties}, {field} gives {ties}"


def _seen(record: RunRecord, epochs: list[EpochRow], field: str, arrays: Arrays) -> Iterator[str]:
    """Selection looked at the images that the budget lets it see (at half of them where the others were fitted on).

    Which ones these are follows from the class labels; without them only their number is bounded.
    """
    chosen, budget, counts = record.selection, Budget.parse(record.budget), record.counts()
    if chosen is None:
        return
    criterion = CRITERIA[chosen.criterion]
    if criterion.of_source:
        yield from _seen_by_source(record, epochs, field, arrays)
        return
    total = _pooled(record, counts["m_val"], budget, criterion)
    seen = np.array(chosen.seen)
    if len(seen) != len(total) or (seen > total).any():
        yield f"selection.seen: {chosen.seen} is not part of the {total.tolist()} validation images"
    elif not record.search and (not criterion.needs_groups or budget.grant.val == 1):
        if (seen != total).any():
            yield f"selection.seen: {chosen.seen}, there are {total.tolist()} validation images"
        for i, epoch in enumerate(epochs):
            if epoch.correct_seen != _pooled(record, np.array(epoch.correct_val), budget, criterion).tolist():
                yield f"{field}.{i}.correct_seen: does not agree with correct_val"
    elif "val_y" in arrays and chosen.step:
        y, a = arrays["val_y"].astype(np.int64), arrays["val_a"].astype(np.int64)
        rows = _selected_by(record, y, budget)
        group = metrics.group_index(y, a, record.shape)[rows]
        correct, m = metrics.group_counts((arrays["val_prediction"] == y)[rows], group, len(record.groups))
        checks = [("selection.seen", chosen.seen, m)]
        if not record.search:  # the predictions are those of the model that it chose
            checks += [(f"{field}.{chosen.step - 1}.correct_seen", epochs[chosen.step - 1].correct_seen, correct)]
        for name, said, expected in checks:
            if said != _pooled(record, expected, budget, criterion).tolist():
                yield f"{name}: {said}, the granted images give {_pooled(record, expected, budget, criterion).tolist()}"
    else:
        most = int(grant_by_class(_by_class(record, counts["m_val"]), budget.grant.val).sum())
        if not 0 < seen.sum() <= most - bool(record.search):
            yield f"selection.seen: {seen.sum()} images, budget {budget} grants {most} to fit on and to select by"


def _seen_by_source(record: RunRecord, epochs: list[EpochRow], field: str, arrays: Arrays) -> Iterator[str]:
    """Selection looked at the groups of the source, on all of validation where no image of it was fitted on."""
    chosen = record.selection
    if chosen is None or chosen.step is None or "val_source" not in arrays or "val_y" not in arrays:
        return
    y = arrays["val_y"].astype(np.int64)
    rows = np.arange(len(y)) if not record.search else _selected_by(record, y, Budget.parse(record.budget))
    groups = Attributes.of(arrays["val_source"].astype(np.int64)).at(rows).groups(y[rows], record.shape[0])
    correct, total = metrics.group_counts((arrays["val_prediction"] == y)[rows], groups.index, groups.num)
    # How groups are numbered depends on how many values the source knows; an empty one changes nothing.
    if sorted(filter(None, chosen.seen)) != sorted(filter(None, total.tolist())):
        yield f"selection.seen: {chosen.seen}, the source's groups have {total.tolist()} images"
    elif not record.search:  # the predictions are those of the model that it chose
        said = sorted(zip(chosen.seen, epochs[chosen.step - 1].correct_seen, strict=True), reverse=True)
        made = sorted(zip(total.tolist(), correct.tolist(), strict=True), reverse=True)
        if [pair for pair in said if pair[0]] != [pair for pair in made if pair[0]]:
            yield f"{field}.{chosen.step - 1}.correct_seen: does not agree with the predictions"


def _selected_by(record: RunRecord, y: Indices, budget: Budget) -> Indices:
    """Granted validation images that an epoch was chosen by: all, or the half that the search held out."""
    rows = granted(y, budget.grant.val, record.dataset, record.seed, "val")
    if not record.search:
        return rows
    stream = record.dataset, record.backbone, record.weights, record.seed
    return halves(rows, y[rows], np.random.default_rng(derive_seed(*stream, "halves")))[1]


def superseded(record: RunRecord, path: Path) -> bool:
    """Whether a candidate of its search was made again since and another draw chosen: a newer run beside it, which the
    candidates agree with, says so.
    """
    places = [records.find_run(path, run) for run in record.candidates]
    scores = [score_of(records.read(place)) for place in places if place is not None]
    if not record.tuning or len(scores) < len(places) or scores in (record.tuning.scores, []):
        return False
    others = path.parent.glob(f"{records.slug(record.label)}-{records.slug(record.budget)}-s*.json")
    return any(
        (one.candidates, one.tuning.scores if one.tuning else [], one.draw, one.run)
        == (record.candidates, scores, best_draw(scores), one.identity_hash())
        and one.draw != record.draw
        and one.created > record.created
        for one in records.readable(others)
    )


def tuning(record: RunRecord, path: Path, old: bool = False) -> Iterator[str]:
    """The settings are those of the draw with the best selection value, as the candidates' own records say; of an `old`
    run, which is `superseded`, these say otherwise by now.
    """
    if (record.tuned and not record.draw) or not record.tuned.keys() <= RECIPE.keys():
        yield f"tuned: {record.tuned}, draw {record.draw} of a search can have none of it"
    if not record.tuning:
        return
    scores = record.tuning.scores
    best, made = best_draw(scores), []
    if record.draw != best:
        yield f"draw: the record says {record.draw}, {scores} choose draw {best}"
    for draw, run in enumerate(record.candidates):
        place = records.find_run(path, run)
        if place is None:
            yield f"candidates.{draw}: the record of run {run[:12]}, which could show what it scored, is not there"
            continue
        candidate = records.read(place)
        made.append(candidate)
        said = scores[draw] if old else score_of(candidate)
        if (candidate.identity_hash(), candidate.draw, said) != (run, draw, scores[draw]):
            yield f"tuning.scores.{draw}: the record says {scores[draw]}, its candidate draw {candidate.draw}: {said}"
        for field in (*SEARCHED, *(SETTINGS if draw == record.draw else ())):
            if getattr(candidate, field) != getattr(record, field):
                yield f"{field}: the record says {getattr(record, field)}, draw {draw}: {getattr(candidate, field)}"
    if len({candidate.seed for candidate in made}) > 1:
        yield f"candidates: of several seeds, {sorted({candidate.seed for candidate in made})}"
    if len(made) == len(scores) and not old:
        spent, said_spent = cost_of(made).model_dump(), record.tuning.cost.model_dump()
        for name in spent:
            if not math.isclose(spent[name], said_spent[name], rel_tol=1e-9):
                yield f"tuning.cost.{name}: the record says {said_spent[name]}, its candidates {spent[name]}"


def _by_class(record: RunRecord, counts: metrics.Counts) -> metrics.Counts:
    by_class: metrics.Counts = counts.reshape(record.shape[0], -1).sum(axis=1)
    return by_class


def _pooled(record: RunRecord, counts: metrics.Counts, budget: Budget, criterion: Criterion) -> metrics.Counts:
    """Counts of the cells that a criterion sees: those of the granted attributes, or the classes."""
    seen = [criterion.needs_groups and budget.grants(attribute.name) for attribute in record.attributes]
    hidden = tuple(1 + j for j, kept in enumerate(seen) if not kept)
    pooled: metrics.Counts = counts.reshape(record.shape).sum(axis=hidden).ravel()
    return pooled
