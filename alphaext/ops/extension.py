"""The compiled extension, ``alphaext._C``: loading it registers the operators ``torch.ops.alphaext``."""

from __future__ import annotations

from typing import Any

try:
    import torch  # noqa: F401  (loads the libraries that the extension links to)

    from .. import _C
except ImportError as error:
    raise ImportError(
        f"alphaext could not load its extension ({error}). From a source checkout, build it first with 'pip install -e .'; "
        "if alphaext is installed, leave the checkout's directory, whose source tree hides the installed package"
    ) from error

__all__ = ["LAYOUT", "build_info"]

LAYOUT: dict[str, int] = _C.layout()
"""Sizes that the kernels' memory is laid out by: ``tile_width``, ``block_samples`` and ``top_classes`` (csrc/training.h)."""


def build_info() -> dict[str, Any]:
    """How the extension was built and what it uses on this machine.

    Returns:
        A dictionary with ``version``, ``compiler``, ``flags``, ``torch`` (the version built against), ``cuda`` (version or
        None), ``cuda_archs`` (list or None), ``simd`` (instruction set of the CPU kernels) and ``threads``.

    Example:
        >>> sorted(build_info())
        ['compiler', 'cuda', 'cuda_archs', 'flags', 'simd', 'threads', 'torch', 'version']
    """
    info: dict[str, Any] = _C.build_info()
    return info
