// The operators initial_first_layer and initial_preactivation: the random start of the sub-modules' first layers.
#include <algorithm>
#include <cmath>

#include "checks.h"
#include "cpu/kernels.h"

namespace alphaext {
namespace {

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
  p.dtype = training_type(w1, "w1");
  Arguments given(w1, "w1", Arguments::Layout::Dense);
  p.w1 = given.write("w1", w1, given.type, {'S', 'H', 'I'});
  p.b1 = given.write("b1", b1, given.type, {'S', 'H'});
  p.hidden = given['H'];
  p.inputs = given['I'];
  STD_TORCH_CHECK(p.inputs > 0 && first_network >= 0, "alphaext: w1 must have inputs, and first_network not be below 0");
  p.first_network = first_network;
  p.seed = static_cast<uint64_t>(seed);
  p.bound = 1 / std::sqrt(static_cast<double>(p.inputs));
  run_initial_weights(p, w1.size(0));
}

// w1 z + b1 of the same start, without writing the weights down. -> [F, hidden]
Tensor initial_preactivation(const Tensor& z, int64_t hidden, bool shared, int64_t seed) {
  InitialWeightsParams p{};
  p.dtype = training_type(z, "z");
  Arguments given(z, "z", Arguments::Layout::Dense);
  p.z = given.read("z", z, given.type, {'F', 'I'});
  p.num_few = given['F'];
  p.inputs = given['I'];
  STD_TORCH_CHECK(p.inputs > 0 && hidden > 0, "alphaext: z must have columns, and hidden be above 0; got ", p.inputs, ", ", hidden);
  p.hidden = hidden;
  p.shared = shared;
  p.seed = static_cast<uint64_t>(seed);
  p.bound = 1 / std::sqrt(static_cast<double>(p.inputs));
  const Tensor preactivation = torch::stable::new_empty(z, {p.num_few, hidden}, z.scalar_type());
  p.preactivation = preactivation.mutable_data_ptr();
  run_initial_weights(p, shared ? 1 : p.num_few);
  return preactivation;
}

}  // namespace
}  // namespace alphaext

STABLE_TORCH_LIBRARY_FRAGMENT(alphaext, m) {
  m.def("initial_first_layer(Tensor(a!) w1, Tensor(b!) b1, int seed, int first_network) -> ()");
  m.def("initial_preactivation(Tensor z, int hidden, bool shared, int seed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alphaext, CPU, m) {
  m.impl("initial_first_layer", TORCH_BOX(&alphaext::initial_first_layer));
  m.impl("initial_preactivation", TORCH_BOX(&alphaext::initial_preactivation));
}
