"""`worstgroup run --dry-run` as text: a line per run, then what is shared and how long all of it may take."""

from collections.abc import Iterator

from ..benchmark.forecast import Forecast, SharedErm, State
from ..benchmark.planning import Plan
from ..benchmark.spec import RunSpec

AGAIN: dict[State, str] = {"failed": " again, it failed", "stale": " again, its code has changed"}


def lines(plan: Plan, forecast: Forecast) -> Iterator[str]:
    """One line per run and per cell that is not run, then the summary."""
    for planned in [*plan.runs, *plan.searched()]:
        yield f"{planned.label}: {_state(planned.spec, forecast) if planned.spec else f'n/a ({planned.reason})'}"
    for sweep in plan.sweeps:
        seeds = ", ".join(str(spec.block.seed) for spec in sweep.runs)
        yield f"{sweep.label}: then the best of {len(sweep.candidates)} draws on seeds {seeds}"
    if forecast.states:
        yield ""
        yield from _shared(forecast.shared)
        yield summary(forecast)


def _state(spec: RunSpec, forecast: Forecast) -> str:
    state, seconds = forecast.states[spec.hash], forecast.seconds.get(spec.hash)
    if state == "finished":
        return state
    if state == "adopted":
        return f"made already, to be copied, {about(0.0)}"
    if not forecast.workers:
        return f"to run{AGAIN.get(state, '')}"
    ratio = " by its ratio to erm" if spec.hash in forecast.by_ratio else ""
    cost = "cost unknown" if seconds is None else f"{about(seconds)}{ratio}"
    return f"to run{AGAIN.get(state, '')}, {cost}"


def _shared(shared: list[SharedErm]) -> Iterator[str]:
    """A line per dataset and backbone for the shared ERMs that are there, and for those to make first."""
    of: dict[tuple[str, str, bool, bool], list[SharedErm]] = {}
    for one in shared:
        of.setdefault((one.block.dataset, one.block.backbone, one.made, one.certain), []).append(one)
    for (dataset, backbone, made, certain), ones in of.items():
        seeds = [str(seed) for seed in sorted({one.block.seed for one in ones})]
        known = [one.seconds for one in ones if one.seconds is not None]
        each = " each" if len(seeds) > 1 else ""
        cost = f"{about(sum(known) / len(known))}{each}" if known else "cost unknown"
        state = "there already" if made else f"to be made first{'' if certain else ', if a run needs it'}, {cost}"
        yield f"shared ERM of {dataset} · {backbone} · seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}: {state}"


def summary(forecast: Forecast) -> str:
    """`about 14 min on 2 workers: 47 to run, 4 finished; 5 of them have no recorded cost and are not in it`."""
    missing, states = forecast.missing, list(forecast.states.values())
    copies = f"{states.count('adopted')} to be copied, " if "adopted" in states else ""
    counts = f"{len(missing) or 'nothing'} to run, {copies}{states.count('finished')} finished"
    if not missing:
        return counts
    if not forecast.workers:
        return f"{counts}; how long is not predicted for a Ray cluster: its nodes are not known before it is used"
    unknown = len(missing) - sum(run in forecast.seconds for run in missing)
    if unknown == len(missing):
        return f"{counts}; how long is not known before a run of erm was timed on this device with these threads"
    left_out = f"; {unknown} of them have no recorded cost and are not in it" if unknown else ""
    on = f"{forecast.workers} worker{'s' if forecast.workers > 1 else ''}"
    return f"{about(forecast.wall_s)} on {on}: {counts}{left_out}"


def about(seconds: float) -> str:
    """`about 12 s`, `about 14 min`, `about 2 h 05 min`: as exact as a prediction may be."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 99.5:
        return f"about {seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 100 else f"about {minutes // 60} h {minutes % 60:02} min"
