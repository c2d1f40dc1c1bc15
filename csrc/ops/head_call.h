// One call of the head, its arguments checked, and the two ways to answer it.
#pragma once

#include <optional>
#include <tuple>

#include "kernels/head_params.h"
#include "tensors.h"

namespace alphaext {

// The sizes of one call, read off its tensors and checked against each other.
struct Sizes {
  int64_t batch, num_classes, num_few, members, hidden, inputs;
  bool separate_first_layer;  // w1 given, one per class
  bool shared_first_layer;    // w1 given, one for all
  bool shared_second_layer;
};

// The arguments of `head`. The ids are dense; the other tensors may have any strides.
struct HeadCall {
  Sizes s;
  RuleParams rule;
  const Tensor& input;
  const std::optional<Tensor>&weight, &bias;
  const Tensor& ids;
  const std::optional<Tensor>&z, &w1;
  const Tensor &b1, &w2, &b2;

  TorchType type() const { return input.scalar_type(); }
  TorchType wide() const { return accumulate_type(type()); }
};

// scores; and what the backward needs: preactivation, raw, alpha, the original logits (empty when they are the input).
using HeadResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Which gradients are asked for: one bit an argument, in the order of the arguments of `head`. alphaext/ops/head.py mirrors this.
enum Wanted : int64_t { kInput = 1, kWeight = 2, kBias = 4, kZ = 8, kW1 = 16, kB1 = 32, kW2 = 64, kB2 = 128 };
constexpr int64_t kOfSubmodules = kZ | kW1 | kB1 | kW2 | kB2;

// What a backward is given beside the arguments of the forward: dense tensors.
struct BackwardCall {
  int64_t wanted;
  const Tensor &grad_scores, &preactivation, &raw, &alpha;
  const Tensor& logits;  // empty where the logits are the input

  bool asks(Wanted bit) const { return (wanted & bit) != 0; }
};

struct Gradients {
  std::optional<Tensor> input, weight, bias, z, w1, b1, w2, b2;
};

// ---- Parts that are ATen's on either backend: one first layer for all classes is a matrix product --------------------------

inline Tensor shared_preactivation(const HeadCall& call) {
  const TorchType wide = call.wide();
  return as_contiguous(aten::linear(as_type(*call.z, wide), as_type(only(*call.w1), wide),
                                    std::optional<Tensor>(as_type(only(call.b1), wide))));
}

// The gradients of its w1 and z.
inline void shared_first_layer_gradients(Gradients& gradients, const HeadCall& call, const BackwardCall& backward,
                                         const Tensor& grad_preactivation) {
  const TorchType wide = call.wide();
  if (backward.asks(kW1)) {
    const Tensor transposed = torch::stable::transpose(grad_preactivation, 0, 1);
    gradients.w1 = torch::stable::unsqueeze(as_type(torch::stable::matmul(transposed, as_type(*call.z, wide)), call.type()), 0);
  }
  if (backward.asks(kZ)) {
    gradients.z = as_type(torch::stable::matmul(grad_preactivation, as_type(only(*call.w1), wide)), call.type());
  }
}

// ---- The two backends --------------------------------------------------------------------------------------------------

HeadResults head_on_cpu(const HeadCall& call);
Gradients head_backward_on_cpu(const HeadCall& call, const BackwardCall& backward);

// On a GPU, or in a test's build where its kernels run on the CPU. Only in builds with CUDA.
HeadResults head_on_gpu(const HeadCall& call);
Gradients head_backward_on_gpu(const HeadCall& call, const BackwardCall& backward);

}  // namespace alphaext
