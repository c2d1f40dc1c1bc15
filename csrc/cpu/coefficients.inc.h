// Second layer and coefficient rule of each class, forward beside backward. Included once per instruction set, inside a
// namespace of its own; no include guard and no includes for that reason.

template <typename T>
static void coefficient_forward(const CoefficientParams& params, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  const int64_t hidden = params.hidden, members = params.members;
  for (int64_t f = begin; f < end; ++f) {
    const int64_t weights = params.shared ? 0 : f;
    const Acc* preactivation = static_cast<const Acc*>(params.preactivation) + f * hidden;
    const T* w2 = static_cast<const T*>(params.w2) + weights * members * hidden;
    const T* b2 = static_cast<const T*>(params.b2) + weights * members;
    Acc* raw = static_cast<Acc*>(params.raw) + f * members;
    for (int64_t k = 0; k < members; ++k) {
      const T* row = w2 + k * hidden;
      Acc sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t h = 0; h < hidden; ++h) sum += widen(row[h]) * relu(preactivation[h]);
      raw[k] = sum + widen(b2[k]);
    }
    rule_forward<Acc>(params.rule, members, raw, static_cast<Acc*>(params.alpha) + f * members);
  }
}

template <typename T>
static void coefficient_backward(const CoefficientBackwardParams& params, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  const int64_t hidden = params.hidden, members = params.members;
  for (int64_t f = begin; f < end; ++f) {
    const Acc* preactivation = static_cast<const Acc*>(params.preactivation) + f * hidden;
    const T* w2 = static_cast<const T*>(params.w2) + (params.shared ? 0 : f) * members * hidden;
    Acc* grad_raw = static_cast<Acc*>(params.grad_raw) + f * members;
    Acc* grad_preactivation = static_cast<Acc*>(params.grad_preactivation) + f * hidden;
    rule_backward<Acc>(params.rule, members, static_cast<const Acc*>(params.raw) + f * members,
                       static_cast<const Acc*>(params.grad_alpha) + f * members, grad_raw);
    if (params.grad_b2) {
      T* grad_b2 = static_cast<T*>(params.grad_b2) + f * members;
      for (int64_t k = 0; k < members; ++k) grad_b2[k] = narrow<T>(grad_raw[k]);
    }
    if (params.grad_w2) {
      for (int64_t k = 0; k < members; ++k) {
        T* row = static_cast<T*>(params.grad_w2) + (f * members + k) * hidden;
        const Acc gradient = grad_raw[k];
#pragma omp simd
        for (int64_t h = 0; h < hidden; ++h) row[h] = narrow<T>(gradient * relu(preactivation[h]));
      }
    }
#pragma omp simd
    for (int64_t h = 0; h < hidden; ++h) grad_preactivation[h] = 0;
    for (int64_t k = 0; k < members; ++k) {
      const T* row = w2 + k * hidden;
      const Acc gradient = grad_raw[k];
#pragma omp simd
      for (int64_t h = 0; h < hidden; ++h) grad_preactivation[h] += gradient * widen(row[h]);
    }
    // ReLU passes no gradient at or below 0, and a NaN stays visible.
#pragma omp simd
    for (int64_t h = 0; h < hidden; ++h) {
      grad_preactivation[h] = preactivation[h] <= Acc(0) ? Acc(0) : grad_preactivation[h];
    }
  }
}
