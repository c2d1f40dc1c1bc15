// The head on the CPU: from tensors to kernels, step by step.
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "head_call.h"

namespace alphaext {
namespace {

// The fewest elements worth handing to a second thread, some 100 microseconds of work: a barrier costs a few of them on an
// idle machine, but thousands where a core is shared with another process.
constexpr int64_t kGrain = 1 << 19;

// Runs one loop of a CPU kernel on torch's threads. `work` is the number of elements that one item touches.
template <typename Params>
void run_cpu(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t items, int64_t work) {
  const int64_t grain = work >= kGrain ? 1 : kGrain / (work > 0 ? work : 1);
  if (items <= grain) {
    if (items > 0) kernel(params, 0, items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

// Under the rule l1 only the few class's own bias counts, so the kernels take the neighbours' biases out of their logits.
std::optional<Tensor> bias_to_remove(const HeadCall& call) {
  if (!call.bias || call.rule.rule != Rule::L1) return std::nullopt;
  return dense(*call.bias, call.wide());
}

Tensor original_logits(const HeadCall& call) {
  const TorchType wide = call.wide();
  if (!call.weight) return dense(call.input, wide);
  // 16-bit classifiers are widened, so that the product accumulates and is kept in float32.
  std::optional<Tensor> wide_bias;
  if (call.bias) wide_bias = as_type(*call.bias, wide);
  return as_contiguous(aten::linear(as_type(call.input, wide), as_type(*call.weight, wide), wide_bias));
}

Tensor all_preactivations(const HeadCall& call) {
  const Sizes& s = call.s;
  if (s.shared_first_layer) return shared_preactivation(call);
  Tensor preactivation = new_empty(call.input, {s.num_few, s.hidden}, call.wide());
  if (!s.separate_first_layer) {
    torch::stable::copy_(preactivation, call.b1);
    return preactivation;
  }
  const Tensor z = as_contiguous(*call.z), w1 = as_contiguous(*call.w1), b1 = as_contiguous(call.b1);
  const FirstLayerParams params{kernel_type(call.type()), s.num_few, s.hidden, s.inputs, z.const_data_ptr(),
                                w1.const_data_ptr(), b1.const_data_ptr(), preactivation.mutable_data_ptr()};
  run_cpu(cpu::kernels().first_layer_forward, params, s.num_few * s.hidden, s.inputs);
  return preactivation;
}

// From the scores to alpha (returned) and to the classifier (into `gradients`).
Tensor mix_gradients(Gradients& gradients, const HeadCall& call, const BackwardCall& backward) {
  const Sizes& s = call.s;
  const TorchType type = call.type(), wide = call.wide();
  const bool keeps_own_bias = call.rule.rule == Rule::L1;
  const bool bias_through_logits = backward.asks(kBias) && keeps_own_bias != call.weight.has_value();

  const Tensor grad_alpha = new_empty(call.input, {s.num_few, s.members}, wide);
  std::optional<Tensor> grad_logits;
  if (backward.asks(kInput) || backward.asks(kWeight) || bias_through_logits) {
    grad_logits = new_empty(call.input, {s.batch, s.num_classes}, wide);
  }
  const Tensor logits = call.weight ? backward.logits : dense(call.input, wide);
  const std::optional<Tensor> removed_bias = bias_to_remove(call);
  const MixBackwardParams params{kernel_type(type),
                                 s.batch,
                                 s.num_classes,
                                 s.num_few,
                                 s.members,
                                 static_cast<const int64_t*>(call.ids.const_data_ptr()),
                                 backward.alpha.const_data_ptr(),
                                 logits.const_data_ptr(),
                                 data_of(removed_bias),
                                 backward.grad_scores.const_data_ptr(),
                                 grad_alpha.mutable_data_ptr(),
                                 mutable_data_of(grad_logits)};
  run_cpu(cpu::kernels().mix_backward_alpha, params, s.num_few, s.batch * s.members);
  if (grad_logits) run_cpu(cpu::kernels().mix_backward_logits, params, s.batch, s.num_classes + s.num_few * s.members);

  if (backward.asks(kInput)) {
    gradients.input =
        as_type(call.weight ? torch::stable::matmul(*grad_logits, as_type(*call.weight, wide)) : *grad_logits, type);
  }
  if (backward.asks(kWeight)) {
    const Tensor transposed = torch::stable::transpose(*grad_logits, 0, 1);
    gradients.weight = as_type(torch::stable::matmul(transposed, as_type(call.input, wide)), type);
  }
  if (backward.asks(kBias)) {
    // Under l1 a bias reaches its own score only. Where the logits are the input they hold the biases already: there the
    // kernels only ever take biases out (l1), or do not use them at all.
    Tensor sum =
        bias_through_logits ? sum_rows(*grad_logits, wide) : torch::stable::new_zeros(*call.bias, call.bias->sizes(), wide);
    if (keeps_own_bias) sum = torch::stable::subtract(sum_rows(backward.grad_scores, wide), sum);
    gradients.bias = as_type(sum, type);
  }
  return grad_alpha;
}

void separate_first_layer_gradients(Gradients& gradients, const HeadCall& call, const BackwardCall& backward,
                                    const Tensor& grad_preactivation) {
  const Sizes& s = call.s;
  const Tensor z = as_contiguous(*call.z), w1 = as_contiguous(*call.w1);
  if (backward.asks(kW1)) {
    gradients.w1 = new_empty(call.input, {s.num_few, s.hidden, s.inputs}, call.type());
    cpu::advise_huge_pages(gradients.w1->mutable_data_ptr(),
                           static_cast<size_t>(gradients.w1->numel()) * gradients.w1->element_size());
  }
  if (backward.asks(kZ)) gradients.z = new_empty(call.input, {s.num_few, s.inputs}, call.type());
  const FirstLayerBackwardParams params{kernel_type(call.type()), s.num_few, s.hidden, s.inputs,
                                        grad_preactivation.const_data_ptr(), z.const_data_ptr(), w1.const_data_ptr(),
                                        mutable_data_of(gradients.w1), mutable_data_of(gradients.z)};
  if (gradients.w1) run_cpu(cpu::kernels().first_layer_backward_w1, params, s.num_few * s.hidden, s.inputs);
  if (gradients.z) run_cpu(cpu::kernels().first_layer_backward_z, params, s.num_few, s.hidden * s.inputs);
}

// From alpha down through the rule, the second and the first layer of the sub-modules.
void submodule_gradients(Gradients& gradients, const HeadCall& call, const BackwardCall& backward, const Tensor& grad_alpha) {
  const Sizes& s = call.s;
  const TorchType type = call.type(), wide = call.wide();
  const bool separate_second_layer = !s.shared_second_layer;
  const Tensor w2 = as_contiguous(call.w2);
  const Tensor grad_raw = new_empty(w2, {s.num_few, s.members}, wide);
  const Tensor grad_preactivation = new_empty(w2, {s.num_few, s.hidden}, wide);
  if (separate_second_layer && backward.asks(kW2)) gradients.w2 = new_empty(w2, {s.num_few, s.members, s.hidden}, type);
  if (separate_second_layer && backward.asks(kB2)) gradients.b2 = new_empty(w2, {s.num_few, s.members}, type);
  const CoefficientBackwardParams params{kernel_type(type),
                                         call.rule,
                                         s.num_few,
                                         s.hidden,
                                         s.members,
                                         s.shared_second_layer,
                                         backward.preactivation.const_data_ptr(),
                                         backward.raw.const_data_ptr(),
                                         w2.const_data_ptr(),
                                         grad_alpha.const_data_ptr(),
                                         grad_raw.mutable_data_ptr(),
                                         mutable_data_of(gradients.w2),
                                         mutable_data_of(gradients.b2),
                                         grad_preactivation.mutable_data_ptr()};
  run_cpu(cpu::kernels().coefficient_backward, params, s.num_few, 2 * s.hidden * s.members);
  if (s.shared_second_layer && backward.asks(kW2)) {
    const Tensor transposed = torch::stable::transpose(grad_raw, 0, 1);
    const Tensor sum = torch::stable::matmul(transposed, aten::relu(backward.preactivation));
    gradients.w2 = torch::stable::unsqueeze(as_type(sum, type), 0);
  }
  if (s.shared_second_layer && backward.asks(kB2)) {
    gradients.b2 = torch::stable::unsqueeze(as_type(sum_rows(grad_raw, wide), type), 0);
  }
  if (backward.asks(kB1)) {
    gradients.b1 = s.shared_first_layer
                       ? torch::stable::unsqueeze(as_type(sum_rows(grad_preactivation, wide), type), 0)
                       : as_type(grad_preactivation, type);
  }
  if (s.shared_first_layer) {
    shared_first_layer_gradients(gradients, call, backward, grad_preactivation);
  } else if (backward.wanted & (kW1 | kZ)) {
    separate_first_layer_gradients(gradients, call, backward, grad_preactivation);
  }
}

}  // namespace

HeadResults head_on_cpu(const HeadCall& call) {
  const Sizes& s = call.s;
  const TorchType wide = call.wide();
  const ScalarType type = kernel_type(call.type());
  const Tensor preactivation = all_preactivations(call);
  const Tensor raw = new_empty(call.input, {s.num_few, s.members}, wide);
  const Tensor alpha = new_empty(call.input, {s.num_few, s.members}, wide);
  const Tensor w2 = as_contiguous(call.w2), b2 = as_contiguous(call.b2);
  const CoefficientParams coefficients{type,
                                       call.rule,
                                       s.num_few,
                                       s.hidden,
                                       s.members,
                                       s.shared_second_layer,
                                       preactivation.const_data_ptr(),
                                       w2.const_data_ptr(),
                                       b2.const_data_ptr(),
                                       raw.mutable_data_ptr(),
                                       alpha.mutable_data_ptr()};
  run_cpu(cpu::kernels().coefficient_forward, coefficients, s.num_few, s.hidden * s.members);

  const Tensor logits = original_logits(call);
  const std::optional<Tensor> removed_bias = bias_to_remove(call);
  const Tensor scores = new_empty(call.input, {s.batch, s.num_classes}, call.type());
  const MixParams mix{type,
                      s.batch,
                      s.num_classes,
                      s.num_few,
                      s.members,
                      static_cast<const int64_t*>(call.ids.const_data_ptr()),
                      alpha.const_data_ptr(),
                      logits.const_data_ptr(),
                      data_of(removed_bias),
                      scores.mutable_data_ptr()};
  run_cpu(cpu::kernels().mix_forward, mix, s.batch, s.num_classes + s.num_few * s.members);
  return {scores, preactivation, raw, alpha, call.weight ? logits : new_empty(call.input, {0, 0}, wide)};
}

Gradients head_backward_on_cpu(const HeadCall& call, const BackwardCall& backward) {
  Gradients gradients;
  const Tensor grad_alpha = mix_gradients(gradients, call, backward);
  if (backward.wanted & kOfSubmodules) submodule_gradients(gradients, call, backward, grad_alpha);
  return gradients;
}

}  // namespace alphaext
