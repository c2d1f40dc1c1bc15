// The shim itself: what the kernel tests rest on.
#include "cuda_shim.h"

#include "check.h"

namespace {

void sum_blocks(const int* values, int count, int* sums) {
  ALPHAEXT_DYNAMIC_SHARED(int, stage);
  ALPHAEXT_STATIC_SHARED(int, warp_sums, 2);
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  stage[threadIdx.x] = index < count ? values[index] : 0;
  __syncthreads();
  int sum = stage[blockDim.x - 1 - threadIdx.x];
  for (unsigned step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = warp_sums[0] + warp_sums[1];
}

void warp_functions(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const unsigned all = 0xffffffffu;
  CHECK(__shfl_sync(all, lane * 2.5, 7) == 17.5);
  CHECK(__shfl_xor_sync(all, lane, 5) == (lane ^ 5));
  CHECK(__shfl_down_sync(all, lane, 3) == (lane + 3 < 32 ? lane + 3 : lane));
  CHECK(__shfl_up_sync(all, lane, 3) == (lane >= 3 ? lane - 3 : lane));
  CHECK(__ballot_sync(all, lane % 2 == 1) == 0xaaaaaaaau);
  CHECK(__any_sync(all, lane == 31) == 1 && __any_sync(all, 0) == 0);
  CHECK(__all_sync(all, 1) == 1 && __all_sync(all, lane != 4) == 0);
  out[lane] = lane;
  __syncwarp();
  CHECK(out[31 - lane] == 31 - lane);
}

// Each round every block writes, all meet, and every block reads what another one wrote.
void ring(int rounds, int* cells, int* sums) {
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) cells[blockIdx.x] = static_cast<int>(blockIdx.x) + round;
    shim::grid_barrier();
    if (threadIdx.x == 0) sums[blockIdx.x] += cells[(blockIdx.x + 1) % gridDim.x];
    shim::grid_barrier();
  }
}

// The last block to arrive adds up what all of them wrote; only the fences make that safe.
void last_block(int* parts, unsigned* arrived, int* total, unsigned* largest) {
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  atomicMax(largest, blockIdx.x);
  __threadfence();
  if (atomicAdd(arrived, 1u) != gridDim.x - 1) return;
  __threadfence();
  for (unsigned block = 0; block < gridDim.x; ++block) *total += parts[block];
}

void leaves_a_barrier_out() {
  if (threadIdx.x != 3) __syncthreads();
}

void meets_at_two_places() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

template <typename Function>
bool throws(const Function& function) {
  try {
    function();
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  std::vector<int> values(300);
  for (int i = 0; i < 300; ++i) values[static_cast<std::size_t>(i)] = i;
  std::vector<int> sums(5, -1);
  shim::launch(sum_blocks, {.grid = 5, .block = 64, .shared_bytes = 64 * sizeof(int)}, values.data(), 300, sums.data());
  for (int block = 0; block < 5; ++block) {
    int expected = 0;
    for (int i = block * 64; i < std::min(300, block * 64 + 64); ++i) expected += i;
    CHECK_CLOSE(sums[static_cast<std::size_t>(block)], expected, 0);
  }

  std::vector<int> lanes(32);
  shim::launch(warp_functions, {.block = 32}, lanes.data());

  std::vector<int> cells(4), ring_sums(4);
  shim::launch(ring, {.grid = 4, .block = 33, .cooperative = true}, 6, cells.data(), ring_sums.data());
  for (int block = 0; block < 4; ++block) {
    CHECK_CLOSE(ring_sums[static_cast<std::size_t>(block)], 6 * ((block + 1) % 4) + 15, 0);
  }

  std::vector<int> parts(9);
  unsigned arrived = 0, largest = 0;
  int total = 0;
  shim::launch(last_block, {.grid = 9, .block = 32}, parts.data(), &arrived, &total, &largest);
  CHECK_CLOSE(total, 45, 0);
  CHECK_CLOSE(largest, 8, 0);

  CHECK(throws([] { shim::launch(leaves_a_barrier_out, {.grid = 2, .block = 32}); }));
  CHECK(throws([] { shim::launch(meets_at_two_places, {.grid = 1, .block = 64}); }));
  return check::finish("test_cuda_shim");
}
