// Equations 1 to 4 for a head of any size, all but the matrix products, in one launch: coefficients, few columns, base columns.
//
// The products are the caller's, by cuBLAS: the logits and, with one first layer for all classes, the pre-activations, before
// this launch. It runs in stages between which its blocks wait for each other. Where a device cannot do that, each stage is a
// launch of its own, of the same text. Arrays may be empty: their pointers are null, and nothing reads them.
#pragma once

#include "head_forward.cuh"

namespace alphaext::cuda {

// The rows of the batch that a thread works on at once: ids and coefficients are read once for all of them.
constexpr int kRowsAtOnce = 4;

enum LargeHeadStage : int {
  kStreamFirstLayer = 1,  // pre-activations, where each class has a first layer of its own
  kCoefficients = 2,      // raw and alpha; beside them the logits are copied into the scores
  kFewScores = 4,         // the few classes' columns
};

inline int large_head_forward_stages(const LargeHeadParams& params) {
  const HeadParams& p = params.head;
  const bool has_scores = p.batch > 0 && p.num_classes > 0;
  int stages = 0;
  if (p.w1 != nullptr && !p.shared_first && p.num_few * p.hidden > 0) stages |= kStreamFirstLayer;
  if (p.num_few > 0 || has_scores) stages |= kCoefficients;
  if (p.num_few > 0 && has_scores) stages |= kFewScores;
  return stages;
}

// More blocks than this find nothing to do.
inline int64_t large_head_forward_blocks(const LargeHeadParams& params, int threads = kThreads) {
  const HeadParams& p = params.head;
  const int64_t streamed = tiles_along(p.num_few * p.hidden, threads / kWarp), copied = tiles_along(p.batch * p.num_classes, threads);
  const int64_t mixed = p.batch * tiles_along(p.num_few, threads);
  int64_t most = p.num_few;
  for (const int64_t jobs : {p.w1 != nullptr ? streamed : int64_t{0}, copied, mixed}) most = jobs > most ? jobs : most;
  return most;
}

// The elements of one 16-byte access to logits, as scores.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

// scores = logits, in every column, and logits += bias first where the product came without. From is Acc, or T where the logits
// are the input.
template <typename T, typename From>
__device__ __forceinline__ void copy_logits(const From* logits, accumulate_t<T>* with_bias, const T* bias, T* scores,
                                            int64_t count, int64_t num_classes) {
  using Acc = accumulate_t<T>;
  constexpr int kSize = Vector<From>::kSize;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const bool aligned = rows_are_aligned<From>(logits, 0) && reinterpret_cast<uintptr_t>(scores) % sizeof(Pack<T, kSize>) == 0;
  const int64_t vectors = aligned ? count / kSize : 0;
  constexpr int kAtOnce = 4;
  for (int64_t first = thread; first < vectors; first += kAtOnce * threads) {
    // All loads before the first store: `scores` might be what is read next, for all that the compiler knows.
    Vector<From> loaded[kAtOnce];
    Acc added[kAtOnce][kSize];
    ALPHAEXT_UNROLL(4)
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t v = first + u * threads;
      loaded[u] = load_vector<true>(logits, v < vectors ? v * kSize : count, count);
    }
    if (bias != nullptr) {
      ALPHAEXT_UNROLL(4)
      for (int u = 0; u < kAtOnce; ++u) {
        int64_t c = (first + u * threads) * kSize % num_classes;
        for (int i = 0; i < kSize; ++i) {
          added[u][i] = wide(bias[c]);
          c = c + 1 < num_classes ? c + 1 : 0;
        }
      }
    }
    ALPHAEXT_UNROLL(4)
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t v = first + u * threads;
      if (v >= vectors) break;
      Pack<T, kSize> made;
      Pack<Acc, kSize> sums;
      for (int i = 0; i < kSize; ++i) {
        Acc logit = wide(loaded[u].values[i]);
        if (bias != nullptr) logit += added[u][i];
        sums.values[i] = logit;
        made.values[i] = narrowed<T>(logit);
      }
      if (bias != nullptr) *reinterpret_cast<Pack<Acc, kSize>*>(with_bias + v * kSize) = sums;
      *reinterpret_cast<Pack<T, kSize>*>(scores + v * kSize) = made;
    }
  }
  for (int64_t i = vectors * kSize + thread; i < count; i += threads) {
    Acc logit = wide(logits[i]);
    if (bias != nullptr) {
      logit += wide(bias[i % num_classes]);
      with_bias[i] = logit;
    }
    scores[i] = narrowed<T>(logit);
  }
}

// The scores of a few class in some rows, by one thread.
template <typename T>
__device__ __forceinline__ void mix_rows(const HeadParams& params, int64_t few, int64_t row, int64_t rows) {
  using Acc = accumulate_t<T>;
  const int64_t members = params.members, num_classes = params.num_classes;
  const int64_t* const ids = params.member_ids + few * members;
  const Acc* const alpha = static_cast<const Acc*>(params.alpha) + few * members;
  const T* const bias = params.rule.rule == Rule::L1 ? static_cast<const T*>(params.bias) : nullptr;
  const int64_t own = ids[0];
  if (!in_range(own, num_classes)) return;
  Acc sums[kRowsAtOnce] = {};
  ALPHAEXT_UNROLL(1)
  for (int64_t k = 0; k < members; ++k) {
    const int64_t id = ids[k];
    const bool exists = in_range(id, num_classes);
    const Acc factor = exists ? alpha[k] : Acc(float_of(0x7fc00000u));  // NaN
    const Acc removed = exists && bias != nullptr && k != 0 ? wide(bias[id]) : Acc(0);
    ALPHAEXT_UNROLL(4)
    for (int r = 0; r < kRowsAtOnce; ++r) {
      // Rows that do not exist read the last one that does: no branch, so all loads are on their way at once.
      const int64_t here = row + (r < rows ? r : rows - 1);
      sums[r] += factor * (saved_logit<T>(params, here * num_classes + (exists ? id : 0)) - removed);
    }
  }
  ALPHAEXT_UNROLL(4)
  for (int r = 0; r < kRowsAtOnce; ++r) {
    if (r < rows) static_cast<T*>(params.scores)[(row + r) * num_classes + own] = narrowed<T>(sums[r]);
  }
}

// `stages`: bits of LargeHeadStage, of which `params` leaves something to do; more than one only in a cooperative launch.
template <typename T>
__global__ void __launch_bounds__(kThreads, blocks_of_head<T>)
    large_head_forward_kernel(const LargeHeadParams params, const int stages, const bool staged) {
  using Acc = accumulate_t<T>;
  ALPHAEXT_DYNAMIC_SHARED(Acc, shared);
  const HeadParams& p = params.head;

  if (stages & kStreamFirstLayer) {
    stream_first_layer<1, T>(p);  // what comes after it needs registers, too
    if (stages & kCoefficients) grid_barrier();
  }
  if (stages & kCoefficients) {
    for (int64_t few = blockIdx.x; few < p.num_few; few += gridDim.x) {
      const ClassRoom<Acc> results{static_cast<Acc*>(p.raw) + few * p.members, static_cast<Acc*>(p.alpha) + few * p.members};
      make_coefficients<T>(p, few, staged ? ClassRoom<Acc>{shared, shared + p.members} : results);
      __syncthreads();  // the block's next class uses the same shared memory
    }
    const int64_t count = p.batch * p.num_classes;
    T* const scores = static_cast<T*>(p.scores);
    if (p.logits == nullptr) {
      copy_logits<T>(static_cast<const T*>(p.input), static_cast<Acc*>(nullptr), static_cast<const T*>(nullptr), scores, count,
                     p.num_classes);
    } else {
      Acc* const logits = static_cast<Acc*>(p.logits);
      copy_logits<T>(static_cast<const Acc*>(logits), logits, params.adds_bias ? static_cast<const T*>(p.bias) : nullptr, scores,
                     count, p.num_classes);
    }
    if (stages & kFewScores) grid_barrier();
  }
  if (stages & kFewScores) {
    // As many rows at a time as leave every block something to do.
    const int64_t chunks = tiles_along(p.num_few, blockDim.x), bands = tiles_along(gridDim.x, chunks);
    const int64_t share = tiles_along(p.batch, bands);
    const int64_t rows = share < kRowsAtOnce ? share : kRowsAtOnce;
    for (int64_t job = blockIdx.x; job < tiles_along(p.batch, rows) * chunks; job += gridDim.x) {
      const int64_t row = job / chunks * rows, few = job % chunks * blockDim.x + threadIdx.x;
      if (few < p.num_few) mix_rows<T>(p, few, row, p.batch - row < rows ? p.batch - row : rows);
    }
  }
}

}  // namespace alphaext::cuda
