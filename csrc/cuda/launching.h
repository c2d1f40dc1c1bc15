// What every launcher needs: the device guard, messages for errors, launches that are checked.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "device.cuh"

#if !defined(__CUDACC__)
#include "cuda_runtime_shim.h"
#endif

#ifndef ALPHAEXT_CUDA_ARCHS
#define ALPHAEXT_CUDA_ARCHS "(not recorded by this build)"
#endif

namespace alphaext::cuda {

// nullptr, or what to tell the user; valid until this thread's next message.
inline const char* message_for(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  static thread_local char text[512];
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    snprintf(text, sizeof(text),
             "alphaext CUDA kernel %s: this build has no code for this GPU (%s). It was built for %s; install alphaext again "
             "on this machine, or with TORCH_CUDA_ARCH_LIST naming this GPU's compute capability, or all.",
             kernel, cudaGetErrorString(error), ALPHAEXT_CUDA_ARCHS);
  } else {
    snprintf(text, sizeof(text), "alphaext CUDA kernel %s: %s (%s)", kernel, cudaGetErrorString(error),
             cudaGetErrorName(error));
  }
  return text;
}

// Works on the tensors' device, whichever is current, and leaves the current one as it was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

// A type that a call's arguments do not decide.
template <typename T>
struct Given {
  using type = T;
};

inline cudaError_t first_of(cudaError_t one, cudaError_t two) { return one != cudaSuccess ? one : two; }

// Every launch goes through here, and so past the check of its error. `cooperative`: its blocks wait for each other.
template <typename... Parameters>
const char* launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, bool cooperative, void* stream,
                   typename Given<Parameters>::type... arguments) {
  if (shape.blocks == 0) return nullptr;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const dim3 grid(static_cast<unsigned>(shape.blocks)), block(static_cast<unsigned>(shape.threads));
  const auto shared_bytes = static_cast<size_t>(shape.shared_bytes);
  const auto queue = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (cooperative) {
    error = cudaLaunchCooperativeKernel(kernel, grid, block, pointers, shared_bytes, queue);
  } else {
    error = cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes, queue);
  }
  error = first_of(error, cudaGetLastError());  // which also forgets it: it is reported here, not by the next launch
  return message_for(name, error);
}

// How many blocks of a kernel the device runs at once.
template <typename... Parameters>
cudaError_t blocks_at_once(void (*kernel)(Parameters...), int threads, int64_t shared_bytes, int32_t device, int64_t* blocks) {
  int processors = 0, each = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, static_cast<size_t>(shared_bytes));
  }
  *blocks = static_cast<int64_t>(processors) * each;
  return error == cudaSuccess && *blocks == 0 ? cudaErrorCooperativeLaunchTooLarge : error;
}

// Leaves no more of `blocks` that wait for each other than ALPHAEXT_COOPERATIVE_BLOCKS allows: a sanitizer or other work on the
// device can take room that the device still counts. A message where its value is none.
inline const char* limit_cooperative_blocks(const char* kernel, int64_t* blocks) {
  const char* const given = std::getenv("ALPHAEXT_COOPERATIVE_BLOCKS");
  if (given == nullptr || *given == '\0') return nullptr;
  char* end = nullptr;
  const int64_t most = std::strtoll(given, &end, 10);
  if (*end != '\0' || most < 1) {
    static thread_local char text[256];
    snprintf(text, sizeof(text), "alphaext CUDA kernel %s: ALPHAEXT_COOPERATIVE_BLOCKS must be a whole number from 1 on, got '%.64s'",
             kernel, given);
    return text;
  }
  *blocks = most < *blocks ? most : *blocks;
  return nullptr;
}

// Can blocks of one launch wait for each other on this device?
inline cudaError_t ask_whether_blocks_can_wait(int32_t device, bool* can) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, cudaDevAttrCooperativeLaunch, device);
  *can = error == cudaSuccess && value != 0;
  return error;
}

template <typename Function>
const char* dispatch(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Float32:
      return function(float{});
    case ScalarType::Float64:
      return function(double{});
    case ScalarType::Float16:
      return function(float16{});
    case ScalarType::BFloat16:
      return function(bfloat16{});
  }
  return "alphaext CUDA kernels: unknown dtype";
}

// Launches no more blocks than the device runs at once, all of them at the same time where they wait for each other.
template <typename... Parameters>
const char* launch_together(const char* name, void (*kernel)(Parameters...), int64_t blocks, int64_t shared_bytes, bool waits,
                            int32_t device, void* stream, typename Given<Parameters>::type... arguments) {
  if (blocks == 0) return nullptr;
  int64_t room = 0;
  const cudaError_t error = blocks_at_once(kernel, kThreads, shared_bytes, device, &room);
  if (error != cudaSuccess) return message_for(name, error);
  if (waits) {
    const char* const message = limit_cooperative_blocks(name, &room);
    if (message != nullptr) return message;
  }
  return launch(name, kernel, {blocks < room ? blocks : room, kThreads, shared_bytes}, waits, stream, arguments...);
}

}  // namespace alphaext::cuda
