"""Alpha Net as scikit-learn's estimator."""

from __future__ import annotations

from .classifier import AlphaNetClassifier, AlphaNetWarning

__all__ = [
    "AlphaNetClassifier",
    "AlphaNetWarning",
]
