"""Progress bars on stderr, when stderr is a terminal; silence otherwise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from halfbin.cli import interruption
from halfbin.cli.quiet import no_foreign_bars
from halfbin.cli.screen import remarks
from halfbin.run.events import Event, OnEvent
from halfbin.run.wording import duration, printable, size


@contextlib.contextmanager
def progress() -> Iterator[OnEvent | None]:
    """What to pass as `on_event`: bars with a time estimate, or None where nobody is watching.

    What libraries print to stdout meanwhile goes to stderr, so that stdout holds the result alone.
    """
    interruption.work_starts()
    with contextlib.redirect_stdout(sys.stderr), no_foreign_bars():
        if not sys.stderr.isatty():
            yield None
            return
        whole = Column(no_wrap=True)
        columns = (
            TextColumn("{task.description}", style="bold", table_column=whole),
            BarColumn(bar_width=16, table_column=whole),
            _Amount(table_column=whole),
            TimeElapsedColumn(table_column=whole),
            _Left(table_column=whole),
            _Message(),
        )
        with Progress(*columns, console=remarks(), redirect_stdout=False) as bars:
            yield _Stages(bars)


class _Stages:
    """One bar for each stage; the stage before ends when the next begins."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._counted = False
        # Loading libraries and weights takes seconds before anything can be counted.
        self._start: TaskID | None = bars.add_task(f"{'starting':<12}", unit="", message="", first=0, total=None)

    def __call__(self, event: Event) -> None:
        if self._start is not None:
            self._bars.remove_task(self._start)
            self._start = None
        if self._task is None or event.stage != self._stage:
            if self._task is not None:
                self._end(self._task)
            self._stage = event.stage
            self._task = self._bars.add_task(
                f"{event.stage:<12}", unit=event.unit, message="", first=event.done, total=None
            )
        message = printable(event.message)
        finished = self._counted = bool(event.total) and event.done >= event.total
        self._bars.update(
            self._task, completed=event.done, total=event.total or None, message="" if finished else message
        )

    def _end(self, task: TaskID) -> None:
        """A stage that did not count to its end is over all the same."""
        if self._counted:
            self._bars.update(task, message="")
        else:
            self._bars.update(task, message="", unit="", completed=1, total=1)


class _Amount(ProgressColumn):
    """Finished and total, as sizes or as counts."""

    def render(self, task: Task) -> Text:
        done, total = int(task.completed), int(task.total or 0)
        if not task.fields["unit"] or not (done or total):
            return Text("")
        if task.fields["unit"] == "bytes":
            text = f"{size(done)} of {size(total)}" if total else size(done)
        else:
            text = f"{done:,} of {total:,} {task.fields['unit']}" if total else f"{done:,} {task.fields['unit']}"
        return Text(text)


class _Message(ProgressColumn):
    """What is being worked on; the only column that gives way in a narrow window."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["message"], style="dim", no_wrap=True, overflow="ellipsis")


class _Left(ProgressColumn):
    """How long it will take, once that can be told."""

    def render(self, task: Task) -> Text:
        # Not Rich's own estimate, which forgets what is older than 30 s: one step of a large model takes longer.
        done = task.completed - task.fields["first"]
        if task.finished or not task.total or not done > 0 or task.elapsed is None:
            return Text("")
        left = task.elapsed / done * (task.total - task.completed)
        return Text(f"~{duration(max(left, 1))} left", style="cyan")
