"""The operators of the extension: the one door to it."""

from __future__ import annotations

from .head import alpha_head, build_info, rule_number, scale_gradient

__all__ = [
    "alpha_head",
    "build_info",
    "rule_number",
    "scale_gradient",
]
