// Numbers below the smallest normal one as 0, while an object of this class lives.
#pragma once

#include <cstdint>

namespace alphaext::cpu {

// The momentum of a hidden unit that is never active shrinks by the same factor each step, and soon below the smallest normal
// number; there each operation takes an x86 processor some hundred cycles, and some ARM processors longer than others. Beside
// what it is added to, it has long been nothing.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(control()) { set_control(saved_ | kFlush); }
  ~FlushDenormals() { set_control(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__) && defined(__GNUC__)
  static constexpr uint64_t kFlush = 0x8000 | 0x0040;  // results to 0; read as 0
  static uint64_t control() { return __builtin_ia32_stmxcsr(); }
  static void set_control(uint64_t value) { __builtin_ia32_ldmxcsr(static_cast<unsigned>(value)); }
#elif defined(__aarch64__) && defined(__GNUC__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FPCR.FZ: both
  static uint64_t control() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set_control(uint64_t value) { asm volatile("msr fpcr, %0" ::"r"(value) : "memory"); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t control() { return 0; }
  static void set_control(uint64_t) {}
#endif
  const uint64_t saved_;
};

}  // namespace alphaext::cpu
