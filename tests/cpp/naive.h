// What kernels/head_params.h says, loop by loop, in double precision: the reference that every kernel's result is compared
// with.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/head_params.h"

namespace naive {

using Doubles = std::vector<double>;
using Ids = std::vector<int64_t>;

inline std::size_t at(int64_t index) { return static_cast<std::size_t>(index); }

inline Doubles first_layer(int64_t F, int64_t H, int64_t I, const Doubles& z, const Doubles& w1, const Doubles& b1) {
  Doubles preactivation(at(F * H));
  for (int64_t f = 0; f < F; ++f) {
    for (int64_t h = 0; h < H; ++h) {
      double sum = b1[at(f * H + h)];
      for (int64_t i = 0; i < I; ++i) sum += w1[at((f * H + h) * I + i)] * z[at(f * I + i)];
      preactivation[at(f * H + h)] = sum;
    }
  }
  return preactivation;
}

struct FirstLayerGradients {
  Doubles w1, z;
};

inline FirstLayerGradients first_layer_backward(int64_t F, int64_t H, int64_t I, const Doubles& grad_preactivation,
                                                const Doubles& z, const Doubles& w1) {
  FirstLayerGradients out{Doubles(at(F * H * I)), Doubles(at(F * I))};
  for (int64_t f = 0; f < F; ++f) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t i = 0; i < I; ++i) {
        const double gradient = grad_preactivation[at(f * H + h)];
        out.w1[at((f * H + h) * I + i)] = gradient * z[at(f * I + i)];
        out.z[at(f * I + i)] += gradient * w1[at((f * H + h) * I + i)];
      }
    }
  }
  return out;
}

struct Coefficients {
  Doubles raw, alpha;
};

inline Coefficients coefficients(const alphaext::RuleParams& rule, int64_t F, int64_t H, int64_t M, bool shared,
                                 const Doubles& preactivation, const Doubles& w2, const Doubles& b2) {
  Coefficients out{Doubles(at(F * M)), Doubles(at(F * M))};
  for (int64_t f = 0; f < F; ++f) {
    const int64_t w = shared ? 0 : f;
    for (int64_t k = 0; k < M; ++k) {
      double sum = b2[at(w * M + k)];
      for (int64_t h = 0; h < H; ++h) {
        const double value = preactivation[at(f * H + h)];
        sum += w2[at((w * M + k) * H + h)] * (value > 0 ? value : 0);
      }
      out.raw[at(f * M + k)] = sum;
    }
    alphaext::rule_forward(rule, M, &out.raw[at(f * M)], &out.alpha[at(f * M)]);
  }
  return out;
}

struct CoefficientGradients {
  Doubles raw, w2, b2, preactivation;
};

inline CoefficientGradients coefficients_backward(const alphaext::RuleParams& rule, int64_t F, int64_t H, int64_t M,
                                                  bool shared, const Doubles& preactivation, const Doubles& raw,
                                                  const Doubles& w2, const Doubles& grad_alpha) {
  CoefficientGradients out{Doubles(at(F * M)), Doubles(at(F * M * H)), Doubles(at(F * M)), Doubles(at(F * H))};
  for (int64_t f = 0; f < F; ++f) {
    const int64_t w = shared ? 0 : f;
    alphaext::rule_backward(rule, M, &raw[at(f * M)], &grad_alpha[at(f * M)], &out.raw[at(f * M)]);
    for (int64_t k = 0; k < M; ++k) {
      const double gradient = out.raw[at(f * M + k)];
      out.b2[at(f * M + k)] = gradient;
      for (int64_t h = 0; h < H; ++h) {
        const double value = preactivation[at(f * H + h)];
        out.w2[at((f * M + k) * H + h)] = gradient * (value > 0 ? value : 0);
        if (value > 0) out.preactivation[at(f * H + h)] += gradient * w2[at((w * M + k) * H + h)];
      }
    }
  }
  return out;
}

inline bool known(int64_t id, int64_t N) { return id >= 0 && id < N; }

// What coefficient k of a class multiplies. Out-of-range neighbours count as NaN (the CUDA kernels' rule; on a CPU the caller
// has refused them).
inline double mixed(int64_t N, const Doubles& logits, const Doubles& bias, int64_t b, int64_t k, int64_t id) {
  if (!known(id, N)) return std::numeric_limits<double>::quiet_NaN();
  return logits[at(b * N + id)] - (k > 0 && !bias.empty() ? bias[at(id)] : 0);
}

inline Doubles mix(int64_t batch, int64_t N, int64_t F, int64_t M, const Ids& ids, const Doubles& alpha,
                   const Doubles& logits, const Doubles& bias) {
  Doubles scores = logits;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t f = 0; f < F; ++f) {
      const int64_t own = ids[at(f * M)];
      if (!known(own, N)) continue;
      double sum = 0;
      for (int64_t k = 0; k < M; ++k) sum += alpha[at(f * M + k)] * mixed(N, logits, bias, b, k, ids[at(f * M + k)]);
      scores[at(b * N + own)] = sum;
    }
  }
  return scores;
}

struct MixGradients {
  Doubles alpha, logits;
};

inline MixGradients mix_backward(int64_t batch, int64_t N, int64_t F, int64_t M, const Ids& ids, const Doubles& alpha,
                                 const Doubles& logits, const Doubles& bias, const Doubles& grad_scores) {
  MixGradients out{Doubles(at(F * M)), grad_scores};
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t f = 0; f < F; ++f) {
      if (known(ids[at(f * M)], N)) out.logits[at(b * N + ids[at(f * M)])] = 0;
    }
    for (int64_t f = 0; f < F; ++f) {
      const int64_t own = ids[at(f * M)];
      if (!known(own, N)) continue;
      const double gradient = grad_scores[at(b * N + own)];
      for (int64_t k = 0; k < M; ++k) {
        const int64_t id = ids[at(f * M + k)];
        out.alpha[at(f * M + k)] += gradient * mixed(N, logits, bias, b, k, id);
        if (known(id, N)) out.logits[at(b * N + id)] += gradient * alpha[at(f * M + k)];
      }
    }
  }
  return out;
}

// out[r, c] = sum_d left[r, d] right[c, d] + bias[c]; no bias where it is empty.
inline Doubles linear(int64_t rows, int64_t columns, int64_t depth, const Doubles& left, const Doubles& right,
                      const Doubles& bias) {
  Doubles out(at(rows * columns));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      double sum = bias.empty() ? 0 : bias[at(c)];
      for (int64_t d = 0; d < depth; ++d) sum += left[at(r * depth + d)] * right[at(c * depth + d)];
      out[at(r * columns + c)] = sum;
    }
  }
  return out;
}

struct LinearGradients {
  Doubles left, right, bias;
};

inline LinearGradients linear_backward(int64_t rows, int64_t columns, int64_t depth, const Doubles& left, const Doubles& right,
                                       const Doubles& grad_out) {
  LinearGradients out{Doubles(at(rows * depth)), Doubles(at(columns * depth)), Doubles(at(columns))};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const double gradient = grad_out[at(r * columns + c)];
      out.bias[at(c)] += gradient;
      for (int64_t d = 0; d < depth; ++d) {
        out.left[at(r * depth + d)] += gradient * right[at(c * depth + d)];
        out.right[at(c * depth + d)] += gradient * left[at(r * depth + d)];
      }
    }
  }
  return out;
}

// The sum over the leading dimension.
inline Doubles sum_rows(int64_t rows, int64_t columns, const Doubles& values) {
  Doubles out(at(columns));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) out[at(c)] += values[at(r * columns + c)];
  }
  return out;
}

}  // namespace naive
