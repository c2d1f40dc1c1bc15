"""The extension with its CUDA kernels on the CPU: operators, launchers and kernels are the real text, the GPU is fibers.

    python tests/emulated_gpu.py build/emulated          # build it
    python tests/emulated_gpu.py build/emulated --test   # and run the tests that it can run
    ALPHAEXT_EMULATED_GPU=build/emulated pytest -m gpu   # those that need a GPU

Needs pybind11 and a compiler with C++20. Every CUDA source is compiled by the C++ compiler against tests/cpp/cuda_shim.h and
cuda_runtime_shim.h; then GPU tests run on CPU tensors (conftest.py). What it cannot show: streams, graphs, a GPU's memory
order, and speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where the library is that stands for a GPU, if any; and the device of GPU tests.
DIRECTORY = os.environ.get("ALPHAEXT_EMULATED_GPU")
GPU = "cpu" if DIRECTORY else "cuda"
# What is run beside the GPU tests: heads and trainings against the plain reference. Long trainings are left out.
TESTS = ["head/test_alphanet.py", "head/test_direct.py", "training/test_options.py", "training/test_engines.py"]
LONG = "not 300_steps and not long_trainings"
# The command that proves the package on a GPU, from its first stage to its last.
ORDER = "bench/test_gpu_order.py"


_KEPT: list[object] = []


def flags() -> list[str]:
    """Of the compiler, for every source."""
    try:
        import pybind11
    except ImportError:
        raise SystemExit('the emulated GPU is built with pybind11: pip install "pybind11>=2.13"') from None
    from torch.utils import cpp_extension

    version = runpy.run_path(str(ROOT / "alphaext/utils/environment.py"))["__version__"]
    defined = {"ALPHAEXT_WITH_CUDA": "1", "ALPHAEXT_EMULATED_GPU": "1", "SHIM_FIBERS": "1", "TORCH_EXTENSION_NAME": "_C"}
    defined |= {
        "TORCH_TARGET_VERSION": "0x020a000000000000",
        "ALPHAEXT_VERSION": f'"{version}"',
        "ALPHAEXT_FLAGS": '"emulated"',
    }
    defined |= {f"ALPHAEXT_{name}": '"emulated"' for name in ("TORCH_VERSION", "CUDA_VERSION", "CUDA_ARCHS")}
    system = [pybind11.get_include(), *cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    return [
        *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-pthread"),
        *(f"-D{name}={value}" for name, value in defined.items()),
        *(f"-isystem{place}" for place in system),
        *(f"-I{ROOT / place}" for place in ("csrc", "tests/cpp")),
    ]


def build(directory: Path) -> Path:
    """Compile what is out of date, and link; returns the library."""
    from torch.utils import cpp_extension

    directory.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++")
    names = sorted(str(path.relative_to(ROOT / "csrc")) for path in ROOT.glob("csrc/**/*") if path.suffix in (".cpp", ".cu"))
    common = flags()
    newest = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/**/*.*h"), *ROOT.glob("tests/cpp/*shim*"), Path(__file__)])

    def compiled(name: str) -> Path:
        source, made = ROOT / "csrc" / name, directory / (name.replace("/", "_") + ".o")
        if not made.exists() or made.stat().st_mtime < max(newest, source.stat().st_mtime):
            language = ["-x", "c++"] if name.endswith(".cu") else []
            subprocess.run([compiler, *common, *language, "-c", str(source), "-o", str(made)], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, names))
    library = directory / "_C.so"
    link = [f"-L{place}" for place in cpp_extension.library_paths()]
    link += [f"-Wl,-rpath,{place}" for place in cpp_extension.library_paths()]
    link += ["-ltorch", "-ltorch_cpu", "-lc10", "-pthread"]
    subprocess.run([compiler, "-shared", *map(str, objects), *link, "-o", str(library)], check=True)
    return library


def load(directory: Path) -> None:
    """Make it the extension of ``alphaext``, which must not have been imported yet."""
    import torch

    # The one operator of ATen that the GPU's head calls and a CPU has not got.
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda left, right, dtype: left.to(dtype) @ right.to(dtype), "CPU")
    _KEPT.append(library)
    spec = importlib.util.spec_from_file_location("alphaext._C", directory / "_C.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["alphaext._C"] = module
    spec.loader.exec_module(module)


def test(directory: Path) -> int:
    """Run the tests; returns pytest's exit code, the worse of two."""
    environment = {**os.environ, "ALPHAEXT_EMULATED_GPU": str(directory.resolve()), "OMP_NUM_THREADS": "1"}
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    selections = [["-m", "gpu"], ["-k", LONG, *(str(ROOT / "tests" / name) for name in [*TESTS, ORDER])]]
    return max(subprocess.run([*pytest, *selected], cwd=ROOT, env=environment).returncode for selected in selections)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="where to build it")
    parser.add_argument("--test", action="store_true", help="run the tests that it can run")
    options = parser.parse_args()
    print(build(options.directory))
    return test(options.directory) if options.test else 0


if __name__ == "__main__":
    sys.exit(main())
