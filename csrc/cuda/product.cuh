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

template <typename T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
  T values[4];
};

// This thread's part of every panel of an operand: kVectors times four elements that lie side by side, as neighbouring threads'
// do, whichever stride is 1. They are kept as they were read until they go into the panel: a conversion would wait for them.
template <int kBlockSide, typename Acc, typename T>
struct PanelPart {
  using Shape = Tile<kBlockSide>;
  static constexpr int kVectors = Shape::kEdge * Shape::kDepth / (4 * Shape::kBlock);
  using Held = Four<T>[kVectors];
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
    aligned = reinterpret_cast<uintptr_t>(operand.data) % sizeof(Four<T>) == 0 && row % 4 == 0;
  }
  // `left` of the depth are left; what lies beyond is 0.
  __device__ __forceinline__ void fetch(Held& held, int64_t left) {
    const int depth = static_cast<int>(left < Shape::kDepth ? left : Shape::kDepth);
    ALPHAEXT_UNROLL(4)
    for (int n = 0; n < kVectors; ++n) {
      const T* const at = next + n * vector_step;
      const int on_edge = exist - (along_edge(n) - along_edge(0)), deep = depth - in_depth(n);
      const int room = along_depth ? (on_edge > 0 ? deep : 0) : (deep > 0 ? on_edge : 0);
      held[n] = Four<T>{};
      if (aligned && room >= 4) {
        held[n] = *reinterpret_cast<const Four<T>*>(at);
      } else {
        ALPHAEXT_UNROLL(4)
        for (int v = 0; v < 4; ++v) {
          if (v < room) held[n].values[v] = at[v];
        }
      }
    }
    next += panel_step;
  }
  __device__ __forceinline__ void keep(Acc* panel, const Held& held) const {
    ALPHAEXT_UNROLL(4)
    for (int n = 0; n < kVectors; ++n) {
      Acc* const at = panel + in_depth(n) * Shape::kRow + along_edge(n);
      Four<Acc> values;
      for (int v = 0; v < 4; ++v) values.values[v] = wide(held[n].values[v]);
      if (along_depth) {
        for (int v = 0; v < 4; ++v) at[v * Shape::kRow] = values.values[v];
      } else {
        *reinterpret_cast<Four<Acc>*>(at) = values;
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
      const Four<Acc> a = *reinterpret_cast<const Four<Acc>*>(left_panel + d * Shape::kRow + y);
      const Four<Acc> b = *reinterpret_cast<const Four<Acc>*>(right_panel + d * Shape::kRow + x);
      ALPHAEXT_UNROLL(4)
      for (int i = 0; i < 4; ++i) {
        ALPHAEXT_UNROLL(4)
        for (int j = 0; j < 4; ++j) sums[i][j] += a.values[i] * b.values[j];
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

// Are the next fragments on their way while some are multiplied? Before sm_90 the registers do not suffice for both.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kFragmentsAhead = false;
#else
constexpr bool kFragmentsAhead = true;
#endif

// multiply_tile for two row-major 16-bit operands, left [rows, depth] and right [columns, depth], straight from memory: a
// warp makes 16 x 32 sums. In which order a product's depth is visited is free as long as both operands agree, so a lane
// takes the 16 bytes it can read at once, elements 8t to 8t+7 of every 32, as its part of two instructions.
template <int kBlockSide, bool kAligned, typename T, typename Store>
__device__ __forceinline__ void multiply_tile_16bit(const Operand<T>& left, const Operand<T>& right, int64_t row,
                                                    int64_t column, int64_t begin, int64_t end, const Store& store) {
  constexpr int kBands = Tile<kBlockSide>::kEdge / 16;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int64_t first_row = row + warp % kBands * 16 + g;
  const int64_t first_column = column + warp / kBands * 32 + g;
  float sums[4][4] = {};
  struct Fragments {
    uint32_t a[2][4], b[4][4];
  };
  const auto load = [&](Fragments& held, int64_t depth) {
    const int64_t r = depth + 8 * t;
    ALPHAEXT_UNROLL(2)
    for (int i = 0; i < 2; ++i) {
      const bool exists = first_row + 8 * i < left.count;
      const Vector<T> loaded =
          load_vector<kAligned>(left.data + (exists ? first_row + 8 * i : 0) * left.stride, r, exists ? end : 0);
      memcpy(held.a[i], &loaded, sizeof(loaded));
    }
    ALPHAEXT_UNROLL(4)
    for (int n = 0; n < 4; ++n) {
      const bool exists = first_column + 8 * n < right.count;
      const Vector<T> loaded =
          load_vector<kAligned>(right.data + (exists ? first_column + 8 * n : 0) * right.stride, r, exists ? end : 0);
      memcpy(held.b[n], &loaded, sizeof(loaded));
    }
  };
  const auto use = [&](const Fragments& held) {
    ALPHAEXT_UNROLL(2)
    for (int step = 0; step < 2; ++step) {
      const uint32_t rows[4] = {held.a[0][2 * step], held.a[1][2 * step], held.a[0][2 * step + 1], held.a[1][2 * step + 1]};
      ALPHAEXT_UNROLL(4)
      for (int n = 0; n < 4; ++n) {
        const uint32_t columns[2] = {held.b[n][2 * step], held.b[n][2 * step + 1]};
        multiply_fragments<T>(sums[n], rows, columns);
      }
    }
  };
  Fragments even, odd;
  if constexpr (!kAligned || !kFragmentsAhead) {
    ALPHAEXT_UNROLL(1)
    for (int64_t depth = begin; depth < end; depth += 32) {
      load(even, depth);
      use(even);
    }
  } else {
    load(even, begin);
    ALPHAEXT_UNROLL(1)
    for (int64_t depth = begin; depth < end; depth += 64) {
      load(odd, depth + 32);
      use(even);
      if (depth + 32 >= end) break;  // the same in all lanes
      load(even, depth + 64);
      use(odd);
    }
  }
  for (int n = 0; n < 4; ++n) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int64_t y = first_row + 8 * i, x = first_column - g + 8 * n + 2 * t + j;
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
      multiply_tile_16bit<kBlockSide, true>(left, right, row, column, begin, end, store);
    } else {
      multiply_tile_16bit<kBlockSide, false>(left, right, row, column, begin, end, store);
    }
  } else {
    multiply_tile<kBlockSide>(shared, left, right, row, column, begin, end, store);
  }
}

}  // namespace alphaext::cuda
