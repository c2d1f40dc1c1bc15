// One epoch of training, of several runs side by side, in one persistent cooperative launch: equations 1 to 4, their gradients
// and SGD, step by step. csrc/cpu/train.inc.h does the same on one thread; docs/maintainers/gpu.md has the arithmetic behind the choices
// here.
//
// A run is trained by a group of blocks that nobody else waits for. A block owns some few classes and keeps their networks and
// momentum in shared memory for the whole epoch. Per step it computes its classes' scores, publishes them, waits for the other
// blocks of the run, and then has all scores, from which it computes the softmax denominators itself: one exchange a step. A
// network shared by all classes is cut by hidden units instead and needs two exchanges more.
//
// Every sum has a fixed order that depends on the sizes alone, not on blocks, threads, or what else runs.
#pragma once

#include "train_networks.cuh"
#include "train_scores.cuh"

namespace alphaext::cuda {

template <typename T, bool kResident, bool kShared>
__device__ __forceinline__ void TrainBlock<T, kResident, kShared>::train(double* result) {
  const int64_t last = steps();
  const bool counts = run.block == 0 && warp() == loss_warp();
  fetch_rows(0);
  if constexpr (kShared) {
    visit_tiles<false>(run.first_step);
    arrive();
    wait();
  } else {
    visit_classes<false>(run.first_step);
  }
  finish_outputs<false>(run.first_step);
  int count = batch_size(0);
  if (last > 0) fetch(0, count);
  __syncthreads();

  double loss = 0;
  int64_t step = 0;
  for (; step < last; ++step) {
    count = batch_size(step);
    publish_scores(step, count);
    arrive();
    // What needs nobody else's scores, while they are on their way.
    if (step + 1 < last) fetch(step + 1, batch_size(step + 1));
    if (counts && step > 0) loss += batch_loss(static_cast<int>(p.batch));
    wait();
    reduce_scores(step, count);
    if (run.all_finite == 0) break;
    output_gradients(step, count);
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
        which = class_of_bad_score(count);
        loss += batch_loss(count);
      }
    }
  } else {
    arrive();
    if (counts && last > 0) loss += batch_loss(count);
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
    run.member_shift = shift_for(p.members);
    run.chunk_shift = shift_for(train_width(p) / kWarp);
    run.rows = params.rows;
    run.arrived = reinterpret_cast<uint32_t*>(params.workspace + group * padded(4 * plan.blocks, 256));
    run.failed = reinterpret_cast<uint32_t*>(exchange + at.failed);
    run.all_scores = reinterpret_cast<T*>(exchange + at.scores);
    run.all_gradients = reinterpret_cast<T*>(exchange + at.gradient);
    run.all_partials = reinterpret_cast<T*>(exchange + at.partial);
  }
  __syncthreads();

  TrainBlock<T, kResident, kShared> block{p, run, arena, plan.blocks, 0};
  block.fill_scores();
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
    block.keep_arguments(r);
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

}  // namespace alphaext::cuda
