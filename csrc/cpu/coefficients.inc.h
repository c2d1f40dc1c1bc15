// Second layer and coefficient rule of each class: the alpha of equations 1 and 2, forward beside backward. Included once per
// instruction set, inside a namespace of its own; no include guard and no includes for that reason.

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
    // Rows by threes (K = 5 makes two of them): their sums are independent, so that the latency of the additions hides.
    int64_t k = 0;
    for (; k + 3 <= members; k += 3) {
      const T *row0 = w2 + k * hidden, *row1 = row0 + hidden, *row2 = row1 + hidden;
      Acc sum0 = 0, sum1 = 0, sum2 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2)
      for (int64_t h = 0; h < hidden; ++h) {
        const Acc value = relu(preactivation[h]);
        sum0 += widen(row0[h]) * value;
        sum1 += widen(row1[h]) * value;
        sum2 += widen(row2[h]) * value;
      }
      raw[k] = sum0 + widen(b2[k]), raw[k + 1] = sum1 + widen(b2[k + 1]), raw[k + 2] = sum2 + widen(b2[k + 2]);
    }
    for (; k < members; ++k) {
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
#pragma omp simd
    for (int64_t h = 0; h < hidden; ++h) grad_preactivation[h] = 0;
    for (int64_t k = 0; k < members; ++k) {
      const T* row = w2 + k * hidden;
      const Acc gradient = grad_raw[k];
      if (params.grad_w2) {
        T* grad_row = static_cast<T*>(params.grad_w2) + (f * members + k) * hidden;
#pragma omp simd
        for (int64_t h = 0; h < hidden; ++h) {
          grad_row[h] = narrow<T>(gradient * relu(preactivation[h]));
          grad_preactivation[h] += gradient * widen(row[h]);
        }
      } else {
#pragma omp simd
        for (int64_t h = 0; h < hidden; ++h) grad_preactivation[h] += gradient * widen(row[h]);
      }
    }
    // ReLU passes no gradient at or below 0, and a NaN stays visible.
#pragma omp simd
    for (int64_t h = 0; h < hidden; ++h) {
      grad_preactivation[h] = preactivation[h] <= Acc(0) ? Acc(0) : grad_preactivation[h];
    }
  }
}
