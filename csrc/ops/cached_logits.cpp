// The operators cache_logits, what is kept of logits for training and validation, and advise_huge_pages, for the memory they
// fill.
#include <algorithm>

#include "checks.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"

namespace alphaext {
namespace {

// Cached logits are read in no order that the processor could foresee: with pages of 4 KiB most of it is looking up pages.
void advise_huge_pages(const Tensor& memory) {
  STD_TORCH_CHECK(memory.is_contiguous(), "alphaext: memory must be contiguous");
  cpu::advise_huge_pages(memory.mutable_data_ptr(), static_cast<size_t>(memory.numel()) * memory.element_size());
}

// Keeps of a block of logits what training (top_logits None, member_logits [rows, U]) or validation needs.
void cache_logits(const Tensor& logits, const Tensor& labels, const Tensor& few_penalty, const Tensor& column_class,
                  const Tensor& column_bias, const Tensor& member_logits, const Tensor& base_logsumexp,
                  const Tensor& label_logit, const std::optional<Tensor>& top_logits, const std::optional<Tensor>& top_ids) {
  CacheParams p{};
  p.dtype = training_type(logits, "logits");
  Arguments given(logits, "logits", Arguments::Layout::Dense);
  p.logits = given.read("logits", logits, given.type, {'R', 'N'});
  p.rows = given['R'];
  p.num_classes = given['N'];
  p.labels = given.read_ids<int64_t>("labels", labels, {'R'}, 0, p.num_classes);
  p.few_penalty = given.read("few_penalty", few_penalty, given.type, {'N'});
  p.column_class = given.read_ids<int64_t>("column_class", column_class, {'U'}, 0, p.num_classes);
  p.columns = given['U'];
  p.column_bias = given.read("column_bias", column_bias, given.type, {'U'});
  p.base_logsumexp = given.write("base_logsumexp", base_logsumexp, given.type, {'R'});
  p.label_logit = given.write("label_logit", label_logit, given.type, {'R'});
  p.in_blocks = top_logits.has_value();
  if (p.in_blocks) {
    STD_TORCH_CHECK(top_ids.has_value(), "alphaext: top_ids must be given with top_logits");
    p.top_logits = given.write("top_logits", *top_logits, given.type, {'R', kTopClasses});
    p.top_ids = given.write<int32_t>("top_ids", *top_ids, TorchType::Int, {'R', kTopClasses});
    p.member_logits = given.write("member_logits", member_logits, given.type, {blocks_of(p.rows), 'U', kBlockSamples});
  } else {
    p.member_logits = given.write("member_logits", member_logits, given.type, {'R', 'U'});
  }
  // As in head_on_cpu.cpp: a barrier is worth it for some 100 microseconds of work.
  const int64_t grain = std::max<int64_t>(kBlockSamples, (1 << 19) / std::max<int64_t>(1, p.num_classes));
  torch::stable::parallel_for(0, p.rows, grain,
                              [&](int64_t begin, int64_t end) { cpu::kernels().cache_logits(p, begin, end); });
}

}  // namespace
}  // namespace alphaext

STABLE_TORCH_LIBRARY_FRAGMENT(alphaext, m) {
  m.def("advise_huge_pages(Tensor(a!) memory) -> ()");
  m.def(
      "cache_logits(Tensor logits, Tensor labels, Tensor few_penalty, Tensor column_class, Tensor column_bias, Tensor(a!) "
      "member_logits, Tensor(b!) base_logsumexp, Tensor(c!) label_logit, Tensor(d!)? top_logits, Tensor(e!)? top_ids) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(alphaext, CPU, m) {
  m.impl("advise_huge_pages", TORCH_BOX(&alphaext::advise_huge_pages));
  m.impl("cache_logits", TORCH_BOX(&alphaext::cache_logits));
}
