"""A small CUDA program, compiled by nvcc alone: what a launch costs, and planted faults that the sanitizers must find."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]

# The planted kernels' names hold "alphaext", by which the sanitizers are told whom to watch.
SOURCE = r"""
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define CHECK(call)                                                                        \
  do {                                                                                     \
    const cudaError_t error = (call);                                                      \
    if (error != cudaSuccess) {                                                            \
      fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));                       \
      exit(1);                                                                             \
    }                                                                                      \
  } while (0)

__global__ void empty_kernel() {}

__global__ void barrier_kernel() { cooperative_groups::this_grid().sync(); }

__global__ void alphaext_planted_memcheck(int* data, int count) { data[count + threadIdx.x] = 1; }

__global__ void alphaext_planted_racecheck(int* data, int count) {
  __shared__ int shared[256];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  data[threadIdx.x % count] = shared[(threadIdx.x + 64) % 256];
}

__global__ void alphaext_planted_initcheck(int* data, int count) { data[0] = data[1 + threadIdx.x % (count - 1)] + 1; }

__global__ void alphaext_planted_synccheck(int* data, int) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  data[0] = 1;
}

namespace {

constexpr int kThreads = 256, kLaunches = 100, kRounds = 15;

cudaError_t launch(bool barrier, int blocks, cudaStream_t stream) {
  if (barrier) return cudaLaunchCooperativeKernel(barrier_kernel, dim3(blocks), dim3(kThreads), nullptr, 0, stream);
  empty_kernel<<<blocks, kThreads, 0, stream>>>();
  return cudaGetLastError();
}

// Microseconds a launch, launched one by one or replayed from a graph; negative where this cannot be captured.
float microseconds(bool barrier, bool graph, int blocks) {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  CHECK(launch(barrier, blocks, stream));
  CHECK(cudaStreamSynchronize(stream));
  cudaGraphExec_t executable = nullptr;
  if (graph) {
    cudaGraph_t captured = nullptr;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < kLaunches && error == cudaSuccess; ++i) error = launch(barrier, blocks, stream);
    const cudaError_t ended = cudaStreamEndCapture(stream, &captured);
    if (error != cudaSuccess || ended != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      return -1;
    }
    CHECK(cudaGraphInstantiate(&executable, captured, 0));
  }
  std::vector<float> times;
  for (int round = 0; round < kRounds + 2; ++round) {
    CHECK(cudaEventRecord(begin, stream));
    if (graph) {
      CHECK(cudaGraphLaunch(executable, stream));
    } else {
      for (int i = 0; i < kLaunches; ++i) CHECK(launch(barrier, blocks, stream));
    }
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (round >= 2) times.push_back(1000 * milliseconds / kLaunches);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int limits() {
  int blocks = 0, cooperative = 0;
  CHECK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0));
  CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, 0));
  printf("{\"blocks\": %d, \"empty_launch_us\": %.3f, \"empty_launch_graph_us\": %.3f", blocks,
         microseconds(false, false, blocks), microseconds(false, true, blocks));
  if (cooperative) {
    printf(", \"barrier_launch_us\": %.3f", microseconds(true, false, blocks));
    const float in_graph = microseconds(true, true, blocks);
    if (in_graph >= 0) printf(", \"barrier_launch_graph_us\": %.3f", in_graph);
  }
  printf("}\n");
  return 0;
}

int planted(const char* tool) {
  constexpr int kCount = 256;
  int* data = nullptr;
  CHECK(cudaMalloc(&data, kCount * sizeof(int)));
  if (!strcmp(tool, "memcheck")) alphaext_planted_memcheck<<<1, kThreads>>>(data, kCount);
  if (!strcmp(tool, "racecheck")) alphaext_planted_racecheck<<<1, kThreads>>>(data, kCount);
  if (!strcmp(tool, "initcheck")) alphaext_planted_initcheck<<<1, kThreads>>>(data, kCount);
  if (!strcmp(tool, "synccheck")) alphaext_planted_synccheck<<<1, kThreads>>>(data, kCount);
  static_cast<void>(cudaGetLastError());
  static_cast<void>(cudaDeviceSynchronize());
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  return strcmp(arguments[1], "limits") == 0 ? limits() : planted(arguments[1]);
}
"""


def load_build_support(name: str) -> ModuleType:
    """A module of build_support, which is not installed; the source tree on sys.path would hide an installed alphaext."""
    spec = importlib.util.spec_from_file_location(f"build_support_{name}", ROOT / "build_support" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def compile_probe(directory: Path, architecture: str, seconds: float = 60) -> Path | str:
    """The program for a GPU such as "9.0", compiled where it is not there yet, or why there is none."""
    number = architecture.replace(".", "")
    name = f"probe-{number}-{hashlib.sha256(SOURCE.encode()).hexdigest()[:12]}"
    source, program = directory / f"{name}.cu", directory / name
    if program.exists():
        return program
    search = load_build_support("cuda").find_toolkit(os.environ)
    if search.toolkit is None:
        return "no CUDA toolkit was found: " + "; ".join(search.rejected)
    toolkit = search.toolkit
    directory.mkdir(parents=True, exist_ok=True)
    source.write_text(SOURCE)
    unfinished = program.with_suffix(".new")
    command = [str(toolkit.nvcc), "-std=c++17", "-O3", f"-gencode=arch=compute_{number},code=sm_{number}"]
    command += [f"-isystem={place}" for place in toolkit.include_directories]
    command += [f"-L{toolkit.library_directory}", str(source), "-o", str(unfinished)]
    try:
        finished = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"nvcc took longer than {seconds:.0f} s"
    if finished.returncode != 0:
        return f"nvcc failed: {finished.stdout[-500:]}"
    return unfinished.replace(program)
