"""The classifiers to compare with, or to start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import load_at_first_use

if TYPE_CHECKING:
    from ..training.few_bias import choose_few_bias, few_bias
    from ..training.selection import BaselineResult
    from .averaging import average
    from .choices import BASELINE_OPTIONS, BASELINES, RETRAINING_PRESETS
    from .linear_discriminant import Discriminant, discriminant
    from .nearest_mean import ncm
    from .post_hoc import TAUS, choose_logit_adjustment, choose_tau, logit_adjusted, tau_normalized
    from .registry import run_baseline
    from .retraining import crt, lws
else:
    __getattr__, __dir__ = load_at_first_use(__name__)

__all__ = [
    "BASELINES",
    "BASELINE_OPTIONS",
    "RETRAINING_PRESETS",
    "TAUS",
    "BaselineResult",
    "Discriminant",
    "average",
    "choose_few_bias",
    "choose_logit_adjustment",
    "choose_tau",
    "crt",
    "discriminant",
    "few_bias",
    "logit_adjusted",
    "lws",
    "ncm",
    "run_baseline",
    "tau_normalized",
]
