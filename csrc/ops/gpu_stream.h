// torch's current stream of a GPU.
#pragma once

#include "tensors.h"

#if !ALPHAEXT_EMULATED_GPU
// Lives in libtorch_cuda. Weak, so that a build with CUDA also loads under a CPU-only torch, where it is never called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace alphaext {

inline void* stream_of([[maybe_unused]] const Tensor& tensor) {
  void* stream = nullptr;
#if !ALPHAEXT_EMULATED_GPU
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
#endif
  return stream;
}

}  // namespace alphaext
