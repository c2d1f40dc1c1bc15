"""The extension with its CUDA kernels on the CPU: operators, launchers and kernels are the real text, the GPU is made of fibers.

    python tests/emulated_gpu.py build/emulated
    ALPHAEXT_EMULATED_GPU=build/emulated pytest tests/test_cuda.py

compiles every CUDA source by the C++ compiler against tests/cpp/cuda_shim.h and cuda_runtime_shim.h, and then runs the GPU tests on
CPU tensors (conftest.py): everything but streams, graphs and what depends on a GPU's memory order and speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where the library is that stands for a GPU, if any; and the device of GPU tests.
DIRECTORY = os.environ.get("ALPHAEXT_EMULATED_GPU")
GPU = "cpu" if DIRECTORY else "cuda"
SOURCES = ("ops.cpp", "cpu_head.cpp", "gpu_head.cpp", "training_ops.cpp", "module.cpp")


def flags() -> list[str]:
    """Of the compiler, for every source."""
    import pybind11
    from torch.utils import cpp_extension

    defined = {"ALPHAEXT_WITH_CUDA": "1", "ALPHAEXT_EMULATED_GPU": "1", "SHIM_FIBERS": "1", "TORCH_EXTENSION_NAME": "_C"}
    defined |= {"TORCH_TARGET_VERSION": "0x020a000000000000", "ALPHAEXT_VERSION": '"0.1.0"', "ALPHAEXT_FLAGS": '"emulated"'}
    defined |= {"ALPHAEXT_TORCH_VERSION": '"emulated"', "ALPHAEXT_CUDA_VERSION": '"emulated"', "ALPHAEXT_CUDA_ARCHS": '"emulated"'}
    import sysconfig

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
    listed = (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8").splitlines()
    names = [*SOURCES, *(name for line in listed if (name := line.partition("#")[0].strip()))]
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
    command = [compiler, "-shared", *map(str, objects), *link, "-ltorch", "-ltorch_cpu", "-lc10", "-pthread", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def load(directory: Path) -> None:
    """Make it the extension of ``alphaext``, which must not have been imported yet."""
    import importlib.util

    import torch  # noqa: F401  its libraries must be there

    spec = importlib.util.spec_from_file_location("alphaext._C", directory / "_C.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["alphaext._C"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
