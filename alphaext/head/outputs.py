"""The outputs of the sub-modules, from which a rule makes coefficients: where they start, and which are held by the clamp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from ..ops.head import accumulate_dtype

# Where softmax saturates its gradient vanishes, so "identity" starts no closer to 1 than this.
_LARGEST_SOFTMAX_START = 0.99


def identity_outputs(rule: str, gamma: float, top_k: int, dtype: torch.dtype) -> Tensor:
    """Outputs ``[K+1]`` at which ``alpha_0 = gamma`` and the neighbours are equal."""
    # A few rounding errors below gamma, so that no clamp holds at the start.
    below_gamma = gamma * (1 - 8 * torch.finfo(accumulate_dtype(dtype)).eps)
    own = {"clamp": gamma, "softmax": min(below_gamma, _LARGEST_SOFTMAX_START), "l1": 0.0}[rule]
    alpha = torch.full((top_k + 1,), (1 - own) / top_k, dtype=torch.float64, device="cpu")
    if rule != "l1":
        alpha[0] = own
    outputs = (alpha.log() if rule == "softmax" else alpha).to(dtype)
    if rule == "clamp" and outputs[0].double() > torch.tensor(gamma, dtype=accumulate_dtype(dtype), device="cpu").double():
        # Rounded up to beyond the clamp, where no gradient passes: take the next number below.
        outputs[0] -= torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(gamma))
    return outputs


def clamped_outputs(raw: Tensor, rule: str, gamma: float) -> Tensor:
    """``[F]`` bool: which classes' own coefficient is held by the clamp, from the sub-modules' outputs ``[F, K+1]``."""
    if rule == "l1":
        return torch.zeros(len(raw), dtype=torch.bool, device=raw.device)
    value = raw[:, 0] if rule == "clamp" else raw.softmax(dim=1)[:, 0]
    low = min(reference.ALPHA_FLOOR, gamma) if rule == "clamp" else 0.0
    return (value > gamma) | (value < low)
