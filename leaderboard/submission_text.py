"""SUBMISSION.md: what a method is, its rows, what it used and cost, and a list of what is done and what is not."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tabulate import tabulate

from ..benchmark import record as records
from ..benchmark.errors import printable
from ..benchmark.record import RunRecord
from ..benchmark.spec import PROTOCOL
from . import aggregate, render
from .verify import Verdict

if TYPE_CHECKING:
    from .submission import Submission

FILL_IN = "(to be filled in)"


@dataclass(frozen=True)
class Check:
    """One check of the contract: its name, whether it failed, and what it says."""

    name: str
    failed: bool
    message: str = ""


def text(submission: "Submission", results: Path, verdicts: Sequence[Verdict], checks: Sequence[Check]) -> str:
    """The whole file; `results` are the published records, `verdicts` what verifying them found."""
    own = [record for _, record in submission.own]
    tables = aggregate.build(aggregate.collect(records.find(results)))
    parts = [
        f"# {submission.method}",
        *(f"`{entry.name}`: {entry.summary.partition(': ')[2] or entry.summary}" for entry in submission.entries),
        "\n".join(_facts(submission, own)),
        render.to_markdown(tables).strip(),
        "## Labels and cost",
        _spent(own),
        "Attribute labels per run, the most of any seed: of train, of validation to fit and to select by. Device "
        "seconds, mean over seeds, given the block's ERM checkpoint and from scratch.",
        "## Checklist",
        "\n".join(_checklist(submission, verdicts, checks)),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(submission: "Submission", own: Sequence[RunRecord]) -> list[str]:
    papers = [entry.paper for entry in submission.entries if entry.paper not in ("", "none")]
    files = ", ".join(f"`{file.name}`" for file in submission.files()) or "part of the package"
    return [
        f"- Paper: {'; '.join(papers) or FILL_IN}",
        f"- Licence of the code: {FILL_IN}",
        f"- Authors, and whom to ask: {FILL_IN}",
        f"- Method's file: {files}",
        f"- Code: {', '.join(sorted({record.code for record in own}))}, protocol {PROTOCOL}",
    ]


def _spent(own: Sequence[RunRecord]) -> str:
    """A Markdown table: a line per dataset, backbone, budget and device."""
    cells: dict[tuple[str, ...], list[RunRecord]] = defaultdict(list)
    for record in own:
        device = str(record.env.get("device", "unknown"))
        cells[record.dataset, record.backbone, record.budget, device].append(record)
    headings = ["dataset", "backbone", "budget", "device", "train", "val fit", "val select", "in all", "given ERM (s)"]
    lines = []
    for key in sorted(cells):
        used = [record.labels for record in cells[key] if record.labels]
        costs = [record.cost for record in cells[key] if record.cost]
        labels = [max(getattr(one, name) for one in used) for name in ("n_train_a", "n_val_a_fit", "n_val_a_select")]
        seconds = [np.mean([getattr(cost, part).device_s for cost in costs]) for part in ("marginal", "scratch")]
        numbers = [f"{n:,}" for n in (*labels, max(one.total_a for one in used))] + [f"{s:.2f}" for s in seconds]
        lines.append([_cell(part) for part in (*key, *numbers)])
    return tabulate(lines, [*headings, "from scratch (s)"], tablefmt="github", disable_numparse=True)


def _cell(part: str) -> str:
    return printable(part).replace("|", "\\|")


def _checklist(submission: "Submission", verdicts: Sequence[Verdict], checks: Sequence[Check]) -> list[str]:
    """What is done (`[x]`) and what is not."""
    failed = [f"{check.name}: {' '.join(check.message.split())}" for check in checks if check.failed]
    levels = Counter(verdict.level for verdict in verdicts)
    notes = Counter(note for verdict in verdicts for note in verdict.notes)
    verified = [f"{count} level {level}" for level, count in levels.items()]
    verified += [f"{count} {note}" for note, count in notes.items()]
    problems = [f"{verdict.path.name}: {problem}" for verdict in verdicts for problem in verdict.problems]
    return [
        _item(
            not failed, f"`worstgroup check {submission.method}`: {len(checks)} checks, {len(failed)} failed", failed
        ),
        _item(not problems, f"`worstgroup verify`: {len(verdicts)} records, {'; '.join(verified)}", problems),
        _item(
            not submission.warnings,
            "nothing stale, failed or missing: three seeds, and ERM in the same block",
            submission.warnings,
        ),
        _item(False, "paper, licence and authors are filled in above"),
        _item(False, "every deviation from the paper stands in the docstring of the method's class"),
        _item(False, "settings were chosen on validation alone, within the budget that the rows stand at"),
    ]


def _item(done: bool, what: str, details: Sequence[str] = ()) -> str:
    return "\n".join([f"- [{'x' if done else ' '}] {what}", *(f"  - {_cell(detail)}" for detail in details)])
