// The launchers: the only CUDA text with `<<<>>>` in it. Nothing here allocates or synchronises.
#include "kernels.h"

#include <cstdio>
#include <cstdlib>

#include "coefficients.cuh"
#include "first_layer.cuh"
#include "head_backward.cuh"
#include "head_forward.cuh"
#include "mix.cuh"

#ifndef ALPHAEXT_CUDA_ARCHS
#define ALPHAEXT_CUDA_ARCHS "(not recorded by this build)"
#endif

namespace alphaext::cuda {
namespace {

const char* message_for(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  static thread_local char text[512];
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    snprintf(text, sizeof(text),
             "alphaext CUDA kernel %s: this build has no code for this GPU (%s). It was built for %s; rebuild with "
             "TORCH_CUDA_ARCH_LIST naming this GPU's compute capability.",
             kernel, cudaGetErrorString(error), ALPHAEXT_CUDA_ARCHS);
  } else {
    snprintf(text, sizeof(text), "alphaext CUDA kernel %s: %s (%s)", kernel, cudaGetErrorString(error),
             cudaGetErrorName(error));
  }
  return text;
}

// Launches on the tensors' device, whichever is current, and leaves the current one as it was.
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

// Every launch goes through here, and so past the check of its error.
template <typename... Parameters, typename... Arguments>
const char* launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                   const Arguments&... arguments) {
  if (shape.blocks == 0) return nullptr;
  kernel<<<static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.threads),
           static_cast<size_t>(shape.shared_bytes), static_cast<cudaStream_t>(stream)>>>(arguments...);
  return message_for(name, cudaGetLastError());
}

// Launches no more blocks than the device runs at once, all of them at the same time where they wait for each other.
template <typename... Parameters, typename... Arguments>
const char* launch_together(const char* name, void (*kernel)(Parameters...), int64_t blocks, int64_t shared_bytes, bool waits,
                            int32_t device, void* stream, Arguments... arguments) {
  if (blocks == 0) return nullptr;
  int processors = 0, blocks_each = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, kThreads, static_cast<size_t>(shared_bytes));
  }
  if (error != cudaSuccess) return message_for(name, error);
  const int64_t room = static_cast<int64_t>(processors) * blocks_each;
  const LaunchShape shape{blocks < room ? blocks : room, kThreads, shared_bytes};
  if (shape.blocks == 0) return message_for(name, cudaErrorCooperativeLaunchTooLarge);
  if (!waits) return launch(name, kernel, shape, stream, arguments...);
  void* pointers[] = {&arguments...};
  error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(shape.blocks)),
                                      dim3(static_cast<unsigned>(shape.threads)), pointers,
                                      static_cast<size_t>(shape.shared_bytes), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());  // it is reported here, not by the next launch
  return message_for(name, error);
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

}  // namespace

const char* first_layer_forward(const FirstLayerParams& params, int32_t device, void* stream) {
  const LaunchShape shape = first_layer_forward_shape(params);
  if (shape.blocks == 0) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("first_layer_forward", guard.error());
  return dispatch(params.dtype, [&](auto element) {
    return launch("first_layer_forward", first_layer_forward_kernel<decltype(element)>, shape, stream, params);
  });
}

const char* first_layer_backward(const FirstLayerBackwardParams& params, int32_t device, void* stream) {
  const LaunchShape shape = first_layer_backward_shape(params);
  if (shape.blocks == 0 || (params.grad_w1 == nullptr && params.grad_z == nullptr)) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("first_layer_backward", guard.error());
  return dispatch(params.dtype, [&](auto element) {
    return launch("first_layer_backward", first_layer_backward_kernel<decltype(element)>, shape, stream, params);
  });
}

const char* coefficient_forward(const CoefficientParams& params, int32_t device, void* stream) {
  const LaunchShape shape = coefficient_forward_shape(params);
  if (shape.blocks == 0) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("coefficient_forward", guard.error());
  return dispatch(params.dtype, [&](auto element) {
    return launch("coefficient_forward", coefficient_forward_kernel<decltype(element)>, shape, stream, params,
                  shape.shared_bytes > 0);
  });
}

const char* coefficient_backward(const CoefficientBackwardParams& params, int32_t device, void* stream) {
  const LaunchShape shape = coefficient_backward_shape(params);
  if (shape.blocks == 0) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("coefficient_backward", guard.error());
  return dispatch(params.dtype, [&](auto element) {
    return launch("coefficient_backward", coefficient_backward_kernel<decltype(element)>, shape, stream, params,
                  shape.shared_bytes > 0);
  });
}

const char* mix_forward(const MixParams& params, int32_t device, void* stream) {
  const LaunchShape shape = mix_forward_shape(params);
  if (shape.blocks == 0) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("mix_forward", guard.error());
  return dispatch(params.dtype, [&](auto element) {
    return launch("mix_forward", mix_forward_kernel<decltype(element)>, shape, stream, params);
  });
}

const char* mix_backward(const MixBackwardParams& params, int32_t device, void* stream) {
  const LaunchShape alpha_shape = mix_backward_alpha_shape(params);
  LaunchShape logits_shape = mix_backward_logits_shape(params);
  if (params.grad_logits == nullptr) logits_shape.blocks = 0;
  if (alpha_shape.blocks == 0 && logits_shape.blocks == 0) return nullptr;
  if (logits_shape.blocks != 0 && (params.entry_offsets == nullptr || (params.entries == nullptr && params.num_few != 0))) {
    return "alphaext CUDA kernel mix_backward: grad_logits needs entries and entry_offsets";
  }
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("mix_backward", guard.error());
  return dispatch(params.dtype, [&](auto element) {
    using T = decltype(element);
    const char* message =
        launch("mix_backward (alpha)", mix_backward_alpha_kernel<T>, alpha_shape, stream, params);
    if (message != nullptr) return message;
    return launch("mix_backward (logits)", mix_backward_logits_kernel<T>, logits_shape, stream, params);
  });
}

bool fuses_head(ScalarType dtype, int64_t batch, int64_t num_classes, int64_t members, int32_t device) {
  const char* const given = std::getenv("ALPHAEXT_FUSED_SCORES");
  const int64_t largest = given != nullptr && *given != '\0' ? std::strtoll(given, nullptr, 10) : kLargestFusedHead;
  if (batch * num_classes > largest) return false;
  const int64_t of_class = (2 * members + kThreads) * (dtype == ScalarType::Float64 ? 8 : 4);
  const DeviceGuard guard(device);
  int cooperates = 0;
  return guard.error() == cudaSuccess && of_class <= kMaxSharedBytes &&
         cudaDeviceGetAttribute(&cooperates, cudaDevAttrCooperativeLaunch, device) == cudaSuccess && cooperates != 0;
}

const char* head_forward(const HeadParams& params, int32_t device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("head_forward", guard.error());
  return dispatch(params.dtype, [&](auto element) {
    return launch_together("head_forward", head_forward_kernel<decltype(element), kSide>, head_forward_blocks<kSide>(params),
                           head_forward_shared_bytes<kSide>(params), head_forward_waits(params), device, stream, params,
                           head_forward_waits(params));
  });
}

const char* head_backward(const HeadBackwardParams& params, int32_t device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("head_backward", guard.error());
  return dispatch(params.dtype, [&](auto element) {
    return launch_together("head_backward", head_backward_kernel<decltype(element), kSide>, head_backward_blocks<kSide>(params),
                           head_backward_shared_bytes<kSide>(params), head_backward_waits(params), device, stream, params,
                           asks_for_submodules(params), head_backward_waits(params));
  });
}

}  // namespace alphaext::cuda
