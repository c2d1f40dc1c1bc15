"""The compiled extension, ``alphaext._C``: loading it registers the operators ``torch.ops.alphaext``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    import torch  # noqa: F401  (loads the libraries that the extension links to)

    import alphaext._C as _C
except ModuleNotFoundError as error:
    if error.name != "alphaext._C":
        raise
    raise ImportError(
        f"the extension of this alphaext, in {Path(__file__).parents[1]}, has not been built: run 'pip install -e .' in that "
        "checkout, or start Python elsewhere to use an installed alphaext"
    ) from None

LAYOUT: dict[str, int] = _C.layout()
"""Sizes of the kernels' memory layout: ``tile_width``, ``block_samples``, ``top_classes`` (csrc/kernels/training_params.h)."""


def build_info() -> dict[str, Any]:
    """How the extension was built and what it uses on this machine.

    Returns:
        A dictionary with ``version``, ``compiler``, ``flags``, ``torch`` (the version built against), ``cuda`` (version or
        None), ``cuda_archs`` (list or None), ``simd`` (instruction set of the CPU kernels) and ``threads``.

    Example:
        >>> sorted(build_info())
        ['compiler', 'cuda', 'cuda_archs', 'flags', 'simd', 'threads', 'torch', 'version']
    """
    return _C.build_info()
