// What host and device agree on about a launch: threads, warps, blocks. Plain C++.
#pragma once

#include "kernels/head_params.h"

namespace alphaext::cuda {

constexpr int kThreads = kHeadThreads;
constexpr int kWarp = 32;
// Blocks an SM must have room for: 2 leaves each thread 128 registers, with which no kernel spills. Left unsaid, the compiler
// saves registers at the price of a few spills; asked for 4, it spills more.
constexpr int kMinBlocks = 2;
// Fills the largest card many times over; kernels stride over whatever is left.
constexpr int64_t kMaxBlocks = 65535;
constexpr int64_t kMaxSharedBytes = kHeadSharedBytes;

struct LaunchShape {
  int64_t blocks;  // 0: nothing to do
  int threads;     // a multiple of kWarp, at most kThreads
  int64_t shared_bytes;
};

inline LaunchShape shape_for(int64_t items, int64_t items_per_block, int threads, int64_t shared_bytes = 0) {
  const int64_t blocks = items / items_per_block + (items % items_per_block != 0);
  return {blocks < kMaxBlocks ? blocks : kMaxBlocks, threads, shared_bytes};
}

ALPHAEXT_HOST_DEVICE int64_t padded(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Items [begin, end).
struct Share {
  int64_t begin, end;
};

// What one of `blocks` takes of `items`, where the first `loaded` blocks, not all of them, have more to do than the others, as
// much as `cost` items each. Counting that, a block that takes any has at most one more to do than any other block.
ALPHAEXT_HOST_DEVICE Share fair_share(int64_t items, int64_t block, int64_t blocks, int64_t loaded, int64_t cost) {
  const int64_t others = blocks - loaded;
  if (items <= cost * others) {  // the loaded have enough
    const int64_t other = block - loaded;
    return other < 0 ? Share{0, 0} : Share{items * other / others, items * (other + 1) / others};
  }
  const int64_t all = items + cost * loaded;
  const auto taken = [&](int64_t count) { return all * count / blocks - cost * (count < loaded ? count : loaded); };
  return {taken(block), taken(block + 1)};
}

}  // namespace alphaext::cuda
