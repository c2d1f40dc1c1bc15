// A block of a training: what it knows of the run it trains, how it meets the others, and its steps, whose texts are in
// train_scores.cuh and train_networks.cuh.
#pragma once

#include "train_exchange.cuh"
#include "train_plan.h"

namespace alphaext::cuda {

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
__device__ __forceinline__ T infinity() {
  return T(float_of(0x7f800000u));
}

template <typename T>
struct SgdStep {
  T lr, momentum, keep, decay, of_gradient, of_momentum;  // as in csrc/cpu/train.inc.h

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
  int32_t member_shift, chunk_shift;  // shift_for() the members, and the batch's warps
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

// The steps; all threads of a block call the same functions. `count` is batch_size(step). Indices of what a block owns have 32
// bits, as divisions in 64 take a GPU a hundred cycles; choose_train_plan() sees to it that they suffice.
template <typename T, bool kResident, bool kShared>
struct TrainBlock {
  const TrainParams& p;
  TrainRun<T>& run;
  unsigned char* const arena;
  const int64_t blocks;
  uint32_t round;  // the last meeting

  __device__ __forceinline__ T* here(int64_t offset) const { return reinterpret_cast<T*>(arena + offset); }
  __device__ __forceinline__ int32_t* few() const { return reinterpret_cast<int32_t*>(arena + run.at.few); }
  __device__ __forceinline__ int64_t* rows() const { return reinterpret_cast<int64_t*>(arena + run.at.rows); }
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
  // Which set of what all publish the meeting before, or the next one, is about.
  __device__ __forceinline__ int64_t published() const { return round & 1; }
  __device__ __forceinline__ int64_t to_publish() const { return (round + 1) & 1; }

  // Who does what between arrive() and wait(). The release waits until the block's writes have reached the second-level cache,
  // so the warp that does it, the last one, does nothing else; the one before it sees to the loss, and the others fetch.
  __device__ __forceinline__ static int loss_warp() { return warps() > 2 ? warps() - 2 : 0; }
  __device__ __forceinline__ static int fetching_warps() { return warps() > 2 ? warps() - 2 : warps(); }

  // Where the blocks of one run meet. Each says in a word of its own how far it is, so that none waits for its turn at a common
  // counter, and the words never have to be reset between runs. Between arrive() and wait() a block may do whatever needs
  // nothing from the others.
  __device__ __forceinline__ void arrive() {
    ++round;
    __syncthreads();  // what the block's threads wrote comes before the word that one of them releases
    if (threadIdx.x == blockDim.x - kWarp) store_release(run.arrived + run.block, round);
  }
  __device__ __forceinline__ void wait() const {
    for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {
      // The difference, as the rounds of a long launch may wrap around.
      while (static_cast<int32_t>(load_acquire(run.arrived + i) - round) < 0) pause();
    }
    __syncthreads();
  }

  __device__ __forceinline__ T gathered(int64_t row, int32_t column) const;

  // Of sample b of the step's batch, the logit of member k of this block's class j.
  __device__ __forceinline__ T member_logit(int64_t step, int j, int k, int b) const;

  // Which samples a step has.
  __device__ __forceinline__ void fetch_rows(int64_t step) const;

  // Fetches what a step needs of its samples, none of which is trained, and which ones the step after it has.
  __device__ __forceinline__ void fetch(int64_t step, int count) const;

  // Where the run's scores have room for classes that are not there, they count nothing: exp(-inf) is 0.
  __device__ __forceinline__ void fill_scores() const;

  // The scores of this block's classes, for itself and for the others.
  __device__ __forceinline__ void publish_scores(int64_t step, int count) const;

  // Largest score and softmax denominator of every sample. Is every loss finite? All blocks of the run come to the same answer,
  // as they do the same arithmetic on the same numbers.
  __device__ __forceinline__ void reduce_scores(int64_t step, int count) const;
  __device__ __forceinline__ void report_loss() const { atomicExch(&run.all_finite, 0); }

  // The batch's loss, in every lane of the warp that asks.
  __device__ __forceinline__ double batch_loss(int count) const;

  // From the scores to the gradient of the outputs of this block's classes.
  __device__ __forceinline__ void output_gradients(int64_t step, int count) const;

  // The rule of class j, backward and forward, in the place of its gradient and from its outputs. With kMembers, the number of
  // members as a constant, all of it happens in registers; 0 takes any number.
  template <int kMembers>
  __device__ __forceinline__ void differentiate_rule(int j) const;
  template <int kMembers>
  __device__ __forceinline__ bool apply_rule(int j) const;

  // A class's hidden units go to so many warps.
  __device__ __forceinline__ int slices() const;

  // Where a class's network has hidden unit h of a row: c, its momentum, M rows of w2, M of its momentum.
  __device__ __forceinline__ int64_t state_at(int row, int h) const;

  // A slice's part of a class's outputs, less b2; with kUpdate after a step of SGD. A lane sees to hidden units of its own, so
  // nothing here waits for another lane.
  template <bool kUpdate>
  __device__ __forceinline__ void visit_slice(T* network, const T* gradient, T factor, const SgdStep<T>& step, int slice,
                                              T* outputs) const;

  // The same for a number of members that is known, with all of a hidden unit's numbers in registers: each is read once.
  template <bool kUpdate, int kMembers>
  __device__ __forceinline__ void visit_slice_of(T* network, const T* gradient, T factor, const SgdStep<T>& step, int slice,
                                                 T* outputs) const;
  template <bool kUpdate>
  __device__ __forceinline__ void visit_classes(const SgdStep<T>& of_run) const;

  // One network for all classes: this block's tiles of hidden units, and their parts of all outputs for the others. The
  // gradients of a tile's pre-activations, of all classes, are mixed by the Gram matrix; those of w2 add up over classes.
  template <bool kUpdate>
  __device__ __forceinline__ void visit_tiles(const SgdStep<T>& of_run) const;

  // The shared network's b2, of which every block has a copy and does the same to it.
  __device__ __forceinline__ void update_shared_b2(const SgdStep<T>& step) const;

  // Outputs and coefficients of this block's classes, from the parts of the outputs.
  template <bool kUpdate>
  __device__ __forceinline__ void finish_outputs(const SgdStep<T>& step) const;

  // The state from global memory into this block's, or back.
  template <bool kStore>
  __device__ __forceinline__ void move_state() const;

  // The arguments that every step reads into this block's memory.
  __device__ __forceinline__ void keep_arguments(int64_t r) const;

  // b2 and its momentum into this block's memory, or back.
  template <bool kStore>
  __device__ __forceinline__ void move_b2(T* global, T* global_momentum) const;

  // The lowest class whose outputs are not finite, or -1; in every lane of the warp that asks.
  __device__ __forceinline__ int64_t failed_class() const;

  // The lowest class whose score makes a denominator NaN, or -1.
  __device__ __forceinline__ int64_t class_of_bad_score(int count) const;

  // All steps of the run, and its result.
  __device__ __forceinline__ void train(double* result);
};

}  // namespace alphaext::cuda
