// Launchers of the training kernel. As in head.h, `stream` is a cudaStream_t, nothing here synchronises or allocates, and each
// function returns nullptr or a message that says what failed.
#pragma once

#include "kernels/training_params.h"

namespace alphaext::cuda {

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

// Can the device train? The blocks of a launch must be able to wait for each other.
bool can_train(int32_t device);
const char* plan_training(const TrainRunsParams& params, TrainPlan* plan, int32_t device);
const char* train_epochs(const TrainRunsParams& params, const TrainPlan& plan, int32_t device, void* stream);

}  // namespace alphaext::cuda
