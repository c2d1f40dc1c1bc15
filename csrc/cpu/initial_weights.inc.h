// The first layers' random starting weights, made row by row wherever they are wanted: written down, or used at once and
// forgotten. Included once per instruction set, inside a namespace of its own; no include guard and no includes for that
// reason.

// Philox4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) for 8 counters at a time:
// any part of the weights can be made without what comes before it.
constexpr int kStreams = 8;

static ALPHAEXT_INLINE void philox(uint32_t (&c0)[kStreams], uint32_t (&c1)[kStreams], uint32_t (&c2)[kStreams],
                                   uint32_t (&c3)[kStreams], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int s = 0; s < kStreams; ++s) {
      const uint64_t a = static_cast<uint64_t>(c0[s]) * 0xd2511f53u, b = static_cast<uint64_t>(c2[s]) * 0xcd9e8d57u;
      const uint32_t next0 = static_cast<uint32_t>(b >> 32) ^ c1[s] ^ key0;
      const uint32_t next2 = static_cast<uint32_t>(a >> 32) ^ c3[s] ^ key1;
      c1[s] = static_cast<uint32_t>(b);
      c3[s] = static_cast<uint32_t>(a);
      c0[s] = next0;
      c2[s] = next2;
    }
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

// The I weights of a row, and after them its bias, uniform in [-bound, bound); `row` has room for rounded_up(I + 1, 32)
// numbers. Numbers have 24 random bits in every dtype, so that networks of all dtypes start alike.
template <typename Acc>
static inline void random_row(const InitialWeightsParams& p, int64_t network, int64_t unit, Acc* row) {
  const Acc bound = static_cast<Acc>(p.bound), step = static_cast<Acc>(2.0 / 16777216.0) * bound;
  for (int64_t i = 0; i <= p.inputs; i += 4 * kStreams) {
    uint32_t c0[kStreams], c1[kStreams], c2[kStreams], c3[kStreams];
    for (int s = 0; s < kStreams; ++s) {
      c0[s] = static_cast<uint32_t>(i / 4 + s);
      c1[s] = static_cast<uint32_t>(unit);
      c2[s] = static_cast<uint32_t>(network);
      c3[s] = 0;
    }
    philox(c0, c1, c2, c3, static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
    const auto put = [&](const uint32_t(&bits)[kStreams], int64_t at) {
#pragma omp simd
      for (int s = 0; s < kStreams; ++s) row[at + s] = static_cast<Acc>(static_cast<int32_t>(bits[s] >> 8)) * step - bound;
    };
    put(c0, i), put(c1, i + kStreams), put(c2, i + 2 * kStreams), put(c3, i + 3 * kStreams);
  }
}

// Rows [begin, end) of all networks' rows, network * H + unit.
template <typename Acc>
static void initial_weights(const InitialWeightsParams& p, int64_t begin, int64_t end, void* workspace) {
  using V = Vector<Acc>;
  Acc* const row = static_cast<Acc*>(workspace);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t network = item / p.hidden, unit = item % p.hidden;
    random_row<Acc>(p, p.first_network + network, unit, row);
    if (p.w1) {
      std::memcpy(static_cast<Acc*>(p.w1) + item * p.inputs, row, static_cast<size_t>(p.inputs) * sizeof(Acc));
      static_cast<Acc*>(p.b1)[item] = row[p.inputs];
    }
    if (!p.preactivation) continue;
    const int64_t first = p.shared ? 0 : network, last = p.shared ? p.num_few : network + 1;
    const int64_t whole = p.inputs / (4 * kLanes<Acc>) * (4 * kLanes<Acc>);
    for (int64_t f = first; f < last; ++f) {
      const Acc* const z = static_cast<const Acc*>(p.z) + f * p.inputs;
      V sums[4] = {};
      for (int64_t i = 0; i < whole; i += 4 * kLanes<Acc>) {
        for (int v = 0; v < 4; ++v) sums[v] += load(row + i + v * kLanes<Acc>) * load(z + i + v * kLanes<Acc>);
      }
      Acc sum = lane_sum<Acc>((sums[0] + sums[1]) + (sums[2] + sums[3]));
      for (int64_t i = whole; i < p.inputs; ++i) sum += row[i] * z[i];
      static_cast<Acc*>(p.preactivation)[f * p.hidden + unit] = sum + row[p.inputs];
    }
  }
}
