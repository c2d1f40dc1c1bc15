// Numbers below the smallest normal one as 0, while an object of this class lives.
#pragma once

namespace alphaext::cpu {

// The momentum of a hidden unit that is never active shrinks by the same factor each step, and soon below the smallest normal
// number; there each operation takes an x86 processor some hundred cycles. Beside what it is added to, it has long been
// nothing.
class FlushDenormals {
 public:
#if defined(__x86_64__) && defined(__GNUC__)
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | kFlushResults | kReadAsZero); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  static constexpr unsigned kFlushResults = 0x8000, kReadAsZero = 0x0040;
  const unsigned saved_;
#else
  FlushDenormals() {}  // other processors take no longer for them
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace alphaext::cpu
