"""Compiles the CUDA sources for several GPUs and holds ptxas's report to what the kernels promise.

No kernel spills registers or uses a stack frame, and static shared memory stays within what every GPU grants. Warnings are
errors. Run by build_support/cuda_compile_check.cmake; by itself:

    python build_support/ptxas_report.py --include csrc --output build/ptxas csrc/cuda/*.cu
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

DEFAULT_ARCHITECTURES = ("80", "90", "100")
# What a block gets without asking, and all that static shared memory may be.
STATIC_SHARED_LIMIT = 48 * 1024
# What a block may ask for as dynamic shared memory, static included (CUDA C++ Programming Guide, compute capabilities).
DYNAMIC_SHARED_LIMITS = {
    "75": 64 * 1024,
    "80": 163 * 1024,
    "86": 99 * 1024,
    "87": 163 * 1024,
    "89": 99 * 1024,
    "90": 227 * 1024,
    "100": 227 * 1024,
    "103": 227 * 1024,
    "120": 99 * 1024,
}


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one function on one GPU; bytes, but for the registers, which are a thread's."""

    name: str
    architecture: str  # as in "90"
    entry: bool  # a kernel; otherwise a function that kernels call
    registers: int | None = None
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    static_shared: int = 0
    barriers: int = 0


def number(pattern: str, line: str) -> int:
    """What a pattern finds in a line; 0 where it finds nothing."""
    match = re.search(pattern, line)
    return int(match.group(1)) if match else 0


def parse(text: str) -> list[Kernel]:
    """The functions of one log of ``nvcc -Xptxas -v``, in its order."""
    kernels: dict[tuple[str, str], Kernel] = {}
    architecture, current = "", None
    for line in text.splitlines():
        match = re.search(r"Compiling entry function '([^']+)' for 'sm_(\w+)'", line)
        if match:
            architecture = match.group(2)
            current = (match.group(1), architecture)
            kernels[current] = Kernel(match.group(1), architecture, True)
            continue
        match = re.search(r"Function properties for (\S+)", line)
        if match:
            current = (match.group(1).strip("'"), architecture)
            kernels.setdefault(current, Kernel(current[0], architecture, False))
            continue
        if current is None:
            continue
        match = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if match:
            stack, stores, loads = map(int, match.groups())
            kernels[current] = replace(kernels[current], stack=stack, spill_stores=stores, spill_loads=loads)
            continue
        match = re.search(r"Used (\d+) registers", line)
        if match:
            kernel = replace(kernels[current], registers=int(match.group(1)))
            kernels[current] = replace(
                kernel,
                barriers=number(r"used (\d+) barriers", line),
                static_shared=number(r"(\d+)(?:\+\d+)? bytes smem", line),
                stack=max(kernel.stack, number(r"(\d+) bytes cumulative stack size", line)),
            )
    return list(kernels.values())


def faults(kernels: Iterable[Kernel]) -> list[str]:
    """Everything that is not as promised."""
    found = []
    for kernel in kernels:
        where = f"{kernel.name} on sm_{kernel.architecture}"
        if kernel.spill_stores or kernel.spill_loads:
            found.append(f"{where} spills: {kernel.spill_stores} bytes of stores, {kernel.spill_loads} of loads")
        if kernel.stack:
            found.append(f"{where} has a stack frame of {kernel.stack} bytes")
        if kernel.static_shared > STATIC_SHARED_LIMIT:
            found.append(f"{where} has {kernel.static_shared} bytes of static shared memory; {STATIC_SHARED_LIMIT} are allowed")
        if kernel.entry and kernel.registers is None:
            found.append(f"{where}: the report says nothing of its registers")
    return found


# ---- Names ---------------------------------------------------------------------------------------------------------


def find_demangler(environment: Mapping[str, str], beside: Path | None = None) -> str | None:
    """cu++filt, of the compiler's toolkit or on PATH, or c++filt; None where there is neither."""
    path = environment.get("PATH", "")
    if beside is not None:
        path = os.pathsep.join([str(beside), path])
    return shutil.which("cu++filt", path=path) or shutil.which("c++filt", path=path)


def demangle(names: Sequence[str], demangler: str | None) -> dict[str, str]:
    """Mangled -> readable; without a demangler, or where it fails, the names as they are."""
    if demangler is None or not names:
        return {name: name for name in names}
    try:
        finished = subprocess.run(
            [demangler], input="\n".join(names) + "\n", capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {name: name for name in names}
    lines = finished.stdout.splitlines()
    return dict(zip(names, lines if len(lines) == len(names) else names, strict=True))


def short_name(name: str) -> str:
    """`mix_forward_kernel<float>` from `void alphaext::cuda::mix_forward_kernel<float>(alphaext::MixParams)`."""
    depth, end = 0, len(name)
    for position, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0 and not name.startswith("(anonymous namespace)", position):
            end = position
            break
    text = name[:end].replace("(anonymous namespace)::", "")
    text = re.sub(r"\b(?:\w+::)+", "", text).strip()
    return text.removeprefix("void ").strip()


def named(kernels: Sequence[Kernel], demangler: str | None) -> list[Kernel]:
    """The same with readable names; where shortening makes two alike, both keep their whole names."""
    readable = demangle(sorted({kernel.name for kernel in kernels}), demangler)
    shortened = {name: short_name(text) for name, text in readable.items()}
    counts: dict[str, int] = {}
    for text in shortened.values():
        counts[text] = counts.get(text, 0) + 1
    return [replace(k, name=shortened[k.name] if counts[shortened[k.name]] == 1 else readable[k.name]) for k in kernels]


# ---- Tables --------------------------------------------------------------------------------------------------------


def as_markdown(kernels: Sequence[Kernel], compiler: str) -> str:
    """A row for each kernel, registers on every GPU side by side, and the worst of the rest."""
    architectures = sorted({kernel.architecture for kernel in kernels}, key=lambda a: (int(re.sub(r"\D", "", a) or 0), a))
    lines = [f"# Registers, shared memory, spills: {compiler}", ""]
    limits = [f"{DYNAMIC_SHARED_LIMITS[a] // 1024} KB on sm_{a}" for a in architectures if a in DYNAMIC_SHARED_LIMITS]
    lines += [
        "Registers a thread; bytes of static shared memory, stack and spills, the most of all GPUs. Dynamic shared memory",
        f"is not in the report; a block may ask for {', '.join(limits) or 'what its GPU grants'}.",
        "",
    ]
    header = ["kernel", *[f"sm_{a}" for a in architectures], "static shared", "stack", "spills"]
    lines += [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    rows: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault(kernel.name, {})[kernel.architecture] = kernel
    for name, row in sorted(rows.items()):
        every = row.values()
        registers = [str(row[a].registers) if a in row and row[a].registers is not None else "" for a in architectures]
        spills = max(kernel.spill_stores + kernel.spill_loads for kernel in every)
        worst = [max(kernel.static_shared for kernel in every), max(kernel.stack for kernel in every), spills]
        lines.append(f"| `{name}` | {' | '.join([*registers, *map(str, worst)])} |")
    return "\n".join(lines) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---- Compiling -----------------------------------------------------------------------------------------------------


def compile_command(nvcc: str, source: Path, architecture: str, include: Path, target: Path) -> list[str]:
    """One source for one GPU, every warning an error."""
    return [
        *[nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"],
        *["-DALPHAEXT_WITH_CUDA=1", f"-I{include}", "--expt-relaxed-constexpr", "-Werror=all-warnings"],
        *["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror", "-Xptxas=-v", "-c", str(source), "-o", str(target)],
    ]


def compiled(
    nvcc: str, sources: Sequence[Path], architectures: Sequence[str], include: Path, output: Path, jobs: int
) -> list[tuple[Path, str, int, str]]:
    """(source, architecture, exit code, what nvcc printed) of every pair, compiled apart so that no two reports mix."""

    def one(pair: tuple[Path, str]) -> tuple[Path, str, int, str]:
        source, architecture = pair
        target = output / f"{source.stem}.sm_{architecture}.o"
        command = compile_command(nvcc, source, architecture, include, target)
        try:
            finished = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
            )
        except OSError as error:
            return source, architecture, 127, str(error)
        return source, architecture, finished.returncode, finished.stdout

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return list(pool.map(one, [(source, architecture) for source in sources for architecture in architectures]))


def version_of(nvcc: str) -> str:
    """`CUDA 13.0` from what nvcc says of itself."""
    try:
        finished = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return nvcc
    match = re.search(r"release (\d+\.\d+)", finished.stdout)
    return f"CUDA {match.group(1)}" if match else nvcc


def check(
    nvcc: str, sources: Sequence[Path], architectures: Sequence[str], include: Path, output: Path, jobs: int = 2
) -> list[str]:
    """Compile, write the log and both tables, and return what is wrong; nothing, if all is well."""
    output.mkdir(parents=True, exist_ok=True)
    results = compiled(nvcc, sources, architectures, include, output, jobs)
    parts = [f"==== {source} for sm_{architecture}\n{printed}" for source, architecture, _, printed in results]
    version = version_of(nvcc)
    write_whole(output / "cuda_compile_check.log", f"{nvcc} ({version})\n\n" + "\n".join(parts))
    wrong, kernels = [], []
    for source, architecture, code, printed in results:
        if code != 0:
            wrong.append(f"{source} does not compile without warnings for sm_{architecture}:\n{printed.strip()}")
            continue
        found = parse(printed)
        if not any(kernel.entry for kernel in found):
            wrong.append(f"{source} for sm_{architecture}: ptxas reported no kernel")
        kernels += found
    kernels = named(kernels, find_demangler(os.environ, Path(nvcc).resolve().parent))
    report: dict[str, Any] = {
        "compiler": version,
        "static_shared_limit": STATIC_SHARED_LIMIT,
        "dynamic_shared_limits": {a: DYNAMIC_SHARED_LIMITS.get(a) for a in architectures},
        "kernels": [asdict(kernel) for kernel in kernels],
    }
    write_whole(output / "ptxas_report.json", json.dumps(report, indent=1) + "\n")
    write_whole(output / "ptxas_report.md", as_markdown(kernels, version))
    return wrong + faults(kernels)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="a .cu file")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler, or a wrapper of it (default: %(default)s)")
    parser.add_argument("--architectures", default=",".join(DEFAULT_ARCHITECTURES), help="default: %(default)s")
    parser.add_argument("--include", type=Path, required=True, help="csrc")
    parser.add_argument("--output", type=Path, required=True, help="directory of the log and the tables")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="compilers at a time")
    options = parser.parse_args(arguments)
    architectures = [part for part in re.split(r"[,;\s]+", options.architectures) if part]
    wrong = check(options.nvcc, options.sources, architectures, options.include, options.output, options.jobs)
    for fault in wrong:
        print(f"cuda_compile_check: {fault}", file=sys.stderr)
    if wrong:
        return 1
    report = json.loads((options.output / "ptxas_report.json").read_text(encoding="utf-8"))
    entries = sum(kernel["entry"] for kernel in report["kernels"])
    print(f"{entries} kernels: no spills, no stack frames; {options.output / 'ptxas_report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
