// Equations 1 to 4 in one launch: sub-modules, rule, composition and the logits' product, in class order.
//
// Before the grid's one barrier: the stream over w1, and the product, cut into tiles and slices of its depth, by the first
// blocks. An SM has room for two blocks, so while one multiplies the other streams. After it: a block per few class makes its
// coefficients and its column, and the other blocks add up the product's slices, tile by tile of columns. Where nothing precedes
// the barrier there is none.
#pragma once

#include "product.cuh"

namespace alphaext::cuda {

static_assert(Tile<kSide>::kEdge == kHeadTile);

ALPHAEXT_HOST_DEVICE int64_t slice_depth(int64_t features, int64_t slices) {
  const int64_t depth = features / slices + (features % slices != 0);
  return (depth + 31) / 32 * 32;
}

// Column tiles of one block each: as many rows at a time as make some 512 of them.
ALPHAEXT_HOST_DEVICE int64_t column_rows(int64_t batch, int64_t column_tiles) {
  const int64_t bands = column_tiles < 512 ? 512 / column_tiles : 1;
  const int64_t rows = batch / bands + (batch % bands != 0);
  return rows < 4 ? 4 : rows;
}

template <int kBlockSide>
int64_t head_forward_shared_bytes(const HeadParams& params) {
  using Shape = Tile<kBlockSide>;
  const int64_t size = params.dtype == ScalarType::Float64 ? 8 : 4;
  const bool has_halves = params.dtype == ScalarType::Float16 || params.dtype == ScalarType::BFloat16;
  const bool multiplies = params.weight != nullptr || params.shared_first;
  const int64_t of_tile = !multiplies ? 0 : has_halves ? kStages * kStageBytes<kBlockSide> : size * 2 * Shape::kPanel;
  const int64_t of_class = size * (2 * params.members + Shape::kBlock);
  return of_tile > of_class ? of_tile : of_class;
}

// Does anything of one block need what another one made?
inline bool head_forward_waits(const HeadParams& params) {
  return (params.weight != nullptr && params.batch * params.num_classes > 0) ||
         (params.w1 != nullptr && params.num_few * params.hidden > 0);
}

// The tiles of the logits' product, those of each slice.
ALPHAEXT_HOST_DEVICE int64_t product_jobs(const HeadParams& params, int64_t edge) {
  return params.weight == nullptr ? 0 : tiles_along(params.batch, edge) * tiles_along(params.num_classes, edge) * params.slices;
}

// The rows of w1 that a block streams while another one makes such a tile: it takes half as long again as reading its operands
// does (docs/maintainers/gpu.md). Very short rows take a trip to memory however short they are.
ALPHAEXT_HOST_DEVICE int64_t tile_in_rows(const HeadParams& params, int64_t edge) {
  return 3 * edge * slice_depth(params.features, params.slices) / (params.inputs > 256 ? params.inputs : 256);
}

// The jobs of make_columns that a block does while another one does a class: some six trips to the second-level cache instead of
// two.
constexpr int64_t kClassInJobs = 3;

// More blocks than this find nothing to do.
template <int kBlockSide>
int64_t head_forward_blocks(const HeadParams& params) {
  using Shape = Tile<kBlockSide>;
  const int64_t column_tiles = tiles_along(params.num_classes, Shape::kEdge);
  int64_t tiles = product_jobs(params, Shape::kEdge);
  if (params.shared_first) tiles += tiles_along(params.num_few, Shape::kEdge) * tiles_along(params.hidden, Shape::kEdge);
  const bool streams = params.w1 != nullptr && !params.shared_first;
  const int64_t rows = streams ? tiles_along(params.num_few * params.hidden, Shape::kBlock / kWarp) : 0;
  const int64_t bands = column_tiles > 0 ? tiles_along(params.batch, column_rows(params.batch, column_tiles)) : 0;
  const int64_t after = params.num_few + column_tiles * bands;
  const int64_t before = tiles > rows ? tiles : rows;
  return before > after ? before : after;
}

// kRows neighbouring rows of w1 times their class's z, by one warp, with kRows * kUnroll 16-byte loads of w1 in flight a
// lane. A row's sum adds the same numbers in the same order whatever kRows, kUnroll and kAligned are.
template <int kRows, int kUnroll, bool kAligned, typename T>
__device__ __forceinline__ void multiply_rows(const T* w1, const T* z, int64_t inputs, accumulate_t<T> (&sums)[kRows]) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kStep = kWarp * kSize;
  const auto visit = [&](int64_t i, auto count) {
    constexpr int kCount = decltype(count)::value;
    Vector<T> weights[kCount][kRows], values[kCount];
    ALPHAEXT_UNROLL(8)
    for (int u = 0; u < kCount; ++u) {
      ALPHAEXT_UNROLL(8)
      for (int r = 0; r < kRows; ++r) weights[u][r] = load_once<kAligned>(w1 + r * inputs, i + u * kStep, inputs);
    }
    ALPHAEXT_UNROLL(8)
    for (int u = 0; u < kCount; ++u) values[u] = load_vector<kAligned>(z, i + u * kStep, inputs);
    ALPHAEXT_UNROLL(8)
    for (int u = 0; u < kCount; ++u) {
      ALPHAEXT_UNROLL(8)
      for (int v = 0; v < kSize; ++v) {
        if (!kAligned && i + u * kStep + v >= inputs) continue;
        const accumulate_t<T> value = wide(values[u].values[v]);
        ALPHAEXT_UNROLL(8)
        for (int r = 0; r < kRows; ++r) sums[r] += wide(weights[u][r].values[v]) * value;
      }
    }
  };
  ALPHAEXT_UNROLL(8)
  for (int r = 0; r < kRows; ++r) sums[r] = 0;
  int64_t i = static_cast<int64_t>(lane_index()) * kSize;
  // Unrolled no further: the registers are the loads'.
  ALPHAEXT_UNROLL(1)
  for (; i + (kUnroll - 1) * kStep < inputs; i += kUnroll * kStep) visit(i, std::integral_constant<int, kUnroll>{});
  ALPHAEXT_UNROLL(1)
  for (; i < inputs; i += kStep) visit(i, std::integral_constant<int, 1>{});
}

// preactivation = w1 z + b1, one w1 per class: every warp takes its part of the block's neighbouring rows, w1 is read once.
// Aligned rows are visited four at a time, kUnroll vectors of each at once.
template <bool kAligned, int kUnroll, typename T>
__device__ __forceinline__ void stream_rows(const HeadParams& params, const Share& share) {
  using Acc = accumulate_t<T>;
  const int64_t inputs = params.inputs, hidden = params.hidden;
  const T* const b1 = static_cast<const T*>(params.b1);
  Acc* const preactivation = static_cast<Acc*>(params.preactivation);
  const int64_t warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, rows = share.end - share.begin;
  const int64_t end = share.begin + rows * (warp + 1) / warps;
  int64_t row = share.begin + rows * warp / warps;
  while (row < end) {
    const int64_t few = row / hidden;
    const T* const z = static_cast<const T*>(params.z) + few * inputs;
    const int64_t last = (few + 1) * hidden < end ? (few + 1) * hidden : end;
    for (; row + 4 <= last; row += 4) {
      Acc sums[4];
      multiply_rows<4, kAligned ? kUnroll : 1, kAligned>(static_cast<const T*>(params.w1) + row * inputs, z, inputs, sums);
      ALPHAEXT_UNROLL(4)
      for (int r = 0; r < 4; ++r) {
        const Acc sum = warp_sum(sums[r]);
        if (lane_index() == r) preactivation[row + r] = sum + wide(b1[row + r]);
      }
    }
    for (; row < last; ++row) {
      Acc sums[1];
      multiply_rows<1, kAligned ? 2 * kUnroll : 1, kAligned>(static_cast<const T*>(params.w1) + row * inputs, z, inputs, sums);
      const Acc sum = warp_sum(sums[0]);
      if (lane_index() == 0) preactivation[row] = sum + wide(b1[row]);
    }
  }
}

// The first `loaded` blocks have done something else before, as much as `cost` rows.
template <int kUnroll, typename T>
__device__ __forceinline__ void stream_first_layer(const HeadParams& params, int64_t loaded = 0, int64_t cost = 0) {
  const Share share = fair_share(params.num_few * params.hidden, blockIdx.x, gridDim.x, loaded, cost);
  if (rows_are_aligned<T>(params.w1, params.inputs) && rows_are_aligned<T>(params.z, params.inputs)) {
    stream_rows<true, kUnroll, T>(params, share);
  } else {
    stream_rows<false, kUnroll, T>(params, share);
  }
}

// logits = input weight^T + bias, or the part that a slice of the depth adds to them.
template <int kBlockSide, typename T>
__device__ __forceinline__ void multiply_logits(const HeadParams& params, accumulate_t<T>* shared) {
  using Acc = accumulate_t<T>;
  const int64_t edge = Tile<kBlockSide>::kEdge;
  const int64_t batch = params.batch, num_classes = params.num_classes, features = params.features;
  const Operand<T> left{static_cast<const T*>(params.input), batch, features, 1};
  const Operand<T> right{static_cast<const T*>(params.weight), num_classes, features, 1};
  const T* const bias = static_cast<const T*>(params.bias);
  const int64_t column_tiles = tiles_along(num_classes, edge), tiles = tiles_along(batch, edge) * column_tiles;
  const int64_t depth = slice_depth(features, params.slices);
  for (int64_t job = blockIdx.x; job < tiles * params.slices; job += gridDim.x) {
    const int64_t slice = job / tiles, tile = job - slice * tiles;
    const int64_t row = tile / column_tiles * edge, column = tile % column_tiles * edge;
    const int64_t begin = slice * depth, end = begin + depth < features ? begin + depth : features;
    linear_tile<kBlockSide>(shared, left, right, row, column, begin, end, [&](int64_t b, int64_t c, Acc sum) {
      const int64_t place = b * num_classes + c;
      if (params.slices > 1) {
        static_cast<Acc*>(params.partial)[slice * batch * num_classes + place] = sum;
      } else {
        const Acc logit = bias != nullptr ? sum + wide(bias[c]) : sum;
        static_cast<Acc*>(params.logits)[place] = logit;
        static_cast<T*>(params.scores)[place] = narrowed<T>(logit);  // a few class's is written over after the barrier
      }
    });
  }
}

// preactivation = z w1^T + b1, one w1 for all classes.
template <int kBlockSide, typename T>
__device__ __forceinline__ void multiply_shared_first_layer(const HeadParams& params, accumulate_t<T>* shared) {
  using Acc = accumulate_t<T>;
  const int64_t edge = Tile<kBlockSide>::kEdge;
  const Operand<T> left{static_cast<const T*>(params.z), params.num_few, params.inputs, 1};
  const Operand<T> right{static_cast<const T*>(params.w1), params.hidden, params.inputs, 1};
  const T* const b1 = static_cast<const T*>(params.b1);
  const int64_t column_tiles = tiles_along(params.hidden, edge), tiles = tiles_along(params.num_few, edge) * column_tiles;
  for (int64_t tile = gridDim.x - 1 - blockIdx.x; tile < tiles; tile += gridDim.x) {  // the logits begin with the first blocks
    linear_tile<kBlockSide>(shared, left, right, tile / column_tiles * edge, tile % column_tiles * edge, 0, params.inputs,
                            [&](int64_t f, int64_t h, Acc sum) {
                              static_cast<Acc*>(params.preactivation)[f * params.hidden + h] = sum + wide(b1[h]);
                            });
  }
}

// The original classifier's logit, from wherever the sizes have put it.
template <typename T>
__device__ __forceinline__ accumulate_t<T> original_logit(const HeadParams& params, int64_t b, int64_t c) {
  using Acc = accumulate_t<T>;
  const int64_t place = b * params.num_classes + c;
  if (params.weight == nullptr) return wide(static_cast<const T*>(params.input)[place]);
  if (params.slices == 1) return static_cast<const Acc*>(params.logits)[place];
  const Acc* const partial = static_cast<const Acc*>(params.partial);
  const int64_t step = params.batch * params.num_classes;
  Acc sum = 0;
  ALPHAEXT_UNROLL(8)
  for (int64_t slice = 0; slice < params.slices; ++slice) sum += partial[slice * step + place];
  return params.bias != nullptr ? sum + wide(static_cast<const T*>(params.bias)[c]) : sum;
}

// What a block needs of one few class at a time: in shared memory, or, where a class has too many members for that, in arrays
// of the results.
template <typename Acc>
struct ClassRoom {
  Acc* raw;
  Acc* alpha;
};

// The coefficients of one few class, by one block, left in its room, too.
template <typename T>
__device__ __forceinline__ void make_coefficients(const HeadParams& params, int64_t few, const ClassRoom<accumulate_t<T>>& room) {
  using Acc = accumulate_t<T>;
  const int64_t members = params.members, hidden = params.hidden;
  const int64_t weights = params.shared_second ? 0 : few;
  const T* const w2 = static_cast<const T*>(params.w2) + weights * members * hidden;
  const T* const b2 = static_cast<const T*>(params.b2) + weights * members;
  const bool factored = params.w1 == nullptr && !params.shared_first;
  const T* const b1 = static_cast<const T*>(params.b1) + (factored ? few * hidden : 0);
  Acc* const before = static_cast<Acc*>(params.preactivation) + few * hidden;

  for (int64_t k = threadIdx.x / kWarp; k < members; k += blockDim.x / kWarp) {
    Acc sum = 0;
    ALPHAEXT_UNROLL(8)
    for (int64_t h = lane_index(); h < hidden; h += kWarp) {
      const Acc value = factored ? wide(b1[h]) : before[h];
      sum += (value < Acc(0) ? Acc(0) : value) * wide(w2[k * hidden + h]);  // a NaN stays a NaN, as in torch.relu
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) room.raw[k] = sum + wide(b2[k]);
  }
  __syncthreads();
  if (threadIdx.x == 0) rule_forward(params.rule, members, room.raw, room.alpha);
  if (factored) {
    for (int64_t h = threadIdx.x; h < hidden; h += blockDim.x) before[h] = wide(b1[h]);
  }
  __syncthreads();
  Acc* const raw = static_cast<Acc*>(params.raw) + few * members;
  Acc* const alpha = static_cast<Acc*>(params.alpha) + few * members;
  if (room.raw == raw) return;
  for (int64_t k = threadIdx.x; k < members; k += blockDim.x) {
    raw[k] = room.raw[k];
    alpha[k] = room.alpha[k];
  }
}

// One few class, by one block: its coefficients, then its column of the scores.
template <typename T>
__device__ __forceinline__ void make_class(const HeadParams& params, int64_t few, accumulate_t<T>* shared) {
  using Acc = accumulate_t<T>;
  const int64_t members = params.members, num_classes = params.num_classes;
  const int64_t* const ids = params.member_ids + few * members;
  const Acc* const alpha = shared + members;
  Acc* const terms = shared + 2 * members;
  make_coefficients<T>(params, few, {shared, shared + members});

  const int64_t own = ids[0];
  if (in_range(own, num_classes)) {  // the same in every thread
    const T* const bias = params.rule.rule == Rule::L1 ? static_cast<const T*>(params.bias) : nullptr;
    const auto term = [&](int64_t b, int64_t k) {
      const int64_t id = ids[k];
      if (!in_range(id, num_classes)) return alpha[k] * Acc(float_of(0x7fc00000u));  // NaN
      const Acc logit = original_logit<T>(params, b, id);
      return alpha[k] * (bias != nullptr && k != 0 ? logit - wide(bias[id]) : logit);
    };
    T* const scores = static_cast<T*>(params.scores) + own;
    // A thread per product, then a thread per row adds them up; with very many members a thread per row does both.
    const int64_t rows = blockDim.x / members;
    for (int64_t first = 0; rows > 0 && first < params.batch; first += rows) {
      const int64_t b = threadIdx.x / members, count = params.batch - first < rows ? params.batch - first : rows;
      if (b < count) terms[threadIdx.x] = term(first + b, threadIdx.x - b * members);
      __syncthreads();
      if (threadIdx.x < count) {
        Acc sum = 0;
        for (int64_t k = 0; k < members; ++k) sum += terms[threadIdx.x * members + k];
        scores[(first + threadIdx.x) * num_classes] = narrowed<T>(sum);
      }
      __syncthreads();
    }
    for (int64_t b = threadIdx.x; rows == 0 && b < params.batch; b += blockDim.x) {
      Acc sum = 0;
      for (int64_t k = 0; k < members; ++k) sum += term(b, k);
      scores[b * num_classes] = narrowed<T>(sum);
    }
  }
  __syncthreads();  // the block's next work uses the same shared memory
}

// Some neighbouring columns of some rows, by one block: the logits, and the scores of the classes that are not few.
template <int kBlockSide, typename T>
__device__ __forceinline__ void make_columns(const HeadParams& params, int64_t row, int64_t rows, int64_t column, int* is_few) {
  using Acc = accumulate_t<T>;
  const int64_t edge = Tile<kBlockSide>::kEdge, num_classes = params.num_classes;
  for (int64_t c = threadIdx.x; c < edge; c += blockDim.x) is_few[c] = 0;
  __syncthreads();
  ALPHAEXT_UNROLL(4)
  for (int64_t f = threadIdx.x; f < params.num_few; f += blockDim.x) {
    const int64_t own = params.member_ids[f * params.members];
    if (own >= column && own < column + edge) atomicExch(&is_few[own - column], 1);
  }
  __syncthreads();
  const int64_t height = params.batch - row < rows ? params.batch - row : rows;
  for (int64_t element = threadIdx.x; element < height * edge; element += blockDim.x) {
    const int64_t b = row + element / edge, c = element % edge;
    if (column + c >= num_classes) continue;
    const Acc logit = original_logit<T>(params, b, column + c);
    if (params.weight != nullptr) static_cast<Acc*>(params.logits)[b * num_classes + column + c] = logit;
    if (is_few[c] == 0) static_cast<T*>(params.scores)[b * num_classes + column + c] = narrowed<T>(logit);
  }
  __syncthreads();
}

template <typename T, int kBlockSide>
__global__ void __launch_bounds__(kBlockSide* kBlockSide, blocks_of_head<T>)
    head_forward_kernel(const HeadParams params, const bool waits) {
  ALPHAEXT_DYNAMIC_SHARED(accumulate_t<T>, shared);
  constexpr int64_t edge = Tile<kBlockSide>::kEdge;
  if (params.weight != nullptr) multiply_logits<kBlockSide, T>(params, shared);
  if (params.shared_first) {
    multiply_shared_first_layer<kBlockSide, T>(params, shared);
  } else if (params.w1 != nullptr) {
    stream_first_layer<2, T>(params, product_jobs(params, edge) % gridDim.x, tile_in_rows(params, edge));
  }
  if (waits) {
    const int64_t weights = params.shared_second ? 0 : blockIdx.x, of_class = params.members * params.hidden;
    if (blockIdx.x < params.num_few) {  // what this block reads behind the barrier, and nobody has read yet
      prefetch(static_cast<const T*>(params.w2) + weights * of_class, of_class * static_cast<int64_t>(sizeof(T)));
      prefetch(static_cast<const T*>(params.b2) + weights * params.members, params.members * static_cast<int64_t>(sizeof(T)));
    }
    grid_barrier();
  }

  const bool columns_done = params.weight != nullptr && params.slices == 1;
  const int64_t column_tiles = columns_done ? 0 : tiles_along(params.num_classes, edge);
  const int64_t rows = column_tiles > 0 ? column_rows(params.batch, column_tiles) : 1;
  const int64_t jobs = column_tiles * tiles_along(params.batch, rows);
  for (int64_t few = blockIdx.x; few < params.num_few; few += gridDim.x) make_class<T>(params, few, shared);
  // The columns are above all the last blocks' part, who have no class, or one less than the first ones.
  const Share share = fair_share(jobs, blockIdx.x, gridDim.x, params.num_few % gridDim.x, kClassInJobs);
  for (int64_t job = share.begin; job < share.end; ++job) {
    const int64_t band = job / column_tiles, tile = job % column_tiles;
    make_columns<kBlockSide, T>(params, band * rows, rows, tile * edge, reinterpret_cast<int*>(shared));
  }
}

}  // namespace alphaext::cuda
