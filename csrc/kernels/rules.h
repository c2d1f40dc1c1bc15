// The coefficient rules: how a sub-module's K+1 raw outputs become the coefficients alpha (paper, section 3.2).
//
// `alphaext/reference.py` states the same rules in PyTorch; both backends run this text.
#pragma once

#include <cmath>

#include "kernels/scalars.h"

namespace alphaext {

enum class Rule : int32_t { Softmax, Clamp, L1 };

// The paper's interval (0, gamma] is open at 0. This is the smallest positive number that is normal in every dtype.
constexpr double kAlphaFloor = 1.0 / 16384;
// Keeps the l1 rule finite where all neighbours' outputs are 0.
constexpr double kNormFloor = 1e-12;

struct RuleParams {
  Rule rule;
  double gamma;
  // Let a clamped coefficient's gradient through when a descent step would move it back inside.
  bool projected_gradient;
};

template <typename Acc>
ALPHAEXT_HOST_DEVICE Acc absolute(Acc value) {
  return value < Acc(0) ? -value : value;
}

// Does the gradient pass a clamp to [low, high]? Descent moves `value` against `gradient`.
template <typename Acc>
ALPHAEXT_HOST_DEVICE bool gradient_passes(Acc value, Acc low, Acc high, Acc gradient, bool projected) {
  if (value > high) return projected && gradient > Acc(0);
  if (value < low) return projected && gradient < Acc(0);
  return true;
}

// alpha[k] for one class from raw[k], k = 0 .. members-1; members = K + 1 >= 2. `alpha` may be `raw`.
template <typename Acc>
ALPHAEXT_HOST_DEVICE void rule_forward(const RuleParams& params, int64_t members, const Acc* raw, Acc* alpha) {
  const Acc gamma = static_cast<Acc>(params.gamma);
  if (params.rule == Rule::Clamp) {
    const Acc low = gamma < Acc(kAlphaFloor) ? gamma : Acc(kAlphaFloor);
    const Acc own = raw[0];
    for (int64_t k = 1; k < members; ++k) alpha[k] = raw[k];
    alpha[0] = own > gamma ? gamma : (own < low ? low : own);
  } else if (params.rule == Rule::Softmax) {
    const Acc floor = (Acc(1) - gamma) / static_cast<Acc>(members - 1);
    Acc largest = raw[0];
    for (int64_t k = 1; k < members; ++k) largest = raw[k] > largest ? raw[k] : largest;
    Acc total = 0;
    for (int64_t k = 0; k < members; ++k) {
      alpha[k] = std::exp(raw[k] - largest);
      total += alpha[k];
    }
    for (int64_t k = 0; k < members; ++k) {
      const Acc p = alpha[k] / total;
      alpha[k] = k == 0 ? (p > gamma ? gamma : p) : (p < floor ? floor : p);
    }
  } else {
    Acc norm = 0;
    for (int64_t k = 1; k < members; ++k) norm += absolute(raw[k]);
    norm = norm < Acc(kNormFloor) ? Acc(kNormFloor) : norm;
    for (int64_t k = 1; k < members; ++k) alpha[k] = raw[k] / norm;
    alpha[0] = Acc(1);
  }
}

// grad_raw[k] from grad_alpha[k]. `grad_raw` may be `grad_alpha`, not `raw`.
template <typename Acc>
ALPHAEXT_HOST_DEVICE void rule_backward(const RuleParams& params, int64_t members, const Acc* raw, const Acc* grad_alpha,
                                        Acc* grad_raw) {
  const Acc gamma = static_cast<Acc>(params.gamma);
  const bool projected = params.projected_gradient;
  if (params.rule == Rule::Clamp) {
    const Acc low = gamma < Acc(kAlphaFloor) ? gamma : Acc(kAlphaFloor);
    for (int64_t k = 1; k < members; ++k) grad_raw[k] = grad_alpha[k];
    grad_raw[0] = gradient_passes(raw[0], low, gamma, grad_alpha[0], projected) ? grad_alpha[0] : Acc(0);
  } else if (params.rule == Rule::Softmax) {
    const Acc floor = (Acc(1) - gamma) / static_cast<Acc>(members - 1);
    Acc largest = raw[0];
    for (int64_t k = 1; k < members; ++k) largest = raw[k] > largest ? raw[k] : largest;
    Acc total = 0;
    for (int64_t k = 0; k < members; ++k) total += std::exp(raw[k] - largest);
    Acc weighted = 0;
    for (int64_t k = 0; k < members; ++k) {
      const Acc p = std::exp(raw[k] - largest) / total;
      const bool passes = k == 0 ? gradient_passes(p, Acc(0), gamma, grad_alpha[k], projected)
                                 : gradient_passes(p, floor, Acc(2), grad_alpha[k], projected);
      grad_raw[k] = passes ? grad_alpha[k] : Acc(0);
      weighted += p * grad_raw[k];
    }
    for (int64_t k = 0; k < members; ++k) {
      const Acc p = std::exp(raw[k] - largest) / total;
      grad_raw[k] = p * (grad_raw[k] - weighted);
    }
  } else {
    Acc norm = 0;
    for (int64_t k = 1; k < members; ++k) norm += absolute(raw[k]);
    const bool normalised = norm >= Acc(kNormFloor);
    norm = normalised ? norm : Acc(kNormFloor);
    Acc weighted = 0;
    for (int64_t k = 1; k < members; ++k) weighted += grad_alpha[k] * (raw[k] / norm);
    for (int64_t k = 1; k < members; ++k) {
      const Acc sign = raw[k] > Acc(0) ? Acc(1) : (raw[k] < Acc(0) ? Acc(-1) : Acc(0));
      grad_raw[k] = (grad_alpha[k] - (normalised ? sign * weighted : Acc(0))) / norm;
    }
    grad_raw[0] = Acc(0);
  }
}

}  // namespace alphaext
