// First layer of all sub-modules, whose second gives the alpha of equations 1 and 2, forward beside backward. Included once per
// instruction set, inside a namespace of its own; no include guard and no includes for that reason.
//
// Both directions are bound by memory: the forward streams w1 once, the backward streams grad_w1 out once.

// sum_i w[r, i] z[i] for `kRows` rows at once: one load of z serves them all, and their sums are independent, so that the
// latency of the additions hides.
template <typename T, int kRows>
static inline void dot_rows(const T* w, int64_t stride, const T* z, int64_t size, accumulate_t<T>* out) {
  using Acc = accumulate_t<T>;
  if constexpr (kRows == 4) {
    const T *w0 = w, *w1 = w + stride, *w2 = w + 2 * stride, *w3 = w + 3 * stride;
    Acc sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t i = 0; i < size; ++i) {
      const Acc value = widen(z[i]);
      sum0 += widen(w0[i]) * value;
      sum1 += widen(w1[i]) * value;
      sum2 += widen(w2[i]) * value;
      sum3 += widen(w3[i]) * value;
    }
    out[0] = sum0, out[1] = sum1, out[2] = sum2, out[3] = sum3;
  } else {
    static_assert(kRows == 1, "rows are taken by fours or one by one");
    Acc sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += widen(w[i]) * widen(z[i]);
    out[0] = sum;
  }
}

template <typename T>
static void first_layer_forward(const FirstLayerParams& params, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  const T* z = static_cast<const T*>(params.z);
  const T* w1 = static_cast<const T*>(params.w1);
  const T* b1 = static_cast<const T*>(params.b1);
  Acc* preactivation = static_cast<Acc*>(params.preactivation);
  const int64_t hidden = params.hidden, inputs = params.inputs;

  // Fours are counted from the start of each class, so that a row's bits do not depend on where a range was cut.
  int64_t row = begin;
  while (row < end) {
    const int64_t f = row / hidden, h = row % hidden;
    const int64_t group = h - h % 4;
    const int64_t group_size = hidden - group < 4 ? 1 : 4;
    const T* input = z + f * inputs;
    Acc sums[4];
    int64_t first, count;
    if (group_size == 4) {
      dot_rows<T, 4>(w1 + (f * hidden + group) * inputs, inputs, input, inputs, sums);
      first = h - group;
      count = 4 - first < end - row ? 4 - first : end - row;
    } else {
      dot_rows<T, 1>(w1 + row * inputs, inputs, input, inputs, sums);
      first = 0;
      count = 1;
    }
    for (int64_t r = 0; r < count; ++r) preactivation[row + r] = sums[first + r] + widen(b1[row + r]);
    row += count;
  }
}

template <typename T>
static void first_layer_backward_w1(const FirstLayerBackwardParams& params, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  const Acc* grad_preactivation = static_cast<const Acc*>(params.grad_preactivation);
  const T* z = static_cast<const T*>(params.z);
  T* grad_w1 = static_cast<T*>(params.grad_w1);
  const int64_t inputs = params.inputs;
  for (int64_t row = begin; row < end; ++row) {
    const Acc gradient = grad_preactivation[row];
    const T* input = z + row / params.hidden * inputs;
    stream_scaled(grad_w1 + row * inputs, input, gradient, inputs);
  }
}

template <typename T>
static void first_layer_backward_z(const FirstLayerBackwardParams& params, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  const Acc* grad_preactivation = static_cast<const Acc*>(params.grad_preactivation);
  const T* w1 = static_cast<const T*>(params.w1);
  T* grad_z = static_cast<T*>(params.grad_z);
  const int64_t hidden = params.hidden, inputs = params.inputs;
  constexpr int64_t kBlock = 256;
  Acc sums[kBlock];
  for (int64_t f = begin; f < end; ++f) {
    for (int64_t start = 0; start < inputs; start += kBlock) {
      const int64_t size = inputs - start < kBlock ? inputs - start : kBlock;
      for (int64_t i = 0; i < size; ++i) sums[i] = 0;
      for (int64_t h = 0; h < hidden; ++h) {
        const Acc gradient = grad_preactivation[f * hidden + h];
        const T* row = w1 + (f * hidden + h) * inputs + start;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) sums[i] += gradient * widen(row[i]);
      }
      for (int64_t i = 0; i < size; ++i) grad_z[f * inputs + start + i] = narrow<T>(sums[i]);
    }
  }
}
