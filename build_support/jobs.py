"""How many compilers to run at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# A file that includes torch's headers takes up to this much to compile.
BYTES_PER_JOB = 3 * 1024**3


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that may still be taken, or None where the system does not tell."""
    limits = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        # A container may be allowed less than the machine has (control groups, version 2 and 1).
        for limit, used in (
            ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
        ):
            if (root / limit).is_file() and (root / used).is_file():
                allowed = (root / limit).read_text().strip()
                if allowed != "max":
                    limits.append(max(0, int(allowed) - int((root / used).read_text())))
    except (OSError, ValueError):
        return None
    return min(limits, default=None)


def available_processors() -> int:
    """The processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def job_count(environment: Mapping[str, str], processors: int, memory: int | None) -> int:
    """MAX_JOBS where it is set, else one job for each processor as far as the memory goes."""
    wanted = environment.get("MAX_JOBS", "").strip()
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise ValueError(f"MAX_JOBS is {wanted!r}; it must be a whole number of at least 1")
        return int(wanted)
    if memory is None:
        return max(1, processors)
    return max(1, min(processors, memory // BYTES_PER_JOB))
