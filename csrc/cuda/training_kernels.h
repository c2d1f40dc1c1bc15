// Launchers of the training kernels. As in kernels.h, `stream` is a cudaStream_t, nothing here synchronises or allocates, and
// each function returns nullptr or a message that says what failed.
#pragma once

#include "../training.h"

namespace alphaext::cuda {

// What may differ from run to run, a row of kRunSettings numbers each.
enum RunSetting : int {
  kGamma,
  kRule,
  kProjectedGradient,
  kLr,
  kMomentum,
  kDampening,
  kWeightDecay,
  kNesterov,
  kFirstStep,
  kSamples,  // how many of its row of `order` a run trains on
  kRunSettings
};

// One epoch of several runs side by side, of equal sizes. In `first` are the sizes and the arrays of run 0 on the device; those
// of the next run follow at once, as stacked tensors do. Not used of it: workspace.
struct TrainRunsParams {
  TrainParams first;         // rule and sgd count only without `settings`
  int64_t runs, rows;        // rows: of member_logits
  bool separate_logits;      // member_logits, base_logsumexp, label_logit and few_of_label have a leading run dimension too
  const double* settings;    // [R, kRunSettings], or null: those of `first`
  double* results;           // [R, 3], written: loss, failed step or -1, failed class or -1
  unsigned char* workspace;  // TrainPlan::workspace_bytes, aligned to 256 bytes
};

// How the work is cut. Results do not depend on it.
struct TrainPlan {
  bool resident;            // the state stays in shared memory for the whole epoch
  int64_t blocks;           // of one run
  int64_t runs_at_once;     // the others follow, run r after run r - runs_at_once
  int64_t classes, tiles;   // of one block, at most; tiles: of a shared network
  int64_t shared_bytes;     // dynamic, of one block
  int64_t arena_bytes;      // of one block; in shared memory, if resident
  int64_t workspace_bytes;
};

struct ValidateRunsParams {
  ValidateParams first;  // alpha, member_columns and hits of run 0, the others follow; not used: workspace
  int64_t runs;
};

// Can the device run them? The blocks of a launch must be able to wait for each other.
bool can_train(int32_t device);
const char* plan_training(const TrainRunsParams& params, TrainPlan* plan, int32_t device);
const char* train_epochs(const TrainRunsParams& params, const TrainPlan& plan, int32_t device, void* stream);
const char* validate_runs(const ValidateRunsParams& params, int32_t device, void* stream);

}  // namespace alphaext::cuda
