// Every table of CPU kernels that this processor can run, with a loop cut among several threads.
#include <thread>

#include "cpu/kernels.h"
#include "kernel_cases.h"

using namespace alphaext;

namespace {

// Cut 0 runs the loop in one call, cut 1 in uneven parts on four threads, one of them with nothing to do.
template <typename Params>
void run(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t items, int cut) {
  if (cut == 0) return kernel(params, 0, items);
  const int64_t bounds[] = {0, items / 5, items / 5, items / 2, items};
  std::vector<std::thread> threads;
  for (int part = 0; part < 4; ++part) threads.emplace_back([=] { kernel(params, bounds[part], bounds[part + 1]); });
  for (std::thread& thread : threads) thread.join();
}

struct CpuBackend : cases::Backend {
  explicit CpuBackend(const cpu::Kernels& table) : kernels(table) {}
  void first_layer_forward(const FirstLayerParams& p, int cut) const override {
    run(kernels.first_layer_forward, p, p.num_few * p.hidden, cut);
  }
  void first_layer_backward(const FirstLayerBackwardParams& p, int cut) const override {
    if (p.grad_w1 != nullptr) run(kernels.first_layer_backward_w1, p, p.num_few * p.hidden, cut);
    if (p.grad_z != nullptr) run(kernels.first_layer_backward_z, p, p.num_few, cut);
  }
  void coefficient_forward(const CoefficientParams& p, int cut) const override {
    run(kernels.coefficient_forward, p, p.num_few, cut);
  }
  void coefficient_backward(const CoefficientBackwardParams& p, int cut) const override {
    run(kernels.coefficient_backward, p, p.num_few, cut);
  }
  void mix_forward(const MixParams& p, int cut) const override { run(kernels.mix_forward, p, p.batch, cut); }
  void mix_backward(const MixBackwardParams& p, int cut) const override {
    run(kernels.mix_backward_alpha, p, p.num_few, cut);
    if (p.grad_logits != nullptr) run(kernels.mix_backward_logits, p, p.batch, cut);
  }
  const cpu::Kernels& kernels;
};

// Around every width at which a vector loop may change its path, at the start of a heap block and one element later.
template <typename T>
void test_all(const CpuBackend& backend) {
  for (const int64_t lead : {0, 1}) {
    for (const int64_t inputs : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257}) {
      cases::first_layer<T>(backend, 2, 5, inputs, lead);
    }
    cases::first_layer<T>(backend, 1, 1, 1, lead);
    cases::first_layer<T>(backend, 5, 33, 100, lead);
    cases::first_layer<T>(backend, 3, 7, 3000, lead);

    for (const RuleParams& rule : cases::all_rules()) {
      for (const bool shared : {false, true}) {
        cases::coefficients<T>(backend, rule, 5, 19, 6, shared, lead);
        cases::coefficients<T>(backend, rule, 3, 1, 2, shared, lead);
      }
    }
    const RuleParams softmax{Rule::Softmax, 0.7, false};
    for (const int64_t hidden : {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 500}) {
      cases::coefficients<T>(backend, softmax, 2, hidden, 6, false, lead);
    }
    for (const int64_t members : {2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 40, 150}) {
      cases::coefficients<T>(backend, softmax, 2, 21, members, false, lead);
      cases::mix<T>(backend, 5, members + 3, 3, members, members % 2 == 0, lead);
    }

    for (const bool with_bias : {false, true}) {
      cases::mix<T>(backend, 1, 2, 1, 2, with_bias, lead);
      cases::mix<T>(backend, 5, 9, 9, 6, with_bias, lead);  // every class is few
      cases::mix<T>(backend, 7, 365, 71, 6, with_bias, lead);
      for (const int64_t classes : {7, 8, 9, 15, 16, 17, 31, 33, 65}) {
        cases::mix<T>(backend, 3, classes, 3, 4, with_bias, lead);
      }
    }
    for (const int64_t batch : {1, 2, 3, 4, 8, 9, 16, 17, 64, 65}) cases::mix<T>(backend, batch, 20, 4, 6, false, lead);
  }
  cases::empty_sizes<T>(backend);
}

}  // namespace

int main() {
  const cpu::Kernels* tables[3];
  const int count = cpu::available_kernels(tables);
  CHECK(count >= 1 && count <= 3);
  bool found = false;
  for (int i = 0; i < count; ++i) {
    const int before = check::failures;
    const CpuBackend backend(*tables[i]);
    test_all<float>(backend);
    test_all<double>(backend);
    test_all<float16>(backend);
    test_all<bfloat16>(backend);
    std::printf("cpu kernels %s: %d failed\n", tables[i]->name, check::failures - before);
    found = found || tables[i] == &cpu::kernels();
  }
  check::context = "";
  CHECK(found);  // the table in use is one of those tested
  return check::finish("test_cpu_kernels");
}
