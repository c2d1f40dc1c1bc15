"""The build's decisions on made-up machines: which toolkit, which architectures, how many jobs; nothing is compiled."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "build_support").is_dir():
    pytest.skip("the tests of the build need the source tree", allow_module_level=True)


def load(name: str) -> ModuleType:
    """A module of build_support, which is not installed; the source tree on sys.path would hide alphaext."""
    spec = importlib.util.spec_from_file_location(f"build_support_{name}", ROOT / "build_support" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


cuda = load("cuda")
jobs = load("jobs")
kept = load("kept")

ARCHITECTURES = "compute_75 compute_80 compute_90 compute_100 compute_120"
HEADERS = ("cuda_runtime.h", "crt/host_config.h")


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def write_files(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


def write_compiler(home: Path, version: str = "13.0", architectures: str = ARCHITECTURES) -> Path:
    """An nvcc that answers what the build asks; like the real one it knows where it was started from."""
    return write_script(
        home / "bin" / "nvcc",
        f"""case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --dryrun) echo "#\\$ _HERE_=$(dirname "$0")"; echo "#\\$ TOP=$(dirname "$0")/.." ;;
  --list-gpu-arch) printf '%s\\n' {architectures} ;;
  *) exit 1 ;;
esac
""",
    )


def write_toolkit(home: Path, version: str = "13.0", architectures: str = ARCHITECTURES) -> Path:
    write_compiler(home, version, architectures)
    write_files(*[home / "include" / header for header in HEADERS], home / "lib64" / "libcudart_static.a")
    return home


class Machine:
    """An empty root directory, an environment with nothing but the shell's commands, and a site-packages."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.site = directory / "venv" / "site-packages"
        self.site.mkdir(parents=True)
        self.environment = {"PATH": f"{directory / 'bin'}"}
        self.bin = directory / "bin"

    def decide(self, torch_cuda: str | None = "13.2", **environment: str):
        return cuda.decide({**self.environment, **environment}, torch_cuda, self.root, [self.site])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# ---- Which toolkit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_the_users_own_choice_comes_first(machine: Machine, tmp_path: Path, variable: str) -> None:
    write_toolkit(machine.root / "usr/local/cuda", "12.8")
    home = write_toolkit(tmp_path / "mine")
    toolkit = machine.decide(**{variable: str(home)}).toolkit
    assert (toolkit.home, toolkit.version, toolkit.include_directories) == (home, (13, 0), ())
    assert toolkit.library_directory == home / "lib64"
    assert toolkit.nvcc == home / "bin" / "nvcc"


def test_a_wrapper_script_on_path_leads_to_the_real_toolkit(machine: Machine, tmp_path: Path) -> None:
    home = write_toolkit(tmp_path / "elsewhere" / "cuda-13.0")
    write_script(machine.bin / "nvcc", f'exec {home}/bin/nvcc "$@"\n')
    toolkit = machine.decide().toolkit
    assert toolkit.home == home
    assert toolkit.found_by == "nvcc on PATH"


def test_a_link_on_path_leads_to_the_real_toolkit(machine: Machine, tmp_path: Path) -> None:
    home = write_toolkit(tmp_path / "cuda-13.0")
    (tmp_path / "cuda").symlink_to(home)
    assert machine.decide(CUDA_HOME=str(tmp_path / "cuda")).toolkit.home == home


def test_usr_local_is_searched_when_nothing_is_set(machine: Machine) -> None:
    write_toolkit(machine.root / "usr/local/cuda-9.9", "9.9")
    write_toolkit(machine.root / "usr/local/cuda-12.8", "12.8")
    newest = write_toolkit(machine.root / "usr/local/cuda-13.0")
    assert machine.decide().toolkit.home == newest


def test_a_cuda_home_without_a_compiler_is_reported_and_passed_over(machine: Machine, tmp_path: Path) -> None:
    home = write_toolkit(machine.root / "usr/local/cuda")
    decision = machine.decide(CUDA_HOME=str(tmp_path / "gone"))
    assert decision.toolkit.home == home
    assert f"CUDA_HOME={tmp_path / 'gone'}: there is no {tmp_path / 'gone/bin/nvcc'}" in decision.rejected


def test_pip_wheels_count(machine: Machine) -> None:
    home = machine.site / "nvidia/cu13"
    write_compiler(home, "13.2")
    write_files(*[home / "include" / header for header in HEADERS], home / "lib/libcudart_static.a")
    toolkit = machine.decide().toolkit
    assert (toolkit.home, toolkit.library_directory) == (home, home / "lib")


def test_headers_and_runtime_may_come_from_pip(machine: Machine, tmp_path: Path) -> None:
    write_compiler(tmp_path / "bare")
    wheel = machine.site / "nvidia/cu13"
    write_files(*[wheel / "include" / header for header in HEADERS], wheel / "lib/libcudart_static.a")
    toolkit = machine.decide(CUDA_HOME=str(tmp_path / "bare")).toolkit
    assert toolkit.include_directories == (wheel / "include",)
    assert toolkit.library_directory == wheel / "lib"


def test_headers_of_another_cuda_are_not_mixed_in(machine: Machine, tmp_path: Path) -> None:
    write_compiler(tmp_path / "bare", "12.8")
    wheel = machine.site / "nvidia/cu13"
    write_files(*[wheel / "include" / header for header in HEADERS], wheel / "lib/libcudart_static.a")
    decision = machine.decide(CUDA_HOME=str(tmp_path / "bare"))
    assert decision.toolkit is None
    assert "cuda_runtime.h is missing" in decision.rejected[0]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda home: (home / "include/cuda_runtime.h").unlink(), "cuda_runtime.h is missing"),
        (lambda home: (home / "include/crt/host_config.h").unlink(), "crt/host_config.h is missing"),
        (lambda home: (home / "lib64/libcudart_static.a").unlink(), "libcudart_static.a is missing"),
        (lambda home: write_script(home / "bin/nvcc", "exit 127\n"), "does not run"),
        (lambda home: write_compiler(home, "11.8"), "is CUDA 11.8; alphaext needs 12.0 or newer"),
        (lambda home: write_compiler(home, architectures=""), "--list-gpu-arch lists nothing"),
    ],
)
def test_a_broken_toolkit_is_refused_with_its_fault(machine: Machine, tmp_path: Path, damage, complaint: str) -> None:
    home = write_toolkit(tmp_path / "mine")
    damage(home)
    decision = machine.decide(CUDA_HOME=str(home))
    assert decision.toolkit is None
    assert complaint in decision.rejected[0]


# ---- On or off -----------------------------------------------------------------------------------------------------


def test_cuda_is_off_without_a_toolkit_and_says_why(machine: Machine) -> None:
    decision = machine.decide()
    assert decision.toolkit is None
    assert "no usable toolkit" in decision.reason and "nvidia-cuda-nvcc==13.2.*" in decision.reason


def test_cuda_is_off_when_torch_has_none_unless_asked_for(machine: Machine) -> None:
    home = write_toolkit(machine.root / "usr/local/cuda")
    assert machine.decide(torch_cuda=None).toolkit is None
    assert machine.decide(torch_cuda=None, ALPHAEXT_CUDA="1").toolkit.home == home


def test_cuda_can_be_switched_off(machine: Machine) -> None:
    write_toolkit(machine.root / "usr/local/cuda")
    decision = machine.decide(ALPHAEXT_CUDA="0")
    assert (decision.toolkit, decision.reason) == (None, "ALPHAEXT_CUDA=0")


@pytest.mark.parametrize("torch_cuda", [None, "12.8", "13.2"])
def test_asking_for_cuda_without_a_toolkit_lists_every_place(machine: Machine, torch_cuda: str | None) -> None:
    with pytest.raises(cuda.ConfigurationError) as caught:
        machine.decide(torch_cuda, ALPHAEXT_CUDA="1")
    message = str(caught.value)
    for place in ("CUDA_HOME (not set)", "CUDA_PATH (not set)", "nvcc on PATH", str(machine.root / "usr/local/cuda")):
        assert place in message
    assert str(machine.site) in message
    for remedy in ("CUDA toolkit", "nvidia-cuda-nvcc", "nvidia-cuda-runtime", "ALPHAEXT_CUDA=0"):
        assert remedy in message


@pytest.mark.parametrize("value", ["2", "yes", "ON"])
def test_other_values_of_the_switch_are_refused(machine: Machine, value: str) -> None:
    with pytest.raises(cuda.ConfigurationError, match=rf"ALPHAEXT_CUDA is '{value}'; it must be 1 .* 0 .* unset"):
        machine.decide(ALPHAEXT_CUDA=value)


# ---- Architectures -------------------------------------------------------------------------------------------------


@pytest.fixture
def toolkit(machine: Machine):
    write_toolkit(machine.root / "usr/local/cuda")
    return machine.decide().toolkit


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([], ["8.0 as PTX"]),
        (["9.0", "9.0"], ["9.0"]),
        (["10.0", "8.0"], ["8.0", "10.0"]),
        (["13.0"], ["12.0 as PTX"]),  # newer than this nvcc
        (["9.0", "13.0"], ["9.0", "12.0 as PTX"]),
        (["7.0"], ["8.0 as PTX"]),  # older than the kernels are written for
    ],
)
def test_without_a_list_the_gpus_here_decide(toolkit, gpus, expected) -> None:
    assert cuda.choose_architectures({}, toolkit, "sm_75 sm_80 sm_90", native=gpus) == expected


@pytest.mark.parametrize(
    ("torch_flags", "expected"),
    [
        ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", ["7.5", "8.0", "9.0", "10.0", "12.0+PTX"]),  # this nvcc lacks 8.6
        ("sm_50 sm_70 sm_80 sm_90", ["8.0", "9.0+PTX"]),  # this nvcc is too new for the first two
        ("sm_80 sm_90 sm_130 compute_130", ["8.0", "9.0+PTX"]),  # and too old for the last
        ("sm_130", ["12.0+PTX"]),
        (None, ["8.0", "9.0", "10.0+PTX"]),
    ],
)
def test_all_architectures_are_torchs_as_far_as_nvcc_goes(toolkit, torch_flags, expected) -> None:
    assert cuda.choose_architectures({"TORCH_CUDA_ARCH_LIST": "all"}, toolkit, torch_flags) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8.0", ["8.0"]),
        ("8.0;9.0a+PTX", ["8.0", "9.0a+PTX"]),
        ("8.0 9.0, 8.0", ["8.0", "9.0"]),
        ("Hopper", ["9.0+PTX"]),
        ("native", ["9.0"]),
    ],
)
def test_the_users_list_decides(toolkit, value, expected) -> None:
    environment = {"TORCH_CUDA_ARCH_LIST": value}
    assert cuda.choose_architectures(environment, toolkit, "sm_120", native=["9.0"]) == expected


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("sm_80", "holds 'sm_80'; allowed are numbers such as 8.0"),
        ("8.0;Volta2", "holds 'Volta2'"),
        ("7.0", r"holds '7.0', but .* \(CUDA 13.0\) compiles for 7.5, 8.0, 9.0, 10.0, 12.0 only"),
        ("native", "sees no GPU"),
    ],
)
def test_impossible_lists_are_refused(toolkit, value, complaint) -> None:
    with pytest.raises(cuda.ConfigurationError, match=complaint):
        cuda.choose_architectures({"TORCH_CUDA_ARCH_LIST": value}, toolkit, "sm_80")


def test_architecture_flags() -> None:
    assert cuda.architecture_flags(["8.0 as PTX"]) == ["-gencode=arch=compute_80,code=compute_80"]
    assert cuda.architecture_flags(["8.0", "10.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100a,code=sm_100a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


# ---- Jobs ----------------------------------------------------------------------------------------------------------

GIB = 1024**3


@pytest.mark.parametrize(
    ("environment", "processors", "memory", "expected"),
    [
        ({}, 8, 100 * GIB, 8),
        ({}, 8, 10 * GIB, 3),
        ({}, 8, GIB, 1),
        ({}, 8, None, 8),
        ({"MAX_JOBS": "12"}, 2, GIB, 12),
        ({"MAX_JOBS": ""}, 2, 100 * GIB, 2),
    ],
)
def test_job_count(environment, processors, memory, expected) -> None:
    assert jobs.job_count(environment, processors, memory) == expected


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_an_impossible_job_count_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=rf"MAX_JOBS is '{value}'; it must be a whole number of at least 1"):
        jobs.job_count({"MAX_JOBS": value}, 2, None)


def test_memory_is_the_machines_or_the_containers_whichever_is_less(tmp_path: Path) -> None:
    assert jobs.available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64 kB\nMemAvailable: 32 kB\n")
    assert jobs.available_memory(tmp_path) == 32 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert jobs.available_memory(tmp_path) == 32 * 1024
    (group / "memory.max").write_text("9000\n")
    assert jobs.available_memory(tmp_path) == 8000


# ---- Libraries of earlier builds -----------------------------------------------------------------------------------


def test_a_library_is_found_again_until_text_or_tools_change(tmp_path: Path) -> None:
    write_files(tmp_path / "setup.py", tmp_path / "csrc/cpu/a.cpp", tmp_path / "build_support/b.py")
    first = kept.fingerprint(tmp_path, ["gcc 12", "-O3"])
    write_files(tmp_path / "build_support/__pycache__/b.pyc", tmp_path / "alphaext/ops.py")
    assert kept.fingerprint(tmp_path, ["gcc 12", "-O3"]) == first
    assert kept.fingerprint(tmp_path, ["gcc 13", "-O3"]) != first
    (tmp_path / "csrc/cpu/a.cpp").write_text("int a;")
    assert kept.fingerprint(tmp_path, ["gcc 12", "-O3"]) != first


def test_the_last_few_libraries_are_kept(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    for number in range(kept.MOST + 2):
        library.write_text(str(number))
        place = kept.place(tmp_path, f"build{number}")
        kept.keep(library, place)
        os.utime(place, (number, number))
    names = sorted(path.name for path in (tmp_path / "build/kept").iterdir())
    assert names == [f"build{number}.so" for number in range(2, kept.MOST + 2)]
    assert place.read_text() == str(kept.MOST + 1)


# ---- The library that was built ------------------------------------------------------------------------------------


def test_a_tree_that_was_never_built_says_so_in_a_sentence(tmp_path: Path) -> None:
    package = tmp_path / "alphaext"
    shutil.copytree(ROOT / "alphaext", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    # Without the site's own start: an editable installation would lend its library to any alphaext.
    program = f"import sys; sys.path += [{str(tmp_path)!r}, {sysconfig.get_path('purelib')!r}]; from alphaext import fit"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: the extension of this alphaext, in {package}, has not been built: run 'pip install -e .' in that "
        "checkout, or start Python elsewhere to use an installed alphaext"
    )


def test_build_info_tells_how_the_library_was_built() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("alphaext", exc_type=ImportError)
    from alphaext import _C

    info = _C.build_info()
    assert set(info) == {"version", "compiler", "flags", "torch", "cuda", "cuda_archs", "simd", "threads"}
    assert "-O3" in info["flags"] and "-march=native" not in info["flags"] and "-ffast-math" not in info["flags"]
    assert info["threads"] == torch.get_num_threads()
    assert info["simd"] in {"default", "avx2", "avx512"}
    assert (info["cuda"] is None) == (info["cuda_archs"] is None)
