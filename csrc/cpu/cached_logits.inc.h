// What is kept of a sample's logits: the few classes' members, and of equation 4 one number for training and the best for
// validation. Included once per instruction set, inside a namespace of its own; no include guard and no includes for that
// reason.

// log of the sum of exponentials of logits + penalty.
template <typename Acc>
static inline Acc masked_logsumexp(const Acc* logits, const Acc* penalty, int64_t size) {
  using V = Vector<Acc>;
  constexpr int kL = kLanes<Acc>;
  const int64_t whole = size / kL * kL;
  V best = all(-std::numeric_limits<Acc>::infinity());
  for (int64_t c = 0; c < whole; c += kL) {
    const V value = load(logits + c) + load(penalty + c);
    best = value > best ? value : best;
  }
  Acc largest = best[0];
  for (int lane = 1; lane < kL; ++lane) largest = best[lane] > largest ? best[lane] : largest;
  for (int64_t c = whole; c < size; ++c) largest = logits[c] + penalty[c] > largest ? logits[c] + penalty[c] : largest;
  V sums{};
  for (int64_t c = 0; c < whole; c += kL) sums += exponential<Acc>(load(logits + c) + load(penalty + c) - largest);
  Acc sum = lane_sum<Acc>(sums);
  for (int64_t c = whole; c < size; ++c) sum += std::exp(logits[c] + penalty[c] - largest);
  return largest + std::log(sum);
}

// The best classes, best first; of equal logits the lower id first.
template <typename Acc>
static inline void top_classes(const Acc* logits, const Acc* penalty, int64_t size, Acc* best, int32_t* ids) {
  using V = Vector<Acc>;
  using Integers = typename VectorOf<Acc>::integers;
  constexpr int kTop = static_cast<int>(kTopClasses), kL = kLanes<Acc>;
  for (int i = 0; i < kTop; ++i) {
    best[i] = -std::numeric_limits<Acc>::infinity();
    ids[i] = std::numeric_limits<int32_t>::max();
  }
  int found = 0;
  for (int64_t first = 0; first < size; first += kL) {
    const int64_t end = first + kL < size ? first + kL : size;
    // Most classes are none of the best: these are passed over, as many at a time as a vector has.
    if (found == kTop && end == first + kL) {
      const Integers better = (Integers)(load(penalty + first) >= V{}) & (Integers)(load(logits + first) > best[kTop - 1]);
      uint64_t parts[sizeof(better) / 8], any = 0;
      std::memcpy(parts, &better, sizeof(better));
      for (const uint64_t part : parts) any |= part;
      if (any == 0) continue;
    }
    for (int64_t c = first; c < end; ++c) {
      const Acc value = logits[c];
      if (penalty[c] < Acc(0) || (found == kTop && !(value > best[kTop - 1]))) continue;
      int at = found < kTop ? found++ : kTop - 1;
      for (; at > 0 && value > best[at - 1]; --at) {
        best[at] = best[at - 1];
        ids[at] = ids[at - 1];
      }
      best[at] = value;
      ids[at] = static_cast<int32_t>(c);
    }
  }
}

template <typename Acc>
static void cache_logits(const CacheParams& p, int64_t begin, int64_t end) {
  const Acc* const penalty = static_cast<const Acc*>(p.few_penalty);
  const Acc* const bias = static_cast<const Acc*>(p.column_bias);
  const auto logits_of = [&](int64_t row) { return static_cast<const Acc*>(p.logits) + row * p.num_classes; };
  for (int64_t row = begin; row < end; ++row) {
    const Acc* const logits = logits_of(row);
    static_cast<Acc*>(p.base_logsumexp)[row] = masked_logsumexp(logits, penalty, p.num_classes);
    static_cast<Acc*>(p.label_logit)[row] = logits[p.labels[row]];
    if (p.top_logits) {
      top_classes(logits, penalty, p.num_classes, static_cast<Acc*>(p.top_logits) + row * kTopClasses,
                  p.top_ids + row * kTopClasses);
    }
    if (p.in_blocks) continue;
    Acc* const out = static_cast<Acc*>(p.member_logits) + row * p.columns;
    for (int64_t u = 0; u < p.columns; ++u) out[u] = logits[p.column_class[u]] - bias[u];
  }
  // In blocks, the samples of a line of the cache together.
  constexpr int kTogether = 64 / sizeof(Acc);
  for (int64_t row = begin; p.in_blocks && row < end;) {
    const int64_t left = end - row, to_line = kTogether - row % kTogether;
    const int here = static_cast<int>(left < to_line ? left : to_line);
    Acc* const out = static_cast<Acc*>(p.member_logits) + row / kBlockSamples * p.columns * kBlockSamples + row % kBlockSamples;
    const Acc* const logits = logits_of(row);
    for (int64_t u = 0; u < p.columns; ++u) {
      const Acc* const column = logits + p.column_class[u];
      if (here == kTogether) {
        for (int j = 0; j < kTogether; ++j) out[u * kBlockSamples + j] = column[j * p.num_classes] - bias[u];
      } else {
        for (int j = 0; j < here; ++j) out[u * kBlockSamples + j] = column[j * p.num_classes] - bias[u];
      }
    }
    row += here;
  }
}
