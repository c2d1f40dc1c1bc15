// Equations 1 to 4 in one sum: scores as a sparse mix of the original logits, forward beside backward. Included once per
// instruction set, inside a namespace of its own; no include guard and no includes for that reason.

template <typename T>
static void mix_forward(const MixParams& params, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  const int64_t num_classes = params.num_classes, members = params.members;
  const Acc* alpha = static_cast<const Acc*>(params.alpha);
  const Acc* bias = static_cast<const Acc*>(params.bias);
  for (int64_t b = begin; b < end; ++b) {
    const Acc* logits = static_cast<const Acc*>(params.logits) + b * num_classes;
    T* scores = static_cast<T*>(params.scores) + b * num_classes;
#pragma omp simd
    for (int64_t c = 0; c < num_classes; ++c) scores[c] = narrow<T>(logits[c]);
    for (int64_t f = 0; f < params.num_few; ++f) {
      const int64_t* ids = params.member_ids + f * members;
      const Acc* weights = alpha + f * members;
      Acc sum = weights[0] * logits[ids[0]];
      if (bias) {
        for (int64_t k = 1; k < members; ++k) sum += weights[k] * (logits[ids[k]] - bias[ids[k]]);
      } else {
        for (int64_t k = 1; k < members; ++k) sum += weights[k] * logits[ids[k]];
      }
      scores[ids[0]] = narrow<T>(sum);
    }
  }
}

template <typename T>
static void mix_backward_alpha(const MixBackwardParams& params, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  const int64_t num_classes = params.num_classes, members = params.members;
  const Acc* bias = static_cast<const Acc*>(params.bias);
  Acc* grad_alpha = static_cast<Acc*>(params.grad_alpha);
  for (int64_t e = begin * members; e < end * members; ++e) grad_alpha[e] = 0;
  // Rows outside, classes inside: a row of logits stays in the first-level cache while all its members are picked.
  for (int64_t b = 0; b < params.batch; ++b) {
    const Acc* logits = static_cast<const Acc*>(params.logits) + b * num_classes;
    const T* grad_scores = static_cast<const T*>(params.grad_scores) + b * num_classes;
    for (int64_t f = begin; f < end; ++f) {
      const int64_t* ids = params.member_ids + f * members;
      Acc* sums = grad_alpha + f * members;
      const Acc gradient = widen(grad_scores[ids[0]]);
      for (int64_t k = 0; k < members; ++k) sums[k] += gradient * logits[ids[k]];
    }
  }
  if (!bias) return;
  for (int64_t f = begin; f < end; ++f) {
    const int64_t* ids = params.member_ids + f * members;
    Acc total = 0;
    for (int64_t b = 0; b < params.batch; ++b) {
      total += widen(static_cast<const T*>(params.grad_scores)[b * num_classes + ids[0]]);
    }
    for (int64_t k = 1; k < members; ++k) grad_alpha[f * members + k] -= total * bias[ids[k]];
  }
}

template <typename T>
static void mix_backward_logits(const MixBackwardParams& params, int64_t begin, int64_t end) {
  using Acc = accumulate_t<T>;
  const int64_t num_classes = params.num_classes, members = params.members;
  const Acc* alpha = static_cast<const Acc*>(params.alpha);
  for (int64_t b = begin; b < end; ++b) {
    const T* grad_scores = static_cast<const T*>(params.grad_scores) + b * num_classes;
    Acc* grad_logits = static_cast<Acc*>(params.grad_logits) + b * num_classes;
#pragma omp simd
    for (int64_t c = 0; c < num_classes; ++c) grad_logits[c] = widen(grad_scores[c]);
    for (int64_t f = 0; f < params.num_few; ++f) grad_logits[params.member_ids[f * members]] = 0;
    for (int64_t f = 0; f < params.num_few; ++f) {
      const int64_t* ids = params.member_ids + f * members;
      const Acc gradient = widen(grad_scores[ids[0]]);
      for (int64_t k = 0; k < members; ++k) grad_logits[ids[k]] += alpha[f * members + k] * gradient;
    }
  }
}
