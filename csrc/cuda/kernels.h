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

}  // namespace alphaext::cuda
