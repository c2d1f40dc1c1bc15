// What every kernel file includes first. Kernel text holds no launch and no torch, so that it compiles unchanged for two
// machines: under nvcc for a GPU, and under any C++20 compiler for CPU threads through tests/cpp/cuda_shim.h, where the
// sanitizers can see it.
#pragma once

#if defined(__CUDACC__)
#include <cooperative_groups.h>
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

#include "launch_shape.h"

namespace alphaext::cuda {

#if defined(__CUDACC__)
// Where all threads of a cooperative launch meet; what they wrote before, all of them can read afterwards.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }
#else
using shim::grid_barrier;
#endif

#if defined(__CUDACC__)
// Rounded once, so that two computations of one score cannot differ.
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
template <typename T>
T fused(T a, T b, T c) {
  return a * b + c;
}
#endif

template <typename T>
__device__ __forceinline__ T not_a_number() {
  return T(float_of(0x7fc00000u));
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

// The other lanes' values, up to 16 bytes each: all lanes make one together, and read from it together, before the warp's next
// such function.
#if defined(__CUDACC__)
template <typename T>
struct Lanes {
  static_assert(sizeof(T) % 4 == 0);
  T own;
  __device__ __forceinline__ T operator[](int lane) const {
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &own, sizeof(T));
    for (uint32_t& word : words) word = __shfl_sync(0xffffffffu, word, lane);
    T other;
    memcpy(&other, words, sizeof(T));
    return other;
  }
};
template <typename T>
__device__ __forceinline__ Lanes<T> all_lanes(T own) {
  return {own};
}
#else
template <typename T>
shim::Lanes<T> all_lanes(T own, const std::source_location& where = std::source_location::current()) {
  return shim::exchange(0xffffffffu, own, where);
}
#endif

// ---- Conversions -------------------------------------------------------------------------------------------------------

// `widen` and `narrow` with the GPU's own instructions, where its 16-bit types have one. The streams over w1 convert so many
// elements that integer arithmetic would not keep up with the memory.
template <typename T>
__device__ __forceinline__ accumulate_t<T> wide(T value) {
  return widen(value);
}
template <typename T>
__device__ __forceinline__ T narrowed(accumulate_t<T> value) {
  return narrow<T>(value);
}
#if defined(__CUDA_ARCH__)
template <>
__device__ __forceinline__ float wide<float16>(float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
template <>
__device__ __forceinline__ float16 narrowed<float16>(float value) {
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ bfloat16 narrowed<bfloat16>(float value) {
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
#endif
#endif

// ---- Sixteen bytes at a time -------------------------------------------------------------------------------------------

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Can rows of `row` elements, one after another from `data`, be read 16 bytes at a time? No rows at all can.
template <typename T>
__device__ __forceinline__ bool rows_are_aligned(const void* data, int64_t row) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row % Vector<T>::kSize == 0;
}

// Elements i .. i + kSize of an array of `size`, in one access or one by one; those beyond the end are 0.
template <bool kAligned, typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* data, int64_t i, int64_t size) {
  Vector<T> result{};
  if constexpr (kAligned) {
    if (i < size) result = *reinterpret_cast<const Vector<T>*>(data + i);
  } else {
    for (int v = 0; v < Vector<T>::kSize; ++v) {
      if (i + v < size) result.values[v] = data[i + v];
    }
  }
  return result;
}

// The same for data that no thread reads again and no thread writes: it does not push out of the first-level cache what is
// read again.
template <bool kAligned, typename T>
__device__ __forceinline__ Vector<T> load_once(const T* data, int64_t i, int64_t size) {
#if defined(__CUDA_ARCH__)
  if constexpr (kAligned) {
    Vector<T> result{};
    if (i < size) {
      uint4 words;
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                   : "l"(data + i));
      memcpy(&result, &words, sizeof(words));
    }
    return result;
  }
#endif
  return load_vector<kAligned>(data, i, size);
}

// Written once and not read again by this launch: the first to leave the second-level cache.
template <typename T>
__device__ __forceinline__ void store_once(T* data, const Vector<T>& value) {
#if defined(__CUDA_ARCH__)
  uint4 words;
  memcpy(&words, &value, sizeof(words));
  __stcs(reinterpret_cast<uint4*>(data), words);
#else
  *reinterpret_cast<Vector<T>*>(data) = value;
#endif
}

// Asks for the `bytes` from `data`, by all of a block's threads, so that they are in the second-level cache when they are read.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__CUDA_ARCH__)
  constexpr int64_t kLine = 128;
  for (int64_t at = threadIdx.x * kLine; at < bytes; at += blockDim.x * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const unsigned char*>(data) + at));
  }
#endif
}

// ---- Ids ---------------------------------------------------------------------------------------------------------------

// Class ids come from the caller's tensor, and checking them on the host would stall the stream: kernels check each one
// before it becomes an address.
__device__ __forceinline__ bool in_range(int64_t id, int64_t count) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(count);
}

}  // namespace alphaext::cuda
