// The CUDA kernels' own text, on CPU threads. Launch shapes come from the same functions that the launchers use, with smaller
// blocks, as every CUDA thread is a std::thread here.
#include <algorithm>
#include <limits>

#include "cuda/coefficients.cuh"
#include "cuda/first_layer.cuh"
#include "cuda/head_backward.cuh"
#include "cuda/head_forward.cuh"
#include "cuda/mix.cuh"

#include "kernel_cases.h"

using namespace alphaext;
using naive::Doubles;
using naive::Ids;

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

// ---- The whole head in one launch --------------------------------------------------------------------------------------

constexpr int kBlockSide = 8;  // blocks of 64 threads, tiles of 32 x 32

enum class First { Separate, Shared, Factored };

struct HeadSizes {
  int64_t batch, num_classes, features;  // no features: the logits are given
  int64_t num_few, hidden, members, inputs;
  First first;
  bool shared_second, with_bias;
  int64_t slices, lead;
  RuleParams rule;
  Ids ids{};  // empty: random ones
};

// Cut 0: several blocks share the work. Cut 1: one does it all.
unsigned blocks_of(int64_t wanted, int cut) { return static_cast<unsigned>(std::min<int64_t>(wanted, cut == 0 ? 3 : 1)); }

double largest(const Doubles& values) {
  double result = 1;
  for (const double value : values) result = std::isnan(value) ? result : std::max(result, std::fabs(value));
  return result;
}

template <typename T>
struct HeadCase {
  using Acc = accumulate_t<T>;
  template <typename Element>
  using Buffer = cases::Buffer<Element>;

  const HeadSizes s;
  const bool from_features, shared_first, factored;
  const int64_t first_weights, second_weights, width;
  cases::Random random{14};
  Buffer<int64_t> ids;
  Buffer<T> input, weight, bias, z, w1, b1, w2, b2;
  Ids id_values;

  explicit HeadCase(const HeadSizes& sizes)
      : s(sizes), from_features(s.features > 0), shared_first(s.first == First::Shared), factored(s.first == First::Factored),
        first_weights(shared_first ? 1 : s.num_few), second_weights(s.shared_second ? 1 : s.num_few),
        width(from_features ? s.features : s.num_classes), ids(s.num_few * s.members),
        input(random.uniform(s.batch * width), s.lead),
        weight(random.uniform(from_features ? s.num_classes * s.features : 0), s.lead),
        bias(random.uniform(s.with_bias ? s.num_classes : 0), s.lead),
        z(random.uniform(factored ? 0 : s.num_few * s.inputs), s.lead),
        w1(random.uniform(factored ? 0 : first_weights * s.hidden * s.inputs), s.lead),
        b1(random.uniform(first_weights * s.hidden), s.lead),
        w2(random.uniform(second_weights * s.members * s.hidden), s.lead),
        b2(random.uniform(second_weights * s.members), s.lead) {
    id_values = s.ids.empty() ? cases::random_members(random, s.num_classes, s.num_few, s.members) : s.ids;
    std::copy(id_values.begin(), id_values.end(), ids.data());
    cases::describe("head", Traits::name,
                    {{"rule", static_cast<int>(s.rule.rule)}, {"batch", s.batch}, {"N", s.num_classes}, {"D", s.features},
                     {"F", s.num_few}, {"H", s.hidden}, {"M", s.members}, {"I", s.inputs},
                     {"first", static_cast<int>(s.first)}, {"slices", s.slices}, {"lead", s.lead}});
  }
  using Traits = cases::Traits<T>;

  Doubles logit_values(const Buffer<Acc>& logits) const { return from_features ? logits.doubles() : input.doubles(); }
  Doubles removed_bias() const { return s.rule.rule == Rule::L1 ? bias.doubles() : Doubles{}; }

  void forward() {
    std::vector<Buffer<Acc>> preactivations, raws, alphas, all_logits;
    std::vector<Buffer<T>> all_scores;
    for (int cut = 0; cut < cases::kCuts; ++cut) {
      preactivations.emplace_back(s.num_few * s.hidden, s.lead);
      raws.emplace_back(s.num_few * s.members, s.lead);
      alphas.emplace_back(s.num_few * s.members, s.lead);
      all_logits.emplace_back(from_features ? s.batch * s.num_classes : 0, s.lead);
      all_scores.emplace_back(s.batch * s.num_classes, s.lead);
      const Buffer<Acc> partial(s.slices > 1 ? s.slices * s.batch * s.num_classes : 0, s.lead);
      const HeadParams p{Traits::dtype, s.rule, s.batch, width, s.num_classes, s.num_few, s.hidden, s.members, s.inputs,
                         shared_first, s.shared_second, input.data(), weight.data(), bias.data(), ids.data(), z.data(),
                         w1.data(), b1.data(), w2.data(), b2.data(), preactivations.back().data(), raws.back().data(),
                         alphas.back().data(), all_logits.back().data(), all_scores.back().data(), s.slices, partial.data()};
      const bool waits = cuda::head_forward_waits(p);
      CHECK(waits == (from_features || !factored));
      shim::launch(cuda::head_forward_kernel<T, kBlockSide>,
                   {.grid = blocks_of(cuda::head_forward_blocks<kBlockSide>(p), cut), .block = kBlockSide * kBlockSide,
                    .shared_bytes = static_cast<std::size_t>(cuda::head_forward_shared_bytes<kBlockSide>(p)),
                    .cooperative = waits},
                   p, waits);
    }
    const Doubles before = shared_first
        ? naive::linear(s.num_few, s.hidden, s.inputs, z.doubles(), w1.doubles(), b1.doubles())
        : factored ? b1.doubles() : naive::first_layer(s.num_few, s.hidden, s.inputs, z.doubles(), w1.doubles(), b1.doubles());
    cases::compare<Acc, Acc>(preactivations[0], before, static_cast<double>(s.inputs), 1, "preactivation");
    // Each step from what the kernel made in the step before, so that the tolerances stay those of one step.
    const naive::Coefficients expected = naive::coefficients(s.rule, s.num_few, s.hidden, s.members, s.shared_second,
                                                             preactivations[0].doubles(), w2.doubles(), b2.doubles());
    const double scale = largest(preactivations[0].doubles());
    cases::compare<Acc, Acc>(raws[0], expected.raw, static_cast<double>(s.hidden), scale, "raw");
    Doubles alpha = raws[0].doubles();
    for (int64_t f = 0; f < s.num_few; ++f) {
      const Doubles raw(alpha.begin() + f * s.members, alpha.begin() + (f + 1) * s.members);
      rule_forward(s.rule, s.members, raw.data(), &alpha[naive::at(f * s.members)]);
    }
    cases::compare<Acc, Acc>(alphas[0], alpha, static_cast<double>(s.members), largest(alpha) * largest(raws[0].doubles()),
                             "alpha");
    if (from_features) {
      const Doubles product =
          naive::linear(s.batch, s.num_classes, s.features, input.doubles(), weight.doubles(), bias.doubles());
      cases::compare<Acc, Acc>(all_logits[0], product, static_cast<double>(s.features), 1, "logits");
    }
    const Doubles logits = logit_values(all_logits[0]);
    cases::compare<T, Acc>(all_scores[0],
                           naive::mix(s.batch, s.num_classes, s.num_few, s.members, id_values, alphas[0].doubles(), logits,
                                      removed_bias()),
                           static_cast<double>(s.members), largest(logits) * largest(alphas[0].doubles()), "scores");
    CHECK(preactivations[0].same_bits(preactivations[1]) && raws[0].same_bits(raws[1]) && alphas[0].same_bits(alphas[1]));
    CHECK(all_logits[0].same_bits(all_logits[1]) && all_scores[0].same_bits(all_scores[1]));
  }

  struct Results {
    Buffer<T> input, weight, bias, z, w1, b1, w2, b2;
  };
  enum Asked { kInput = 1, kWeight = 2, kBias = 4, kZ = 8, kW1 = 16, kB1 = 32, kW2 = 64, kB2 = 128, kAll = 255 };

  Results run_backward(const Buffer<Acc>& before, const Buffer<Acc>& raw, const Buffer<Acc>& alpha, const Buffer<Acc>& logits,
                       const Buffer<T>& grad_scores, int asked, int cut, bool expect_waiting) const {
    const auto room = [&](Asked bit, const Buffer<T>& of) { return Buffer<T>(asked & bit ? of.size() : 0, s.lead); };
    Results out{room(kInput, input), room(kWeight, weight), room(kBias, bias), room(kZ, z),
                room(kW1, w1),       room(kB1, b1),         room(kW2, w2),     room(kB2, b2)};
    const HeadBackwardNeeds needs = head_backward_needs(
        from_features, shared_first, s.shared_second, out.input.data() != nullptr, out.weight.data() != nullptr,
        out.z.data() != nullptr, out.w1.data() != nullptr, out.b1.data() != nullptr, out.w2.data() != nullptr,
        out.b2.data() != nullptr);
    const Buffer<Acc> grad_logits(needs.grad_logits ? s.batch * s.num_classes : 0, s.lead);
    const Buffer<Acc> grad_raw(needs.grad_raw ? s.num_few * s.members : 0, s.lead);
    const Buffer<Acc> grad_before(needs.grad_preactivation ? s.num_few * s.hidden : 0, s.lead);
    const HeadBackwardParams p{Traits::dtype, s.rule, s.batch, width, s.num_classes, s.num_few, s.hidden, s.members, s.inputs,
                               shared_first, s.shared_second, input.data(), weight.data(), bias.data(), ids.data(), z.data(),
                               w1.data(), w2.data(), before.data(), raw.data(), alpha.data(), logits.data(),
                               grad_scores.data(), out.input.data(), out.weight.data(), out.bias.data(), out.z.data(),
                               out.w1.data(), out.b1.data(), out.w2.data(), out.b2.data(), grad_logits.data(),
                               grad_raw.data(), grad_before.data()};
    const bool waits = cuda::head_backward_waits(p);
    CHECK(waits == needs.any() && waits == expect_waiting);
    shim::launch(cuda::head_backward_kernel<T, kBlockSide>,
                 {.grid = blocks_of(cuda::head_backward_blocks<kBlockSide>(p), cut), .block = kBlockSide * kBlockSide,
                  .shared_bytes = static_cast<std::size_t>(cuda::head_backward_shared_bytes<kBlockSide>(p)),
                  .cooperative = waits},
                 p, cuda::asks_for_submodules(p), waits);
    return out;
  }

  void backward() {
    const Buffer<Acc> before(random.uniform(s.num_few * s.hidden), s.lead);
    Doubles outputs = random.uniform(s.num_few * s.members, 0.3, 1.5);
    for (std::size_t i = 0; i < outputs.size(); i += 3) outputs[i] = -outputs[i];
    const Buffer<Acc> raw(outputs, s.lead), alpha(random.uniform(s.num_few * s.members), s.lead);
    const Buffer<Acc> logits(random.uniform(from_features ? s.batch * s.num_classes : 0, -2, 2), s.lead);
    const Buffer<T> grad_scores(random.uniform(s.batch * s.num_classes), s.lead);
    const bool all_wait = from_features || shared_first || s.shared_second || !factored;
    const Results all = run_backward(before, raw, alpha, logits, grad_scores, kAll, 0, all_wait);
    const auto same = [&](const Results& one) {
      const auto equal = [](const Buffer<T>& a, const Buffer<T>& b) { return b.size() == 0 || a.same_bits(b); };
      CHECK(equal(all.input, one.input) && equal(all.weight, one.weight) && equal(all.bias, one.bias));
      CHECK(equal(all.z, one.z) && equal(all.w1, one.w1) && equal(all.b1, one.b1));
      CHECK(equal(all.w2, one.w2) && equal(all.b2, one.b2));
    };
    same(run_backward(before, raw, alpha, logits, grad_scores, kAll, 1, all_wait));
    same(run_backward(before, raw, alpha, logits, grad_scores, kW1 | kB1 | kW2 | kB2, 0, shared_first || s.shared_second));
    same(run_backward(before, raw, alpha, logits, grad_scores, kB1 | kB2, 1, shared_first || s.shared_second));
    same(run_backward(before, raw, alpha, logits, grad_scores, kInput, 1, from_features));

    const naive::MixGradients mix =
        naive::mix_backward(s.batch, s.num_classes, s.num_few, s.members, id_values, alpha.doubles(), logit_values(logits),
                            removed_bias(), grad_scores.doubles());
    const naive::CoefficientGradients second =
        naive::coefficients_backward(s.rule, s.num_few, s.hidden, s.members, s.shared_second, before.doubles(), raw.doubles(),
                                     w2.doubles(), mix.alpha);
    const auto check = [&](const Buffer<T>& actual, const Doubles& expected, int64_t terms, double scale, const char* what) {
      // Divided by the norm of at least 0.3 under l1, and by sums over the batch and over the members before.
      const double chain = largest(mix.alpha) * static_cast<double>(s.members) * 4;
      if (actual.size() == 0) return;
      cases::compare<T, Acc>(actual, expected, static_cast<double>(terms + s.batch), chain * scale, what);
    };
    if (from_features) {
      const naive::LinearGradients product =
          naive::linear_backward(s.batch, s.num_classes, s.features, input.doubles(), weight.doubles(), mix.logits);
      check(all.input, product.left, s.num_classes, 1, "grad_input");
      check(all.weight, product.right, s.batch, 1, "grad_weight");
    } else {
      check(all.input, mix.logits, s.num_few, 1, "grad_input");
    }
    const Doubles of_logits = naive::sum_rows(s.batch, s.num_classes, mix.logits);
    const Doubles of_scores = naive::sum_rows(s.batch, s.num_classes, grad_scores.doubles());
    Doubles of_bias(of_logits.size());
    for (std::size_t c = 0; c < of_bias.size(); ++c) {
      if (s.rule.rule == Rule::L1) of_bias[c] = from_features ? of_scores[c] : of_scores[c] - of_logits[c];
      else of_bias[c] = from_features ? of_logits[c] : 0;
    }
    check(all.bias, of_bias, s.batch, static_cast<double>(s.num_few), "grad_bias");

    check(all.w2, s.shared_second ? naive::sum_rows(s.num_few, s.members * s.hidden, second.w2) : second.w2, s.num_few, 1,
          "grad_w2");
    check(all.b2, s.shared_second ? naive::sum_rows(s.num_few, s.members, second.b2) : second.b2, s.num_few, 1, "grad_b2");
    check(all.b1, shared_first ? naive::sum_rows(s.num_few, s.hidden, second.preactivation) : second.preactivation, s.num_few,
          1, "grad_b1");
    if (shared_first) {
      const naive::LinearGradients first = naive::linear_backward(s.num_few, s.hidden, s.inputs, z.doubles(), w1.doubles(),
                                                                  second.preactivation);
      check(all.w1, first.right, s.num_few, 1, "grad_w1");
      check(all.z, first.left, s.hidden, 1, "grad_z");
    } else if (!factored) {
      const naive::FirstLayerGradients first = naive::first_layer_backward(s.num_few, s.hidden, s.inputs, second.preactivation,
                                                                           z.doubles(), w1.doubles());
      check(all.w1, first.w1, 1, 1, "grad_w1");
      check(all.z, first.z, s.hidden, 1, "grad_z");
    }
  }
};

template <typename T>
void test_head(const HeadSizes& sizes) {
  HeadCase<T> problem(sizes);
  problem.forward();
  problem.backward();
}

// What differs from one dtype to another: conversions, vectors, products.
template <typename T>
void test_heads() {
  const RuleParams softmax{Rule::Softmax, 0.7, false}, clamp{Rule::Clamp, 0.7, false}, l1{Rule::L1, 0.7, false};
  // batch, N, D, F, H, M, I: ragged and unaligned; then aligned, longer than all unrolled steps, several rows a warp, and the
  // product in slices; then one network for all.
  test_head<T>({5, 37, 19, 4, 9, 3, 13, First::Separate, false, true, 1, 1, softmax});
  test_head<T>({34, 33, 40, 2, 11, 6, 1048, First::Separate, false, false, 2, 0, clamp});
  test_head<T>({6, 12, 72, 5, 36, 4, 40, First::Shared, true, true, 1, 0, l1});
}

// What does not.
template <typename T>
void test_more_heads() {
  const RuleParams softmax{Rule::Softmax, 0.7, false}, clamp{Rule::Clamp, 0.7, false}, l1{Rule::L1, 0.7, false};
  test_head<T>({3, 65, 24, 11, 70, 2, 24, First::Separate, true, true, 1, 0, l1});
  test_head<T>({2, 9, 0, 3, 5, 3, 7, First::Shared, false, true, 1, 1, softmax});
  // Four slices of 70: three have something, and the last is empty.
  test_head<T>({37, 10, 70, 3, 5, 4, 0, First::Factored, false, true, 4, 0, clamp});
  test_head<T>({9, 40, 0, 7, 66, 6, 0, First::Factored, false, true, 1, 1, l1});
  test_head<T>({1, 2, 1, 1, 1, 2, 1, First::Separate, false, true, 1, 0, clamp});
  const int64_t low = std::numeric_limits<int64_t>::min(), high = std::numeric_limits<int64_t>::max();
  for (const int64_t features : {0, 5}) {
    test_head<T>(
        {3, 6, features, 4, 3, 3, 4, First::Separate, false, true, 1, 0, clamp, {2, -1, 0, 5, 1, 6, 9, 0, 1, 3, 4, 5}});
  }
  test_head<T>({3, 6, 0, 3, 3, 3, 0, First::Factored, false, true, 1, 0, l1, {low, 0, 1, 4, high, low, high, low, high}});
}

void test_head_shapes() {
  check::context = "head shapes";
  CHECK(head_slices(64, 1000, 2048) == 8 && cuda::slice_depth(2048, 8) == 256);
  CHECK(head_slices(256, 10'000, 2048) == 1 && head_slices(64, 1000, 100) == 1);
  CHECK(head_slices(1, 1, 1 << 20) == 128 && cuda::slice_depth(70, 4) == 32 && cuda::slice_depth(0, 1) == 0);
  CHECK(cuda::column_rows(64, 16) == 4 && cuda::column_rows(256, 1000) == 256 && cuda::column_rows(64, 1) == 4);
  HeadParams p{};
  p.dtype = ScalarType::Float64;
  p.members = 6;
  float any = 0;
  p.weight = &any;
  CHECK(cuda::head_forward_shared_bytes<cuda::kSide>(p) == 2 * 16 * 68 * 8);
  CHECK(cuda::head_forward_shared_bytes<cuda::kSide>(p) <= cuda::kMaxSharedBytes);
  p.dtype = ScalarType::BFloat16;
  CHECK(cuda::head_forward_shared_bytes<cuda::kSide>(p) == (12 + 256) * 4);
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
  test_head_shapes();
  test_all<float>(backend);
  test_all<double>(backend);
  test_all<float16>(backend);
  test_all<bfloat16>(backend);
  for (const RuleParams& rule : cases::all_rules()) {
    cases::coefficients<float>(backend, rule, 2, 35, 6, false, 0);
    cases::coefficients<float>(backend, rule, 3, 3, 2, true, 0);
    test_head<float>({3, 11, 0, 3, 5, 4, 0, First::Factored, false, true, 1, 0, rule});
  }
  test_heads<float>();
  test_heads<double>();
  test_heads<float16>();
  test_heads<bfloat16>();
  test_more_heads<float>();
  test_more_heads<bfloat16>();
  test_head<float>({4, 80, 0, 2, 3, 70, 0, First::Factored, true, false, 1, 0, {Rule::Clamp, 0.7, true}});  // M > threads
  return check::finish("test_cuda_kernels");
}
