// What every kernel file includes first. Kernel text holds no launch and no torch, so that it compiles unchanged for two
// machines: under nvcc for a GPU, and under any C++20 compiler for CPU threads through tests/cpp/cuda_shim.h, where the
// sanitizers can see it.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define ALPHAEXT_PRAGMA(text) _Pragma(#text)
#define ALPHAEXT_UNROLL(count) ALPHAEXT_PRAGMA(unroll count)
// The launch's dynamic shared memory, seen as an array of `type`.
#define ALPHAEXT_DYNAMIC_SHARED(type, name)                               \
  extern __shared__ __align__(16) unsigned char alphaext_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(alphaext_dynamic_shared)
// `count` elements of static shared memory. A macro, because the shim gives each of its concurrent blocks its own.
#define ALPHAEXT_STATIC_SHARED(type, name, count) __shared__ type name[count]
#else
#include "cuda_shim.h"
#endif

#include "../params.h"

namespace alphaext::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Blocks an SM must have room for: 2 leaves each thread 128 registers, with which no kernel spills. Left unsaid, the compiler
// saves registers at the price of a few spills; asked for 4, it spills more.
constexpr int kMinBlocks = 2;
// Fills the largest card many times over; kernels stride over whatever is left.
constexpr int64_t kMaxBlocks = 65535;
// What every architecture grants a block without asking.
constexpr int64_t kMaxSharedBytes = 48 * 1024;

struct LaunchShape {
  int64_t blocks;  // 0: nothing to do
  int threads;     // a multiple of kWarp, at most kThreads
  int64_t shared_bytes;
};

inline LaunchShape shape_for(int64_t items, int64_t items_per_block, int threads, int64_t shared_bytes = 0) {
  const int64_t blocks = items / items_per_block + (items % items_per_block != 0);
  return {blocks < kMaxBlocks ? blocks : kMaxBlocks, threads, shared_bytes};
}

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

// The first item of this warp, and the step to its next one, where each warp of the grid takes one item at a time.
__device__ __forceinline__ int64_t warp_begin() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
}
__device__ __forceinline__ int64_t warp_step() { return static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp); }

// The sum over the warp, in every lane. The order of the additions is fixed, so that runs repeat bit by bit.
template <typename Acc>
__device__ __forceinline__ Acc warp_sum(Acc value) {
  ALPHAEXT_UNROLL(5)
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Class ids come from the caller's tensor, and checking them on the host would stall the stream: kernels check each one
// before it becomes an address.
__device__ __forceinline__ bool in_range(int64_t id, int64_t count) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(count);
}

}  // namespace alphaext::cuda
