// The head on a GPU: one launch with its matrix products, or, beyond the crossing point, ATen's products and one launch.
#include "cuda/head.h"
#include "cuda/large_head.h"
#include "gpu_stream.h"
#include "head_call.h"

namespace alphaext {
namespace {

template <typename Params>
void run(const char* (*launcher)(const Params&, int32_t, void*), const Params& params, const Tensor& on) {
  const char* const error = launcher(params, on.get_device_index(), stream_of(on));
  STD_TORCH_CHECK(error == nullptr, "alphaext: ", error ? error : "");
}

// Up to the crossing point, and where nothing is empty: the pointer of an empty tensor is null, which the kernel of a whole
// head reads as "not given".
bool goes_in_one_launch(const HeadCall& call) {
  const Sizes& s = call.s;
  const bool has_first_layer = s.separate_first_layer || s.shared_first_layer;  // without one, hidden units may be none
  const bool is_whole = !has_first_layer || (s.inputs > 0 && s.hidden > 0);
  return is_whole && s.batch > 0 && call.input.size(1) > 0 && s.num_classes > 0 && s.num_few > 0 &&
         cuda::fuses_head(kernel_type(call.type()), s.batch, s.num_classes, s.members, call.input.get_device_index());
}

// The arguments that a launch reads, dense, for as long as its parameters point to them. Without the products it reads neither
// the classifier nor the features.
struct DenseCall {
  const bool with_products;
  const Tensor input, b1, w2, b2;
  const std::optional<Tensor> weight, bias, z, w1;

  DenseCall(const HeadCall& call, bool with_products_)
      : with_products(with_products_), input(with_products || !call.weight ? as_contiguous(call.input) : call.input),
        b1(as_contiguous(call.b1)), w2(as_contiguous(call.w2)), b2(as_contiguous(call.b2)),
        weight(with_products ? as_contiguous(call.weight) : call.weight), bias(as_contiguous(call.bias)),
        z(as_contiguous(call.z)), w1(as_contiguous(call.w1)) {}
};

// What every launch is told of the call.
template <typename Params>
Params params_of(const HeadCall& call, const DenseCall& given) {
  const Sizes& s = call.s;
  Params p{};
  p.dtype = kernel_type(call.type());
  p.rule = call.rule;
  p.batch = s.batch;
  p.features = call.input.size(1);
  p.num_classes = s.num_classes;
  p.num_few = s.num_few;
  p.hidden = s.hidden;
  p.members = s.members;
  p.inputs = s.inputs;
  p.shared_first = s.shared_first_layer;
  p.shared_second = s.shared_second_layer;
  p.input = given.input.const_data_ptr();
  p.weight = given.with_products ? data_of(given.weight) : nullptr;
  p.bias = data_of(given.bias);
  p.member_ids = static_cast<const int64_t*>(call.ids.const_data_ptr());
  p.z = given.w1 ? data_of(given.z) : nullptr;
  p.w1 = data_of(given.w1);
  p.w2 = given.w2.const_data_ptr();
  return p;
}

// ---- Forward -----------------------------------------------------------------------------------------------------------

// The logits by cuBLAS, and whether they still lack the bias. float32 is multiplied in TF32 only where torch allows it. 16-bit
// operands go to the tensor cores, whose float32 sums are kept; that product takes no bias along.
std::pair<Tensor, bool> product_with_classifier(const HeadCall& call) {
  const TorchType type = call.type(), wide = call.wide();
  const bool is_empty = call.s.batch == 0 || call.s.num_classes == 0 || call.input.size(1) == 0;
  if (type != wide && !is_empty) {
    const Tensor transposed = torch::stable::transpose(*call.weight, 0, 1);
    return {as_contiguous(aten::mm(call.input, transposed, wide)), call.bias.has_value()};
  }
  std::optional<Tensor> bias;
  if (call.bias) bias = as_type(*call.bias, wide);
  return {as_contiguous(aten::linear(as_type(call.input, wide), as_type(*call.weight, wide), bias)), false};
}

// `logits` is null where the logits are the input.
HeadParams forward_params(const HeadCall& call, const DenseCall& given, const HeadResults& results) {
  const auto& [scores, preactivation, raw, alpha, logits] = results;
  HeadParams p = params_of<HeadParams>(call, given);
  p.b1 = given.b1.const_data_ptr();
  p.b2 = given.b2.const_data_ptr();
  p.preactivation = preactivation.mutable_data_ptr();
  p.raw = raw.mutable_data_ptr();
  p.alpha = alpha.mutable_data_ptr();
  p.logits = given.weight ? logits.mutable_data_ptr() : nullptr;
  p.scores = scores.mutable_data_ptr();
  p.slices = 1;
  return p;
}

HeadResults new_results(const HeadCall& call, const std::optional<Tensor>& preactivation, const std::optional<Tensor>& logits) {
  const Sizes& s = call.s;
  const TorchType wide = call.wide();
  const Tensor& input = call.input;
  const int64_t rows = call.weight ? s.batch : 0, columns = call.weight ? s.num_classes : 0;
  return {new_empty(input, {s.batch, s.num_classes}, call.type()),
          preactivation ? *preactivation : new_empty(input, {s.num_few, s.hidden}, wide),
          new_empty(input, {s.num_few, s.members}, wide), new_empty(input, {s.num_few, s.members}, wide),
          logits ? *logits : new_empty(input, {rows, columns}, wide)};
}

HeadResults head_in_one_launch(const HeadCall& call) {
  const Sizes& s = call.s;
  const DenseCall given(call, true);
  const HeadResults results = new_results(call, std::nullopt, std::nullopt);
  HeadParams params = forward_params(call, given, results);
  std::optional<Tensor> partial;
  if (call.weight) params.slices = head_slices(s.batch, s.num_classes, params.features);
  if (params.slices > 1) partial = new_empty(call.input, {params.slices, s.batch, s.num_classes}, call.wide());
  params.partial = mutable_data_of(partial);
  run(cuda::head_forward, params, call.input);
  return results;
}

HeadResults large_head(const HeadCall& call) {
  const DenseCall given(call, false);
  std::optional<Tensor> preactivation, logits;
  bool adds_bias = false;
  if (call.s.shared_first_layer) preactivation = shared_preactivation(call);
  if (call.weight) std::tie(logits, adds_bias) = product_with_classifier(call);
  const HeadResults results = new_results(call, preactivation, logits);
  run(cuda::large_head_forward, LargeHeadParams{forward_params(call, given, results), adds_bias}, call.input);
  return results;
}

// ---- Backward ----------------------------------------------------------------------------------------------------------

// The members sorted by class, and where each class's part begins: what a gather over the members of a class needs.
std::pair<Tensor, Tensor> members_by_class(const Tensor& ids, int64_t num_classes) {
  const auto [sorted, positions] = aten::stable_sort(torch::stable::flatten(ids));
  const int64_t count = num_classes + 1;
  const Tensor steps =
      torch::stable::full(IntHeaderOnlyArrayRef(&count, 1), 1, TorchType::Long, std::nullopt, ids.device());
  Tensor first = torch::stable::select(steps, 0, 0);
  torch::stable::zero_(first);
  const Tensor classes = aten::cumsum(steps, 0);  // 0 .. num_classes
  return {positions, aten::searchsorted(sorted, classes)};
}

std::optional<Tensor> gradient_like(const std::optional<Tensor>& argument, bool is_wanted) {
  if (!is_wanted) return std::nullopt;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < argument->dim(); ++i) shape.push_back(argument->size(i));
  return new_empty(*argument, shape, argument->scalar_type());
}

// Scratch, or what a product of the caller's goes on from.
struct BackwardRoom {
  std::optional<Tensor> grad_logits, grad_raw, grad_preactivation;
  int64_t input_slices = 1;
  std::optional<Tensor> input_partial;
};

HeadBackwardParams backward_params(const HeadCall& call, const DenseCall& given, const BackwardCall& backward,
                                   const Gradients& gradients, const BackwardRoom& room) {
  HeadBackwardParams p = params_of<HeadBackwardParams>(call, given);
  p.preactivation = backward.preactivation.const_data_ptr();
  p.raw = backward.raw.const_data_ptr();
  p.alpha = backward.alpha.const_data_ptr();
  p.logits = given.weight ? backward.logits.const_data_ptr() : nullptr;
  p.grad_scores = backward.grad_scores.const_data_ptr();
  p.grad_input = mutable_data_of(gradients.input);
  p.grad_weight = mutable_data_of(gradients.weight);
  p.grad_bias = mutable_data_of(gradients.bias);
  p.grad_z = mutable_data_of(gradients.z);
  p.grad_w1 = mutable_data_of(gradients.w1);
  p.grad_b1 = mutable_data_of(gradients.b1);
  p.grad_w2 = mutable_data_of(gradients.w2);
  p.grad_b2 = mutable_data_of(gradients.b2);
  p.grad_logits = mutable_data_of(room.grad_logits);
  p.grad_raw = mutable_data_of(room.grad_raw);
  p.grad_preactivation = mutable_data_of(room.grad_preactivation);
  p.input_slices = room.input_slices;
  p.input_partial = mutable_data_of(room.input_partial);
  return p;
}

Gradients head_backward_in_one_launch(const HeadCall& call, const BackwardCall& backward) {
  const Sizes& s = call.s;
  const TorchType wide = call.wide();
  const DenseCall given(call, true);
  Gradients gradients;
  gradients.input = gradient_like(given.input, backward.asks(kInput));
  gradients.weight = gradient_like(given.weight, backward.asks(kWeight));
  gradients.bias = gradient_like(given.bias, backward.asks(kBias));
  gradients.z = gradient_like(given.z, backward.asks(kZ));
  gradients.w1 = gradient_like(given.w1, backward.asks(kW1));
  gradients.b1 = gradient_like(given.b1, backward.asks(kB1));
  gradients.w2 = gradient_like(given.w2, backward.asks(kW2));
  gradients.b2 = gradient_like(given.b2, backward.asks(kB2));
  const HeadBackwardNeeds needs = head_backward_needs(
      call.weight.has_value(), s.shared_first_layer, s.shared_second_layer, backward.asks(kInput), backward.asks(kWeight),
      backward.asks(kZ), backward.asks(kW1), backward.asks(kB1), backward.asks(kW2), backward.asks(kB2));
  BackwardRoom room;
  if (needs.grad_logits) room.grad_logits = new_empty(call.input, {s.batch, s.num_classes}, wide);
  if (needs.grad_raw) room.grad_raw = new_empty(call.input, {s.num_few, s.members}, wide);
  if (needs.grad_preactivation) room.grad_preactivation = new_empty(call.input, {s.num_few, s.hidden}, wide);
  if (call.weight && backward.asks(kInput)) {
    const int64_t features = call.input.size(1);
    room.input_slices = head_slices(s.batch, features, s.num_classes);
    if (room.input_slices > 1) room.input_partial = new_empty(call.input, {room.input_slices, s.batch, features}, wide);
  }
  run(cuda::head_backward, backward_params(call, given, backward, gradients, room), call.input);
  return gradients;
}

Gradients large_head_backward(const HeadCall& call, const BackwardCall& backward) {
  const Sizes& s = call.s;
  const TorchType type = call.type(), wide = call.wide();
  const DenseCall given(call, false);
  Gradients gradients;  // those that the launch makes; the products' follow
  gradients.bias = gradient_like(given.bias, backward.asks(kBias));
  gradients.b1 = gradient_like(given.b1, backward.asks(kB1));
  gradients.w2 = gradient_like(given.w2, backward.asks(kW2));
  gradients.b2 = gradient_like(given.b2, backward.asks(kB2));
  gradients.z = gradient_like(given.z, backward.asks(kZ) && !s.shared_first_layer);
  gradients.w1 = gradient_like(given.w1, backward.asks(kW1) && !s.shared_first_layer);

  // float16 has not the range of what goes on into a product: a loss's scale would overflow beyond the crossing point only.
  const TorchType kept = type == TorchType::Half && call.weight ? wide : type;
  const bool bias_through_logits = backward.asks(kBias) && (call.rule.rule == Rule::L1) != call.weight.has_value();
  const bool of_shared_second = s.shared_second_layer && (backward.asks(kW2) || backward.asks(kB2));
  const bool of_shared_first = s.shared_first_layer && (backward.asks(kW1) || backward.asks(kB1));
  BackwardRoom room;
  std::optional<Tensor> entries, entry_offsets;
  if (backward.asks(kInput) || backward.asks(kWeight) || bias_through_logits) {
    room.grad_logits = new_empty(call.input, {s.batch, s.num_classes}, kept);
    std::tie(entries, entry_offsets) = members_by_class(call.ids, s.num_classes);
  }
  if (of_shared_second || large_head_stage_bytes(s.members, kernel_type(type)) == 0) {
    room.grad_raw = new_empty(call.input, {s.num_few, s.members}, wide);
  }
  if (of_shared_first || backward.asks(kZ)) {
    room.grad_preactivation = new_empty(call.input, {s.num_few, s.hidden}, wide);
  }
  run(cuda::large_head_backward,
      LargeHeadBackwardParams{backward_params(call, given, backward, gradients, room),
                              static_cast<const int64_t*>(data_of(entries)),
                              static_cast<const int64_t*>(data_of(entry_offsets)), kept == wide},
      call.input);

  if (backward.asks(kInput)) {
    gradients.input =
        call.weight ? as_type(torch::stable::matmul(*room.grad_logits, as_type(*call.weight, kept)), type) : *room.grad_logits;
  }
  if (backward.asks(kWeight)) {
    const Tensor transposed = torch::stable::transpose(*room.grad_logits, 0, 1);
    gradients.weight = as_type(torch::stable::matmul(transposed, as_type(call.input, kept)), type);
  }
  if (s.shared_first_layer && room.grad_preactivation) {
    shared_first_layer_gradients(gradients, call, backward, *room.grad_preactivation);
  }
  return gradients;
}

}  // namespace

HeadResults head_on_gpu(const HeadCall& call) { return goes_in_one_launch(call) ? head_in_one_launch(call) : large_head(call); }

Gradients head_backward_on_gpu(const HeadCall& call, const BackwardCall& backward) {
  return goes_in_one_launch(call) ? head_backward_in_one_launch(call, backward) : large_head_backward(call, backward);
}

}  // namespace alphaext
