// Matrix products inside a kernel, tile by tile: float32 and float64 by multiply-adds, 16-bit operands by the tensor cores.
//
// For products that run beside something larger, or are too small to be worth a launch of their own; the rest is cuBLAS's.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace alphaext::cuda {

// A block of kSide x kSide threads makes a tile of 4 kSide x 4 kSide sums. 16 on a GPU; the CPU tests use 8, whose blocks
// have 64 threads.
constexpr int kSide = 16;
static_assert(kSide * kSide == kThreads);

// Blocks an SM must have room for. float64 takes the registers of both.
template <typename T>
constexpr int blocks_of_head = sizeof(T) == 8 ? 1 : kMinBlocks;

template <int kBlockSide>
struct Tile {
  static constexpr int kBlock = kBlockSide * kBlockSide;
  static constexpr int kEdge = 4 * kBlockSide;
  static constexpr int kDepth = 16;
  static constexpr int kRow = kEdge + 4;  // keeps 16-byte alignment and spreads the stores over the banks
  static constexpr int kPanel = kDepth * kRow;
};

ALPHAEXT_HOST_DEVICE int64_t tiles_along(int64_t size, int64_t edge) { return size / edge + (size % edge != 0); }

// One operand of a product: element (i, r) is data[i * stride + r * depth_stride], of which one is 1.
template <typename T>
struct Operand {
  const T* data;  // may have been written by this launch: never read through the non-coherent cache
  int64_t count, stride, depth_stride;
};

// kCount neighbouring elements as they were read. Those of 16 bits stay two in a word until one is used: taken apart where they
// are read, they would be waited for there.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Kept {
  static constexpr bool kPairs = sizeof(T) == 2;
  using Word = std::conditional_t<kPairs, uint32_t, T>;
  Word words[kPairs ? kCount / 2 : kCount];

  __device__ __forceinline__ T operator[](int i) const {
    if constexpr (kPairs) {
      return T{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)};
    } else {
      return words[i];
    }
  }
  // Of an element that is 0 until then.
  __device__ __forceinline__ void set(int i, T value) {
    if constexpr (kPairs) {
      words[i / 2] |= static_cast<uint32_t>(value.bits) << i % 2 * 16;
    } else {
      words[i] = value;
    }
  }
};

// In one access, or in two: `data` is aligned as Kept is.
template <int kCount, typename T>
__device__ __forceinline__ Kept<T, kCount> load_kept(const T* data) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const Kept<T, kCount>*>(data);
#else
  Kept<T, kCount> result;
  memcpy(result.words, data, sizeof(result.words));
  return result;
#endif
}

// This thread's part of every panel of an operand: kVectors times four elements that lie side by side, as neighbouring threads'
// do, whichever stride is 1. They are kept as they were read until they go into the panel: a conversion would wait for them.
template <int kBlockSide, typename Acc, typename T>
struct PanelPart {
  using Shape = Tile<kBlockSide>;
  static constexpr int kVectors = Shape::kEdge * Shape::kDepth / (4 * Shape::kBlock);
  using Held = Kept<T, 4>[kVectors];
  const T* next;  // the first element of the next panel
  int64_t vector_step, panel_step;
  int exist;      // how many there are along the edge, from this thread's first one on
  bool along_depth, aligned;

  // In the panel, of a vector's first element.
  __device__ __forceinline__ int along_edge(int n) const {
    const int index = static_cast<int>(threadIdx.x) + n * Shape::kBlock;
    return along_depth ? index / (Shape::kDepth / 4) : index % (Shape::kEdge / 4) * 4;
  }
  __device__ __forceinline__ int in_depth(int n) const {
    const int index = static_cast<int>(threadIdx.x) + n * Shape::kBlock;
    return along_depth ? index % (Shape::kDepth / 4) * 4 : index / (Shape::kEdge / 4);
  }

  __device__ __forceinline__ PanelPart(const Operand<T>& operand, int64_t origin, int64_t begin)
      : along_depth(operand.depth_stride == 1) {
    next = operand.data + (origin + along_edge(0)) * operand.stride + (begin + in_depth(0)) * operand.depth_stride;
    vector_step = (along_edge(1) - along_edge(0)) * operand.stride + (in_depth(1) - in_depth(0)) * operand.depth_stride;
    panel_step = Shape::kDepth * operand.depth_stride;
    const int64_t left = operand.count - origin;
    exist = static_cast<int>(left < Shape::kEdge ? left : Shape::kEdge) - along_edge(0);
    const int64_t row = along_depth ? operand.stride : operand.depth_stride;
    aligned = reinterpret_cast<uintptr_t>(operand.data) % alignof(Kept<T, 4>) == 0 && row % 4 == 0;
  }
  // `left` of the depth are left; what lies beyond is 0.
  __device__ __forceinline__ void fetch(Held& held, int64_t left) {
    const int depth = static_cast<int>(left < Shape::kDepth ? left : Shape::kDepth);
    ALPHAEXT_UNROLL(4)
    for (int n = 0; n < kVectors; ++n) {
      const T* const at = next + n * vector_step;
      const int on_edge = exist - (along_edge(n) - along_edge(0)), deep = depth - in_depth(n);
      const int room = along_depth ? (on_edge > 0 ? deep : 0) : (deep > 0 ? on_edge : 0);
      held[n] = {};
      if (aligned && room >= 4) {
        held[n] = load_kept<4>(at);
      } else {
        T elements[4] = {};  // all of them on their way before the first is kept
        ALPHAEXT_UNROLL(4)
        for (int v = 0; v < 4; ++v) {
          if (v < room) elements[v] = at[v];
        }
        ALPHAEXT_UNROLL(4)
        for (int v = 0; v < 4; ++v) held[n].set(v, elements[v]);
      }
    }
    next += panel_step;
  }
  __device__ __forceinline__ void keep(Acc* panel, const Held& held) const {
    ALPHAEXT_UNROLL(4)
    for (int n = 0; n < kVectors; ++n) {
      Acc* const at = panel + in_depth(n) * Shape::kRow + along_edge(n);
      Kept<Acc, 4> values;
      for (int v = 0; v < 4; ++v) values.words[v] = wide(held[n][v]);
      if (along_depth) {
        for (int v = 0; v < 4; ++v) at[v * Shape::kRow] = values[v];
      } else {
        *reinterpret_cast<Kept<Acc, 4>*>(at) = values;
      }
    }
  }
};

// store(i, j, sum over r in [begin, end) of left(i, r) right(j, r)) for the tile whose corner is (row, column). The whole
// block calls it, with 2 kPanel elements of shared memory. The order of a sum depends on begin and end alone.
template <int kBlockSide, typename Acc, typename Left, typename Right, typename Store>
__device__ __forceinline__ void multiply_tile(Acc* shared, const Operand<Left>& left, const Operand<Right>& right, int64_t row,
                                              int64_t column, int64_t begin, int64_t end, const Store& store) {
  using Shape = Tile<kBlockSide>;
  Acc* const left_panel = shared;
  Acc* const right_panel = shared + Shape::kPanel;
  const int x = static_cast<int>(threadIdx.x) % kBlockSide * 4;
  const int y = static_cast<int>(threadIdx.x) / kBlockSide * 4;
  Acc sums[4][4] = {};
  PanelPart<kBlockSide, Acc, Left> left_part(left, row, begin);
  PanelPart<kBlockSide, Acc, Right> right_part(right, column, begin);
  // Two panels are on their way while one is used: what is beyond the end are zeros nobody uses.
  typename PanelPart<kBlockSide, Acc, Left>::Held left_even, left_odd;
  typename PanelPart<kBlockSide, Acc, Right>::Held right_even, right_odd;
  int64_t depth_left = end - begin;
  left_part.fetch(left_even, depth_left);
  right_part.fetch(right_even, depth_left);
  left_part.fetch(left_odd, depth_left - Shape::kDepth);
  right_part.fetch(right_odd, depth_left - Shape::kDepth);
  const auto use_panel = [&](auto& left_held, auto& right_held) {
    __syncthreads();  // everyone is done with the panels before
    left_part.keep(left_panel, left_held);
    right_part.keep(right_panel, right_held);
    __syncthreads();
    left_part.fetch(left_held, depth_left - 2 * Shape::kDepth);
    right_part.fetch(right_held, depth_left - 2 * Shape::kDepth);
    depth_left -= Shape::kDepth;
    ALPHAEXT_UNROLL(2)
    for (int d = 0; d < Shape::kDepth; ++d) {
      const auto a = load_kept<4>(left_panel + d * Shape::kRow + y), b = load_kept<4>(right_panel + d * Shape::kRow + x);
      ALPHAEXT_UNROLL(4)
      for (int i = 0; i < 4; ++i) {
        ALPHAEXT_UNROLL(4)
        for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
      }
    }
  };
  while (depth_left > 0) {
    use_panel(left_even, right_even);
    if (depth_left > 0) use_panel(left_odd, right_odd);
  }
  __syncthreads();  // the caller may use the shared memory for something else
  ALPHAEXT_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    ALPHAEXT_UNROLL(4)
    for (int j = 0; j < 4; ++j) {
      if (row + y + i < left.count && column + x + j < right.count) store(row + y + i, column + x + j, sums[i][j]);
    }
  }
}

// ---- Tensor cores ------------------------------------------------------------------------------------------------------

// sums += A B for a 16 x 16 A and a 16 x 8 B of 16-bit numbers, spread over a warp as PTX's mma.m16n8k16 has it. With
// g = lane / 4 and t = lane % 4, and two numbers a word: a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..],
// a[3] = A[g+8][2t+8..]; b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g]; sums = C[g][2t, 2t+1], C[g+8][2t, 2t+1].
template <typename T>
__device__ __forceinline__ void multiply_fragments(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  // The same in plain arithmetic, for GPUs without the instruction and for the tests on a CPU.
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto half = [](uint32_t word, int which) {
    return widen(T{static_cast<uint16_t>(which == 0 ? word & 0xffffu : word >> 16)});
  };
  struct A {
    uint32_t words[4];
  };
  struct B {
    uint32_t words[2];
  };
  const auto of_a = all_lanes(A{{a[0], a[1], a[2], a[3]}});
  A rows[4];
  for (int source = 0; source < 4; ++source) rows[source] = of_a[g * 4 + source];  // the lanes of a row of A
  const auto of_b = all_lanes(B{{b[0], b[1]}});
  for (int source = 0; source < 4; ++source) {
    const A row = rows[source];
    const B pair[2] = {of_b[2 * t * 4 + source], of_b[(2 * t + 1) * 4 + source]};  // of two columns of B
    for (int n = 0; n < 2; ++n) {        // k below 8, and from 8 on
      for (int which = 0; which < 2; ++which) {
        for (int i = 0; i < 2; ++i) {    // rows g and g + 8
          for (int j = 0; j < 2; ++j) {  // columns 2t and 2t + 1
            sums[2 * i + j] += half(row.words[2 * n + i], which) * half(pair[j].words[n], which);
          }
        }
      }
    }
  }
#endif
}

// Steps of 32 along the depth that a block keeps in shared memory: one in use, the others on their way. 32 KB of them, of which a
// multiprocessor has two blocks' everywhere.
constexpr unsigned kStages = 4;

template <int kBlockSide>
constexpr int64_t kStageBytes = 2 * Tile<kBlockSide>::kEdge * 32 * 2;

// Eight elements, of which `exist`, the rest as 0, on their way to shared memory; nobody waits for them here if they lie on 16
// bytes.
template <bool kAligned, typename T>
__device__ __forceinline__ void send(Kept<T, 8>* to, const T* from, int64_t exist) {
  if constexpr (kAligned) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(exist > 0 ? 16 : 0)
                 : "memory");
#else
    *to = exist > 0 ? load_kept<8>(from) : Kept<T, 8>{};
#endif
  } else {
    T elements[8] = {};
    Kept<T, 8> held{};
    for (int v = 0; v < 8; ++v) {
      if (v < exist) elements[v] = from[v];
    }
    for (int v = 0; v < 8; ++v) held.set(v, elements[v]);
    *to = held;
  }
}

// Ends a step that this thread has sent.
__device__ __forceinline__ void end_sending() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for what this thread has sent, but for the last kLeft steps.
template <unsigned kLeft>
__device__ __forceinline__ void wait_for_sent() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// multiply_tile for two row-major 16-bit operands, left [rows, depth] and right [columns, depth], with kStages kStageBytes of
// shared memory: a warp makes 16 x 32 sums. In which order a product's depth is visited is free as long as both operands agree,
// so a lane takes the 16 bytes it can read at once, elements 8t to 8t+7 of every 32, as its part of two instructions; a warp then
// reads 512 neighbouring bytes.
template <int kBlockSide, bool kAligned, typename T, typename Store>
__device__ __forceinline__ void multiply_tile_16bit(void* shared, const Operand<T>& left, const Operand<T>& right, int64_t row,
                                                    int64_t column, int64_t begin, int64_t end, const Store& store) {
  using Shape = Tile<kBlockSide>;
  using Eight = Kept<T, 8>;
  constexpr int kBands = Shape::kEdge / 16;
  constexpr int kOperand = Shape::kEdge * 4;  // in eights, one step's part of an operand
  constexpr int kEach = kOperand / Shape::kBlock;
  Eight* const stages = static_cast<Eight*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  // A row that does not exist is read as the first one, and its sums are not stored.
  const T *next_left[kEach], *next_right[kEach];
  int64_t exist = end - begin - thread % 4 * 8;
  ALPHAEXT_UNROLL(2)
  for (int n = 0; n < kEach; ++n) {
    const int64_t i = row + (thread + n * Shape::kBlock) / 4, j = column + (thread + n * Shape::kBlock) / 4;
    next_left[n] = left.data + (i < left.count ? i : 0) * left.stride + (end - exist);
    next_right[n] = right.data + (j < right.count ? j : 0) * right.stride + (end - exist);
  }
  const auto send_step = [&](unsigned stage) {
    ALPHAEXT_UNROLL(2)
    for (int n = 0; n < kEach; ++n) {
      Eight* const to = stages + stage % kStages * 2 * kOperand + thread + n * Shape::kBlock;
      send<kAligned>(to, next_left[n], exist);
      send<kAligned>(to + kOperand, next_right[n], exist);
      next_left[n] += 32;
      next_right[n] += 32;
    }
    exist -= 32;
    end_sending();
  };
  const int warp = thread / kWarp, g = lane_index() / 4, t = lane_index() % 4;
  const int of_left = (warp % kBands * 16 + g) * 4 + t, of_right = kOperand + (warp / kBands * 32 + g) * 4 + t;
  float sums[4][4] = {};
  ALPHAEXT_UNROLL(4)
  for (unsigned stage = 0; stage < kStages - 1; ++stage) send_step(stage);
  ALPHAEXT_UNROLL(1)
  for (unsigned stage = 0; begin + stage * int64_t{32} < end; ++stage) {
    wait_for_sent<kStages - 2>();
    __syncthreads();  // everyone's part of this step is there, and everyone is done with the step before
    send_step(stage + kStages - 1);
    const Eight* const step = stages + stage % kStages * 2 * kOperand;
    Eight a[2], b[4];
    ALPHAEXT_UNROLL(2)
    for (int i = 0; i < 2; ++i) a[i] = step[of_left + i * 8 * 4];
    ALPHAEXT_UNROLL(4)
    for (int n = 0; n < 4; ++n) b[n] = step[of_right + n * 8 * 4];
    ALPHAEXT_UNROLL(2)
    for (int half = 0; half < 2; ++half) {
      const uint32_t rows[4] = {a[0].words[2 * half], a[1].words[2 * half], a[0].words[2 * half + 1], a[1].words[2 * half + 1]};
      ALPHAEXT_UNROLL(4)
      for (int n = 0; n < 4; ++n) {
        const uint32_t columns[2] = {b[n].words[2 * half], b[n].words[2 * half + 1]};
        multiply_fragments<T>(sums[n], rows, columns);
      }
    }
  }
  wait_for_sent<0>();  // the zeros from beyond the end
  __syncthreads();     // the caller may use the shared memory for something else
  for (int n = 0; n < 4; ++n) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int64_t y = row + warp % kBands * 16 + g + 8 * i, x = column + warp / kBands * 32 + 8 * n + 2 * t + j;
        if (y < left.count && x < right.count) store(y, x, sums[n][2 * i + j]);
      }
    }
  }
}

// left [rows, depth] times right [columns, depth], transposed: the form of every linear layer.
template <int kBlockSide, typename T, typename Store>
__device__ __forceinline__ void linear_tile(accumulate_t<T>* shared, const Operand<T>& left, const Operand<T>& right,
                                            int64_t row, int64_t column, int64_t begin, int64_t end, const Store& store) {
  if constexpr (sizeof(T) == 2) {
    if (rows_are_aligned<T>(left.data, left.stride) && rows_are_aligned<T>(right.data, right.stride)) {
      multiply_tile_16bit<kBlockSide, true>(shared, left, right, row, column, begin, end, store);
    } else {
      multiply_tile_16bit<kBlockSide, false>(shared, left, right, row, column, begin, end, store);
    }
  } else {
    multiply_tile<kBlockSide>(shared, left, right, row, column, begin, end, store);
  }
}

}  // namespace alphaext::cuda
