"""What a plan will take: seconds from records, ratios where there are none, and honest gaps."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import plan_tiny
from worstgroup.benchmark import forecast
from worstgroup.benchmark.forecast import Forecast, foretell
from worstgroup.benchmark.history import Device, Estimate, History, Trained, erm_name, grows, read_history
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
PER_EPOCH, BATCHES = 96, 6
"""Images of `tiny`, which trains for two epochs, and their batches."""


def stage(seconds: float, *, epochs: float = 2, trains: bool = True) -> Stage:
    """A stage of so many device seconds; its wall time is a half longer, and 1 s of evaluation comes on top."""
    passes = round(PER_EPOCH * epochs)
    names = ("n_bwd", "n_fwd_nograd", "n_head_fits", "flops", "peak_mem_mib")
    return Stage(
        device_s=seconds,
        wall_s=1.5 * seconds,
        eval_s=1.0,
        n_fwd=passes,
        n_updates=round(BATCHES * epochs) * trains,
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
        fields |= {"recipe": asdict(spec.block.recipe), "history": []}
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
    assert found == Estimate(own=1.5 * 3.0 + 1.0, needs={})


def test_trainings_are_scaled_to_the_epochs_and_solvers_are_not(past: Any) -> None:
    (made,) = specs("groupdro")
    (asked,) = specs("groupdro", recipe__epochs="6")
    record = past(made, {"train": stage(2.0), "head": stage(2.0, trains=False)})
    found = history([record]).estimate(asked)
    assert found is not None
    assert found.own == pytest.approx(3 * 4.0 + 4.0)


@pytest.mark.parametrize(
    ("epochs", "seconds"), [(2, 3 * 4.0), (1.5, 3 * 4.0), (7 / 6, 3 * 4.0), (2.5, 4.0), (8, 4.0), (1, 4.0), (0.5, 4.0)]
)
def test_a_training_of_a_length_of_its_own_is_not_scaled(past: Any, epochs: float, seconds: float) -> None:
    """Of one recipe, here of two epochs, only its updates tell whether it is as long as that."""
    (made,), (asked,) = specs("groupdro"), specs("groupdro", recipe__epochs="6")
    found = history([past(made, {"train": stage(2.0, epochs=epochs)})]).estimate(asked)
    assert found == Estimate(pytest.approx(seconds), {})


def test_the_last_training_is_the_one_whose_epochs_are_recorded(past: Any, known: dict[str, RunRecord]) -> None:
    """The first has as many updates as the recipe's; of the second it is known that it has other epochs."""
    (made,), (asked,) = specs("groupdro"), specs("groupdro", recipe__epochs="6")
    record = past(made, {"first": stage(0.0), "train": stage(2.0), "head": stage(2.0, trains=False)})
    record = record.model_copy(update={"history": 8 * known["groupdro"].history[:1]})
    assert history([record]).estimate(asked) == Estimate(pytest.approx(3 * 1.0 + 4.0 + 4.0), {})


@pytest.mark.parametrize(
    ("epochs", "seconds"),
    [((1, 1), 4.0), ((2, 2), 4.0), ((1, 2), 3 * 4.0), ((2, 4), 3 * 4.0), ((1, 3), 3 * 4.0), ((0.5, 1), 3 * 4.0)],
)
def test_records_of_two_recipes_tell_whether_a_training_is_as_long_as_they_say(
    past: Any, epochs: tuple[float, float], seconds: float
) -> None:
    """Those of two and of four epochs, however short or long; six are asked for. What is nearest to them tells."""
    short, long, asked = (specs("groupdro", recipe__epochs=str(n))[0] for n in (2, 4, 6))
    pair = [past(spec, {"train": stage(2.0, epochs=n)}) for spec, n in zip((short, long), epochs, strict=True)]
    found = history([pair[0]], [pair[1]]).estimate(asked)  # the other one may come from anywhere
    assert found == Estimate(pytest.approx(seconds), {})


def test_a_training_of_so_many_updates_is_the_same_on_other_data() -> None:
    assert not grows({2: Trained(300, 3.0), 4: Trained(300, 6.0)})
    assert grows({2: Trained(300, 3.0), 4: Trained(299, 6.0)})


@pytest.mark.parametrize(
    ("recipe", "erm_epochs", "epochs", "alike"),
    [
        (15, 15.0, 15, True),
        (15, 14.0, 14, True),  # one epoch is left out
        (15, 3.0, 15, True),  # an adversary takes most of the steps
        (15, 10.0, 10, False),
        (15, 19.7, 10, False),  # the head of MaC
        (10, 19.7, 10, False),  # and where it has as many epochs, of smaller batches
        (1, 1.0, 2, False),  # or more, of larger ones
        (2, 1.0, 1, False),
        (15, 12.0, 0, True),
        (15, 7.0, 0, False),
        (15, 27.6, 0, False),
    ],
)
def test_one_recipe_tells_by_epochs_and_updates(recipe: int, erm_epochs: float, epochs: int, alike: bool) -> None:
    assert Trained(99, erm_epochs, epochs).is_of(recipe) == alike


def test_records_of_the_same_epochs_go_before_others(past: Any) -> None:
    usual, longer = specs("groupdro")[0], specs("groupdro", recipe__epochs="4")[0]
    told = history([past(usual, {"train": stage(2.0)}), past(longer, {"train": stage(8.0, epochs=4)})])
    (asked,) = specs("groupdro", seeds=(3,), recipe__epochs="4")
    assert told.estimate(asked) == Estimate(13.0, {})


def test_the_head_of_mac_is_as_long_as_its_own_epochs_say(home: Path) -> None:
    settings = {"mac__epochs": "2", "recipe__epochs": "1"}
    made = plan_tiny("mac", **settings)
    (spec,) = [run.spec for run in made.runs if run.spec]
    record = run_spec(spec, made.stores["tiny"])
    assert record.cost is not None
    own = sum(part.wall_s + part.eval_s for part in record.cost.stages.values())
    told = read_history(Device(device_name(), 1), [spec])
    for epochs in (1, 10):
        (asked,) = specs("mac", **settings | {"recipe__epochs": str(epochs)})
        found = told.estimate(asked)
        assert found is not None
        assert found.own == pytest.approx(own)
        assert found.needs[erm_name(asked.block)] == pytest.approx((told.erm(spec.block) or 0) * epochs)


def test_a_ratio_grows_with_the_epochs_only_where_the_method_does(past: Any) -> None:
    """On six epochs ERM takes three times as long as on two; so does a training, but no solver's head."""
    others = [
        past(specs("erm")[0], {}, {"erm:a": stage(2.0)}),
        past(specs("groupdro")[0], {"train": stage(3.0), "head": stage(2.0, trains=False)}),
    ]
    here = past(specs("erm")[0], {}, {"erm:a": stage(2.0)})
    (asked,) = specs("groupdro", recipe__epochs="6")
    found = history([here], others).estimate(asked)
    assert found == Estimate(pytest.approx((3 * 3 + 2) / 2 * 4.0), {}, by_ratio=True)


def test_more_images_than_those_of_train_make_a_training_no_other_one(past: Any) -> None:
    """Those of validation that a budget grants are in it."""
    (made,), (asked,) = specs("groupdro"), specs("groupdro", recipe__epochs="6")
    val = sum(group.m_val for group in past(made, {}).groups)
    assert val
    epochs = 2 * (PER_EPOCH + val) / PER_EPOCH
    record = past(made, {"train": stage(2.0, epochs=epochs)}).model_copy(update={"extra": "val"})
    found = history([record]).estimate(replace(asked, extra="val"))
    assert found is not None
    assert found.own == pytest.approx(3 * 4.0)


def test_settings_that_are_lists_in_a_record_are_matched(past: Any) -> None:
    usual, other = specs("dfr")[0], specs("dfr", dfr__c_grid="1.0")[0]
    told = [past(usual, {"head": stage(2.0)}), past(other, {"head": stage(8.0)})]
    told = [RunRecord.model_validate_json(record.to_json()) for record in told]
    found = [history(told).estimate(spec) for spec in (usual, other)]
    assert [one.own for one in found if one] == [4.0, 13.0]


def test_settings_and_budget_are_matched_where_they_can_be(past: Any) -> None:
    usual, other = specs("groupdro")[0], specs("groupdro", groupdro__step_size="0.5")[0]
    told = history([past(usual, {"train": stage(2.0)}), past(other, {"train": stage(8.0)})])
    asked = {size: specs("groupdro", seeds=(3,), groupdro__step_size=size)[0] for size in ("0.5", "0.7")}
    found = {size: told.estimate(spec) for size, spec in asked.items()}
    assert found["0.5"] == Estimate(13.0, {})
    assert found["0.7"] == Estimate(median_of(4.0, 13.0), {})


def median_of(one: float, other: float) -> float:
    return (one + other) / 2


def test_the_shared_erm_is_billed_whole_whatever_share_a_run_needs(past: Any) -> None:
    (asked,) = specs("dfr", seeds=(5,))
    record = past(specs("dfr")[0], {"head": stage(0.2)}, {"erm:a": stage(3.0, epochs=0.5)})
    told = history([record])
    assert told.erm(asked.block) == pytest.approx(4 * (1.5 * 3 + 1))
    found = told.estimate(asked)
    assert found is not None
    assert found.needs == {erm_name(asked.block): pytest.approx(4 * (1.5 * 3 + 1))}


@pytest.mark.parametrize("env", [{"device": "another"}, {"threads": 4}, {"device": "another", "device_type": "cuda"}])
def test_seconds_of_another_device_tell_ratios_only(past: Any, env: dict[str, Any]) -> None:
    """GroupDRO took 1.5 times as long as ERM there; here ERM takes 2 device seconds: 4 with evaluation."""
    erm, groupdro = specs("erm", "groupdro")
    there = [past(erm, {}, {"erm:a": stage(40.0)}, **env), past(groupdro, {"train": stage(60.0)}, **env)]
    assert history(there).estimate(groupdro) == Estimate(1.5, {}, by_ratio=True, timed=False)
    here = past(erm, {}, {"erm:a": stage(2.0)})
    for told in (history([*there, here]), history([here], there)):
        assert told.estimate(groupdro) == Estimate(1.5 * 4.0, {}, by_ratio=True)


def test_threads_do_not_matter_on_a_gpu(past: Any) -> None:
    (asked,) = specs("groupdro")
    record = past(asked, {"train": stage(2.0)}, device_type="cuda", threads=4)
    assert history([record]).estimate(asked) == Estimate(4.0, {})


@pytest.mark.parametrize(
    ("env", "seconds"),
    [
        ({"device_type": "cuda", "sharers": 4}, 1.0),
        ({"device_type": "cuda", "sharers": 1}, 4.0),
        ({"device_type": "cuda", "sharers": None}, 4.0),
        ({"device_type": "cuda", "sharers": 0}, 4.0),
        ({"device_type": "cuda", "sharers": "four"}, 4.0),
        ({"sharers": 4}, 4.0),
    ],
)
def test_seconds_that_several_workers_had_of_a_gpu_are_shared_out(
    past: Any, env: dict[str, Any], seconds: float
) -> None:
    (asked,) = specs("groupdro")
    found = history([past(asked, {"train": stage(2.0)}, **env)])
    assert found.estimate(asked) == Estimate(seconds, {})


def test_a_ratio_is_one_of_runs_that_have_a_gpu_alone(past: Any) -> None:
    erm, groupdro = specs("erm", "groupdro")
    others = [
        past(erm, {}, {"erm:a": stage(2.0)}, device_type="cuda"),
        past(groupdro, {"train": stage(12.0)}, device_type="cuda", sharers=4),
    ]
    found = history([past(erm, {}, {"erm:a": stage(2.0)})], others).estimate(groupdro)
    assert found == Estimate(1.5 * 4.0, {}, by_ratio=True)


def test_records_of_other_places_tell_ratios_only_even_of_a_device_of_this_name(past: Any) -> None:
    erm, groupdro = specs("erm", "groupdro")
    others = [past(erm, {}, {"erm:a": stage(2.0)}), past(groupdro, {"train": stage(2.0)})]
    assert history([], others).estimate(groupdro) == Estimate(1.0, {}, by_ratio=True, timed=False)
    assert history([], others).erm(erm.block) is None


def test_a_ratio_is_to_the_erm_of_its_own_session(past: Any) -> None:
    erm, groupdro = specs("erm", "groupdro")
    others = [
        past(erm, {}, {"erm:a": stage(1.0)}, session="fast"),
        past(groupdro, {"train": stage(2.0)}, session="fast"),
    ]
    others.append(past(specs("erm", seeds=(1,))[0], {}, {"erm:b": stage(10.0)}, session="slow"))
    found = history([past(erm, {}, {"erm:a": stage(2.0)})], others).estimate(groupdro)
    assert found == Estimate(2 * 4.0, {}, by_ratio=True)


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
    assert found == Estimate(2 * 4.0, {}, by_ratio=True)


def test_failed_runs_tell_no_seconds(past: Any) -> None:
    (asked,) = specs("groupdro")
    failed = past(asked, {"train": stage(2.0)}).model_copy(update={"status": "failed"})
    assert history([failed]).estimate(asked) is None


# ------------------------------------------------------------------------------------------------------ shared things


def test_the_name_of_the_shared_erm_is_that_of_its_artifact() -> None:
    """What the forecast looks for is what a run makes."""
    made = plan_tiny("erm")
    (spec,) = [run.spec for run in made.runs if run.spec]
    name = erm_name(spec.block)
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
    name = erm_name(asked[0].block)
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


@pytest.mark.parametrize(
    ("workers", "gpus", "wall", "times"), [(1, 1, 24, 1), (4, 1, 24, 4), (4, 2, 12, 2), (2, 4, 12, 1)]
)
def test_workers_that_share_a_gpu_are_no_faster_than_one(
    mixed: tuple[list[RunSpec], History], workers: int, gpus: int, wall: float, times: int
) -> None:
    asked, told = mixed
    found = foretell([asked], new(asked), told, workers, gpus)
    assert found.wall_s == pytest.approx(wall)
    assert {found.seconds[spec.hash] for spec in asked if spec.method == "groupdro"} == {7.0 * times}
    assert {one.seconds for one in found.shared} == {4.0 * times}


def test_who_is_alone_on_a_gpu_shares_it_with_nobody(mixed: tuple[list[RunSpec], History]) -> None:
    asked, told = mixed
    last = [spec for spec in asked if spec.method == "groupdro"][:1]
    found = foretell([last], new(last), told, 4, 1)
    assert (found.wall_s, *found.seconds.values()) == (7.0, 7.0)


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
    told = read_history(HERE, [done])
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


def test_of_a_search_that_has_not_ended_no_later_run_counts_as_made(home: Path) -> None:
    """Draw 0 is there on another seed, from before the search; but which draw will be chosen?"""
    made = plan([Request("tiny", "groupdro", seeds=(0, 1), settings={"recipe.epochs": "2"})])
    for run in made.runs:
        assert run.spec is not None
        assert run_spec(run.spec, made.stores["tiny"]).status == "finished"
    told = read_history(Device(device_name(), 1), [run.spec for run in made.runs if run.spec])
    found = forecast.of_plan(searched(0, 1), told, 1)
    assert sorted(found.states.values()) == ["finished", "new", "new"]


def test_draws_that_are_judged_by_those_before_go_one_after_another(past: Any) -> None:
    told = history([past(specs("groupdro")[0], {"train": stage(4.0)})])
    asked = searched(0, 1, 2)
    assert forecast.of_plan(asked, told, 2).wall_s == pytest.approx(2 * 7.0)
    assert forecast.of_plan(asked, told, 2, one_by_one=True).wall_s == pytest.approx(3 * 7.0)


def test_a_search_that_has_ended_names_the_runs_that_follow(home: Path) -> None:
    made = searched(0, 1)
    assert forecast.settled(made).sweeps == made.sweeps
    for candidate in made.searched():
        assert candidate.spec is not None
        assert run_spec(candidate.spec, made.stores["tiny"]).status == "finished"
    after = forecast.settled(made)
    assert after.sweeps == []
    assert [run.spec.block.seed for run in after.runs if run.spec and run.spec.candidates] == [0, 1]
    told = read_history(Device(device_name(), 1), [run.spec for run in after.runs if run.spec])
    found = forecast.of_plan(after, told, 1)
    first, second = [run.spec for run in after.runs if run.spec]
    assert dict(found.states) == {first.hash: "adopted", second.hash: "new"}
    assert found.seconds[first.hash] == 0.0
    assert found.wall_s == found.seconds[second.hash] > 0.0
    assert found.missing == [second.hash]
    copied, *_, total = lines(after, found)
    assert copied.endswith("seed 0 · draw 0: made already, to be copied, under 1 s")
    assert total.endswith(" on 1 worker: 1 to run, 1 to be copied, 0 finished")
    assert run_spec(first, after.stores["tiny"]).status == run_spec(second, after.stores["tiny"]).status == "finished"
    assert set(forecast.of_plan(after, told, 1).states.values()) == {"finished"}


def test_damaged_records_tell_nothing(runs: Path) -> None:
    device, asked = Device(device_name(), 1), specs("erm", seeds=(9,))
    before = read_history(device, asked).estimate(asked[0])
    (runs / "tiny" / "broken.json").write_text("{")
    after = read_history(device, asked).estimate(asked[0])
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


def test_without_workers_of_this_machine_nothing_is_predicted(mixed: tuple[list[RunSpec], History]) -> None:
    made = plan_tiny("erm", "groupdro", seeds=(3,))
    assert list(lines(made, forecast.of_plan(made, mixed[1], 0))) == [
        "erm on tiny · none · seed 3: to run",
        "groupdro on tiny · train+val · seed 3: to run",
        "",
        "2 to run, 0 finished; how long is not predicted for a Ray cluster: its nodes are not known before it is used",
    ]


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
