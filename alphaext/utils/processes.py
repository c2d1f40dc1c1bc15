"""The processes that share one piece of work, as ``torchrun`` starts them; one process alone is a group of one.

What processes tell each other is tensors and JSON, never pickles: a pickle from the network would run as code.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .checks import check_integer
from .tensors import check_device, choose_device

# Of glibc's malloc.h and of Linux's prctl.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _PR_SET_PDEATHSIG = -1, -4, 1

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PeerError(RuntimeError):
    """Another process of the group failed; its own message is in this one, its traceback in that process's output."""


@dataclass(frozen=True)
class Group:
    """One of the processes that share a piece of work. In a group of one every method answers at once, by itself.

    All processes must call the same methods in the same order, as always with collective operations.

    Attributes:
        rank: of this process, from 0.
        world_size: how many processes there are.
        local_rank: of this process among those on its machine; its GPU, where there are GPUs.
        device: where this process computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def share(self, length: int) -> range:
        """The positions of ``0 .. length - 1`` that fall to this process: every ``world_size``-th, from ``rank`` on."""
        return range(self.rank, length, self.world_size)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            # A sum, not dist.barrier: it waits for the device that is known to be this process's.
            self.sum(torch.zeros(1, device="cpu"))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a tensor that has the same shape and dtype in all of them: a new one, where it was."""
        if self.world_size == 1:
            return tensor.detach().clone()
        total = tensor.detach().to(self.device, copy=True).contiguous()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def broadcast(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Overwrite each of the tensors, which have the same shapes and dtypes everywhere, with those of process ``source``."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().to(self.device).contiguous()
            dist.broadcast(sent, source)
            if self.rank != source:
                tensor.detach().copy_(sent)

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all processes, in order of their ranks. They travel as JSON: tuples arrive as lists, keys as text.

        Raises:
            TypeError: a value that JSON cannot write.
        """
        text = json.dumps(value).encode()
        if self.world_size == 1:
            return [json.loads(text)]
        sizes = self._gathered(torch.tensor([len(text)], dtype=torch.int64, device="cpu"))
        room = max(int(size) for size in sizes)
        padded = torch.zeros(room, dtype=torch.uint8, device="cpu")
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = self._gathered(padded)
        return [json.loads(bytes(row[: int(size)].numpy())) for row, size in zip(texts, sizes, strict=True)]

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The value of process ``source``, in every process (what the others hand in is passed over). It travels as JSON.

        Raises:
            TypeError: a value that JSON cannot write.
        """
        return self.all_gather_object(value if self.rank == source else None)[source]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails in every process if it fails in one, so that none waits for a process that is gone.

        Raises:
            PeerError: the block failed in another process and not in this one. Where it failed, its own error is raised.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        said = self.all_gather_object(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(said):
            if message is not None:
                raise PeerError(f"process {rank} of {self.world_size} failed: {message}")

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        own = tensor.to(self.device)
        every = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(every, own)
        return [entry.cpu() for entry in every]


@contextmanager
def process_group(device: str | torch.device | None = None, *, timeout: float = 600.0) -> Iterator[Group]:
    """The group that this process belongs to: the one that ``torchrun`` describes in the environment, or this process alone.

    A group of several talks through gloo on CPUs and NCCL on GPUs. If torch.distributed is in use already, its group is taken
    and left as it is; otherwise one is made and given up at the end of the block. A process that fails gives it up at once,
    which ends the waiting of the others with an error; one that hangs is waited for during ``timeout``.

    Args:
        device: where this process computes. Default: ``cuda:LOCAL_RANK`` where torch sees a GPU, else ``cpu``. ``"cuda"``
            means the same GPU; one by its number is refused where there are several processes, which would share it.
        timeout: seconds to wait for another process, default 600.

    Yields:
        A :class:`Group`.

    Raises:
        ValueError: a device that is not there, or that several processes would share; an environment that says only half of
            what ``torchrun`` says.
        RuntimeError: the other processes do not answer in time (torch's own error).

    Example:
        >>> with process_group("cpu") as group:
        ...     group.rank, group.world_size, group.all_gather_object({"seen": 3})
        (0, 1, [{'seen': 3}])
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be seconds above 0, got {timeout!r}")
    rank, world_size, local_rank = _place()
    chosen = _device(device, local_rank, world_size)
    made = world_size > 1 and not dist.is_initialized()
    if chosen.type == "cuda" and world_size > 1:
        torch.cuda.set_device(chosen)
    if made:
        # Its functions have the group as their default argument. Loaded while there is one, they would keep it, and with it
        # gloo's threads, beyond the end of the block: at the end of Python these can abort the process.
        importlib.import_module("torch.distributed.nn")
        backend, gpu = ("nccl", chosen) if chosen.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), device_id=gpu)
    try:
        yield Group(rank, world_size, local_rank, chosen)
    except BaseException:
        with suppress(Exception):  # what failed first is what matters
            if made and chosen.type == "cuda" and dist.group.WORLD is not None:
                # An orderly end would wait for collectives that the others may never join.
                dist.group.WORLD.abort()
            if made:
                dist.destroy_process_group()
        raise
    if made:
        dist.destroy_process_group()


def processors_per_process() -> int:
    """The processors that each of ``torchrun``'s processes on this machine has to itself; one process alone has all."""
    return len(os.sched_getaffinity(0)) // max(1, _number("LOCAL_WORLD_SIZE", 1))


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees, for its next allocations, instead of handing it back to the system.

    A network on a CPU frees its activations after every layer: what was handed back comes in new pages, each cleared by the
    system, which takes longer than the layers do. It cannot be undone. Other C libraries have no such setting.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, -1)


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when ``parent``, the process that started it, is gone, however that ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Let a Ctrl-C wait for the end of the block, which forks: what runs at a fork would swallow it, and a child show it."""
    own = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not own:
        yield
        return
    interrupted: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, own)
    if interrupted:
        raise KeyboardInterrupt


def _place() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine."""
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return rank, world_size, _number("LOCAL_RANK", rank % max(1, torch.cuda.device_count()))
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    world_size = _number("WORLD_SIZE", 0, minimum=1)
    # One process has nobody to meet, so that it needs no place to meet at.
    missing = [name for name in (_TORCHRUN[:2] if world_size == 1 else _TORCHRUN) if name not in os.environ]
    if missing:
        raise ValueError(
            f"the environment variables {', '.join(_TORCHRUN)} must be set together, as torchrun does, missing: "
            f"{', '.join(missing)}; unset {'RANK' if 'RANK' in os.environ else 'WORLD_SIZE'} to run in one process"
        )
    if world_size > 1 and not dist.is_available():
        raise ValueError(f"the environment says WORLD_SIZE={world_size}, but this torch has no torch.distributed")
    rank = _number("RANK", 0, maximum=world_size - 1)
    return rank, world_size, _number("LOCAL_RANK", rank)


def _number(name: str, default: int, minimum: int = 0, maximum: int | None = None) -> int:
    """The integer in an environment variable, or the default where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"the environment variable {name} must be an integer, got {text!r}") from None
    return check_integer(value, f"the environment variable {name}", minimum, maximum)


def _device(device: str | torch.device | None, local_rank: int, world_size: int) -> torch.device:
    chosen = choose_device(device)
    if chosen.type == "cpu":
        return torch.device("cpu")
    if ":" not in str(chosen):
        chosen = torch.device("cuda", local_rank if world_size > 1 else torch.cuda.current_device())
    elif world_size > 1 and chosen.index != local_rank:
        raise ValueError(
            f'device must be "cuda" with {world_size} processes, each with a GPU of its own, got {str(chosen)!r} in the one of '
            f"LOCAL_RANK={local_rank}"
        )
    return check_device(chosen)
