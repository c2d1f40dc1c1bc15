// What the launchers ask of CUDA's runtime, answered for a GPU that is made of CPU threads (cuda_shim.h): errors where the real
// one has errors, launches as shim::launch. Of that GPU these variables of the environment say more:
//
//   SHIM_PROCESSORS   multiprocessors (2)
//   SHIM_BLOCKS       blocks that a multiprocessor holds at most (1)
//   SHIM_COOPERATES   0: blocks of one launch cannot wait for each other (1)
//   SHIM_SHARED       bytes of shared memory that a block may ask for (227 KiB)
//   SHIM_HANGS        the launch, counted from 1, that never ends (0: none)
#pragma once

#include "cuda_shim.h"

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
};
using cudaStream_t = void*;

namespace shim {

constexpr int kDevices = 1;
constexpr std::size_t kFreeSharedBytes = 48 * 1024;  // more than that has to be asked for, kernel by kernel
constexpr std::size_t kStaticSharedBytes = 512;      // that every kernel is said to have

inline int setting(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::atoi(text) : otherwise;
}
inline int processors() { return setting("SHIM_PROCESSORS", 2); }
inline int shared_limit() { return setting("SHIM_SHARED", 227 * 1024); }
inline bool cooperates() { return setting("SHIM_COOPERATES", 1) != 0; }

inline thread_local cudaError_t last_error = cudaSuccess;
inline cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

inline std::mutex granted_mutex;
inline std::map<const void*, std::size_t> granted;  // dynamic shared memory that kernels have asked for
inline std::size_t granted_to(const void* kernel) {
  const std::lock_guard<std::mutex> lock(granted_mutex);
  const auto found = granted.find(kernel);
  return found == granted.end() ? kFreeSharedBytes : found->second;
}

inline int blocks_each(const void* kernel, int threads, std::size_t dynamic_bytes) {
  if (threads > 1024 || dynamic_bytes > granted_to(kernel)) return 0;
  const int by_memory = static_cast<int>(static_cast<std::size_t>(shared_limit()) / (dynamic_bytes + kStaticSharedBytes));
  const int most = setting("SHIM_BLOCKS", 1);
  return by_memory < most ? by_memory : most;
}

// How often what was launched, by the kind of launch; for tests.
inline thread_local int launches = 0, cooperative_launches = 0;
inline thread_local unsigned last_blocks = 0;  // of the last launch

template <typename... Parameters, std::size_t... kIndices>
void call(void (*kernel)(Parameters...), const LaunchConfig& config, void** arguments, std::index_sequence<kIndices...>) {
  launch(kernel, config, *static_cast<std::remove_reference_t<Parameters>*>(arguments[kIndices])...);
}

template <typename... Parameters>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes, bool cooperative) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (grid.x == 0 || block.x == 0 || block.x > 1024 || grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) {
    return report(cudaErrorInvalidConfiguration);
  }
  if (shared_bytes > granted_to(address)) return report(cudaErrorInvalidValue);
  if (cooperative && !cooperates()) return report(cudaErrorNotSupported);
  const auto room = static_cast<unsigned>(processors() * blocks_each(address, static_cast<int>(block.x), shared_bytes));
  if (room == 0) return report(cudaErrorInvalidValue);
  if (cooperative && grid.x > room) return report(cudaErrorCooperativeLaunchTooLarge);
  ++(cooperative ? cooperative_launches : launches);
  last_blocks = grid.x;
  while (launches + cooperative_launches == setting("SHIM_HANGS", 0)) std::this_thread::sleep_for(std::chrono::seconds(1));
  call(kernel, {.grid = grid.x, .block = block.x, .shared_bytes = shared_bytes, .cooperative = cooperative}, arguments,
       std::index_sequence_for<Parameters...>{});
  return cudaSuccess;
}

}  // namespace shim

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorUnsupportedPtxVersion: return "cudaErrorUnsupportedPtxVersion";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
  }
  return "unknown";
}
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
inline cudaError_t cudaGetLastError() { return std::exchange(shim::last_error, cudaSuccess); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device < shim::kDevices ? cudaSuccess : shim::report(cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device >= shim::kDevices) return shim::report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = shim::processors(); break;
    case cudaDevAttrCooperativeLaunch: *value = shim::cooperates() ? 1 : 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shim::shared_limit(); break;
  }
  return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  attributes->sharedSizeBytes = shim::kStaticSharedBytes;
  return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  if (value < 0 || value + static_cast<int>(shim::kStaticSharedBytes) > shim::shared_limit()) {
    return shim::report(cudaErrorInvalidValue);
  }
  const std::lock_guard<std::mutex> lock(shim::granted_mutex);
  shim::granted[reinterpret_cast<const void*>(kernel)] = static_cast<std::size_t>(value);
  return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Parameters...), int threads,
                                                          std::size_t shared_bytes) {
  *blocks = shim::blocks_each(reinterpret_cast<const void*>(kernel), threads, shared_bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes,
                             cudaStream_t) {
  return shim::start(kernel, grid, block, arguments, shared_bytes, false);
}
template <typename... Parameters>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                                        std::size_t shared_bytes, cudaStream_t) {
  return shim::start(kernel, grid, block, arguments, shared_bytes, true);
}
