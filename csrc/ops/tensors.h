// Tensors as the operators use them: on the LibTorch stable ABI alone.
#pragma once

#include <cstdlib>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "aten.h"
#include "kernels/scalars.h"

namespace alphaext {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;
using TorchType = torch::headeronly::ScalarType;

// Does a tensor live where the CUDA kernels run?
inline bool on_gpu([[maybe_unused]] const Tensor& tensor) {
#if ALPHAEXT_EMULATED_GPU
  return true;  // a test's build, whose CUDA kernels run on the CPU (tests/emulated_gpu.py)
#else
  return tensor.is_cuda();
#endif
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

inline const char* name_of(TorchType type) {
  switch (type) {
    case TorchType::Float: return "float32";
    case TorchType::Double: return "float64";
    case TorchType::Half: return "float16";
    case TorchType::BFloat16: return "bfloat16";
    case TorchType::Long: return "int64";
    case TorchType::Int: return "int32";
    case TorchType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline ScalarType kernel_type(TorchType type) {
  switch (type) {
    case TorchType::Float: return ScalarType::Float32;
    case TorchType::Double: return ScalarType::Float64;
    case TorchType::Half: return ScalarType::Float16;
    case TorchType::BFloat16: return ScalarType::BFloat16;
    default:
      STD_TORCH_CHECK(false, "alphaext: input must be float32, float64, float16 or bfloat16, got ", name_of(type));
  }
}

// Of the operators of a training, which have no 16-bit form.
inline ScalarType training_type(const Tensor& tensor, const char* name) {
  const TorchType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == TorchType::Float || type == TorchType::Double, "alphaext: ", name,
                  " must be float32 or float64, got ", name_of(type));
  return type == TorchType::Double ? ScalarType::Float64 : ScalarType::Float32;
}

inline TorchType accumulate_type(TorchType type) { return type == TorchType::Double ? TorchType::Double : TorchType::Float; }

// ---- Memory ------------------------------------------------------------------------------------------------------------

inline const void* data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
inline void* mutable_data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

// As they are where nothing is to be done: the operators behind these cost microseconds even then, and a step calls many.
inline Tensor as_contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }
inline Tensor as_type(const Tensor& tensor, TorchType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}
inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
}
inline Tensor dense(const Tensor& tensor, TorchType type) { return as_contiguous(as_type(tensor, type)); }

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape, TorchType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i] > 1 ? shape[i] : 1) strides[i] = stride;
  const auto device = like.device();
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())), device.index(), &result));
  return Tensor(result);
}

// Scratch memory of one call, on a cache line of its own.
struct Workspace {
  explicit Workspace(int64_t bytes)
      : memory(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)))) {
    STD_TORCH_CHECK(memory != nullptr, "alphaext: no memory for a workspace of ", bytes, " bytes");
  }
  ~Workspace() { std::free(memory); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* const memory;
};

// The only entry of its leading dimension of size 1.
inline Tensor only(const Tensor& tensor) { return torch::stable::select(tensor, 0, 0); }

inline Tensor sum_rows(const Tensor& tensor, TorchType type) {
  const int64_t dim = 0;
  return torch::stable::sum(tensor, IntHeaderOnlyArrayRef(&dim, 1), false, type);
}

}  // namespace alphaext
