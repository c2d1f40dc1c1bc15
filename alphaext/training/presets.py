"""Options of a head and its training under one name: the form that gains most, and the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..utils.checks import check_choice

__all__ = ["PRESETS", "preset_options"]

PLAIN: dict[str, Any] = {
    "coefficients": "mlp",
    "top_k": 5,
    "pool": "base",
    "metric": "euclidean",
    "pca_dim": 500,
    "gamma": 1.0,
    "rule": "clamp",
    "init": "identity",
    "shared": False,
    "projected_gradient": True,
    "residual": 0,
    "epochs": 80,
    "batch_size": 64,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "nesterov": False,
    "lr_schedule": "step",
    "lr_step": 20,
    "lr_factor": 0.1,
    "negative_ratio": 1.0,
    "negative_sampling": "uniform",
    "samples_per_class": None,
    "augment": None,
    "augment_samples": 200,
    "augment_neighbors": 5,
    "prior_correction": False,
    "regularize": 0.0,
    "few_bias": False,
}
_PAPER = {"gamma": 0.7, "init": "default", "projected_gradient": False}
_FEW = {
    "coefficients": "direct",
    "top_k": 60,
    "residual": 256,
    "regularize": 0.03,
    "samples_per_class": 8,
    "augment": "neighbors",
    "augment_neighbors": 10,
    "few_bias": True,
    "epochs": 50,
    "batch_size": 256,
    "lr": 0.05,
    "lr_schedule": "cosine",
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "few": MappingProxyType(PLAIN | _FEW),
        "paper": MappingProxyType(PLAIN | _PAPER),
    }
)
"""Options by preset.

``"few"`` changes the few rows and gains most: coefficients and a small residual learned directly, drawn toward the original
classifier, on drawn samples of few classes and equally many of every class; then one constant on the few scores, chosen on
validation samples (docs/findings.md). ``"paper"`` is exactly the published form, with the gamma that the paper chose on
ImageNet-LT. Options that are not given to :func:`alphaext.fit_many` are the plain form's: the paper's, but from the original
classifier on and with a gradient that lets a clamped coefficient return, gamma 1 (docs/defaults.md).
"""


def preset_options(name: str, *, pool_size: int | None = None, validation: bool = True) -> dict[str, Any]:
    """Return the options of a preset, for a configuration of :func:`alphaext.fit_many`.

    Args:
        name: ``"few"`` or ``"paper"``.
        pool_size: classes that neighbours can be chosen from: ``top_k`` is at most that.
        validation: whether there are validation samples; without, no constant is chosen on them.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> options = preset_options("few", pool_size=40)
        >>> options["coefficients"], options["top_k"], options["few_bias"]
        ('direct', 40, True)
    """
    check_choice(name, "preset", tuple(PRESETS))
    options = dict(PRESETS[name])
    if pool_size is not None:
        options["top_k"] = min(options["top_k"], max(pool_size, 1))  # an empty pool is told where it is looked into
    options["few_bias"] = options["few_bias"] and validation
    return options
