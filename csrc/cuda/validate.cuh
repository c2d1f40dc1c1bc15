// Validation: equations 3 and 4 for the few columns of kBlockSamples samples a block, and how many classes stand before the
// label.
#pragma once

#include "device.cuh"
#include "validate.h"

namespace alphaext::cuda {

constexpr int kValidateThreads = 256;

// A block scores kBlockSamples samples for one run. Runs go fastest: blocks that run together share the samples' logits.
inline LaunchShape validate_shape(const ValidateRunsParams& params, int threads = kValidateThreads) {
  const int64_t blocks = (params.first.samples + kBlockSamples - 1) / kBlockSamples;
  return shape_for(blocks * params.runs, 1, threads);
}

template <typename T>
__global__ void __launch_bounds__(kValidateThreads, kMinBlocks) validate_kernel(const ValidateRunsParams params) {
  ALPHAEXT_STATIC_SHARED(int32_t, ranks, kBlockSamples);
  const ValidateParams& p = params.first;
  const T* __restrict__ const label_logit = static_cast<const T*>(p.label_logit);
  const T* __restrict__ const top_logits = static_cast<const T*>(p.top_logits);
  const int32_t* __restrict__ const few_classes = p.few_classes;
  const int64_t coefficients = p.num_few * p.members, blocks = (p.samples + kBlockSamples - 1) / kBlockSamples;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  constexpr int kChunks = kBlockSamples / kWarp;

  for (int64_t item = blockIdx.x; item < blocks * params.runs; item += gridDim.x) {
    const int64_t block = item / params.runs, run = item - block * params.runs;
    const T* __restrict__ const alpha = static_cast<const T*>(p.alpha) + run * coefficients;
    const int32_t* __restrict__ const columns = p.member_columns + run * coefficients;
    const T* __restrict__ const logits = static_cast<const T*>(p.member_logits) + block * p.columns * kBlockSamples;
    const auto score_of = [&](int64_t few, int64_t b) {
      T score = 0;
      for (int64_t k = 0; k < p.members; ++k) {
        const int32_t column = columns[few * p.members + k];
        const T logit = in_range(column, p.columns) ? logits[column * kBlockSamples + b] : not_a_number<T>();
        score = fused(alpha[few * p.members + k], logit, score);
      }
      return score;
    };
    for (int b = static_cast<int>(threadIdx.x); b < kBlockSamples; b += blockDim.x) ranks[b] = 0;
    __syncthreads();
    // Warps take a chunk of the samples each, and all but the first of a chunk a share of its classes.
    const int chunks_at_once = warps < kChunks ? warps : kChunks, shares = warps / chunks_at_once;
    for (int chunk = warp % chunks_at_once; chunk < kChunks; chunk += chunks_at_once) {
      const int64_t b = chunk * kWarp + lane_index(), sample = block * kBlockSamples + b;
      const int64_t label = sample < p.samples ? p.labels[sample] : -1;
      const int64_t few = sample < p.samples ? p.few_of_label[sample] : -1;
      if (!in_range(label, p.num_classes) || few >= p.num_few || warp / chunks_at_once >= shares) continue;
      const T own = few >= 0 ? score_of(few, b) : label_logit[sample];
      int rank = 0;
      for (int64_t f = warp / chunks_at_once; f < p.num_few; f += shares) {
        if (f == few) continue;
        const T score = score_of(f, b);
        rank += score > own || (score == own && few_classes[f] < label);
      }
      if (warp / chunks_at_once == 0) {
        for (int i = 0; i < kTopClasses; ++i) {
          const T top = top_logits[sample * kTopClasses + i];
          rank += top > own || (top == own && p.top_ids[sample * kTopClasses + i] < label);
        }
      }
      atomicAdd(&ranks[b], rank);
    }
    __syncthreads();
    unsigned long long* const hits = reinterpret_cast<unsigned long long*>(p.hits) + run * 2 * p.num_classes;
    for (int b = static_cast<int>(threadIdx.x); b < kBlockSamples; b += blockDim.x) {
      const int64_t sample = block * kBlockSamples + b;
      const int64_t label = sample < p.samples ? p.labels[sample] : -1;
      if (!in_range(label, p.num_classes) || p.few_of_label[sample] >= p.num_few) continue;
      if (ranks[b] < 1) atomicAdd(&hits[label], 1ull);
      if (ranks[b] < kTopClasses) atomicAdd(&hits[p.num_classes + label], 1ull);
    }
    __syncthreads();
  }
}

}  // namespace alphaext::cuda
