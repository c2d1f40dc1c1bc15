// float16 and bfloat16: every bit pattern, every rounding boundary.
#include <bit>
#include <cstdint>
#include <limits>
#include <random>

#include "check.h"
#include "kernels/scalars.h"

using namespace alphaext;

namespace {

float16 round_to(float value, float16) { return to_float16(value); }
bfloat16 round_to(float value, bfloat16) { return to_bfloat16(value); }

// The value of a bit pattern by its definition: sign, exponent bits, fraction bits.
double defined_value(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double sign = (bits >> 15) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

template <typename T>
void test_every_pattern(int exponent_bits) {
  for (unsigned pattern = 0; pattern < 65536; ++pattern) {
    const T value{static_cast<uint16_t>(pattern)};
    const float wide = widen(value);
    const double expected = defined_value(value.bits, exponent_bits);
    CHECK_CLOSE(wide, expected, 0);
    if (std::isnan(expected)) {
      CHECK(std::isnan(widen(round_to(wide, T{}))));
    } else {
      CHECK(std::signbit(wide) == (pattern >= 32768));
      CHECK(round_to(wide, T{}).bits == pattern);  // there and back
    }
  }
}

// Between neighbouring numbers lies one boundary: exactly half way the even one wins, a hair to either side the nearer one.
template <typename T>
void test_every_boundary(int exponent_bits) {
  const unsigned infinity = ((1u << exponent_bits) - 1) << (15 - exponent_bits);
  for (unsigned pattern = 0; pattern < infinity; ++pattern) {
    const double low = defined_value(static_cast<uint16_t>(pattern), exponent_bits);
    // Above the largest finite number the next step of the same size would follow; from half way to it on, infinity.
    const double high = pattern + 1 < infinity
                            ? defined_value(static_cast<uint16_t>(pattern + 1), exponent_bits)
                            : 2 * low - defined_value(static_cast<uint16_t>(pattern - 1), exponent_bits);
    const float middle = static_cast<float>((low + high) / 2);
    CHECK_CLOSE(middle, (low + high) / 2, 0);
    const unsigned even = pattern % 2 == 0 ? pattern : pattern + 1;
    const float inf = std::numeric_limits<float>::infinity();
    CHECK(round_to(middle, T{}).bits == even);
    CHECK(round_to(-middle, T{}).bits == (even | 0x8000u));
    CHECK(round_to(std::nextafterf(middle, 0.0f), T{}).bits == pattern);
    CHECK(round_to(-std::nextafterf(middle, 0.0f), T{}).bits == (pattern | 0x8000u));
    CHECK(round_to(std::nextafterf(middle, inf), T{}).bits == pattern + 1);
  }
}

template <typename T>
void test_extremes(unsigned infinity) {
  using limits = std::numeric_limits<float>;
  CHECK(round_to(limits::infinity(), T{}).bits == infinity);
  CHECK(round_to(-limits::infinity(), T{}).bits == (infinity | 0x8000u));
  CHECK(round_to(limits::max(), T{}).bits == infinity);
  CHECK(round_to(-limits::max(), T{}).bits == (infinity | 0x8000u));
  CHECK(round_to(0.0f, T{}).bits == 0);
  CHECK(round_to(-0.0f, T{}).bits == 0x8000u);
  CHECK(round_to(limits::denorm_min(), T{}).bits == 0);
  // NaNs whose payload sits in the bits that are cut off must not become infinities.
  for (uint32_t payload = 1; payload < 0x800000u; payload <<= 1) {
    for (const uint32_t sign : {0u, 0x80000000u}) {
      CHECK(std::isnan(widen(round_to(float_of(sign | 0x7f800000u | payload), T{}))));
    }
  }
  CHECK(std::isnan(widen(round_to(float_of(0x7fffffffu), T{}))));
}

// The compiler's own half precision, where it has one; GCC 12 has it for ARM under an older name only.
#if defined(__aarch64__)
using Half = __fp16;
#elif defined(__FLT16_MANT_DIG__)
using Half = _Float16;
#endif

void test_against_compiler() {
  std::mt19937 random(1);
  for (int i = 0; i < 1000000; ++i) {
    const float value = float_of(static_cast<uint32_t>(random()));
    if (std::isnan(value)) continue;
#if defined(__aarch64__) || defined(__FLT16_MANT_DIG__)
    CHECK(to_float16(value).bits == std::bit_cast<uint16_t>(static_cast<Half>(value)));
#endif
#if defined(__BFLT16_MANT_DIG__)
    CHECK(to_bfloat16(value).bits == std::bit_cast<uint16_t>(static_cast<__bf16>(value)));
#endif
  }
}

void test_narrow() {
  CHECK(narrow<float>(0.1f) == 0.1f);
  CHECK(narrow<double>(0.1) == 0.1);
  CHECK(narrow<float16>(1.0f).bits == 0x3c00u);
  CHECK(narrow<bfloat16>(1.0f).bits == 0x3f80u);
  static_assert(sizeof(accumulate_t<double>) == 8 && sizeof(accumulate_t<float>) == 4);
  static_assert(sizeof(accumulate_t<float16>) == 4 && sizeof(accumulate_t<bfloat16>) == 4);
}

}  // namespace

int main() {
  test_every_pattern<float16>(5);
  test_every_pattern<bfloat16>(8);
  test_every_boundary<float16>(5);
  test_every_boundary<bfloat16>(8);
  test_extremes<float16>(0x7c00u);
  test_extremes<bfloat16>(0x7f80u);
  test_against_compiler();
  test_narrow();
  return check::finish("test_scalars");
}
