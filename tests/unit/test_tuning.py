"""Searches: candidates are ordinary runs on one seed, the rung's rule alone chooses, and all of it is billed."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Call, edit, put
from worstgroup.benchmark import planning
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.executors import run_plan, shard
from worstgroup.benchmark.planning import Plan, Request, plan
from worstgroup.benchmark.record import Cost, RunRecord, find, read, record_path
from worstgroup.benchmark.runner import runs_home
from worstgroup.benchmark.tuning import first_best
from worstgroup.commands.console import RunReporter
from worstgroup.commands.listing import draws_table
from worstgroup.commands.terminal import err
from worstgroup.leaderboard import aggregate, render
from worstgroup.leaderboard.verify import verify

pytestmark = pytest.mark.usefixtures("tiny")
SEEDS = (3, 5)


def searched(method: str = "groupdro", draws: int = 3, **changes: object) -> Plan:
    """The plan of a search over two seeds."""
    request = Request("tiny", method, seeds=SEEDS, tuning=draws, settings={"recipe.epochs": "2"})
    return plan([replace(request, **changes)])  # type: ignore[arg-type]


def run(made: Plan) -> list[RunRecord]:
    return run_plan(made, RunReporter(err, quiet=True))


def costs(records: list[RunRecord]) -> list[Cost]:
    return [one.cost for one in records if one.cost]


def decided(made: Plan) -> tuple[list[RunRecord], list[RunRecord], Plan]:
    """Records of the candidates and of the runs that follow, and the plan that these are of."""
    candidates = run(replace(made, runs=made.searched()))
    after = made.decided({record.run: record for record in candidates})
    return candidates, run(after), after


def test_the_first_candidate_is_the_plain_run_of_the_first_seed() -> None:
    (sweep,) = searched().sweeps
    (plain, _) = plan([Request("tiny", "groupdro", seeds=SEEDS, settings={"recipe.epochs": "2"})]).runs
    assert sweep.candidates[0] == plain.spec
    assert {one.block.seed for one in sweep.candidates} == {SEEDS[0]}
    assert len({one.hash for one in sweep.candidates}) == 3
    assert [one.draw for one in sweep.candidates] == [0, 1, 2]


def test_candidates_share_the_block_whatever_lr_they_draw() -> None:
    (sweep,) = searched().sweeps
    assert len({one.block.key for one in sweep.candidates}) == 1
    assert all(dict(one.tuned)["lr"] > 0 for one in sweep.candidates[1:])


def test_the_best_draw_is_run_on_every_seed_and_says_so() -> None:
    candidates, finals, _ = decided(searched())
    scores = [one.selection.score for one in candidates if one.selection and one.selection.score]
    best = max(range(3), key=lambda i: (scores[i], -i))
    assert [final.seed for final in finals] == list(SEEDS)
    for final in finals:
        assert final.draw == best
        assert final.config == candidates[best].config
        assert final.tuned == candidates[best].tuned
        assert final.candidates == [one.run for one in candidates]
        assert final.tuning is not None
        assert final.tuning.scores == scores
        costs = [one.cost.scratch for one in candidates if one.cost]
        assert final.tuning.cost.n_fwd == sum(cost.n_fwd for cost in costs)


def test_the_run_of_the_searched_seed_is_the_candidate_itself() -> None:
    candidates, finals, _ = decided(searched())
    twin = candidates[finals[0].draw]
    assert finals[0].run != twin.run
    assert finals[0].predictions == twin.predictions
    assert finals[0].cost == twin.cost


def test_a_searched_row_stands_alone_in_its_table() -> None:
    _, _, after = decided(searched())
    (table,) = aggregate.build(aggregate.collect(find(runs_home())))
    assert len([row for row in table.rows if "draw" in row.method]) == 1
    row = next(row for row in table.rows if "of 3)" in row.method)
    assert row.seeds == SEEDS
    assert row.searched
    text = render.to_markdown([table])
    assert "recipe.lr=" in text or row.method == "groupdro (draw 0 of 3)"
    assert len(after.runs) == 2


def test_searches_that_chose_the_same_are_rows_of_their_own() -> None:
    for lr in ("{1e-12}", "{2e-12}"):
        decided(searched("erm", draws=2, ranges={"recipe.lr": lr}))
    (table,) = aggregate.build(aggregate.collect(find(runs_home())))
    rows = [row for row in table.rows if row.searched]
    assert {row.method for row in rows} == {"erm (draw 0 of 2, search 1)", "erm (draw 0 of 2, search 2)"}
    assert {row.seeds for row in rows} == {SEEDS}
    assert "erm (draw 0 of 2, search 1): has no settings" in render.to_markdown([table])


def test_searched_rows_say_the_modes_in_which_they_differ() -> None:
    for env in ("attribute", "group"):
        decided(searched("mmd", draws=2, settings={"recipe.epochs": "1", "mmd.env": env}))
    (table,) = aggregate.build(aggregate.collect(find(runs_home())))
    names = [row.method for row in table.rows if row.searched]
    assert all(any(f"env={env}" in name for name in names) for env in ("attribute", "group")), names
    assert "weight=" not in "".join(names)


def test_a_plain_row_keeps_its_name_beside_a_searched_one() -> None:
    decided(searched("mmd", draws=2))
    (table,) = aggregate.build(aggregate.collect(find(runs_home())))
    assert "mmd" in [row.method for row in table.rows]


def test_a_table_of_draws_says_what_the_first_one_has() -> None:
    changed = searched(draws=2, settings={"recipe.epochs": "1", "groupdro.step_size": "0.5"})
    for made, says in ((searched(draws=2), "the defaults"), (changed, "step_size=0.5")):
        candidates, _, _ = decided(made)
        table = draws_table(made.sweeps[0], {record.run: record for record in candidates})
        assert next(iter(table.columns[1].cells)) == says


def test_the_search_is_in_the_cost() -> None:
    decided(searched())
    run(plan([Request("tiny", "erm", seeds=SEEDS, settings={"recipe.epochs": "2"})]))
    (table,) = aggregate.build(aggregate.collect(find(runs_home())))
    row = next(row for row in table.rows if "of 3)" in row.method)
    assert row.cost is not None
    assert row.cost.search > row.cost.scratch > 0


def test_a_second_search_finds_everything_made() -> None:
    decided(searched())
    before = {path: path.read_bytes() for path in find(runs_home())}
    decided(searched())
    assert {path: path.read_bytes() for path in find(runs_home())} == before


def test_the_shared_erm_is_trained_once_for_all_draws() -> None:
    candidates, _, _ = decided(searched("jtt"))
    assert len({tuple(one.cost.shared) for one in candidates if one.cost}) == 1


def test_what_draws_share_is_paid_for_once() -> None:
    candidates, finals, _ = decided(searched("jtt"))
    (shared,) = {cost.shared[key].n_updates for cost in costs(candidates) for key in cost.shared if "erm:" in key}
    own = sum(stage.n_updates for cost in costs(candidates) for stage in cost.stages.values())
    assert finals[0].tuning
    assert finals[0].tuning.cost.n_updates == own + shared
    assert sum(cost.scratch.n_updates for cost in costs(candidates)) == own + 3 * shared


def test_what_draws_share_does_not_depend_on_which_of_them_comes_first(home: Path) -> None:
    made = searched("groupdro@pseudo", 2, budget="val-20")
    in_order = run(replace(made, runs=made.searched()))
    for folder in ("runs", "artifacts"):
        shutil.rmtree(home / folder)
    in_reverse = run(replace(made, runs=made.searched()[::-1]))
    assert [one.predictions for one in in_order] == [one.predictions for one in in_reverse[::-1]]


def test_what_is_set_is_not_searched_unless_it_has_a_range() -> None:
    settings = {"groupdro.step_size": "0.5", "recipe.lr": "0.01", "adjustment": "2"}
    (sweep,) = searched(settings=settings, ranges={"recipe.lr": "U(1,2)"}).sweeps
    for one in sweep.candidates[1:]:
        assert dict(one.config) == {"step_size": 0.5, "adjustment": 2.0, "absent": "ignore"}
        assert 1 <= dict(one.tuned)["lr"] <= 2
        assert "weight_decay" in dict(one.tuned)


def test_searched_erm_rows_train_with_their_own_settings() -> None:
    candidates, _, _ = decided(searched("erm"))
    assert len({one.predictions.sha256 for one in candidates if one.predictions}) == 3


def test_two_searches_of_a_method_stand_side_by_side() -> None:
    narrow = {"recipe.lr": "10^U(-9,-8)", "recipe.weight_decay": "{0}", "groupdro.step_size": "{0}"}
    changed = [narrow | {"groupdro.adjustment": f"{{{value}}}"} for value in (1, 2)]
    for ranges in changed:
        made = searched(draws=2, ranges=ranges)
        records = {one.run: one for one in run(replace(made, runs=made.searched()))}
        records.pop(made.sweeps[0].candidates[0].hash)  # the other draw is to be chosen, whatever it scored
        run(made.decided(records))
    (table,) = aggregate.build(aggregate.collect(find(runs_home())))
    names = [row.method for row in table.rows if row.searched]
    assert sorted(names) == [f"groupdro (draw 1 of 2, search {number})" for number in (1, 2)]


def test_searches_that_choose_the_same_are_two_rows() -> None:
    for epsilon in ("1e-9", "2e-9"):  # with these learning rates nothing is learned, so that the defaults are chosen
        decided(searched("erm", 2, settings={"recipe.epochs": "8"}, ranges={"recipe.lr": f"{{{epsilon}}}"}))
    found = aggregate.collect(find(runs_home()))
    assert len([entry for entry in found.entries if entry.line.candidates]) == 4
    (table,) = aggregate.build(found)
    rows = [(row.method, row.seeds) for row in table.rows if row.searched]
    assert sorted(rows) == [(f"erm (draw 0 of 2, search {number})", SEEDS) for number in (1, 2)]


def age(records: list[RunRecord]) -> list[Path]:
    """Rewrite records as made long ago; returns their places."""
    paths = [path for path in find(runs_home()) if read(path).run in {one.run for one in records}]
    for path in paths:
        edit(path, put("created", "2000-01-01T00:00:00+00:00"))
    return paths


def searched_rows() -> list[tuple[str, tuple[int, ...]]]:
    """Rows of searches and their seeds; they are the same with an index of the records, new or known."""
    (table,) = aggregate.build(aggregate.collect(find(runs_home())))
    for _ in range(2):
        made, problems = aggregate.board(find(runs_home()))
        assert (render.to_json(made), problems) == (render.to_json([table]), [])
    return sorted((row.method, row.seeds) for row in table.rows if row.searched)


def retried(made: Plan) -> tuple[list[Path], list[RunRecord]]:
    """A search in which the best draw first fails: where the runs lie that followed, and those that follow later."""
    candidates = run(replace(made, runs=made.searched()))
    best = first_best([one.selection.score if one.selection else None for one in candidates])
    assert best is not None
    place = record_path(runs_home(), made.sweeps[0].candidates[best])
    content = place.read_bytes()
    edit(place, lambda told: told.update(status="failed", selection=None))
    early = run(made.decided({one.run: read(place) if one.draw == best else one for one in candidates}))
    place.write_bytes(content)
    late = run(made.decided({one.run: one for one in candidates}))
    assert {one.draw for one in late} == {best} != {one.draw for one in early}
    return age(early), late


def test_a_table_shows_what_a_search_chose_last() -> None:
    """A candidate that failed is tried again by the next `run`, and may then win."""
    _, late = retried(searched(draws=2))
    assert searched_rows() == [(f"groupdro (draw {late[0].draw} of 2)", SEEDS)]


def test_a_run_that_its_search_has_passed_over_since_is_called_so(call: Call) -> None:
    early, late = retried(searched(draws=2))
    verdicts = [verify(path) for path in early]
    assert [(one.ok, one.level) for one in verdicts] == [(True, "predictions")] * 2
    assert all(any(note.startswith("superseded: ") for note in one.notes) for one in verdicts)
    done = call("verify")
    assert (done.code, done.err) == (0, "")
    assert "\n2 superseded: " in done.out
    for path in find(runs_home()):
        if read(path).run in {one.run for one in late}:
            assert not any("superseded" in note for note in verify(path).notes)


def test_a_falsified_search_does_not_pass_for_a_superseded_one() -> None:
    """Only a newer run that the candidates agree with supersedes another."""
    early, late = retried(searched(draws=2))
    places = [path for path in find(runs_home()) if read(path).run in {one.run for one in late}]
    honest = {path: path.read_bytes() for path in places}
    changes = {
        "created": "2000-01-01T00:00:00+00:00",
        "candidates": ["0" * 64, "1" * 64],
        "tuning.scores.0": [0.0, 0.0],
        "draw": read(early[0]).draw,
        "seed": 7,
    }
    assert verify(early[0]).ok
    for field, value in changes.items():
        for path in places:
            path.write_bytes(honest[path])
            edit(path, put(field, value))
        assert any(problem.startswith("tuning.scores.") for problem in verify(early[0]).problems), field
    assert not any(note.startswith("superseded") for note in verify(early[0]).notes)


def test_a_search_made_again_after_an_edit_stands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes of its candidates are others then, and it may choose another draw."""
    with monkeypatch.context() as patch:
        patch.setattr(planning, "entries_fingerprint", lambda *_: "0" * 16)
        made = searched(draws=2)
    candidates, finals, _ = decided(searched(draws=2))
    early = run(replace(made, runs=made.searched()))
    early = run(made.decided({one.run: one for one in early if one.draw != finals[0].draw}))
    assert early[0].draw != finals[0].draw
    age(early)
    assert searched_rows() == [(f"groupdro (draw {finals[0].draw} of 2)", SEEDS)]
    assert {one.code for one in early} == {"0" * 16} != {one.code for one in candidates}


@pytest.mark.parametrize("change", [{"draws": 3}, {"ranges": {"recipe.lr": "{1e-12}"}}])
def test_an_edit_hides_no_other_search(monkeypatch: pytest.MonkeyPatch, change: dict[str, object]) -> None:
    narrow = {"draws": 2, "ranges": {"recipe.lr": "{2e-12}"}}
    with monkeypatch.context() as patch:
        patch.setattr(planning, "entries_fingerprint", lambda *_: "0" * 16)
        _, early, _ = decided(searched("erm", **(narrow | change)))  # type: ignore[arg-type]
    age(early)
    decided(searched("erm", **narrow))  # type: ignore[arg-type]
    assert [seeds for _, seeds in searched_rows()] == [SEEDS] * 2


def test_selection_rules_of_papers_are_rows_of_their_own() -> None:
    for criterion in ("val-wga", "val-wga-avg"):
        run(plan([Request("tiny", "erm", "select", seeds=(0,), criterion=criterion, protocol="paper")]))
    (table,) = aggregate.build(aggregate.collect(find(runs_home())))
    assert sorted(row.method for row in table.rows) == ["erm (selection=val-wga)", "erm (selection=val-wga-avg)"]
    assert {row.seeds for row in table.rows} == {(0,)}


def test_the_baseline_of_a_searched_table_has_all_its_seeds() -> None:
    decided(searched("erm"))
    decided(searched())
    (table,) = aggregate.build(aggregate.collect(find(runs_home())))
    rows = {row.method: row for row in table.rows}
    assert rows["erm"].seeds == SEEDS[:1]
    assert "wga" in rows["erm"].versus_erm
    (baseline,) = (row for name, row in rows.items() if name.startswith("erm (draw"))
    assert (baseline.seeds, baseline.versus_erm) == (SEEDS, {})


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("config.step_size", 0.5, "config: "),
        ("tuned", {"lr": 0.5}, "tuned: "),
        ("tuned", {"epochs": 300}, "tuned: "),
        ("code", "0" * 16, "code: "),
        ("tuning.cost.n_fwd", 1, "tuning.cost.n_fwd: "),
        ("labels.n_env", 10**6, "labels.n_env: "),
    ],
)
def test_a_search_falsified_with_care_is_found(place: str, value: object, says: str) -> None:
    _, _, after = decided(searched())
    assert after.runs[1].spec
    path = record_path(runs_home(), after.runs[1].spec)
    edit(path, put(place, value))
    edit(path, put("run", read(path).identity_hash()))
    assert any(problem.startswith(says) for problem in verify(path).problems), verify(path).problems


def test_a_search_without_its_candidates_cannot_be_verified() -> None:
    _, _, after = decided(searched())
    assert after.runs[1].spec
    path = record_path(runs_home(), after.runs[1].spec)
    for run_hash in read(path).candidates:
        next(path.parent.glob(f"*-{run_hash[:12]}.json")).unlink()
    problems = verify(path).problems
    assert [problem.partition(":")[0] for problem in problems] == [f"candidates.{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [("draw", 2, "run: "), ("tuning.scores.1", [1.0], "tuning.scores.1"), ("tuning.scores", [[0.0]], "tuning: ")],
)
def test_a_falsified_search_is_found(place: str, value: object, says: str) -> None:
    _, _, after = decided(searched())
    assert after.runs[1].spec
    path = record_path(runs_home(), after.runs[1].spec)
    assert verify(path).ok, verify(path).problems
    edit(path, put(place, value))
    assert any(says in problem for problem in verify(path).problems), verify(path).problems


def test_a_worse_draw_cannot_pass_for_the_chosen_one() -> None:
    candidates, finals, after = decided(searched())
    assert after.runs[1].spec
    path = record_path(runs_home(), after.runs[1].spec)
    assert finals[1].tuning
    scores = list(finals[1].tuning.scores)
    scores[(finals[1].draw + 1) % 3] = [1.0, 1.0]
    edit(path, put("tuning.scores", scores))
    problems = verify(path).problems
    assert any(problem.startswith("draw: ") for problem in problems), problems
    assert len(candidates) == 3


def test_where_every_draw_fails_the_cell_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    made = searched()
    after = made.decided({})
    (cell,) = after.runs
    assert cell.failed
    assert "no draw of the search can be chosen" in cell.reason


def test_a_draw_that_diverges_is_passed_over_and_billed() -> None:
    candidates, finals, _ = decided(searched(ranges={"recipe.lr": "{1e30}"}))
    assert [one.status for one in candidates] == ["finished", "failed", "failed"]
    assert finals[0].tuning
    assert finals[0].tuning.scores[1:] == [None, None]
    assert finals[0].draw == 0
    costs = [one.cost.scratch.n_fwd for one in candidates if one.cost]
    assert finals[0].tuning.cost.n_fwd == sum(costs) > costs[0]


def test_a_record_is_told_anew_when_a_candidate_is_made_again() -> None:
    """A draw that was given up, or failed for want of memory, may end another time."""
    made = searched()
    _, finals, after = decided(made)
    assert finals[0].tuning
    lost = made.sweeps[0].candidates[(finals[0].draw + 1) % 3]
    place = record_path(runs_home(), lost)
    edit(place, put("status", "failed"))
    edit(place, put("selection", None))
    again = run(after)
    assert again[1].predictions == finals[1].predictions
    assert again[1].cost == finals[1].cost
    assert again[1].tuning
    assert again[1].tuning.scores[lost.draw] is None
    assert after.runs[1].spec
    assert verify(record_path(runs_home(), after.runs[1].spec)).ok


def test_the_first_of_the_best_is_taken() -> None:
    assert first_best([None, [0.5], [0.7], [0.7], None]) == 2
    assert first_best([[0.7, 0.1], [0.7, 0.2]]) == 1
    assert first_best([None, None]) is None
    assert first_best([[0.0]]) == 0


def test_whole_searches_go_to_one_shard() -> None:
    both = plan([Request("tiny", name, seeds=SEEDS, tuning=2) for name in ("groupdro", "resample")])
    parts = [shard(both, f"{i}/2") for i in (1, 2)]
    assert [[sweep.label for sweep in part.sweeps] for part in parts] == [
        [both.sweeps[0].label],
        [both.sweeps[1].label],
    ]


def test_a_draw_beyond_what_a_setting_takes_is_refused() -> None:
    with pytest.raises(UserError, match=r"draw 1: groupdro.step_size must be at least 0.*narrower range"):
        searched(ranges={"groupdro.step_size": "U(-2,-1)"})


def test_a_range_that_reaches_no_draw_is_refused(call: Call) -> None:
    with pytest.raises(UserError, match=r"dfr\.n_min reaches no run"):
        searched(ranges={"dfr.n_min": "{1,2}"})
    done = call("run", "--dataset", "tiny", "--method", "erm", "--search", "recipe.lr={1}")
    assert (done.code, done.out) == (2, "")
    assert "nothing is searched" in done.err


def test_only_a_paper_has_a_selection_rule_of_its_own() -> None:
    with pytest.raises(UserError, match="only under protocol paper"):
        plan([Request("tiny", "erm", criterion="val-wga-avg")])
    with pytest.raises(UserError, match="needs validation attributes, budget none grants none"):
        plan([Request("tiny", "erm", criterion="val-wga-avg", protocol="paper")])


def test_a_papers_rule_selects_and_is_verified() -> None:
    made = plan([Request("tiny", "erm", "select", seeds=(0,), criterion="val-wga-avg", protocol="paper")])
    (record,) = run(made)
    assert record.selection
    assert (record.protocol, record.selection.criterion) == ("paper", "val-wga-avg")
    assert made.runs[0].spec
    path = record_path(runs_home(), made.runs[0].spec)
    assert verify(path).ok, verify(path).problems
    edit(path, put("criterion", "val-mean"))
    assert any("selection.criterion" in problem for problem in verify(path).problems)


def test_tune_prints_every_draw_and_run_takes_it_up(call: Call, home: Path) -> None:
    common = ("--dataset", "tiny", "--method", "groupdro", "--set", "recipe.epochs=1", "--jobs", "1")
    done = call("tune", *common, "--draws", "2", "--quiet")
    assert done.code == 0, done.err
    assert "the defaults" in done.out
    assert "recipe.lr=" in done.out
    assert "is chosen" in done.out
    made = {path: path.read_bytes() for path in find(runs_home())}
    done = call("run", *common, "--tuning", "2", "--seeds", "0", "--quiet")
    assert done.code == 0, done.err
    assert " of 2)" in done.out
    assert made.items() <= {path: path.read_bytes() for path in find(runs_home())}.items()
    assert sum(bool(read(path).candidates) for path in find(runs_home())) == 1


def test_tune_refuses_what_cannot_run(call: Call) -> None:
    done = call("tune", "--dataset", "tiny", "--method", "ex2l", "--budget", "none")
    assert (done.code, done.out) == (2, "")
    assert "n/a" in done.err
