"""The extension: every operator, typed, with its shapes. Nothing else calls ``torch.ops.alphaext``."""

from __future__ import annotations

from .extension import build_info
from .head import alpha_head

__all__ = ["alpha_head", "build_info"]
