// One epoch of training, of several runs side by side, in one persistent cooperative launch. csrc/cpu/training.inc.h does the
// same on one thread; docs/gpu.md has the arithmetic behind the choices here.
//
// A run is trained by a group of blocks that nobody else waits for. A block owns some few classes and keeps their networks and
// momentum in shared memory for the whole epoch. Per step it computes its classes' scores, publishes them, waits for the other
// blocks of the run, and then has all scores, from which it computes the softmax denominators itself: one exchange a step. A
// network shared by all classes is cut by hidden units instead and needs two exchanges more.
//
// Every sum has a fixed order that depends on the sizes alone, not on blocks, threads, or what else runs.
#pragma once

#include "device.cuh"
#include "training_kernels.h"

namespace alphaext::cuda {

// Of the training kernel: as many as leave each the registers that it needs.
template <typename T>
constexpr int kTrainThreads = sizeof(T) == 8 ? 256 : 512;
// In how many parts warps sum over hidden units, and over classes.
constexpr int kSlices = 8;
constexpr int kStripes = 8;
// Loads of scores in flight, of each thread.
constexpr int kScoresAtOnce = 8;

// ---- What goes from block to block -------------------------------------------------------------------------------------

#if defined(__CUDACC__)
__device__ __forceinline__ void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
// Of what another block has written: from the second-level cache, where its writes are.
template <typename T>
__device__ __forceinline__ T load_published(const T* address) {
  return __ldcg(address);
}
__device__ __forceinline__ void pause() {}
// Rounded once, so that two computations of one score cannot differ.
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
inline void store_release(uint32_t* address, uint32_t value) {
  std::atomic_ref<uint32_t>(*address).store(value, std::memory_order_release);
}
inline uint32_t load_acquire(const uint32_t* address) {
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(address)).load(std::memory_order_acquire);
}
template <typename T>
T load_published(const T* address) {
  return *address;
}
using shim::pause;
template <typename T>
T fused(T a, T b, T c) {
  return a * b + c;
}
#endif

// ---- Where things lie --------------------------------------------------------------------------------------------------

ALPHAEXT_HOST_DEVICE int64_t padded(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

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
  a.few = take(4 * 2 * width);
  a.columns = take(4 * classes * members);
  a.bytes = next;
  return a;
}

// What the blocks of a run tell each other. Of each, two sets in turn: nobody can be two meetings ahead of anybody.
struct TrainExchange {
  int64_t failed;    // uint32 [2, F]: the class's outputs are not finite
  int64_t scores;    // [2, F, width]
  int64_t gradient;  // shared: [F, M], of the outputs
  int64_t partial;   // shared: [tiles, F, M], a tile's share of the outputs
  int64_t bytes;
};

ALPHAEXT_HOST_DEVICE TrainExchange train_exchange(const TrainParams& p) {
  const int64_t item = p.dtype == ScalarType::Float64 ? 8 : 4;
  TrainExchange e{};
  e.failed = 0;
  e.scores = padded(4 * 2 * p.num_few, 256);
  e.gradient = e.scores + padded(item * 2 * p.num_few * train_width(p), 256);
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

// The plan that should take the least time; all of its blocks can run at once. `blocks_on_processor(resident, shared_bytes)`
// tells how many blocks a multiprocessor has room for. plan.blocks is 0 if there is no plan.
template <typename Occupancy>
TrainPlan choose_train_plan(const TrainRunsParams& params, int64_t processors, int64_t shared_limit,
                            const Occupancy& blocks_on_processor) {
  const int64_t parts = train_parts(params.first);
  TrainPlan best{};
  double best_time = 0;
  for (int64_t each = 1; each <= parts; ++each) {
    const int64_t blocks = (parts + each - 1) / each;
    TrainPlan plan = train_plan_with(params, true, blocks, 1);
    if (plan.shared_bytes > shared_limit) break;
    const int64_t capacity = processors * blocks_on_processor(true, plan.shared_bytes) / blocks;
    if (capacity == 0) continue;
    plan = train_plan_with(params, true, blocks, params.runs < capacity ? params.runs : capacity);
    // Microseconds a step, by the estimates of docs/gpu.md: the way of an exchange, then what a multiprocessor does one block
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
  const int64_t capacity = processors * blocks_on_processor(false, 0);
  if (capacity == 0) return best;
  const int64_t blocks = parts < capacity ? parts : capacity;
  const int64_t together = capacity / blocks;
  const TrainPlan plan = train_plan_with(params, false, blocks, params.runs < together ? params.runs : together);
  return indices_fit(params.first, plan) ? plan : best;
}

// ---- The kernel --------------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T not_a_number() {
  return T(float_of(0x7fc00000u));
}

template <typename T>
__device__ __forceinline__ bool is_finite(T value) {
  return value - value == T(0);
}

// max(value, 0) that keeps NaN.
template <typename T>
__device__ __forceinline__ T rectified(T value) {
  return value <= T(0) ? T(0) : value;
}

template <typename T>
struct SgdStep {
  T lr, momentum, keep, decay, of_gradient, of_momentum;  // as in csrc/cpu/training.inc.h

  __device__ __forceinline__ static SgdStep of(const SgdParams& p, bool first) {
    return {static_cast<T>(p.lr),
            static_cast<T>(p.momentum),
            first || p.momentum == 0 ? T(1) : static_cast<T>(1 - p.dampening),
            static_cast<T>(p.weight_decay),
            p.nesterov ? T(1) : T(0),
            p.nesterov ? static_cast<T>(p.momentum) : T(1)};
  }

  __device__ __forceinline__ void update(T gradient, T& value, T& velocity) const {
    gradient = gradient + decay * value;
    velocity = momentum * velocity + keep * gradient;
    value = value - lr * (of_gradient * gradient + of_momentum * velocity);
  }
};

// What a block knows of the run it trains. It lies in shared memory: in registers, through all of a step, it would leave too
// few for the work.
template <typename T>
struct TrainRun {
  TrainArena at;
  int64_t block;    // of this run's
  int32_t classes;  // of this block
  int32_t all_finite;
  int64_t samples, rows;
  RuleParams rule;
  SgdStep<T> first_step, next_steps;
  // The run's arrays.
  const int64_t* order;
  const T *member_logits, *base_logsumexp, *label_logit, *scale;
  const T *penalty, *few_offset;  // or null
  const int32_t* few_of_label;
  T* state;  // in global memory
  // What its blocks tell each other.
  uint32_t* arrived;  // [blocks], 0 when the launch begins
  uint32_t* failed;
  T *all_scores, *all_gradients, *all_partials;
};

// The steps; all threads of a block call the same functions. Indices of what a block owns have 32 bits, as divisions in 64 take
// a GPU a hundred cycles; choose_train_plan() sees to it that they suffice.
template <typename T, bool kResident, bool kShared>
struct TrainBlock {
  const TrainParams& p;
  TrainRun<T>& run;
  unsigned char* const arena;
  const int64_t blocks;
  uint32_t round;  // the last meeting

  __device__ __forceinline__ T* here(int64_t offset) const { return reinterpret_cast<T*>(arena + offset); }
  __device__ __forceinline__ int32_t* few() const { return reinterpret_cast<int32_t*>(arena + run.at.few); }
  __device__ __forceinline__ int32_t* columns() const { return reinterpret_cast<int32_t*>(arena + run.at.columns); }
  __device__ __forceinline__ int members() const { return static_cast<int>(p.members); }
  __device__ __forceinline__ int width() const { return static_cast<int>(train_width(p)); }
  __device__ __forceinline__ int64_t class_of(int j) const { return run.block + j * blocks; }
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  __device__ __forceinline__ static int warps() { return static_cast<int>(blockDim.x) / kWarp; }
  __device__ __forceinline__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static int threads() { return static_cast<int>(blockDim.x); }

  __device__ __forceinline__ int64_t steps() const { return (run.samples + p.batch - 1) / p.batch; }
  __device__ __forceinline__ int batch_size(int64_t step) const {
    const int64_t left = run.samples - step * p.batch;
    return static_cast<int>(left < p.batch ? left : p.batch);
  }
  // Which set of run.failed and run.all_scores the meeting before, or the next one, is about.
  __device__ __forceinline__ int64_t published() const { return static_cast<int64_t>(round & 1) * p.num_few; }
  __device__ __forceinline__ int64_t to_publish() const { return static_cast<int64_t>((round + 1) & 1) * p.num_few; }

  // Where the blocks of one run meet. Each says in a word of its own how far it is, so that none waits for its turn at a common
  // counter, and the words never have to be reset between runs. Between arrive() and wait() a block may do whatever needs
  // nothing from the others.
  __device__ __forceinline__ void arrive() {
    ++round;
    __syncthreads();  // what the block's threads wrote comes before the word that thread 0 releases
    if (threadIdx.x == 0) store_release(run.arrived + run.block, round);
  }
  __device__ __forceinline__ void wait() const {
    for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {
      // The difference, as the rounds of a long launch may wrap around.
      while (static_cast<int32_t>(load_acquire(run.arrived + i) - round) < 0) pause();
    }
    __syncthreads();
  }

  __device__ __forceinline__ T gathered(int64_t row, int32_t column) const {
    const bool known = in_range(row, run.rows) && in_range(column, p.columns);
    return known ? run.member_logits[row * p.columns + column] : not_a_number<T>();
  }
  // Of sample b of the step's batch, the logit of member k of this block's class j.
  __device__ __forceinline__ T member_logit(int64_t step, int j, int k, int b) const {
    const int entry = j * members() + k;
    if constexpr (kResident) {
      const int set = static_cast<int>(step & 1) * run.classes * members();
      return here(run.at.logits)[(set + entry) * width() + b];
    } else {
      return gathered(run.order[step * p.batch + b], columns()[entry]);
    }
  }

  // Fetches what a step needs of its samples, none of which is trained.
  __device__ __forceinline__ void fetch(int64_t step) const {
    const int count = batch_size(step), chunks = width() / kWarp, parity = static_cast<int>(step & 1);
    const int64_t* __restrict__ const rows = run.order + step * p.batch;
    for (int chunk = warp(); chunk < chunks; chunk += warps()) {
      const int b = chunk * kWarp + lane_index(), at = parity * width() + b;
      if (b >= count) continue;
      const int64_t row = rows[b];
      const bool known = in_range(row, run.rows);
      const int32_t of_label = known ? run.few_of_label[row] : -1;
      // A sample that does not exist makes the loss NaN, which ends the run.
      here(run.at.base)[at] = known ? run.base_logsumexp[row] : not_a_number<T>();
      here(run.at.label)[at] = known && of_label < p.num_few ? run.label_logit[row] : not_a_number<T>();
      few()[at] = of_label < p.num_few ? of_label : -1;
    }
    if constexpr (kResident) {
      const int entries = run.classes * members();
      T* const logits = here(run.at.logits) + parity * entries * width();
      for (int item = warp(); item < entries * chunks; item += warps()) {
        const int entry = item / chunks, b = (item - entry * chunks) * kWarp + lane_index();
        if (b < count) logits[entry * width() + b] = gathered(rows[b], columns()[entry]);
      }
    }
  }

  // The scores of this block's classes, for itself and for the others.
  __device__ __forceinline__ void publish_scores(int64_t step) const {
    const int count = batch_size(step), chunks = width() / kWarp;
    T* const scores = here(run.at.scores);
    T* const all = run.all_scores + to_publish() * width();
    for (int item = warp(); item < run.classes * chunks; item += warps()) {
      const int j = item / chunks, b = (item - j * chunks) * kWarp + lane_index();
      if (b >= count) continue;
      const T* const alpha = here(run.at.alpha) + j * members();
      T score = run.few_offset == nullptr ? T(0) : run.few_offset[class_of(j)];
      for (int k = 0; k < members(); ++k) score = fused(alpha[k], member_logit(step, j, k, b), score);
      scores[j * width() + b] = score;
      all[class_of(j) * width() + b] = score;
    }
  }

  // Largest score and softmax denominator of every sample. Is every loss finite? All blocks of the run come to the same answer,
  // as they do the same arithmetic on the same numbers.
  __device__ __forceinline__ void reduce_scores(int64_t step) const {
    const int count = batch_size(step), chunks = width() / kWarp, set = static_cast<int>(step & 1) * width();
    const int64_t row = width();
    const T* const all = run.all_scores + published() * row;
    T* const largest = here(run.at.largest);
    T* const total = here(run.at.total);
    for (int item = warp(); item < kStripes * chunks; item += warps()) {
      const int stripe = item / chunks, b = (item - stripe * chunks) * kWarp + lane_index();
      if (b >= count) continue;
      T top = here(run.at.base)[set + b], sum = stripe == 0 ? T(1) : T(0);
      for (int64_t f = stripe; f < p.num_few; f += kStripes * kScoresAtOnce) {
        T values[kScoresAtOnce];
        T higher = top;
        ALPHAEXT_UNROLL(8)
        for (int i = 0; i < kScoresAtOnce; ++i) {
          const int64_t other = f + i * kStripes;
          // In place of a class that is not there one that is, which then counts nothing.
          values[i] = load_published(all + (other < p.num_few ? other : f) * row + b);
        }
        ALPHAEXT_UNROLL(8)
        for (int i = 0; i < kScoresAtOnce; ++i) higher = values[i] > higher ? values[i] : higher;
        if (higher > top) sum *= std::exp(top - higher);
        top = higher;
        ALPHAEXT_UNROLL(8)
        for (int i = 0; i < kScoresAtOnce; ++i) sum += f + i * kStripes < p.num_few ? std::exp(values[i] - top) : T(0);
      }
      largest[stripe * width() + b] = top;
      total[stripe * width() + b] = sum;
    }
    __syncthreads();
    for (int b = thread(); b < count; b += threads()) {
      T top = largest[b];
      for (int stripe = 1; stripe < kStripes; ++stripe) {
        const T other = largest[stripe * width() + b];
        top = other > top ? other : top;
      }
      T sum = 0;
      for (int stripe = 0; stripe < kStripes; ++stripe) {
        sum += total[stripe * width() + b] * std::exp(largest[stripe * width() + b] - top);
      }
      const int32_t of_label = few()[set + b];
      const T own = of_label >= 0 ? load_published(all + of_label * row + b) : here(run.at.label)[set + b];
      largest[b] = top;
      total[b] = sum;
      here(run.at.own)[b] = own;
      if (!(is_finite(top) && is_finite(sum) && is_finite(own))) report_loss();
    }
    __syncthreads();
  }

  __device__ __forceinline__ void report_loss() const { atomicExch(&run.all_finite, 0); }

  // The batch's loss, in every lane of the warp that asks.
  __device__ __forceinline__ double batch_loss(int count) const {
    double sum = 0;
    for (int b = lane_index(); b < count; b += kWarp) {
      sum += static_cast<double>(here(run.at.largest)[b]) + std::log(static_cast<double>(here(run.at.total)[b])) -
             static_cast<double>(here(run.at.own)[b]);
    }
    return warp_sum(sum);
  }

  // From the scores to the gradient of the outputs of this block's classes.
  __device__ __forceinline__ void output_gradients(int64_t step) const {
    const int count = batch_size(step);
    const int32_t* const labels = few() + (step & 1) * width();
    const T* const largest = here(run.at.largest);
    const T* const total = here(run.at.total);
    T* const gradient = here(run.at.gradient);
    const T weight = T(1) / static_cast<T>(count);
    for (int item = warp(); item < run.classes * members(); item += warps()) {
      const int j = item / members(), k = item - j * members();
      const T* const scores = here(run.at.scores) + j * width();
      T sum = 0;
      for (int b = lane_index(); b < count; b += kWarp) {
        const T own = labels[b] == class_of(j) ? weight : T(0);
        sum += (std::exp(scores[b] - largest[b]) * (weight / total[b]) - own) * member_logit(step, j, k, b);
      }
      sum = warp_sum(sum);
      if (lane_index() == 0) gradient[item] = sum;
    }
    __syncthreads();
    for (int j = thread(); j < run.classes; j += threads()) {
      T* const of_class = gradient + j * members();
      const T* const outputs = here(run.at.raw) + j * members();
      rule_backward<T>(run.rule, p.members, outputs, of_class, of_class);
      for (int k = 0; run.penalty != nullptr && k < members(); ++k) {
        of_class[k] += run.penalty[k] * (outputs[k] - run.penalty[members() + k]);
      }
      if constexpr (kShared) {
        for (int k = 0; k < members(); ++k) run.all_gradients[class_of(j) * members() + k] = of_class[k];
      }
    }
    __syncthreads();
  }

  // A class's hidden units go to so many warps.
  __device__ __forceinline__ int slices() const {
    const int wanted = static_cast<int>((p.tiles * kTileWidth + kWarp - 1) / kWarp);
    return wanted < kSlices ? wanted : kSlices;
  }

  // Where a class's network has hidden unit h of a row: c, its momentum, M rows of w2, M of its momentum.
  __device__ __forceinline__ int64_t state_at(int row, int h) const {
    constexpr int kWidth = static_cast<int>(kTileWidth);
    if constexpr (kResident) {
      // In tiles, two halves of a warp would meet in the same banks of shared memory.
      return row * static_cast<int>(p.tiles) * kWidth + h;
    } else {
      return (h / kWidth * int64_t{2 + 2 * members()} + row) * kWidth + h % kWidth;
    }
  }

  // A slice's part of a class's outputs, less b2; with kUpdate after a step of SGD. A lane sees to hidden units of its own, so
  // nothing here waits for another lane.
  template <bool kUpdate>
  __device__ __forceinline__ void visit_slice(T* network, const T* gradient, T factor, const SgdStep<T>& step, int slice,
                                              T* outputs) const {
    const int hidden = static_cast<int>(p.tiles * kTileWidth), begin = slice * kWarp + lane_index();
    if constexpr (kUpdate) {
      for (int h = begin; h < hidden; h += kSlices * kWarp) {
        T c = network[state_at(0, h)], momentum = network[state_at(1, h)], delta = 0;
        const T unit = rectified(c);
        for (int k = 0; k < members(); ++k) delta += gradient[k] * network[state_at(2 + k, h)];
        delta = c <= T(0) ? T(0) : factor * delta;  // a NaN stays visible
        step.update(delta, c, momentum);
        network[state_at(0, h)] = c;
        network[state_at(1, h)] = momentum;
        for (int k = 0; k < members(); ++k) {
          T* const weight = network + state_at(2 + k, h);
          step.update(gradient[k] * unit, *weight, network[state_at(2 + members() + k, h)]);
        }
      }
    }
    for (int k = 0; k < members(); ++k) {
      T sum = 0;
      for (int h = begin; h < hidden; h += kSlices * kWarp) {
        sum += network[state_at(2 + k, h)] * rectified(network[state_at(0, h)]);
      }
      sum = warp_sum(sum);
      if (lane_index() == 0) outputs[k] = sum;
    }
  }

  // The same for a number of members that is known, with all of a hidden unit's numbers in registers: each is read once.
  template <bool kUpdate, int kMembers>
  __device__ __forceinline__ void visit_slice_of(T* network, const T* gradient, T factor, const SgdStep<T>& step, int slice,
                                                 T* outputs) const {
    const int hidden = static_cast<int>(p.tiles * kTileWidth);
    T sums[kMembers], gradients[kMembers], weights[kMembers];
    ALPHAEXT_UNROLL(8)
    for (int k = 0; k < kMembers; ++k) {
      sums[k] = 0;
      if constexpr (kUpdate) gradients[k] = gradient[k];
    }
    for (int h = slice * kWarp + lane_index(); h < hidden; h += kSlices * kWarp) {
      T c = network[state_at(0, h)];
      ALPHAEXT_UNROLL(8)
      for (int k = 0; k < kMembers; ++k) weights[k] = network[state_at(2 + k, h)];
      if constexpr (kUpdate) {
        T momentum = network[state_at(1, h)], delta = 0;
        const T unit = rectified(c);
        ALPHAEXT_UNROLL(8)
        for (int k = 0; k < kMembers; ++k) delta += gradients[k] * weights[k];
        delta = c <= T(0) ? T(0) : factor * delta;
        step.update(delta, c, momentum);
        network[state_at(0, h)] = c;
        network[state_at(1, h)] = momentum;
        ALPHAEXT_UNROLL(8)
        for (int k = 0; k < kMembers; ++k) {
          momentum = network[state_at(2 + kMembers + k, h)];
          step.update(gradients[k] * unit, weights[k], momentum);
          network[state_at(2 + k, h)] = weights[k];
          network[state_at(2 + kMembers + k, h)] = momentum;
        }
      }
      const T unit = rectified(c);
      ALPHAEXT_UNROLL(8)
      for (int k = 0; k < kMembers; ++k) sums[k] += weights[k] * unit;
    }
    ALPHAEXT_UNROLL(8)
    for (int k = 0; k < kMembers; ++k) {
      const T sum = warp_sum(sums[k]);
      if (lane_index() == 0) outputs[k] = sum;
    }
  }

  template <bool kUpdate>
  __device__ __forceinline__ void visit_classes(const SgdStep<T>& of_run) const {
    const SgdStep<T> step = of_run;
    const int64_t size = p.tiles * (2 + 2 * p.members) * kTileWidth;
    for (int item = warp(); item < run.classes * slices(); item += warps()) {
      const int j = item / slices(), slice = item - j * slices();
      const T* const gradient = here(run.at.gradient) + j * members();
      T* const outputs = here(run.at.partial) + item * members();
      T* const network = kResident ? here(run.at.state) + j * size : run.state + class_of(j) * size;
      const T factor = kUpdate ? run.scale[class_of(j)] : T(0);
      if (members() == 6) {
        visit_slice_of<kUpdate, 6>(network, gradient, factor, step, slice, outputs);
      } else {
        visit_slice<kUpdate>(network, gradient, factor, step, slice, outputs);
      }
    }
    __syncthreads();
  }

  // One network for all classes: this block's tiles of hidden units, and their parts of all outputs for the others. The
  // gradients of a tile's pre-activations, of all classes, are mixed by the Gram matrix; those of w2 add up over classes.
  template <bool kUpdate>
  __device__ __forceinline__ void visit_tiles(const SgdStep<T>& of_run) const {
    const SgdStep<T> step = of_run;
    constexpr int kWidth = static_cast<int>(kTileWidth);
    const int num_few = static_cast<int>(p.num_few);
    const int64_t size = (2 * p.num_few + 2 * p.members) * kTileWidth;
    T* const deltas = here(run.at.partial);      // [F, kTileWidth]
    T* const grad_w2 = deltas + num_few * kWidth;  // [M, kTileWidth]
    for (int64_t i = 0, t = run.block; t < p.tiles; ++i, t += blocks) {
      T* const c = (kResident ? here(run.at.state) + i * size : run.state + t * size);
      T* const c_momentum = c + num_few * kWidth;
      T* const w2 = c_momentum + num_few * kWidth;
      T* const w2_momentum = w2 + members() * kWidth;
      if constexpr (kUpdate) {
        for (int item = thread(); item < (num_few + members()) * kWidth; item += threads()) {
          const int row = item / kWidth, unit = item % kWidth;
          T sum = 0;
          if (row < num_few) {
            const T* const gradients = run.all_gradients + int64_t{row} * members();
            for (int k = 0; k < members(); ++k) sum += load_published(gradients + k) * w2[k * kWidth + unit];
            sum = c[item] <= T(0) ? T(0) : sum;
          } else {
            const T* const gradients = run.all_gradients + (row - num_few);
            for (int f = 0; f < num_few; ++f) {
              sum += load_published(gradients + int64_t{f} * members()) * rectified(c[f * kWidth + unit]);
            }
          }
          deltas[item] = sum;
        }
        __syncthreads();
        for (int item = thread(); item < (num_few + members()) * kWidth; item += threads()) {
          const int row = item / kWidth, unit = item % kWidth;
          if (row < num_few) {
            const T* __restrict__ const scale = run.scale + int64_t{row} * num_few;
            T sum = 0;
            for (int g = 0; g < num_few; ++g) sum += scale[g] * deltas[g * kWidth + unit];
            step.update(sum, c[item], c_momentum[item]);
          } else {
            const int at = item - num_few * kWidth;
            step.update(grad_w2[at], w2[at], w2_momentum[at]);
          }
        }
        __syncthreads();
      }
      for (int item = thread(); item < num_few * members(); item += threads()) {
        const int f = item / members(), k = item - f * members();
        T sum = 0;
        for (int unit = 0; unit < kWidth; ++unit) sum += w2[k * kWidth + unit] * rectified(c[f * kWidth + unit]);
        run.all_partials[t * p.num_few * p.members + item] = sum;
      }
      __syncthreads();
    }
  }

  // The shared network's b2, of which every block has a copy and does the same to it.
  __device__ __forceinline__ void update_shared_b2(const SgdStep<T>& step) const {
    for (int k = warp(); k < members(); k += warps()) {
      T sum = 0;
      for (int64_t f = lane_index(); f < p.num_few; f += kWarp) sum += load_published(run.all_gradients + f * members() + k);
      sum = warp_sum(sum);
      if (lane_index() == 0) step.update(sum, here(run.at.b2)[k], here(run.at.b2_momentum)[k]);
    }
    __syncthreads();
  }

  // Outputs and coefficients of this block's classes, from the parts of the outputs.
  template <bool kUpdate>
  __device__ __forceinline__ void finish_outputs(const SgdStep<T>& step) const {
    uint32_t* const failed = run.failed + to_publish();
    for (int j = warp(); j < run.classes; j += warps()) {
      T* const raw = here(run.at.raw) + j * members();
      T* const alpha = here(run.at.alpha) + j * members();
      for (int k = lane_index(); k < members(); k += kWarp) {
        T sum = 0;
        if constexpr (kShared) {
          const T* const parts = run.all_partials + class_of(j) * members() + k;
          for (int64_t t = 0; t < p.tiles; ++t) sum += load_published(parts + t * p.num_few * p.members);
          raw[k] = sum + here(run.at.b2)[k];
        } else {
          const T* const parts = here(run.at.partial) + j * slices() * members() + k;
          const int at = j * members() + k;
          for (int slice = 0; slice < slices(); ++slice) sum += parts[slice * members()];
          T* const b2 = here(run.at.b2) + at;
          if constexpr (kUpdate) step.update(here(run.at.gradient)[at], *b2, here(run.at.b2_momentum)[at]);
          raw[k] = sum + *b2;
        }
      }
      __syncwarp();
      if (lane_index() == 0) {
        bool finite = true;
        for (int k = 0; k < members(); ++k) finite = finite && is_finite(raw[k]);
        rule_forward<T>(run.rule, p.members, raw, alpha);
        // A rule may hide it, but all blocks must see it in the scores.
        if (!finite) alpha[0] = not_a_number<T>();
        failed[class_of(j)] = finite ? 0 : 1;
      }
    }
    __syncthreads();
  }

  // The state from global memory into this block's, or back.
  template <bool kStore>
  __device__ __forceinline__ void move_state() const {
    const auto move = [](T* outside, T* inside) {
      if constexpr (kStore) {
        *outside = *inside;
      } else {
        *inside = *outside;
      }
    };
    constexpr int kWidth = static_cast<int>(kTileWidth);
    if constexpr (kShared) {
      const int size = static_cast<int>(2 * p.num_few + 2 * p.members) * kWidth;
      for (int64_t i = 0, t = run.block; t < p.tiles; ++i, t += blocks) {
        for (int at = thread(); at < size; at += threads()) move(run.state + t * size + at, here(run.at.state) + i * size + at);
      }
    } else {
      const int rows = 2 + 2 * members(), size = static_cast<int>(p.tiles) * rows * kWidth;
      for (int j = 0; j < run.classes; ++j) {
        for (int at = thread(); at < size; at += threads()) {
          const int row = at / kWidth, tile = row / rows, h = tile * kWidth + at % kWidth;
          move(run.state + class_of(j) * size + at, here(run.at.state) + int64_t{j} * size + state_at(row - tile * rows, h));
        }
      }
    }
  }

  // b2 and its momentum into this block's memory, or back.
  template <bool kStore>
  __device__ __forceinline__ void move_b2(T* global, T* global_momentum) const {
    const int count = kShared ? members() : run.classes * members();
    for (int at = thread(); at < count; at += threads()) {
      const int64_t outside = kShared ? at : class_of(at / members()) * members() + at % members();
      if constexpr (!kStore) {
        here(run.at.b2)[at] = global[outside];
        here(run.at.b2_momentum)[at] = global_momentum[outside];
      } else if (!kShared || run.block == 0) {
        global[outside] = here(run.at.b2)[at];
        global_momentum[outside] = here(run.at.b2_momentum)[at];
      }
    }
  }

  // The lowest class whose outputs are not finite, or -1; in every lane of the warp that asks.
  __device__ __forceinline__ int64_t failed_class() const {
    const uint32_t* const failed = run.failed + published();
    for (int64_t first = 0; first < p.num_few; first += kWarp) {
      const int64_t f = first + lane_index();
      const unsigned marked = __ballot_sync(0xffffffffu, f < p.num_few && load_published(failed + f) != 0);
      for (int lane = 0; marked != 0 && lane < kWarp; ++lane) {
        if ((marked >> lane) & 1u) return first + lane;
      }
    }
    return -1;
  }

  // The lowest class whose score makes a denominator NaN, or -1.
  __device__ __forceinline__ int64_t class_of_bad_score(int count) const {
    const T* const all = run.all_scores + published() * width();
    for (int64_t f = 0; f < p.num_few; ++f) {
      bool bad = false;
      for (int b = lane_index(); b < count; b += kWarp) {
        const T score = load_published(all + f * width() + b);
        bad = bad || !(is_finite(score) || score < T(0));
      }
      if (__any_sync(0xffffffffu, bad)) return f;
    }
    return -1;
  }

  // All steps of the run, and its result.
  __device__ __forceinline__ void train(double* result) {
    const int64_t last = steps();
    const bool counts = run.block == 0 && warp() == 0;
    if constexpr (kShared) {
      visit_tiles<false>(run.first_step);
      arrive();
      wait();
    } else {
      visit_classes<false>(run.first_step);
    }
    finish_outputs<false>(run.first_step);
    if (last > 0) fetch(0);
    __syncthreads();

    double loss = 0;
    int64_t step = 0;
    for (; step < last; ++step) {
      publish_scores(step);
      arrive();
      // What needs nobody else's scores, while they are on their way.
      if (counts && step > 0) loss += batch_loss(static_cast<int>(p.batch));
      if (step + 1 < last) fetch(step + 1);
      wait();
      reduce_scores(step);
      if (run.all_finite == 0) break;
      output_gradients(step);
      const SgdStep<T>& sgd = step == 0 ? run.first_step : run.next_steps;
      if constexpr (kShared) {
        arrive();
        wait();
        update_shared_b2(sgd);
        visit_tiles<true>(sgd);
        arrive();
        wait();
      } else {
        visit_classes<true>(sgd);
      }
      finish_outputs<true>(sgd);
    }

    int64_t failed_step = -1, which = -1;
    if (step < last) {
      if (counts) {
        // Outputs failed in the step that made them, the one before; a loss in its own.
        which = failed_class();
        failed_step = which < 0 ? step : (step > 0 ? step - 1 : 0);
        if (which < 0) {
          which = class_of_bad_score(batch_size(step));
          loss += batch_loss(batch_size(step));
        }
      }
    } else {
      arrive();
      if (counts && last > 0) loss += batch_loss(batch_size(last - 1));
      wait();
      if (counts) {
        which = failed_class();
        if (which >= 0) failed_step = last > 0 ? last - 1 : 0;
      }
    }
    if (counts && lane_index() == 0) {
      result[0] = loss;
      result[1] = static_cast<double>(failed_step);
      result[2] = static_cast<double>(which);
    }
  }
};

// A run's rule, SGD and number of samples; where it has no settings of its own, those of `p`.
template <typename T>
__device__ __forceinline__ void read_settings(const TrainParams& p, const double* settings, TrainRun<T>& run) {
  SgdParams sgd = p.sgd;
  run.rule = p.rule;
  run.samples = p.samples;
  if (settings != nullptr) {
    run.rule.rule = settings[kRule] == 0 ? Rule::Softmax : settings[kRule] == 1 ? Rule::Clamp : Rule::L1;
    run.rule.gamma = settings[kGamma];
    run.rule.projected_gradient = settings[kProjectedGradient] != 0;
    sgd = SgdParams{settings[kLr],          settings[kMomentum],      settings[kDampening],
                    settings[kWeightDecay], settings[kNesterov] != 0, settings[kFirstStep] != 0};
    const double samples = settings[kSamples];
    if (samples >= 0 && samples < static_cast<double>(p.samples)) run.samples = static_cast<int64_t>(samples);
  }
  run.first_step = SgdStep<T>::of(sgd, sgd.first_step);
  run.next_steps = SgdStep<T>::of(sgd, false);
}

// plan.runs_at_once groups of plan.blocks blocks, launched so that all run at the same time. kResident is plan.resident;
// kShared: one network serves all classes.
template <typename T, bool kResident, bool kShared>
__global__ void __launch_bounds__(kTrainThreads<T>, 1) train_kernel(const TrainRunsParams params, const TrainPlan plan) {
  ALPHAEXT_DYNAMIC_SHARED(unsigned char, shared_arena);
  ALPHAEXT_STATIC_SHARED(TrainRun<T>, run_memory, 1);
  const TrainParams& p = params.first;
  TrainRun<T>& run = run_memory[0];
  const int64_t group = blockIdx.x / plan.blocks;
  unsigned char* const exchanges = params.workspace + train_meeting_bytes(plan);
  unsigned char* arena;
  if constexpr (kResident) {
    arena = shared_arena;
  } else {
    arena = exchanges + plan.runs_at_once * train_exchange(p).bytes + blockIdx.x * plan.arena_bytes;
  }
  if (threadIdx.x == 0) {
    const TrainExchange at = train_exchange(p);
    unsigned char* const exchange = exchanges + group * at.bytes;
    run.at = train_arena(p, kResident, plan.classes, plan.tiles);
    run.block = blockIdx.x - group * plan.blocks;
    run.classes = run.block < p.num_few ? static_cast<int32_t>((p.num_few - run.block - 1) / plan.blocks + 1) : 0;
    run.rows = params.rows;
    run.arrived = reinterpret_cast<uint32_t*>(params.workspace + group * padded(4 * plan.blocks, 256));
    run.failed = reinterpret_cast<uint32_t*>(exchange + at.failed);
    run.all_scores = reinterpret_cast<T*>(exchange + at.scores);
    run.all_gradients = reinterpret_cast<T*>(exchange + at.gradient);
    run.all_partials = reinterpret_cast<T*>(exchange + at.partial);
  }
  __syncthreads();

  TrainBlock<T, kResident, kShared> block{p, run, arena, plan.blocks, 0};
  const int64_t coefficients = p.num_few * p.members, networks = kShared ? 1 : p.num_few;
  for (int64_t r = group; r < params.runs; r += plan.runs_at_once) {
    const int64_t of_networks = r * networks * p.members;
    if (threadIdx.x == 0) {
      const int64_t of_logits = params.separate_logits ? r * params.rows : 0;
      read_settings(p, params.settings == nullptr ? nullptr : params.settings + r * kRunSettings, run);
      run.all_finite = 1;
      run.order = p.order + r * p.samples;
      run.member_logits = static_cast<const T*>(p.member_logits) + of_logits * p.columns;
      run.base_logsumexp = static_cast<const T*>(p.base_logsumexp) + of_logits;
      run.label_logit = static_cast<const T*>(p.label_logit) + of_logits;
      run.few_of_label = p.few_of_label + of_logits;
      run.scale = static_cast<const T*>(p.gradient_scale) + r * p.num_few * (kShared ? p.num_few : 1);
      run.penalty = p.penalty == nullptr ? nullptr : static_cast<const T*>(p.penalty) + r * 2 * p.members;
      run.few_offset = p.few_offset == nullptr ? nullptr : static_cast<const T*>(p.few_offset) + r * p.num_few;
      run.state = static_cast<T*>(p.state) +
                  r * networks * p.tiles * (2 * (kShared ? p.num_few : 1) + 2 * p.members) * kTileWidth;
    }
    __syncthreads();
    const int entries = run.classes * block.members();
    const auto outside = [&](int entry) {
      return r * coefficients + block.class_of(entry / block.members()) * p.members + entry % block.members();
    };
    for (int i = block.thread(); i < entries; i += block.threads()) block.columns()[i] = p.member_columns[outside(i)];
    if constexpr (kResident) block.template move_state<false>();
    block.template move_b2<false>(static_cast<T*>(p.b2) + of_networks, static_cast<T*>(p.b2_momentum) + of_networks);
    __syncthreads();
    block.train(params.results + r * 3);
    __syncthreads();
    if constexpr (kResident) block.template move_state<true>();
    block.template move_b2<true>(static_cast<T*>(p.b2) + of_networks, static_cast<T*>(p.b2_momentum) + of_networks);
    for (int i = block.thread(); i < entries; i += block.threads()) {
      static_cast<T*>(p.alpha)[outside(i)] = block.here(run.at.alpha)[i];
      static_cast<T*>(p.raw)[outside(i)] = block.here(run.at.raw)[i];
    }
    __syncthreads();
  }
}

// ---- Validation --------------------------------------------------------------------------------------------------------

constexpr int kValidateThreads = 256;

// A block scores kBlockSamples samples for one run. Runs go fastest: blocks that run together share the samples' logits.
inline LaunchShape validate_shape(const ValidateRunsParams& params, int threads = kValidateThreads) {
  const int64_t blocks = (params.first.samples + kBlockSamples - 1) / kBlockSamples;
  return shape_for(blocks * params.runs, 1, threads);
}

template <typename T>
__global__ void __launch_bounds__(kValidateThreads, kMinBlocks) validate_kernel(const ValidateRunsParams params) {
  ALPHAEXT_STATIC_SHARED(int32_t, ranks, kBlockSamples);
  const ValidateParams& p = params.first;
  const T* __restrict__ const label_logit = static_cast<const T*>(p.label_logit);
  const T* __restrict__ const top_logits = static_cast<const T*>(p.top_logits);
  const int32_t* __restrict__ const few_classes = p.few_classes;
  const int64_t coefficients = p.num_few * p.members, blocks = (p.samples + kBlockSamples - 1) / kBlockSamples;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  constexpr int kChunks = kBlockSamples / kWarp;

  for (int64_t item = blockIdx.x; item < blocks * params.runs; item += gridDim.x) {
    const int64_t block = item / params.runs, run = item - block * params.runs;
    const T* __restrict__ const alpha = static_cast<const T*>(p.alpha) + run * coefficients;
    const int32_t* __restrict__ const columns = p.member_columns + run * coefficients;
    const T* __restrict__ const logits = static_cast<const T*>(p.member_logits) + block * p.columns * kBlockSamples;
    const auto score_of = [&](int64_t few, int64_t b) {
      T score = 0;
      for (int64_t k = 0; k < p.members; ++k) {
        const int32_t column = columns[few * p.members + k];
        const T logit = in_range(column, p.columns) ? logits[column * kBlockSamples + b] : not_a_number<T>();
        score = fused(alpha[few * p.members + k], logit, score);
      }
      return score;
    };
    for (int b = static_cast<int>(threadIdx.x); b < kBlockSamples; b += blockDim.x) ranks[b] = 0;
    __syncthreads();
    // Warps take a chunk of the samples each, and all but the first of a chunk a share of its classes.
    const int chunks_at_once = warps < kChunks ? warps : kChunks, shares = warps / chunks_at_once;
    for (int chunk = warp % chunks_at_once; chunk < kChunks; chunk += chunks_at_once) {
      const int64_t b = chunk * kWarp + lane_index(), sample = block * kBlockSamples + b;
      const int64_t label = sample < p.samples ? p.labels[sample] : -1;
      const int64_t few = sample < p.samples ? p.few_of_label[sample] : -1;
      if (!in_range(label, p.num_classes) || few >= p.num_few || warp / chunks_at_once >= shares) continue;
      const T own = few >= 0 ? score_of(few, b) : label_logit[sample];
      int rank = 0;
      for (int64_t f = warp / chunks_at_once; f < p.num_few; f += shares) {
        if (f == few) continue;
        const T score = score_of(f, b);
        rank += score > own || (score == own && few_classes[f] < label);
      }
      if (warp / chunks_at_once == 0) {
        for (int i = 0; i < kTopClasses; ++i) {
          const T top = top_logits[sample * kTopClasses + i];
          rank += top > own || (top == own && p.top_ids[sample * kTopClasses + i] < label);
        }
      }
      atomicAdd(&ranks[b], rank);
    }
    __syncthreads();
    unsigned long long* const hits = reinterpret_cast<unsigned long long*>(p.hits) + run * 2 * p.num_classes;
    for (int b = static_cast<int>(threadIdx.x); b < kBlockSamples; b += blockDim.x) {
      const int64_t sample = block * kBlockSamples + b;
      const int64_t label = sample < p.samples ? p.labels[sample] : -1;
      if (!in_range(label, p.num_classes) || p.few_of_label[sample] >= p.num_few) continue;
      if (ranks[b] < 1) atomicAdd(&hits[label], 1ull);
      if (ranks[b] < kTopClasses) atomicAdd(&hits[p.num_classes + label], 1ull);
    }
    __syncthreads();
  }
}

}  // namespace alphaext::cuda
