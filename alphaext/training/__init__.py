"""Training a head on cached features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import load_at_first_use

if TYPE_CHECKING:
    from .engine import TrainingDiverged
    from .many import SweepRun, fit_many
    from .options import HeadOptions, TrainingOptions
    from .presets import PRESETS, preset_options
    from .result import AlphaNetWarning, FitResult, plot_history
    from .single import fit
else:
    __getattr__, __dir__ = load_at_first_use(__name__)

__all__ = [
    "PRESETS",
    "AlphaNetWarning",
    "FitResult",
    "HeadOptions",
    "SweepRun",
    "TrainingDiverged",
    "TrainingOptions",
    "fit",
    "fit_many",
    "plot_history",
    "preset_options",
]
