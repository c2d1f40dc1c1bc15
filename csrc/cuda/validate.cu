// The launcher of the validation kernel. Nothing here allocates or synchronises.
#include "validate.h"

#include "launching.h"
#include "validate.cuh"

namespace alphaext::cuda {

const char* validate_runs(const ValidateRunsParams& params, int32_t device, void* stream) {
  const LaunchShape shape = validate_shape(params);
  if (shape.blocks == 0) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("validate", guard.error());
  const bool is_double = params.first.dtype == ScalarType::Float64;
  return launch("validate", is_double ? validate_kernel<double> : validate_kernel<float>, shape, false, stream, params);
}

}  // namespace alphaext::cuda
