"""Commands that are ended when their time is up, with all that they started, whatever state they are in."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 40
# A process that the driver holds cannot be killed: it is waited for so long, then left behind.
KILL_SECONDS = 5.0
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    returncode: int
    output: str
    timed_out: bool = False
    left_behind: bool = False  # it did not even end when it was killed

    @property
    def tail(self) -> str:
        """The end of what it printed."""
        return "\n".join(self.output.splitlines()[-TAIL_LINES:])

    def fault(self, what: str) -> str | None:
        """What went wrong, in words, or None."""
        if self.left_behind:
            return f"{what} ran out of time and could not be killed"
        if self.timed_out:
            return f"{what} ran out of time"
        return None if self.returncode == 0 else f"{what} ended with code {self.returncode}"


def end_group(process: subprocess.Popen[str]) -> bool:
    """Kill a process and all that it started; returns whether it ended."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(timeout=KILL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def run_process(
    command: Sequence[str | Path],
    limit: float,
    environment: Mapping[str, str] | None,
    log: Path,
    poll: Callable[[], object] = lambda: None,
) -> Finished:
    """Run a command for at most ``limit`` seconds; its output is added to ``log`` as it comes.

    ``poll`` is called while it runs, some times a second.
    """
    if limit <= 0:
        return Finished(-1, "no time was left to start it", True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        start = file.tell()
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=None if environment is None else dict(environment),
                start_new_session=True,  # a group of its own, so that compilers and workers end with it
            )
        except OSError as error:
            return Finished(127, f"{command[0]}: {error}")
        deadline = time.monotonic() + limit
        timed_out, ended = False, True
        try:
            while process.poll() is None and not timed_out:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
                poll()
                timed_out = process.poll() is None and time.monotonic() >= deadline
        finally:
            if process.poll() is None:
                ended = end_group(process)
    with log.open("rb") as written:
        written.seek(start)
        output = written.read().decode("utf-8", errors="replace")
    return Finished(-1 if process.returncode is None else process.returncode, output, timed_out, not ended)
