"""``alphaext demo`` and ``alphaext info``: what works without data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

import alphaext

from ..utils.checks import check_integer
from . import results
from .options import Options, option


@dataclass(frozen=True, kw_only=True)
class Demo(Options):
    """Long-tailed digits, before and after (no network, no GPU, under a minute).

    Makes scikit-learn's handwritten digits long-tailed, trains a small network on them, and repairs its classifier: a table of
    the accuracies before and after, the learned alphas, and a picture of both.
    """

    section: ClassVar[str] = "demo"
    draws: int = option(8, help="long-tailed data sets to draw")
    seed: int = option(0, help="of the first draw")
    output: Path = option(Path("alphaext_demo.png"), help="PNG to write")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Run the demonstration; returns the accuracies of each draw."""
        from .demonstration import run_demo

        check_integer(self.draws, "draws", minimum=1, maximum=2**32 - 1)
        check_integer(self.seed, "seed", minimum=0, maximum=2**32 - 1)
        if self.output.suffix.lower() != ".png":
            raise ValueError(f"output must end in .png, got {str(self.output)!r}")
        if self.output.is_dir() or not self.output.absolute().parent.is_dir():
            raise ValueError(f"output must be a file in a directory that exists, got {str(self.output)!r}")
        draws = run_demo(self.draws, self.seed, self.output, results.console_or_quiet(console))
        return {"draws": [{"seed": d.seed, "gamma": d.gamma, "before": d.before, "after": d.after} for d in draws]}


@dataclass(frozen=True, kw_only=True)
class Info(Options):
    """How the extension was built."""

    section: ClassVar[str] = "info"

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Print how the extension was built, and return it."""
        console, info = results.console_or_quiet(console), alphaext.build_info()
        for name, value in info.items():
            console.print(f"{name}: {value}", highlight=False, markup=False)
        more = (
            "TORCH_CUDA_ARCH_LIST=all builds for other GPUs too" if info["cuda"] else "ALPHAEXT_CUDA=1 builds the CUDA kernels"
        )
        console.print(f"{more}: set it and install again from the checkout", highlight=False, markup=False)
        return dict(info)
