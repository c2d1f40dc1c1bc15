// Launchers of the head of any size, without its matrix products; as in head.h.
#pragma once

#include "kernels/head_params.h"

namespace alphaext::cuda {

const char* large_head_forward(const LargeHeadParams& params, int32_t device, void* stream);
const char* large_head_backward(const LargeHeadBackwardParams& params, int32_t device, void* stream);

}  // namespace alphaext::cuda
