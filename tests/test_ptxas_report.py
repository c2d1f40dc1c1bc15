"""The reading of ptxas's report, on texts as nvcc prints them; and the check as a whole, with scripts for compilers."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
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


report = load("ptxas_report")

MIX = "_ZN8alphaext4cuda18mix_forward_kernelIfEEvNS_9MixParamsE"
CLEAN = f"""ptxas info    : 0 bytes gmem, 24 bytes cmem[4]
ptxas info    : Compiling entry function '{MIX}' for 'sm_90'
ptxas info    : Function properties for {MIX}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 1024 bytes smem, 104 bytes cmem[0]
ptxas info    : Compile time = 67.685 ms
"""
SPILLING = CLEAN.replace("0 bytes stack frame, 0 bytes spill stores, 0", "16 bytes stack frame, 12 bytes spill stores, 20")
OLDER = CLEAN.replace("used 1 barriers, 1024 bytes smem", "1024+0 bytes smem, 8 bytes cumulative stack size")
FUNCTION = """ptxas info    : Function properties for slow_path
    40 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_parse():
    (kernel,) = report.parse(CLEAN)
    assert kernel == report.Kernel(MIX, "90", True, registers=48, static_shared=1024, barriers=1)
    (kernel,) = report.parse(OLDER)
    assert (kernel.registers, kernel.static_shared, kernel.stack) == (48, 1024, 8)


def test_kernels_of_several_gpus_are_kept_apart():
    both = report.parse(CLEAN + CLEAN.replace("sm_90", "sm_100a").replace("Used 48", "Used 56"))
    assert [(kernel.architecture, kernel.registers) for kernel in both] == [("90", 48), ("100a", 56)]


def test_clean_is_clean():
    assert report.faults(report.parse(CLEAN)) == []


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        (SPILLING, ["spills: 12 bytes of stores, 20 of loads", "has a stack frame of 16 bytes"]),
        (OLDER, ["has a stack frame of 8 bytes"]),
        (CLEAN + FUNCTION, ["slow_path on sm_90 has a stack frame of 40 bytes"]),
        (CLEAN.replace("1024 bytes smem", "49153 bytes smem"), ["49153 bytes of static shared memory; 49152 are allowed"]),
        (CLEAN.replace("Used", "Uses"), ["says nothing of its registers"]),
    ],
)
def test_faults(text, complaints):
    found = report.faults(report.parse(text))
    assert len(found) == len(complaints)
    for fault, complaint in zip(found, complaints, strict=True):
        assert complaint in fault and "sm_90" in fault


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void alphaext::cuda::mix_forward_kernel<float>(alphaext::MixParams)", "mix_forward_kernel<float>"),
        ("void alphaext::cuda::(anonymous namespace)::k<alphaext::bfloat16, (int)4>(int, float*)", "k<bfloat16, (int)4>"),
        ("alphaext::cuda::plain(int)", "plain"),
        ("_ZN8mangled", "_ZN8mangled"),
    ],
)
def test_short_name(name, short):
    assert report.short_name(name) == short


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def test_demanglers(tmp_path):
    assert report.find_demangler({"PATH": str(tmp_path)}) is None
    assert report.demangle([MIX], None) == {MIX: MIX}
    system = write_script(tmp_path / "c++filt", "exit 1\n")
    assert report.find_demangler({"PATH": str(tmp_path)}) == str(system)
    own = write_script(tmp_path / "cuda/cu++filt", 'while read -r name; do echo "void alphaext::$name<float>(int)"; done\n')
    assert report.find_demangler({"PATH": str(tmp_path)}, tmp_path / "cuda") == str(own)
    assert report.demangle(["a", "b"], str(system)) == {"a": "a", "b": "b"}
    kernels = [report.Kernel("a", "90", True), report.Kernel("b", "90", True)]
    assert [kernel.name for kernel in report.named(kernels, str(own))] == ["a<float>", "b<float>"]


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not installed")
def test_the_real_demangler():
    (kernel,) = report.named(report.parse(CLEAN), shutil.which("c++filt"))
    assert kernel.name == "mix_forward_kernel<float>"


def test_names_that_shorten_alike_stay_whole(tmp_path):
    alike = write_script(tmp_path / "c++filt", 'while read -r name; do echo "void $name::kernel(int)"; done\n')
    kernels = [report.Kernel("one", "90", True), report.Kernel("two", "90", True)]
    assert [kernel.name for kernel in report.named(kernels, str(alike))] == [
        "void one::kernel(int)",
        "void two::kernel(int)",
    ]


def test_markdown():
    kernels = report.parse(CLEAN + CLEAN.replace("sm_90", "sm_80") + SPILLING.replace("sm_90", "sm_100"))
    page = report.as_markdown(kernels, "CUDA 13.0")
    assert "| kernel | sm_80 | sm_90 | sm_100 | static shared | stack | spills |" in page
    assert f"| `{MIX}` | 48 | 48 | 48 | 1024 | 16 | 32 |" in page
    assert "163 KB on sm_80, 227 KB on sm_90, 227 KB on sm_100" in page


# ---- The check as a whole ------------------------------------------------------------------------------------------


def write_compiler(path: Path, printed: str, code: int = 0) -> Path:
    """An nvcc that prints a report and writes nothing."""
    text = printed.replace("sm_90", "sm_ARCH")
    body = f"""[ "$1" = --version ] && {{ echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; }}
for word in "$@"; do case "$word" in -gencode=*) architecture="${{word##*sm_}}" ;; esac; done
sed "s/sm_ARCH/sm_$architecture/" <<'END' >&2
{text}END
exit {code}
"""
    return write_script(path, body)


def run_check(tmp_path: Path, compiler: Path) -> tuple[int, Path]:
    source, output = tmp_path / "kernels.cu", tmp_path / "out"
    source.write_text("")
    code = report.main(
        ["--nvcc", str(compiler), "--include", str(tmp_path), "--output", str(output), "--architectures", "80;90", str(source)]
    )
    return code, output


def test_a_clean_compile_passes_and_writes_its_tables(tmp_path, capsys):
    real = write_compiler(tmp_path / "real/nvcc", CLEAN)
    wrapper = write_script(tmp_path / "bin/nvcc", f'exec {real} "$@"\n')
    code, output = run_check(tmp_path, wrapper)
    assert code == 0
    assert "2 kernels: no spills" in capsys.readouterr().out
    data = json.loads((output / "ptxas_report.json").read_text())
    assert data["compiler"] == "CUDA 13.0" and data["dynamic_shared_limits"] == {"80": 163 * 1024, "90": 227 * 1024}
    assert [kernel["architecture"] for kernel in data["kernels"]] == ["80", "90"]
    assert "sm_80 | sm_90" in (output / "ptxas_report.md").read_text()
    assert CLEAN.splitlines()[0] in (output / "cuda_compile_check.log").read_text()


@pytest.mark.parametrize(
    ("printed", "code", "complaint"),
    [
        (SPILLING, 0, "spills: 12 bytes of stores"),
        ("kernels.cu(3): warning: unused\n", 2, "does not compile without warnings for sm_80"),
        ("nothing\n", 0, "ptxas reported no kernel"),
    ],
)
def test_a_fault_fails_the_check(tmp_path, capsys, printed, code, complaint):
    assert run_check(tmp_path, write_compiler(tmp_path / "nvcc", printed, code))[0] == 1
    assert complaint in capsys.readouterr().err


def test_a_compiler_that_does_not_run_fails_the_check(tmp_path, capsys):
    assert run_check(tmp_path, tmp_path / "gone")[0] == 1
    assert "gone" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.parametrize(
    ("printed", "passes", "says"),
    [(None, True, "cuda_compile_check skipped"), (CLEAN, True, "passed"), (SPILLING, False, "has a stack frame of 16")],
)
def test_cmake_runs_it(tmp_path, printed, passes, says):
    source = tmp_path / "kernels.cu"
    source.write_text("")
    nvcc = "ALPHAEXT_NVCC-NOTFOUND" if printed is None else write_compiler(tmp_path / "nvcc", printed)
    command = ["cmake", f"-DNVCC={nvcc}", f"-DSOURCES={source}", "-DARCHITECTURES=80,90", f"-DINCLUDE_DIRECTORY={tmp_path}"]
    command += [f"-DOUTPUT_DIRECTORY={tmp_path}/out", "-P", str(ROOT / "build_support/cuda_compile_check.cmake")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert (finished.returncode == 0) is passes, finished.stderr
    assert says in finished.stdout + finished.stderr
