// The launchers of the head. Nothing here allocates or synchronises.
#include <cstdlib>

#include "head_backward.cuh"
#include "head_forward.cuh"
#include "kernels.h"
#include "large_head.cuh"
#include "launching.h"

namespace alphaext::cuda {
namespace {

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
  return launch(name, kernel, {blocks < room ? blocks : room, kThreads, shared_bytes}, waits, stream, arguments...);
}

// A kernel's stages in one launch; where blocks cannot wait for each other, in one each.
template <typename Params>
const char* launch_stages(const char* name, void (*kernel)(const Params, const int, const bool), int stages, int64_t blocks,
                          int64_t shared_bytes, bool staged, int32_t device, void* stream, const Params& params) {
  bool can_wait = false;
  const cudaError_t error = ask_whether_blocks_can_wait(device, &can_wait);
  if (error != cudaSuccess) return message_for(name, error);
  const bool waits = (stages & (stages - 1)) != 0;
  if (!waits || can_wait) {
    return stages == 0 ? nullptr : launch_together(name, kernel, blocks, shared_bytes, waits, device, stream, params, stages, staged);
  }
  for (int stage = 1; stage <= stages; stage *= 2) {
    if ((stages & stage) == 0) continue;
    const char* const message = launch_together(name, kernel, blocks, shared_bytes, false, device, stream, params, stage, staged);
    if (message != nullptr) return message;
  }
  return nullptr;
}

}  // namespace

bool fuses_head(ScalarType dtype, int64_t batch, int64_t num_classes, int64_t members, int32_t device) {
  const char* const given = std::getenv("ALPHAEXT_FUSED_SCORES");
  const int64_t largest = given != nullptr && *given != '\0' ? std::strtoll(given, nullptr, 10) : kLargestFusedHead;
  if (batch * num_classes > largest || large_head_stage_bytes(members, dtype) == 0) return false;
  const DeviceGuard guard(device);
  bool can_wait = false;
  return guard.error() == cudaSuccess && ask_whether_blocks_can_wait(device, &can_wait) == cudaSuccess && can_wait;
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

const char* large_head_forward(const LargeHeadParams& params, int32_t device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("large_head_forward", guard.error());
  const int64_t shared_bytes = large_head_stage_bytes(params.head.members, params.head.dtype);
  return dispatch(params.head.dtype, [&](auto element) {
    return launch_stages("large_head_forward", large_head_forward_kernel<decltype(element)>, large_head_forward_stages(params),
                         large_head_forward_blocks(params), shared_bytes, shared_bytes > 0, device, stream, params);
  });
}

const char* large_head_backward(const LargeHeadBackwardParams& params, int32_t device, void* stream) {
  const HeadBackwardParams& head = params.head;
  const bool staged = large_head_stage_bytes(head.members, head.dtype) > 0;
  if (head.grad_logits != nullptr && (params.entry_offsets == nullptr || (params.entries == nullptr && head.num_few > 0))) {
    return "alphaext CUDA kernel large_head_backward: grad_logits needs entries and entry_offsets";
  }
  if (!staged && head.grad_raw == nullptr && head.num_few > 0) {
    return "alphaext CUDA kernel large_head_backward: so many members need grad_raw";
  }
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("large_head_backward", guard.error());
  return dispatch(head.dtype, [&](auto element) {
    return launch_stages("large_head_backward", large_head_backward_kernel<decltype(element)>, large_head_backward_stages(params),
                         large_head_backward_blocks(params), large_head_backward_shared_bytes(params), staged, device, stream,
                         params);
  });
}

}  // namespace alphaext::cuda
