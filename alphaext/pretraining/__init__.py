"""Plain training of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import load_at_first_use

if TYPE_CHECKING:
    from .train import TrainResult, train_model
else:
    __getattr__, __dir__ = load_at_first_use(__name__)

__all__ = [
    "TrainResult",
    "train_model",
]
