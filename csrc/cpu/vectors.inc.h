// Short vectors of the active instruction set, for the loops that a compiler does not turn into them by itself. Included once
// per instruction set, inside a namespace of its own; no include guard and no includes for that reason.

#define ALPHAEXT_INLINE inline __attribute__((always_inline))

template <typename Acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(ALPHAEXT_VECTOR_BYTES)));
  typedef uint32_t integers __attribute__((vector_size(ALPHAEXT_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(ALPHAEXT_VECTOR_BYTES)));
  typedef uint64_t integers __attribute__((vector_size(ALPHAEXT_VECTOR_BYTES)));
};
template <typename Acc>
using Vector = typename VectorOf<Acc>::type;
template <typename Acc>
constexpr int kLanes = ALPHAEXT_VECTOR_BYTES / static_cast<int>(sizeof(Acc));

template <typename Acc>
static ALPHAEXT_INLINE Vector<Acc> load(const Acc* from) {
  Vector<Acc> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename Acc>
static ALPHAEXT_INLINE void store(Acc* to, const Vector<Acc>& value) {
  std::memcpy(to, &value, sizeof(value));
}

template <typename Acc>
static ALPHAEXT_INLINE Vector<Acc> all(Acc value) {
  return value - Vector<Acc>{};
}

template <typename Acc>
static ALPHAEXT_INLINE Acc lane_sum(const Vector<Acc>& value) {
  Acc sum = 0;
  for (int lane = 0; lane < kLanes<Acc>; ++lane) sum += value[lane];
  return sum;
}

// max(value, 0) that keeps NaN, as torch.relu does.
template <typename Acc>
static ALPHAEXT_INLINE Vector<Acc> relu_of(const Vector<Acc>& value) {
  return value <= Vector<Acc>{} ? Vector<Acc>{} : value;
}

template <typename Acc>
struct ExponentialConstants;
template <>
struct ExponentialConstants<float> {
  static constexpr float lowest = -87.0f, log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: added, it leaves the integer nearest in the low bits
  static constexpr int degree = 7, mantissa_bits = 23;
  static constexpr uint32_t one = 0x3f800000;
};
template <>
struct ExponentialConstants<double> {
  static constexpr double lowest = -708.0, log2_e = 1.4426950408889634, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double to_integer = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int degree = 13, mantissa_bits = 52;
  static constexpr uint64_t one = 0x3ff0000000000000;
};

// e^x for x <= 0 to about the last bit; 0 where it is below the smallest normal number, NaN for NaN.
template <typename Acc>
static ALPHAEXT_INLINE Vector<Acc> exponential(const Vector<Acc>& x) {
  using C = ExponentialConstants<Acc>;
  using Integers = typename VectorOf<Acc>::integers;
  constexpr double kInverseFactorials[] = {1.0,        1.0,         1.0 / 2,         1.0 / 6,         1.0 / 24,
                                           1.0 / 120,  1.0 / 720,   1.0 / 5040,      1.0 / 40320,     1.0 / 362880,
                                           1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, so that the difference loses nothing.
  const Vector<Acc> shifted = x * C::log2_e + C::to_integer;
  const Vector<Acc> n = shifted - C::to_integer;
  const Vector<Acc> r = (x - n * C::ln2_high) - n * C::ln2_low;
  Vector<Acc> sum = all(static_cast<Acc>(kInverseFactorials[C::degree]));
  for (int i = C::degree - 1; i >= 0; --i) sum = sum * r + static_cast<Acc>(kInverseFactorials[i]);
  // The integer sits in the low bits of `shifted`; the shift moves it into the exponent and all else out. (A
  // cast between vector types keeps the bits.)
  const Integers power = ((Integers)shifted << C::mantissa_bits) + C::one;
  const Vector<Acc> result = sum * (Vector<Acc>)power;
  return x < all(static_cast<Acc>(C::lowest)) ? Vector<Acc>{} : result;
}

// For `kWidth` samples: sum_k alpha[k] * column k, a column being at logits + columns[k] * stride. The sums stay in registers.
template <typename Acc, int kWidth>
static ALPHAEXT_INLINE void mix_columns(const Acc* logits, int64_t stride, const int32_t* columns, const Acc* alpha,
                                        int64_t members, Vector<Acc>* sums) {
  constexpr int kVectors = kWidth / kLanes<Acc>;
  for (int v = 0; v < kVectors; ++v) sums[v] = Vector<Acc>{};
  for (int64_t k = 0; k < members; ++k) {
    const Acc* const column = logits + columns[k] * stride;
    for (int v = 0; v < kVectors; ++v) sums[v] += alpha[k] * load(column + v * kLanes<Acc>);
  }
}
