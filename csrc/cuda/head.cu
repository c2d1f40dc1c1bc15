// The launchers of the head in one launch, and where that way ends. Nothing here allocates or synchronises.
#include "head.h"

#include <cstdlib>

#include "head_backward.cuh"
#include "head_forward.cuh"
#include "launching.h"

namespace alphaext::cuda {

bool fuses_head(ScalarType dtype, int64_t batch, int64_t num_classes, int64_t members, int32_t device) {
  const char* const given = std::getenv("ALPHAEXT_FUSED_SCORES");
  const int64_t largest = given != nullptr && *given != '\0' ? std::strtoll(given, nullptr, 10) : largest_fused_head(dtype);
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

}  // namespace alphaext::cuda
