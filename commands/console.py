"""What long work shows: a progress bar with time left on a terminal, plain lines elsewhere, nothing when quiet."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..benchmark.errors import one_line
from ..benchmark.record import RunRecord
from ..benchmark.spec import RunSpec

WORTH_A_LINE = 2.0
"""Seconds that something must have taken to be reported when it is done."""


class _Reporter:
    """A context manager that shows progress bars on a terminal, and nothing elsewhere."""

    def __init__(self, console: Console, quiet: bool, *columns: ProgressColumn) -> None:
        self.console, self.quiet = console, quiet
        shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
        self._bars = Progress(*shown, console=console, transient=True, disable=quiet or not console.is_terminal)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _say(self, line: str) -> None:
        if not self.quiet:
            self._bars.console.print(line, highlight=False, soft_wrap=True)


class RunReporter(_Reporter):
    """Reports runs to a console."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        super().__init__(console, quiet, MofNCompleteColumn(), TimeElapsedColumn())
        self.done = self.total = 0

    def begin(self, total: int, cached: int) -> None:
        """Note the size of the job."""
        self.total, self.done = total, cached
        self._runs = self._bars.add_task("runs", total=total, completed=cached)
        self._epochs = self._bars.add_task("", total=None, visible=False)
        if cached:
            self._say(f"{cached} of {total} runs are finished already")

    def start(self, spec: RunSpec) -> None:
        """Show the run that starts."""
        self._bars.update(self._epochs, description=escape(spec.label), visible=True, completed=0, total=None)

    def progress(self, stage: str, epoch: int, epochs: int) -> None:
        """Show the epoch."""
        self._bars.update(self._epochs, completed=epoch, total=epochs)

    def end(self, spec: RunSpec, record: RunRecord, seconds: float) -> None:
        """One line per run."""
        self.done += 1
        self._bars.update(self._runs, completed=self.done)
        if record.status == "failed":
            outcome = f"[red]failed[/red] {escape(one_line(' '.join(record.error.split()), 2000))}"
        elif record.is_candidate and record.selection:  # no test accuracy before the search has ended
            outcome = f"{escape(record.selection.criterion)} {100 * (record.selection.value or 0):.1f}"
        else:
            outcome = f"wga {100 * (record.metrics['wga'] or 0):.1f}"
        width = len(str(self.total))
        count = escape(f"[{self.done:{width}}/{self.total}]")
        self._say(f"{count} {escape(spec.label)}  {outcome}  {seconds:.1f} s")


class BuildReporter(_Reporter):
    """Reports pictures being decoded and files being fetched, by being called with (what, done, total)."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        super().__init__(console, quiet)
        self._started: dict[str, tuple[TaskID, float]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move the bar of one thing; a line when it is done."""
        if what not in self._started:
            self._started[what] = self._bars.add_task(escape(what), total=total or None), time.monotonic()
        task, start = self._started[what]
        self._bars.update(task, completed=done, total=total or None)
        if total and done >= total:
            self._bars.remove_task(task)
            del self._started[what]
            seconds = time.monotonic() - start
            if seconds >= WORTH_A_LINE:
                self._say(f"{escape(what)}: {seconds:.1f} s")
