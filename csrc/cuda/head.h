// Launchers of the head in one launch. `stream` is a cudaStream_t; nothing here synchronises, so that CUDA graphs can capture
// it. Each returns nullptr, or a message that says what failed (static storage, or valid until the next call of this thread).
#pragma once

#include "kernels/head_params.h"

namespace alphaext::cuda {

// The crossing point: heads of up to so many scores (batch * N) are one launch forward and one backward, products included.
// Beyond it the products are cuBLAS's and the rest is one launch: cuBLAS multiplies large matrices faster than a few tiles
// beside a stream of weights do, 16-bit ones by far. Not measured yet (docs/maintainers/gpu.md); the environment variable
// ALPHAEXT_FUSED_SCORES overrides it (0: never with the products).
constexpr int64_t largest_fused_head(ScalarType dtype) {
  return dtype == ScalarType::Float16 || dtype == ScalarType::BFloat16 ? 250'000 : 1'000'000;
}

// Does this head go in one launch with its products? The caller sees to it that no array is empty.
bool fuses_head(ScalarType dtype, int64_t batch, int64_t num_classes, int64_t members, int32_t device);
const char* head_forward(const HeadParams& params, int32_t device, void* stream);
const char* head_backward(const HeadBackwardParams& params, int32_t device, void* stream);

}  // namespace alphaext::cuda
