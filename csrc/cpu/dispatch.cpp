// Chooses, once per process, the kernels compiled for the best instruction set that this processor has.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace alphaext::cpu {

namespace simd_default {
extern const Kernels kTable;
}
#if defined(__x86_64__) && defined(__GNUC__)
namespace simd_avx2 {
extern const Kernels kTable;
}
namespace simd_avx512 {
extern const Kernels kTable;
}
#endif

int available_kernels(const Kernels** tables) {
  int count = 0;
  tables[count++] = &simd_default::kTable;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) tables[count++] = &simd_avx2::kTable;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    tables[count++] = &simd_avx512::kTable;
  }
#endif
  return count;
}

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    const Kernels* tables[3];
    const int count = available_kernels(tables);
    const char* wanted = std::getenv("ALPHAEXT_SIMD");
    for (int i = 0; wanted && i < count; ++i) {
      if (std::strcmp(wanted, tables[i]->name) == 0) return tables[i];
    }
    return tables[count - 1];
  }();
  return *chosen;
}

}  // namespace alphaext::cpu
