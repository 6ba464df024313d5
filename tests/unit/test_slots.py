"""What a run takes of a cluster's node, and which node gets which run; without a cluster."""

from collections import Counter

import pytest
from helpers import plan_tiny
from worstgroup.benchmark.errors import UserError
from worstgroup.benchmark.slots import Queue, Share, share_of
from worstgroup.benchmark.spec import RunSpec

CPU_NODE = {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("share", "node", "slots"),
    [
        (Share(1, 0, 1), CPU_NODE, 8),
        (Share(3, 0, 3), CPU_NODE, 2),
        (Share(0.1, 0, 1), CPU_NODE, 80),
        (Share(1, 0, 1), {"GPU": 4.0}, 0),
        (Share(1, 1, 1), GPU_NODE, 4),
        (Share(1, 2, 1), GPU_NODE, 2),
        (Share(1, 0.25, 1), GPU_NODE, 16),
        (Share(1, 0.3, 1), GPU_NODE, 12),  # three on each GPU: a fraction lies on one
        (Share(4, 0.25, 4), GPU_NODE, 4),
        (Share(1, 1, 1), CPU_NODE, 0),
        (Share(1, 0.1, 1), {"CPU": 100.0, "GPU": 1.0}, 10),
    ],
)
def test_runs_that_fit_on_a_node(share: Share, node: dict[str, float], slots: int) -> None:
    assert share.slots(node) == slots


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "threads", "expected"),
    [
        ([CPU_NODE], None, None, 0, Share(2, 0, 2)),
        ([CPU_NODE], None, None, 4, Share(4, 0, 4)),
        ([CPU_NODE], 0.5, None, 0, Share(0.5, 0, 2)),  # more runs on a node, and the threads of the local executor
        ([CPU_NODE, GPU_NODE], None, None, 0, Share(4, 1, 4)),
        ([CPU_NODE, GPU_NODE], None, 0.25, 0, Share(1, 0.25, 1)),
        ([GPU_NODE], None, None, 1, Share(1, 1, 1)),
        ([GPU_NODE], 2, None, 0, Share(2, 1, 2)),
        ([CPU_NODE, GPU_NODE], None, 0, 0, Share(2, 0, 2)),
        ([{"CPU": 1.0, "GPU": 1.0}], None, 0.25, 0, Share(1, 0.25, 1)),
    ],
)
def test_what_is_not_given_follows_from_the_cluster(
    nodes: list[dict[str, float]], cpus: float | None, gpus: float | None, threads: int, expected: Share
) -> None:
    assert share_of(nodes, cpus, gpus, threads, usual=2) == expected


@pytest.mark.parametrize(
    ("cpus", "gpus", "says"),
    [
        (9, None, "a run is to have 9 CPUs, and no node .* as much. There is: 2 x 8 CPUs; 1 x no CPU. Ask for less"),
        (None, 1, "a run is to have 1 CPU and 1 GPU, and no node"),
        (0, None, "--cpus 0: a run needs more than 0"),
        (float("nan"), None, "--cpus nan"),
        (1, 1.5, "--gpus 1.5: write a fraction below 1"),
        (1, -1, "--gpus -1"),
        (1, float("inf"), "--gpus inf"),
    ],
)
def test_a_share_that_no_node_has_is_refused(cpus: float | None, gpus: float | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        share_of([CPU_NODE, CPU_NODE, {}], cpus, gpus, 0, usual=2)


def runs(*methods: str, seeds: tuple[int, ...]) -> list[RunSpec]:
    return [planned.spec for planned in plan_tiny(*methods, seeds=seeds).runs if planned.spec]


def test_nodes_take_blocks_then_help_with_what_is_left() -> None:
    specs = runs("erm", "groupdro", "dfr", seeds=(0, 1, 2))
    queue = Queue(specs)
    first, second = queue.take("a"), queue.take("b")
    assert [(spec.method, spec.block.seed) for spec in (first, second)] == [("erm", 0), ("erm", 1)]
    queue.ended(first, "a")
    again = queue.take("a")
    assert again.block.seed == 0, "it has the ERM of that block"
    assert queue.take("b").block.seed == 2, "another block, since the ERM of its own is still in the making"
    queue.ended(again, "a")
    assert queue.take("a").block.seed == 0
    assert len(queue) == 4
    assert {queue.take(node).block.seed for node in "cd"} == {1, 2}, "newcomers help where most is left"


def test_every_run_is_taken_once() -> None:
    specs = runs("erm", "groupdro", "dfr", "resample", seeds=(0, 1, 2, 3))
    queue, taken, flying = Queue(specs), Counter[str](), []
    while queue:
        node = "abc"[len(taken) % 3]
        flying.append((spec := queue.take(node), node))
        taken[spec.hash] += 1
        if len(flying) == 3:
            queue.ended(*flying.pop(0))
    assert taken == Counter(spec.hash for spec in specs)


@pytest.mark.parametrize(("share", "slots", "sharers"), [((1, 0, 1), 4, 4), ((4, 1, 4), 8, 1), ((1, 0.25, 1), 8, 4)])
def test_records_say_how_many_runs_share_a_device(share: tuple[float, float, int], slots: int, sharers: int) -> None:
    assert Share(*share).on_one_device(slots) == sharers
