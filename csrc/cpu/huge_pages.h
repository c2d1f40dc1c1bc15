// Asks for large pages under a large fresh array.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace alphaext::cpu {

// glibc's malloc, as it comes, maps arrays above this size by themselves: the advice then touches nothing else and ends with
// the array.
constexpr size_t kHugePagesFrom = size_t{1} << 25;

// The first write to a fresh array costs a page fault for every 4 KiB: more, for a gradient of w1, than computing it. Where
// the system leaves large pages to the program's wish, this is the wish; elsewhere it does nothing.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugePagesFrom) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace alphaext::cpu
