"""What holds of a module, or of the libraries it computes with, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients; afterwards each of its modules in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Also where the caller is in inference mode: a tensor made there can never be trained on.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def computing_in(precision: str, device: torch.device) -> torch.autocast:
    """A block in which networks on ``device`` compute in one of :data:`PRECISIONS`, whatever the caller's autocast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def cudnn_choice(*, deterministic: bool, fastest: bool) -> Iterator[None]:
    """cuDNN with algorithms that make the same bits each time, or with those that it measures to be the fastest."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = deterministic, fastest
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: of products so small that a second one would mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
