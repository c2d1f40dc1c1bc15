// The sub-modules of a training: their SGD step, their next outputs, and the coefficients alpha of equations 1 and 2.
#pragma once

#include "train_block.cuh"

namespace alphaext::cuda {

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ int TrainBlock<T, kResident, kShared>::slices() const {
  const int wanted = static_cast<int>((p.tiles * kTileWidth + kWarp - 1) / kWarp);
  return wanted < kSlices ? wanted : kSlices;
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ int64_t TrainBlock<T, kResident, kShared>::state_at(int row, int h) const {
  constexpr int kWidth = static_cast<int>(kTileWidth);
  if constexpr (kResident) {
    // In tiles, two halves of a warp would meet in the same banks of shared memory.
    return row * static_cast<int>(p.tiles) * kWidth + h;
  } else {
    return (h / kWidth * int64_t{2 + 2 * members()} + row) * kWidth + h % kWidth;
  }
}

template <typename T, bool kResident, bool kShared>
template <bool kUpdate>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::visit_slice(T* network, const T* gradient, T factor,
    const SgdStep<T>& step, int slice, T* outputs) const {
  const int hidden = static_cast<int>(p.tiles * kTileWidth), begin = slice * kWarp + lane_index();
  if constexpr (kUpdate) {
    for (int h = begin; h < hidden; h += kSlices * kWarp) {
      T c = network[state_at(0, h)], momentum = network[state_at(1, h)], delta = 0;
      const T unit = rectified(c);
      for (int k = 0; k < members(); ++k) delta += gradient[k] * network[state_at(2 + k, h)];
      delta = c <= T(0) ? T(0) : factor * delta;  // a NaN stays visible
      step.update(delta, c, momentum);
      network[state_at(0, h)] = c;
      network[state_at(1, h)] = momentum;
      for (int k = 0; k < members(); ++k) {
        T* const weight = network + state_at(2 + k, h);
        step.update(gradient[k] * unit, *weight, network[state_at(2 + members() + k, h)]);
      }
    }
  }
  for (int k = 0; k < members(); ++k) {
    T sum = 0;
    for (int h = begin; h < hidden; h += kSlices * kWarp) {
      sum += network[state_at(2 + k, h)] * rectified(network[state_at(0, h)]);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) outputs[k] = sum;
  }
}

template <typename T, bool kResident, bool kShared>
template <bool kUpdate, int kMembers>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::visit_slice_of(T* network, const T* gradient, T factor,
    const SgdStep<T>& step, int slice, T* outputs) const {
  const int hidden = static_cast<int>(p.tiles * kTileWidth);
  T sums[kMembers], gradients[kMembers], weights[kMembers];
  ALPHAEXT_UNROLL(8)
  for (int k = 0; k < kMembers; ++k) {
    sums[k] = 0;
    if constexpr (kUpdate) gradients[k] = gradient[k];
  }
  for (int h = slice * kWarp + lane_index(); h < hidden; h += kSlices * kWarp) {
    T c = network[state_at(0, h)];
    ALPHAEXT_UNROLL(8)
    for (int k = 0; k < kMembers; ++k) weights[k] = network[state_at(2 + k, h)];
    if constexpr (kUpdate) {
      T momentum = network[state_at(1, h)], delta = 0;
      const T unit = rectified(c);
      ALPHAEXT_UNROLL(8)
      for (int k = 0; k < kMembers; ++k) delta += gradients[k] * weights[k];
      delta = c <= T(0) ? T(0) : factor * delta;
      step.update(delta, c, momentum);
      network[state_at(0, h)] = c;
      network[state_at(1, h)] = momentum;
      ALPHAEXT_UNROLL(8)
      for (int k = 0; k < kMembers; ++k) {
        momentum = network[state_at(2 + kMembers + k, h)];
        step.update(gradients[k] * unit, weights[k], momentum);
        network[state_at(2 + k, h)] = weights[k];
        network[state_at(2 + kMembers + k, h)] = momentum;
      }
    }
    const T unit = rectified(c);
    ALPHAEXT_UNROLL(8)
    for (int k = 0; k < kMembers; ++k) sums[k] += weights[k] * unit;
  }
  ALPHAEXT_UNROLL(8)
  for (int k = 0; k < kMembers; ++k) {
    const T sum = warp_sum(sums[k]);
    if (lane_index() == 0) outputs[k] = sum;
  }
}

template <typename T, bool kResident, bool kShared>
template <bool kUpdate>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::visit_classes(const SgdStep<T>& of_run) const {
  const SgdStep<T> step = of_run;
  const int64_t size = p.tiles * (2 + 2 * p.members) * kTileWidth;
  for (int item = warp(); item < run.classes * kSlices; item += warps()) {
    const int j = item / kSlices, slice = item % kSlices;
    if (slice >= slices()) continue;
    const T* const gradient = here(run.at.gradient) + j * members();
    T* const outputs = here(run.at.partial) + item * members();
    T* const network = kResident ? here(run.at.state) + j * size : run.state + class_of(j) * size;
    const T factor = kUpdate ? here(run.at.scale)[j] : T(0);
    if (members() == 6) {
      visit_slice_of<kUpdate, 6>(network, gradient, factor, step, slice, outputs);
    } else {
      visit_slice<kUpdate>(network, gradient, factor, step, slice, outputs);
    }
  }
  __syncthreads();
}

template <typename T, bool kResident, bool kShared>
template <bool kUpdate>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::visit_tiles(const SgdStep<T>& of_run) const {
  const SgdStep<T> step = of_run;
  constexpr int kWidth = static_cast<int>(kTileWidth);
  const int num_few = static_cast<int>(p.num_few);
  const int64_t size = (2 * p.num_few + 2 * p.members) * kTileWidth;
  T* const deltas = here(run.at.partial);      // [F, kTileWidth]
  T* const grad_w2 = deltas + num_few * kWidth;  // [M, kTileWidth]
  for (int64_t i = 0, t = run.block; t < p.tiles; ++i, t += blocks) {
    T* const c = (kResident ? here(run.at.state) + i * size : run.state + t * size);
    T* const c_momentum = c + num_few * kWidth;
    T* const w2 = c_momentum + num_few * kWidth;
    T* const w2_momentum = w2 + members() * kWidth;
    if constexpr (kUpdate) {
      for (int item = thread(); item < (num_few + members()) * kWidth; item += threads()) {
        const int row = item / kWidth, unit = item % kWidth;
        T sum = 0;
        if (row < num_few) {
          const T* const gradients = run.all_gradients + int64_t{row} * members();
          for (int k = 0; k < members(); ++k) sum += load_published(gradients + k) * w2[k * kWidth + unit];
          sum = c[item] <= T(0) ? T(0) : sum;
        } else {
          const T* const gradients = run.all_gradients + (row - num_few);
          for (int f = 0; f < num_few; ++f) {
            sum += load_published(gradients + int64_t{f} * members()) * rectified(c[f * kWidth + unit]);
          }
        }
        deltas[item] = sum;
      }
      __syncthreads();
      for (int item = thread(); item < (num_few + members()) * kWidth; item += threads()) {
        const int row = item / kWidth, unit = item % kWidth;
        if (row < num_few) {
          const T* const scale = run.scale + int64_t{row} * num_few;
          T sum = 0;
          for (int g = 0; g < num_few; ++g) sum += load_argument(scale + g) * deltas[g * kWidth + unit];
          step.update(sum, c[item], c_momentum[item]);
        } else {
          const int at = item - num_few * kWidth;
          step.update(grad_w2[at], w2[at], w2_momentum[at]);
        }
      }
      __syncthreads();
    }
    for (int item = thread(); item < num_few * members(); item += threads()) {
      const int f = item / members(), k = item - f * members();
      T sum = 0;
      for (int unit = 0; unit < kWidth; ++unit) sum += w2[k * kWidth + unit] * rectified(c[f * kWidth + unit]);
      store_published(run.all_partials + t * p.num_few * p.members + item, sum);
    }
    __syncthreads();
  }
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::update_shared_b2(const SgdStep<T>& step) const {
  for (int k = warp(); k < members(); k += warps()) {
    T sum = 0;
    for (int64_t f = lane_index(); f < p.num_few; f += kWarp) sum += load_published(run.all_gradients + f * members() + k);
    sum = warp_sum(sum);
    if (lane_index() == 0) step.update(sum, here(run.at.b2)[k], here(run.at.b2_momentum)[k]);
  }
  __syncthreads();
}

template <typename T, bool kResident, bool kShared>
template <bool kUpdate>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::finish_outputs(const SgdStep<T>& step) const {
  uint32_t* const failed = run.failed + to_publish() * p.num_few;
  for (int j = warp(); j < run.classes; j += warps()) {
    T* const raw = here(run.at.raw) + j * members();
    for (int k = lane_index(); k < members(); k += kWarp) {
      T sum = 0;
      if constexpr (kShared) {
        const T* const parts = run.all_partials + class_of(j) * members() + k;
        for (int64_t t = 0; t < p.tiles; ++t) sum += load_published(parts + t * p.num_few * p.members);
        raw[k] = sum + here(run.at.b2)[k];
      } else {
        const T* const parts = here(run.at.partial) + j * kSlices * members() + k;
        const int at = j * members() + k;
        for (int slice = 0; slice < slices(); ++slice) sum += parts[slice * members()];
        T* const b2 = here(run.at.b2) + at;
        if constexpr (kUpdate) step.update(here(run.at.gradient)[at], *b2, here(run.at.b2_momentum)[at]);
        raw[k] = sum + *b2;
      }
    }
    __syncwarp();
    if (lane_index() == 0) {
      const bool finite = members() == 6 ? apply_rule<6>(j) : apply_rule<0>(j);
      store_published(failed + class_of(j), finite ? 0u : 1u);
    }
  }
  __syncthreads();
}

// Are the class's outputs finite?
template <typename T, bool kResident, bool kShared>
template <int kMembers>
__device__ __forceinline__ bool TrainBlock<T, kResident, kShared>::apply_rule(int j) const {
  const T* const outputs = here(run.at.raw) + j * members();
  T* const coefficients = here(run.at.alpha) + j * members();
  bool finite = true;
  if constexpr (kMembers > 0) {
    T raw[kMembers], alpha[kMembers];
    for (int k = 0; k < kMembers; ++k) {
      raw[k] = outputs[k];
      finite = finite && is_finite(raw[k]);
    }
    rule_forward<T>(run.rule, kMembers, raw, alpha);
    for (int k = 0; k < kMembers; ++k) coefficients[k] = alpha[k];
  } else {
    for (int k = 0; k < members(); ++k) finite = finite && is_finite(outputs[k]);
    rule_forward<T>(run.rule, p.members, outputs, coefficients);
  }
  // A rule may hide it, but all blocks must see it in the scores.
  if (!finite) coefficients[0] = not_a_number<T>();
  return finite;
}

template <typename T, bool kResident, bool kShared>
template <bool kStore>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::move_state() const {
  const auto move = [](T* outside, T* inside) {
    if constexpr (kStore) {
      *outside = *inside;
    } else {
      *inside = *outside;
    }
  };
  constexpr int kWidth = static_cast<int>(kTileWidth);
  if constexpr (kShared) {
    const int size = static_cast<int>(2 * p.num_few + 2 * p.members) * kWidth;
    for (int64_t i = 0, t = run.block; t < p.tiles; ++i, t += blocks) {
      for (int at = thread(); at < size; at += threads()) move(run.state + t * size + at, here(run.at.state) + i * size + at);
    }
  } else {
    const int rows = 2 + 2 * members(), size = static_cast<int>(p.tiles) * rows * kWidth;
    for (int j = 0; j < run.classes; ++j) {
      for (int at = thread(); at < size; at += threads()) {
        const int row = at / kWidth, tile = row / rows, h = tile * kWidth + at % kWidth;
        move(run.state + class_of(j) * size + at, here(run.at.state) + int64_t{j} * size + state_at(row - tile * rows, h));
      }
    }
  }
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::keep_arguments(int64_t r) const {
  const int entries = run.classes * members();
  for (int i = thread(); i < entries; i += threads()) {
    columns()[i] = load_argument(p.member_columns + (r * p.num_few + class_of(i / members())) * p.members + i % members());
  }
  for (int j = thread(); j < run.classes; j += threads()) {
    if constexpr (!kShared) here(run.at.scale)[j] = load_argument(run.scale + class_of(j));
    here(run.at.offset)[j] = run.few_offset == nullptr ? T(0) : load_argument(run.few_offset + class_of(j));
  }
  for (int k = thread(); run.penalty != nullptr && k < 2 * members(); k += threads()) {
    here(run.at.penalty)[k] = load_argument(run.penalty + k);
  }
}

template <typename T, bool kResident, bool kShared>
template <bool kStore>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::move_b2(T* global, T* global_momentum) const {
  const int count = kShared ? members() : run.classes * members();
  for (int at = thread(); at < count; at += threads()) {
    const int64_t outside = kShared ? at : class_of(at / members()) * members() + at % members();
    if constexpr (!kStore) {
      here(run.at.b2)[at] = global[outside];
      here(run.at.b2_momentum)[at] = global_momentum[outside];
    } else if (!kShared || run.block == 0) {
      global[outside] = here(run.at.b2)[at];
      global_momentum[outside] = here(run.at.b2_momentum)[at];
    }
  }
}

}  // namespace alphaext::cuda
