"""The commands by which results are handed on: `verify` and `submit`."""

from collections import Counter
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from ..benchmark.errors import one_line
from .terminal import err, interruptible, load_plugins, say


def verify(
    path: Annotated[Path | None, typer.Argument(help="A record, or a folder of them. Default: all runs.")] = None,
    plugin: Annotated[list[Path], typer.Option(metavar="FILE", help="A Python file that registers a dataset.")] = [],  # noqa: B006
) -> None:
    """Recompute every metric from the stored predictions, and compare with the dataset; exit code 1 on any difference.

    Nothing is fetched: the dataset is looked at where it is built in or prepared.
    """
    from ..benchmark.home import runs_home
    from ..leaderboard.verify import LEVELS, orphans, verify_all

    load_plugins(plugin)
    target = path or runs_home()
    verdicts = verify_all(target) if path or target.exists() else []
    stray = orphans(target) if target.is_dir() else []
    for verdict in verdicts:
        for problem in verdict.problems:
            _warn(f"{verdict.path.name}: {problem}", "red")
    for file in stray:
        _warn(f"{file}: predictions without a record", "red")
    for level, meaning in LEVELS.items():
        count = sum(verdict.ok and verdict.level == level for verdict in verdicts)
        if count:
            say(f"{count} verified, level {level}: {meaning}")
    for note, count in sorted(Counter(note for verdict in verdicts for note in verdict.notes).items()):
        say(f"{count} {note}")
    bad = sum(not verdict.ok for verdict in verdicts) + len(stray)
    say(f"{len(verdicts)} records, {bad} with differences")
    if bad:
        raise typer.Exit(1)


def submit(
    method: Annotated[str, typer.Argument(help=r"HOST[+SOURCE]\[@POLICY], as tables call it.")],
    path: Annotated[Path | None, typer.Option(help="Folder of records. Default: the runs in $WORSTGROUP_HOME.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A new folder. Default: leaderboard/ of the checkout, elsewhere ./submission-METHOD."),
    ] = None,
    plugin: Annotated[list[Path], typer.Option(metavar="FILE", help="A Python file that registers the method.")] = [],  # noqa: B006
) -> None:
    """Write what a pull request needs: a method's verified results in their published form, its file, a checklist."""
    from ..authoring import contract, scaffold
    from ..benchmark.home import runs_home
    from ..leaderboard import submission
    from ..leaderboard.submission_text import Check

    load_plugins(plugin)
    label = submission.label_of(method)
    here = Path.cwd()
    checkout = scaffold.PACKAGE if scaffold.in_checkout(here, scaffold.PACKAGE) else None
    place = submission.place(label, output, here, checkout)
    place.check()
    options = "".join(f" --plugin {quote(str(file))}" for file in plugin)
    made = submission.gather(label, path or runs_home(), options)
    for warning in made.warnings:
        _warn(warning)
    with interruptible():
        verdicts = list(contract.verdicts(label.removesuffix("(+val)")))
        checks = [Check(one.check, one.state == "failed", one.message) for one in verdicts]
        for check in checks:
            if check.failed:
                _warn(f"worstgroup check {label}: {check.name} FAILED: {' '.join(check.message.split())}")
        for line in submission.write(made, place, checks):
            _warn(line)
    say(f"wrote {len(made.own)} runs of {label} and {len(made.baseline)} of erm: {place.results or place.folder}")
    say(f"next: fill in what is open in {place.folder / submission.TEXT}, and make a pull request of it")


def _warn(text: str, style: str = "yellow") -> None:
    """One line, whatever the records and files that it names are called."""
    say(one_line(text, 2000), err, style)
