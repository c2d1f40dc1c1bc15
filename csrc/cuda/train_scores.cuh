// The scores of a step and its loss: equation 3 as a sparse mix of cached logits, the softmax over all classes, and the
// gradient of the sub-modules' outputs.
#pragma once

#include "train_block.cuh"

namespace alphaext::cuda {

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ T TrainBlock<T, kResident, kShared>::gathered(int64_t row, int32_t column) const {
  const bool known = in_range(row, run.rows) && in_range(column, p.columns);
  return known ? load_argument(run.member_logits + row * p.columns + column) : not_a_number<T>();
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ T TrainBlock<T, kResident, kShared>::member_logit(int64_t step, int j, int k, int b) const {
  const int entry = j * members() + k;
  if constexpr (kResident) {
    const int set = static_cast<int>(step & 1) * run.classes * members();
    return here(run.at.logits)[(set + entry) * width() + b];
  } else {
    return gathered(load_argument(run.order + step * p.batch + b), columns()[entry]);
  }
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::fetch_rows(int64_t step) const {
  const int count = batch_size(step), parity = static_cast<int>(step & 1);
  for (int b = thread(); b < count; b += threads()) {
    rows()[parity * width() + b] = load_argument(run.order + step * p.batch + b);
  }
}

// Every thread asks for all that it can before it keeps the first of it. The samples' own numbers are the last warps' part, as
// the first ones have the most member logits.
template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::fetch(int64_t step, int count) const {
  const int warps_here = fetching_warps();
  if (warp() >= warps_here) return;
  const int next = batch_size(step + 1), chunks = width() / kWarp, parity = static_cast<int>(step & 1);
  const int64_t* const of_samples = rows() + parity * width();
  for (int chunk = warps_here - 1 - warp(); chunk < chunks; chunk += warps_here) {
    const int b = chunk * kWarp + lane_index(), at = parity * width() + b;
    if (b >= count) continue;
    const int64_t row = of_samples[b];
    const bool known = in_range(row, run.rows);
    const int64_t following = b < next ? load_argument(run.order + (step + 1) * p.batch + b) : 0;
    const int32_t of_label = known ? load_argument(run.few_of_label + row) : -1;
    // A sample that does not exist makes the loss NaN, which ends the run.
    const T base = known ? load_argument(run.base_logsumexp + row) : not_a_number<T>();
    const T label = known ? load_argument(run.label_logit + row) : not_a_number<T>();
    rows()[(1 - parity) * width() + b] = following;
    here(run.at.base)[at] = base;
    here(run.at.label)[at] = of_label < p.num_few ? label : not_a_number<T>();
    few()[at] = of_label < p.num_few ? of_label : -1;
  }
  if constexpr (kResident) {
    const int entries = run.classes * members(), items = entries << run.chunk_shift, mask = (1 << run.chunk_shift) - 1;
    T* const logits = here(run.at.logits) + parity * entries * width();
    for (int first = warp(); first < items; first += kFetchedAtOnce * warps_here) {
      T values[kFetchedAtOnce];
      const auto of_item = [&](int i, const auto& visit) {
        const int item = first + i * warps_here;
        const int b = (item & mask) * kWarp + lane_index();
        if (item < items && b < count) visit(values[i], item >> run.chunk_shift, b);
      };
      ALPHAEXT_UNROLL(8)
      for (int i = 0; i < kFetchedAtOnce; ++i) {
        of_item(i, [&](T& value, int entry, int b) { value = gathered(of_samples[b], columns()[entry]); });
      }
      ALPHAEXT_UNROLL(8)
      for (int i = 0; i < kFetchedAtOnce; ++i) {
        of_item(i, [&](T& value, int entry, int b) { logits[entry * width() + b] = value; });
      }
    }
  }
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::fill_scores() const {
  const ScorePlaces<T> places(p);
  const int first = static_cast<int>(p.num_few), end = kStripes * places.vectors * places.kSize;
  for (int item = thread(); run.block == 0 && item < (end - first) * width(); item += threads()) {
    const int64_t place = places.of(first + item / width(), item % width());
    store_published(run.all_scores + place, -infinity<T>());
    store_published(run.all_scores + places.all() + place, -infinity<T>());
  }
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::publish_scores(int64_t step, int count) const {
  const int mask = (1 << run.chunk_shift) - 1;
  T* const scores = here(run.at.scores);
  const ScorePlaces<T> places(p);
  T* const all = run.all_scores + to_publish() * places.all();
  for (int item = warp(); item < run.classes << run.chunk_shift; item += warps()) {
    const int j = item >> run.chunk_shift, b = (item & mask) * kWarp + lane_index();
    if (b >= count) continue;
    const T* const alpha = here(run.at.alpha) + j * members();
    T score = here(run.at.offset)[j];
    for (int k = 0; k < members(); ++k) score = fused(alpha[k], member_logit(step, j, k, b), score);
    scores[j * width() + b] = score;
    store_published(all + places.of(static_cast<int>(class_of(j)), b), score);
  }
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::reduce_scores(int64_t step, int count) const {
  const int set = static_cast<int>(step & 1) * width(), row = width(), num_few = static_cast<int>(p.num_few);
  const ScorePlaces<T> places(p);
  const T* const all = run.all_scores + published() * places.all();
  T* const largest = here(run.at.largest);
  T* const total = here(run.at.total);
  T* const share = total + row;  // in the end
  for (int item = warp(); item < kStripes * (row / kWarp); item += warps()) {
    const int stripe = item % kStripes, b = item / kStripes * kWarp + lane_index();
    if (b >= count) continue;
    int left = (num_few - stripe + kStripes - 1) / kStripes;  // the same in all lanes
    const Vector<T>* next = reinterpret_cast<const Vector<T>*>(all) + places.vector(stripe, 0, b);
    T values[kScoresAtOnce];
    const auto load = [&](int existing) {
      constexpr int kSize = Vector<T>::kSize;
      ALPHAEXT_UNROLL(8)
      for (int v = 0; v < kScoresAtOnce; v += kSize) {
        Vector<T> loaded;
        for (int i = 0; i < kSize; ++i) loaded.values[i] = -infinity<T>();
        if (v < existing) loaded = load_published(next);
        for (int i = 0; i < kSize; ++i) values[v + i] = loaded.values[i];
        next += row;
      }
    };
    load(left);
    const int32_t of_label = few()[set + b];
    const bool sees_own = stripe == (of_label < 0 ? 0 : of_label % kStripes);
    T own = here(run.at.label)[set + b];
    if (sees_own && of_label >= 0) own = load_published(all + places.of(of_label, b));
    const T base = here(run.at.base)[set + b];
    T top = base, sum = stripe == 0 ? T(1) : T(0);
    for (; left > 0; left -= kScoresAtOnce) {
      T held[kScoresAtOnce], higher = top;
      ALPHAEXT_UNROLL(8)
      for (int i = 0; i < kScoresAtOnce; ++i) {
        held[i] = values[i];
        higher = std::fmax(values[i], higher);
      }
      load(left - kScoresAtOnce);  // on their way while these are used
      const T shrunk = std::exp(top - higher);
      sum *= higher > top ? shrunk : T(1);
      top = higher;
      constexpr int kHalf = kScoresAtOnce / 2;
      ALPHAEXT_UNROLL(2)
      for (int half = 0; half < kScoresAtOnce; half += kHalf) {
        if (half >= left) continue;
        ALPHAEXT_UNROLL(4)
        for (int i = half; i < half + kHalf; ++i) held[i] = std::exp(held[i] - top);
        ALPHAEXT_UNROLL(4)
        for (int i = half; i < half + kHalf; ++i) sum += held[i];
      }
    }
    largest[stripe * row + b] = base == base ? top : base;  // fmax() loses a NaN
    total[stripe * row + b] = sum;
    if (sees_own) here(run.at.own)[b] = own;
  }
  __syncthreads();
  const T weight = T(1) / static_cast<T>(count);
  for (int b = thread(); b < count; b += threads()) {
    T tops[kStripes], sums[kStripes];
    ALPHAEXT_UNROLL(8)
    for (int stripe = 0; stripe < kStripes; ++stripe) {
      tops[stripe] = largest[stripe * row + b];
      sums[stripe] = total[stripe * row + b];
    }
    T top = tops[0];
    ALPHAEXT_UNROLL(8)
    for (int stripe = 1; stripe < kStripes; ++stripe) top = tops[stripe] > top ? tops[stripe] : top;
    T sum = 0;
    ALPHAEXT_UNROLL(8)
    for (int stripe = 0; stripe < kStripes; ++stripe) sum += sums[stripe] * std::exp(tops[stripe] - top);
    largest[b] = top;
    total[b] = sum;
    share[b] = weight / sum;
    if (!(is_finite(top) && is_finite(sum) && is_finite(here(run.at.own)[b]))) report_loss();
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
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::output_gradients(int64_t step, int count) const {
  const int mask = (1 << run.member_shift) - 1;
  const int32_t* const labels = few() + (step & 1) * width();
  const T* const largest = here(run.at.largest);
  const T* const share = here(run.at.total) + width();
  T* const gradient = here(run.at.gradient);
  const T weight = T(1) / static_cast<T>(count);
  for (int item = warp(); item < run.classes << run.member_shift; item += warps()) {
    const int j = item >> run.member_shift, k = item & mask;
    if (k >= members()) continue;
    const int32_t few_class = static_cast<int32_t>(class_of(j));
    const T* const scores = here(run.at.scores) + j * width();
    T sum = 0;
    ALPHAEXT_UNROLL(2)
    for (int b = lane_index(); b < count; b += kWarp) {
      const T own = labels[b] == few_class ? weight : T(0);
      sum += (std::exp(scores[b] - largest[b]) * share[b] - own) * member_logit(step, j, k, b);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) gradient[j * members() + k] = sum;
  }
  __syncthreads();
  for (int j = thread(); j < run.classes; j += threads()) {
    if (members() == 6) {
      differentiate_rule<6>(j);
    } else {
      differentiate_rule<0>(j);
    }
    if constexpr (kShared) {
      const T* const of_class = gradient + j * members();
      for (int k = 0; k < members(); ++k) store_published(run.all_gradients + class_of(j) * members() + k, of_class[k]);
    }
  }
  __syncthreads();
}

template <typename T, bool kResident, bool kShared>
template <int kMembers>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::differentiate_rule(int j) const {
  T* const of_class = here(run.at.gradient) + j * members();
  const T* const outputs = here(run.at.raw) + j * members();
  const T* const strengths = here(run.at.penalty);
  if constexpr (kMembers > 0) {
    T gradients[kMembers], raw[kMembers];
    for (int k = 0; k < kMembers; ++k) {
      gradients[k] = of_class[k];
      raw[k] = outputs[k];
    }
    rule_backward<T>(run.rule, kMembers, raw, gradients, gradients);
    for (int k = 0; run.penalty != nullptr && k < kMembers; ++k) {
      gradients[k] += strengths[k] * (raw[k] - strengths[kMembers + k]);
    }
    for (int k = 0; k < kMembers; ++k) of_class[k] = gradients[k];
  } else {
    rule_backward<T>(run.rule, p.members, outputs, of_class, of_class);
    for (int k = 0; run.penalty != nullptr && k < members(); ++k) {
      of_class[k] += strengths[k] * (outputs[k] - strengths[members() + k]);
    }
  }
}

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ int64_t TrainBlock<T, kResident, kShared>::failed_class() const {
  const uint32_t* const failed = run.failed + published() * p.num_few;
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
  const ScorePlaces<T> places(p);
  const T* const all = run.all_scores + published() * places.all();
  for (int f = 0; f < p.num_few; ++f) {
    bool bad = false;
    for (int b = lane_index(); b < count; b += kWarp) {
      const T score = load_published(all + places.of(f, b));
      bad = bad || !(is_finite(score) || score < T(0));
    }
    if (__any_sync(0xffffffffu, bad)) return f;
  }
  return -1;
}

}  // namespace alphaext::cuda
