"""Several processes that find each other as under torchrun, forked so that none has to import torch anew."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun_environment(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_processes(count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """What ``function(*arguments)`` returns, or the exception it raises, in each of ``count`` processes, in order of rank."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    started = []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        environment = torchrun_environment(rank, count, port)
        process = context.Process(target=_run, args=(sender, environment, function, arguments), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    deadline = time.monotonic() + timeout
    results = []
    try:
        for rank, (process, receiver) in enumerate(started):
            assert receiver.poll(max(0.0, deadline - time.monotonic())), f"process {rank} did not answer in {timeout} s"
            results.append(pickle.loads(receiver.recv_bytes()))
            process.join(10)
    finally:
        for process, _ in started:
            process.kill()
    return results


def _run(sender: Any, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    # By value: the usual pickles hold tensors by files of the process that sends, which is about to end.
    sender.send_bytes(pickle.dumps(result))
    sender.close()
