// Runs CUDA kernel text on CPU threads, one std::thread per CUDA thread, so that the sanitizers can watch it: indices under
// AddressSanitizer and UndefinedBehaviorSanitizer, races within a block and between blocks under ThreadSanitizer. It proves
// logic, not speed, and no more of the GPU's memory order than data races show.
//
//   shim::launch(kernel<float>, {.grid = 3, .block = 64, .shared_bytes = 48}, params, ...);
//   shim::launch(kernel<float>, {.grid = 3, .block = 64, .cooperative = true}, params, ...);   // grid_barrier() works
//
// With SHIM_FIBERS defined the threads are fibers of one thread: a hundred times faster, and blind to races. Then the
// launchers' own text can run, too (cuda_runtime_shim.h).
//
// Two blocks run at a time, all of them in a cooperative launch. Shared memory comes at its exact size, filled with 0xff (NaN)
// before every block. Threads that disagree on the barriers they pass make launch() throw. Static shared memory is written
// ALPHAEXT_STATIC_SHARED(type, name, count): a plain `__shared__` would be one array for all the blocks that run together, so
// it is not defined here. Warp functions want all 32 lanes.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define ALPHAEXT_UNROLL(count)
#define ALPHAEXT_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(shim::dynamic_shared())
#define ALPHAEXT_STATIC_SHARED(type, name, count) \
  static constexpr char name##_key = 0;           \
  type* const name = static_cast<type*>(shim::static_shared(&name##_key, sizeof(type) * (count)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace shim {

constexpr unsigned kLanes = 32;

[[noreturn]] inline void fail(const char* what, const std::source_location& where) {
  std::fprintf(stderr, "%s:%u: %s\n", where.file_name(), static_cast<unsigned>(where.line()), what);
  std::abort();
}

#if defined(SHIM_FIBERS)
class Barrier;
#else
using Barrier = std::barrier<>;
#endif
struct Block;
struct Warp;

// Where a CUDA thread is.
struct Thread {
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned index = 0, lane = 0, parity = 0;
  Barrier* grid = nullptr;
};
inline thread_local Thread self;

}  // namespace shim

// Barrier, pause() and pool(), which runs many jobs that wait for each other.
#if defined(SHIM_FIBERS)
#include "shim_fibers.h"
#else
#include "shim_threads.h"
#endif

namespace shim {

struct Warp {
  unsigned lanes = 0;
  std::optional<Barrier> barrier;
  // Two sets of slots in turn: nobody can write a set again before everyone has read it, so one barrier a call is enough.
  alignas(16) unsigned char slots[2][kLanes][16];
};

// What the threads of one block share while they run it.
struct Block {
  std::optional<Barrier> barrier;
  std::vector<Warp> warps;
  std::unique_ptr<std::byte[]> dynamic_shared;
  std::map<const void*, std::unique_ptr<std::byte[]>> static_shared;
  std::mutex static_shared_mutex;
  std::vector<std::uint64_t> block_trail, warp_trail;  // per thread: which barriers it passed, as a hash of their places
};

inline void follow(std::uint64_t& trail, const std::source_location& where) {
  trail = (trail ^ (where.line() * 4096u + where.column())) * 0x9e3779b97f4a7c15u + 1;
}

inline void* dynamic_shared() { return self.block->dynamic_shared.get(); }

inline void* static_shared(const void* key, std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(self.block->static_shared_mutex);
  std::unique_ptr<std::byte[]>& memory = self.block->static_shared[key];
  if (!memory) {
    memory.reset(new std::byte[bytes]);
    std::memset(memory.get(), 0xff, bytes);
  }
  return memory.get();
}

inline void warp_barrier(unsigned mask, const std::source_location& where) {
  if (mask != 0xffffffffu) fail("the shim's warp functions want the full mask", where);
  if (self.warp->lanes != kLanes) fail("a warp function in a warp of fewer than 32 threads", where);
  follow(self.block->warp_trail[self.index], where);
  self.warp->barrier->arrive_and_wait();
}

// Every lane's value, valid until this thread's next warp function.
template <typename T>
struct Lanes {
  unsigned char (*slots)[16];
  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof(T));
    return value;
  }
};

template <typename T>
Lanes<T> exchange(unsigned mask, T value, const std::source_location& where) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  unsigned char(*slots)[16] = self.warp->slots[self.parity];
  self.parity ^= 1u;
  std::memcpy(slots[self.lane], &value, sizeof(T));
  warp_barrier(mask, where);
  return {slots};
}

// All threads of a cooperative launch.
inline void grid_barrier(const std::source_location& where = std::source_location::current()) {
  if (self.grid == nullptr) fail("a grid barrier outside a cooperative launch", where);
  follow(self.block->block_trail[self.index], where);
  self.grid->arrive_and_wait();
}

struct LaunchConfig {
  unsigned grid = 1;
  unsigned block = 32;
  std::size_t shared_bytes = 0;
  bool cooperative = false;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, const Arguments&... arguments) {
  const unsigned teams = config.cooperative || config.grid < 2 ? config.grid : 2;
  std::atomic<bool> diverged{false};
  Barrier grid(static_cast<std::ptrdiff_t>(config.grid) * config.block);
  std::vector<std::unique_ptr<Block>> blocks(teams);
  std::vector<std::unique_ptr<Barrier>> turns;

  const auto prepare = [&](Block& block) {
    block.barrier.emplace(config.block);
    block.warps = std::vector<Warp>((config.block + kLanes - 1) / kLanes);
    for (unsigned w = 0; w < block.warps.size(); ++w) {
      block.warps[w].lanes = std::min(kLanes, config.block - w * kLanes);
      block.warps[w].barrier.emplace(block.warps[w].lanes);
    }
    block.dynamic_shared.reset(new std::byte[config.shared_bytes]);
    std::memset(block.dynamic_shared.get(), 0xff, config.shared_bytes);
    block.static_shared.clear();
    block.block_trail.assign(config.block, 0);
    block.warp_trail.assign(config.block, 0);
  };
  const auto inspect = [&](const Block& block) {
    for (unsigned t = 0; t < config.block; ++t) {
      if (block.block_trail[t] != block.block_trail[0] || block.warp_trail[t] != block.warp_trail[t / kLanes * kLanes]) {
        diverged = true;
      }
    }
  };
  const auto run = [&](unsigned team, unsigned thread) {
    Block& block = *blocks[team];
    blockDim = dim3(config.block);
    gridDim = dim3(config.grid);
    threadIdx = dim3(thread, 0, 0);
    for (unsigned index = team; index < config.grid; index += teams) {
      Warp& warp = block.warps[thread / kLanes];
      self = Thread{&block, &warp, thread, thread % kLanes, 0, config.cooperative ? &grid : nullptr};
      blockIdx = dim3(index, 0, 0);
      kernel(static_cast<Parameters>(arguments)...);
      // A thread that has returned holds nobody up; the trails tell whether it should have stayed.
      block.barrier->arrive_and_drop();
      block.warps[thread / kLanes].barrier->arrive_and_drop();
      turns[team]->arrive_and_wait();
      if (thread == 0) {
        inspect(block);
        prepare(block);
      }
      turns[team]->arrive_and_wait();
    }
    if (config.cooperative) grid.arrive_and_drop();
  };

  for (std::unique_ptr<Block>& block : blocks) {
    block = std::make_unique<Block>();
    prepare(*block);
    turns.push_back(std::make_unique<Barrier>(config.block));
  }
  pool().run(teams * config.block, [&](unsigned worker) { run(worker / config.block, worker % config.block); });
  if (diverged) throw std::runtime_error("threads of one block or warp passed different barriers");
}

}  // namespace shim

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  shim::follow(shim::self.block->block_trail[shim::self.index], where);
  shim::self.block->barrier->arrive_and_wait();
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const std::source_location& where = std::source_location::current()) {
  shim::warp_barrier(mask, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, const std::source_location& where = std::source_location::current()) {
  return shim::exchange(mask, value, where)[static_cast<unsigned>(lane) % shim::kLanes];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const std::source_location& where = std::source_location::current()) {
  const unsigned source = shim::self.lane ^ static_cast<unsigned>(lanes);
  return shim::exchange(mask, value, where)[source < shim::kLanes ? source : shim::self.lane];
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                   const std::source_location& where = std::source_location::current()) {
  const unsigned source = shim::self.lane + delta;
  return shim::exchange(mask, value, where)[source < shim::kLanes ? source : shim::self.lane];
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta,
                 const std::source_location& where = std::source_location::current()) {
  const unsigned lane = shim::self.lane;
  return shim::exchange(mask, value, where)[lane >= delta ? lane - delta : lane];
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              const std::source_location& where = std::source_location::current()) {
  const shim::Lanes<int> lanes = shim::exchange(mask, predicate, where);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < shim::kLanes; ++lane) bits |= (lanes[lane] != 0 ? 1u : 0u) << lane;
  return bits;
}

inline int __any_sync(unsigned mask, int predicate,
                      const std::source_location& where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) != 0u;
}

inline int __all_sync(unsigned mask, int predicate,
                      const std::source_location& where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) == 0xffffffffu;
}

inline int __ffs(int bits) { return bits == 0 ? 0 : __builtin_ctz(static_cast<unsigned>(bits)) + 1; }

// Atomics order nothing but themselves, as on a GPU: only a fence makes other writes visible. The fence is a read-modify-write
// of one word, because ThreadSanitizer does not understand std::atomic_thread_fence.
namespace shim {
inline std::atomic<unsigned> fence_word{0};
}
inline void __threadfence() { shim::fence_word.fetch_add(0, std::memory_order_acq_rel); }
inline void __threadfence_block() { __threadfence(); }

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  std::atomic_ref<T> shared(*address);
  T seen = shared.load(std::memory_order_relaxed);
  while (seen < value && !shared.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
  return seen;
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  std::atomic_ref<T> shared(*address);
  T seen = shared.load(std::memory_order_relaxed);
  while (value < seen && !shared.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
  return seen;
}
