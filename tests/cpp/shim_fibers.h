// The shim's CUDA threads as fibers of the thread that launches: each runs until it has to wait for others. A switch costs less
// than a microsecond, so blocks of the GPU's own size are no burden; but only one fiber runs at a time, and no race shows.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

namespace shim {

// What a fiber sees of the machine, kept while others run.
struct Seen {
  dim3 thread, block, block_size, grid_size;
  Thread self;
};
inline Seen see() { return {threadIdx, blockIdx, blockDim, gridDim, self}; }
inline void look_as(const Seen& seen) {
  threadIdx = seen.thread, blockIdx = seen.block, blockDim = seen.block_size, gridDim = seen.grid_size;
  self = seen.self;
}

// Runs jobs as fibers, in turns.
class Pool {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    for (const std::unique_ptr<Fiber>& fiber : fibers_) munmap(fiber->stack, kStackBytes);
  }

  // Runs job(0) .. job(count - 1), each in a fiber of its own, and returns when all have returned.
  void run(unsigned count, const std::function<void(unsigned)>& job) {
    while (fibers_.size() < count) add();
    left_ = count;
    job_ = &job;
    ready_.clear();
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.index = i;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Pool::start, 0);
      ready_.push_back(&fiber);
    }
    switch_to_next(&outside_);
  }

  // The fiber that runs now.
  void* current() const { return current_; }
  // Lets the others run; returns when `wake` has been called for this fiber.
  void sleep() { switch_to_next(&current_->context); }
  void wake(void* fiber) { ready_.push_back(static_cast<Fiber*>(fiber)); }
  // Lets the others run once.
  void yield() {
    ready_.push_back(current_);
    sleep();
  }

 private:
  static constexpr std::size_t kStackBytes = 256 * 1024;  // reserved; what is never touched takes no memory

  struct Fiber {
    ucontext_t context;
    void* stack = nullptr;
    unsigned index = 0;
    Seen seen;
  };

  void add() {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber->stack == MAP_FAILED) {
      std::fprintf(stderr, "the shim has no memory for the stack of another fiber\n");
      std::abort();
    }
    fibers_.push_back(std::move(fiber));
  }

  // Leaves `from`, whose fiber is on no list or already on one, for the fiber that is ready first.
  void switch_to_next(ucontext_t* from) {
    if (current_ != nullptr) current_->seen = see();
    if (ready_.empty()) {
      std::fprintf(stderr, "deadlock: %u CUDA threads wait for others that do not come\n", left_);
      std::abort();
    }
    current_ = ready_.front();
    ready_.pop_front();
    look_as(current_->seen);
    if (&current_->context != from) swapcontext(from, &current_->context);  // comes back as the current one
  }

  static void start();

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::deque<Fiber*> ready_;
  ucontext_t outside_;
  Fiber* current_ = nullptr;
  const std::function<void(unsigned)>* job_ = nullptr;
  unsigned left_ = 0;
};

inline Pool& pool() {
  static thread_local Pool mine;
  return mine;
}

inline void Pool::start() {
  Pool& pool = shim::pool();
  (*pool.job_)(pool.current_->index);
  Fiber* const done = pool.current_;
  if (--pool.left_ == 0) {
    pool.current_ = nullptr;
    setcontext(&pool.outside_);
  }
  pool.switch_to_next(&done->context);  // nobody wakes this one again
}

inline void pause() { pool().yield(); }

// As std::barrier.
class Barrier {
 public:
  explicit Barrier(std::ptrdiff_t expected) : expected_(expected) {}
  void arrive_and_wait() {
    if (++arrived_ == expected_) return release();
    waiting_.push_back(pool().current());
    pool().sleep();
  }
  void arrive_and_drop() {
    if (--expected_ == arrived_) release();
  }

 private:
  void release() {
    arrived_ = 0;
    for (void* const fiber : waiting_) pool().wake(fiber);
    waiting_.clear();
  }
  std::ptrdiff_t expected_, arrived_ = 0;
  std::vector<void*> waiting_;
};

}  // namespace shim
