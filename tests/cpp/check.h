// The whole test framework: checks that print where and what, and an exit status.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdio>
#include <mutex>
#include <string>

namespace check {

inline std::atomic<int> checks{0};
inline std::atomic<int> failures{0};
inline std::mutex print_mutex;
inline std::string context;  // what is being tested, printed with every failure; set it while one thread runs

inline void report(const char* file, int line, const std::string& what) {
  if (++failures > 20) return;  // one broken loop must not hide the first messages
  const std::lock_guard<std::mutex> lock(print_mutex);
  std::fprintf(stderr, "%s:%d: %s%s%s\n", file, line, what.c_str(), context.empty() ? "" : "   in ", context.c_str());
}

// A NaN is close to a NaN alone, an infinity to itself alone.
inline bool is_close(double actual, double expected, double tolerance) {
  if (std::isnan(expected) || std::isnan(actual)) return std::isnan(expected) && std::isnan(actual);
  if (std::isinf(expected) || std::isinf(actual)) return expected == actual;
  return std::fabs(actual - expected) <= tolerance;
}

inline void check(bool passed, const char* file, int line, const char* what) {
  ++checks;
  if (!passed) report(file, line, what);
}

inline void check_close(double actual, double expected, double tolerance, const char* file, int line, const char* actual_text,
                        const char* expected_text) {
  ++checks;
  if (is_close(actual, expected, tolerance)) return;
  char text[512];
  std::snprintf(text, sizeof(text), "%s is %.17g, expected %s = %.17g within %.3g", actual_text, actual, expected_text,
                expected, tolerance);
  report(file, line, text);
}

inline int finish(const char* name) {
  std::printf("%s: %d checks, %d failed\n", name, checks.load(), failures.load());
  return failures.load() == 0 && checks.load() > 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition) check::check(static_cast<bool>(condition), __FILE__, __LINE__, #condition)

#define CHECK_CLOSE(actual, expected, tolerance)                                                    \
  check::check_close(static_cast<double>(actual), static_cast<double>(expected),                    \
                     static_cast<double>(tolerance), __FILE__, __LINE__, #actual, #expected)
