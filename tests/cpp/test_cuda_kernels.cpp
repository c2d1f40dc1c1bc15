// The CUDA kernels' own text, on CPU threads. Launch shapes come from the same functions that the launchers use, with smaller
// blocks, as every CUDA thread is a std::thread here.
#include <algorithm>
#include <limits>

#include "cuda/coefficients.cuh"
#include "cuda/first_layer.cuh"
#include "cuda/mix.cuh"

#include "kernel_cases.h"

using namespace alphaext;

namespace {

struct ShimBackend : cases::Backend {
  ShimBackend() { gathers = true; }

  // Cut 0: blocks of two warps, as many as the shape asks for. Cut 1: blocks of one warp, and so few of them that each has to
  // stride over several items.
  static int threads(int cut) { return cut == 0 ? 64 : 32; }
  template <typename... Parameters, typename... Arguments>
  static void launch(void (*kernel)(Parameters...), const cuda::LaunchShape& shape, int cut, const Arguments&... arguments) {
    if (shape.blocks == 0) return;
    const unsigned blocks = static_cast<unsigned>(cut == 0 ? shape.blocks : std::min<int64_t>(shape.blocks, 3));
    shim::launch(kernel,
                 {.grid = blocks, .block = static_cast<unsigned>(shape.threads),
                  .shared_bytes = static_cast<std::size_t>(shape.shared_bytes)},
                 arguments...);
  }
  template <typename Function>
  static void dispatch(ScalarType dtype, const Function& function) {
    if (dtype == ScalarType::Float32) function(float{});
    if (dtype == ScalarType::Float64) function(double{});
    if (dtype == ScalarType::Float16) function(float16{});
    if (dtype == ScalarType::BFloat16) function(bfloat16{});
  }

  void first_layer_forward(const FirstLayerParams& p, int cut) const override {
    dispatch(p.dtype, [&](auto t) {
      launch(cuda::first_layer_forward_kernel<decltype(t)>, cuda::first_layer_forward_shape(p, threads(cut)), cut, p);
    });
  }
  void first_layer_backward(const FirstLayerBackwardParams& p, int cut) const override {
    dispatch(p.dtype, [&](auto t) {
      launch(cuda::first_layer_backward_kernel<decltype(t)>, cuda::first_layer_backward_shape(p, threads(cut)), cut, p);
    });
  }
  // Cut 0 with at most two blocks, so that a block uses its stage in shared memory for several classes; cut 1 without the
  // stage, as classes with very many members do.
  void coefficient_forward(const CoefficientParams& p, int cut) const override {
    cuda::LaunchShape shape = cuda::coefficient_forward_shape(p, threads(cut));
    shape.blocks = std::min<int64_t>(shape.blocks, 2);
    if (cut == 1) shape.shared_bytes = 0;
    dispatch(p.dtype, [&](auto t) { launch(cuda::coefficient_forward_kernel<decltype(t)>, shape, cut, p, cut == 0); });
  }
  void coefficient_backward(const CoefficientBackwardParams& p, int cut) const override {
    cuda::LaunchShape shape = cuda::coefficient_backward_shape(p, threads(cut));
    shape.blocks = std::min<int64_t>(shape.blocks, 2);
    if (cut == 1) shape.shared_bytes = 0;
    dispatch(p.dtype, [&](auto t) { launch(cuda::coefficient_backward_kernel<decltype(t)>, shape, cut, p, cut == 0); });
  }
  void mix_forward(const MixParams& p, int cut) const override {
    dispatch(p.dtype,
             [&](auto t) { launch(cuda::mix_forward_kernel<decltype(t)>, cuda::mix_forward_shape(p, threads(cut)), cut, p); });
  }
  void mix_backward(const MixBackwardParams& p, int cut) const override {
    dispatch(p.dtype, [&](auto t) {
      using T = decltype(t);
      launch(cuda::mix_backward_alpha_kernel<T>, cuda::mix_backward_alpha_shape(p, threads(cut)), cut, p);
      if (p.grad_logits == nullptr) return;
      launch(cuda::mix_backward_logits_kernel<T>, cuda::mix_backward_logits_shape(p, threads(cut)), cut, p);
    });
  }
};

// A GPU kernel meets ids that nobody has checked.
template <typename T>
void test_ids_out_of_range(const ShimBackend& backend) {
  const int64_t low = std::numeric_limits<int64_t>::min(), high = std::numeric_limits<int64_t>::max();
  for (const bool with_bias : {false, true}) {
    // N = 6: a neighbour below, a neighbour above, an own id above with good neighbours, and a class that is in order.
    cases::mix<T>(backend, 3, 6, 4, 3, with_bias, 0, {2, -1, 0, 5, 1, 6, 9, 0, 1, 3, 4, 5});
    cases::mix<T>(backend, 3, 6, 3, 3, with_bias, 1, {low, 0, 1, 4, high, low, high, low, high});
  }
}

template <typename T>
void test_all(const ShimBackend& backend) {
  cases::first_layer<T>(backend, 1, 1, 1, 0);
  cases::first_layer<T>(backend, 2, 3, 33, 1);
  cases::first_layer<T>(backend, 3, 5, 131, 0);
  cases::coefficients<T>(backend, {Rule::Softmax, 0.7, false}, 5, 37, 6, false, 1);
  cases::coefficients<T>(backend, {Rule::Clamp, 0.7, false}, 5, 70, 3, true, 0);
  cases::mix<T>(backend, 2, 67, 9, 6, false, 1);
  cases::mix<T>(backend, 37, 10, 3, 4, true, 0);
  test_ids_out_of_range<T>(backend);
  cases::empty_sizes<T>(backend);
}

void test_shapes() {
  check::context = "shapes";
  const cuda::LaunchShape none = cuda::shape_for(0, 8, 256), one = cuda::shape_for(8, 8, 256), two = cuda::shape_for(9, 8, 256);
  CHECK(none.blocks == 0 && one.blocks == 1 && two.blocks == 2);
  CHECK(cuda::shape_for(int64_t{1} << 40, 1, 256).blocks == cuda::kMaxBlocks);
  CHECK(cuda::staging_bytes(6, ScalarType::Float32) == 48 && cuda::staging_bytes(6, ScalarType::Float64) == 96);
  CHECK(cuda::staging_bytes(6144, ScalarType::BFloat16) == 48 * 1024);
  CHECK(cuda::staging_bytes(6145, ScalarType::Float32) == 0 && cuda::staging_bytes(3073, ScalarType::Float64) == 0);
}

}  // namespace

int main() {
  const ShimBackend backend;
  test_shapes();
  test_all<float>(backend);
  test_all<double>(backend);
  test_all<float16>(backend);
  test_all<bfloat16>(backend);
  for (const RuleParams& rule : cases::all_rules()) {
    cases::coefficients<float>(backend, rule, 2, 35, 6, false, 0);
    cases::coefficients<float>(backend, rule, 3, 3, 2, true, 0);
  }
  return check::finish("test_cuda_kernels");
}
