// The operators of the native training engine: schemas, argument checks, and the way to the kernels. Used by
// alphaext/training/native_engine.py, which prepares the tensors; users have no business with them.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cuda/training_kernels.h"
#include "gpu_stream.h"
#include "sampling.h"
#include "tensors.h"
#include "training.h"

namespace alphaext {
namespace {

void check_shape(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted, got;
  for (int64_t i = 0; i < tensor.dim(); ++i) got += (i ? ", " : "") + std::to_string(tensor.size(i));
  for (size_t i = 0; i < sizes.size(); ++i) {
    wanted += (i ? ", " : "") + (sizes[i] < 0 ? std::string("n") : std::to_string(sizes[i]));
    fits = fits && (sizes[i] < 0 || tensor.size(static_cast<int64_t>(i)) == sizes[i]);
  }
  STD_TORCH_CHECK(fits, "alphaext: ", name, " must have shape [", wanted, "], got [", got, "]");
}

// Kernels read these tensors without looking again, so each is checked for all that they assume.
void check(const Tensor& tensor, const char* name, TorchType type, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type, "alphaext: ", name,
                  " must be a contiguous CPU tensor of the expected dtype");
  check_shape(tensor, name, sizes);
}

// The same for the device of `on`.
void check_on(const Tensor& on, const Tensor& tensor, const char* name, TorchType type, const std::vector<int64_t>& sizes) {
  if (!on_gpu(on)) return check(tensor, name, type, sizes);
  STD_TORCH_CHECK(tensor.device() == on.device() && tensor.is_contiguous() && tensor.scalar_type() == type, "alphaext: ", name,
                  " must be a contiguous tensor of the expected dtype, on the device of the others");
  check_shape(tensor, name, sizes);
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

// Cached logits are read in no order that the processor could foresee: with pages of 4 KiB most of it is looking up pages.
void advise_huge_pages(const Tensor& memory) {
  cpu::advise_huge_pages(memory.mutable_data_ptr(), static_cast<size_t>(memory.numel()) * memory.element_size());
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

// The arrays of one or of several runs, whose leading dimension only stacked tensors have.
struct TrainTensors {
  const Tensor &state, &b2, &b2_momentum, &raw, &alpha, &order, &member_logits, &base_logsumexp, &label_logit, &few_of_label,
      &member_columns, &gradient_scale;
  const std::optional<Tensor>&penalty, &few_offset;
};

// The parameters of all runs, but for rules and SGD. `stacked`: tensors have a leading run dimension, logits may have it.
cuda::TrainRunsParams train_runs(const TrainTensors& t, int64_t batch, bool stacked) {
  cuda::TrainRunsParams all{};
  TrainParams& p = all.first;
  p.dtype = kernel_type(t.state, "state");
  const TorchType type = t.state.scalar_type();
  const auto run_check = [&](const Tensor& tensor, const char* name, TorchType dtype, std::vector<int64_t> sizes) {
    if (stacked) sizes.insert(sizes.begin(), all.runs);
    check_on(t.state, tensor, name, dtype, sizes);
  };
  const int64_t lead = stacked ? 1 : 0;
  all.runs = stacked ? -1 : 1;
  run_check(t.member_columns, "member_columns", TorchType::Int, {-1, -1});
  if (stacked) all.runs = t.member_columns.size(0);
  p.num_few = t.member_columns.size(lead);
  p.members = t.member_columns.size(lead + 1);
  STD_TORCH_CHECK(p.members >= 2, "alphaext: member_columns must have at least 2 columns, got ", p.members);
  STD_TORCH_CHECK(batch >= 1, "alphaext: batch must be at least 1, got ", batch);
  run_check(t.state, "state", type, {-1, -1, -1, kTileWidth});
  const int64_t networks = t.state.size(lead);
  p.shared = t.gradient_scale.dim() == lead + 2;
  STD_TORCH_CHECK(networks == (p.shared ? 1 : p.num_few), "alphaext: state must hold ", p.shared ? 1 : p.num_few,
                  " networks, got ", networks);
  p.tiles = t.state.size(lead + 1);
  run_check(t.state, "state", type, {networks, p.tiles, 2 * (p.shared ? p.num_few : 1) + 2 * p.members, kTileWidth});
  run_check(t.gradient_scale, "gradient_scale", type,
            p.shared ? std::vector<int64_t>{p.num_few, p.num_few} : std::vector<int64_t>{p.num_few});
  if (t.penalty) run_check(*t.penalty, "penalty", type, {2, p.members});
  if (t.few_offset) run_check(*t.few_offset, "few_offset", type, {p.num_few});
  run_check(t.b2, "b2", type, {networks, p.members});
  run_check(t.b2_momentum, "b2_momentum", type, {networks, p.members});
  run_check(t.raw, "raw", type, {p.num_few, p.members});
  run_check(t.alpha, "alpha", type, {p.num_few, p.members});
  run_check(t.order, "order", TorchType::Long, {-1});
  all.separate_logits = stacked && t.member_logits.dim() == 3;
  const auto logits_check = [&](const Tensor& tensor, const char* name, TorchType dtype, std::vector<int64_t> sizes) {
    if (all.separate_logits) sizes.insert(sizes.begin(), all.runs);
    check_on(t.state, tensor, name, dtype, sizes);
  };
  logits_check(t.member_logits, "member_logits", type, {-1, -1});
  all.rows = t.member_logits.size(all.separate_logits ? 1 : 0);
  p.columns = t.member_logits.size(all.separate_logits ? 2 : 1);
  logits_check(t.base_logsumexp, "base_logsumexp", type, {all.rows});
  logits_check(t.label_logit, "label_logit", type, {all.rows});
  logits_check(t.few_of_label, "few_of_label", TorchType::Int, {all.rows});
  // Reading a GPU's values would make the CPU wait for it: there the kernels look at every index themselves.
  if (!on_gpu(t.state)) {
    check_range<int64_t>(t.order, "order", 0, all.rows);
    check_range<int32_t>(t.member_columns, "member_columns", 0, p.columns);
    check_range<int32_t>(t.few_of_label, "few_of_label", -1, p.num_few);
  }
  p.samples = t.order.size(lead);
  p.batch = std::min(batch, std::max<int64_t>(1, p.samples));
  p.order = data<int64_t>(t.order);
  p.member_logits = t.member_logits.const_data_ptr();
  p.base_logsumexp = t.base_logsumexp.const_data_ptr();
  p.label_logit = t.label_logit.const_data_ptr();
  p.few_of_label = data<int32_t>(t.few_of_label);
  p.member_columns = data<int32_t>(t.member_columns);
  p.gradient_scale = t.gradient_scale.const_data_ptr();
  p.penalty = t.penalty ? t.penalty->const_data_ptr() : nullptr;
  p.few_offset = t.few_offset ? t.few_offset->const_data_ptr() : nullptr;
  p.state = t.state.mutable_data_ptr();
  p.b2 = t.b2.mutable_data_ptr();
  p.b2_momentum = t.b2_momentum.mutable_data_ptr();
  p.raw = t.raw.mutable_data_ptr();
  p.alpha = t.alpha.mutable_data_ptr();
  return all;
}

void train_on_cpu(TrainParams p, double* values) {
  const Workspace workspace(train_workspace_bytes(p));
  p.workspace = workspace.memory;
  const TrainResult trained = cpu::kernels().train_epoch(p);
  values[0] = trained.loss;
  values[1] = static_cast<double>(trained.failed_step);
  values[2] = static_cast<double>(trained.failed_class);
}

#if ALPHAEXT_WITH_CUDA
void train_on_gpu(cuda::TrainRunsParams all, const Tensor& state, const Tensor& result) {
  all.results = static_cast<double*>(result.mutable_data_ptr());
  if (all.runs == 0) return;
  // Without a class nothing is trained, and no kernel has anything to do.
  STD_TORCH_CHECK(all.first.num_few > 0, "alphaext: member_columns must have at least one row");
  const int32_t device = state.get_device_index();
  cuda::TrainPlan plan{};
  const char* error = cuda::plan_training(all, &plan, device);
  STD_TORCH_CHECK(error == nullptr, "alphaext: ", error ? error : "");
  // Freed when this returns, but torch's allocator gives it to later work of the same stream only.
  const Tensor workspace = torch::stable::new_empty(state, {plan.workspace_bytes}, TorchType::Byte);
  all.workspace = static_cast<unsigned char*>(workspace.mutable_data_ptr());
  error = cuda::train_epochs(all, plan, device, stream_of(state));
  STD_TORCH_CHECK(error == nullptr, "alphaext: ", error ? error : "");
}
#endif

// Can epochs be trained where a tensor is?
bool trains_on([[maybe_unused]] const Tensor& tensor) {
#if ALPHAEXT_WITH_CUDA
  if (on_gpu(tensor)) return cuda::can_train(tensor.get_device_index());
#endif
  return true;
}

// Trains one epoch in place -> float64 [3]: loss (sum over samples), failed step or -1, failed class or -1.
Tensor train_epoch(
    const Tensor& state, const Tensor& b2, const Tensor& b2_momentum, const Tensor& raw, const Tensor& alpha,
    const Tensor& order, const Tensor& member_logits, const Tensor& base_logsumexp, const Tensor& label_logit,
    const Tensor& few_of_label, const Tensor& member_columns, const Tensor& gradient_scale, int64_t batch, double gamma,
    int64_t rule, bool projected_gradient, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
    bool first_step, const std::optional<Tensor>& penalty, const std::optional<Tensor>& few_offset) {
  STD_TORCH_CHECK(gamma > 0 && gamma <= 1, "alphaext: gamma must be in (0, 1], got ", gamma);
  STD_TORCH_CHECK(rule >= 0 && rule <= 2, "alphaext: rule must be 0 (softmax), 1 (clamp) or 2 (l1), got ", rule);
  cuda::TrainRunsParams all = train_runs({state, b2, b2_momentum, raw, alpha, order, member_logits, base_logsumexp, label_logit,
                                          few_of_label, member_columns, gradient_scale, penalty, few_offset},
                                         batch, false);
  all.first.rule = RuleParams{static_cast<Rule>(rule), gamma, projected_gradient};
  all.first.sgd = SgdParams{lr, momentum, dampening, weight_decay, nesterov, first_step};
  const Tensor result = torch::stable::new_empty(state, {3}, TorchType::Double);
  if (!on_gpu(state)) {
    train_on_cpu(all.first, static_cast<double*>(result.mutable_data_ptr()));
    return result;
  }
#if ALPHAEXT_WITH_CUDA
  train_on_gpu(all, state, result);
#endif
  return result;
}

// The settings of a run, checked; a GPU's are not read (see train_runs).
void read_settings(const double* settings, int64_t run, TrainParams& p) {
  const double gamma = settings[cuda::kGamma], rule = settings[cuda::kRule], samples = settings[cuda::kSamples];
  STD_TORCH_CHECK(gamma > 0 && gamma <= 1, "alphaext: gamma must be in (0, 1], got ", gamma, " for run ", run);
  STD_TORCH_CHECK(rule == 0 || rule == 1 || rule == 2, "alphaext: rule must be 0 (softmax), 1 (clamp) or 2 (l1), got ", rule,
                  " for run ", run);
  STD_TORCH_CHECK(samples >= 0 && samples <= static_cast<double>(p.samples) && samples == std::floor(samples),
                  "alphaext: samples must be a whole number up to ", p.samples, ", got ", samples, " for run ", run);
  p.rule = RuleParams{static_cast<Rule>(static_cast<int32_t>(rule)), gamma, settings[cuda::kProjectedGradient] != 0};
  p.sgd = SgdParams{settings[cuda::kLr],          settings[cuda::kMomentum],      settings[cuda::kDampening],
                    settings[cuda::kWeightDecay], settings[cuda::kNesterov] != 0, settings[cuda::kFirstStep] != 0};
  p.samples = static_cast<int64_t>(samples);
}

// Trains one epoch of several runs of equal sizes, in place -> float64 [R, 3], a row as train_epoch returns it. Tensors have
// a leading run dimension; runs may share member_logits, base_logsumexp, label_logit and few_of_label, which then have none.
// `settings`, float64 [R, 10], holds gamma, rule, projected_gradient, lr, momentum, dampening, weight_decay, nesterov,
// first_step, and how many of its row of `order` a run trains on. Bit for bit what train_epoch does to each run alone.
Tensor train_epoch_many(
    const Tensor& state, const Tensor& b2, const Tensor& b2_momentum, const Tensor& raw, const Tensor& alpha,
    const Tensor& order, const Tensor& member_logits, const Tensor& base_logsumexp, const Tensor& label_logit,
    const Tensor& few_of_label, const Tensor& member_columns, const Tensor& gradient_scale, int64_t batch,
    const Tensor& settings, const std::optional<Tensor>& penalty, const std::optional<Tensor>& few_offset) {
  cuda::TrainRunsParams all = train_runs({state, b2, b2_momentum, raw, alpha, order, member_logits, base_logsumexp, label_logit,
                                          few_of_label, member_columns, gradient_scale, penalty, few_offset},
                                         batch, true);
  check_on(state, settings, "settings", TorchType::Double, {all.runs, cuda::kRunSettings});
  all.settings = data<double>(settings);
  const Tensor result = torch::stable::new_empty(state, {all.runs, 3}, TorchType::Double);
  if (on_gpu(state)) {
#if ALPHAEXT_WITH_CUDA
    train_on_gpu(all, state, result);
#endif
    return result;
  }
  const int64_t item = all.first.dtype == ScalarType::Float64 ? 8 : 4;
  std::vector<TrainParams> runs(static_cast<size_t>(all.runs), all.first);
  const auto at = [&](auto* array, int64_t elements) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(array)>>, const char, char>;
    return static_cast<Byte*>(array) + elements * item;
  };
  const int64_t networks = state.size(1), of_networks = networks * all.first.members;
  const int64_t coefficients = all.first.num_few * all.first.members;
  const int64_t of_state = networks * state.size(2) * state.size(3) * kTileWidth;
  const int64_t of_scale = all.first.num_few * (all.first.shared ? all.first.num_few : 1);
  for (int64_t r = 0; r < all.runs; ++r) {
    TrainParams& p = runs[static_cast<size_t>(r)];
    const int64_t row = all.separate_logits ? r * all.rows : 0;
    p.order += r * p.samples;
    p.member_logits = at(p.member_logits, row * p.columns);
    p.base_logsumexp = at(p.base_logsumexp, row);
    p.label_logit = at(p.label_logit, row);
    p.few_of_label += row;
    p.member_columns += r * coefficients;
    p.gradient_scale = at(p.gradient_scale, r * of_scale);
    if (p.penalty) p.penalty = at(p.penalty, r * 2 * p.members);
    if (p.few_offset) p.few_offset = at(p.few_offset, r * p.num_few);
    p.state = at(p.state, r * of_state);
    p.b2 = at(p.b2, r * of_networks);
    p.b2_momentum = at(p.b2_momentum, r * of_networks);
    p.raw = at(p.raw, r * coefficients);
    p.alpha = at(p.alpha, r * coefficients);
    read_settings(all.settings + r * cuda::kRunSettings, r, p);
    p.batch = std::min(batch, std::max<int64_t>(1, p.samples));
  }
  double* const values = static_cast<double*>(result.mutable_data_ptr());
  // A thread per run: an epoch has no barrier, so none waits for another.
  torch::stable::parallel_for(0, all.runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) train_on_cpu(runs[static_cast<size_t>(r)], values + 3 * r);
  });
  return result;
}

// The parameters of all runs; those of run 0 in `first`. `stacked`: alpha and member_columns have a leading run dimension.
cuda::ValidateRunsParams validate_params(const Tensor& alpha, const Tensor& member_columns, const Tensor& few_classes,
                                         const Tensor& member_logits, const Tensor& label_logit, const Tensor& top_logits,
                                         const Tensor& top_ids, const Tensor& labels, const Tensor& few_of_label,
                                         int64_t num_classes, bool stacked) {
  cuda::ValidateRunsParams all{};
  ValidateParams& p = all.first;
  p.dtype = kernel_type(alpha, "alpha");
  const TorchType type = alpha.scalar_type();
  check_on(alpha, alpha, "alpha", type, stacked ? std::vector<int64_t>{-1, -1, -1} : std::vector<int64_t>{-1, -1});
  all.runs = stacked ? alpha.size(0) : 1;
  p.num_few = alpha.size(stacked ? 1 : 0);
  p.members = alpha.size(stacked ? 2 : 1);
  check_on(alpha, member_columns, "member_columns", TorchType::Int,
           stacked ? std::vector<int64_t>{all.runs, p.num_few, p.members} : std::vector<int64_t>{p.num_few, p.members});
  check_on(alpha, few_classes, "few_classes", TorchType::Int, {p.num_few});
  check_on(alpha, labels, "labels", TorchType::Long, {-1});
  p.samples = labels.numel();
  check_on(alpha, member_logits, "member_logits", type,
           {rounded_up(p.samples, kBlockSamples) / kBlockSamples, -1, kBlockSamples});
  p.columns = member_logits.size(1);
  check_on(alpha, label_logit, "label_logit", type, {p.samples});
  check_on(alpha, top_logits, "top_logits", type, {p.samples, kTopClasses});
  check_on(alpha, top_ids, "top_ids", TorchType::Int, {p.samples, kTopClasses});
  check_on(alpha, few_of_label, "few_of_label", TorchType::Int, {p.samples});
  if (!on_gpu(alpha)) {
    check_range<int32_t>(member_columns, "member_columns", 0, p.columns);
    check_range<int32_t>(few_of_label, "few_of_label", -1, p.num_few);
    check_range<int64_t>(labels, "labels", 0, num_classes);
  }
  p.num_classes = num_classes;
  p.alpha = alpha.const_data_ptr();
  p.member_columns = data<int32_t>(member_columns);
  p.few_classes = data<int32_t>(few_classes);
  p.member_logits = member_logits.const_data_ptr();
  p.label_logit = label_logit.const_data_ptr();
  p.top_logits = top_logits.const_data_ptr();
  p.top_ids = data<int32_t>(top_ids);
  p.labels = data<int64_t>(labels);
  p.few_of_label = data<int32_t>(few_of_label);
  return all;
}

// One thread: runs side by side use the cores better than a barrier an epoch would.
void validate_on_cpu(ValidateParams p) {
  const Workspace workspace(validate_workspace_bytes(p));
  p.workspace = workspace.memory;
  cpu::kernels().validate(p, 0, rounded_up(p.samples, kBlockSamples) / kBlockSamples);
}

#if ALPHAEXT_WITH_CUDA
void validate_on_gpu(const cuda::ValidateRunsParams& all, const Tensor& alpha) {
  const char* const error = cuda::validate_runs(all, alpha.get_device_index(), stream_of(alpha));
  STD_TORCH_CHECK(error == nullptr, "alphaext: ", error ? error : "");
}
#endif

// -> int64 [2, N]: of each class the samples that come first, and that are among the first five.
Tensor validate(const Tensor& alpha, const Tensor& member_columns, const Tensor& few_classes, const Tensor& member_logits,
                const Tensor& label_logit, const Tensor& top_logits, const Tensor& top_ids, const Tensor& labels,
                const Tensor& few_of_label, int64_t num_classes) {
  cuda::ValidateRunsParams all = validate_params(alpha, member_columns, few_classes, member_logits, label_logit, top_logits,
                                                 top_ids, labels, few_of_label, num_classes, false);
  const Tensor hits = torch::stable::new_zeros(labels, {2, num_classes}, TorchType::Long);
  all.first.hits = static_cast<int64_t*>(hits.mutable_data_ptr());
  if (!on_gpu(alpha)) {
    validate_on_cpu(all.first);
    return hits;
  }
#if ALPHAEXT_WITH_CUDA
  validate_on_gpu(all, alpha);
#endif
  return hits;
}

// The same for the coefficients of several runs, alpha and member_columns [R, F, M] -> int64 [R, 2, N].
Tensor validate_many(const Tensor& alpha, const Tensor& member_columns, const Tensor& few_classes, const Tensor& member_logits,
                     const Tensor& label_logit, const Tensor& top_logits, const Tensor& top_ids, const Tensor& labels,
                     const Tensor& few_of_label, int64_t num_classes) {
  cuda::ValidateRunsParams all = validate_params(alpha, member_columns, few_classes, member_logits, label_logit, top_logits,
                                                 top_ids, labels, few_of_label, num_classes, true);
  const Tensor hits = torch::stable::new_zeros(labels, {all.runs, 2, num_classes}, TorchType::Long);
  all.first.hits = static_cast<int64_t*>(hits.mutable_data_ptr());
  if (on_gpu(alpha)) {
#if ALPHAEXT_WITH_CUDA
    validate_on_gpu(all, alpha);
#endif
    return hits;
  }
  const int64_t coefficients = all.first.num_few * all.first.members;
  const int64_t bytes = coefficients * (all.first.dtype == ScalarType::Float64 ? 8 : 4);
  torch::stable::parallel_for(0, all.runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      ValidateParams p = all.first;
      p.alpha = static_cast<const char*>(p.alpha) + r * bytes;
      p.member_columns += r * coefficients;
      p.hits += r * 2 * num_classes;
      validate_on_cpu(p);
    }
  });
  return hits;
}

}  // namespace
}  // namespace alphaext

STABLE_TORCH_LIBRARY_FRAGMENT(alphaext, m) {
  m.def("sample_epoch(int num_few, Tensor group_offsets, int negatives, int seed, int epoch) -> Tensor");
  m.def("advise_huge_pages(Tensor(a!) memory) -> ()");
  m.def("initial_first_layer(Tensor(a!) w1, Tensor(b!) b1, int seed, int first_network) -> ()");
  m.def("initial_preactivation(Tensor z, int hidden, bool shared, int seed) -> Tensor");
  m.def(
      "cache_logits(Tensor logits, Tensor labels, Tensor few_penalty, Tensor column_class, Tensor column_bias, Tensor(a!) "
      "member_logits, Tensor(b!) base_logsumexp, Tensor(c!) label_logit, Tensor(d!)? top_logits, Tensor(e!)? top_ids) -> ()");
  m.def("trains_on(Tensor tensor) -> bool");
  m.def(
      "train_epoch(Tensor(a!) state, Tensor(b!) b2, Tensor(c!) b2_momentum, Tensor(d!) raw, Tensor(e!) alpha, Tensor order, "
      "Tensor member_logits, Tensor base_logsumexp, Tensor label_logit, Tensor few_of_label, Tensor member_columns, Tensor "
      "gradient_scale, int batch, float gamma, int rule, bool projected_gradient, float lr, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool first_step, Tensor? penalty=None, Tensor? few_offset=None) -> Tensor");
  m.def(
      "validate(Tensor alpha, Tensor member_columns, Tensor few_classes, Tensor member_logits, Tensor label_logit, Tensor "
      "top_logits, Tensor top_ids, Tensor labels, Tensor few_of_label, int num_classes) -> Tensor");
  m.def(
      "train_epoch_many(Tensor(a!) state, Tensor(b!) b2, Tensor(c!) b2_momentum, Tensor(d!) raw, Tensor(e!) alpha, Tensor "
      "order, Tensor member_logits, Tensor base_logsumexp, Tensor label_logit, Tensor few_of_label, Tensor member_columns, "
      "Tensor gradient_scale, int batch, Tensor settings, Tensor? penalty=None, Tensor? few_offset=None) -> Tensor");
  m.def(
      "validate_many(Tensor alpha, Tensor member_columns, Tensor few_classes, Tensor member_logits, Tensor label_logit, Tensor "
      "top_logits, Tensor top_ids, Tensor labels, Tensor few_of_label, int num_classes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alphaext, CPU, m) {
  m.impl("sample_epoch", TORCH_BOX(&alphaext::sample_epoch));
  m.impl("advise_huge_pages", TORCH_BOX(&alphaext::advise_huge_pages));
  m.impl("initial_first_layer", TORCH_BOX(&alphaext::initial_first_layer));
  m.impl("initial_preactivation", TORCH_BOX(&alphaext::initial_preactivation));
  m.impl("cache_logits", TORCH_BOX(&alphaext::cache_logits_op));
  m.impl("trains_on", TORCH_BOX(&alphaext::trains_on));
  m.impl("train_epoch", TORCH_BOX(&alphaext::train_epoch));
  m.impl("validate", TORCH_BOX(&alphaext::validate));
  m.impl("train_epoch_many", TORCH_BOX(&alphaext::train_epoch_many));
  m.impl("validate_many", TORCH_BOX(&alphaext::validate_many));
}

#if ALPHAEXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(alphaext, CUDA, m) {
  m.impl("trains_on", TORCH_BOX(&alphaext::trains_on));
  m.impl("train_epoch", TORCH_BOX(&alphaext::train_epoch));
  m.impl("validate", TORCH_BOX(&alphaext::validate));
  m.impl("train_epoch_many", TORCH_BOX(&alphaext::train_epoch_many));
  m.impl("validate_many", TORCH_BOX(&alphaext::validate_many));
}
#endif
