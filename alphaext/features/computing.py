"""From images to features, batch by batch: by this process, or by several that each compute on one thread."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch
from torch import Tensor

from ..data.images import ImageReadError, LabelledImages
from ..data.loading import Batch, Reader, Transform, image_batches, image_seed
from ..models.inference import for_cpu
from ..models.split import SplitModel
from ..utils.modules import computing_in, cudnn_choice
from ..utils.processes import end_with_parent, interrupted_afterwards, keep_freed_memory
from ..utils.seeds import noise


@dataclass(frozen=True)
class Task:
    """A batch: its shard, its place among the shard's batches, and its images."""

    shard: int
    place: int
    batch: Batch


@dataclass(frozen=True)
class Computed:
    """What became of a batch.

    Attributes:
        task: the batch.
        features: float32 ``[k, D]`` of the images that could be read; None where none could.
        indices: of those k images.
        unreadable: index and error of each of the others.
        failure: what went wrong with the transform, or None.
        seconds: that it took.
        device: that it was computed on, and how.
    """

    task: Task
    features: Any
    indices: tuple[int, ...]
    unreadable: tuple[tuple[int, ImageReadError], ...]
    failure: str | None
    seconds: float
    device: str


@dataclass(frozen=True)
class Computing:
    """How batches are read, and what is made of them.

    Attributes:
        split_model: the model.
        images: decoded one by one.
        transform: of each image.
        seed: of a random transform.
        precision: that the model computes in, one of :data:`alphaext.utils.checks.PRECISIONS`.
        workers: processes that read, beside each process that computes.
        device: where the model computes.
    """

    split_model: SplitModel
    images: LabelledImages
    transform: Transform
    seed: int
    precision: str
    workers: int
    device: torch.device

    def here(self, tasks: Iterable[Task]) -> Generator[Computed, None, None]:
        """Compute the batches in this process, in their order."""
        with _on_device(self.split_model, self.device):
            yield from self._computed(tasks, _Network(self.split_model, self.precision, self.device))

    def _computed(self, tasks: Iterable[Task], network: _Network) -> Iterator[Computed]:
        begun: deque[Task] = deque()

        def wanted() -> Iterator[list[tuple[int, int]]]:
            for task in tasks:
                begun.append(task)
                yield self._items(task)

        pin = self.device.type == "cuda"
        reading = image_batches(self.images, self.transform, wanted(), workers=self.workers, pin_memory=pin)
        with reading as begin:
            started = time.monotonic()
            for batch in begin():
                features = None if batch.images is None else network.features(batch.images)
                seconds, task = time.monotonic() - started, begun.popleft()
                yield Computed(task, features, batch.indices, batch.unreadable, batch.failure, seconds, network.description)
                started = time.monotonic()

    def _items(self, task: Task) -> list[tuple[int, int]]:
        """The images of a batch: for each its index and the seed of its transform."""
        return [(index, image_seed(self.seed, task.batch.pass_number, index)) for index in task.batch.images]

    def _prepared(self, task: Task) -> _Network:
        """The network, prepared for images such as those of ``task``; as it is where none of them can be read."""
        network, reader = _Network(self.split_model, self.precision, self.device), Reader(self.images, self.transform)
        for item in self._items(task):
            images = reader[[item]].images
            if images is not None:
                network.prepare(images)
                break
        return network

    def apart(self, tasks: Iterable[Task], processes: int) -> Generator[Computed, None, None]:
        """Compute the batches in processes of their own, each on one thread and with the memory that it frees kept.

        Each gets its next batch as it comes to it, so that none waits for one that another program slows down. Batches come
        back as they are done. However the iteration ends, the processes are gone afterwards.

        Raises:
            RuntimeError: a process was killed.
        """
        remaining = iter(tasks)
        first = next(remaining, None)
        if first is None:
            return
        remaining = chain([first], remaining)
        context = multiprocessing.get_context("fork")
        started: dict[Connection, Any] = {}
        with _on_device(self.split_model, self.device):
            network = self._prepared(first)  # before the processes are there, which thus share the memory of its weights
        try:
            for _ in range(processes):
                ours, theirs = context.Pipe()
                started[ours] = context.Process(target=_compute_apart, args=(self, network, theirs, os.getpid()))
                with interrupted_afterwards():
                    started[ours].start()
                theirs.close()  # so that its end is seen
            # As many as the workers of a process read ahead, one that it computes, and one to go on with.
            for _ in range(2 * self.workers + 2):
                for connection in started:
                    connection.send(next(remaining, None))
            working = set(started)
            while working:
                for ready in wait(list(working)):
                    connection = cast(Connection, ready)
                    said = _received(connection, started[connection])
                    if said is None:
                        working.remove(connection)
                        continue
                    with suppress(BrokenPipeError):  # it has all its batches, and ends
                        connection.send(next(remaining, None))
                    yield said if said.features is None else replace(said, features=torch.from_numpy(said.features))
        finally:
            for process in started.values():
                process.terminate()
            for process in started.values():
                process.join()


def _received(connection: Connection, process: Any) -> Computed | None:
    """What a process has computed; None when it has no more to do. Its error is raised here."""
    try:
        said = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise RuntimeError(
            f"a process that computes features was killed (exit code {process.exitcode}); where memory has run out, take fewer "
            "processes"
        ) from None
    if isinstance(said, Exception):
        raise said
    return said


def _compute_apart(computing: Computing, network: _Network, connection: Connection, parent: int) -> None:
    """A process that computes: batches come through ``connection``, features go back."""
    end_with_parent(parent)
    keep_freed_memory()
    torch.set_num_threads(1)
    # Ctrl-C goes to all processes; the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # orderly, so that its workers end too
    try:
        for computed in computing._computed(iter(connection.recv, None), network):
            features = None if computed.features is None else computed.features.numpy()
            connection.send(replace(computed, features=features))
        connection.send(None)
    except Exception as error:
        try:
            connection.send(error)
        except Exception:  # what cannot be pickled
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


class _Network:
    """A model on its device; on a CPU a copy of it, which is prepared by the first images."""

    def __init__(self, split_model: SplitModel, precision: str, device: torch.device) -> None:
        self._split_model, self._precision, self._device = split_model, precision, device
        self._folded: int | None = None

    @property
    def description(self) -> str:
        """The device, and how it computes."""
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        threads = torch.get_num_threads()
        folded = f"{self._folded or 0} batch normalisations folded"
        return f"CPU {platform.machine()}, {threads} thread{'s' * (threads > 1)}, {folded}"

    def prepare(self, images: Tensor) -> None:
        """Take a copy for inference on a CPU, if that is where the model is."""
        if self._device.type == "cpu" and self._folded is None:
            with computing_in("float32", self._device):
                self._split_model, self._folded = for_cpu(self._split_model, noise(2, *images.shape[1:]))

    def features(self, images: Tensor) -> Tensor:
        """The features of a batch, float32, on the device."""
        self.prepare(images)
        try:
            with computing_in(self._precision, self._device):
                return self._split_model.features(images.to(self._device, non_blocking=True))
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{len(images)} images of {list(images.shape[1:])} at a time are too many for the memory of {self._device}: "
                f"take a smaller batch_size, in another folder. {error}"
            ) from error


@contextmanager
def _on_device(split_model: SplitModel, device: torch.device) -> Iterator[None]:
    """The model on ``device``, where convolutions choose the same algorithm each time; then back to where it was."""
    model, before = split_model.model, split_model.device
    try:
        if before != device:
            model.to(device)
        with cudnn_choice(deterministic=True, fastest=False):
            yield
    finally:
        if before != device:
            model.to(before)
