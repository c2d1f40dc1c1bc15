// What blocks of one training tell each other: words that release and acquire, and what was written before them.
#pragma once

#include "device.cuh"

namespace alphaext::cuda {

#if defined(__CUDACC__)
__device__ __forceinline__ void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
// Of what another block has written: from the second-level cache, where its writes are.
template <typename T>
__device__ __forceinline__ T load_published(const T* address) {
  return __ldcg(address);
}
template <typename T>
__device__ __forceinline__ Vector<T> load_published(const Vector<T>* address) {
  const uint4 words = __ldcg(reinterpret_cast<const uint4*>(address));
  Vector<T> result;
  memcpy(&result, &words, sizeof(words));
  return result;
}
template <typename T>
__device__ __forceinline__ void store_published(T* address, T value) {
  __stcg(address, value);
}
// Of an argument that nobody writes during the launch. Its pointer comes out of shared memory, so the compiler would not know by
// itself that it leads to global memory, and would keep the load behind every store before it.
template <typename T>
__device__ __forceinline__ T load_argument(const T* address) {
  return __ldg(address);
}
__device__ __forceinline__ void pause() {}
#else
inline void store_release(uint32_t* address, uint32_t value) {
  std::atomic_ref<uint32_t>(*address).store(value, std::memory_order_release);
}
inline uint32_t load_acquire(const uint32_t* address) {
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(address)).load(std::memory_order_acquire);
}
template <typename T>
T load_published(const T* address) {
  return *address;
}
template <typename T>
void store_published(T* address, T value) {
  *address = value;
}
template <typename T>
T load_argument(const T* address) {
  return *address;
}
using shim::pause;
#endif

}  // namespace alphaext::cuda
