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

// Lanes of two vectors that stand end to end: lane i is number from(i) of them.
template <typename Acc, typename From>
static ALPHAEXT_INLINE Vector<Acc> pick(const Vector<Acc>& a, const Vector<Acc>& b, From from) {
#if defined(__clang__)
  Vector<Acc> picked;
  for (int lane = 0; lane < kLanes<Acc>; ++lane) {
    const int at = from(lane);
    picked[lane] = at < kLanes<Acc> ? a[at] : b[at - kLanes<Acc>];
  }
  return picked;
#else
  typename VectorOf<Acc>::integers places{};
  for (int lane = 0; lane < kLanes<Acc>; ++lane) places[lane] = static_cast<decltype(places[0] + 0)>(from(lane));
  return __builtin_shuffle(a, b, places);
#endif
}

// Each of two vectors holds sums of kGroup lanes side by side; one vector with sums of half as many of both.
template <typename Acc, int kGroup>
static ALPHAEXT_INLINE Vector<Acc> merge_lanes(const Vector<Acc>& a, const Vector<Acc>& b) {
  constexpr int kHalf = kGroup / 2;
  return pick<Acc>(a, b, [](int lane) { return lane / kHalf * kGroup + lane % kHalf; }) +
         pick<Acc>(a, b, [](int lane) { return lane / kHalf * kGroup + lane % kHalf + kHalf; });
}

// The sums of the lanes of kCount vectors, in the first lanes of one; each has the same bits whatever kCount.
template <typename Acc, int kCount, int kGroup = kLanes<Acc>>
static ALPHAEXT_INLINE Vector<Acc> lane_sums(const Vector<Acc>* values) {
  if constexpr (kGroup == 1) {
    return values[0];
  } else {
    constexpr int kMerged = kCount > 1 ? kCount / 2 : 1;
    Vector<Acc> merged[kMerged];
    for (int i = 0; i < kMerged; ++i) {
      merged[i] = merge_lanes<Acc, kGroup>(values[kCount > 1 ? 2 * i : 0], values[kCount > 1 ? 2 * i + 1 : 0]);
    }
    return lane_sums<Acc, kMerged, kGroup / 2>(merged);
  }
}

template <typename Acc>
static ALPHAEXT_INLINE Acc lane_sum(const Vector<Acc>& value) {
  return lane_sums<Acc, 1>(&value)[0];
}

// The products of the low halves of lanes of 64 bits and a number of 32. Compilers make three products of this by themselves.
static ALPHAEXT_INLINE VectorOf<double>::integers low_product(const VectorOf<double>::integers& value, uint32_t factor) {
  using Integers = VectorOf<double>::integers;
#if defined(__aarch64__)
  return (Integers)vmull_u32(vmovn_u64((uint64x2_t)value), vdup_n_u32(factor));
#else
  const Integers factors = Integers{} + static_cast<uint64_t>(factor);
#if defined(__x86_64__) && ALPHAEXT_VECTOR_BYTES == 64
  // With a mask: GCC 12 takes what the plain form leaves undefined for a mistake.
  return (Integers)_mm512_maskz_mul_epu32(0xff, (__m512i)value, (__m512i)factors);
#elif defined(__x86_64__) && ALPHAEXT_VECTOR_BYTES == 32
  return (Integers)_mm256_mul_epu32((__m256i)value, (__m256i)factors);
#elif defined(__x86_64__)
  return (Integers)_mm_mul_epu32((__m128i)value, (__m128i)factors);
#else
  return (value & (Integers{} + 0xffffffffu)) * factors;
#endif
#endif
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

// A number that is known when compiling.
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// How many of a class's members come before those that all classes have in the same places, as directions of a residual are.
static inline int64_t count_own_members(const int32_t* member_columns, int64_t num_few, int64_t members) {
  int64_t own = members;
  for (; own > 0 && num_few > 1; --own) {
    for (int64_t f = 1; f < num_few; ++f) {
      if (member_columns[f * members + own - 1] != member_columns[own - 1]) return own;
    }
  }
  return own;
}

// The few scores [F, score_stride] of kVectors vectors of samples. Members from own_members on are common to all classes:
// several classes' sums go over them together. Members are added in their order, so a sum has the same bits wherever own
// ones end. `meanwhile` is called once a class.
template <typename Acc, int kVectors, typename Meanwhile>
static ALPHAEXT_INLINE void mix_few(const Acc* logits, int64_t stride, const int32_t* member_columns, const Acc* alpha, int64_t num_few,
                           int64_t members, int64_t own_members, Acc* scores, int64_t score_stride, Meanwhile meanwhile) {
  using V = Vector<Acc>;
  constexpr int kL = kLanes<Acc>, kAtOnce = ALPHAEXT_VECTOR_BYTES == 64 ? 4 : 2;
  for (int64_t f = 0; f < num_few; ++f) {
    meanwhile();
    V sums[kVectors];
    mix_columns<Acc, kVectors * kL>(logits, stride, member_columns + f * members, alpha + f * members, own_members, sums);
    for (int v = 0; v < kVectors; ++v) store(scores + f * score_stride + v * kL, sums[v]);
  }
  if (own_members == members) return;
  const auto add_common = [&](auto classes, int64_t first, int64_t from, int64_t to) {
    constexpr int kClasses = decltype(classes)::value;
    Acc* const out = scores + first * score_stride;
    V sums[kClasses][kVectors];
    for (int c = 0; c < kClasses; ++c) {
      for (int v = 0; v < kVectors; ++v) sums[c][v] = load(out + c * score_stride + v * kL);
    }
    for (int64_t k = from; k < to; ++k) {
      const Acc* const column = logits + member_columns[k] * stride;
      for (int v = 0; v < kVectors; ++v) {
        const V values = load(column + v * kL);
        for (int c = 0; c < kClasses; ++c) sums[c][v] += alpha[(first + c) * members + k] * values;
      }
    }
    for (int c = 0; c < kClasses; ++c) {
      for (int v = 0; v < kVectors; ++v) store(out + c * score_stride + v * kL, sums[c][v]);
    }
  };
  // So many columns stay in the first-level cache while all classes go over them.
  constexpr int64_t kColumns = 32;
  for (int64_t from = own_members; from < members; from += kColumns) {
    const int64_t to = from + kColumns < members ? from + kColumns : members;
    int64_t f = 0;
    for (; f + kAtOnce <= num_few; f += kAtOnce) add_common(Count<kAtOnce>{}, f, from, to);
    for (; f < num_few; ++f) add_common(Count<1>{}, f, from, to);
  }
}

// The lanes of kLanes vectors as rows of a matrix, transposed.
template <typename Acc, int kDistance = kLanes<Acc> / 2>
static ALPHAEXT_INLINE void transpose(Vector<Acc>* rows) {
  if constexpr (kDistance > 0) {
    for (int i = 0; i < kLanes<Acc>; ++i) {
      if (i & kDistance) continue;
      const Vector<Acc> a = rows[i], b = rows[i + kDistance];
      rows[i] = pick<Acc>(a, b, [](int lane) { return lane & kDistance ? lane - kDistance + kLanes<Acc> : lane; });
      rows[i + kDistance] = pick<Acc>(a, b, [](int lane) { return lane & kDistance ? lane + kLanes<Acc> : lane + kDistance; });
    }
    transpose<Acc, kDistance / 2>(rows);
  }
}
