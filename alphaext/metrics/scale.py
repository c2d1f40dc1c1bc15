"""The scale at which scores are logits: what makes labels of samples not seen likeliest."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

Array = npt.NDArray[Any]


def best_scale(scores: Array, labels: Array, among: Array) -> float:
    """What to multiply scores with for the least cross-entropy over some classes; 1 where they tell nothing of the labels.

    Args:
        scores: ``[n, N]``, of samples not seen.
        labels: ``[n]`` class ids.
        among: ``[N]`` bool, which classes.
    """
    own_classes = among[labels]
    if among.sum() < 2 or not own_classes.any():
        return 1.0
    scores, labels = scores[own_classes][:, among], (np.cumsum(among) - 1)[labels[own_classes]]
    samples, num_classes = scores.shape
    own = scores[np.arange(samples), labels]
    others = (scores.sum(axis=1) - own) / (num_classes - 1)
    # Platt's correction: if targets were certain, samples all classified rightly would ask for an infinite scale.
    smoothing = 1 / (samples + 2)
    expected = float(np.mean((1 - smoothing) * own + smoothing * others))

    def loss(exponent: float) -> float:
        scale = 10.0**exponent
        return float(np.mean(logsumexp(scale * scores, axis=1))) - scale * expected

    best = minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-4})
    return 10.0 ** float(best.x) if best.fun < np.log(num_classes) - 1e-6 else 1.0
