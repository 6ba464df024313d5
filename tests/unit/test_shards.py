"""`--shard i/n`: the parts of a plan are the plan and do not overlap; runs of two parts share no ERM."""

import pytest
from worstgroup.benchmark.executors import shard
from worstgroup.benchmark.planning import Plan, Request, plan

SEEDS = (0, 1, 2, 3, 4)


@pytest.fixture
def whole() -> Plan:
    """Plain runs of three methods in five blocks, a cell that is not run, and three searches."""
    plain = [Request("tiny", name, seeds=SEEDS) for name in ("erm", "groupdro", "dfr")]
    absent = [Request("tiny", "dfr", "none", seeds=SEEDS)]
    searched = [Request("tiny", name, seeds=SEEDS[:2], tuning=3) for name in ("groupdro", "resample", "dfr")]
    return plan([*plain, *absent, *searched])


def hashes(part: Plan) -> list[str]:
    return [planned.spec.hash for planned in part.runs if planned.spec]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_shards_are_the_plan_and_do_not_overlap(whole: Plan, parts: int) -> None:
    shards = [shard(whole, f"{i}/{parts}") for i in range(1, parts + 1)]
    assert sorted(run for part in shards for run in hashes(part)) == sorted(hashes(whole))
    labels = [sweep.label for part in shards for sweep in part.sweeps]
    assert sorted(labels) == sorted(sweep.label for sweep in whole.sweeps)
    assert len(set(labels)) == len(labels) == 3
    candidates = [{planned.spec.hash for planned in part.searched() if planned.spec} for part in shards]
    assert sum(map(len, candidates)) == len(set().union(*candidates)) == 9
    assert all(part.stores == whole.stores for part in shards)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_block_is_never_split(whole: Plan, parts: int) -> None:
    seeds = [
        {planned.spec.block.seed for planned in shard(whole, f"{i}/{parts}").runs if planned.spec}
        for i in range(1, parts + 1)
    ]
    assert all(seeds)
    assert sum(map(len, seeds)) == len(SEEDS)


def test_searches_of_one_block_are_shared_out(whole: Plan) -> None:
    """By block one part would have them all."""
    assert len({run.block.key for sweep in whole.sweeps for run in sweep.candidates}) == 1
    assert [len(shard(whole, f"{i}/3").sweeps) for i in (1, 2, 3)] == [1, 1, 1]
