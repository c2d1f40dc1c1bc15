"""The programs that the stages run: ``python -m gpu_proof smoke --device cuda``, from bench/ or with it on PYTHONPATH.

Where ``ALPHAEXT_EMULATED_GPU`` names a build of tests/emulated_gpu.py, the kernels of that GPU answer on CPU tensors.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

# Program -> what yields its parts.
PROGRAMS = {
    "smoke": "smoke:parts",
    "core": "core:parts",
    "profiled": "profiled:parts",
    "large": "large:parts",
    "training": "trainings:parts",
    "peers": "heads:peers",
    "compiled": "heads:compiled_peers",
}

# What is small runs where no GPU is, and compiles for a processor that others use, too.
SLOWER = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a program's parts."""
    parser = argparse.ArgumentParser(prog="python -m gpu_proof", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", choices=list(PROGRAMS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file to write; parts that it holds are not run again")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="run parts whose name holds a text")
    parser.add_argument("--without", action="append", default=[], metavar="TEXT", help="and none whose name holds it")
    parser.add_argument("--patient", action="store_true", help="let parts take as long as they want")
    parser.add_argument("--small", action="store_true", help="one small size: does everything run through?")
    options = parser.parse_args(arguments)
    tests = Path(__file__).resolve().parents[2] / "tests"
    sys.path[:0] = [str(tests), str(tests / "helpers")]
    import emulated_gpu

    if emulated_gpu.DIRECTORY:
        emulated_gpu.load(Path(emulated_gpu.DIRECTORY))
    import torch

    from gpu_proof.parts import Part, finish, run_parts
    from gpu_proof.timing import require_gpu

    require_gpu(options.device)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*with replacement")
    module, _, name = PROGRAMS[options.program].partition(":")
    parts = getattr(importlib.import_module(f"gpu_proof.{module}"), name)(options.device, options.small)
    patience = 0 if options.patient else SLOWER if options.small and options.program != "smoke" else 1
    chosen = (
        Part(part.name, part.work, patience * part.seconds)
        for part in parts
        if (not options.only or any(text in part.name for text in options.only))
        and not any(text in part.name for text in options.without)
    )
    finish(run_parts(chosen, options.output))


if __name__ == "__main__":
    main()
