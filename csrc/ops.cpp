// The operators: schemas, argument checks, and the way to the backend.
//
// Built on LibTorch's stable ABI alone, so one binary serves every torch >= 2.10. Autograd, fake kernels and the autocast rule
// are registered from Python (alphaext/ops/head.py), where the stable ABI has no door for them.
#include <vector>

#include "head_call.h"

namespace alphaext {
namespace {

void check_like(const Tensor& tensor, const char* name, const Tensor& input) {
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "alphaext: ", name, " must have the dtype of input, ",
                  name_of(input.scalar_type()), ", got ", name_of(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == input.device(), "alphaext: ", name, " must be on the device of input");
}

Sizes check_arguments(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                      const Tensor& members, const std::optional<Tensor>& z, const std::optional<Tensor>& w1, const Tensor& b1,
                      const Tensor& w2, const Tensor& b2, double gamma, int64_t rule) {
  Sizes s{};
  kernel_type(input.scalar_type());
  STD_TORCH_CHECK(input.dim() == 2, "alphaext: input must have shape [batch, in_features or num_classes], got ", shape_of(input));
  s.batch = input.size(0);
  s.num_classes = input.size(1);
  if (weight) {
    check_like(*weight, "weight", input);
    STD_TORCH_CHECK(weight->dim() == 2 && weight->size(1) == input.size(1), "alphaext: weight must have shape [num_classes, ",
                    input.size(1), "], got ", shape_of(*weight));
    s.num_classes = weight->size(0);
  }
  if (bias) {
    check_like(*bias, "bias", input);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == s.num_classes, "alphaext: bias must have shape [", s.num_classes,
                    "], got ", shape_of(*bias));
  }
  STD_TORCH_CHECK(members.scalar_type() == TorchType::Long, "alphaext: members must be int64, got ",
                  name_of(members.scalar_type()));
  STD_TORCH_CHECK(members.device() == input.device(), "alphaext: members must be on the device of input");
  STD_TORCH_CHECK(members.dim() == 2 && members.size(1) >= 2,
                  "alphaext: members must have shape [num_few, top_k + 1] with top_k >= 1, got ", shape_of(members));
  s.num_few = members.size(0);
  s.members = members.size(1);
  const auto one_or_few = [&](int64_t size) { return size == 1 || size == s.num_few; };

  check_like(w2, "w2", input);
  STD_TORCH_CHECK(w2.dim() == 3 && one_or_few(w2.size(0)) && w2.size(1) == s.members, "alphaext: w2 must have shape [",
                  s.num_few, " or 1, ", s.members, ", hidden], got ", shape_of(w2));
  s.hidden = w2.size(2);
  s.shared_second_layer = w2.size(0) != s.num_few;
  check_like(b2, "b2", input);
  STD_TORCH_CHECK(b2.dim() == 2 && b2.size(0) == w2.size(0) && b2.size(1) == s.members, "alphaext: b2 must have shape [",
                  w2.size(0), ", ", s.members, "], got ", shape_of(b2));
  check_like(b1, "b1", input);
  if (w1) {
    STD_TORCH_CHECK(z.has_value(), "alphaext: z must be given with w1");
    check_like(*z, "z", input);
    check_like(*w1, "w1", input);
    STD_TORCH_CHECK(z->dim() == 2 && z->size(0) == s.num_few, "alphaext: z must have shape [", s.num_few, ", inputs], got ",
                    shape_of(*z));
    s.inputs = z->size(1);
    STD_TORCH_CHECK(w1->dim() == 3 && one_or_few(w1->size(0)) && w1->size(1) == s.hidden && w1->size(2) == s.inputs,
                    "alphaext: w1 must have shape [", s.num_few, " or 1, ", s.hidden, ", ", s.inputs, "], got ", shape_of(*w1));
    s.separate_first_layer = w1->size(0) == s.num_few;
    s.shared_first_layer = !s.separate_first_layer;
    STD_TORCH_CHECK(b1.dim() == 2 && b1.size(0) == w1->size(0) && b1.size(1) == s.hidden, "alphaext: b1 must have shape [",
                    w1->size(0), ", ", s.hidden, "], got ", shape_of(b1));
  } else {
    STD_TORCH_CHECK(b1.dim() == 2 && b1.size(0) == s.num_few && b1.size(1) == s.hidden,
                    "alphaext: without w1, b1 is the pre-activation and must have shape [", s.num_few, ", ", s.hidden,
                    "], got ", shape_of(b1));
  }
  STD_TORCH_CHECK(gamma > 0 && gamma <= 1, "alphaext: gamma must be in (0, 1], got ", gamma);
  STD_TORCH_CHECK(rule >= 0 && rule <= 2, "alphaext: rule must be 0 (softmax), 1 (clamp) or 2 (l1), got ", rule);
  return s;
}

// On the CPU the ids are read, so a wrong one is an error before any work. On a GPU reading them would stall the stream: there
// a wrong id gives NaN in its class's column.
void check_member_ids(const int64_t* ids, const Sizes& s) {
  std::vector<bool> is_few(static_cast<size_t>(s.num_classes), false);
  for (int64_t e = 0; e < s.num_few * s.members; ++e) {
    STD_TORCH_CHECK(ids[e] >= 0 && ids[e] < s.num_classes, "alphaext: members[", e / s.members, ", ", e % s.members,
                    "] must be in [0, ", s.num_classes, "), got ", ids[e]);
    if (e % s.members == 0) {
      STD_TORCH_CHECK(!is_few[static_cast<size_t>(ids[e])], "alphaext: members[:, 0] must be distinct, but class ", ids[e],
                      " appears twice");
      is_few[static_cast<size_t>(ids[e])] = true;
    }
  }
}

HeadResults head(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                 const Tensor& members, const std::optional<Tensor>& z, const std::optional<Tensor>& w1, const Tensor& b1,
                 const Tensor& w2, const Tensor& b2, double gamma, int64_t rule, bool projected_gradient) {
  const Sizes s = check_arguments(input, weight, bias, members, z, w1, b1, w2, b2, gamma, rule);
  const Tensor ids = as_contiguous(members);
  if (!on_gpu(input)) check_member_ids(static_cast<const int64_t*>(ids.const_data_ptr()), s);
  const HeadCall call{s, {static_cast<Rule>(rule), gamma, projected_gradient}, input, weight, bias, ids, z, w1, b1, w2, b2};
#if ALPHAEXT_WITH_CUDA
  if (on_gpu(input)) return head_on_gpu(call);
#endif
  return head_on_cpu(call);
}

// Gradients of input, weight, bias, z, w1, b1, w2, b2; one that is not asked for is an empty tensor of shape [0].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_backward(
    const Tensor& grad_scores, const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const Tensor& members, const std::optional<Tensor>& z, const std::optional<Tensor>& w1, const Tensor& b1, const Tensor& w2,
    const Tensor& b2, const Tensor& preactivation, const Tensor& raw, const Tensor& alpha, const Tensor& saved_logits,
    double gamma, int64_t rule, bool projected_gradient, int64_t wanted) {
  const Sizes s = check_arguments(input, weight, bias, members, z, w1, b1, w2, b2, gamma, rule);
  const TorchType wide = accumulate_type(input.scalar_type());
  const RuleParams rule_params{static_cast<Rule>(rule), gamma, projected_gradient};
  check_like(grad_scores, "grad_scores", input);
  STD_TORCH_CHECK(grad_scores.dim() == 2 && grad_scores.size(0) == s.batch && grad_scores.size(1) == s.num_classes,
                  "alphaext: grad_scores must have shape [", s.batch, ", ", s.num_classes, "], got ", shape_of(grad_scores));
  const auto check_saved = [&](const Tensor& saved, const char* name, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(saved.scalar_type() == wide && saved.device() == input.device(), "alphaext: ", name,
                    " must have dtype ", name_of(wide), " and be on the device of input");
    STD_TORCH_CHECK(saved.dim() == 2 && saved.size(0) == rows && saved.size(1) == columns, "alphaext: ", name,
                    " must have shape [", rows, ", ", columns, "], got ", shape_of(saved));
  };
  check_saved(preactivation, "preactivation", s.num_few, s.hidden);
  check_saved(raw, "raw", s.num_few, s.members);
  check_saved(alpha, "alpha", s.num_few, s.members);
  if (weight) check_saved(saved_logits, "logits", s.batch, s.num_classes);
  STD_TORCH_CHECK(!(wanted & kWeight) || weight, "alphaext: a gradient of weight was asked for, but weight was not given");
  STD_TORCH_CHECK(!(wanted & kBias) || bias, "alphaext: a gradient of bias was asked for, but bias was not given");
  STD_TORCH_CHECK(!(wanted & (kZ | kW1)) || w1, "alphaext: a gradient of z or w1 was asked for, but w1 was not given");
  const Tensor ids = as_contiguous(members);
  if (!on_gpu(input)) check_member_ids(static_cast<const int64_t*>(ids.const_data_ptr()), s);

  const HeadCall call{s, rule_params, input, weight, bias, ids, z, w1, b1, w2, b2};
  const Tensor dense_scores = as_contiguous(grad_scores), dense_preactivation = as_contiguous(preactivation),
               dense_raw = as_contiguous(raw), dense_alpha = as_contiguous(alpha), dense_logits = as_contiguous(saved_logits);
  const BackwardCall backward{wanted, dense_scores, dense_preactivation, dense_raw, dense_alpha, dense_logits};
#if ALPHAEXT_WITH_CUDA
  const Gradients gradients = on_gpu(input) ? head_backward_on_gpu(call, backward) : head_backward_on_cpu(call, backward);
#else
  const Gradients gradients = head_backward_on_cpu(call, backward);
#endif
  const auto given = [&](const std::optional<Tensor>& gradient) {
    return gradient ? *gradient : new_empty(input, {0}, input.scalar_type());
  };
  return {given(gradients.input), given(gradients.weight), given(gradients.bias), given(gradients.z),
          given(gradients.w1),    given(gradients.b1),     given(gradients.w2),   given(gradients.b2)};
}

}  // namespace
}  // namespace alphaext

STABLE_TORCH_LIBRARY(alphaext, m) {
  m.def(
      "head(Tensor input, Tensor? weight, Tensor? bias, Tensor members, Tensor? z, Tensor? w1, Tensor b1, Tensor w2, Tensor b2, "
      "float gamma, int rule, bool projected_gradient) -> (Tensor scores, Tensor preactivation, Tensor raw, Tensor alpha, Tensor "
      "logits)");
  m.def(
      "head_backward(Tensor grad_scores, Tensor input, Tensor? weight, Tensor? bias, Tensor members, Tensor? z, Tensor? w1, "
      "Tensor b1, Tensor w2, Tensor b2, Tensor preactivation, Tensor raw, Tensor alpha, Tensor logits, float gamma, int rule, "
      "bool projected_gradient, int wanted) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_z, Tensor "
      "grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2)");
}

STABLE_TORCH_LIBRARY_IMPL(alphaext, CPU, m) {
  m.impl("head", TORCH_BOX(&alphaext::head));
  m.impl("head_backward", TORCH_BOX(&alphaext::head_backward));
}

#if ALPHAEXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(alphaext, CUDA, m) {
  m.impl("head", TORCH_BOX(&alphaext::head));
  m.impl("head_backward", TORCH_BOX(&alphaext::head_backward));
}
#endif
