// The operator sample_epoch: which samples an epoch trains on, and in what order.
#include "kernels/sampling.h"

#include "checks.h"

namespace alphaext {
namespace {

// The samples of one epoch; see kernels/sampling.h. -> int64 [num_few + negatives]
Tensor sample_epoch(int64_t num_few, const Tensor& group_offsets, int64_t negatives, int64_t seed, int64_t epoch) {
  Arguments given(group_offsets, "group_offsets", Arguments::Layout::Dense);
  const int64_t* const offsets = given.read<int64_t>("group_offsets", group_offsets, TorchType::Long, {'n'});
  const int64_t groups = group_offsets.numel() - 1;
  STD_TORCH_CHECK(num_few >= 0 && negatives >= 0 && (negatives == 0 || groups > 0),
                  "alphaext: num_few and negatives must not be below 0, nor negatives be drawn from no group; got ", num_few, ", ",
                  negatives, ", ", groups);
  for (int64_t g = 0; negatives > 0 && g < groups; ++g) {
    STD_TORCH_CHECK(offsets[0] == 0 && offsets[g + 1] > offsets[g], "alphaext: group_offsets must start at 0 and increase");
  }
  const Tensor order = torch::stable::new_empty(group_offsets, {num_few + negatives}, TorchType::Long);
  // 0, 1, 2, ... of the draw before, which it left as it was: an epoch costs what it draws and not all there is.
  static thread_local std::vector<int64_t> kept;
  std::vector<int64_t> permutation = std::move(kept);  // a draw that fails does not leave it half shuffled
  const auto size = static_cast<size_t>(negatives > 0 ? offsets[groups] : 0);
  for (size_t i = permutation.size(); i < size; ++i) permutation.push_back(static_cast<int64_t>(i));
  draw_epoch(num_few, offsets, groups, negatives, static_cast<uint64_t>(seed), static_cast<uint64_t>(epoch), permutation.data(),
             static_cast<int64_t*>(order.mutable_data_ptr()));
  kept = std::move(permutation);
  return order;
}

}  // namespace
}  // namespace alphaext

STABLE_TORCH_LIBRARY_FRAGMENT(alphaext, m) {
  m.def("sample_epoch(int num_few, Tensor group_offsets, int negatives, int seed, int epoch) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alphaext, CPU, m) { m.impl("sample_epoch", TORCH_BOX(&alphaext::sample_epoch)); }
