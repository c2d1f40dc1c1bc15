// What the native training engine reads and writes: raw pointers and sizes, no torch.
//
// With a frozen classifier and fixed inputs a training step needs, per sample, the logits of the few classes' members and one
// number for all base classes together (docs/reference/exactness.md). These are computed once (CacheParams), trained on (TrainParams) and
// scored (ValidateParams). `T` below is `dtype`: Float32 or Float64. Sizes use the letters of head_params.h; U is the number of
// distinct member columns, a class twice where it is wanted with and without its bias (rule l1).
#pragma once

#include <cstdint>

#include "kernels/rules.h"
#include "kernels/scalars.h"

namespace alphaext {

// Hidden units come in tiles of this many, the last one filled up with zeros, which training leaves zero.
constexpr int64_t kTileWidth = 16;
// Validation samples come in blocks of this many, so that a block's scores are vectors over samples.
constexpr int64_t kBlockSamples = 64;
constexpr int64_t kTopClasses = 5;

inline int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t blocks_of(int64_t samples) { return rounded_up(samples, kBlockSamples) / kBlockSamples; }

// The random start of the first layers, w1 and b1 uniform in [-bound, bound), or what they make of z.
struct InitialWeightsParams {
  ScalarType dtype;
  int64_t num_few, hidden, inputs, first_network;
  bool shared;
  uint64_t seed;
  double bound;
  void* w1;             // T [networks, H, I], written, or null
  void* b1;             // T [networks, H], written, if w1 is
  const void* z;        // T [F, I], read if preactivation is written
  void* preactivation;  // T [F, H], written, or null
};

inline int64_t initial_weights_workspace_bytes(const InitialWeightsParams& p) {
  return rounded_up(p.inputs + 1, 32) * (p.dtype == ScalarType::Float64 ? 8 : 4);
}

struct SgdParams {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
  bool first_step;  // torch.optim.SGD starts the momentum with the first gradient, undampened
};

// From the logits [rows, N] of a block of samples to what is kept of them.
struct CacheParams {
  ScalarType dtype;
  int64_t rows, num_classes, columns;
  const void* logits;           // T [rows, N]
  const void* few_penalty;      // T [N]: 0 for base classes, -infinity for few ones
  const int64_t* column_class;  // [U]
  const void* column_bias;      // T [U], subtracted
  const int64_t* labels;        // [rows]
  void* base_logsumexp;         // T [rows], written
  void* label_logit;            // T [rows], written: the label's original logit
  // Training: one row a sample. Validation: blocks of [U, kBlockSamples], row r being block r / kBlockSamples.
  bool in_blocks;
  void* member_logits;  // T [rows, U] or [ceil(rows / kBlockSamples), U, kBlockSamples], written
  void* top_logits;     // T [rows, kTopClasses], written, or null: the best base classes, best first
  int32_t* top_ids;     // [rows, kTopClasses], written, or null; classes that do not exist have -infinity and 2^31 - 1
};

struct TrainParams {
  ScalarType dtype;
  RuleParams rule;
  SgdParams sgd;
  int64_t num_few, members, tiles, columns, batch, samples;
  bool shared;                    // one network for all classes
  const int64_t* order;           // [samples]: the epoch, as rows of the arrays below
  const void* member_logits;      // T [rows, U]
  const void* base_logsumexp;     // T [rows]
  const void* label_logit;        // T [rows], read where few_of_label is -1
  const int32_t* few_of_label;    // [rows]: which few class the label is, or -1
  const int32_t* member_columns;  // [F, M]
  const void* gradient_scale;     // T [F], |z|^2 + 1; shared: T [F, F], Z Z^T + 1
  // Half of strength times (output - center)^2, over all outputs, is added to the loss of a step; not to the one reported.
  const void* penalty;     // T [2, M]: strengths, then centers; or null
  const void* few_offset;  // T [F], added to the few scores of training samples; or null
  // Tile by tile, since all of a tile is visited at once: per network (F of them, or 1 of C = F classes, else C = 1)
  // T [tiles, 2 C + 2 M, kTileWidth]: C rows of pre-activations, C of their momentum, M rows of w2, M of their momentum.
  void* state;
  void* b2;           // T [networks, M], updated
  void* b2_momentum;  // T [networks, M], updated
  void* alpha;        // T [F, M], written: the coefficients after the last step
  void* raw;          // T [F, M], written: the sub-modules' outputs after the last step
  void* workspace;    // train_workspace_bytes(), aligned to 64 bytes
};

struct TrainResult {
  double loss;          // sum of the samples' losses
  int64_t failed_step;  // the first step after which something was not finite, or -1; the state is then of no use
  int64_t failed_class;  // which few class, or -1 if none can be named
};

inline int64_t train_workspace_bytes(const TrainParams& p) {
  const int64_t batch = rounded_up(p.batch, kTileWidth);
  const int64_t rule = rounded_up(2 * p.num_few * p.members, kTileWidth);
  const int64_t tile = rounded_up(p.columns * batch, kTileWidth) + p.num_few * batch + (5 + 2 * kTileWidth) * batch;
  const int64_t network = p.shared ? (p.num_few * p.members + p.num_few + p.members) * kTileWidth : p.members * kTileWidth;
  return (tile + rule + network) * (p.dtype == ScalarType::Float64 ? 8 : 4) + batch * 4 + 64;
}

// Accuracy of blocks [begin, end) of kBlockSamples samples.
struct ValidateParams {
  ScalarType dtype;
  int64_t num_few, members, columns, samples, num_classes;
  const void* alpha;              // T [F, M]
  const int32_t* member_columns;  // [F, M]
  const int32_t* few_classes;     // [F]: their class ids
  const void* member_logits;      // T [blocks, U, kBlockSamples]
  const void* label_logit;        // T [samples]
  const void* top_logits;         // T [samples, kTopClasses]
  const int32_t* top_ids;         // [samples, kTopClasses]
  const int64_t* labels;          // [samples]
  const int32_t* few_of_label;    // [samples]
  int64_t* hits;                  // [2, N], added to: samples whose class comes first, and among the first kTopClasses
  void* workspace;                // validate_workspace_bytes(), aligned to 64 bytes
};

inline int64_t validate_workspace_bytes(const ValidateParams& p) {
  return (p.num_few + 3) * kBlockSamples * (p.dtype == ScalarType::Float64 ? 8 : 4) + 64;
}

// ---- Several runs at once ----------------------------------------------------------------------------------------------

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

struct ValidateRunsParams {
  ValidateParams first;  // alpha, member_columns and hits of run 0, the others follow; not used: workspace
  int64_t runs;
};

}  // namespace alphaext
