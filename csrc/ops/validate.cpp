// The operators validate and validate_many: hits of composed classifiers on cached logits.
#include "checks.h"
#include "cpu/kernels.h"

#if ALPHAEXT_WITH_CUDA
#include "cuda/validate.h"
#include "gpu_stream.h"
#endif

namespace alphaext {
namespace {

// The parameters of all runs; those of run 0 in `first`. `stacked`: alpha and member_columns have a leading run dimension.
ValidateRunsParams validate_params(const Tensor& alpha, const Tensor& member_columns, const Tensor& few_classes,
                                   const Tensor& member_logits, const Tensor& label_logit, const Tensor& top_logits,
                                   const Tensor& top_ids, const Tensor& labels, const Tensor& few_of_label,
                                   int64_t num_classes, bool stacked) {
  ValidateRunsParams all{};
  ValidateParams& p = all.first;
  p.dtype = training_type(alpha, "alpha");
  Arguments given(alpha, "alpha", Arguments::Layout::Dense);
  if (stacked) given.stack('R');
  p.alpha = given.read("alpha", alpha, given.type, {'F', 'M'});
  given.at_least("alpha", "[num_few, top_k + 1]", 'F', 1);
  given.check("member_columns", member_columns, TorchType::Int, {'F', 'M'});
  given.unstack();
  p.labels = given.read_ids<int64_t>("labels", labels, {'L'}, 0, num_classes);
  p.samples = given['L'];
  p.member_logits = given.read("member_logits", member_logits, given.type, {blocks_of(p.samples), 'U', kBlockSamples});
  if (stacked) given.stack('R');
  p.member_columns = given.read_ids<int32_t>("member_columns", member_columns, {'F', 'M'}, 0, given['U']);
  given.unstack();
  p.few_classes = given.read<int32_t>("few_classes", few_classes, TorchType::Int, {'F'});
  p.label_logit = given.read("label_logit", label_logit, given.type, {'L'});
  p.top_logits = given.read("top_logits", top_logits, given.type, {'L', kTopClasses});
  p.top_ids = given.read<int32_t>("top_ids", top_ids, TorchType::Int, {'L', kTopClasses});
  p.few_of_label = given.read_ids<int32_t>("few_of_label", few_of_label, {'L'}, -1, given['F']);
  p.num_few = given['F'];
  p.members = given['M'];
  p.columns = given['U'];
  p.num_classes = num_classes;
  all.runs = stacked ? given['R'] : 1;
  return all;
}

// One thread: runs side by side use the cores better than a barrier an epoch would.
void validate_on_cpu(ValidateParams p) {
  const Workspace workspace(validate_workspace_bytes(p));
  p.workspace = workspace.memory;
  cpu::kernels().validate(p, 0, blocks_of(p.samples));
}

#if ALPHAEXT_WITH_CUDA
void validate_on_gpu(const ValidateRunsParams& all, const Tensor& alpha) {
  const char* const error = cuda::validate_runs(all, alpha.get_device_index(), stream_of(alpha));
  STD_TORCH_CHECK(error == nullptr, "alphaext: ", error ? error : "");
}
#endif

// -> int64 [2, N]: of each class the samples that come first, and that are among the first five.
Tensor validate(const Tensor& alpha, const Tensor& member_columns, const Tensor& few_classes, const Tensor& member_logits,
                const Tensor& label_logit, const Tensor& top_logits, const Tensor& top_ids, const Tensor& labels,
                const Tensor& few_of_label, int64_t num_classes) {
  ValidateRunsParams all = validate_params(alpha, member_columns, few_classes, member_logits, label_logit, top_logits,
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
  ValidateRunsParams all = validate_params(alpha, member_columns, few_classes, member_logits, label_logit, top_logits,
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
  m.def(
      "validate(Tensor alpha, Tensor member_columns, Tensor few_classes, Tensor member_logits, Tensor label_logit, Tensor "
      "top_logits, Tensor top_ids, Tensor labels, Tensor few_of_label, int num_classes) -> Tensor");
  m.def(
      "validate_many(Tensor alpha, Tensor member_columns, Tensor few_classes, Tensor member_logits, Tensor label_logit, Tensor "
      "top_logits, Tensor top_ids, Tensor labels, Tensor few_of_label, int num_classes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alphaext, CPU, m) {
  m.impl("validate", TORCH_BOX(&alphaext::validate));
  m.impl("validate_many", TORCH_BOX(&alphaext::validate_many));
}

STABLE_TORCH_LIBRARY_IMPL(alphaext, CUDA, m) {
  m.impl("validate", TORCH_BOX(&alphaext::validate));
  m.impl("validate_many", TORCH_BOX(&alphaext::validate_many));
}
