"""Progress bars: on standard error, each with the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class ImagesPerSecond(ProgressColumn):
    """How many images a second there are of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} images/s", style="progress.data.speed")


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
    progress: bool | None, text: str, *columns: ProgressColumn, total: int | None, done: int = 0
) -> Iterator[Callable[..., None]]:
    """A bar over ``total`` steps of one task, of which ``done`` were done before.

    Args:
        progress: as for :func:`progress_bar`.
        text: before the bar.
        columns: what stands between text and times; default how many are done, and the bar.
        total: all steps; None where nobody knows.
        done: those done before.

    Yields:
        A function to be called with how many steps more are done (default 1), and what else changes of the task, such as
        ``description="epoch 3"``.
    """
    columns = columns or (MofNCompleteColumn(), BarColumn())
    bar = progress_bar(progress, TextColumn(text), *columns)
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
