// The composition: scores as a sparse mix of the original classifier's logits, and its backward.
//
// Class ids that are out of range never become addresses. A class with such a neighbour gets NaN as its score, and NaN as
// that coefficient's gradient; a class whose own id is out of range has no column, writes nothing and gets gradient 0. Own
// ids are expected to be distinct.
#pragma once

#include "device.cuh"

namespace alphaext::cuda {

// What coefficient k multiplies: the member's logit, less its bias where only the own bias counts.
template <typename Acc>
__device__ __forceinline__ Acc mixed_logit(const Acc* __restrict__ row, const Acc* __restrict__ bias, int64_t k, int64_t id,
                                           int64_t num_classes) {
  if (!in_range(id, num_classes)) return Acc(float_of(0x7fc00000u));  // NaN
  return bias != nullptr && k != 0 ? row[id] - bias[id] : row[id];
}

inline LaunchShape mix_forward_shape(const MixParams& params, int threads = kThreads) {
  return shape_for(params.num_classes > 0 ? params.batch : 0, 1, threads);
}

// A block per batch row: copy it, then overwrite the few columns, always reading the original logits.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) mix_forward_kernel(const MixParams params) {
  using Acc = accumulate_t<T>;
  const int64_t* __restrict__ const member_ids = params.member_ids;
  const Acc* __restrict__ const alpha = static_cast<const Acc*>(params.alpha);
  const Acc* __restrict__ const bias = static_cast<const Acc*>(params.bias);
  const int64_t num_classes = params.num_classes;
  const int64_t members = params.members;

  for (int64_t b = blockIdx.x; b < params.batch; b += gridDim.x) {
    const Acc* __restrict__ const logits = static_cast<const Acc*>(params.logits) + b * num_classes;
    T* __restrict__ const scores = static_cast<T*>(params.scores) + b * num_classes;
    for (int64_t c = threadIdx.x; c < num_classes; c += blockDim.x) scores[c] = narrow<T>(logits[c]);
    __syncthreads();
    for (int64_t few = threadIdx.x; few < params.num_few; few += blockDim.x) {
      const int64_t own = member_ids[few * members];
      if (!in_range(own, num_classes)) continue;
      Acc sum = 0;
      for (int64_t k = 0; k < members; ++k) {
        const int64_t id = member_ids[few * members + k];
        sum += alpha[few * members + k] * mixed_logit(logits, bias, k, id, num_classes);
      }
      scores[own] = narrow<T>(sum);
    }
  }
}

inline LaunchShape mix_backward_alpha_shape(const MixBackwardParams& params, int threads = kThreads) {
  return shape_for(params.num_few * params.members, threads / kWarp, threads);
}

// A warp per coefficient, lanes over the batch. With an empty batch the sum is 0 and still has to be written.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) mix_backward_alpha_kernel(const MixBackwardParams params) {
  using Acc = accumulate_t<T>;
  const int64_t* __restrict__ const member_ids = params.member_ids;
  const Acc* __restrict__ const logits = static_cast<const Acc*>(params.logits);
  const Acc* __restrict__ const bias = static_cast<const Acc*>(params.bias);
  const T* __restrict__ const grad_scores = static_cast<const T*>(params.grad_scores);
  Acc* __restrict__ const grad_alpha = static_cast<Acc*>(params.grad_alpha);
  const int64_t num_classes = params.num_classes;
  const int64_t members = params.members;

  for (int64_t item = warp_begin(); item < params.num_few * members; item += warp_step()) {
    const int64_t few = item / members;
    const int64_t k = item - few * members;
    const int64_t own = member_ids[few * members];
    const int64_t id = member_ids[item];
    Acc sum = 0;
    if (in_range(own, num_classes)) {
      ALPHAEXT_UNROLL(2)
      for (int64_t b = lane_index(); b < params.batch; b += kWarp) {
        const int64_t row = b * num_classes;
        sum += Acc(widen(grad_scores[row + own])) * mixed_logit(logits + row, bias, k, id, num_classes);
      }
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) grad_alpha[item] = sum;
  }
}

// A block takes `threads` neighbouring columns of one batch row.
inline LaunchShape mix_backward_logits_shape(const MixBackwardParams& params, int threads = kThreads) {
  const int64_t chunks = params.num_classes / threads + (params.num_classes % threads != 0);
  return shape_for(params.batch * chunks, 1, threads);
}

// A thread per logit gathers from the few columns that its class takes part in, in the order of `entries`: nothing is added
// atomically, so runs repeat bit by bit. A class that heads an entry (k = 0) is few, and its own column's gradient reaches
// its logit through that entry alone.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) mix_backward_logits_kernel(const MixBackwardParams params) {
  using Acc = accumulate_t<T>;
  const int64_t* __restrict__ const member_ids = params.member_ids;
  const int64_t* __restrict__ const entries = params.entries;
  const int64_t* __restrict__ const entry_offsets = params.entry_offsets;
  const Acc* __restrict__ const alpha = static_cast<const Acc*>(params.alpha);
  const int64_t num_classes = params.num_classes;
  const int64_t members = params.members;
  const int64_t threads = blockDim.x;
  const int64_t chunks = num_classes / threads + (num_classes % threads != 0);

  for (int64_t item = blockIdx.x; item < params.batch * chunks; item += gridDim.x) {
    const int64_t b = item / chunks;
    const int64_t c = (item - b * chunks) * threads + threadIdx.x;
    if (c >= num_classes) continue;
    const T* __restrict__ const grad_scores = static_cast<const T*>(params.grad_scores) + b * num_classes;
    Acc sum = 0;
    bool is_few = false;
    const int64_t end = entry_offsets[c + 1];
    for (int64_t position = entry_offsets[c]; position < end; ++position) {
      const int64_t entry = entries[position];
      const int64_t head = entry / members * members;
      const int64_t own = member_ids[head];
      is_few = is_few || entry == head;
      if (in_range(own, num_classes)) sum += alpha[entry] * Acc(widen(grad_scores[own]));
    }
    if (!is_few) sum += Acc(widen(grad_scores[c]));
    static_cast<Acc*>(params.grad_logits)[b * num_classes + c] = sum;
  }
}

}  // namespace alphaext::cuda
