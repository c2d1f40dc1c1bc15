"""Networks, and how one is cut before its last linear layer."""

from __future__ import annotations

from .split import SplitModel, find_classifier, split_model
from .zoo import SmallConvNet, make_model, model_names

__all__ = [
    "SmallConvNet",
    "SplitModel",
    "find_classifier",
    "make_model",
    "model_names",
    "split_model",
]
