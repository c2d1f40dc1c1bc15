"""Training a head on cached features."""

from __future__ import annotations

from .engine import TrainingDiverged
from .history import plot_history
from .many import SweepRun, fit_many
from .options import TrainingOptions
from .presets import PRESETS, preset_options
from .result import FitResult
from .single import fit

__all__ = [
    "PRESETS",
    "FitResult",
    "SweepRun",
    "TrainingDiverged",
    "TrainingOptions",
    "fit",
    "fit_many",
    "plot_history",
    "preset_options",
]
