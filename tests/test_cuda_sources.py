"""What must hold for every CUDA source, by its text: checks of launches, device guards, and what kernels may not contain.

A compiler accepts a launch whose error nobody reads, and a test without a second GPU does not miss a device guard.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
if not CUDA.is_dir():
    pytest.skip("the checks of the sources need the source tree", allow_module_level=True)

LAUNCH_CALL = re.compile(r"\b(?:cudaLaunchKernel|cudaLaunchKernelExC?|cudaLaunchCooperativeKernel|cuLaunch\w+)\s*\(")
READS_ERROR = re.compile(r"\bcuda(?:GetLastError|PeekAtLastError)\s*\(")
GUARD = re.compile(r"\w*Guard\s+\w+\s*[({]\s*(?:params\.)?device\b|\bcudaSetDevice\s*\(\s*device\b")
WAITS = re.compile(
    r"\bcuda(?:DeviceSynchronize|StreamSynchronize|EventSynchronize|Malloc\w*|Free\w*|Memcpy|Memset|HostAlloc)\s*\(|\bmalloc\s*\("
)
INTEGER = r"(?:unsigned(?:\s+(?:int|long|long\s+long))?|int|long\s+long|u?int(?:32|64)_t|size_t)"


def without_comments(text: str) -> str:
    """The code alone: comments and what strings hold become blanks, so that places stay where they are."""

    def blank(match: re.Match[str]) -> str:
        found = match.group(0)
        kept = '""' if found.startswith('"') else ""
        return kept + re.sub(r"[^\n]", " ", found[len(kept) :])

    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.DOTALL)


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def statement_at(text: str, position: int) -> tuple[str, int]:
    """The statement that holds a position, from its beginning, and where it ends."""
    start = max(text.rfind(mark, 0, position) for mark in ";{}") + 1
    end = text.find(";", position)
    return text[start : end + 1], end + 1


def following(text: str, position: int) -> str:
    """The statement after a position."""
    end = text.find(";", position)
    return text[position : end + 1]


def unchecked_launches(text: str) -> list[str]:
    """Launches whose error is not looked at in the same statement or the very next."""
    code = without_comments(text)
    found = []
    for match in re.finditer("<<<", code):
        _, end = statement_at(code, match.start())
        if READS_ERROR.search(following(code, end)) is None:
            found.append(f"line {line_of(code, match.start())}: no cudaGetLastError() follows <<<>>>")
    for match in LAUNCH_CALL.finditer(code):
        statement, end = statement_at(code, match.start())
        before = statement[: statement.index(match.group(0))].strip()
        where = f"line {line_of(code, match.start())}: the result of {match.group(0).rstrip('( ')}"
        assigned = re.search(r"(\w+)\s*=\s*$", before)
        if assigned:
            if re.search(rf"\b{assigned.group(1)}\b", following(code, end)) is None:
                found.append(f"{where} is kept, but not looked at in the next statement")
        elif not (before.endswith(("return", "(", ",", "==", "!="))):
            found.append(f"{where} is dropped")
    return found


def entry_points(header: str) -> dict[str, str]:
    """Name -> parameters of every function that a header of launchers declares."""
    code = without_comments(header)
    declared = re.findall(r"^[\w:][\w:\s*&<>]*?\b(\w+)\s*\(([^()]*)\)\s*;", code, re.MULTILINE)
    return {name: " ".join(parameters.split()) for name, parameters in declared}


def bodies(text: str) -> dict[str, str]:
    """Name -> bodies of the functions that are defined in a text, overloads joined."""
    code = without_comments(text)
    found: dict[str, str] = {}
    for match in re.finditer(r"\b(\w+)\s*\(([^;{}]*)\)\s*(?:const\s*)?(?:noexcept\s*)?\{", code):
        if match.group(1) in ("if", "for", "while", "switch", "catch"):
            continue
        depth, position = 1, match.end()
        while depth and position < len(code):
            depth += {"{": 1, "}": -1}.get(code[position], 0)
            position += 1
        found[match.group(1)] = found.get(match.group(1), "") + code[match.end() : position]
    return found


def unguarded_entries(header: str, sources: str) -> list[str]:
    """Entry points that are not given a device, or that launch without having made it the current one."""
    defined = bodies(sources)

    def guards(name: str, seen: frozenset[str]) -> bool:
        body = defined.get(name, "")
        if GUARD.search(body):
            return True
        # Or it hands its device on to functions of which one guards.
        called = re.findall(r"\b(\w+)\s*(?:<[^;(){}]*>)?\s*\([^;]*\bdevice\b", body)
        return any(guards(other, seen | {name}) for other in called if other not in seen and other != name)

    found = []
    for name, parameters in entry_points(header).items():
        if re.search(r"\bint(?:32_t)?\s+device\b", parameters) is None:
            found.append(f"{name} takes no device")
        elif name not in defined:
            found.append(f"{name} is declared, but no .cu file defines it")
        elif not guards(name, frozenset()):
            found.append(f"{name} sets no device guard")
    return found


def forbidden_includes(text: str) -> list[str]:
    """Headers of torch, which kernels and launchers do without."""
    return re.findall(r'^\s*#\s*include\s*[<"]((?:torch|ATen|c10|pybind11)/[^>"]+|Python\.h)[>"]', text, re.MULTILINE)


def waits(text: str) -> list[str]:
    """Calls that allocate, or that make the CPU wait: under a stream capture they are errors."""
    code = without_comments(text)
    return [f"line {line_of(code, match.start())}: {match.group(0)}" for match in WAITS.finditer(code)]


def float_atomics(text: str) -> list[str]:
    """Atomic additions whose target is not declared as an integer: their order, and so their sum, changes from run to run."""
    code = without_comments(text)
    found = [
        f"line {line_of(code, m.start())}: {m.group(0)}" for m in re.finditer(r"\b(?:red|atom)\.[\w.:]*f(?:16|32|64)", text)
    ]
    for match in re.finditer(r"\batomicAdd(?:_block|_system)?\s*\(\s*&?\s*(?:\(?\w+\)?\s*(?:\.|->))*\s*(\w+)", code):
        name = re.escape(match.group(1))
        integer = rf"\b{INTEGER}\b\s*(?:const\b\s*)?(?:\*\s*)?(?:const\b\s*|__restrict__\s*)*{name}\b"
        other = rf"\b(?:float|double|T|Acc|auto)\b\s*(?:\*\s*)?(?:const\b\s*|__restrict__\s*)*{name}\b"
        macro = rf"\b\w+_SHARED\(\s*{INTEGER}\s*,\s*{name}\b"
        if re.search(other, code) or not (re.search(integer, code) or re.search(macro, code)):
            found.append(f"line {line_of(code, match.start())}: atomicAdd to {match.group(1)}")
    return found


# ---- The sources ---------------------------------------------------------------------------------------------------

SOURCES = sorted([*CUDA.rglob("*.cu"), *CUDA.rglob("*.cuh")])
LAUNCHERS = [CUDA / "launching.h", *(path for path in SOURCES if path.suffix == ".cu")]
KERNELS = [path for path in SOURCES if path.suffix == ".cuh"]
HEADERS = sorted(path.with_suffix(".h") for path in CUDA.glob("*.cu"))  # where launchers are declared
PLAIN = sorted(path for path in CUDA.glob("*.h") if path.name != "launching.h")  # what C++ without CUDA may include


def everything() -> str:
    """All CUDA text: what a kernel's arrays are may be said in another file than the kernel."""
    return "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)


def test_there_is_something_to_check():
    code = without_comments("\n".join(path.read_text(encoding="utf-8") for path in LAUNCHERS))
    assert KERNELS and ("<<<" in code or LAUNCH_CALL.search(code))
    assert HEADERS and all(entry_points(path.read_text(encoding="utf-8")) for path in HEADERS)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_every_launch_is_checked(path):
    assert unchecked_launches(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_every_entry_point_guards_its_device(path):
    assert unguarded_entries(path.read_text(encoding="utf-8"), everything()) == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernel_files_hold_no_launch(path):
    code = without_comments(path.read_text(encoding="utf-8"))
    assert "<<<" not in code and LAUNCH_CALL.search(code) is None


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.name)
def test_plain_headers_include_no_cuda(path):
    text = path.read_text(encoding="utf-8")
    included = re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE)
    assert all(name.startswith("kernels/") or CUDA / name in PLAIN for name in included)


def test_builds_without_cuda_include_nothing_of_it():
    without = CUDA.parent.rglob("*")
    for path in sorted(path for path in without if path.suffix in (".h", ".cpp") and path.parent != CUDA):
        if path.name == "head_on_gpu.cpp":  # not in such a build
            continue
        text = re.sub(r"#if ALPHAEXT_WITH_CUDA\n.*?\n#endif", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert '#include "cuda' not in text, path


@pytest.mark.parametrize("path", sorted({*SOURCES, *PLAIN, *LAUNCHERS}), ids=lambda path: path.name)
def test_no_torch_no_waiting_no_float_atomics(path):
    text = path.read_text(encoding="utf-8")
    assert forbidden_includes(text) == []
    assert waits(text) == []
    assert float_atomics(text) == []


# ---- Each check finds what is planted for it -----------------------------------------------------------------------

CHECKED = "kernel<<<1, 2, 0, stream>>>(p); return message_for(name, cudaGetLastError());"


@pytest.mark.parametrize(
    "text",
    [
        "void f() { kernel<<<1, 2>>>(p); }",
        "void f() { kernel<<<1, 2>>>(p); g(); cudaGetLastError(); }",
        "void f() { kernel<<<1, 2>>>(p); // cudaGetLastError();\n }",
        "void f() { cudaLaunchCooperativeKernel(kernel, a, b, c, d, e); }",
        "void f() { if (x) cudaLaunchKernelEx(&config, kernel, p); }",
        "void f() { static_cast<void>(0); cudaError_t error = cudaLaunchCooperativeKernel(k, a); g(); h(error); }",
        'template <typename T> void f() {\n  kernel<T>\n    <<<blocks, threads>>>(p);\n  other("cudaGetLastError()");\n}',
    ],
)
def test_finds_unchecked_launches(text):
    assert len(unchecked_launches(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"void f() {{ {CHECKED} }}",
        "void f() { return message_for(name, cudaLaunchCooperativeKernel(kernel, a, b)); }",
        "void f() { const cudaError_t error = cudaLaunchKernelEx(&c, k, p); return message_for(name, error); }",
        "void f() { return cudaLaunchKernelExC(&c, k, p); }",
        "// kernel<<<1, 2>>>(p);\n/* cudaLaunchKernel(p); */ void f() {}",
    ],
)
def test_lets_checked_launches_pass(text):
    assert unchecked_launches(text) == []


HEADER = "namespace a {\nconst char* one(const P& params, int32_t device, void* stream);  // runs\n}"


@pytest.mark.parametrize(
    ("header", "source", "complaint"),
    [
        ("const char* one(const P& params, void* stream);", "const char* one(const P& p, void* s) {}", "takes no device"),
        (HEADER, "", "no .cu file defines it"),
        (HEADER, "const char* one(const P& params, int32_t device, void* stream) { return launch(k); }", "no device guard"),
        (
            HEADER,
            "const char* one(const P& p, int32_t device, void* s) { // const DeviceGuard guard(device);\n return 0; }",
            "no device guard",
        ),
        (
            HEADER,
            "const char* two(int32_t device) { return 0; } const char* one(const P& p, int32_t device, void* s) "
            "{ return two(device); }",
            "no device guard",
        ),
    ],
)
def test_finds_unguarded_entries(header, source, complaint):
    (found,) = unguarded_entries(header, source)
    assert complaint in found


@pytest.mark.parametrize(
    "source",
    [
        "const char* one(const P& p, int32_t device, void* s) { const DeviceGuard guard(device); return 0; }",
        "const char* one(const P& p, int32_t device, void* s) { return run<true>(p, device, s); }"
        "template <bool B> const char* run(const P& p, int32_t device, void* s) { DeviceGuard guard{device}; return 0; }",
    ],
)
def test_lets_guarded_entries_pass(source):
    assert unguarded_entries(HEADER, source) == []


@pytest.mark.parametrize(
    "line",
    ["#include <torch/extension.h>", '#include "ATen/ATen.h"', "# include <c10/cuda/CUDAGuard.h>", "#include <Python.h>"],
)
def test_finds_torch(line):
    assert forbidden_includes(f"#include <cstdio>\n{line}\n") != []
    assert forbidden_includes("#include <cuda_runtime.h>\n// #include <torch/extension.h>\n") == []


@pytest.mark.parametrize(
    "call",
    ["cudaDeviceSynchronize()", "cudaStreamSynchronize(s)", "cudaMalloc(&p, n)", "cudaMallocAsync(&p, n, s)", "cudaFree(p)"],
)
def test_finds_waiting(call):
    assert waits(f"void f() {{ {call}; }}") != []
    assert waits(f"void f() {{}}  // no {call} here") == []
    assert waits("void f() { cudaMemcpyAsync(a, b, n, k, s); cudaMemsetAsync(a, 0, n, s); }") == []


@pytest.mark.parametrize(
    "text",
    [
        "float* sum; void f() { atomicAdd(sum, 1.0f); }",
        "template <typename Acc> void f(Acc* sums) { atomicAdd(&sums[i], x); }",
        "void f() { atomicAdd(&unknown, x); }",
        "void f(float* __restrict__ out) { atomicAdd_block(out + i, x); }",
        'asm volatile("red.global.add.f32 [%0], %1;");',
    ],
)
def test_finds_float_atomics(text):
    assert len(float_atomics(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "void f(unsigned* counter) { atomicAdd(counter, 1u); }",
        "struct P { unsigned long long* tickets; }; void f(P p) { atomicAdd(p.tickets, 1ull); }",
        "void f() { int32_t count; atomicAdd(&count, 1); }",
        "// atomicAdd(sum, 1.0f)",
    ],
)
def test_lets_integer_atomics_pass(text):
    assert float_atomics(text) == []
