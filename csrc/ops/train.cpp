// The operators train_epoch, train_epoch_many and trains_on: whole epochs in compiled code. alphaext/training/native_engine.py prepares the
// tensors; users have no business with them.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "checks.h"
#include "cpu/kernels.h"

#if ALPHAEXT_WITH_CUDA
#include "cuda/train.h"
#include "gpu_stream.h"
#endif

namespace alphaext {
namespace {

// The arrays of one or of several runs, whose leading dimension only stacked tensors have.
struct TrainTensors {
  const Tensor &state, &b2, &b2_momentum, &raw, &alpha, &order, &member_logits, &base_logsumexp, &label_logit, &few_of_label,
      &member_columns, &gradient_scale;
  const std::optional<Tensor>&penalty, &few_offset;
};

// The parameters of all runs, but for rules and SGD. `stacked`: tensors have a leading run dimension, logits may have it.
TrainRunsParams train_runs(const TrainTensors& t, int64_t batch, bool stacked) {
  TrainRunsParams all{};
  TrainParams& p = all.first;
  p.dtype = training_type(t.state, "state");
  Arguments given(t.state, "state", Arguments::Layout::Dense);
  const TorchType type = given.type;
  const int64_t lead = stacked ? 1 : 0;
  if (stacked) given.stack('R');
  given.check("member_columns", t.member_columns, TorchType::Int, {'F', 'M'});
  given.at_least("member_columns", "[num_few, top_k + 1]", 'F', 1);
  given.at_least("member_columns", "[num_few, top_k + 1]", 'M', 2);
  STD_TORCH_CHECK(batch >= 1, "alphaext: batch must be at least 1, got ", batch);
  p.num_few = given['F'];
  p.members = given['M'];
  p.shared = t.gradient_scale.dim() == lead + 2;  // one network for all classes
  given.set('S', p.shared ? 1 : p.num_few);
  p.state = given.write("state", t.state, type, {'S', 'T', 2 * (p.shared ? p.num_few : 1) + 2 * p.members, kTileWidth});
  p.tiles = given['T'];
  p.gradient_scale = p.shared ? given.read("gradient_scale", t.gradient_scale, type, {'F', 'F'})
                              : given.read("gradient_scale", t.gradient_scale, type, {'F'});
  p.penalty = given.read("penalty", t.penalty, type, {2, 'M'});
  p.few_offset = given.read("few_offset", t.few_offset, type, {'F'});
  p.b2 = given.write("b2", t.b2, type, {'S', 'M'});
  p.b2_momentum = given.write("b2_momentum", t.b2_momentum, type, {'S', 'M'});
  p.raw = given.write("raw", t.raw, type, {'F', 'M'});
  p.alpha = given.write("alpha", t.alpha, type, {'F', 'M'});
  given.check("order", t.order, TorchType::Long, {'L'});
  all.runs = stacked ? given['R'] : 1;
  all.separate_logits = stacked && t.member_logits.dim() == 3;
  if (!all.separate_logits) given.unstack();
  p.member_logits = given.read("member_logits", t.member_logits, type, {'X', 'U'});
  all.rows = given['X'];
  p.columns = given['U'];
  p.base_logsumexp = given.read("base_logsumexp", t.base_logsumexp, type, {'X'});
  p.label_logit = given.read("label_logit", t.label_logit, type, {'X'});
  p.few_of_label = given.read_ids<int32_t>("few_of_label", t.few_of_label, {'X'}, -1, p.num_few);
  if (stacked) given.stack('R');
  p.order = given.read_ids<int64_t>("order", t.order, {'L'}, 0, all.rows);
  p.member_columns = given.read_ids<int32_t>("member_columns", t.member_columns, {'F', 'M'}, 0, p.columns);
  p.samples = given['L'];
  p.batch = std::min(batch, std::max<int64_t>(1, p.samples));
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
void train_on_gpu(TrainRunsParams all, const Tensor& state, const Tensor& result) {
  all.results = static_cast<double*>(result.mutable_data_ptr());
  if (all.runs == 0) return;
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
  return tensor.is_cpu();
}

// Trains one epoch in place -> float64 [3]: loss (sum over samples), failed step or -1, failed class or -1.
Tensor train_epoch(
    const Tensor& state, const Tensor& b2, const Tensor& b2_momentum, const Tensor& raw, const Tensor& alpha,
    const Tensor& order, const Tensor& member_logits, const Tensor& base_logsumexp, const Tensor& label_logit,
    const Tensor& few_of_label, const Tensor& member_columns, const Tensor& gradient_scale, int64_t batch, double gamma,
    int64_t rule, bool projected_gradient, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
    bool first_step, const std::optional<Tensor>& penalty, const std::optional<Tensor>& few_offset) {
  check_rule(gamma, rule);
  TrainRunsParams all = train_runs({state, b2, b2_momentum, raw, alpha, order, member_logits, base_logsumexp, label_logit,
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
  const double gamma = settings[kGamma], rule = settings[kRule], samples = settings[kSamples];
  STD_TORCH_CHECK(gamma > 0 && gamma <= 1, "alphaext: gamma must be in (0, 1], got ", gamma, " for run ", run);
  STD_TORCH_CHECK(rule == 0 || rule == 1 || rule == 2, "alphaext: rule must be 0 (softmax), 1 (clamp) or 2 (l1), got ", rule,
                  " for run ", run);
  STD_TORCH_CHECK(samples >= 0 && samples <= static_cast<double>(p.samples) && samples == std::floor(samples),
                  "alphaext: samples must be a whole number up to ", p.samples, ", got ", samples, " for run ", run);
  p.rule = RuleParams{static_cast<Rule>(static_cast<int32_t>(rule)), gamma, settings[kProjectedGradient] != 0};
  p.sgd = SgdParams{settings[kLr],          settings[kMomentum],      settings[kDampening],
                    settings[kWeightDecay], settings[kNesterov] != 0, settings[kFirstStep] != 0};
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
  TrainRunsParams all = train_runs({state, b2, b2_momentum, raw, alpha, order, member_logits, base_logsumexp, label_logit,
                                          few_of_label, member_columns, gradient_scale, penalty, few_offset},
                                         batch, true);
  Arguments given(state, "state", Arguments::Layout::Dense);
  all.settings = given.read<double>("settings", settings, TorchType::Double, {all.runs, static_cast<int64_t>(kRunSettings)});
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
    read_settings(all.settings + r * kRunSettings, r, p);
    p.batch = std::min(batch, std::max<int64_t>(1, p.samples));
  }
  double* const values = static_cast<double*>(result.mutable_data_ptr());
  // A thread per run: an epoch has no barrier, so none waits for another.
  torch::stable::parallel_for(0, all.runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) train_on_cpu(runs[static_cast<size_t>(r)], values + 3 * r);
  });
  return result;
}

}  // namespace
}  // namespace alphaext

STABLE_TORCH_LIBRARY_FRAGMENT(alphaext, m) {
  m.def("trains_on(Tensor tensor) -> bool");
  m.def(
      "train_epoch(Tensor(a!) state, Tensor(b!) b2, Tensor(c!) b2_momentum, Tensor(d!) raw, Tensor(e!) alpha, Tensor order, "
      "Tensor member_logits, Tensor base_logsumexp, Tensor label_logit, Tensor few_of_label, Tensor member_columns, Tensor "
      "gradient_scale, int batch, float gamma, int rule, bool projected_gradient, float lr, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool first_step, Tensor? penalty=None, Tensor? few_offset=None) -> Tensor");
  m.def(
      "train_epoch_many(Tensor(a!) state, Tensor(b!) b2, Tensor(c!) b2_momentum, Tensor(d!) raw, Tensor(e!) alpha, Tensor "
      "order, Tensor member_logits, Tensor base_logsumexp, Tensor label_logit, Tensor few_of_label, Tensor member_columns, "
      "Tensor gradient_scale, int batch, Tensor settings, Tensor? penalty=None, Tensor? few_offset=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alphaext, CPU, m) {
  m.impl("trains_on", TORCH_BOX(&alphaext::trains_on));
  m.impl("train_epoch", TORCH_BOX(&alphaext::train_epoch));
  m.impl("train_epoch_many", TORCH_BOX(&alphaext::train_epoch_many));
}

STABLE_TORCH_LIBRARY_IMPL(alphaext, CUDA, m) {
  m.impl("trains_on", TORCH_BOX(&alphaext::trains_on));
  m.impl("train_epoch", TORCH_BOX(&alphaext::train_epoch));
  m.impl("train_epoch_many", TORCH_BOX(&alphaext::train_epoch_many));
}
