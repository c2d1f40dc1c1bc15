// The shim's CUDA threads as threads of the system, so that ThreadSanitizer sees what they do to each other.
#pragma once

#include <barrier>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace shim {

// Inside a loop that waits for another thread: others want the processor, which the loop would keep.
inline void pause() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

// The threads outlive a launch, as starting them takes longer than a small kernel, under a sanitizer many times longer.
class Pool {
 public:
  ~Pool() {
    for (const std::unique_ptr<Worker>& worker : workers_) worker->give([] {}, true);
    for (const std::unique_ptr<Worker>& worker : workers_) worker->thread.join();
  }
  // Runs job(0) .. job(count - 1), each on a thread of its own, and returns when all have returned.
  void run(unsigned count, const std::function<void(unsigned)>& job) {
    while (workers_.size() < count) workers_.push_back(std::make_unique<Worker>());
    running_ = count;
    for (unsigned i = 0; i < count; ++i) {
      workers_[i]->give(
          [this, &job, i] {
            job(i);
            const std::lock_guard<std::mutex> lock(mutex_);
            if (--running_ == 0) finished_.notify_one();
          },
          false);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  struct Worker {
    std::mutex mutex;
    std::condition_variable given;
    std::function<void()> job;
    bool last = false;
    std::thread thread{[this] { work(); }};
    void give(std::function<void()> next, bool is_last) {
      const std::lock_guard<std::mutex> lock(mutex);
      job = std::move(next);
      last = is_last;
      given.notify_one();
    }
    void work() {
      for (bool stop = false; !stop;) {
        std::function<void()> next;
        {
          std::unique_lock<std::mutex> lock(mutex);
          given.wait(lock, [this] { return static_cast<bool>(job); });
          next = std::exchange(job, nullptr);
          stop = last;
        }
        next();
      }
    }
  };
  std::vector<std::unique_ptr<Worker>> workers_;
  std::mutex mutex_;
  std::condition_variable finished_;
  unsigned running_ = 0;
};

inline Pool& pool() {
  static Pool shared;
  return shared;
}

}  // namespace shim
