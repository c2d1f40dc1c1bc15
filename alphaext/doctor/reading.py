"""Reading every image of a data set once, with all threads: which cannot be read, and which are the same."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
)

from ..data.images import DatasetImages, FileImages, ImageReadError, LabelledImages
from ..utils.checks import check_integer
from ..utils.progress import ImagesPerSecond, task_bar

__all__ = ["Reading", "missing_files", "read_all"]

# Images of one task: enough that handing out tasks costs nothing beside decoding, few enough that the bar moves.
_CHUNK = 32


@dataclass
class Reading:
    """What came of reading the images of one part.

    Attributes:
        failures: why an image could not be read, by its index.
        digests: SHA-256 of each image as it is stored, None where it could not be read.
    """

    failures: dict[int, str] = field(default_factory=dict)
    digests: list[bytes | None] = field(default_factory=list)


def read_all(
    parts: Mapping[str, LabelledImages], *, workers: int | None = None, progress: bool | None = None
) -> dict[str, Reading]:
    """Read and decode every image of every part.

    Args:
        parts: the images, by the name of their part.
        workers: threads; decoding does not hold Python's lock. Default: two a core that this process may use, at most 32, as
            reading waits for the disk.
        progress: show a progress bar with images per second; None shows it where standard error is a terminal.

    Returns:
        A :class:`Reading` a part.

    Raises:
        KeyboardInterrupt: passed on once the threads have ended, which takes an image each.
    """
    threads = _default_workers() if workers is None else check_integer(workers, "workers", minimum=1)
    readings = {part: Reading(digests=[None] * len(images)) for part, images in parts.items()}
    stop = threading.Event()
    # A data set may share one open file among all reads: those of a data set go one at a time.
    locks = {id(images.dataset): threading.Lock() for images in parts.values() if isinstance(images, DatasetImages)}

    def read(part: str, start: int, end: int) -> int:
        images, reading = parts[part], readings[part]
        lock: AbstractContextManager[Any] = locks[id(images.dataset)] if isinstance(images, DatasetImages) else nullcontext()
        for index in range(start, end):
            if stop.is_set():
                break
            try:
                with lock:
                    stored = images.stored(index)
                images.decode(index, stored)
            except ImageReadError as error:
                reading.failures[index] = error.reason or str(error)
            else:
                reading.digests[index] = hashlib.sha256(stored).digest()
        return end - start

    tasks = _chunks(parts)
    total = sum(len(images) for images in parts.values())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="alphaext-read")
    with task_bar(progress, "images", MofNCompleteColumn(), BarColumn(), ImagesPerSecond(), total=total) as report:
        try:
            running: set[Future[int]] = set()
            exhausted = False
            while running or not exhausted:
                while not exhausted and len(running) < 2 * threads:
                    task = next(tasks, None)
                    if task is None:
                        exhausted = True
                    else:
                        running.add(pool.submit(read, *task))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                report(sum(future.result() for future in done))
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    for reading in readings.values():
        reading.failures = dict(sorted(reading.failures.items()))
    return readings


def missing_files(images: LabelledImages) -> list[int]:
    """The indices of images without a file, found by listing each folder once; none where images are in memory."""
    if not isinstance(images, FileImages):
        return []
    files: dict[str, set[str]] = {}
    missing = []
    for index, path in enumerate(images.paths):
        folder, _, name = path.rpartition("/")
        if folder not in files:
            try:
                files[folder] = set(os.listdir(images.root / folder))
            except OSError:
                files[folder] = set()
        if name not in files[folder]:
            missing.append(index)
    return missing


def _chunks(parts: Mapping[str, LabelledImages]) -> Iterator[tuple[str, int, int]]:
    for part, images in parts.items():
        for start in range(0, len(images), _CHUNK):
            yield part, start, min(start + _CHUNK, len(images))


def _default_workers() -> int:
    return min(32, 2 * len(os.sched_getaffinity(0)))
