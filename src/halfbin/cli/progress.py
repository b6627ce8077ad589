"""Progress bars on stderr, when stderr is a terminal; silence otherwise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from halfbin.cli.quiet import no_foreign_bars
from halfbin.cli.screen import remarks
from halfbin.run.events import Event, OnEvent
from halfbin.run.wording import duration, printable, size


@contextlib.contextmanager
def progress() -> Iterator[OnEvent | None]:
    """What to pass as `on_event`: bars with a time estimate, or None where nobody is watching.

    What libraries print to stdout meanwhile goes to stderr, so that stdout holds the result alone.
    """
    with contextlib.redirect_stdout(sys.stderr), no_foreign_bars():
        if not sys.stderr.isatty():
            yield None
            return
        columns = (
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=32),
            _Amount(),
            TimeElapsedColumn(),
            _Left(),
            TextColumn("{task.fields[message]}", style="dim"),
        )
        with Progress(*columns, console=remarks(), redirect_stdout=False) as bars:
            yield _Stages(bars)


class _Stages:
    """One bar for each stage; the stage before ends when the next begins."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._stage: str | None = None
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        if self._task is None or event.stage != self._stage:
            if self._task is not None:
                self._bars.update(self._task, message="")
            self._stage = event.stage
            self._task = self._bars.add_task(f"{event.stage:<12}", unit=event.unit, message="", total=None)
        message = printable(event.message)
        finished = bool(event.total) and event.done >= event.total
        self._bars.update(
            self._task, completed=event.done, total=event.total or None, message="" if finished else message
        )


class _Amount(ProgressColumn):
    """Finished and total, as sizes or as counts."""

    def render(self, task: Task) -> Text:
        done, total = int(task.completed), int(task.total or 0)
        if task.fields["unit"] == "bytes":
            text = f"{size(done)} of {size(total)}" if total else size(done)
        else:
            text = f"{done:,} of {total:,} {task.fields['unit']}" if total else f"{done:,} {task.fields['unit']}"
        return Text(text)


class _Left(ProgressColumn):
    """How long it will take, once that can be told."""

    def render(self, task: Task) -> Text:
        if task.finished or task.time_remaining is None:
            return Text("")
        return Text(f"about {duration(max(task.time_remaining, 1))} left", style="cyan")
