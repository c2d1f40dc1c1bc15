"""The classifiers to compare with, or to start from."""

from __future__ import annotations

from .nearest_mean import ncm
from .post_hoc import TAUS, choose_logit_adjustment, choose_tau, logit_adjusted, tau_normalized
from .registry import BASELINE_OPTIONS, BASELINES, run_baseline
from .retraining import RETRAINING_PRESETS, crt, lws

__all__ = [
    "BASELINES",
    "BASELINE_OPTIONS",
    "RETRAINING_PRESETS",
    "TAUS",
    "choose_logit_adjustment",
    "choose_tau",
    "crt",
    "logit_adjusted",
    "lws",
    "ncm",
    "run_baseline",
    "tau_normalized",
]
