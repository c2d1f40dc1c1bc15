// The gradients of equations 1 to 4 for a head of any size, all but the matrix products, in one launch.
//
// The products are the caller's, by cuBLAS: the gradients of input, weight and of one first layer for all classes, after this
// launch, from grad_logits and grad_preactivation. Stages and empty arrays are as in large_head_forward.cuh.
#pragma once

#include "head_backward.cuh"
#include "large_head_forward.cuh"

namespace alphaext::cuda {

enum LargeHeadBackwardStage : int {
  kElements = 1,  // grad_logits, and everything of one class
  kSums = 2,      // over classes and over the batch
};

inline int large_head_backward_stages(const LargeHeadBackwardParams& params) {
  const HeadBackwardParams& p = params.head;
  int stages = 0;
  if (asks_for_submodules(p) || p.grad_preactivation != nullptr || p.grad_logits != nullptr) stages |= kElements;
  const bool over_classes = (p.shared_second && (p.grad_w2 != nullptr || p.grad_b2 != nullptr)) ||
                            (p.shared_first && p.grad_b1 != nullptr) || (!p.shared_first && p.grad_z != nullptr);
  if (over_classes || p.grad_bias != nullptr) stages |= kSums;
  return stages;
}

inline int64_t large_head_backward_shared_bytes(const LargeHeadBackwardParams& params, int threads = kThreads) {
  const HeadBackwardParams& p = params.head;
  const int64_t size = p.dtype == ScalarType::Float64 ? 8 : 4;
  const int64_t staged = large_head_stage_bytes(p.members, p.dtype, threads);
  const int64_t of_class = staged > 0 ? staged : threads * size;
  const int64_t of_columns = p.grad_z != nullptr ? threads * 8 * size : 0;  // at most 8 sums a thread
  return of_class > of_columns ? of_class : of_columns;
}

inline int64_t large_head_backward_blocks(const LargeHeadBackwardParams& params, int threads = kThreads) {
  const HeadBackwardParams& p = params.head;
  const int64_t columns = tiles_along(p.num_classes, threads);
  const bool of_weights = p.shared_second && p.grad_w2 != nullptr;
  int64_t most = p.grad_w1 != nullptr ? p.num_few * p.hidden : p.num_few;
  for (const int64_t jobs : {
           p.grad_logits != nullptr ? tiles_along(p.batch, kRowsAtOnce) * columns : int64_t{0},
           p.grad_bias != nullptr ? tiles_along(p.num_classes, kWarp) : int64_t{0},
           p.grad_z != nullptr ? p.num_few * tiles_along(p.inputs, grad_z_columns(size_of(p.dtype))) : int64_t{0},
           of_weights ? tiles_along(p.members * p.hidden, kWarp) : int64_t{0},
           p.shared_first && p.grad_b1 != nullptr ? tiles_along(p.hidden, kWarp) : int64_t{0},
           int64_t{1},
       }) {
    most = jobs > most ? jobs : most;
  }
  return most;
}

// The logits' gradient in one column of some rows, by one thread: it gathers from the few columns that its class takes part in,
// in the order of `entries`. A class that heads an entry (k = 0) is few: its own column's gradient reaches its logit through
// that entry alone.
template <typename T>
__device__ __forceinline__ void gather_column(const LargeHeadBackwardParams& params, int64_t column, int64_t row, int64_t rows) {
  using Acc = accumulate_t<T>;
  const HeadBackwardParams& p = params.head;
  const int64_t num_classes = p.num_classes, members = p.members;
  const T* const grad_scores = static_cast<const T*>(p.grad_scores) + row * num_classes;
  const Acc* const alpha = static_cast<const Acc*>(p.alpha);
  Acc sums[kRowsAtOnce] = {};
  bool is_few = false;
  const int64_t end = params.entry_offsets[column + 1];
  for (int64_t position = params.entry_offsets[column]; position < end; ++position) {
    const int64_t entry = params.entries[position];
    const int64_t head = entry / members * members;
    const int64_t own = p.member_ids[head];
    is_few = is_few || entry == head;
    if (!in_range(own, num_classes)) continue;
    const Acc factor = alpha[entry];
    ALPHAEXT_UNROLL(4)
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (r < rows) sums[r] += factor * wide(grad_scores[r * num_classes + own]);
    }
  }
  const int64_t place = row * num_classes + column;
  ALPHAEXT_UNROLL(4)
  for (int r = 0; r < kRowsAtOnce; ++r) {
    if (r < rows) {
      const Acc sum = is_few ? sums[r] : sums[r] + wide(grad_scores[r * num_classes + column]);
      if (params.keeps_wide) {
        static_cast<Acc*>(p.grad_logits)[place + r * num_classes] = sum;
      } else {
        static_cast<T*>(p.grad_logits)[place + r * num_classes] = narrowed<T>(sum);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ accumulate_t<T> kept_gradient(const LargeHeadBackwardParams& params, int64_t place) {
  if (params.keeps_wide) return static_cast<const accumulate_t<T>*>(params.head.grad_logits)[place];
  return wide(static_cast<const T*>(params.head.grad_logits)[place]);
}

// The bias's gradient, from grad_logits as they were kept.
template <typename T>
__device__ __forceinline__ void sum_over_batch(const LargeHeadBackwardParams& params, accumulate_t<T>* shared) {
  using Acc = accumulate_t<T>;
  const HeadBackwardParams& p = params.head;
  const int64_t num_classes = p.num_classes;
  const bool keeps_own = p.rule.rule == Rule::L1;      // then a bias reaches its own score only
  const bool given = p.logits == nullptr;              // the logits hold the biases already: l1 only takes them out
  const bool through_logits = keeps_own == given;
  sum_columns(
      num_classes, p.batch, shared,
      [&](int64_t b, int64_t c) {
        const int64_t place = b * num_classes + c;
        Acc sum = 0;
        if (keeps_own) sum += wide(static_cast<const T*>(p.grad_scores)[place]);
        if (through_logits) sum += keeps_own ? -kept_gradient<T>(params, place) : kept_gradient<T>(params, place);
        return sum;
      },
      [&](int64_t c, Acc sum) { static_cast<T*>(p.grad_bias)[c] = narrowed<T>(sum); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, blocks_of_head<T>)
    large_head_backward_kernel(const LargeHeadBackwardParams params, const int stages, const bool staged) {
  ALPHAEXT_DYNAMIC_SHARED(accumulate_t<T>, shared);
  const HeadBackwardParams& p = params.head;
  if (stages & kElements) {
    if (p.grad_logits != nullptr) {
      const int64_t chunks = tiles_along(p.num_classes, blockDim.x);
      for (int64_t job = blockIdx.x; job < tiles_along(p.batch, kRowsAtOnce) * chunks; job += gridDim.x) {
        const int64_t row = job / chunks * kRowsAtOnce, column = job % chunks * blockDim.x + threadIdx.x;
        const int64_t left = p.batch - row;
        if (column < p.num_classes) gather_column<T>(params, column, row, left < kRowsAtOnce ? left : kRowsAtOnce);
      }
    }
    if (asks_for_submodules(p) || p.grad_preactivation != nullptr) differentiate_classes<T>(p, staged, shared);
    if (stages & kSums) grid_barrier();
  }
  if (stages & kSums) {
    sum_over_classes<T>(p, shared);
    if (p.grad_bias != nullptr) sum_over_batch<T>(params, shared);
    differentiate_all_inputs<T>(p, shared);
  }
}

}  // namespace alphaext::cuda
