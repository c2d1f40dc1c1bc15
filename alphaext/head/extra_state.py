"""What a head's state_dict says besides its tensors."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from ..ops import head as ops
from ..utils.checks import check_number

__all__ = ["EXTRA_STATE", "read_extra_state"]

EXTRA_STATE = (
    *("gamma", "rule", "coefficients", "first_layer", "first_layer_decay", "projected_gradient", "seed", "few_bias"),
    "keeps_original",
)
"""The attributes that are kept."""


def read_extra_state(state: Tensor) -> dict[str, Any]:
    """The attributes, by name, of what :meth:`alphaext.AlphaNet.get_extra_state` made, a uint8 tensor; checked."""
    text = json.loads(bytes(state.cpu().tolist()).decode())
    stored = {name: text[name] for name in EXTRA_STATE}
    ops.rule_number(stored["rule"])
    stored |= {
        "gamma": check_number(stored["gamma"], "gamma", above=0, maximum=1),
        **{name: bool(stored[name]) for name in ("projected_gradient", "keeps_original")},
    }
    return stored | {name: float(stored[name]) for name in ("few_bias", "first_layer_decay")}
