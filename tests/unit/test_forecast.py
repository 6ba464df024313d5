"""What a plan will take: seconds from records, ratios where there are none, and honest gaps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import plan_tiny
from worstgroup.benchmark import forecast
from worstgroup.benchmark.forecast import Device, Forecast, History, foretell
from worstgroup.benchmark.home import artifacts_home, runs_home
from worstgroup.benchmark.planning import Plan, Request, plan
from worstgroup.benchmark.provenance import device_name
from worstgroup.benchmark.record import Cost, RunRecord, Stage, find, read, record_path, write
from worstgroup.benchmark.runner import run_spec
from worstgroup.benchmark.scheduling import Job
from worstgroup.benchmark.spec import RunSpec
from worstgroup.commands.plan_report import about, lines

pytestmark = pytest.mark.usefixtures("tiny")
HERE = Device("this one", 1)
PER_EPOCH = 96
"""Images of `tiny`, which trains for two epochs."""


def stage(seconds: float, *, epochs: float = 2, trains: bool = True) -> Stage:
    """A stage of so many device seconds; its wall time is a half longer, and 1 s of evaluation comes on top."""
    passes = round(PER_EPOCH * epochs)
    names = ("n_bwd", "n_fwd_nograd", "n_head_fits", "flops", "peak_mem_mib")
    return Stage(
        device_s=seconds,
        wall_s=1.5 * seconds,
        eval_s=1.0,
        n_fwd=passes,
        n_updates=2 * trains,
        **dict.fromkeys(names, 0),
    )


def specs(*methods: str, seeds: tuple[int, ...] = (0,), **settings: str) -> list[RunSpec]:
    return [run.spec for run in plan_tiny(*methods, seeds=seeds, **settings).runs if run.spec]


@pytest.fixture
def known(finished_home: Path) -> dict[str, RunRecord]:
    """A real record of every method."""
    return {(found := read(path)).method: found for path in find(finished_home / "runs")}


Past = dict[str, Any]


@pytest.fixture
def past(known: dict[str, RunRecord]) -> Any:
    """Makes the record of a run with costs of one's own: `past(spec, {"train": stage(4)}, {"erm:k": stage(2)})`."""

    def make(spec: RunSpec, own: dict[str, Stage], shared: dict[str, Stage] | None = None, **env: Any) -> RunRecord:
        shared = shared or {}
        marginal = sum(part.device_s for part in own.values())
        total = marginal + sum(part.device_s for part in shared.values())
        cost = Cost(stages=own, shared=shared, marginal=stage(marginal), scratch=stage(total))
        fields = {"seed": spec.block.seed, "config": dict(spec.config), "code": spec.code, "budget": str(spec.budget)}
        fields |= {"dataset": spec.block.dataset, "backbone": spec.block.backbone, "run": spec.hash}
        told = {"device": HERE.name, "device_type": "cpu", "threads": HERE.threads, "session": "one"} | env
        return known[spec.method].model_copy(update={**fields, "cost": cost, "env": told})

    return make


def history(own: list[RunRecord], others: list[RunRecord] = [], device: Device = HERE) -> History:  # noqa: B006
    return History(own, others, device)


# ----------------------------------------------------------------------------------------------------------- seconds


def test_seconds_are_the_median_of_like_runs_with_evaluation(past: Any) -> None:
    made = [past(spec, {"train": stage(2.0 + i)}) for i, spec in enumerate(specs("groupdro", seeds=(0, 1, 2)))]
    (asked,) = specs("groupdro", seeds=(7,))
    found = history(made).estimate(asked)
    assert found == forecast.Estimate(own=1.5 * 3.0 + 1.0, needs={})


def test_trainings_are_scaled_to_the_epochs_and_solvers_are_not(past: Any) -> None:
    (made,) = specs("groupdro")
    (asked,) = specs("groupdro", recipe__epochs="6")
    record = past(made, {"train": stage(2.0), "head": stage(2.0, trains=False)})
    found = history([record]).estimate(asked)
    assert found is not None
    assert found.own == pytest.approx(3 * 4.0 + 4.0)


def test_settings_and_budget_are_matched_where_they_can_be(past: Any) -> None:
    usual, other = specs("groupdro")[0], specs("groupdro", groupdro__step_size="0.5")[0]
    told = history([past(usual, {"train": stage(2.0)}), past(other, {"train": stage(8.0)})])
    asked = {size: specs("groupdro", seeds=(3,), groupdro__step_size=size)[0] for size in ("0.5", "0.7")}
    found = {size: told.estimate(spec) for size, spec in asked.items()}
    assert found["0.5"] == forecast.Estimate(13.0, {})
    assert found["0.7"] == forecast.Estimate(median_of(4.0, 13.0), {})


def median_of(one: float, other: float) -> float:
    return (one + other) / 2


def test_the_shared_erm_is_billed_whole_whatever_share_a_run_needs(past: Any) -> None:
    (asked,) = specs("dfr", seeds=(5,))
    record = past(specs("dfr")[0], {"head": stage(0.2)}, {"erm:a": stage(3.0, epochs=0.5)})
    told = history([record])
    assert told.erm(asked.block) == pytest.approx(4 * (1.5 * 3 + 1))
    found = told.estimate(asked)
    assert found is not None
    assert found.needs == {forecast.erm_name(asked.block): pytest.approx(4 * (1.5 * 3 + 1))}


@pytest.mark.parametrize("env", [{"device": "another"}, {"threads": 4}, {"device": "another", "device_type": "cuda"}])
def test_seconds_of_another_device_tell_ratios_only(past: Any, env: dict[str, Any]) -> None:
    """GroupDRO took 1.5 times as long as ERM there; here ERM takes 2 device seconds: 4 with evaluation."""
    erm, groupdro = specs("erm", "groupdro")
    there = [past(erm, {}, {"erm:a": stage(40.0)}, **env), past(groupdro, {"train": stage(60.0)}, **env)]
    assert history(there).estimate(groupdro) is None
    here = past(erm, {}, {"erm:a": stage(2.0)})
    for told in (history([*there, here]), history([here], there)):
        assert told.estimate(groupdro) == forecast.Estimate(1.5 * 4.0, {}, by_ratio=True)


def test_threads_do_not_matter_on_a_gpu(past: Any) -> None:
    (asked,) = specs("groupdro")
    record = past(asked, {"train": stage(2.0)}, device_type="cuda", threads=4)
    assert history([record]).estimate(asked) == forecast.Estimate(4.0, {})


def test_records_of_other_places_tell_ratios_only_even_of_a_device_of_this_name(past: Any) -> None:
    erm, groupdro = specs("erm", "groupdro")
    others = [past(erm, {}, {"erm:a": stage(2.0)}), past(groupdro, {"train": stage(2.0)})]
    assert history([], others).estimate(groupdro) is None
    assert history([], others).erm(erm.block) is None


def test_a_ratio_is_to_the_erm_of_its_own_session(past: Any) -> None:
    erm, groupdro = specs("erm", "groupdro")
    others = [
        past(erm, {}, {"erm:a": stage(1.0)}, session="fast"),
        past(groupdro, {"train": stage(2.0)}, session="fast"),
    ]
    others.append(past(specs("erm", seeds=(1,))[0], {}, {"erm:b": stage(10.0)}, session="slow"))
    found = history([past(erm, {}, {"erm:a": stage(2.0)})], others).estimate(groupdro)
    assert found == forecast.Estimate(2 * 4.0, {}, by_ratio=True)


def test_a_ratio_without_an_erm_beside_it_is_none(past: Any) -> None:
    erm, groupdro = specs("erm", "groupdro")
    here, other = past(erm, {}, {"erm:a": stage(2.0)}), past(groupdro, {"train": stage(2.0)}, session="alone")
    assert history([here], [other]).estimate(groupdro) is None


def test_ratios_of_the_same_backbone_go_before_others(past: Any) -> None:
    erm, groupdro = specs("erm", "groupdro")

    def of(spec: RunSpec, dataset: str, backbone: str) -> RunSpec:
        return replace(spec, block=replace(spec.block, dataset=dataset, backbone=backbone))

    others = []
    for dataset, backbone, factor in [("far", "tiny_cnn", 2), ("far", "resnet50", 7)]:
        others.append(past(of(erm, dataset, backbone), {}, {"erm:z": stage(1.0)}))
        others.append(past(of(groupdro, dataset, backbone), {"train": stage(factor)}))
    found = history([past(erm, {}, {"erm:a": stage(2.0)})], others).estimate(groupdro)
    assert found == forecast.Estimate(2 * 4.0, {}, by_ratio=True)


def test_failed_runs_tell_no_seconds(past: Any) -> None:
    (asked,) = specs("groupdro")
    failed = past(asked, {"train": stage(2.0)}).model_copy(update={"status": "failed"})
    assert history([failed]).estimate(asked) is None


# ------------------------------------------------------------------------------------------------------ shared things


def test_the_name_of_the_shared_erm_is_that_of_its_artifact() -> None:
    """What the forecast looks for is what a run makes."""
    made = plan_tiny("erm")
    (spec,) = [run.spec for run in made.runs if run.spec]
    name = forecast.erm_name(spec.block)
    job = Job(spec.hash, 0.0, {name: 1.0})
    assert forecast.there([job]) == set()
    record = run_spec(spec, made.stores["tiny"])
    assert record.cost is not None
    assert list(record.cost.shared) == [name]
    assert forecast.there([job]) == {name}


def test_other_shared_things_are_looked_for_only_under_the_key_of_this_block(past: Any) -> None:
    """A record of the same block names the very artifact; that of another seed only tells that there is one."""
    made, other = specs("groupdro", seeds=(0, 1))
    told = history([past(made, {"train": stage(2.0)}, {"partition:abc": stage(1.0, trains=False)})])
    (same,), (moved,) = (found.needs for found in map(told.estimate, (made, other)) if found)
    assert same == "partition:abc"
    assert moved == f"partition:abc@{other.block.key}"
    folder = artifacts_home() / "partition" / "abc"
    folder.mkdir(parents=True)
    (folder / "meta.json").touch()
    assert forecast.there(forecast.jobs([made, other], told)) == {"partition:abc"}


def test_a_name_that_no_file_can_have_is_not_there() -> None:
    assert forecast.there([Job("a", 0, {"erm:" + "x" * 5000: 1.0, "no kind": 1.0})]) == set()


def test_a_run_of_which_nothing_is_known_may_need_the_shared_erm_unless_it_is_a_plain_objective() -> None:
    asked = specs("groupdro", "dfr", "groupdro+george")
    name = forecast.erm_name(asked[0].block)
    needs = [job.needs for job in forecast.jobs(asked, history([]))]
    assert needs == [{}, {name: 1.0}, {name: 1.0}]


def test_without_seconds_of_this_device_runs_are_ordered_in_units_of_an_erm(past: Any) -> None:
    erm, groupdro, dfr = specs("erm", "groupdro", "dfr")
    others = [
        past(erm, {}, {"erm:a": stage(10.0)}),
        past(groupdro, {"train": stage(15.0)}),
        past(dfr, {"head": stage(1.0)}, {"erm:a": stage(10.0)}),
    ]
    jobs = forecast.jobs([erm, groupdro, dfr], history([], others))
    assert [job.own for job in jobs] == pytest.approx([0.0, 1.5, 0.1])
    assert [sum(job.needs.values()) for job in jobs] == [1.0, 0.0, 1.0]


# ------------------------------------------------------------------------------------------------------------- plans


@pytest.fixture
def mixed(past: Any) -> tuple[list[RunSpec], History]:
    """Two seeds of runs: ERM takes 4 s, DFR's head 1 s beyond, GroupDRO 7 s; of reweighting nothing is known."""
    told = history(
        [
            past(specs("erm")[0], {}, {"erm:a": stage(2.0)}),
            past(specs("dfr")[0], {"head": stage(0.0)}, {"erm:a": stage(2.0)}),
            past(specs("groupdro")[0], {"train": stage(4.0)}),
        ]
    )
    return specs("erm", "dfr", "groupdro", "reweight", seeds=(3, 4)), told


def new(asked: list[RunSpec]) -> dict[str, forecast.State]:
    return dict.fromkeys((spec.hash for spec in asked), "new")


@pytest.mark.parametrize(("workers", "wall"), [(1, 2 * (4 + 1 + 7)), (2, 12), (4, 7), (9, 7)])
def test_a_forecast_counts_the_shared_erm_once_and_leaves_out_what_is_unknown(
    mixed: tuple[list[RunSpec], History], workers: int, wall: float
) -> None:
    asked, told = mixed
    found = foretell([asked], new(asked), told, workers)
    assert found.wall_s == pytest.approx(wall)
    by_method = {spec.method: found.seconds.get(spec.hash) for spec in asked}
    assert by_method == {"erm": 4.0, "dfr": 1.0, "groupdro": 7.0, "reweight": None}
    assert [(one.block.seed, one.made, one.seconds, one.certain) for one in found.shared] == [
        (3, False, 4.0, True),
        (4, False, 4.0, True),
    ]
    assert len(found.missing) == 8


def test_finished_runs_take_no_time(mixed: tuple[list[RunSpec], History]) -> None:
    asked, told = mixed
    states = {spec.hash: "finished" if spec.method != "dfr" else "failed" for spec in asked}
    found = foretell([asked], states, told, 1)  # type: ignore[arg-type]
    assert found.wall_s == pytest.approx(2 * 1 + 2 * 4)  # the artifacts of the finished runs are gone
    assert len(found.missing) == 2


def test_a_later_round_starts_when_the_one_before_has_ended(mixed: tuple[list[RunSpec], History]) -> None:
    asked, told = mixed
    first, second = [spec for spec in asked if spec.method == "erm"], [spec for spec in asked if spec.method == "dfr"]
    found = foretell([first, second, first], new(asked), told, 2)
    assert found.wall_s == pytest.approx(4 + 1)


def test_how_runs_stand_in_the_home(runs: Path) -> None:
    done, other = specs("erm", seeds=(0, 9))
    failed, changed, _ = specs("groupdro", "dfr", "reweight")
    path = record_path(runs_home(), failed)
    write(path, read(path).model_copy(update={"status": "failed", "error": "x"}), None)
    changed = replace(changed, code="0" * 16)
    told = forecast.read_history(HERE, [done])
    assert list(forecast.states([done, other, failed, changed], told).values()) == [
        "finished",
        "new",
        "failed",
        "stale",
    ]


def searched(*seeds: int) -> Plan:
    return plan([Request("tiny", "groupdro", seeds=seeds, tuning=2, settings={"recipe.epochs": "2"})])


def test_runs_that_follow_from_a_search_are_predicted_with_it(past: Any) -> None:
    told = history([past(specs("groupdro")[0], {"train": stage(4.0)})])
    found = forecast.of_plan(searched(0, 1, 2), told, 1)
    assert len(found.missing) == 2 + 2
    assert found.wall_s == pytest.approx(4 * 7.0)


def test_a_search_that_has_ended_names_the_runs_that_follow(home: Path) -> None:
    made = searched(0, 1)
    assert forecast.settled(made).sweeps == made.sweeps
    for candidate in made.searched():
        assert candidate.spec is not None
        assert run_spec(candidate.spec, made.stores["tiny"]).status == "finished"
    after = forecast.settled(made)
    assert after.sweeps == []
    assert [run.spec.block.seed for run in after.runs if run.spec and run.spec.candidates] == [0, 1]


def test_damaged_records_tell_nothing(runs: Path) -> None:
    device, asked = Device(device_name(), 1), specs("erm", seeds=(9,))
    before = forecast.read_history(device, asked).estimate(asked[0])
    (runs / "tiny" / "broken.json").write_text("{")
    after = forecast.read_history(device, asked).estimate(asked[0])
    assert before == after
    assert before is not None


# -------------------------------------------------------------------------------------------------------------- text


def test_the_text_tells_states_shared_things_and_the_total(mixed: tuple[list[RunSpec], History]) -> None:
    asked, told = mixed
    made = plan_tiny("erm", "dfr", "groupdro", "reweight", seeds=(3, 4))
    states = new(asked) | {asked[0].hash: "finished", asked[2].hash: "stale", asked[4].hash: "failed"}
    text = list(lines(made, foretell([asked], states, told, 2)))  # type: ignore[arg-type]
    assert text == [
        "erm on tiny · none · seed 3: finished",
        "erm on tiny · none · seed 4: to run, about 4 s",
        "dfr on tiny · val · seed 3: to run again, its code has changed, about 5 s",
        "dfr on tiny · val · seed 4: to run, about 1 s",
        "groupdro on tiny · train+val · seed 3: to run again, it failed, about 7 s",
        "groupdro on tiny · train+val · seed 4: to run, about 7 s",
        "reweight on tiny · train+val · seed 3: to run, cost unknown",
        "reweight on tiny · train+val · seed 4: to run, cost unknown",
        "",
        "shared ERM of tiny · tiny_cnn · seeds 3, 4: to be made first, about 4 s each",
        "about 12 s on 2 workers: 7 to run, 1 finished; 2 of them have no recorded cost and are not in it",
    ]


def test_the_text_where_nothing_is_known() -> None:
    made = plan_tiny("dfr")
    asked = [run.spec for run in made.runs if run.spec]
    *_, shared, total = lines(made, foretell([asked], new(asked), history([]), 1))
    assert shared == "shared ERM of tiny · tiny_cnn · seed 0: to be made first, if a run needs it, cost unknown"
    assert total.startswith("1 to run, 0 finished; how long is not known before a run of erm was timed on this device")


def test_the_text_where_nothing_is_to_run() -> None:
    made = plan_tiny("erm")
    asked = [run.spec for run in made.runs if run.spec]
    found = Forecast(2, dict.fromkeys((spec.hash for spec in asked), "finished"), {})
    assert list(lines(made, found)) == ["erm on tiny · none · seed 0: finished", "", "nothing to run, 1 finished"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "under 1 s"),
        (1.4, "about 1 s"),
        (99.0, "about 99 s"),
        (100.0, "about 2 min"),
        (59 * 60, "about 59 min"),
        (7500.0, "about 2 h 05 min"),
    ],
)
def test_seconds_are_told_as_exactly_as_they_are_known(seconds: float, text: str) -> None:
    assert about(seconds) == text
