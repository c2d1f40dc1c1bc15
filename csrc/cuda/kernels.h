// Launchers of the CUDA kernels. `stream` is a cudaStream_t; nothing here synchronises, so that CUDA graphs can capture it.
// Each returns nullptr, or a message that says what failed (static storage, or valid until the next call of this thread).
#pragma once

#include "../params.h"

namespace alphaext::cuda {

const char* first_layer_forward(const FirstLayerParams& params, int32_t device, void* stream);
const char* first_layer_backward(const FirstLayerBackwardParams& params, int32_t device, void* stream);
const char* coefficient_forward(const CoefficientParams& params, int32_t device, void* stream);
const char* coefficient_backward(const CoefficientBackwardParams& params, int32_t device, void* stream);
const char* mix_forward(const MixParams& params, int32_t device, void* stream);
const char* mix_backward(const MixBackwardParams& params, int32_t device, void* stream);

// ---- The whole head in one launch --------------------------------------------------------------------------------------

// The crossing point: heads of up to so many scores (batch * N) are one launch forward and one backward, product included.
// Beyond it the product is cuBLAS's and the kernels above do the rest: what a launch costs no longer counts there, and cuBLAS
// multiplies large matrices faster than a few tiles beside a stream of weights do. Not measured yet; the environment variable
// ALPHAEXT_FUSED_SCORES overrides it (0: never in one launch).
constexpr int64_t kLargestFusedHead = int64_t{256} * 10'000;

// Does this head go in one launch? The caller sees to it that no array is empty.
bool fuses_head(ScalarType dtype, int64_t batch, int64_t num_classes, int64_t members, int32_t device);
const char* head_forward(const HeadParams& params, int32_t device, void* stream);
const char* head_backward(const HeadBackwardParams& params, int32_t device, void* stream);

}  // namespace alphaext::cuda
