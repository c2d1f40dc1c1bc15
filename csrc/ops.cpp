// The operators: schemas, argument checks, and the flow from tensors to kernels, one text for both backends.
//
// Built on LibTorch's stable ABI alone, so one binary serves every torch >= 2.10. Autograd, fake kernels and the autocast rule
// are registered from Python (alphaext/ops.py), where the stable ABI has no door for them.
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "params.h"
#include "stable_aten.h"

#if ALPHAEXT_WITH_CUDA
#include "cuda/kernels.h"

// Lives in libtorch_cuda. Weak, so that a build with CUDA also loads under a CPU-only torch, where it is never called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace alphaext {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;
using TorchType = torch::headeronly::ScalarType;

// ---- Argument checks ---------------------------------------------------------------------------------------------------

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

const char* name_of(TorchType type) {
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

ScalarType kernel_type(TorchType type) {
  switch (type) {
    case TorchType::Float: return ScalarType::Float32;
    case TorchType::Double: return ScalarType::Float64;
    case TorchType::Half: return ScalarType::Float16;
    case TorchType::BFloat16: return ScalarType::BFloat16;
    default:
      STD_TORCH_CHECK(false, "alphaext: input must be float32, float64, float16 or bfloat16, got ", name_of(type));
  }
}

TorchType accumulate_type(TorchType type) { return type == TorchType::Double ? TorchType::Double : TorchType::Float; }

void check_like(const Tensor& tensor, const char* name, const Tensor& input) {
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "alphaext: ", name, " must have the dtype of input, ",
                  name_of(input.scalar_type()), ", got ", name_of(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == input.device(), "alphaext: ", name, " must be on the device of input");
}

// The sizes of one call, read off its tensors and checked against each other.
struct Sizes {
  int64_t batch, num_classes, num_few, members, hidden, inputs;
  bool separate_first_layer;  // w1 given, one per class
  bool shared_first_layer;    // w1 given, one for all
  bool shared_second_layer;
};

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

// ---- Running kernels ---------------------------------------------------------------------------------------------------

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

#if ALPHAEXT_WITH_CUDA
template <typename Params>
void run_cuda(const char* (*launch)(const Params&, int32_t, void*), const Params& params, const Tensor& on) {
  const int32_t device = on.get_device_index();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = launch(params, device, stream);
  STD_TORCH_CHECK(error == nullptr, "alphaext: ", error ? error : "");
}
#endif

// Calls `cpu()` or `cuda()` by where `on` lives.
template <typename Cpu, typename Cuda>
void on_backend(const Tensor& on, Cpu&& cpu, [[maybe_unused]] Cuda&& cuda) {
  if (on.is_cpu()) return cpu();
#if ALPHAEXT_WITH_CUDA
  if (on.is_cuda()) return cuda();
#endif
  STD_TORCH_CHECK(false, "alphaext: this build has no kernels for the device of input; see alphaext.build_info()");
}

#if ALPHAEXT_WITH_CUDA
#define ALPHAEXT_CUDA_CALL(kernel, params, on) [&] { run_cuda(cuda::kernel, params, on); }
#else
#define ALPHAEXT_CUDA_CALL(kernel, params, on) [] {}
#endif

const void* data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* mutable_data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

// As they are where nothing is to be done: the operators behind these cost microseconds even then, and a step calls many.
Tensor as_contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }
Tensor as_type(const Tensor& tensor, TorchType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}
Tensor dense(const Tensor& tensor, TorchType type) { return as_contiguous(as_type(tensor, type)); }

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape, TorchType type) {
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

// The only entry of its leading dimension of size 1.
Tensor only(const Tensor& tensor) { return torch::stable::select(tensor, 0, 0); }

Tensor sum_rows(const Tensor& tensor, TorchType type) {
  const int64_t dim = 0;
  return torch::stable::sum(tensor, IntHeaderOnlyArrayRef(&dim, 1), false, type);
}

// Under the rule l1 only the few class's own bias counts, so the kernels take the neighbours' biases out of their logits.
std::optional<Tensor> bias_to_remove(const std::optional<Tensor>& bias, const RuleParams& rule, TorchType type) {
  if (!bias || rule.rule != Rule::L1) return std::nullopt;
  return dense(*bias, type);
}

Tensor original_logits(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  const TorchType type = accumulate_type(input.scalar_type());
  if (!weight) return dense(input, type);
  // 16-bit classifiers are widened, so that the product accumulates and is kept in float32.
  std::optional<Tensor> wide_bias;
  if (bias) wide_bias = as_type(*bias, type);
  return as_contiguous(
      aten::linear(as_type(input, type), as_type(*weight, type), wide_bias));
}

Tensor all_preactivations(const Tensor& input, const Sizes& s, const std::optional<Tensor>& z, const std::optional<Tensor>& w1,
                          const Tensor& b1) {
  const TorchType type = accumulate_type(input.scalar_type());
  if (s.shared_first_layer) {
    return as_contiguous(aten::linear(as_type(*z, type), as_type(only(*w1), type),
                                                  std::optional<Tensor>(as_type(only(b1), type))));
  }
  Tensor preactivation = new_empty(input, {s.num_few, s.hidden}, type);
  if (!s.separate_first_layer) {
    torch::stable::copy_(preactivation, b1);
    return preactivation;
  }
  const Tensor dense_z = as_contiguous(*z), dense_w1 = as_contiguous(*w1),
               dense_b1 = as_contiguous(b1);
  const FirstLayerParams params{kernel_type(input.scalar_type()), s.num_few, s.hidden, s.inputs, dense_z.const_data_ptr(),
                                dense_w1.const_data_ptr(), dense_b1.const_data_ptr(), preactivation.mutable_data_ptr()};
  on_backend(
      input, [&] { run_cpu(cpu::kernels().first_layer_forward, params, s.num_few * s.hidden, s.inputs); },
      ALPHAEXT_CUDA_CALL(first_layer_forward, params, input));
  return preactivation;
}

#if ALPHAEXT_WITH_CUDA
// One launch makes the whole head: on a GPU, up to the crossing point, where nothing is empty (the pointer of an empty tensor
// is null, which the kernels read as "not given").
bool goes_in_one_launch(const Tensor& input, const Sizes& s) {
  const bool has_inputs = s.inputs > 0 || !(s.separate_first_layer || s.shared_first_layer);
  return input.is_cuda() && has_inputs && s.batch > 0 && input.size(1) > 0 && s.num_classes > 0 && s.num_few > 0 &&
         s.hidden > 0 &&
         cuda::fuses_head(kernel_type(input.scalar_type()), s.batch, s.num_classes, s.members, input.get_device_index());
}

std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
}
#endif

// ---- Forward -----------------------------------------------------------------------------------------------------------

using HeadResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

#if ALPHAEXT_WITH_CUDA
HeadResults head_in_one_launch(const Sizes& s, const RuleParams& rule, const Tensor& any_input,
                               const std::optional<Tensor>& any_weight, const std::optional<Tensor>& any_bias,
                               const Tensor& ids, const std::optional<Tensor>& any_z, const std::optional<Tensor>& any_w1,
                               const Tensor& any_b1, const Tensor& any_w2, const Tensor& any_b2) {
  const TorchType type = any_input.scalar_type(), wide = accumulate_type(type);
  const Tensor input = as_contiguous(any_input), b1 = as_contiguous(any_b1), w2 = as_contiguous(any_w2),
               b2 = as_contiguous(any_b2);
  const std::optional<Tensor> weight = as_contiguous(any_weight), bias = as_contiguous(any_bias), z = as_contiguous(any_z),
                              w1 = as_contiguous(any_w1);
  const int64_t slices = weight ? head_slices(s.batch, s.num_classes, input.size(1)) : 1;
  std::optional<Tensor> partial;
  if (slices > 1) partial = new_empty(input, {slices, s.batch, s.num_classes}, wide);
  const Tensor preactivation = new_empty(input, {s.num_few, s.hidden}, wide);
  const Tensor raw = new_empty(input, {s.num_few, s.members}, wide), alpha = new_empty(input, {s.num_few, s.members}, wide);
  const Tensor logits = weight ? new_empty(input, {s.batch, s.num_classes}, wide) : new_empty(input, {0, 0}, wide);
  const Tensor scores = new_empty(input, {s.batch, s.num_classes}, type);
  const HeadParams params{kernel_type(type),
                          rule,
                          s.batch,
                          input.size(1),
                          s.num_classes,
                          s.num_few,
                          s.hidden,
                          s.members,
                          s.inputs,
                          s.shared_first_layer,
                          s.shared_second_layer,
                          input.const_data_ptr(),
                          data_of(weight),
                          data_of(bias),
                          static_cast<const int64_t*>(ids.const_data_ptr()),
                          w1 ? data_of(z) : nullptr,
                          data_of(w1),
                          b1.const_data_ptr(),
                          w2.const_data_ptr(),
                          b2.const_data_ptr(),
                          preactivation.mutable_data_ptr(),
                          raw.mutable_data_ptr(),
                          alpha.mutable_data_ptr(),
                          weight ? logits.mutable_data_ptr() : nullptr,
                          scores.mutable_data_ptr(),
                          slices,
                          mutable_data_of(partial)};
  run_cuda(cuda::head_forward, params, input);
  return {scores, preactivation, raw, alpha, logits};
}
#endif

// Returns scores, and what the backward needs: preactivation, raw, alpha, and the original logits (empty when they are the
// input).
HeadResults head(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                 const Tensor& members, const std::optional<Tensor>& z, const std::optional<Tensor>& w1, const Tensor& b1,
                 const Tensor& w2, const Tensor& b2, double gamma, int64_t rule, bool projected_gradient) {
  const Sizes s = check_arguments(input, weight, bias, members, z, w1, b1, w2, b2, gamma, rule);
  const TorchType torch_type = input.scalar_type(), wide = accumulate_type(torch_type);
  const ScalarType type = kernel_type(torch_type);
  const RuleParams rule_params{static_cast<Rule>(rule), gamma, projected_gradient};
  const Tensor ids = as_contiguous(members);
  if (input.is_cpu()) check_member_ids(static_cast<const int64_t*>(ids.const_data_ptr()), s);

#if ALPHAEXT_WITH_CUDA
  if (goes_in_one_launch(input, s)) {
    return head_in_one_launch(s, rule_params, input, weight, bias, ids, z, w1, b1, w2, b2);
  }
#endif

  const Tensor preactivation = all_preactivations(input, s, z, w1, b1);
  const Tensor raw = new_empty(input, {s.num_few, s.members}, wide);
  const Tensor alpha = new_empty(input, {s.num_few, s.members}, wide);
  {
    const Tensor dense_w2 = as_contiguous(w2), dense_b2 = as_contiguous(b2);
    const CoefficientParams params{type,
                                   rule_params,
                                   s.num_few,
                                   s.hidden,
                                   s.members,
                                   s.shared_second_layer,
                                   preactivation.const_data_ptr(),
                                   dense_w2.const_data_ptr(),
                                   dense_b2.const_data_ptr(),
                                   raw.mutable_data_ptr(),
                                   alpha.mutable_data_ptr()};
    on_backend(
        input, [&] { run_cpu(cpu::kernels().coefficient_forward, params, s.num_few, s.hidden * s.members); },
        ALPHAEXT_CUDA_CALL(coefficient_forward, params, input));
  }

  const Tensor logits = original_logits(input, weight, bias);
  const std::optional<Tensor> removed_bias = bias_to_remove(bias, rule_params, wide);
  const Tensor scores = new_empty(input, {s.batch, s.num_classes}, torch_type);
  const MixParams params{type,
                         s.batch,
                         s.num_classes,
                         s.num_few,
                         s.members,
                         static_cast<const int64_t*>(ids.const_data_ptr()),
                         alpha.const_data_ptr(),
                         logits.const_data_ptr(),
                         data_of(removed_bias),
                         scores.mutable_data_ptr()};
  on_backend(
      input, [&] { run_cpu(cpu::kernels().mix_forward, params, s.batch, s.num_classes + s.num_few * s.members); },
      ALPHAEXT_CUDA_CALL(mix_forward, params, input));
  return {scores, preactivation, raw, alpha, weight ? logits : new_empty(input, {0, 0}, wide)};
}

// ---- Backward ----------------------------------------------------------------------------------------------------------

// Which gradients are asked for: one bit an argument, in the order of the arguments of `head`. alphaext/ops.py mirrors this.
enum Wanted : int64_t { kInput = 1, kWeight = 2, kBias = 4, kZ = 8, kW1 = 16, kB1 = 32, kW2 = 64, kB2 = 128 };
constexpr int64_t kOfSubmodules = kZ | kW1 | kB1 | kW2 | kB2;

struct Gradients {
  std::optional<Tensor> input, weight, bias, z, w1, b1, w2, b2;
};

// The members sorted by class, and where each class's part begins: what a gather over the members of a class needs.
std::pair<Tensor, Tensor> members_by_class(const Tensor& ids, int64_t num_classes) {
  const auto [sorted, positions] = aten::stable_sort(torch::stable::flatten(ids));
  const int64_t count = num_classes + 1;
  const Tensor ones =
      torch::stable::full(IntHeaderOnlyArrayRef(&count, 1), 1, TorchType::Long, std::nullopt, ids.device());
  const Tensor classes = torch::stable::subtract(aten::cumsum(ones, 0), ones);  // 0 .. num_classes
  return {positions, aten::searchsorted(sorted, classes)};
}

// From the scores to alpha (returned) and to the classifier (into `gradients`).
Tensor mix_gradients(Gradients& gradients, const Sizes& s, const RuleParams& rule, int64_t wanted, const Tensor& grad_scores,
                     const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     const Tensor& ids, const Tensor& alpha, const Tensor& logits) {
  const TorchType type = input.scalar_type(), wide = accumulate_type(type);
  const bool of_input = wanted & kInput, of_weight = wanted & kWeight, of_bias = wanted & kBias;
  const bool keeps_own_bias = rule.rule == Rule::L1;
  const bool bias_through_logits = of_bias && keeps_own_bias != weight.has_value();

  const Tensor grad_alpha = new_empty(input, {s.num_few, s.members}, wide);
  std::optional<Tensor> grad_logits, entries, entry_offsets;
  if (of_input || of_weight || bias_through_logits) {
    grad_logits = new_empty(input, {s.batch, s.num_classes}, wide);
    if (!input.is_cpu()) std::tie(entries, entry_offsets) = members_by_class(ids, s.num_classes);
  }
  const std::optional<Tensor> removed_bias = bias_to_remove(bias, rule, wide);
  const MixBackwardParams params{kernel_type(type),
                                 s.batch,
                                 s.num_classes,
                                 s.num_few,
                                 s.members,
                                 static_cast<const int64_t*>(ids.const_data_ptr()),
                                 alpha.const_data_ptr(),
                                 logits.const_data_ptr(),
                                 data_of(removed_bias),
                                 grad_scores.const_data_ptr(),
                                 grad_alpha.mutable_data_ptr(),
                                 mutable_data_of(grad_logits),
                                 static_cast<const int64_t*>(data_of(entries)),
                                 static_cast<const int64_t*>(data_of(entry_offsets))};
  on_backend(
      input,
      [&] {
        run_cpu(cpu::kernels().mix_backward_alpha, params, s.num_few, s.batch * s.members);
        if (!grad_logits) return;
        run_cpu(cpu::kernels().mix_backward_logits, params, s.batch, s.num_classes + s.num_few * s.members);
      },
      ALPHAEXT_CUDA_CALL(mix_backward, params, input));

  if (of_input) {
    gradients.input =
        as_type(weight ? torch::stable::matmul(*grad_logits, as_type(*weight, wide)) : *grad_logits, type);
  }
  if (of_weight) {
    const Tensor transposed = torch::stable::transpose(*grad_logits, 0, 1);
    gradients.weight = as_type(torch::stable::matmul(transposed, as_type(input, wide)), type);
  }
  if (of_bias) {
    // Under l1 a bias reaches its own score only. Where the logits are the input they hold the biases already: there the
    // kernels only ever take biases out (l1), or do not use them at all.
    Tensor sum = bias_through_logits ? sum_rows(*grad_logits, wide) : torch::stable::new_zeros(*bias, bias->sizes(), wide);
    if (keeps_own_bias) sum = torch::stable::subtract(sum_rows(grad_scores, wide), sum);
    gradients.bias = as_type(sum, type);
  }
  return grad_alpha;
}

// From alpha down through the rule, the second and the first layer of the sub-modules.
void submodule_gradients(Gradients& gradients, const Sizes& s, const RuleParams& rule, int64_t wanted, const Tensor& grad_alpha,
                         const std::optional<Tensor>& z, const std::optional<Tensor>& w1, const Tensor& w2,
                         const Tensor& preactivation, const Tensor& raw) {
  const TorchType type = w2.scalar_type(), wide = accumulate_type(type);
  const bool separate_second_layer = !s.shared_second_layer;
  const Tensor dense_w2 = as_contiguous(w2);
  const Tensor grad_raw = new_empty(w2, {s.num_few, s.members}, wide);
  const Tensor grad_preactivation = new_empty(w2, {s.num_few, s.hidden}, wide);
  if (separate_second_layer && (wanted & kW2)) gradients.w2 = new_empty(w2, {s.num_few, s.members, s.hidden}, type);
  if (separate_second_layer && (wanted & kB2)) gradients.b2 = new_empty(w2, {s.num_few, s.members}, type);
  const CoefficientBackwardParams second{kernel_type(type),
                                         rule,
                                         s.num_few,
                                         s.hidden,
                                         s.members,
                                         s.shared_second_layer,
                                         preactivation.const_data_ptr(),
                                         raw.const_data_ptr(),
                                         dense_w2.const_data_ptr(),
                                         grad_alpha.const_data_ptr(),
                                         grad_raw.mutable_data_ptr(),
                                         mutable_data_of(gradients.w2),
                                         mutable_data_of(gradients.b2),
                                         grad_preactivation.mutable_data_ptr()};
  on_backend(
      w2, [&] { run_cpu(cpu::kernels().coefficient_backward, second, s.num_few, 2 * s.hidden * s.members); },
      ALPHAEXT_CUDA_CALL(coefficient_backward, second, w2));
  if (s.shared_second_layer && (wanted & kW2)) {
    const Tensor transposed = torch::stable::transpose(grad_raw, 0, 1);
    const Tensor sum = torch::stable::matmul(transposed, aten::relu(preactivation));
    gradients.w2 = torch::stable::unsqueeze(as_type(sum, type), 0);
  }
  if (s.shared_second_layer && (wanted & kB2)) {
    gradients.b2 = torch::stable::unsqueeze(as_type(sum_rows(grad_raw, wide), type), 0);
  }

  if (wanted & kB1) {
    gradients.b1 = s.shared_first_layer
                       ? torch::stable::unsqueeze(as_type(sum_rows(grad_preactivation, wide), type), 0)
                       : as_type(grad_preactivation, type);
  }
  if (s.shared_first_layer) {
    if (wanted & kW1) {
      const Tensor transposed = torch::stable::transpose(grad_preactivation, 0, 1);
      const Tensor sum = torch::stable::matmul(transposed, as_type(*z, wide));
      gradients.w1 = torch::stable::unsqueeze(as_type(sum, type), 0);
    }
    if (wanted & kZ) {
      gradients.z = as_type(torch::stable::matmul(grad_preactivation, as_type(only(*w1), wide)), type);
    }
  } else if (s.separate_first_layer && (wanted & (kW1 | kZ))) {
    const Tensor dense_z = as_contiguous(*z), dense_w1 = as_contiguous(*w1);
    if (wanted & kW1) {
      gradients.w1 = new_empty(w2, {s.num_few, s.hidden, s.inputs}, type);
      if (w2.is_cpu()) {
        cpu::advise_huge_pages(gradients.w1->mutable_data_ptr(),
                               static_cast<size_t>(gradients.w1->numel()) * gradients.w1->element_size());
      }
    }
    if (wanted & kZ) gradients.z = new_empty(w2, {s.num_few, s.inputs}, type);
    const FirstLayerBackwardParams first{kernel_type(type),
                                         s.num_few,
                                         s.hidden,
                                         s.inputs,
                                         grad_preactivation.const_data_ptr(),
                                         dense_z.const_data_ptr(),
                                         dense_w1.const_data_ptr(),
                                         mutable_data_of(gradients.w1),
                                         mutable_data_of(gradients.z)};
    on_backend(
        w2,
        [&] {
          if (gradients.w1) run_cpu(cpu::kernels().first_layer_backward_w1, first, s.num_few * s.hidden, s.inputs);
          if (gradients.z) run_cpu(cpu::kernels().first_layer_backward_z, first, s.num_few, s.hidden * s.inputs);
        },
        ALPHAEXT_CUDA_CALL(first_layer_backward, first, w2));
  }
}

#if ALPHAEXT_WITH_CUDA
void head_backward_in_one_launch(Gradients& gradients, const Sizes& s, const RuleParams& rule, int64_t wanted,
                                 const Tensor& grad_scores, const Tensor& any_input, const std::optional<Tensor>& any_weight,
                                 const std::optional<Tensor>& any_bias, const Tensor& ids, const std::optional<Tensor>& any_z,
                                 const std::optional<Tensor>& any_w1, const Tensor& b1, const Tensor& any_w2,
                                 const Tensor& preactivation, const Tensor& raw, const Tensor& alpha,
                                 const Tensor& saved_logits) {
  const TorchType type = any_input.scalar_type(), wide = accumulate_type(type);
  const Tensor input = as_contiguous(any_input), w2 = as_contiguous(any_w2);
  const std::optional<Tensor> weight = as_contiguous(any_weight), bias = as_contiguous(any_bias), z = as_contiguous(any_z),
                              w1 = as_contiguous(any_w1);
  const auto gradient_of = [&](Wanted bit, const std::optional<Tensor>& argument) -> std::optional<Tensor> {
    if (!(wanted & bit)) return std::nullopt;
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < argument->dim(); ++i) shape.push_back(argument->size(i));
    return new_empty(input, shape, type);
  };
  gradients.input = gradient_of(kInput, input);
  gradients.weight = gradient_of(kWeight, weight);
  gradients.bias = gradient_of(kBias, bias);
  gradients.z = gradient_of(kZ, z);
  gradients.w1 = gradient_of(kW1, w1);
  gradients.b1 = gradient_of(kB1, b1);
  gradients.w2 = gradient_of(kW2, w2);
  if (wanted & kB2) gradients.b2 = new_empty(input, {w2.size(0), s.members}, type);

  const auto asks = [&](Wanted bit) { return (wanted & bit) != 0; };
  const HeadBackwardNeeds needs =
      head_backward_needs(weight.has_value(), s.shared_first_layer, s.shared_second_layer, asks(kInput), asks(kWeight),
                          asks(kZ), asks(kW1), asks(kB1), asks(kW2), asks(kB2));
  std::optional<Tensor> grad_logits, grad_raw, grad_preactivation;
  if (needs.grad_logits) grad_logits = new_empty(input, {s.batch, s.num_classes}, wide);
  if (needs.grad_raw) grad_raw = new_empty(input, {s.num_few, s.members}, wide);
  if (needs.grad_preactivation) grad_preactivation = new_empty(input, {s.num_few, s.hidden}, wide);
  const HeadBackwardParams params{kernel_type(type),
                                  rule,
                                  s.batch,
                                  input.size(1),
                                  s.num_classes,
                                  s.num_few,
                                  s.hidden,
                                  s.members,
                                  s.inputs,
                                  s.shared_first_layer,
                                  s.shared_second_layer,
                                  input.const_data_ptr(),
                                  data_of(weight),
                                  data_of(bias),
                                  static_cast<const int64_t*>(ids.const_data_ptr()),
                                  w1 ? data_of(z) : nullptr,
                                  data_of(w1),
                                  w2.const_data_ptr(),
                                  preactivation.const_data_ptr(),
                                  raw.const_data_ptr(),
                                  alpha.const_data_ptr(),
                                  weight ? saved_logits.const_data_ptr() : nullptr,
                                  grad_scores.const_data_ptr(),
                                  mutable_data_of(gradients.input),
                                  mutable_data_of(gradients.weight),
                                  mutable_data_of(gradients.bias),
                                  mutable_data_of(gradients.z),
                                  mutable_data_of(gradients.w1),
                                  mutable_data_of(gradients.b1),
                                  mutable_data_of(gradients.w2),
                                  mutable_data_of(gradients.b2),
                                  mutable_data_of(grad_logits),
                                  mutable_data_of(grad_raw),
                                  mutable_data_of(grad_preactivation)};
  run_cuda(cuda::head_backward, params, input);
}
#endif

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
  if (input.is_cpu()) check_member_ids(static_cast<const int64_t*>(ids.const_data_ptr()), s);

  Gradients gradients;
  const auto in_many_steps = [&] {
    const Tensor grad_alpha = mix_gradients(gradients, s, rule_params, wanted, as_contiguous(grad_scores), input,
                                            weight, bias, ids, as_contiguous(alpha),
                                            weight ? as_contiguous(saved_logits) : dense(input, wide));
    if (wanted & kOfSubmodules) {
      submodule_gradients(gradients, s, rule_params, wanted, grad_alpha, z, w1, w2, as_contiguous(preactivation),
                          as_contiguous(raw));
    }
  };
#if ALPHAEXT_WITH_CUDA
  if (goes_in_one_launch(input, s)) {
    head_backward_in_one_launch(gradients, s, rule_params, wanted, as_contiguous(grad_scores), input, weight, bias, ids, z, w1,
                                b1, w2, as_contiguous(preactivation), as_contiguous(raw), as_contiguous(alpha),
                                as_contiguous(saved_logits));
  } else {
    in_many_steps();
  }
#else
  in_many_steps();
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
