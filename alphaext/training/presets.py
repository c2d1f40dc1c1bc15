"""Options of a head and its training under one name: the form that gains most, and the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..utils.checks import check_choice
from .options import OPTIONS

__all__ = ["PRESETS", "PRESETS_AND_ALL", "preset_options"]

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        preset: MappingProxyType({name: entry.metadata["presets"][preset] for name, entry in OPTIONS.items() if name != "seed"})
        for preset in ("few", "paper")
    }
)
"""Options by preset.

``"few"`` changes the few rows and gains most: coefficients and a small residual learned directly, drawn toward the original
classifier, on drawn samples of few classes and equally many of every class; then one constant on the few scores, chosen on
validation samples (docs/results/findings.md). ``"paper"`` is the published form, with the gamma that the paper chose on
ImageNet-LT; but epoch 0, before training, takes part in the choice of the epoch, and the original classifier is kept where
nothing is better on validation samples (``select="last"`` and ``keep_original=False`` leave that out). Options that are not
given to :func:`alphaext.fit_many` are the plain form's: the paper's, but from the original classifier on and with a gradient
that lets a clamped coefficient return, gamma 1 (docs/reference/defaults.md).
"""


PRESETS_AND_ALL = (*PRESETS, "all")
"""The names of all presets: those of few rows, and ``"all"`` of :func:`alphaext.repair`, which may change every row."""


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
