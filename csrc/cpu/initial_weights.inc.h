// The first layers' random starting weights, made row by row wherever they are wanted: written down, or used at once and
// forgotten. Included once per instruction set, inside a namespace of its own; no include guard and no includes for that
// reason.

// Philox4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) for 8 counters at a time:
// any part of the weights can be made without what comes before it.
constexpr int kStreams = 8;

// A counter lies in the low half of a lane of 64 bits; what is in the high half plays no part.
using Counters = VectorOf<double>::integers;
constexpr int kCountersAtOnce = kLanes<double>, kCounterVectors = kStreams / kCountersAtOnce;
constexpr uint64_t kNumbers[kStreams] = {0, 1, 2, 3, 4, 5, 6, 7};

static ALPHAEXT_INLINE void philox(Counters& c0, Counters& c1, Counters& c2, Counters& c3, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const Counters a = low_product(c0, 0xd2511f53u), b = low_product(c2, 0xcd9e8d57u);
    c0 = (b >> 32) ^ c1 ^ static_cast<uint64_t>(key0);
    c2 = (a >> 32) ^ c3 ^ static_cast<uint64_t>(key1);
    c1 = b;
    c3 = a;
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
    for (int vector = 0; vector < kCounterVectors; ++vector) {
      const int first = vector * kCountersAtOnce;
      Counters c[4];
      std::memcpy(&c[0], kNumbers + first, sizeof(c[0]));
      c[0] += static_cast<uint64_t>(i / 4);
      c[1] = Counters{} + static_cast<uint32_t>(unit);
      c[2] = Counters{} + static_cast<uint32_t>(network);
      c[3] = Counters{};
      philox(c[0], c[1], c[2], c[3], static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
      for (int word = 0; word < 4; ++word) {
        Acc* const out = row + i + word * kStreams + first;
        for (int s = 0; s < kCountersAtOnce; ++s) {
          out[s] = static_cast<Acc>(static_cast<int32_t>(static_cast<uint32_t>(c[word][s]) >> 8)) * step - bound;
        }
      }
    }
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
