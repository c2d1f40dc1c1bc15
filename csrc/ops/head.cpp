// The operators head and head_backward: schemas, argument checks, and the way to the backend.
//
// Built on LibTorch's stable ABI alone, so one binary serves every torch >= 2.10. Autograd, fake kernels and the autocast rule
// are registered from Python (alphaext/ops/head.py), where the stable ABI has no door for them.
#include <vector>

#include "checks.h"
#include "head_call.h"

namespace alphaext {
namespace {

Sizes check_arguments(Arguments& given, const Tensor& input, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, const Tensor& members, const std::optional<Tensor>& z,
                      const std::optional<Tensor>& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, double gamma,
                      int64_t rule) {
  const TorchType type = given.type;
  kernel_type(type);
  const auto one_or_few = [&](const char* name, const char* others, char networks) {
    const int64_t size = given[networks];
    STD_TORCH_CHECK(size == 1 || size == given['F'], "alphaext: ", name, " must have shape [", given['F'], " or 1, ", others,
                    "], got ", size, " first");
  };
  given.check("input", input, type, {'B', 'D'});
  if (!weight) given.set('N', given['D']);
  given.check("weight", weight, type, {'N', 'D'});
  given.check("bias", bias, type, {'N'});
  given.check("members", members, TorchType::Long, {'F', 'M'});
  given.at_least("members", "[num_few, top_k + 1]", 'M', 2);
  given.check("w2", w2, type, {'T', 'M', 'H'});
  one_or_few("w2", "top_k + 1, hidden", 'T');
  given.check("b2", b2, type, {'T', 'M'});
  if (w1) {
    STD_TORCH_CHECK(z.has_value(), "alphaext: z must be given with w1");
    given.check("z", z, type, {'F', 'I'});
    given.check("w1", w1, type, {'S', 'H', 'I'});
    one_or_few("w1", "hidden, inputs", 'S');
    given.check("b1", b1, type, {'S', 'H'});
  } else {
    given.check("b1, without w1 the pre-activation,", b1, type, {'F', 'H'});
  }
  check_rule(gamma, rule);
  Sizes s{};
  s.batch = given['B'];
  s.num_classes = given['N'];
  s.num_few = given['F'];
  s.members = given['M'];
  s.hidden = given['H'];
  s.inputs = w1 ? given['I'] : 0;
  s.separate_first_layer = w1 && given['S'] == s.num_few;
  s.shared_first_layer = w1 && !s.separate_first_layer;
  s.shared_second_layer = given['T'] != s.num_few;
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
  Arguments given(input, "input", Arguments::Layout::Any);
  const Sizes s = check_arguments(given, input, weight, bias, members, z, w1, b1, w2, b2, gamma, rule);
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
  Arguments given(input, "input", Arguments::Layout::Any);
  const Sizes s = check_arguments(given, input, weight, bias, members, z, w1, b1, w2, b2, gamma, rule);
  const TorchType wide = accumulate_type(input.scalar_type());
  const RuleParams rule_params{static_cast<Rule>(rule), gamma, projected_gradient};
  given.check("grad_scores", grad_scores, given.type, {'B', 'N'});
  given.check("preactivation", preactivation, wide, {'F', 'H'});
  given.check("raw", raw, wide, {'F', 'M'});
  given.check("alpha", alpha, wide, {'F', 'M'});
  if (weight) given.check("logits", saved_logits, wide, {'B', 'N'});
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
  const auto or_empty = [&](const std::optional<Tensor>& gradient) {
    return gradient ? *gradient : new_empty(input, {0}, input.scalar_type());
  };
  return {or_empty(gradients.input), or_empty(gradients.weight), or_empty(gradients.bias), or_empty(gradients.z),
          or_empty(gradients.w1),    or_empty(gradients.b1),     or_empty(gradients.w2),   or_empty(gradients.b2)};
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

// In a build without CUDA too: there the checks say what is missing.
STABLE_TORCH_LIBRARY_IMPL(alphaext, CUDA, m) {
  m.impl("head", TORCH_BOX(&alphaext::head));
  m.impl("head_backward", TORCH_BOX(&alphaext::head_backward));
}
