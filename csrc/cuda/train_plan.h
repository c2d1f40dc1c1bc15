// How an epoch's work is cut over a GPU's blocks, and where a block keeps what: plain C++, which host and kernel share.
// docs/maintainers/gpu.md has the arithmetic behind the choices here.
#pragma once

#include "launch_shape.h"
#include "train.h"

namespace alphaext::cuda {

// Of the training kernel: as many as leave each the registers that it needs.
template <typename T>
constexpr int kTrainThreads = sizeof(T) == 8 ? 256 : 512;
// In how many parts warps sum over hidden units, and over classes.
constexpr int kSlices = 8;
constexpr int kStripes = 8;
// Scores that a thread works on together; the next ones are on their way meanwhile.
constexpr int kScoresAtOnce = 8;
// Member logits in flight, of each thread.
constexpr int kFetchedAtOnce = 8;

// The exponent of the least power of two that is not below `count`: what is numbered in steps of that power needs no division.
ALPHAEXT_HOST_DEVICE int32_t shift_for(int64_t count) {
  int32_t shift = 0;
  while ((int64_t{1} << shift) < count) ++shift;
  return shift;
}

// The batch in whole warps.
ALPHAEXT_HOST_DEVICE int64_t train_width(const TrainParams& p) { return padded(p.batch, kWarp); }

// What a block keeps to itself; offsets in bytes. T unless said otherwise.
struct TrainArena {
  int64_t state;                 // resident: [classes, 2 + 2 M, tiles * kTileWidth]; shared: [tiles, 2 F + 2 M, kTileWidth]
  int64_t logits;                // resident: [2, classes, M, width], of this step and the next
  int64_t scores;                // [classes, width]
  int64_t alpha, raw, gradient;  // [classes, M]
  int64_t b2, b2_momentum;       // [classes, M], shared: [M]
  int64_t partial;               // [classes, kSlices, M]; shared: [F + M, kTileWidth], gradients of the tile's c and w2
  int64_t largest, total;        // [kStripes, width], and in the end in the first row those of all classes
  int64_t base, label;           // [2, width]
  int64_t own;                   // [width]
  int64_t scale, offset;         // [classes], of the arguments; shared: no scale
  int64_t penalty;               // [2, M], of the argument
  int64_t rows;                  // int64 [2, width]: the samples of the next step and of the one after it
  int64_t few;                   // int32 [2, width]
  int64_t columns;               // int32 [classes, M]
  int64_t bytes;
};

ALPHAEXT_HOST_DEVICE TrainArena train_arena(const TrainParams& p, bool resident, int64_t classes, int64_t tiles) {
  const int64_t item = p.dtype == ScalarType::Float64 ? 8 : 4, width = train_width(p), members = p.members;
  int64_t next = 0;
  const auto take = [&next](int64_t bytes) {
    const int64_t here = next;
    next += padded(bytes, 16);
    return here;
  };
  const int64_t of_class = p.tiles * (2 + 2 * members) * kTileWidth, of_tile = (2 * p.num_few + 2 * members) * kTileWidth;
  TrainArena a{};
  a.state = take(resident ? item * (p.shared ? tiles * of_tile : classes * of_class) : 0);
  a.logits = take(resident ? item * 2 * classes * members * width : 0);
  a.scores = take(item * classes * width);
  a.alpha = take(item * classes * members);
  a.raw = take(item * classes * members);
  a.gradient = take(item * classes * members);
  a.b2 = take(item * (p.shared ? 1 : classes) * members);
  a.b2_momentum = take(item * (p.shared ? 1 : classes) * members);
  a.partial = take(item * (p.shared ? (p.num_few + members) * kTileWidth : classes * kSlices * members));
  a.largest = take(item * kStripes * width);
  a.total = take(item * kStripes * width);
  a.base = take(item * 2 * width);
  a.label = take(item * 2 * width);
  a.own = take(item * width);
  a.scale = take(p.shared ? 0 : item * classes);
  a.offset = take(item * classes);
  a.penalty = take(item * 2 * members);
  a.rows = take(8 * 2 * width);
  a.few = take(4 * 2 * width);
  a.columns = take(4 * classes * members);
  a.bytes = next;
  return a;
}

// Where a score is among all that the blocks of a run publish. A thread adds up one stripe of the classes, f, f + kStripes, ...,
// for one sample: it finds 16 bytes of them side by side, and its neighbour, which has the next sample, the next 16 bytes.
template <typename T>
struct ScorePlaces {
  static constexpr int kSize = 16 / sizeof(T);
  int vectors, width;  // of a stripe; of the batch
  ALPHAEXT_HOST_DEVICE ScorePlaces(const TrainParams& p)
      : vectors(static_cast<int>((p.num_few + kStripes * kSize - 1) / (kStripes * kSize))), width(static_cast<int>(train_width(p))) {}
  ALPHAEXT_HOST_DEVICE int64_t vector(int stripe, int vector, int b) const {
    return int64_t{stripe * vectors + vector} * width + b;
  }
  ALPHAEXT_HOST_DEVICE int64_t of(int few, int b) const {
    const int place = few / kStripes;
    return vector(few % kStripes, place / kSize, b) * kSize + place % kSize;
  }
  ALPHAEXT_HOST_DEVICE int64_t all() const { return int64_t{kStripes * vectors} * width * kSize; }
};

// What the blocks of a run tell each other. Of each, two sets in turn: nobody can be two meetings ahead of anybody.
struct TrainExchange {
  int64_t failed;    // uint32 [2, F]: the class's outputs are not finite
  int64_t scores;    // [2, ScorePlaces::all()]
  int64_t gradient;  // shared: [F, M], of the outputs
  int64_t partial;   // shared: [tiles, F, M], a tile's share of the outputs
  int64_t bytes;
};

ALPHAEXT_HOST_DEVICE TrainExchange train_exchange(const TrainParams& p) {
  const int64_t item = p.dtype == ScalarType::Float64 ? 8 : 4;
  TrainExchange e{};
  e.failed = 0;
  e.scores = padded(4 * 2 * p.num_few, 256);
  const int64_t scores = item == 8 ? ScorePlaces<double>(p).all() : ScorePlaces<float>(p).all();
  e.gradient = e.scores + padded(item * 2 * scores, 256);
  e.partial = e.gradient + (p.shared ? padded(item * p.num_few * p.members, 256) : 0);
  e.bytes = e.partial + (p.shared ? padded(item * p.tiles * p.num_few * p.members, 256) : 0);
  return e;
}

// The workspace begins with the words of all meetings, which must be 0; then come the groups' exchanges and the blocks' arenas.
ALPHAEXT_HOST_DEVICE int64_t train_meeting_bytes(const TrainPlan& plan) {
  return plan.runs_at_once * padded(4 * plan.blocks, 256);
}

inline int64_t train_parts(const TrainParams& p) { return p.shared && p.tiles > p.num_few ? p.tiles : p.num_few; }

inline TrainPlan train_plan_with(const TrainRunsParams& params, bool resident, int64_t blocks, int64_t runs_at_once) {
  const TrainParams& p = params.first;
  TrainPlan plan{};
  plan.resident = resident;
  plan.blocks = blocks;
  plan.runs_at_once = runs_at_once;
  plan.classes = (p.num_few + blocks - 1) / blocks;
  plan.tiles = p.shared ? (p.tiles + blocks - 1) / blocks : 0;
  plan.arena_bytes = padded(train_arena(p, resident, plan.classes, plan.tiles).bytes, 256);
  plan.shared_bytes = resident ? plan.arena_bytes : 0;
  plan.workspace_bytes = train_meeting_bytes(plan) + runs_at_once * train_exchange(p).bytes +
                         (resident ? 0 : runs_at_once * blocks * plan.arena_bytes);
  return plan;
}

// Are all indices of what a block owns below 2^31? What is in shared memory is far below.
inline bool indices_fit(const TrainParams& p, const TrainPlan& plan) {
  const double of_class = static_cast<double>(p.members) * static_cast<double>(train_width(p) + kSlices);
  const double of_network = static_cast<double>(p.num_few + p.members) * static_cast<double>(kTileWidth + p.members);
  const double unit = static_cast<double>(p.tiles * kTileWidth + kSlices * kWarp), limit = 2147483647.0 - 65536;
  return static_cast<double>(plan.classes) * of_class < limit && (!p.shared || of_network < limit) && unit < limit &&
         static_cast<double>(train_width(p)) * kStripes < limit;
}

// The plan that should take the least time; all of its blocks, `most_blocks` of them, can run at once.
// `blocks_on_processor(resident, shared_bytes)` tells how many blocks a multiprocessor has room for. plan.blocks is 0 if there is
// no plan.
template <typename Occupancy>
TrainPlan choose_train_plan(const TrainRunsParams& params, int64_t processors, int64_t shared_limit, int64_t most_blocks,
                            const Occupancy& blocks_on_processor) {
  const auto room = [&](bool resident, int64_t shared_bytes) {
    const int64_t blocks = processors * blocks_on_processor(resident, shared_bytes);
    return blocks < most_blocks ? blocks : most_blocks;
  };
  const int64_t parts = train_parts(params.first);
  TrainPlan best{};
  double best_time = 0;
  for (int64_t each = 1; each <= parts; ++each) {
    const int64_t blocks = (parts + each - 1) / each;
    TrainPlan plan = train_plan_with(params, true, blocks, 1);
    if (plan.shared_bytes > shared_limit) break;
    const int64_t capacity = room(true, plan.shared_bytes) / blocks;
    if (capacity == 0) continue;
    plan = train_plan_with(params, true, blocks, params.runs < capacity ? params.runs : capacity);
    // Microseconds a step, by the estimates of docs/maintainers/gpu.md: the way of an exchange, then what a multiprocessor does one block
    // after another, reading all scores, and one class after another.
    const double waves = static_cast<double>((params.runs + plan.runs_at_once - 1) / plan.runs_at_once);
    const double at_once = static_cast<double>((blocks * plan.runs_at_once + processors - 1) / processors);
    const double time = waves * (1.5 + at_once * (0.5 + 0.3 * static_cast<double>(each)));
    if (best.blocks == 0 || time <= best_time) {
      best = plan;
      best_time = time;
    }
  }
  if (best.blocks != 0) return best;
  const int64_t capacity = room(false, 0);
  if (capacity == 0) return best;
  const int64_t blocks = parts < capacity ? parts : capacity;
  const int64_t together = capacity / blocks;
  const TrainPlan plan = train_plan_with(params, false, blocks, params.runs < together ? params.runs : together);
  return indices_fit(params.first, plan) ? plan : best;
}

}  // namespace alphaext::cuda
