"""Builds the extension module alphaext._C; everything else about the package is in pyproject.toml.

Environment variables: ALPHAEXT_CUDA (0, 1 or unset), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CC, CXX.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a PEP 517 build does not put this directory on the path

from build_support import cuda, jobs, kept  # noqa: E402

MINIMUM_TORCH = (2, 10)
MINIMUM_SETUPTOOLS = (77,)
HOW_TO_INSTALL = (
    "Without build isolation these must be installed first: pip install 'setuptools>=77' 'torch>=2.10' "
    "'pybind11>=2.13' ninja numpy"
)
# Restricts torch's headers to what exists in 2.10, so that the library runs under every torch from there on.
TORCH_TARGET_VERSION = "0x020a000000000000"

# The same on every machine: the kernels' instruction set is chosen when they run (csrc/cpu/dispatch.cpp). No
# -ffast-math: it would break infinities and NaN. -fopenmp-simd obeys "omp simd" alone and starts no threads.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


def stop(message: str) -> None:
    """Ends the build with a message and no traceback."""
    raise SystemExit(f"\nalphaext cannot be built: {message}\n")


def check_requirements() -> None:
    """What pip installs by itself, except under --no-build-isolation."""
    if sys.platform != "linux":
        stop(f"the platform is {sys.platform!r}; the build supports 'linux'")
    missing = []
    for name in ("torch", "pybind11"):
        try:
            __import__(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if shutil.which("ninja") is None:
        try:
            # pip's ninja is not on PATH when the environment's pip is called without activating the environment.
            import ninja

            os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
        except ImportError:
            missing.append("ninja")
    if missing:
        stop(f"missing {', '.join(missing)}. {HOW_TO_INSTALL}")
    import torch

    for name, version, minimum in (
        ("torch", torch.__version__, MINIMUM_TORCH),
        ("setuptools", setuptools.__version__, MINIMUM_SETUPTOOLS),  # an older one does not understand pyproject.toml
    ):
        if tuple(int(part) for part in version.split(".")[: len(minimum)]) < minimum:
            stop(f"{name} is {version}; it must be {'.'.join(map(str, minimum))} or newer. {HOW_TO_INSTALL}")


check_requirements()

import pybind11  # noqa: E402
import torch  # noqa: E402

try:
    DECISION = cuda.decide(os.environ, torch.version.cuda)
    JOBS = jobs.job_count(os.environ, jobs.available_processors(), jobs.available_memory())
    SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
    ARCHITECTURES: list[str] = []
    if DECISION.toolkit is None:
        SOURCES.remove("csrc/ops/head_on_gpu.cpp")
    else:
        SOURCES += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
        NATIVE = ["{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())]
        TORCH_ARCHITECTURES = torch._C._cuda_getArchFlags() if torch.version.cuda else None
        ARCHITECTURES = cuda.choose_architectures(os.environ, DECISION.toolkit, TORCH_ARCHITECTURES, NATIVE)
except (cuda.ConfigurationError, ValueError) as error:
    stop(str(error))

# torch reads this when its build helper is imported. Left to itself it takes the nvcc on PATH for the real one and
# guesses a wrong toolkit where that is a wrapper script.
if DECISION.toolkit is not None:
    os.environ["CUDA_HOME"] = str(DECISION.toolkit.home)
os.environ["MAX_JOBS"] = str(JOBS)

from torch.utils import cpp_extension  # noqa: E402

if DECISION.toolkit is not None:
    # A torch without CUDA does not even read the variable; it can build the kernels all the same.
    cpp_extension.CUDA_HOME = str(DECISION.toolkit.home)


def compiler_text() -> str:
    """The C++ compiler and its version."""
    compiler = cpp_extension.get_cxx_compiler()
    version = (cuda.run([compiler, "--version"]) or "which does not run").partition("\n")[0]
    return f"{compiler}: {version}"


def print_configuration() -> None:
    """What is going to be built, and why."""
    toolkit = DECISION.toolkit
    lines = [
        f"torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'}), Python {sys.version.split()[0]}",
        f"CUDA kernels  {'off' if toolkit is None else 'on'}: {DECISION.reason}",
    ]
    lines += [f"  looked at   {place}" for place in DECISION.rejected]
    if toolkit is not None:
        lines += [
            f"nvcc          {toolkit.nvcc} (CUDA {toolkit.version_text}, found by {toolkit.found_by})",
            f"architectures {'; '.join(ARCHITECTURES)} (TORCH_CUDA_ARCH_LIST=all or a list asks for more)",
            f"CUDA runtime  {toolkit.library_directory / 'libcudart_static.a'}",
        ]
        lines += [f"CUDA headers  {place}" for place in toolkit.include_directories]
    lines += [
        f"C++ compiler  {compiler_text()}",
        f"flags         {' '.join(CXX_FLAGS)}",
        f"jobs          {JOBS}",
    ]
    print("alphaext build configuration", *[f"  {line}" for line in lines], sep="\n", flush=True)


def kept_library(version: str) -> Path:
    """Where the library of this text, these tools and these flags is kept."""
    toolkit = DECISION.toolkit
    tools = [version, torch.__version__, pybind11.__version__, compiler_text(), str(sysconfig.get_config_var("EXT_SUFFIX"))]
    tools += [*CXX_FLAGS, *NVCC_FLAGS, *ARCHITECTURES, "CPU" if toolkit is None else toolkit.version_text]
    tools += [f"{name}={os.environ.get(name, '')}" for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]  # nvcc reads them
    return kept.place(ROOT, kept.fingerprint(ROOT, tools))


class BuildExtension(cpp_extension.BuildExtension):
    """torch's builder, told what this machine has."""

    def build_extensions(self) -> None:
        """Prints the configuration, then compiles, or takes the library of an earlier build."""
        started = time.monotonic()
        print_configuration()
        (extension,) = self.extensions
        library = Path(self.get_ext_fullpath(extension.name))
        kept_here = kept_library(self.distribution.get_version())
        if kept_here.is_file() and not self.force:
            library.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept_here, library)
            print(f"nothing to compile: an earlier build is in {kept_here}", flush=True)
            return
        self.compile()
        kept.keep(library, kept_here)
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)

    def compile(self) -> None:
        """Compiles what changed, and links."""
        version = self.distribution.get_version()
        for extension in self.extensions:
            extension.extra_compile_args["cxx"].append(f'-DALPHAEXT_VERSION="{version}"')
        if torch.version.cuda is None:
            # Such a torch lets ninja follow headers of C++ sources only: an old object would survive a changed .cuh.
            for path in Path(self.build_temp).glob("csrc/cuda/*.o"):
                path.unlink()
        original = getattr(cpp_extension, "_check_cuda_version", None)
        if original is None:
            super().build_extensions()
            return

        nvcc_version = DECISION.toolkit.version_text if DECISION.toolkit else None

        # torch refuses an nvcc of another CUDA major version than its own. That protects extensions that share torch's
        # CUDA runtime; this one brings its own, linked statically, and takes nothing from torch's but the stream, which
        # belongs to the driver. Only that one refusal is turned into a note.
        def check_cuda_version(*arguments: Any) -> None:
            try:
                original(*arguments)
            except RuntimeError as error:
                if error.args[0] != cpp_extension.CUDA_MISMATCH_MESSAGE:
                    raise
                print(
                    f"note: nvcc is of CUDA {nvcc_version}, torch of CUDA {torch.version.cuda}. The kernels link their "
                    "own CUDA runtime, so this works where the GPU's driver supports both.",
                    flush=True,
                )

        cpp_extension._check_cuda_version = check_cuda_version
        try:
            super().build_extensions()
        finally:
            cpp_extension._check_cuda_version = original


def make_extension() -> setuptools.Extension:
    """alphaext._C with all its flags."""
    # Given to the C++ compiler alone, so that no CUDA source can come to depend on torch; as system directories, so
    # that their warnings stay out of ours.
    system_includes = [pybind11.get_include(), *cpp_extension.include_paths()]
    cxx_flags = [
        *CXX_FLAGS,
        *[f"-isystem{place}" for place in system_includes],
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f'-DALPHAEXT_TORCH_VERSION="{torch.__version__}"',
        f'-DALPHAEXT_FLAGS="{" ".join(CXX_FLAGS)}"',
    ]
    nvcc_flags = [*NVCC_FLAGS]
    # libtorch.so must stay among the needed libraries although no symbol is taken from it directly: through it, and not
    # by name, comes libtorch_cuda where there is one. torch_python and torch_cuda are left out on purpose.
    link_flags = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    macros: list[tuple[str, str | None]] = []
    library_directories = cpp_extension.library_paths()
    toolkit = DECISION.toolkit
    if toolkit is not None:
        macros += [
            ("ALPHAEXT_WITH_CUDA", "1"),
            ("ALPHAEXT_CUDA_VERSION", f'"{toolkit.version_text}"'),
            ("ALPHAEXT_CUDA_ARCHS", f'"{";".join(ARCHITECTURES)}"'),
        ]
        nvcc_flags += cuda.architecture_flags(ARCHITECTURES)
        nvcc_flags += [f"--threads={min(JOBS, len(ARCHITECTURES), 4)}"]
        nvcc_flags += [f"-isystem={place}" for place in toolkit.include_directories]
        # The runtime's symbols are hidden: torch loads its own runtime globally, and the two must not be mixed.
        link_flags += [f"{toolkit.library_directory / 'libcudart_static.a'}", "-Wl,--exclude-libs,ALL", "-ldl", "-lrt"]
        link_flags += ["-lpthread"]
    return setuptools.Extension(
        "alphaext._C",
        SOURCES,
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=library_directories,
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        extra_link_args=link_flags,
        language="c++",
    )


setuptools.setup(ext_modules=[make_extension()], cmdclass={"build_ext": BuildExtension})
