// The operators of the native training engine: schemas, argument checks, and the way to the kernels. Used by
// alphaext/engines.py, which prepares the tensors; users have no business with them.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "sampling.h"
#include "stable_aten.h"
#include "training.h"

namespace alphaext {
namespace {

using torch::stable::Tensor;
using TorchType = torch::headeronly::ScalarType;

// Kernels read these tensors without looking again, so each is checked for all that they assume.
void check(const Tensor& tensor, const char* name, TorchType type, std::vector<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type, "alphaext: ", name,
                  " must be a contiguous CPU tensor of the expected dtype");
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted, got;
  for (int64_t i = 0; i < tensor.dim(); ++i) got += (i ? ", " : "") + std::to_string(tensor.size(i));
  for (size_t i = 0; i < sizes.size(); ++i) {
    wanted += (i ? ", " : "") + (sizes[i] < 0 ? std::string("n") : std::to_string(sizes[i]));
    fits = fits && (sizes[i] < 0 || tensor.size(static_cast<int64_t>(i)) == sizes[i]);
  }
  STD_TORCH_CHECK(fits, "alphaext: ", name, " must have shape [", wanted, "], got [", got, "]");
}

ScalarType kernel_type(const Tensor& tensor, const char* name) {
  const TorchType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == TorchType::Float || type == TorchType::Double, "alphaext: ", name, " must be float32 or float64");
  return type == TorchType::Double ? ScalarType::Float64 : ScalarType::Float32;
}

template <typename Index>
void check_range(const Tensor& tensor, const char* name, int64_t low, int64_t high) {
  const Index* const values = static_cast<const Index*>(tensor.const_data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    STD_TORCH_CHECK(values[i] >= low && values[i] < high, "alphaext: ", name, " must be in [", low, ", ", high, "), got ",
                    values[i], " at position ", i);
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Scratch memory of one call, on a cache line of its own.
struct Workspace {
  explicit Workspace(int64_t bytes)
      : memory(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(rounded_up(bytes, 64))))) {
    STD_TORCH_CHECK(memory != nullptr, "alphaext: no memory for a workspace of ", bytes, " bytes");
  }
  ~Workspace() { std::free(memory); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* const memory;
};

void run_initial_weights(const InitialWeightsParams& p, int64_t networks) {
  STD_TORCH_CHECK(p.inputs < (int64_t{1} << 33) && p.hidden < (int64_t{1} << 32) && networks < (int64_t{1} << 32),
                  "alphaext: a first layer of ", networks, " x ", p.hidden, " x ", p.inputs, " weights is too large");
  torch::stable::parallel_for(0, networks * p.hidden, std::max<int64_t>(1, (1 << 18) / p.inputs), [&](int64_t begin, int64_t end) {
    const Workspace workspace(initial_weights_workspace_bytes(p));
    cpu::kernels().initial_weights(p, begin, end, workspace.memory);
  });
}

// Fills w1 [networks, H, I] and b1 [networks, H] with the start of networks first_network, first_network + 1, ...
void initial_first_layer(const Tensor& w1, const Tensor& b1, int64_t seed, int64_t first_network) {
  InitialWeightsParams p{};
  p.dtype = kernel_type(w1, "w1");
  check(w1, "w1", w1.scalar_type(), {-1, -1, -1});
  check(b1, "b1", w1.scalar_type(), {w1.size(0), w1.size(1)});
  p.hidden = w1.size(1);
  p.inputs = w1.size(2);
  STD_TORCH_CHECK(p.inputs > 0 && first_network >= 0, "alphaext: w1 must have inputs, and first_network not be below 0");
  p.first_network = first_network;
  p.seed = static_cast<uint64_t>(seed);
  p.bound = 1 / std::sqrt(static_cast<double>(p.inputs));
  p.w1 = w1.mutable_data_ptr();
  p.b1 = b1.mutable_data_ptr();
  run_initial_weights(p, w1.size(0));
}

// w1 z + b1 of the same start, without writing the weights down. -> [F, hidden]
Tensor initial_preactivation(const Tensor& z, int64_t hidden, bool shared, int64_t seed) {
  InitialWeightsParams p{};
  p.dtype = kernel_type(z, "z");
  check(z, "z", z.scalar_type(), {-1, -1});
  p.num_few = z.size(0);
  p.inputs = z.size(1);
  STD_TORCH_CHECK(p.inputs > 0 && hidden > 0, "alphaext: z must have columns, and hidden be above 0; got ", p.inputs, ", ", hidden);
  p.hidden = hidden;
  p.shared = shared;
  p.seed = static_cast<uint64_t>(seed);
  p.bound = 1 / std::sqrt(static_cast<double>(p.inputs));
  p.z = z.const_data_ptr();
  const Tensor preactivation = torch::stable::new_empty(z, {p.num_few, hidden}, z.scalar_type());
  p.preactivation = preactivation.mutable_data_ptr();
  run_initial_weights(p, shared ? 1 : p.num_few);
  return preactivation;
}

// The samples of one epoch; see sampling.h. -> int64 [num_few + negatives]
Tensor sample_epoch(int64_t num_few, const Tensor& group_offsets, int64_t negatives, int64_t seed, int64_t epoch) {
  check(group_offsets, "group_offsets", TorchType::Long, {-1});
  const int64_t groups = group_offsets.numel() - 1;
  STD_TORCH_CHECK(num_few >= 0 && negatives >= 0 && (negatives == 0 || groups > 0),
                  "alphaext: num_few and negatives must not be below 0, nor negatives be drawn from no group; got ", num_few, ", ",
                  negatives, ", ", groups);
  const int64_t* const offsets = data<int64_t>(group_offsets);
  for (int64_t g = 0; negatives > 0 && g < groups; ++g) {
    STD_TORCH_CHECK(offsets[0] == 0 && offsets[g + 1] > offsets[g], "alphaext: group_offsets must start at 0 and increase");
  }
  const Tensor order = torch::stable::new_empty(group_offsets, {num_few + negatives}, TorchType::Long);
  std::vector<int64_t> permutation(static_cast<size_t>(negatives > 0 ? offsets[groups] : 0));
  for (size_t i = 0; i < permutation.size(); ++i) permutation[i] = static_cast<int64_t>(i);
  draw_epoch(num_few, offsets, groups, negatives, static_cast<uint64_t>(seed), static_cast<uint64_t>(epoch), permutation.data(),
             static_cast<int64_t*>(order.mutable_data_ptr()));
  return order;
}

// Keeps of a block of logits what training (top_logits None, member_logits [rows, U]) or validation needs.
void cache_logits_op(const Tensor& logits, const Tensor& labels, const Tensor& few_penalty, const Tensor& column_class,
                     const Tensor& column_bias, const Tensor& member_logits, const Tensor& base_logsumexp,
                     const Tensor& label_logit, const std::optional<Tensor>& top_logits, const std::optional<Tensor>& top_ids) {
  CacheParams p{};
  p.dtype = kernel_type(logits, "logits");
  const TorchType type = logits.scalar_type();
  check(logits, "logits", type, {-1, -1});
  p.rows = logits.size(0);
  p.num_classes = logits.size(1);
  check(labels, "labels", TorchType::Long, {p.rows});
  check(few_penalty, "few_penalty", type, {p.num_classes});
  check(column_class, "column_class", TorchType::Long, {-1});
  p.columns = column_class.numel();
  check(column_bias, "column_bias", type, {p.columns});
  check(base_logsumexp, "base_logsumexp", type, {p.rows});
  check(label_logit, "label_logit", type, {p.rows});
  check_range<int64_t>(labels, "labels", 0, p.num_classes);
  check_range<int64_t>(column_class, "column_class", 0, p.num_classes);
  p.in_blocks = top_logits.has_value();
  if (p.in_blocks) {
    STD_TORCH_CHECK(top_ids.has_value(), "alphaext: top_ids must be given with top_logits");
    check(*top_logits, "top_logits", type, {p.rows, kTopClasses});
    check(*top_ids, "top_ids", TorchType::Int, {p.rows, kTopClasses});
    check(member_logits, "member_logits", type, {rounded_up(p.rows, kBlockSamples) / kBlockSamples, p.columns, kBlockSamples});
    p.top_logits = top_logits->mutable_data_ptr();
    p.top_ids = static_cast<int32_t*>(top_ids->mutable_data_ptr());
  } else {
    check(member_logits, "member_logits", type, {p.rows, p.columns});
  }
  p.logits = logits.const_data_ptr();
  p.few_penalty = few_penalty.const_data_ptr();
  p.column_class = data<int64_t>(column_class);
  p.column_bias = column_bias.const_data_ptr();
  p.labels = data<int64_t>(labels);
  p.base_logsumexp = base_logsumexp.mutable_data_ptr();
  p.label_logit = label_logit.mutable_data_ptr();
  p.member_logits = member_logits.mutable_data_ptr();
  // As in ops.cpp: a barrier is worth it for some 100 microseconds of work.
  const int64_t grain = std::max<int64_t>(kBlockSamples, (1 << 19) / std::max<int64_t>(1, p.num_classes));
  torch::stable::parallel_for(0, p.rows, grain,
                              [&](int64_t begin, int64_t end) { cpu::kernels().cache_logits(p, begin, end); });
}

// Trains one epoch in place -> float64 [3]: loss (sum over samples), failed step or -1, failed class or -1.
Tensor train_epoch(
    const Tensor& state, const Tensor& b2, const Tensor& b2_momentum, const Tensor& raw, const Tensor& alpha,
    const Tensor& order, const Tensor& member_logits, const Tensor& base_logsumexp, const Tensor& label_logit,
    const Tensor& few_of_label, const Tensor& member_columns, const Tensor& gradient_scale, int64_t batch, double gamma,
    int64_t rule, bool projected_gradient, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
    bool first_step) {
  TrainParams p{};
  p.dtype = kernel_type(state, "state");
  const TorchType type = state.scalar_type();
  check(member_columns, "member_columns", TorchType::Int, {-1, -1});
  p.num_few = member_columns.size(0);
  p.members = member_columns.size(1);
  STD_TORCH_CHECK(p.members >= 2, "alphaext: member_columns must have at least 2 columns, got ", p.members);
  STD_TORCH_CHECK(gamma > 0 && gamma <= 1, "alphaext: gamma must be in (0, 1], got ", gamma);
  STD_TORCH_CHECK(rule >= 0 && rule <= 2, "alphaext: rule must be 0 (softmax), 1 (clamp) or 2 (l1), got ", rule);
  STD_TORCH_CHECK(batch >= 1, "alphaext: batch must be at least 1, got ", batch);
  check(state, "state", type, {-1, -1, -1, kTileWidth});
  const int64_t networks = state.size(0);
  p.shared = gradient_scale.dim() == 2;
  STD_TORCH_CHECK(networks == (p.shared ? 1 : p.num_few), "alphaext: state must hold ", p.shared ? 1 : p.num_few,
                  " networks, got ", networks);
  p.tiles = state.size(1);
  check(state, "state", type, {networks, p.tiles, 2 * (p.shared ? p.num_few : 1) + 2 * p.members, kTileWidth});
  check(gradient_scale, "gradient_scale", type,
        p.shared ? std::vector<int64_t>{p.num_few, p.num_few} : std::vector<int64_t>{p.num_few});
  check(b2, "b2", type, {networks, p.members});
  check(b2_momentum, "b2_momentum", type, {networks, p.members});
  check(raw, "raw", type, {p.num_few, p.members});
  check(alpha, "alpha", type, {p.num_few, p.members});
  check(order, "order", TorchType::Long, {-1});
  check(member_logits, "member_logits", type, {-1, -1});
  const int64_t rows = member_logits.size(0);
  p.columns = member_logits.size(1);
  check(base_logsumexp, "base_logsumexp", type, {rows});
  check(label_logit, "label_logit", type, {rows});
  check(few_of_label, "few_of_label", TorchType::Int, {rows});
  check_range<int64_t>(order, "order", 0, rows);
  check_range<int32_t>(member_columns, "member_columns", 0, p.columns);
  check_range<int32_t>(few_of_label, "few_of_label", -1, p.num_few);
  p.samples = order.numel();
  p.batch = std::min(batch, std::max<int64_t>(1, p.samples));
  p.rule = RuleParams{static_cast<Rule>(rule), gamma, projected_gradient};
  p.sgd = SgdParams{lr, momentum, dampening, weight_decay, nesterov, first_step};
  p.order = data<int64_t>(order);
  p.member_logits = member_logits.const_data_ptr();
  p.base_logsumexp = base_logsumexp.const_data_ptr();
  p.label_logit = label_logit.const_data_ptr();
  p.few_of_label = data<int32_t>(few_of_label);
  p.member_columns = data<int32_t>(member_columns);
  p.gradient_scale = gradient_scale.const_data_ptr();
  p.state = state.mutable_data_ptr();
  p.b2 = b2.mutable_data_ptr();
  p.b2_momentum = b2_momentum.mutable_data_ptr();
  p.raw = raw.mutable_data_ptr();
  p.alpha = alpha.mutable_data_ptr();
  const Workspace workspace(train_workspace_bytes(p));
  p.workspace = workspace.memory;
  const Tensor result = torch::stable::new_empty(state, {3}, TorchType::Double);
  double* const values = static_cast<double*>(result.mutable_data_ptr());
  const TrainResult trained = cpu::kernels().train_epoch(p);
  values[0] = trained.loss;
  values[1] = static_cast<double>(trained.failed_step);
  values[2] = static_cast<double>(trained.failed_class);
  return result;
}

// -> int64 [2, N]: of each class the samples that come first, and that are among the first five.
Tensor validate(const Tensor& alpha, const Tensor& member_columns, const Tensor& few_classes, const Tensor& member_logits,
                const Tensor& label_logit, const Tensor& top_logits, const Tensor& top_ids, const Tensor& labels,
                const Tensor& few_of_label, int64_t num_classes) {
  ValidateParams p{};
  p.dtype = kernel_type(alpha, "alpha");
  const TorchType type = alpha.scalar_type();
  check(alpha, "alpha", type, {-1, -1});
  p.num_few = alpha.size(0);
  p.members = alpha.size(1);
  check(member_columns, "member_columns", TorchType::Int, {p.num_few, p.members});
  check(few_classes, "few_classes", TorchType::Int, {p.num_few});
  check(labels, "labels", TorchType::Long, {-1});
  p.samples = labels.numel();
  check(member_logits, "member_logits", type, {rounded_up(p.samples, kBlockSamples) / kBlockSamples, -1, kBlockSamples});
  p.columns = member_logits.size(1);
  check(label_logit, "label_logit", type, {p.samples});
  check(top_logits, "top_logits", type, {p.samples, kTopClasses});
  check(top_ids, "top_ids", TorchType::Int, {p.samples, kTopClasses});
  check(few_of_label, "few_of_label", TorchType::Int, {p.samples});
  check_range<int32_t>(member_columns, "member_columns", 0, p.columns);
  check_range<int32_t>(few_of_label, "few_of_label", -1, p.num_few);
  check_range<int64_t>(labels, "labels", 0, num_classes);
  p.num_classes = num_classes;
  const Tensor hits = torch::stable::new_zeros(labels, {2, num_classes}, TorchType::Long);
  p.alpha = alpha.const_data_ptr();
  p.member_columns = data<int32_t>(member_columns);
  p.few_classes = data<int32_t>(few_classes);
  p.member_logits = member_logits.const_data_ptr();
  p.label_logit = label_logit.const_data_ptr();
  p.top_logits = top_logits.const_data_ptr();
  p.top_ids = data<int32_t>(top_ids);
  p.labels = data<int64_t>(labels);
  p.few_of_label = data<int32_t>(few_of_label);
  p.hits = static_cast<int64_t*>(hits.mutable_data_ptr());
  const Workspace workspace(validate_workspace_bytes(p));
  p.workspace = workspace.memory;
  // One thread: runs side by side use the cores better than a barrier an epoch would.
  cpu::kernels().validate(p, 0, rounded_up(p.samples, kBlockSamples) / kBlockSamples);
  return hits;
}

}  // namespace
}  // namespace alphaext

STABLE_TORCH_LIBRARY_FRAGMENT(alphaext, m) {
  m.def("sample_epoch(int num_few, Tensor group_offsets, int negatives, int seed, int epoch) -> Tensor");
  m.def("initial_first_layer(Tensor(a!) w1, Tensor(b!) b1, int seed, int first_network) -> ()");
  m.def("initial_preactivation(Tensor z, int hidden, bool shared, int seed) -> Tensor");
  m.def(
      "cache_logits(Tensor logits, Tensor labels, Tensor few_penalty, Tensor column_class, Tensor column_bias, Tensor(a!) "
      "member_logits, Tensor(b!) base_logsumexp, Tensor(c!) label_logit, Tensor(d!)? top_logits, Tensor(e!)? top_ids) -> ()");
  m.def(
      "train_epoch(Tensor(a!) state, Tensor(b!) b2, Tensor(c!) b2_momentum, Tensor(d!) raw, Tensor(e!) alpha, Tensor order, "
      "Tensor member_logits, Tensor base_logsumexp, Tensor label_logit, Tensor few_of_label, Tensor member_columns, Tensor "
      "gradient_scale, int batch, float gamma, int rule, bool projected_gradient, float lr, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool first_step) -> Tensor");
  m.def(
      "validate(Tensor alpha, Tensor member_columns, Tensor few_classes, Tensor member_logits, Tensor label_logit, Tensor "
      "top_logits, Tensor top_ids, Tensor labels, Tensor few_of_label, int num_classes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alphaext, CPU, m) {
  m.impl("sample_epoch", TORCH_BOX(&alphaext::sample_epoch));
  m.impl("initial_first_layer", TORCH_BOX(&alphaext::initial_first_layer));
  m.impl("initial_preactivation", TORCH_BOX(&alphaext::initial_preactivation));
  m.impl("cache_logits", TORCH_BOX(&alphaext::cache_logits_op));
  m.impl("train_epoch", TORCH_BOX(&alphaext::train_epoch));
  m.impl("validate", TORCH_BOX(&alphaext::validate));
}
