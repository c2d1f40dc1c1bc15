"""Progress bars: on standard error, each with the time that is left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TimeElapsedColumn, TimeRemainingColumn
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
