"""Finds a CUDA toolkit that can compile the kernels, and decides for which GPU architectures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MINIMUM_VERSION = (12, 0)
# What the kernels are written for. An older GPU would need code that nothing here tests.
MINIMUM_ARCHITECTURE = (7, 5)
# What is built where no GPU is seen: intermediate code (PTX), which any GPU from the data-centre generation of 2020 on
# compiles for itself at first use.
BASE_ARCHITECTURE = (8, 0)
# Ends an architecture of which only the intermediate code is built, no machine code.
AS_PTX = " as PTX"
# Where torch itself has no CUDA, it cannot say for which GPUs it was built: the data-centre generations since then.
FALLBACK_ARCHITECTURES = ("8.0", "9.0", "10.0")
# The names that torch.utils.cpp_extension accepts in TORCH_CUDA_ARCH_LIST, from MINIMUM_ARCHITECTURE on.
NAMED_ARCHITECTURES = {
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


class ConfigurationError(Exception):
    """The build was asked for something that this machine cannot give."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit whose compiler runs and whose headers and static runtime were found."""

    home: Path
    version: tuple[int, int]
    architectures: tuple[str, ...]  # what nvcc can compile for, as "8.0"
    include_directories: tuple[Path, ...]  # needed besides those that nvcc adds itself
    library_directory: Path  # holds libcudart_static.a
    found_by: str

    @property
    def nvcc(self) -> Path:
        """The compiler itself, never a wrapper."""
        return self.home / "bin" / "nvcc"

    @property
    def version_text(self) -> str:
        """The version as in "13.0"."""
        return f"{self.version[0]}.{self.version[1]}"


@dataclass
class Search:
    """The toolkit, or None, and each place that was looked at with what was wrong there."""

    toolkit: Toolkit | None = None
    rejected: list[str] = field(default_factory=list)


# ---- Where toolkits live -------------------------------------------------------------------------------------------


def site_directories() -> list[Path]:
    """Every directory that may hold pip's packages, the surrounding environment's too when pip builds in isolation."""
    places = [entry for entry in sys.path if entry.rstrip("/").endswith(("site-packages", "dist-packages"))]
    places += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return list(dict.fromkeys(Path(place) for place in places))


def version_of_name(path: Path) -> tuple[int, ...]:
    """The numbers in a directory's name: sorts cuda-13.0 after cuda-9.2."""
    return tuple(int(number) for number in re.findall(r"\d+", path.name))


def candidates(environment: Mapping[str, str], root: Path, sites: Iterable[Path]) -> list[tuple[str, Path | None]]:
    """(what the place is called, its nvcc), the user's own choice first; None where the place itself is missing."""
    found: list[tuple[str, Path | None]] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        value = environment.get(variable)
        if value:
            found.append((f"{variable}={value}", Path(value) / "bin" / "nvcc"))
        else:
            found.append((f"{variable} (not set)", None))
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    found.append(("nvcc on PATH", Path(on_path) if on_path else None))
    local = root / "usr" / "local"
    versioned = sorted(local.glob("cuda-*"), key=version_of_name, reverse=True)
    for home in [local / "cuda", *versioned]:
        found.append((str(home), home / "bin" / "nvcc"))
    for site in sites:
        # pip's compiler wheels (CUDA 13 and later) unpack into one folder for each major version.
        homes = sorted(site.glob("nvidia/cu[0-9]*"), key=version_of_name, reverse=True)
        if not homes:
            found.append((f"pip's packages in {site}/nvidia/cu*", None))
        for home in homes:
            found.append((f"pip's packages in {home}", home / "bin" / "nvcc"))
    return found


# ---- Asking nvcc ---------------------------------------------------------------------------------------------------


def run(command: Sequence[str | Path]) -> str | None:
    """What a command prints, or None where it cannot be run or fails."""
    try:
        finished = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout if finished.returncode == 0 else None


def real_home(nvcc: Path) -> Path | None:
    """The toolkit that an nvcc belongs to.

    The nvcc that is found may be a script that starts another one, so its own path says nothing. A dry run makes the
    real one print the directory it was started from.
    """
    printed = run([nvcc, "--dryrun", "-x", "cu", os.devnull])
    match = re.search(r"^#\$ _HERE_=(.+)$", printed or "", re.MULTILINE)
    return Path(match.group(1).strip()).resolve().parent if match else None


def parse_version(printed: str) -> tuple[int, int] | None:
    """(13, 0) from what `nvcc --version` prints."""
    match = re.search(r"release (\d+)\.(\d+)", printed)
    return (int(match.group(1)), int(match.group(2))) if match else None


def parse_architectures(printed: str) -> list[str]:
    """["7.5", "10.0", ...] from "compute_75 compute_100" or "sm_75 sm_100", oldest first."""
    numbers = {int(number) for number in re.findall(r"\b(?:compute|sm)_(\d+)\b", printed)}
    return [f"{number // 10}.{number % 10}" for number in sorted(numbers)]


def inspect_toolkit(nvcc: Path, found_by: str, root: Path, sites: Iterable[Path]) -> Toolkit | str:
    """The toolkit of this nvcc, or what is wrong with it."""
    if not nvcc.is_file():
        return f"there is no {nvcc}"
    version = parse_version(run([nvcc, "--version"]) or "")
    if version is None:
        return f"{nvcc} does not run: `{nvcc} --version` fails or names no release"
    if version < MINIMUM_VERSION:
        minimum = ".".join(map(str, MINIMUM_VERSION))
        return f"{nvcc} is CUDA {version[0]}.{version[1]}; alphaext needs {minimum} or newer"
    home = real_home(nvcc)
    if home is None or not (home / "bin" / "nvcc").is_file():
        return f"{nvcc} does not tell which toolkit it belongs to (`{nvcc} --dryrun -x cu {os.devnull}`)"
    architectures = parse_architectures(run([nvcc, "--list-gpu-arch"]) or "")
    if not architectures:
        return f"{nvcc} --list-gpu-arch lists nothing"

    sites = list(sites)
    own_includes = [home / "include", *sorted(home.glob("targets/*/include"))]
    system_includes = [root / "usr" / "include"]
    # Of pip's packages only those of the same CUDA: headers of another major version do not fit this compiler.
    wheel_homes = [site / "nvidia" / f"cu{version[0]}" for site in sites]
    extra_includes: list[Path] = []
    # The first is what every kernel includes; the second nvcc itself includes, and pip ships it apart.
    for header in ("cuda_runtime.h", "crt/host_config.h"):
        if any((place / header).is_file() for place in [*own_includes, *system_includes]):
            continue
        places = [wheel / "include" for wheel in wheel_homes]
        place = next((place for place in places if (place / header).is_file()), None)
        if place is None:
            looked = ", ".join(str(place) for place in [*own_includes, *system_includes, *places])
            return f"{nvcc} runs, but {header} is missing (looked in {looked})"
        if place not in extra_includes:
            extra_includes.append(place)

    library_directories = [
        home / "lib64",
        home / "lib",
        *sorted(home.glob("targets/*/lib")),
        *[wheel / "lib" for wheel in wheel_homes],
        *sorted((root / "usr" / "lib").glob("*-linux-gnu")),
    ]
    library_directory = next((place for place in library_directories if (place / "libcudart_static.a").is_file()), None)
    if library_directory is None:
        looked = ", ".join(map(str, library_directories))
        return f"{nvcc} runs, but libcudart_static.a is missing (looked in {looked})"
    return Toolkit(home, version, tuple(architectures), tuple(extra_includes), library_directory, found_by)


def find_toolkit(environment: Mapping[str, str], root: Path = Path("/"), sites: Iterable[Path] | None = None) -> Search:
    """Looks in every place a toolkit may be; the first that works is taken."""
    places = list(site_directories() if sites is None else sites)
    search = Search()
    for name, nvcc in candidates(environment, root, places):
        result = "nothing there" if nvcc is None else inspect_toolkit(nvcc, name, root, places)
        if isinstance(result, Toolkit):
            search.toolkit = result
            return search
        search.rejected.append(f"{name}: {result}")
    return search


# ---- On or off -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """Whether the CUDA kernels are built, and why."""

    toolkit: Toolkit | None
    reason: str
    rejected: tuple[str, ...] = ()


def how_to_get(torch_cuda: str | None) -> str:
    """Two ways to a toolkit, in words."""
    pinned = f"=={torch_cuda}.*" if torch_cuda and int(torch_cuda.partition(".")[0]) >= 13 else ""
    return (
        "To get one, install NVIDIA's CUDA toolkit and point CUDA_HOME at it, or take pip's compiler wheels (CUDA 13 "
        f"or newer): pip install 'nvidia-cuda-nvcc{pinned}' 'nvidia-cuda-crt{pinned}' 'nvidia-nvvm{pinned}' "
        f"'nvidia-cuda-runtime{pinned}' nvidia-cuda-cccl. ALPHAEXT_CUDA=0 builds for the CPU alone."
    )


def decide(
    environment: Mapping[str, str],
    torch_cuda: str | None,
    root: Path = Path("/"),
    sites: Iterable[Path] | None = None,
) -> Decision:
    """CUDA on where torch has it and a toolkit is there, with or without a GPU; ALPHAEXT_CUDA=0 or 1 overrules."""
    wanted = environment.get("ALPHAEXT_CUDA", "").strip()
    if wanted not in ("", "0", "1"):
        raise ConfigurationError(
            f"ALPHAEXT_CUDA is {wanted!r}; it must be 1 (build the CUDA kernels), 0 (CPU only) or unset (decide by "
            "what is there)"
        )
    if wanted == "0":
        return Decision(None, "ALPHAEXT_CUDA=0")
    if wanted == "" and torch_cuda is None:
        return Decision(None, "this torch is built without CUDA")
    search = find_toolkit(environment, root, sites)
    if search.toolkit is not None:
        reason = "ALPHAEXT_CUDA=1" if wanted == "1" else f"torch has CUDA {torch_cuda} and a toolkit was found"
        return Decision(search.toolkit, reason, tuple(search.rejected))
    if wanted == "1":
        looked = "".join(f"\n  - {place}" for place in search.rejected)
        raise ConfigurationError(
            f"ALPHAEXT_CUDA=1, but no usable CUDA toolkit was found. Looked at:{looked}\n{how_to_get(torch_cuda)}"
        )
    return Decision(
        None,
        f"torch has CUDA {torch_cuda}, but no usable toolkit was found. {how_to_get(torch_cuda)}",
        tuple(search.rejected),
    )


# ---- Architectures -------------------------------------------------------------------------------------------------


def architecture_number(architecture: str) -> tuple[int, int]:
    """(9, 0) from "9.0", "9.0a" or "9.0+PTX"."""
    match = re.match(r"(\d+)\.(\d)", architecture)
    if match is None:
        raise ValueError(f"architecture is {architecture!r}; it must look like '9.0'")
    return int(match.group(1)), int(match.group(2))


def every_architecture(toolkit: Toolkit, torch_flags: str | None) -> list[str]:
    """What torch was built for (`torch_flags`, as in "sm_80 sm_90") as far as nvcc knows it, with PTX for the newest."""
    known = {architecture_number(architecture) for architecture in toolkit.architectures}
    offered = parse_architectures(torch_flags) if torch_flags else list(FALLBACK_ARCHITECTURES)
    usable = [
        architecture
        for architecture in offered
        if architecture_number(architecture) in known and architecture_number(architecture) >= MINIMUM_ARCHITECTURE
    ]
    # A torch for GPUs that all came after this toolkit: they can still run the newest PTX that it writes.
    chosen = usable or [toolkit.architectures[-1]]
    return [*chosen[:-1], f"{chosen[-1]}+PTX"]


def parse_architecture_list(value: str, native: Iterable[str] = (), every: Iterable[str] = ()) -> list[str]:
    """The entries of TORCH_CUDA_ARCH_LIST, with its names ("Hopper", "native", "all") written out, each once."""
    entries: list[str] = []
    for entry in re.split(r"[;,\s]+", value.strip()):
        if entry == "native":
            here = list(native)
            if not here:
                raise ConfigurationError("TORCH_CUDA_ARCH_LIST is 'native', but torch sees no GPU on this machine")
            entries += here
        elif entry == "all":
            entries += every
        else:
            entries += NAMED_ARCHITECTURES.get(entry, entry).split(";")
    for entry in entries:
        if re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry) is None:
            names = ", ".join(NAMED_ARCHITECTURES)
            raise ConfigurationError(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}; allowed are numbers such as 8.0 or 9.0a, each with +PTX or "
                f"without, native, all, and the names {names}; separated by ; or spaces"
            )
    return list(dict.fromkeys(entries))


def architectures_here(toolkit: Toolkit, native: Iterable[str]) -> list[str]:
    """The architectures of the GPUs that are seen, or, where none can be compiled for, one as PTX."""
    known = sorted(architecture_number(architecture) for architecture in toolkit.architectures)
    seen = sorted({architecture_number(gpu) for gpu in native if architecture_number(gpu) >= MINIMUM_ARCHITECTURE})
    chosen = [f"{major}.{minor}" for major, minor in seen if (major, minor) in known]
    if any(gpu > known[-1] for gpu in seen):  # a GPU newer than the toolkit compiles the newest PTX
        chosen.append("{}.{}".format(*known[-1]) + AS_PTX)
    base = next((architecture for architecture in known if architecture >= BASE_ARCHITECTURE), known[-1])
    return chosen or ["{}.{}".format(*base) + AS_PTX]


def choose_architectures(
    environment: Mapping[str, str], toolkit: Toolkit, torch_flags: str | None, native: Iterable[str] = ()
) -> list[str]:
    """The architectures to build: those of TORCH_CUDA_ARCH_LIST where it is set, else what this machine's GPUs need."""
    native = list(native)
    known = {architecture_number(architecture) for architecture in toolkit.architectures}
    wanted = environment.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not wanted:
        return architectures_here(toolkit, native)
    chosen = parse_architecture_list(wanted, native, every_architecture(toolkit, torch_flags))
    for entry in chosen:
        if architecture_number(entry) not in known:
            raise ConfigurationError(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}, but {toolkit.nvcc} (CUDA {toolkit.version_text}) "
                f"compiles for {', '.join(toolkit.architectures)} only"
            )
    return chosen


def architecture_flags(architectures: Iterable[str]) -> list[str]:
    """The nvcc flags for such a list."""
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix(AS_PTX).removesuffix("+PTX").replace(".", "")
        if not architecture.endswith(AS_PTX):
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith(("+PTX", AS_PTX)):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
