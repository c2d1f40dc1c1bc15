"""Pieces of work in a process that may hang or crash: what each found is written when it ends.

The same command, started again with the same file, goes on behind the piece in which the last process ended.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_proof.report import read_report, write_whole

# The exit code of a process that a fault of the GPU has made useless; the pieces after it need another.
AGAIN = 75
Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A piece of work: ``work`` returns what it found, as JSON can hold it, within ``seconds`` (0: however long)."""

    name: str
    work: Callable[[], Any]
    seconds: float = 20.0


def read_parts(path: Path | None) -> Entries:
    """What was written: by name ``status`` ("running", "done" or "failed"), ``result`` or ``error``, and ``seconds``."""
    return {} if path is None else read_report(path) or {}


def results_of(entries: Entries) -> dict[str, Any]:
    """What was found by the pieces that are done."""
    return {name: entry["result"] for name, entry in entries.items() if entry["status"] == "done"}


def faults_of(entries: Entries) -> dict[str, str]:
    """What went wrong, by the name of the piece."""
    return {name: entry["error"] for name, entry in entries.items() if entry["status"] == "failed"}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def _is_fault_of_device(error: BaseException) -> bool:
    """Whether the GPU does nothing more for this process."""
    torch = sys.modules.get("torch")
    fault = getattr(torch, "AcceleratorError", None)
    return fault is not None and isinstance(error, fault)


def run_parts(parts: Iterable[Part], output: Path | None) -> Entries:
    """Run every part that ``output`` does not know yet. A part that takes too long ends the process."""
    entries = read_parts(output)

    def write() -> None:
        if output is not None:
            write_whole(output, json.dumps(entries, indent=1) + "\n")

    for entry in entries.values():
        if entry["status"] == "running":
            took, limit = time.time() - entry.pop("since"), entry.pop("limit")
            died = f"it did not end within {limit:g} s" if limit and took >= limit else "the process died in it"
            entry |= {"status": "failed", "error": died, "seconds": round(took, 1)}
    for part in parts:
        if part.name in entries:
            continue
        print(f"CASE {part.name}", flush=True)
        entry = entries[part.name] = {"status": "running", "since": time.time(), "limit": part.seconds}
        write()
        started, again = time.monotonic(), False
        if part.seconds:
            # A thread of its own, which ends the process even where the driver does not come back.
            faulthandler.dump_traceback_later(part.seconds, exit=True)
        try:
            found = {"status": "done", "result": part.work()}
        except Exception as error:
            traceback.print_exc()
            found = {"status": "failed", "error": _first_line(error)}
            again = _is_fault_of_device(error)
        finally:
            if part.seconds:
                faulthandler.cancel_dump_traceback_later()
        entry.clear()
        entry |= found | {"seconds": round(time.monotonic() - started, 3)}
        write()
        if again:
            raise SystemExit(AGAIN)
    return entries


def finish(entries: Entries) -> None:
    """End the program with what went wrong, if anything did."""
    faults = faults_of(entries)
    print(f"{len(entries)} parts, {len(faults)} wrong")
    if faults or not entries:
        raise SystemExit(next((f"{name}: {fault}" for name, fault in faults.items()), "nothing is called this"))
