"""Plain training of a network."""

from __future__ import annotations

from .train import TrainResult, train_model

__all__ = [
    "TrainResult",
    "train_model",
]
