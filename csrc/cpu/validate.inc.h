// Validation: equations 3 and 4 as a sparse mix of cached logits, and how many classes stand before the label. Included once
// per instruction set, inside a namespace of its own; no include guard and no includes for that reason.

template <typename Acc>
static void validate(const ValidateParams& p, int64_t begin, int64_t end) {
  using V = Vector<Acc>;
  const Acc* const alpha = static_cast<const Acc*>(p.alpha);
  Acc* const scores = static_cast<Acc*>(p.workspace);
  Acc* const own = scores + p.num_few * kBlockSamples;
  Acc* const before = own + kBlockSamples;
  Acc* const ties = before + kBlockSamples;
  const int64_t own_members = count_own_members(p.member_columns, p.num_few, p.members);
  for (int64_t block = begin; block < end; ++block) {
    const Acc* const logits = static_cast<const Acc*>(p.member_logits) + block * p.columns * kBlockSamples;
    const int64_t first = block * kBlockSamples;
    const int64_t count = p.samples - first < kBlockSamples ? p.samples - first : kBlockSamples;
    // The columns of a block are visited in no order that the processor could foresee, so the next block is fetched by name.
    const char* next = reinterpret_cast<const char*>(logits + p.columns * kBlockSamples);
    const char* const next_end = block + 1 < end ? next + p.columns * kBlockSamples * sizeof(Acc) : next;
    constexpr int kVectors = kBlockSamples / kLanes<Acc> < 4 ? static_cast<int>(kBlockSamples) / kLanes<Acc> : 4;
    constexpr int kWide = kVectors * kLanes<Acc>;
    const int64_t turns = p.num_few * (kBlockSamples / kWide);
    const int64_t share = rounded_up(rounded_up(next_end - next, 64) / 64, turns) / turns;
    for (int b = 0; b < kBlockSamples; b += kWide) {
      mix_few<Acc, kVectors>(logits + b, kBlockSamples, p.member_columns, alpha, p.num_few, p.members, own_members, scores + b,
                             kBlockSamples, [&] {
                               for (int64_t line = 0; line < share && next < next_end; ++line, next += 64) {
                                 __builtin_prefetch(next, 0, 2);
                               }
                             });
    }
    for (int64_t b = 0; b < kBlockSamples; ++b) {
      const int32_t few = b < count ? p.few_of_label[first + b] : -1;
      own[b] = few >= 0 ? scores[few * kBlockSamples + b]
                        : (b < count ? static_cast<const Acc*>(p.label_logit)[first + b] : Acc(0));
    }
    // How many few classes score higher than the label, and as high.
    constexpr int kWidth = 4 * kLanes<Acc>;  // of which all fits into the registers
    for (int b = 0; b < kBlockSamples; b += kWidth) {
      V right[4], higher[4] = {}, equal[4] = {};
      for (int v = 0; v < 4; ++v) right[v] = load(own + b + v * kLanes<Acc>);
      for (int64_t f = 0; f < p.num_few; ++f) {
        for (int v = 0; v < 4; ++v) {
          const V score = load(scores + f * kBlockSamples + b + v * kLanes<Acc>);
          higher[v] += score > right[v] ? all(Acc(1)) : V{};
          equal[v] += score == right[v] ? all(Acc(1)) : V{};
        }
      }
      for (int v = 0; v < 4; ++v) {
        store(before + b + v * kLanes<Acc>, higher[v]);
        store(ties + b + v * kLanes<Acc>, equal[v]);
      }
    }
    for (int64_t b = 0; b < count; ++b) {
      // A label of a few class ties with itself. Of other ties, which are rare, those of lower id stand before the label.
      if (ties[b] == Acc(p.few_of_label[first + b] >= 0)) continue;
      for (int64_t f = 0; f < p.num_few; ++f) {
        before[b] += Acc(scores[f * kBlockSamples + b] == own[b] && p.few_classes[f] < p.labels[first + b]);
      }
    }
    for (int64_t b = 0; b < count; ++b) {
      const int64_t sample = first + b, label = p.labels[sample];
      int64_t rank = static_cast<int64_t>(before[b]);
      const Acc* const top = static_cast<const Acc*>(p.top_logits) + sample * kTopClasses;
      const int32_t* const ids = p.top_ids + sample * kTopClasses;
      for (int i = 0; i < kTopClasses; ++i) rank += top[i] > own[b] || (top[i] == own[b] && ids[i] < label);
      p.hits[label] += rank < 1;
      p.hits[p.num_classes + label] += rank < kTopClasses;
    }
  }
}
