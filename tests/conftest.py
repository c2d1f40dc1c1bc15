"""Where tests run: every test that takes `device` runs on the CPU, and on a GPU where there is one, or an emulated one."""

from __future__ import annotations

import os
from pathlib import Path

import emulated_gpu
import pytest
import torch

# Before anything imports alphaext.
if emulated_gpu.DIRECTORY:
    emulated_gpu.load(Path(emulated_gpu.DIRECTORY))

# The tests' problems are small: a second thread would only wait for the first, and very long on a busy machine.
torch.set_num_threads(1)

GPU_REQUIRED = os.environ.get("ALPHAEXT_REQUIRE_GPU") == "1"


def _gpu_missing() -> str | None:
    if emulated_gpu.DIRECTORY:
        return None
    if not torch.cuda.is_available():
        return "needs a GPU: torch sees none"
    import alphaext

    if alphaext.build_info()["cuda"] is None:
        return "needs a GPU build: this one has CPU kernels only"
    return None


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return emulated_gpu.GPU if request.param == "cuda" else "cpu"


def pytest_runtest_setup(item: pytest.Item) -> None:
    markers = list(item.iter_markers("gpu"))
    if not markers:
        return
    if emulated_gpu.DIRECTORY and any(marker.kwargs.get("real") for marker in markers):
        pytest.skip("needs a real GPU: this one is emulated")
    missing = _gpu_missing()
    if missing and GPU_REQUIRED:
        pytest.fail(f"ALPHAEXT_REQUIRE_GPU=1, but this test {missing}")
    if missing:
        pytest.skip(missing)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "needs a GPU" in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU tests did not run: no GPU, or no CUDA build, on this machine.")
