"""The Alpha Net head, and which classes its rows are composed of."""

from __future__ import annotations

from .alphanet import AlphaNet
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

__all__ = [
    "AlphaNet",
    "build_members",
    "check_members",
    "nearest_classes",
    "neighbor_distances",
    "pool_classes",
    "reduce_classifiers",
    "residual_directions",
    "submodule_inputs",
]
