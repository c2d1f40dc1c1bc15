// The scores of a step and its loss: equation 3 as a sparse mix of cached logits, the softmax over all classes, and the
// gradient of the sub-modules' outputs.
#pragma once

#include "train_block.cuh"

namespace alphaext::cuda {

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ T TrainBlock<T, kResident, kShared>::gathered(int64_t row, int32_t column) const {
  const bool known = in_range(row, run.rows) && in_range(column, p.columns);
  return known ? run.member_logits[row * p.columns + column] : not_a_number<T>();
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ T TrainBlock<T, kResident, kShared>::member_logit(int64_t step, int j, int k, int b) const {
  const int entry = j * members() + k;
  if constexpr (kResident) {
    const int set = static_cast<int>(step & 1) * run.classes * members();
    return here(run.at.logits)[(set + entry) * width() + b];
  } else {
    return gathered(run.order[step * p.batch + b], columns()[entry]);
  }
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::fetch(int64_t step) const {
  const int count = batch_size(step), chunks = width() / kWarp, parity = static_cast<int>(step & 1);
  const int64_t* __restrict__ const rows = run.order + step * p.batch;
  for (int chunk = warp(); chunk < chunks; chunk += warps()) {
    const int b = chunk * kWarp + lane_index(), at = parity * width() + b;
    if (b >= count) continue;
    const int64_t row = rows[b];
    const bool known = in_range(row, run.rows);
    const int32_t of_label = known ? run.few_of_label[row] : -1;
    // A sample that does not exist makes the loss NaN, which ends the run.
    here(run.at.base)[at] = known ? run.base_logsumexp[row] : not_a_number<T>();
    here(run.at.label)[at] = known && of_label < p.num_few ? run.label_logit[row] : not_a_number<T>();
    few()[at] = of_label < p.num_few ? of_label : -1;
  }
  if constexpr (kResident) {
    const int entries = run.classes * members();
    T* const logits = here(run.at.logits) + parity * entries * width();
    for (int item = warp(); item < entries * chunks; item += warps()) {
      const int entry = item / chunks, b = (item - entry * chunks) * kWarp + lane_index();
      if (b < count) logits[entry * width() + b] = gathered(rows[b], columns()[entry]);
    }
  }
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::publish_scores(int64_t step) const {
  const int count = batch_size(step), chunks = width() / kWarp;
  T* const scores = here(run.at.scores);
  T* const all = run.all_scores + to_publish() * width();
  for (int item = warp(); item < run.classes * chunks; item += warps()) {
    const int j = item / chunks, b = (item - j * chunks) * kWarp + lane_index();
    if (b >= count) continue;
    const T* const alpha = here(run.at.alpha) + j * members();
    T score = run.few_offset == nullptr ? T(0) : run.few_offset[class_of(j)];
    for (int k = 0; k < members(); ++k) score = fused(alpha[k], member_logit(step, j, k, b), score);
    scores[j * width() + b] = score;
    all[class_of(j) * width() + b] = score;
  }
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::reduce_scores(int64_t step) const {
  const int count = batch_size(step), chunks = width() / kWarp, set = static_cast<int>(step & 1) * width();
  const int64_t row = width();
  const T* const all = run.all_scores + published() * row;
  T* const largest = here(run.at.largest);
  T* const total = here(run.at.total);
  for (int item = warp(); item < kStripes * chunks; item += warps()) {
    const int stripe = item / chunks, b = (item - stripe * chunks) * kWarp + lane_index();
    if (b >= count) continue;
    T top = here(run.at.base)[set + b], sum = stripe == 0 ? T(1) : T(0);
    for (int64_t f = stripe; f < p.num_few; f += kStripes * kScoresAtOnce) {
      T values[kScoresAtOnce];
      T higher = top;
      ALPHAEXT_UNROLL(8)
      for (int i = 0; i < kScoresAtOnce; ++i) {
        const int64_t other = f + i * kStripes;
        // In place of a class that is not there one that is, which then counts nothing.
        values[i] = load_published(all + (other < p.num_few ? other : f) * row + b);
      }
      ALPHAEXT_UNROLL(8)
      for (int i = 0; i < kScoresAtOnce; ++i) higher = values[i] > higher ? values[i] : higher;
      if (higher > top) sum *= std::exp(top - higher);
      top = higher;
      ALPHAEXT_UNROLL(8)
      for (int i = 0; i < kScoresAtOnce; ++i) sum += f + i * kStripes < p.num_few ? std::exp(values[i] - top) : T(0);
    }
    largest[stripe * width() + b] = top;
    total[stripe * width() + b] = sum;
  }
  __syncthreads();
  for (int b = thread(); b < count; b += threads()) {
    T top = largest[b];
    for (int stripe = 1; stripe < kStripes; ++stripe) {
      const T other = largest[stripe * width() + b];
      top = other > top ? other : top;
    }
    T sum = 0;
    for (int stripe = 0; stripe < kStripes; ++stripe) {
      sum += total[stripe * width() + b] * std::exp(largest[stripe * width() + b] - top);
    }
    const int32_t of_label = few()[set + b];
    const T own = of_label >= 0 ? load_published(all + of_label * row + b) : here(run.at.label)[set + b];
    largest[b] = top;
    total[b] = sum;
    here(run.at.own)[b] = own;
    if (!(is_finite(top) && is_finite(sum) && is_finite(own))) report_loss();
  }
  __syncthreads();
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ double TrainBlock<T, kResident, kShared>::batch_loss(int count) const {
  double sum = 0;
  for (int b = lane_index(); b < count; b += kWarp) {
    sum += static_cast<double>(here(run.at.largest)[b]) + std::log(static_cast<double>(here(run.at.total)[b])) -
           static_cast<double>(here(run.at.own)[b]);
  }
  return warp_sum(sum);
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::output_gradients(int64_t step) const {
  const int count = batch_size(step);
  const int32_t* const labels = few() + (step & 1) * width();
  const T* const largest = here(run.at.largest);
  const T* const total = here(run.at.total);
  T* const gradient = here(run.at.gradient);
  const T weight = T(1) / static_cast<T>(count);
  for (int item = warp(); item < run.classes * members(); item += warps()) {
    const int j = item / members(), k = item - j * members();
    const T* const scores = here(run.at.scores) + j * width();
    T sum = 0;
    for (int b = lane_index(); b < count; b += kWarp) {
      const T own = labels[b] == class_of(j) ? weight : T(0);
      sum += (std::exp(scores[b] - largest[b]) * (weight / total[b]) - own) * member_logit(step, j, k, b);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) gradient[item] = sum;
  }
  __syncthreads();
  for (int j = thread(); j < run.classes; j += threads()) {
    T* const of_class = gradient + j * members();
    const T* const outputs = here(run.at.raw) + j * members();
    rule_backward<T>(run.rule, p.members, outputs, of_class, of_class);
    for (int k = 0; run.penalty != nullptr && k < members(); ++k) {
      of_class[k] += run.penalty[k] * (outputs[k] - run.penalty[members() + k]);
    }
    if constexpr (kShared) {
      for (int k = 0; k < members(); ++k) run.all_gradients[class_of(j) * members() + k] = of_class[k];
    }
  }
  __syncthreads();
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ int64_t TrainBlock<T, kResident, kShared>::failed_class() const {
  const uint32_t* const failed = run.failed + published();
  for (int64_t first = 0; first < p.num_few; first += kWarp) {
    const int64_t f = first + lane_index();
    const unsigned marked = __ballot_sync(0xffffffffu, f < p.num_few && load_published(failed + f) != 0);
    for (int lane = 0; marked != 0 && lane < kWarp; ++lane) {
      if ((marked >> lane) & 1u) return first + lane;
    }
  }
  return -1;
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ int64_t TrainBlock<T, kResident, kShared>::class_of_bad_score(int count) const {
  const T* const all = run.all_scores + published() * width();
  for (int64_t f = 0; f < p.num_few; ++f) {
    bool bad = false;
    for (int b = lane_index(); b < count; b += kWarp) {
      const T score = load_published(all + f * width() + b);
      bad = bad || !(is_finite(score) || score < T(0));
    }
    if (__any_sync(0xffffffffu, bad)) return f;
  }
  return -1;
}

}  // namespace alphaext::cuda
