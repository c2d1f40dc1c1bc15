// ATen operators that the LibTorch stable ABI of 2.10 reaches only through the dispatcher, under the names ATen uses.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <utility>

namespace alphaext::aten {

using torch::stable::Tensor;

inline Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The product of two 16-bit matrices, in float32. Only CUDA has it, from torch 2.8 on.
inline Tensor mm(const Tensor& left, const Tensor& right, torch::headeronly::ScalarType type) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                    torch::stable::detail::from(type)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor relu(const Tensor& self) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(self)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline std::pair<Tensor, Tensor> stable_sort(const Tensor& self) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(self), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(static_cast<int64_t>(-1)), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

inline Tensor cumsum(const Tensor& self, int64_t dim) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(self), torch::stable::detail::from(dim),
                                    torch::stable::detail::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// For each element of `values`, the first position of `sorted` that is not smaller.
inline Tensor searchsorted(const Tensor& sorted, const Tensor& values) {
  std::array<StableIValue, 6> stack{
      torch::stable::detail::from(sorted), torch::stable::detail::from(values),   torch::stable::detail::from(false),
      torch::stable::detail::from(false),  torch::stable::detail::from(std::nullopt), torch::stable::detail::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::searchsorted", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace alphaext::aten
