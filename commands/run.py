"""The commands that train: `run` and `tune`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..benchmark import machine
from ..benchmark.errors import UnknownName, UserError
from .terminal import err, interruptible, load_plugins, pair, print_leaderboard, print_problems, print_tables, say

if TYPE_CHECKING:
    from ..benchmark.executors import Reporter
    from ..benchmark.planning import Plan, Request
    from ..benchmark.record import RunRecord
    from ..benchmark.suite import Suite

    RunPlan = Callable[[Plan, Reporter], list[RunRecord]]


class Executor(StrEnum):
    """Where runs are made."""

    LOCAL = "local"
    RAY = "ray"


Backbone = Annotated[str, typer.Option(help="Default: the dataset's own.")]
Weights = Annotated[
    str, typer.Option(help="none, imagenet1k_v1, imagenet1k_v2, or a file. Default: the dataset's own.")
]
Budget = Annotated[str, typer.Option(help="RUNG[:ATTRIBUTE,...]. Default: each method's native rung.")]
Extra = Annotated[str, typer.Option(help="val: train on the granted validation images too (shown as METHOD(+val)).")]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting, as often as there are some: of a method (KEY or METHOD.KEY; `worstgroup show METHOD` lists "
        "them), recipe.KEY, data.size or data.transform.",
    ),
]
Ranges = Annotated[
    list[str],
    typer.Option(
        "--search",
        metavar="KEY=RANGE",
        help="Another search range: 10^U(-1,5), U(0,1) or {0,0.1} for METHOD.KEY, recipe.lr or recipe.weight_decay.",
    ),
]
Prune = Annotated[
    bool,
    typer.Option("--prune", help="Give hopeless draws up early, by the median rule; one at a time; needs optuna."),
]
Root = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder that holds the dataset (of embeddings: their file).")
]
Plugins = Annotated[
    list[Path],
    typer.Option("--plugin", metavar="FILE", help="A Python file that registers methods, datasets or backbones."),
]
Jobs = Annotated[int, typer.Option(min=0, help="Worker processes. 0: one per GPU, else one per core up to 4.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of a run. 0: cores over default workers.")]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="The same bits again on the same GPU, as far as there are kernels; slower."),
]
On = Annotated[
    Executor,
    typer.Option(
        "--executor",
        help="local: processes here. ray: a Ray cluster, the one at RAY_ADDRESS, else the one that runs on this "
        r"machine, else one of this machine alone; needs worstgroup\[ray].",
    ),
]
Cpus = Annotated[
    float | None,
    typer.Option(help="CPUs of a run on Ray. Default: its threads, or with a GPU its share of the node's."),
]
Gpus = Annotated[
    float | None, typer.Option(help="GPUs of a run on Ray; with 0.25 four share one. Default: 1 where there are any.")
]
Splits = Annotated[bool, typer.Option("--splits", help="Show wga on train and validation too; a CSV always does.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse dataset files with other than the official counts.")]


def run(
    suite: Annotated[str, typer.Argument(help="A suite's name, or the path of a .toml file.")] = "",
    dataset: Annotated[str, typer.Option(help="DATASET[:VARIANT]: instead of a suite, or of a suite this alone.")] = "",
    method: Annotated[str, typer.Option(help=r"HOST[+SOURCE]\[@POLICY], several separated by commas.")] = "",
    backbone: Backbone = "",
    weights: Weights = "",
    budget: Budget = "",
    extra: Extra = "",
    seeds: Annotated[str, typer.Option(help="Comma-separated. Default: 0,1,2, or the suite's.")] = "",
    set_: Settings = [],  # noqa: B006
    tuning: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Search each method's settings first, over N draws.")
    ] = None,
    search: Ranges = [],  # noqa: B006
    prune: Prune = False,
    root: Root = None,
    plugin: Plugins = [],  # noqa: B006
    jobs: Jobs = 0,
    threads: Threads = 0,
    executor: On = Executor.LOCAL,
    cpus: Cpus = None,
    gpus: Gpus = None,
    shard: Annotated[
        str,
        typer.Option(
            help="i/n: only the i-th of n parts, whole seeds and searches; in a Slurm array of tasks 1-8: "
            "$SLURM_ARRAY_TASK_ID/8."
        ),
    ] = "",
    strict: Strict = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Prepare the datasets, say what would run and how long it may take, and stop."),
    ] = False,
    deterministic: Deterministic = False,
    splits: Splits = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the final table.")] = False,
) -> None:
    """Run what is missing of a suite, or of one dataset and some methods, and print its leaderboard."""
    from ..benchmark import determinism, executors
    from ..benchmark.planning import DEFAULT_SEEDS, Request
    from ..benchmark.suite import read_suite

    means = Means(executor, jobs, threads, cpus, gpus, tuple(plugin), prune, deterministic)
    load_plugins(plugin)
    determinism.deterministic(deterministic)
    settings = dict(pair(text) for text in set_)
    chosen = _numbers(seeds) if seeds else ()
    named = read_suite(suite) if suite else None
    if named:
        if backbone or budget or extra or weights or method:
            raise UserError(
                "--method, --backbone, --weights, --budget and --extra go with --dataset alone; a suite names its own"
            )
        requests = _of_suite(named, dataset)
    elif dataset and method:
        common = (budget, backbone, weights, DEFAULT_SEEDS)
        requests = [Request(dataset, name, *common, extra=extra) for name in method.split(",") if name]
    elif dataset or method:
        raise UserError(f"{'--method' if dataset else '--dataset'} is missing: name both --dataset and --method")
    else:
        raise UserError("name a suite (`worstgroup run mini`), or --dataset and --method; see `worstgroup ls suites`")
    requests = [_changed(request, settings, _ranges(search), chosen, tuning) for request in requests]
    if search and not any(request.tuning for request in requests):
        raise UserError(f"--search {search[0]}: nothing is searched; say with --tuning N over how many draws")
    made = _plan(requests, root, strict, quiet)
    if shard:
        made = executors.shard(made, shard)
    if dry_run:
        _print_plan(made, means)
        return
    made, records = _execute(made, quiet, means)
    _print_board(made, splits or (named is not None and named.splits))
    failed = sum(record.status == "failed" for record in records)
    if failed:
        told = f"{failed} of {len(records)} runs failed; the same command tries them again."
        err.print(told, style="red", markup=False)
    if failed or any(planned.failed for planned in made.runs):
        raise typer.Exit(1)


def tune(
    dataset: Annotated[str, typer.Option(help="DATASET[:VARIANT].")],
    method: Annotated[str, typer.Option(help=r"HOST[+SOURCE]\[@POLICY].")],
    draws: Annotated[int, typer.Option(min=2, help="Candidates; the first one is the defaults.")] = 16,
    backbone: Backbone = "",
    weights: Weights = "",
    budget: Budget = "",
    extra: Extra = "",
    seed: Annotated[int, typer.Option(min=0, help="The seed that the candidates are run with.")] = 0,
    set_: Settings = [],  # noqa: B006
    search: Ranges = [],  # noqa: B006
    prune: Prune = False,
    root: Root = None,
    plugin: Plugins = [],  # noqa: B006
    jobs: Jobs = 0,
    threads: Threads = 0,
    executor: On = Executor.LOCAL,
    cpus: Cpus = None,
    gpus: Gpus = None,
    strict: Strict = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the final table.")] = False,
) -> None:
    """Search a method's settings by the budget's selection rule, and print every draw with what it scored and cost.

    `run --tuning N` then takes the best draw to every seed, without searching again.
    """
    from ..benchmark.planning import Request
    from .listing import draws_table

    means = Means(executor, jobs, threads, cpus, gpus, tuple(plugin), prune)
    load_plugins(plugin)
    request = Request(dataset, method, budget, backbone, weights, (seed,), extra=extra)
    request = _changed(request, dict(pair(text) for text in set_), _ranges(search), (), draws)
    made = _plan([request], root, strict, quiet)
    for planned in made.runs:
        raise UserError(f"{planned.label}: n/a ({planned.reason})")
    (sweep,) = made.sweeps
    with means.runner(quiet) as run_plan:
        found = {record.run: record for record in _search(made, quiet, means, run_plan)}
    print_tables([draws_table(sweep, found)])
    winner = sweep.chosen(found)[0]
    again = f"worstgroup run --tuning {draws}" + (f" --seeds {seed},..." if seed else "")
    say(f"{sweep.label}: draw {winner.draw} is chosen; `{again}` with the same options takes it to every seed")


def _ranges(texts: list[str]) -> dict[str, str]:
    return dict(pair(text, "--search", "KEY=RANGE") for text in texts)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UserError(f"--seeds {text}: write whole numbers separated by commas, e.g. 0,1,2") from error


def _of_suite(suite: "Suite", dataset: str) -> "list[Request]":
    """Requests of a suite, or those of one of its datasets with its variants."""
    requests = list(suite.requests())
    kept = [request for request in requests if f"{request.dataset}:".startswith(f"{dataset}:" if dataset else "")]
    if not kept:
        raise UnknownName("dataset of this suite", dataset, {request.dataset for request in requests})
    return kept


def _changed(
    request: "Request", settings: dict[str, str], ranges: dict[str, str], seeds: tuple[int, ...], tuning: int | None
) -> "Request":
    """A request with what the command line says about it."""
    return replace(
        request,
        settings={**request.settings, **settings},
        ranges={**request.ranges, **ranges},
        seeds=seeds or request.seeds,
        tuning=request.tuning if tuning is None else tuning,
    )


def _plan(requests: "list[Request]", root: Path | None, strict: bool, quiet: bool) -> "Plan":
    from ..benchmark.planning import plan
    from .console import BuildReporter

    with interruptible(), BuildReporter(err, quiet) as build:
        return plan(requests, root, strict=strict, report=build)


@dataclass(frozen=True)
class Means:
    """What runs are made with, as the command line says it; raises `UserError` for what does not go together."""

    executor: Executor
    jobs: int
    threads: int
    cpus: float | None
    gpus: float | None
    plugins: tuple[Path, ...]
    prune: bool
    deterministic: bool = False
    """For workers elsewhere; here `determinism.deterministic` is told, which does nothing without a GPU."""

    def __post_init__(self) -> None:
        on_ray = self.executor is Executor.RAY
        wrong = {"--jobs": self.jobs and on_ray, "--prune": self.prune and on_ray}
        wrong |= {"--cpus": self.cpus is not None and not on_ray, "--gpus": self.gpus is not None and not on_ray}
        for option in (option for option, given in wrong.items() if given):
            advice = ", where --cpus and --gpus say how many runs fit" if option == "--jobs" else ""
            raise UserError(f"{option} does not go with --executor {self.executor}{advice}")
        if on_ray:
            from ..benchmark.cluster import need_ray

            need_ray()

    def runner(self, quiet: bool) -> "AbstractContextManager[RunPlan]":
        """What runs plans, as long as the context lasts."""
        workers = _workers(self.jobs, self.threads)
        if self.executor is Executor.RAY:
            from ..benchmark.cluster import Cluster

            return Cluster(
                cpus=self.cpus,
                gpus=self.gpus,
                threads=self.threads,
                usual=workers["threads"],
                plugins=self.plugins,
                same_bits=self.deterministic,
                say=lambda line: None if quiet else say(line, err),
            )
        from ..benchmark.executors import run_plan

        return nullcontext(lambda plan, reporter: run_plan(plan, reporter, **workers, plugins=self.plugins))


def _execute(plan: "Plan", quiet: bool, means: Means) -> "tuple[Plan, list[RunRecord]]":
    """Run a plan: its searches, then the plan that follows from them, returned with the records of its runs."""
    from .console import RunReporter

    with means.runner(quiet) as run_plan:
        if plan.sweeps:
            searched = _search(plan, quiet, means, run_plan)
            plan = plan.decided({record.run: record for record in searched})
        with interruptible(), RunReporter(err, quiet) as reporter:
            return plan, run_plan(plan, reporter)


def _search(plan: "Plan", quiet: bool, means: Means, run_plan: "RunPlan") -> "list[RunRecord]":
    """Records of the candidates of a plan's searches."""
    from ..benchmark import pruning
    from .console import RunReporter

    with interruptible(), RunReporter(err, quiet) as reporter:
        if means.prune:
            return pruning.run_searches(plan, reporter, threads=_workers(0, means.threads)["threads"])
        return run_plan(replace(plan, runs=plan.searched()), reporter)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _workers(jobs: int, threads: int) -> dict[str, int]:
    return machine.workers(_gpus(), jobs, threads)


def _print_plan(plan: "Plan", means: Means) -> None:
    """What would run, what is finished, and how long it is likely to take with the workers of this machine.

    What the nodes of a Ray cluster are is not known before it is used: there nothing is predicted.
    """
    from ..benchmark import forecast
    from ..benchmark.history import Device, read_history
    from ..benchmark.provenance import device_name
    from .plan_report import lines

    workers = _workers(means.jobs, means.threads)
    jobs = workers["jobs"] if means.executor is Executor.LOCAL else 0
    plan = forecast.settled(plan)
    specs = [planned.spec for planned in (*plan.runs, *plan.searched()) if planned.spec]
    specs += [run for sweep in plan.sweeps for run in sweep.runs]
    history = read_history(Device(device_name(), workers["threads"]), specs)
    for line in lines(plan, forecast.of_plan(plan, history, jobs, _gpus(), one_by_one=means.prune)):
        say(line)


def _print_board(plan: "Plan", splits: bool) -> None:
    from ..benchmark.home import runs_home
    from ..benchmark.record import record_path
    from ..leaderboard import aggregate

    paths = [record_path(runs_home(), planned.spec) for planned in plan.runs if planned.spec is not None]
    absent = [planned.absent for planned in plan.runs if planned.absent]
    tables, problems = aggregate.board((path for path in paths if path.exists()), absent)
    print_problems(problems)
    print_leaderboard(tables, splits)
    for planned in plan.runs if not tables else ():
        if planned.absent:
            say(f"n/a: {planned.label}: {planned.reason}")
