"""Progress bars: on standard error, each with the time that is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_SECONDS_A_LINE = 30.0


class _Speed(ProgressColumn):
    """How many steps a second there are of late."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {self._unit}/s", style="progress.data.speed")


def progress_bar(progress: bool | None, *columns: ProgressColumn, main: bool = True) -> Progress:
    """A bar of ``columns``, time gone and time left, not started yet.

    Args:
        progress: whether to show it; None shows it where standard error is a terminal.
        columns: what stands before the times.
        main: whether this process is the one that talks to the user; others show nothing.
    """
    console = Console(stderr=True)
    shown = main and (console.is_terminal if progress is None else progress)
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not shown)


@contextmanager
def task_bar(
    progress: bool | None, title: str, *columns: ProgressColumn, total: int | None, done: int = 0, unit: str = ""
) -> Iterator[Callable[..., None]]:
    """How far a task of ``total`` steps is: a bar, or where standard error is no terminal a line now and then.

    Args:
        progress: whether to show it; None shows the bar where standard error is a terminal, and else nothing.
        title: before the bar.
        columns: what stands between title and times; default how many are done, the bar and, with a unit, how many a second.
        total: all steps; None where nobody knows.
        done: those done before, which tell nothing of the speed.
        unit: what the steps are, such as ``"images"``.

    Yields:
        A function to be called with how many steps more are done (default 1), and what else changes of the task, such as
        ``description="epoch 3"``.
    """
    if progress and not Console(stderr=True).is_terminal:
        lines = _Lines(title, total, done, unit)
        try:
            yield lines.report
        finally:
            lines.print()
        return
    columns = columns or (MofNCompleteColumn(), BarColumn(), *([_Speed(unit)] if unit else []))
    bar = progress_bar(progress, TextColumn(title), *columns)
    task = bar.add_task("", total=total, completed=done)

    def report(steps: int = 1, **changes: Any) -> None:
        # Not before the first report: the bar's thread must not run while workers are forked.
        bar.start()
        bar.update(task, advance=steps, **changes)

    try:
        yield report
    finally:
        if not bar.disable:
            bar.stop()


class _Lines:
    """What stands in for a bar in a file: a line every half minute."""

    def __init__(self, title: str, total: int | None, done: int, unit: str) -> None:
        self._title, self._total, self._before, self._unit = title, total, done, unit
        self._done, self._description = done, ""
        self._started = self._printed = time.monotonic()

    def report(self, steps: int = 1, *, completed: int | None = None, description: str = "", **_: Any) -> None:
        self._done = self._done + steps if completed is None else completed
        self._description = description
        if time.monotonic() - self._printed >= _SECONDS_A_LINE:
            self.print()

    def print(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._started
        speed = (self._done - self._before) / max(seconds, 1e-9)
        of = "" if self._total is None else f" of {self._total:,}"
        said = [f"{self._title}: {self._done:,}{of} {self._unit}".strip(), self._description]
        said.append(f"{speed:,.1f} {self._unit} a second" if self._unit else "")
        left = timedelta(seconds=round((self._total - self._done) / speed)) if speed and self._total else None
        said.append(f"{left} left" if left else f"{timedelta(seconds=round(seconds))} taken")
        print(", ".join(part for part in said if part), file=sys.stderr, flush=True)
