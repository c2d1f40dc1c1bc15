// What each kernel reads and writes: raw pointers and sizes, no torch. The first structs are the CPU's, whose kernels make the
// head in steps; those of the whole head are a GPU's.
//
// Every array is dense and row-major. `T` is the tensors' dtype (`dtype` below), `Acc` is accumulate_t<T>: double for
// float64, float for the rest. Shapes use the paper's letters: batch, N classes, F few classes, M = K+1 members,
// I = M*P inputs and H hidden units of a sub-module. Any pointer marked "or null" switches that result off.
#pragma once

#include <cstdint>

#include "kernels/rules.h"
#include "kernels/scalars.h"

namespace alphaext {

// preactivation[f, h] = sum_i w1[f, h, i] z[f, i] + b1[f, h], one w1 per class (the shared form is one matrix product and is
// left to ATen).
struct FirstLayerParams {
  ScalarType dtype;
  int64_t num_few, hidden, inputs;
  const void* z;         // T [F, I]
  const void* w1;        // T [F, H, I]
  const void* b1;        // T [F, H]
  void* preactivation;   // Acc [F, H], written
};

// grad_w1[f, h, i] = grad_preactivation[f, h] z[f, i];  grad_z[f, i] = sum_h grad_preactivation[f, h] w1[f, h, i]
struct FirstLayerBackwardParams {
  ScalarType dtype;
  int64_t num_few, hidden, inputs;
  const void* grad_preactivation;  // Acc [F, H]
  const void* z;                   // T [F, I]
  const void* w1;                  // T [F, H, I]
  void* grad_w1;                   // T [F, H, I], written, or null
  void* grad_z;                    // T [F, I], written, or null
};

// raw = w2 relu(preactivation) + b2;  alpha = rule(raw)
struct CoefficientParams {
  ScalarType dtype;
  RuleParams rule;
  int64_t num_few, hidden, members;
  bool shared;                // one w2, b2 for all classes: strides over f are 0
  const void* preactivation;  // Acc [F, H]
  const void* w2;             // T [F or 1, M, H]
  const void* b2;             // T [F or 1, M]
  void* raw;                  // Acc [F, M], written
  void* alpha;                // Acc [F, M], written
};

// From grad_alpha to the gradients of the second layer and of the pre-activation. With shared weights the caller sums the
// per-class gradients: grad_w2 and grad_b2 are then not asked for here, grad_raw is.
struct CoefficientBackwardParams {
  ScalarType dtype;
  RuleParams rule;
  int64_t num_few, hidden, members;
  bool shared;
  const void* preactivation;  // Acc [F, H]
  const void* raw;            // Acc [F, M]
  const void* w2;             // T [F or 1, M, H]
  const void* grad_alpha;     // Acc [F, M]
  void* grad_raw;             // Acc [F, M], written
  void* grad_w2;              // T [F, M, H], written, or null
  void* grad_b2;              // T [F, M], written, or null
  void* grad_preactivation;   // Acc [F, H], written
};

// scores[b, members[f, 0]] = sum_k alpha[f, k] logits[b, members[f, k]]   (equations 1 to 3 in one sum)
// scores[b, c] = logits[b, c] for every other class c                      (equation 4)
// With `bias` (rule l1, where only the own bias counts) neighbours' logits enter less their bias.
struct MixParams {
  ScalarType dtype;
  int64_t batch, num_classes, num_few, members;
  const int64_t* member_ids;  // [F, M]
  const void* alpha;          // Acc [F, M]
  const void* logits;         // Acc [batch, N]
  const void* bias;           // Acc [N], or null
  void* scores;               // T [batch, N], written
};

struct MixBackwardParams {
  ScalarType dtype;
  int64_t batch, num_classes, num_few, members;
  const int64_t* member_ids;  // [F, M]
  const void* alpha;          // Acc [F, M]
  const void* logits;         // Acc [batch, N]
  const void* bias;           // Acc [N], or null
  const void* grad_scores;    // T [batch, N]
  void* grad_alpha;           // Acc [F, M], written
  void* grad_logits;          // Acc [batch, N], written, or null
};

// ---- The whole head (CUDA) ---------------------------------------------------------------------------------------------

// The edge of the product's tiles on a GPU.
constexpr int64_t kHeadTile = 64;

// Into how many slices a head's product is cut: for some 128 tiles in all, about one for each multiprocessor of the larger
// cards, of no less than 128 of the depth each. What makes more than half of that goes in two slices, as two blocks fit a
// multiprocessor. Depends on the sizes alone, so that results do not depend on the card.
inline int64_t head_slices(int64_t batch, int64_t num_classes, int64_t features) {
  const int64_t tiles = ((batch + kHeadTile - 1) / kHeadTile) * ((num_classes + kHeadTile - 1) / kHeadTile);
  const int64_t possible = features / 128;
  int64_t wanted = 1;
  if (tiles > 0 && tiles < 128) wanted = tiles > 64 ? 2 : 128 / tiles;
  const int64_t slices = wanted < possible ? wanted : possible;
  return slices > 1 ? slices : 1;
}

// All of the above, forward. With `weight`, logits = input weight^T + bias first; without, `input` holds the logits.
// The product is cut along its depth D into `slices` parts (head_slices), so that a small one occupies a whole GPU.
struct HeadParams {
  ScalarType dtype;
  RuleParams rule;
  int64_t batch, features, num_classes, num_few, hidden, members, inputs;
  bool shared_first, shared_second;  // one w1 and b1, one w2 and b2 for all classes
  const void* input;                 // T [batch, D], without weight T [batch, N]
  const void* weight;                // T [N, D], or null
  const void* bias;                  // T [N], or null
  const int64_t* member_ids;         // [F, M]
  const void* z;                     // T [F, I], or null without w1
  const void* w1;                    // T [F or 1, H, I], or null: then b1 is the pre-activation
  const void* b1;                    // T [F or 1, H]
  const void* w2;                    // T [F or 1, M, H]
  const void* b2;                    // T [F or 1, M]
  void* preactivation;               // Acc [F, H], written
  void* raw;                         // Acc [F, M], written
  void* alpha;                       // Acc [F, M], written
  void* logits;                      // Acc [batch, N], written, or null without weight
  void* scores;                      // T [batch, N], written
  int64_t slices;                    // of the product
  void* partial;                     // Acc [slices, batch, N], scratch, or null where slices is 1
};

// Every gradient that is not null.
struct HeadBackwardParams {
  ScalarType dtype;
  RuleParams rule;
  int64_t batch, features, num_classes, num_few, hidden, members, inputs;
  bool shared_first, shared_second;
  const void* input;           // as in HeadParams
  const void* weight;
  const void* bias;
  const int64_t* member_ids;
  const void* z;
  const void* w1;
  const void* w2;
  const void* preactivation;   // Acc [F, H]
  const void* raw;             // Acc [F, M]
  const void* alpha;           // Acc [F, M]
  const void* logits;          // Acc [batch, N], or null without weight
  const void* grad_scores;     // T [batch, N]
  void* grad_input;            // T, each of the shape of its argument, written, or null
  void* grad_weight;
  void* grad_bias;
  void* grad_z;
  void* grad_w1;
  void* grad_b1;
  void* grad_w2;
  void* grad_b2;
  // Scratch for what one block needs of another; null where head_backward_needs says so.
  void* grad_logits;           // Acc [batch, N]
  void* grad_raw;              // Acc [F, M]
  void* grad_preactivation;    // Acc [F, H]
  // grad_input's product in slices of its depth N (head_slices), where there is more than one.
  int64_t input_slices;
  void* input_partial;         // Acc [input_slices, batch, D], scratch, or null
};

// Which scratch arrays a backward needs; with any of them its blocks wait for each other once.
struct HeadBackwardNeeds {
  bool grad_logits, grad_raw, grad_preactivation;
  bool any() const { return grad_logits || grad_raw || grad_preactivation; }
};

inline HeadBackwardNeeds head_backward_needs(bool has_weight, bool shared_first, bool shared_second, bool input, bool weight,
                                             bool z, bool w1, bool b1, bool w2, bool b2) {
  return {has_weight && (input || weight), shared_second && (w2 || b2), z || (shared_first && (w1 || b1))};
}

// The threads of a head's block, and the shared memory that every GPU grants a block without asking.
constexpr int kHeadThreads = 256;
constexpr int64_t kHeadSharedBytes = 48 * 1024;

// What a block keeps of a class in shared memory: two arrays over its members and a number a thread. 0: it has too many
// members.
inline int64_t large_head_stage_bytes(int64_t members, ScalarType dtype, int threads = kHeadThreads) {
  const int64_t bytes = (2 * members + threads) * (dtype == ScalarType::Float64 ? 8 : 4);
  return bytes <= kHeadSharedBytes ? bytes : 0;
}

// The head without its matrix products (large_head_forward.cuh). In `head`, `logits` is given, or null where `input` holds
// them; with shared_first `preactivation` is given, too; weight, slices and partial are not used.
struct LargeHeadParams {
  HeadParams head;
  bool adds_bias;  // `logits` lack the bias, which is added to them in place
};

// In `head`, grad_input and grad_weight are null, with shared_first also grad_w1 and grad_z: these are products of grad_logits
// and grad_preactivation. grad_logits is [batch, N], written where it is not null: with `bias` it is needed wherever the bias's
// gradient passes through the logits. grad_raw must be given where members do not fit into shared memory.
struct LargeHeadBackwardParams {
  HeadBackwardParams head;
  // The members sorted by class, with grad_logits: entry_offsets[c] .. entry_offsets[c + 1] bounds the part of `entries` that
  // lists the flat positions f * M + k with member_ids[f, k] == c.
  const int64_t* entries;        // [F * M], or null
  const int64_t* entry_offsets;  // [N + 1], or null
  bool keeps_wide;               // grad_logits is Acc, else T
};

}  // namespace alphaext
