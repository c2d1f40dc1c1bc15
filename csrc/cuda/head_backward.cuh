// The gradients of equations 1 to 4 in one launch: every one that is asked for.
//
// A block takes neighbouring rows of grad_w1. For each class among them it makes grad_alpha and the rule's gradient itself, a
// few hundred numbers from the second-level cache, and so waits for nobody while it streams grad_w1 out. Only sums over
// classes or over blocks (the classifier's and the input's gradient, shared weights, grad_z) need the grid's barrier; where the
// product of grad_input is cut along its depth, there is a second one.
#pragma once

#include "head_forward.cuh"

namespace alphaext::cuda {

ALPHAEXT_HOST_DEVICE bool asks_for_submodules(const HeadBackwardParams& p) {
  return p.grad_z != nullptr || p.grad_w1 != nullptr || p.grad_b1 != nullptr || p.grad_w2 != nullptr || p.grad_b2 != nullptr;
}

// With scratch arrays the blocks wait for each other, to read what others wrote there.
inline bool head_backward_waits(const HeadBackwardParams& p) {
  return p.grad_logits != nullptr || p.grad_raw != nullptr || p.grad_preactivation != nullptr;
}

ALPHAEXT_HOST_DEVICE bool asks_for_logits(const HeadBackwardParams& p) {
  return p.grad_input != nullptr || p.grad_weight != nullptr || p.grad_bias != nullptr;
}

template <int kBlockSide>
int64_t head_backward_shared_bytes(const HeadBackwardParams& params) {
  using Shape = Tile<kBlockSide>;
  const int64_t size = params.dtype == ScalarType::Float64 ? 8 : 4;
  const bool multiplies = params.grad_logits != nullptr || (params.shared_first && params.grad_preactivation != nullptr);
  const int64_t panels = multiplies ? 2 * Shape::kPanel : 0;
  const int64_t of_class = 2 * params.members + Shape::kBlock;
  const int64_t of_columns = Shape::kBlock * (params.grad_z != nullptr ? 8 : 0);  // grad_z: at most 8 sums a thread
  const int64_t largest = of_class > of_columns ? of_class : of_columns;
  return size * (panels > largest ? panels : largest);
}

inline int64_t size_of(ScalarType dtype) {
  return dtype == ScalarType::Float64 ? 8 : dtype == ScalarType::Float32 ? 4 : 2;
}

// The sums of grad_z that one block makes: one vector a lane.
ALPHAEXT_HOST_DEVICE int64_t grad_z_columns(int64_t element_size) { return kWarp * (16 / element_size); }

template <int kBlockSide>
int64_t head_backward_blocks(const HeadBackwardParams& p) {
  using Shape = Tile<kBlockSide>;
  const int64_t edge = Shape::kEdge, warps = Shape::kBlock / kWarp;
  int64_t most = 0;
  const auto at_least = [&](int64_t jobs) { most = jobs > most ? jobs : most; };
  if (asks_for_submodules(p)) at_least(p.grad_w1 != nullptr && !p.shared_first ? p.num_few * p.hidden : p.num_few);
  if (asks_for_logits(p)) at_least(tiles_along(p.num_classes, warps));
  if (p.grad_logits != nullptr) {
    at_least(tiles_along(p.batch, edge) * tiles_along(p.features, edge) * (p.input_partial != nullptr ? p.input_slices : 1));
    at_least(tiles_along(p.num_classes, edge) * tiles_along(p.features, edge));
  }
  if (p.shared_first && p.grad_preactivation != nullptr) {
    at_least(tiles_along(p.hidden, edge) * tiles_along(p.inputs, edge));
    at_least(tiles_along(p.num_few, edge) * tiles_along(p.inputs, edge));
  }
  if (p.grad_z != nullptr && !p.shared_first) {
    at_least(p.num_few * tiles_along(p.inputs, grad_z_columns(size_of(p.dtype))));
  }
  return most;
}

// The original classifier's logit, where `logits` or else `input` holds it.
template <typename T, typename Params>
__device__ __forceinline__ accumulate_t<T> saved_logit(const Params& params, int64_t place) {
  if (params.logits == nullptr) return wide(static_cast<const T*>(params.input)[place]);
  return static_cast<const accumulate_t<T>*>(params.logits)[place];
}

// grad_w1[row + r] = gradient[r] z for `rows` neighbouring rows of one class. A thread keeps its part of z.
template <bool kAligned, typename T>
__device__ __forceinline__ void write_rows(const T* z, const accumulate_t<T>* gradient, int64_t rows, int64_t inputs,
                                           T* grad_w1) {
  using Acc = accumulate_t<T>;
  constexpr int kSize = kAligned ? Vector<T>::kSize : 1;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kSize; i < inputs; i += static_cast<int64_t>(blockDim.x) * kSize) {
    Acc values[kSize];
    if constexpr (kAligned) {
      const Vector<T> loaded = load_vector<true>(z, i, inputs);
      for (int v = 0; v < kSize; ++v) values[v] = wide(loaded.values[v]);
    } else {
      values[0] = wide(z[i]);
    }
    ALPHAEXT_UNROLL(4)
    for (int64_t r = 0; r < rows; ++r) {
      const Acc factor = gradient[r];
      if constexpr (kAligned) {
        Vector<T> products;
        for (int v = 0; v < kSize; ++v) products.values[v] = narrowed<T>(factor * values[v]);
        store_once(grad_w1 + r * inputs + i, products);
      } else {
        grad_w1[r * inputs + i] = narrowed<T>(factor * values[0]);
      }
    }
  }
}

// Hidden units [begin, end) of one class, by one block: from its column's gradient down to grad_w1. What belongs to the class
// as a whole is written by the block that has its first unit. A class that is not `staged` has too many members for shared
// memory; then its block has all of its units, and works in the array of grad_raw.
template <typename T>
__device__ __forceinline__ void differentiate_class(const HeadBackwardParams& params, int64_t few, int64_t begin, int64_t end,
                                                    bool aligned, bool staged, accumulate_t<T>* shared) {
  using Acc = accumulate_t<T>;
  const int64_t members = params.members, hidden = params.hidden, inputs = params.inputs, num_classes = params.num_classes;
  const int64_t* const ids = params.member_ids + few * members;
  const T* const w2 = static_cast<const T*>(params.w2) + (params.shared_second ? 0 : few * members * hidden);
  const T* const bias = params.rule.rule == Rule::L1 ? static_cast<const T*>(params.bias) : nullptr;
  const T* const grad_scores = static_cast<const T*>(params.grad_scores);
  const Acc* const before = static_cast<const Acc*>(params.preactivation) + few * hidden;
  T* const grad_w1 = params.shared_first ? nullptr : static_cast<T*>(params.grad_w1);
  T* const grad_b1 = params.shared_first ? nullptr : static_cast<T*>(params.grad_b1);
  T* const grad_w2 = params.shared_second ? nullptr : static_cast<T*>(params.grad_w2);
  T* const grad_b2 = params.shared_second ? nullptr : static_cast<T*>(params.grad_b2);
  const Acc* const saved_raw = static_cast<const Acc*>(params.raw) + few * members;
  const Acc* const raw = staged ? shared : saved_raw;
  // grad_alpha until the rule has seen it.
  Acc* const grad_raw = staged ? shared + members : static_cast<Acc*>(params.grad_raw) + few * members;
  Acc* const of_units = staged ? shared + 2 * members : shared;

  const int64_t own = ids[0];
  for (int64_t k = threadIdx.x / kWarp; k < members; k += blockDim.x / kWarp) {
    const int64_t id = ids[k];
    const bool exists = in_range(id, num_classes);
    const Acc removed = exists && bias != nullptr && k != 0 ? wide(bias[id]) : Acc(0);
    const int64_t read = exists ? id : 0;
    Acc sum = 0;
    if (in_range(own, num_classes)) {
      ALPHAEXT_UNROLL(4)
      for (int64_t b = lane_index(); b < params.batch; b += kWarp) {
        const int64_t row = b * num_classes;
        sum += wide(grad_scores[row + own]) * (saved_logit<T>(params, row + read) - removed);
      }
      if (!exists && params.batch > 0) sum = Acc(float_of(0x7fc00000u));  // NaN
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) grad_raw[k] = sum;
  }
  for (int64_t k = threadIdx.x; staged && k < members; k += blockDim.x) shared[k] = saved_raw[k];
  __syncthreads();
  if (threadIdx.x == 0) rule_backward(params.rule, members, raw, grad_raw, grad_raw);
  __syncthreads();
  if (begin == 0) {
    for (int64_t k = threadIdx.x; k < members; k += blockDim.x) {
      if (grad_b2 != nullptr) grad_b2[few * members + k] = narrowed<T>(grad_raw[k]);
      if (staged && params.grad_raw != nullptr) static_cast<Acc*>(params.grad_raw)[few * members + k] = grad_raw[k];
    }
  }
  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int64_t h = first + threadIdx.x;
    if (h < end) {
      const Acc value = before[h];
      const Acc active = value < Acc(0) ? Acc(0) : value;
      Acc sum = 0;
      ALPHAEXT_UNROLL(4)
      for (int64_t k = 0; k < members; ++k) {
        const Acc gradient = grad_raw[k];
        sum += gradient * wide(w2[k * hidden + h]);
        if (grad_w2 != nullptr) grad_w2[(few * members + k) * hidden + h] = narrowed<T>(gradient * active);
      }
      const Acc gradient = value <= Acc(0) ? Acc(0) : sum;
      of_units[threadIdx.x] = gradient;
      if (grad_b1 != nullptr) grad_b1[few * hidden + h] = narrowed<T>(gradient);
      if (params.grad_preactivation != nullptr) static_cast<Acc*>(params.grad_preactivation)[few * hidden + h] = gradient;
    }
    if (grad_w1 == nullptr) continue;
    __syncthreads();
    const int64_t rows = end - first < blockDim.x ? end - first : blockDim.x;
    const T* const z = static_cast<const T*>(params.z) + few * inputs;
    T* const out = grad_w1 + (few * hidden + first) * inputs;
    if (aligned) {
      write_rows<true>(z, of_units, rows, inputs, out);
    } else {
      write_rows<false>(z, of_units, rows, inputs, out);
    }
    __syncthreads();
  }
  __syncthreads();  // the block's next work uses the same shared memory
}

// All classes: a block takes neighbouring rows of grad_w1, with whatever classes these belong to, or whole classes in turn.
template <typename T>
__device__ __forceinline__ void differentiate_classes(const HeadBackwardParams& params, bool staged, accumulate_t<T>* shared) {
  const int64_t num_few = params.num_few, hidden = params.hidden, inputs = params.inputs;
  const bool writes_rows = params.w1 != nullptr && !params.shared_first && params.grad_w1 != nullptr;
  const bool aligned = rows_are_aligned<T>(params.grad_w1, inputs) && rows_are_aligned<T>(params.z, inputs);
  if (!writes_rows || !staged || hidden == 0) {
    for (int64_t few = blockIdx.x; few < num_few; few += gridDim.x) {
      differentiate_class<T>(params, few, 0, hidden, aligned, staged, shared);
    }
    return;
  }
  const int64_t rows = num_few * hidden, end = rows * (blockIdx.x + 1) / gridDim.x;
  for (int64_t row = rows * blockIdx.x / gridDim.x; row < end;) {
    const int64_t few = row / hidden, begin = row - few * hidden;
    const int64_t last = end - few * hidden < hidden ? end - few * hidden : hidden;
    differentiate_class<T>(params, few, begin, last, aligned, true, shared);
    row = few * hidden + last;
  }
}

// One class's column of the logits' gradient, by one warp, lanes over the batch. The warp looks through all members for the
// class and adds up in their order: no sorted copy of the members, no atomics. A class that heads a row of members is few: its
// own column's gradient reaches its logit through that entry alone.
template <typename T>
__device__ __forceinline__ void differentiate_column(const HeadBackwardParams& params, int64_t column) {
  using Acc = accumulate_t<T>;
  constexpr int kHeld = 4;
  const int64_t batch = params.batch, num_classes = params.num_classes, members = params.members;
  const int64_t entries = params.num_few * members;
  const T* const grad_scores = static_cast<const T*>(params.grad_scores);
  const Acc* const alpha = static_cast<const Acc*>(params.alpha);
  Acc of_logits = 0, of_scores = 0;
  for (int64_t first = 0; first < batch; first += kWarp * kHeld) {
    Acc sums[kHeld] = {};
    bool is_few = false;
    for (int64_t start = 0; start < entries; start += kWarp) {
      const int64_t mine = start + lane_index();
      unsigned found = __ballot_sync(0xffffffffu, mine < entries && params.member_ids[mine] == column);
      for (; found != 0; found &= found - 1) {
        const int64_t entry = start + __ffs(static_cast<int>(found)) - 1;
        const int64_t head = entry / members * members;
        const int64_t own = params.member_ids[head];
        is_few = is_few || entry == head;
        if (!in_range(own, num_classes)) continue;
        const Acc factor = alpha[entry];
        ALPHAEXT_UNROLL(4)
        for (int u = 0; u < kHeld; ++u) {
          const int64_t b = first + u * kWarp + lane_index();
          if (b < batch) sums[u] += factor * wide(grad_scores[b * num_classes + own]);
        }
      }
    }
    ALPHAEXT_UNROLL(4)
    for (int u = 0; u < kHeld; ++u) {
      const int64_t b = first + u * kWarp + lane_index();
      if (b >= batch) continue;
      const Acc score = wide(grad_scores[b * num_classes + column]);
      const Acc gradient = is_few ? sums[u] : sums[u] + score;
      if (params.grad_logits != nullptr) static_cast<Acc*>(params.grad_logits)[b * num_classes + column] = gradient;
      if (params.weight == nullptr && params.grad_input != nullptr) {
        static_cast<T*>(params.grad_input)[b * num_classes + column] = narrowed<T>(gradient);
      }
      of_logits += gradient;
      of_scores += score;
    }
  }
  if (params.grad_bias == nullptr) return;
  of_logits = warp_sum(of_logits);
  of_scores = warp_sum(of_scores);
  // Under l1 a bias reaches its own score only. Where the logits are the input they hold the biases already: there the head
  // only ever takes biases out (l1), or does not use them at all.
  const bool given = params.weight == nullptr;
  const Acc sum = params.rule.rule == Rule::L1 ? (given ? of_scores - of_logits : of_scores) : (given ? Acc(0) : of_logits);
  if (lane_index() == 0) static_cast<T*>(params.grad_bias)[column] = narrowed<T>(sum);
}

// A whole product, its tiles shared out among the blocks, by turns from either end. With `partial`, the parts that slices of the
// depth add to it.
template <int kBlockSide, typename T, typename Left, typename Right>
__device__ __forceinline__ void multiply_into(accumulate_t<T>* shared, void* out, const Operand<Left>& left,
                                              const Operand<Right>& right, int64_t depth, bool from_the_last, int64_t slices,
                                              void* partial) {
  const int64_t edge = Tile<kBlockSide>::kEdge;
  const int64_t column_tiles = tiles_along(right.count, edge), tiles = tiles_along(left.count, edge) * column_tiles;
  const int64_t first = from_the_last ? gridDim.x - 1 - blockIdx.x : blockIdx.x, share = slice_depth(depth, slices);
  for (int64_t job = first; job < tiles * slices; job += gridDim.x) {
    const int64_t slice = job / tiles, tile = job - slice * tiles;
    const int64_t begin = slice * share, end = begin + share < depth ? begin + share : depth;
    multiply_tile<kBlockSide>(shared, left, right, tile / column_tiles * edge, tile % column_tiles * edge, begin, end,
                              [&](int64_t i, int64_t j, accumulate_t<T> sum) {
                                const int64_t place = i * right.count + j;
                                if (partial == nullptr) {
                                  static_cast<T*>(out)[place] = narrowed<T>(sum);
                                } else {
                                  static_cast<accumulate_t<T>*>(partial)[slice * left.count * right.count + place] = sum;
                                }
                              });
  }
}

// grad_input from the slices of its product, in their order.
template <typename T>
__device__ __forceinline__ void add_input_slices(const HeadBackwardParams& params) {
  using Acc = accumulate_t<T>;
  const Acc* const partial = static_cast<const Acc*>(params.input_partial);
  const int64_t count = params.batch * params.features, threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
    Acc sum = 0;
    ALPHAEXT_UNROLL(8)
    for (int64_t slice = 0; slice < params.input_slices; ++slice) sum += partial[slice * count + i];
    static_cast<T*>(params.grad_input)[i] = narrowed<T>(sum);
  }
}

// grad_z of some neighbouring inputs of one class, by one block: its warps take the rows of w1 in turn.
template <bool kAligned, typename T>
__device__ __forceinline__ void differentiate_inputs(const HeadBackwardParams& params, int64_t few, int64_t column,
                                                     accumulate_t<T>* shared) {
  using Acc = accumulate_t<T>;
  constexpr int kSize = Vector<T>::kSize;
  const int64_t hidden = params.hidden, inputs = params.inputs;
  const int64_t i = column + lane_index() * kSize;
  const T* const w1 = static_cast<const T*>(params.w1) + few * hidden * inputs;
  const Acc* const gradient = static_cast<const Acc*>(params.grad_preactivation) + few * hidden;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  constexpr int kRows = kAligned ? 8 : 2;  // whose loads are in flight together; those beyond the last are 0 and add nothing
  Acc sums[kSize] = {};
  for (int64_t first = warp; first < hidden; first += kRows * warps) {
    Vector<T> weights[kRows];
    Acc factors[kRows];
    ALPHAEXT_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      const int64_t h = first + r * warps;
      weights[r] = load_once<kAligned>(w1 + h * inputs, i, h < hidden ? inputs : 0);
      factors[r] = h < hidden ? gradient[h] : Acc(0);
    }
    ALPHAEXT_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      ALPHAEXT_UNROLL(8)
      for (int v = 0; v < kSize; ++v) sums[v] += factors[r] * wide(weights[r].values[v]);
    }
  }
  for (int v = 0; v < kSize; ++v) shared[threadIdx.x * kSize + v] = sums[v];
  __syncthreads();
  const int64_t width = kWarp * kSize;
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    Acc sum = 0;
    for (int w = 0; w < warps; ++w) sum += shared[w * width + c];
    if (column + c < inputs) static_cast<T*>(params.grad_z)[few * inputs + column + c] = narrowed<T>(sum);
  }
  __syncthreads();
}

// grad_z of all classes, where each has a w1 of its own.
template <typename T>
__device__ __forceinline__ void differentiate_all_inputs(const HeadBackwardParams& params, accumulate_t<T>* shared) {
  if (params.shared_first || params.grad_z == nullptr) return;
  const bool aligned = rows_are_aligned<T>(params.w1, params.inputs);
  const int64_t width = grad_z_columns(sizeof(T)), chunks = tiles_along(params.inputs, width);
  for (int64_t job = blockIdx.x; job < params.num_few * chunks; job += gridDim.x) {
    if (aligned) {
      differentiate_inputs<true, T>(params, job / chunks, job % chunks * width, shared);
    } else {
      differentiate_inputs<false, T>(params, job / chunks, job % chunks * width, shared);
    }
  }
}

// store(c, sum over r < count of term(r, c)) for every column c < width: a block for 32 neighbouring columns, whose warps take
// the rows in turn; then their sums are added up in order. `shared` has a number for each thread.
template <typename Acc, typename Term, typename Store>
__device__ __forceinline__ void sum_columns(int64_t width, int64_t count, Acc* shared, const Term& term, const Store& store) {
  const int64_t warps = blockDim.x / kWarp;
  for (int64_t chunk = blockIdx.x; chunk < tiles_along(width, kWarp); chunk += gridDim.x) {
    const int64_t column = chunk * kWarp + lane_index();
    Acc sum = 0;
    if (column < width) {
      ALPHAEXT_UNROLL(4)
      for (int64_t row = threadIdx.x / kWarp; row < count; row += warps) sum += term(row, column);
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < kWarp && column < width) {
      for (int64_t warp = 1; warp < warps; ++warp) sum += shared[warp * kWarp + threadIdx.x];
      store(column, sum);
    }
    __syncthreads();
  }
}

// Sums over the classes, for weights that all classes share.
template <typename T>
__device__ __forceinline__ void sum_over_classes(const HeadBackwardParams& params, accumulate_t<T>* shared) {
  using Acc = accumulate_t<T>;
  const int64_t members = params.members, hidden = params.hidden, num_few = params.num_few;
  const Acc* const grad_raw = static_cast<const Acc*>(params.grad_raw);
  const Acc* const grad_preactivation = static_cast<const Acc*>(params.grad_preactivation);
  const Acc* const before = static_cast<const Acc*>(params.preactivation);
  if (params.shared_second && params.grad_w2 != nullptr) {
    sum_columns(
        members * hidden, num_few, shared,
        [&](int64_t f, int64_t element) {
          const Acc value = before[f * hidden + element % hidden];
          return grad_raw[f * members + element / hidden] * (value < Acc(0) ? Acc(0) : value);
        },
        [&](int64_t element, Acc sum) { static_cast<T*>(params.grad_w2)[element] = narrowed<T>(sum); });
  }
  if (params.shared_second && params.grad_b2 != nullptr) {
    sum_columns(
        members, num_few, shared, [&](int64_t f, int64_t k) { return grad_raw[f * members + k]; },
        [&](int64_t k, Acc sum) { static_cast<T*>(params.grad_b2)[k] = narrowed<T>(sum); });
  }
  if (params.shared_first && params.grad_b1 != nullptr) {
    sum_columns(
        hidden, num_few, shared, [&](int64_t f, int64_t h) { return grad_preactivation[f * hidden + h]; },
        [&](int64_t h, Acc sum) { static_cast<T*>(params.grad_b1)[h] = narrowed<T>(sum); });
  }
}

template <typename T, int kBlockSide>
__global__ void __launch_bounds__(kBlockSide* kBlockSide, blocks_of_head<T>)
    head_backward_kernel(const HeadBackwardParams params, const bool of_submodules, const bool waits) {
  using Acc = accumulate_t<T>;
  ALPHAEXT_DYNAMIC_SHARED(Acc, shared);
  const int64_t num_few = params.num_few, hidden = params.hidden, inputs = params.inputs;

  if (asks_for_logits(params)) {
    // From the last block on: where only some blocks have a class, these are the others.
    const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
    const int64_t first = (gridDim.x - 1 - blockIdx.x) * static_cast<int64_t>(blockDim.x / kWarp) + threadIdx.x / kWarp;
    for (int64_t column = first; column < params.num_classes; column += step) differentiate_column<T>(params, column);
  }
  if (of_submodules) differentiate_classes<T>(params, true, shared);
  if (!waits) return;
  grid_barrier();

  sum_over_classes<T>(params, shared);
  // Four products of a float32 (float64) array with one of T, all through one copy of the code.
  const Acc* const grad_logits = static_cast<const Acc*>(params.grad_logits);
  const Acc* const grad_preactivation = static_cast<const Acc*>(params.grad_preactivation);
  const int64_t batch = params.batch, num_classes = params.num_classes, features = params.features;
  ALPHAEXT_UNROLL(1)
  for (int product = 0; product < 4; ++product) {
    void* const out = product == 0   ? (params.weight != nullptr ? params.grad_input : nullptr)
                      : product == 1 ? params.grad_weight
                      : product == 2 ? (params.shared_first ? params.grad_w1 : nullptr)
                                     : (params.shared_first ? params.grad_z : nullptr);
    if (out == nullptr) continue;
    const bool of_columns = product == 1 || product == 2;  // the left operand is transposed
    const Acc* const left = product < 2 ? grad_logits : grad_preactivation;
    const int64_t left_rows = product < 2 ? batch : num_few, left_columns = product < 2 ? num_classes : hidden;
    const void* const right = product == 0 ? params.weight : product == 1 ? params.input : product == 2 ? params.z : params.w1;
    const int64_t right_columns = product < 2 ? features : inputs;
    multiply_into<kBlockSide, T>(
        shared, out,
        Operand<Acc>{left, of_columns ? left_columns : left_rows, of_columns ? 1 : left_columns, of_columns ? left_columns : 1},
        Operand<T>{static_cast<const T*>(right), right_columns, 1, right_columns}, of_columns ? left_rows : left_columns,
        of_columns, product == 0 && params.input_partial != nullptr ? params.input_slices : 1,
        product == 0 ? params.input_partial : nullptr);
  }
  differentiate_all_inputs<T>(params, shared);
  if (params.input_partial == nullptr) return;
  grid_barrier();
  add_input_slices<T>(params);
}

}  // namespace alphaext::cuda
