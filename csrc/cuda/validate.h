// Launcher of the validation kernel; as in train.h.
#pragma once

#include "kernels/training_params.h"

namespace alphaext::cuda {

const char* validate_runs(const ValidateRunsParams& params, int32_t device, void* stream);

}  // namespace alphaext::cuda
