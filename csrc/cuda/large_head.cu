// The launchers of the head of any size. Nothing here allocates or synchronises.
#include "large_head.h"

#include "large_head_backward.cuh"
#include "large_head_forward.cuh"
#include "launching.h"

namespace alphaext::cuda {
namespace {

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
