"""Networks, and how one is cut before its last linear layer."""

from __future__ import annotations

from .preprocessing import Preprocessing, find_preprocessing
from .split import SplitModel, find_classifier, split_model
from .zoo import SmallConvNet, make_model, model_names

__all__ = [
    "Preprocessing",
    "SmallConvNet",
    "SplitModel",
    "find_classifier",
    "find_preprocessing",
    "make_model",
    "model_names",
    "split_model",
]
