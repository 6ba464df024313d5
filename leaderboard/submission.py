"""What a pull request needs to put a method on the leaderboard: its published records, its file, and what it is."""

import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmark import record as records
from ..benchmark.errors import CorruptFile, UserError, require
from ..benchmark.home import write_folder
from ..benchmark.planning import DEFAULT_SEEDS
from ..benchmark.record import ENVIRONMENT, RunRecord
from ..benchmark.registry import METHODS, SOURCES, MethodEntry
from ..benchmark.spec import MethodName, method_label
from ..benchmark.staleness import stale
from .published import candidates, publish
from .submission_text import Check, text
from .verify import verify, verify_all
from .verify_dataset import looking_once

PACKAGE = Path(__file__).resolve().parents[1]
BASELINE = "erm"
"""The method that every other one of a block is compared with."""
TEXT, RESULTS = "SUBMISSION.md", "results"

Runs = list[tuple[Path, RunRecord]]


@dataclass(frozen=True)
class Place:
    """Where a submission goes: its folder, which is new, and in a checkout the folder of all results."""

    folder: Path
    results: Path | None = None

    def check(self) -> None:
        """Raise `UserError` where something lies there already."""
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} exists already; move it away, or name another folder with --output")


@dataclass(frozen=True)
class Submission:
    """Runs of a method, those of ERM in the same blocks, and what whoever hands them in should know."""

    method: str
    own: Runs
    baseline: Runs
    warnings: list[str]

    @property
    def entries(self) -> list[MethodEntry]:
        """The method and its group source."""
        name = MethodName.parse(self.method)
        source = self.own[0][1].source
        return [METHODS[name.host], *([SOURCES[source]] if source else [])]

    def files(self) -> list[Path]:
        """Files of the method and its source that are not the package's own."""
        found = [Path(str(sys.modules[entry.cls.__module__].__file__)).resolve() for entry in self.entries]
        return [file for file in dict.fromkeys(found) if not file.is_relative_to(PACKAGE)]


def place(method: str, output: Path | None, here: Path, checkout: Path | None) -> Place:
    """Where the submission of a method goes: below `here`, or into the checkout if there is one, unless told."""
    name = records.slug(method)
    if output is not None or checkout is None:
        return Place(output or here / f"submission-{name}")
    leaderboard = checkout / "leaderboard"
    return Place(leaderboard / "submissions" / name, leaderboard / RESULTS)


def label_of(method: str) -> str:
    """A method as records call it; raises `UserError` for one that there is not."""
    name = MethodName.parse(method)
    _ = METHODS[name.host], SOURCES[name.source] if name.source else None
    return method_label(name.host, name.source, name.policy, name.extra)


def gather(label: str, runs: Path, options: str = "") -> Submission:
    """All finished runs of a method made with its code as it is, and those of ERM in their blocks.

    Raises `UserError` where there is none, saying which command with these `options` makes some, and naming every
    record that does not verify.
    """
    require(runs.is_dir(), f"{runs}: there is no such folder of records")
    found = list(_read(runs, label))
    again = _command(label, options)
    made = [(path, record) for path, record in found if record.label == label and not record.is_candidate]
    finished = [(path, record) for path, record in made if record.status == "finished"]
    if not finished:
        raise UserError(f"no finished run of {label} in {runs}.{_others(label, found)} `{again}` makes some")
    own, warnings = _current(finished)
    if not own:
        raise UserError("\n".join([*warnings, f"no run of {label} is of its code as it is now; `{again}` makes some"]))
    warnings += [f"{path.name}: failed, left out: {record.error}" for path, record in made if record.status == "failed"]
    blocks = {_block(record) for _, record in own}
    erm = [
        (path, record)
        for path, record in found
        if record.label == BASELINE != label and record.status == "finished" and _block(record) in blocks
    ]
    baseline, others = _current([(path, record) for path, record in erm if not record.is_candidate])
    warnings += others
    _verify([*own, *baseline])
    warnings += missing_seeds([record for _, record in own])
    if label != BASELINE:
        warnings += _without_baseline(own, baseline)
    return Submission(label, own, baseline, warnings)


def _read(runs: Path, label: str) -> Iterator[tuple[Path, RunRecord]]:
    """Records below a folder; raises `CorruptFile` for an unreadable one that is called as one of those wanted."""
    for path in records.find(runs):
        try:
            yield path, records.read(path)
        except CorruptFile:
            if path.name.startswith((f"{records.slug(label)}-", f"{BASELINE}-")):
                raise


def _others(label: str, found: Iterable[tuple[Path, RunRecord]]) -> str:
    """Names of finished runs of the same host."""
    host = MethodName.parse(label).host
    others = sorted({record.label for _, record in found if record.method == host and record.status == "finished"})
    return f" There are runs of {', '.join(others)}." if others else ""


def _command(label: str, options: str) -> str:
    method = label.removesuffix("(+val)")
    extra = " --extra val" if method != label else ""
    return f"worstgroup run --dataset digits2 --method {BASELINE},{method}{extra}{options}"


def _current(runs: Runs) -> tuple[Runs, list[str]]:
    """Runs of the code as it is now, of searches those of the draw that was chosen last, and a line for each other."""
    in_order = sorted((record for _, record in runs), key=lambda record: record.created)
    chosen = {tuple(record.candidates): record.draw for record in in_order}
    kept: Runs = []
    left_out = []
    for path, record in runs:
        if reason := stale(record):
            left_out.append(f"{path.name}: stale, {reason}; left out")
        elif record.candidates and record.draw != (last := chosen[tuple(record.candidates)]):
            left_out.append(f"{path.name}: superseded, its search has chosen draw {last} since; left out")
        else:
            kept.append((path, record))
    return kept, left_out


def _block(record: RunRecord) -> tuple[str, ...]:
    """What runs must share to be compared."""
    recipe = json.dumps(record.recipe, sort_keys=True)
    backbone = record.backbone, record.weights, record.backbone_code
    return record.protocol, record.dataset, record.fingerprint, *backbone, recipe


def _verify(runs: Runs) -> None:
    look, problems = looking_once(), []
    for file in dict.fromkeys(place for path, record in runs for place in (*candidates(path, record), path)):
        problems += [f"{file.name} does not verify: {problem}" for problem in verify(file, look).problems]
    if problems:
        raise UserError("\n".join(problems))


def missing_seeds(own: Iterable[RunRecord]) -> list[str]:
    """A line for every cell with fewer than three seeds; the defaults that a search leaves on one seed are none."""
    own = list(own)
    searched = {run for record in own for run in record.candidates}
    cells: dict[str, list[RunRecord]] = defaultdict(list)
    for record in own:
        settings = [record.config, record.source_config, record.tuned, record.criterion, record.candidates]
        cells[json.dumps([_block(record), record.budget, settings], sort_keys=True)].append(record)
    lines = []
    for key in sorted(cells):
        first, seeds = cells[key][0], sorted(record.seed for record in cells[key])
        if len(seeds) < len(DEFAULT_SEEDS) and not all(record.run in searched for record in cells[key]):
            missing = ", ".join(str(seed) for seed in DEFAULT_SEEDS if seed not in seeds)
            where = f"{first.dataset} · {first.backbone} · {first.budget}"
            lines.append(f"{first.label} on {where}: {len(seeds)} of {len(DEFAULT_SEEDS)} seeds, missing: {missing}")
    return lines


def _without_baseline(own: Runs, baseline: Runs) -> list[str]:
    there = {_block(record) for _, record in baseline}
    blocks = {_block(record): record for _, record in own if _block(record) not in there}
    return [
        f"no run of {BASELINE} on {record.dataset} · {record.backbone} with the same recipe: nothing to compare with"
        for _, record in sorted(blocks.items())
    ]


# -------------------------------------------------------------------------------------------------------- writing


def write(submission: Submission, place: Place, checks: list[Check]) -> list[str]:
    """Write everything, or nothing; returns what else should be said. `checks` are what `worstgroup check` found."""
    place.check()
    said: list[str] = []
    write_folder(place.folder, lambda folder: said.extend(_fill(folder, submission, place, checks)))
    return said


def _fill(folder: Path, submission: Submission, place: Place, checks: list[Check]) -> list[str]:
    results, look = folder / RESULTS, looking_once()
    for path, _ in (*submission.baseline, *submission.own):
        publish(path, results, look)
    for file in submission.files():
        shutil.copyfile(file, folder / file.name)
    (folder / ENVIRONMENT).write_text(json.dumps(environments(submission), indent=1) + "\n")
    (folder / TEXT).write_text(text(submission, results, verify_all(results), checks), encoding="utf-8")
    if place.results is None:
        return []
    kept = _move(results, place.results)
    shutil.rmtree(results)
    belong = f"belongs into {PACKAGE.name}/methods; with its imports its code changes, so run it again from there"
    said = [f"{file.name}: {belong}" for file in submission.files()]
    return said + [
        f"{name}: made anew, but {place.results} has this run already, which stays as it is" for name in kept
    ]


def _move(source: Path, target: Path) -> list[str]:
    """Move records into a folder of results, each whole; returns the names of those that are there and differ."""
    kept = []
    for path in records.find(source):
        there = target / path.relative_to(source)
        if there.exists():
            kept += [there.name] if there.read_bytes() != path.read_bytes() else []
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        for file in (records.predictions_path(path), path):  # a record counts when it is there, so it comes last
            if file.exists():
                file.replace(there.with_name(file.name))
    return kept


def environments(submission: Submission) -> list[dict[str, Any]]:
    """Devices and versions that the runs were made with, and how many runs with each."""
    told = [
        {key: value for key, value in record.env.items() if key != "session"}
        for _, record in (*submission.own, *submission.baseline)
    ]
    counts = Counter(json.dumps(env, sort_keys=True) for env in told)
    return [{"runs": counts[env], **json.loads(env)} for env in sorted(counts)]
