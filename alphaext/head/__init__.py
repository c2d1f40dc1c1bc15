"""The Alpha Net head, and which classes its rows are composed of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import load_at_first_use

if TYPE_CHECKING:
    from .alphanet import AlphaNet
    from .composition import closed_form_alphas
    from .neighbors import (
        build_members,
        check_members,
        nearest_classes,
        neighbor_distances,
        pool_classes,
        reduce_classifiers,
        residual_directions,
        submodule_inputs,
    )
else:
    __getattr__, __dir__ = load_at_first_use(__name__)

__all__ = [
    "AlphaNet",
    "build_members",
    "check_members",
    "closed_form_alphas",
    "nearest_classes",
    "neighbor_distances",
    "pool_classes",
    "reduce_classifiers",
    "residual_directions",
    "submodule_inputs",
]
