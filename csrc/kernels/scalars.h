// The element types a kernel may read or write, for host and device code alike.
//
// float16 and bfloat16 are storage only: kernels widen to `accumulate_t<T>`, compute, and round once on the way out.
// The conversions are plain integer arithmetic so that the same text runs on a GPU, on a CPU and under sanitizers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ALPHAEXT_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define ALPHAEXT_HOST_DEVICE inline __attribute__((always_inline))
#else
#define ALPHAEXT_HOST_DEVICE inline
#endif

namespace alphaext {

enum class ScalarType : int32_t { Float32, Float64, Float16, BFloat16 };

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

ALPHAEXT_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

ALPHAEXT_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

ALPHAEXT_HOST_DEVICE float widen(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

ALPHAEXT_HOST_DEVICE float widen(float16 value) {
  // Moving the exponent and mantissa into place and multiplying by 2^112 re-biases normal and subnormal numbers alike.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * float_of(0x77800000u));
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their mantissa
  return float_of(sign | (magnitude >= 0x0f800000u ? special : finite));
}

ALPHAEXT_HOST_DEVICE float widen(float value) { return value; }
ALPHAEXT_HOST_DEVICE double widen(double value) { return value; }

// Round to nearest, ties to even, as PyTorch does.
ALPHAEXT_HOST_DEVICE bfloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bfloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

ALPHAEXT_HOST_DEVICE float16 to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x47800000u) {  // 65536 and above, infinity, NaN
    return float16{static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u))};
  }
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 lets the float adder align and round the mantissa.
    return float16{static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u);  // re-bias by -112, round to even
  return float16{static_cast<uint16_t>(sign | (rounded >> 13))};
}

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

template <typename T>
ALPHAEXT_HOST_DEVICE T narrow(accumulate_t<T> value) {
  return static_cast<T>(value);
}
template <>
ALPHAEXT_HOST_DEVICE bfloat16 narrow<bfloat16>(float value) {
  return to_bfloat16(value);
}
template <>
ALPHAEXT_HOST_DEVICE float16 narrow<float16>(float value) {
  return to_float16(value);
}

}  // namespace alphaext
