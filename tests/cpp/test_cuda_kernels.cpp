// The CUDA kernels' own text, on CPU threads. Launch shapes come from the same functions that the launchers use, with smaller
// blocks, as every CUDA thread is a std::thread here.
#include <algorithm>
#include <limits>
#include <numeric>

#include "cuda/head_backward.cuh"
#include "cuda/head_forward.cuh"
#include "cuda/large_head_backward.cuh"

#include "kernel_cases.h"

using namespace alphaext;
using naive::Doubles;
using naive::Ids;

namespace {

constexpr int kBlockSide = 8;  // blocks of 64 threads, tiles of 32 x 32
constexpr int kBlock = kBlockSide * kBlockSide;

enum class First { Separate, Shared, Factored };

struct HeadSizes {
  int64_t batch, num_classes, features;  // no features: the logits are given
  int64_t num_few, hidden, members, inputs;
  First first;
  bool shared_second, with_bias;
  int64_t slices, lead;
  RuleParams rule;
  Ids ids{};  // empty: random ones

  bool is_empty() const {
    return batch == 0 || num_classes == 0 || num_few == 0 || hidden == 0 || (first != First::Factored && inputs == 0);
  }
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

  struct Forward {
    Buffer<Acc> preactivation, raw, alpha, logits;
    Buffer<T> scores;
    bool same_bits(const Forward& other) const {
      return preactivation.same_bits(other.preactivation) && raw.same_bits(other.raw) && alpha.same_bits(other.alpha) &&
             logits.same_bits(other.logits) && scores.same_bits(other.scores);
    }
  };

  Forward new_forward() const {
    return {Buffer<Acc>(s.num_few * s.hidden, s.lead), Buffer<Acc>(s.num_few * s.members, s.lead),
            Buffer<Acc>(s.num_few * s.members, s.lead), Buffer<Acc>(from_features ? s.batch * s.num_classes : 0, s.lead),
            Buffer<T>(s.batch * s.num_classes, s.lead)};
  }

  HeadParams forward_params(const Forward& out, int64_t slices, void* partial) const {
    return {Traits::dtype, s.rule, s.batch, width, s.num_classes, s.num_few, s.hidden, s.members, s.inputs, shared_first,
            s.shared_second, input.data(), weight.data(), bias.data(), ids.data(), z.data(), w1.data(), b1.data(), w2.data(),
            b2.data(), out.preactivation.data(), out.raw.data(), out.alpha.data(), out.logits.data(), out.scores.data(), slices,
            partial};
  }

  Forward run_forward(int cut) const {
    Forward out = new_forward();
    const Buffer<Acc> partial(s.slices > 1 ? s.slices * s.batch * s.num_classes : 0, s.lead);
    const HeadParams p = forward_params(out, s.slices, partial.data());
    const bool waits = cuda::head_forward_waits(p);
    CHECK(waits == (from_features || !factored));
    shim::launch(cuda::head_forward_kernel<T, kBlockSide>,
                 {.grid = blocks_of(cuda::head_forward_blocks<kBlockSide>(p), cut), .block = kBlockSide * kBlockSide,
                  .shared_bytes = static_cast<std::size_t>(cuda::head_forward_shared_bytes<kBlockSide>(p)),
                  .cooperative = waits},
                 p, waits);
    return out;
  }

  Doubles expected_preactivation() const {
    if (factored) return b1.doubles();
    return shared_first ? naive::linear(s.num_few, s.hidden, s.inputs, z.doubles(), w1.doubles(), b1.doubles())
                        : naive::first_layer(s.num_few, s.hidden, s.inputs, z.doubles(), w1.doubles(), b1.doubles());
  }

  // Stages in one launch of several blocks, or in a launch each of one block; a class in shared memory or in the results.
  template <typename Params>
  static void launch_stages(void (*kernel)(const Params, const int, const bool), const Params& params, int stages, int64_t blocks,
                            int64_t shared_bytes, bool staged, int cut) {
    shim::LaunchConfig config{.grid = blocks_of(blocks, cut), .block = kBlock, .shared_bytes = static_cast<std::size_t>(shared_bytes)};
    if (cut == 0) {
      config.cooperative = (stages & (stages - 1)) != 0;
      if (stages != 0) shim::launch(kernel, config, params, stages, staged);
      return;
    }
    for (int stage = 1; stage <= stages; stage *= 2) {
      if (stages & stage) shim::launch(kernel, config, params, stage, staged);
    }
  }

  Forward run_large_forward(int cut, bool staged) const {
    Forward out = new_forward();
    // What cuBLAS makes: the product, of 16-bit numbers without the bias; and one first layer for all classes.
    const bool adds_bias = from_features && s.with_bias && sizeof(T) == 2;
    if (from_features) {
      const Buffer<Acc> product(naive::linear(s.batch, s.num_classes, s.features, input.doubles(), weight.doubles(),
                                              adds_bias ? Doubles{} : bias.doubles()),
                                s.lead);
      std::copy(product.data(), product.data() + product.size(), out.logits.data());
    }
    if (shared_first) {
      const Buffer<Acc> product(expected_preactivation(), s.lead);
      std::copy(product.data(), product.data() + product.size(), out.preactivation.data());
    }
    const LargeHeadParams p{forward_params(out, 1, nullptr), adds_bias};
    const int64_t bytes = staged ? 2 * s.members * static_cast<int64_t>(sizeof(Acc)) : 0;
    launch_stages(cuda::large_head_forward_kernel<T>, p, cuda::large_head_forward_stages(p),
                  cuda::large_head_forward_blocks(p, kBlock), bytes, staged, cut);
    return out;
  }

  void forward() const {
    const Forward first = run_forward(0);
    check_forward(first);
    CHECK(first.same_bits(run_forward(1)));
  }

  void large_forward() const {
    const Forward first = run_large_forward(0, true);
    check_forward(first);
    CHECK(first.same_bits(run_large_forward(1, true)) && first.same_bits(run_large_forward(0, false)));
  }

  void check_forward(const Forward& out) const {
    const auto& [preactivation, raw_out, alpha_out, logits_out, scores] = out;
    cases::compare<Acc, Acc>(preactivation, expected_preactivation(), static_cast<double>(s.inputs), 1, "preactivation");
    // Each step from what the kernel made in the step before, so that the tolerances stay those of one step.
    const naive::Coefficients expected = naive::coefficients(s.rule, s.num_few, s.hidden, s.members, s.shared_second,
                                                             preactivation.doubles(), w2.doubles(), b2.doubles());
    const double scale = largest(preactivation.doubles());
    cases::compare<Acc, Acc>(raw_out, expected.raw, static_cast<double>(s.hidden), scale, "raw");
    Doubles alpha = raw_out.doubles();
    for (int64_t f = 0; f < s.num_few; ++f) {
      const Doubles raw(alpha.begin() + f * s.members, alpha.begin() + (f + 1) * s.members);
      rule_forward(s.rule, s.members, raw.data(), &alpha[naive::at(f * s.members)]);
    }
    cases::compare<Acc, Acc>(alpha_out, alpha, static_cast<double>(s.members), largest(alpha) * largest(raw_out.doubles()),
                             "alpha");
    if (from_features) {
      const Doubles product =
          naive::linear(s.batch, s.num_classes, s.features, input.doubles(), weight.doubles(), bias.doubles());
      cases::compare<Acc, Acc>(logits_out, product, static_cast<double>(s.features), 1, "logits");
    }
    const Doubles logits = logit_values(logits_out);
    cases::compare<T, Acc>(scores,
                           naive::mix(s.batch, s.num_classes, s.num_few, s.members, id_values, alpha_out.doubles(), logits,
                                      removed_bias()),
                           static_cast<double>(s.members), largest(logits) * largest(alpha_out.doubles()), "scores");
  }

  struct Results {
    Buffer<T> input, weight, bias, z, w1, b1, w2, b2;
    Buffer<T> kept_logits;    // large heads: the logits' gradient, for cuBLAS
    Buffer<Acc> wide_logits;  // or so, for float16
    Buffer<Acc> kept_before;  // and the pre-activation's
  };
  enum Asked { kInput = 1, kWeight = 2, kBias = 4, kZ = 8, kW1 = 16, kB1 = 32, kW2 = 64, kB2 = 128, kAll = 255 };

  // What a backward goes on from: not a forward's results, so that its errors stay its own.
  struct Start {
    Buffer<Acc> before, raw, alpha, logits;
    Buffer<T> grad_scores;
  };

  Start make_start() {
    Doubles outputs = random.uniform(s.num_few * s.members, 0.3, 1.5);
    for (std::size_t i = 0; i < outputs.size(); i += 3) outputs[i] = -outputs[i];
    return {Buffer<Acc>(random.uniform(s.num_few * s.hidden), s.lead), Buffer<Acc>(outputs, s.lead),
            Buffer<Acc>(random.uniform(s.num_few * s.members), s.lead),
            Buffer<Acc>(random.uniform(from_features ? s.batch * s.num_classes : 0, -2, 2), s.lead),
            Buffer<T>(random.uniform(s.batch * s.num_classes), s.lead)};
  }

  Results room_for(int asked) const {
    const auto room = [&](Asked bit, const Buffer<T>& of) { return Buffer<T>(asked & bit ? of.size() : 0, s.lead); };
    return {room(kInput, input), room(kWeight, weight), room(kBias, bias), room(kZ, z),     room(kW1, w1),
            room(kB1, b1),       room(kW2, w2),         room(kB2, b2),     Buffer<T>(0), Buffer<Acc>(0), Buffer<Acc>(0)};
  }

  HeadBackwardParams backward_params(const Start& start, const Results& out, void* grad_logits, void* grad_raw,
                                     void* grad_before) const {
    return {Traits::dtype, s.rule, s.batch, width, s.num_classes, s.num_few, s.hidden, s.members, s.inputs, shared_first,
            s.shared_second, input.data(), weight.data(), bias.data(), ids.data(), z.data(), w1.data(), w2.data(),
            start.before.data(), start.raw.data(), start.alpha.data(), start.logits.data(), start.grad_scores.data(),
            out.input.data(), out.weight.data(), out.bias.data(), out.z.data(), out.w1.data(), out.b1.data(), out.w2.data(),
            out.b2.data(), grad_logits, grad_raw, grad_before, 1, nullptr};
  }

  Results run_backward(const Start& start, int asked, int cut, bool expect_waiting) const {
    Results out = room_for(asked);
    const HeadBackwardNeeds needs = head_backward_needs(
        from_features, shared_first, s.shared_second, out.input.data() != nullptr, out.weight.data() != nullptr,
        out.z.data() != nullptr, out.w1.data() != nullptr, out.b1.data() != nullptr, out.w2.data() != nullptr,
        out.b2.data() != nullptr);
    const Buffer<Acc> grad_logits(needs.grad_logits ? s.batch * s.num_classes : 0, s.lead);
    const Buffer<Acc> grad_raw(needs.grad_raw ? s.num_few * s.members : 0, s.lead);
    const Buffer<Acc> grad_before(needs.grad_preactivation ? s.num_few * s.hidden : 0, s.lead);
    HeadBackwardParams p = backward_params(start, out, grad_logits.data(), grad_raw.data(), grad_before.data());
    const bool in_slices = from_features && out.input.data() != nullptr && s.slices > 1;
    const Buffer<Acc> partial(in_slices ? s.slices * s.batch * s.features : 0, s.lead);
    p.input_slices = s.slices;
    p.input_partial = partial.data();
    const bool waits = cuda::head_backward_waits(p);
    CHECK(waits == needs.any() && waits == expect_waiting);
    shim::launch(cuda::head_backward_kernel<T, kBlockSide>,
                 {.grid = blocks_of(cuda::head_backward_blocks<kBlockSide>(p), cut), .block = kBlock,
                  .shared_bytes = static_cast<std::size_t>(cuda::head_backward_shared_bytes<kBlockSide>(p)),
                  .cooperative = waits},
                 p, cuda::asks_for_submodules(p), waits);
    return out;
  }

  // As ops/head_on_gpu.cpp calls it: the gradients that are matrix products are left out.
  Results run_large_backward(const Start& start, int asked, int cut, bool staged) const {
    Results out = room_for(asked & ~(kInput | kWeight | (shared_first ? kW1 | kZ : 0)));
    const bool bias_through_logits = (asked & kBias) && (s.rule.rule == Rule::L1) != from_features;
    const bool keeps_wide = from_features && std::is_same_v<T, float16>;
    if ((asked & (kInput | kWeight)) || bias_through_logits) {
      if (keeps_wide) out.wide_logits = Buffer<Acc>(s.batch * s.num_classes, s.lead);
      else out.kept_logits = Buffer<T>(s.batch * s.num_classes, s.lead);
    }
    if ((asked & kZ) || (shared_first && (asked & (kW1 | kB1)))) out.kept_before = Buffer<Acc>(s.num_few * s.hidden, s.lead);
    const bool of_shared_second = s.shared_second && (asked & (kW2 | kB2));
    const Buffer<Acc> grad_raw(of_shared_second || !staged ? s.num_few * s.members : 0, s.lead);

    Buffer<int64_t> entries(s.num_few * s.members), offsets(s.num_classes + 1);
    std::iota(entries.data(), entries.data() + entries.size(), int64_t{0});
    std::stable_sort(entries.data(), entries.data() + entries.size(),
                     [&](int64_t a, int64_t b) { return id_values[naive::at(a)] < id_values[naive::at(b)]; });
    for (int64_t c = 0; c <= s.num_classes; ++c) {
      offsets.data()[c] = std::count_if(id_values.begin(), id_values.end(), [&](int64_t id) { return id < c; });
    }
    const LargeHeadBackwardParams p{
        backward_params(start, out, keeps_wide ? static_cast<void*>(out.wide_logits.data()) : out.kept_logits.data(),
                        grad_raw.data(), out.kept_before.data()),
        entries.data(), offsets.data(), keeps_wide};
    int64_t bytes = staged ? (2 * s.members + kBlock) * static_cast<int64_t>(sizeof(Acc)) : kBlock * static_cast<int64_t>(sizeof(Acc));
    if (out.z.data() != nullptr) bytes = std::max<int64_t>(bytes, kBlock * (16 / static_cast<int64_t>(sizeof(T))) * static_cast<int64_t>(sizeof(Acc)));
    launch_stages(cuda::large_head_backward_kernel<T>, p, cuda::large_head_backward_stages(p),
                  cuda::large_head_backward_blocks(p, kBlock), bytes, staged, cut);
    return out;
  }

  // Whatever both were asked for.
  static void check_same(const Results& one, const Results& two) {
    const auto equal = [](const auto& a, const auto& b) { return a.size() == 0 || b.size() == 0 || a.same_bits(b); };
    CHECK(equal(one.input, two.input) && equal(one.weight, two.weight) && equal(one.bias, two.bias));
    CHECK(equal(one.z, two.z) && equal(one.w1, two.w1) && equal(one.b1, two.b1));
    CHECK(equal(one.w2, two.w2) && equal(one.b2, two.b2));
    CHECK(equal(one.kept_logits, two.kept_logits) && equal(one.wide_logits, two.wide_logits));
    CHECK(equal(one.kept_before, two.kept_before));
  }

  void backward() {
    const Start start = make_start();
    const bool all_wait = from_features || shared_first || s.shared_second || !factored;
    const bool shared = shared_first || s.shared_second;
    const Results all = run_backward(start, kAll, 0, all_wait);
    check_same(all, run_backward(start, kAll, 1, all_wait));
    check_same(all, run_backward(start, kW1 | kB1 | kW2 | kB2, 0, shared));
    check_same(all, run_backward(start, kB1 | kB2, 1, shared));
    check_same(all, run_backward(start, kInput, 1, from_features));
    check_backward(start, all);
  }

  void large_backward() {
    const Start start = make_start();
    const Results all = run_large_backward(start, kAll, 0, true);
    check_same(all, run_large_backward(start, kAll, 1, true));
    check_same(all, run_large_backward(start, kAll, 0, false));
    check_same(all, run_large_backward(start, kW1 | kB1 | kW2 | kB2, 0, true));
    check_same(all, run_large_backward(start, kB1 | kB2, 1, false));
    check_same(all, run_large_backward(start, kBias, 0, true));
    check_same(all, run_large_backward(start, kInput, 1, true));
    check_backward(start, all);
  }

  void check_backward(const Start& start, const Results& all) const {
    const auto& [before, raw, alpha, logits, grad_scores] = start;
    const naive::MixGradients mix =
        naive::mix_backward(s.batch, s.num_classes, s.num_few, s.members, id_values, alpha.doubles(), logit_values(logits),
                            removed_bias(), grad_scores.doubles());
    const naive::CoefficientGradients second =
        naive::coefficients_backward(s.rule, s.num_few, s.hidden, s.members, s.shared_second, before.doubles(), raw.doubles(),
                                     w2.doubles(), mix.alpha);
    const auto check = [&](const auto& actual, const Doubles& expected, int64_t terms, double scale, const char* what) {
      // Divided by the norm of at least 0.3 under l1, and by sums over the batch and over the members before.
      const double chain = largest(mix.alpha) * static_cast<double>(s.members) * 4;
      if (actual.size() == 0) return;
      cases::compare<std::remove_pointer_t<decltype(actual.data())>, Acc>(actual, expected, static_cast<double>(terms + s.batch),
                                                                        chain * scale, what);
    };
    if (from_features) {
      const naive::LinearGradients product =
          naive::linear_backward(s.batch, s.num_classes, s.features, input.doubles(), weight.doubles(), mix.logits);
      check(all.input, product.left, s.num_classes, 1, "grad_input");
      check(all.weight, product.right, s.batch, 1, "grad_weight");
    } else {
      check(all.input, mix.logits, s.num_few, 1, "grad_input");
    }
    check(all.kept_logits, mix.logits, s.num_few, 1, "grad_logits");
    check(all.wide_logits, mix.logits, s.num_few, 1, "grad_logits, wide");
    // A large head's sums over the batch are of what was kept, rounded to T.
    const Doubles of_logits =
        naive::sum_rows(s.batch, s.num_classes, all.kept_logits.size() > 0 ? all.kept_logits.doubles() : mix.logits);
    const Doubles of_scores = naive::sum_rows(s.batch, s.num_classes, grad_scores.doubles());
    Doubles of_bias(of_logits.size());
    for (std::size_t c = 0; c < of_bias.size(); ++c) {
      if (s.rule.rule == Rule::L1) of_bias[c] = from_features ? of_scores[c] : of_scores[c] - of_logits[c];
      else of_bias[c] = from_features ? of_logits[c] : 0;
    }
    check(all.bias, of_bias, s.batch, static_cast<double>(s.num_few + 1), "grad_bias");

    check(all.w2, s.shared_second ? naive::sum_rows(s.num_few, s.members * s.hidden, second.w2) : second.w2, s.num_few, 1,
          "grad_w2");
    check(all.b2, s.shared_second ? naive::sum_rows(s.num_few, s.members, second.b2) : second.b2, s.num_few, 1, "grad_b2");
    check(all.b1, shared_first ? naive::sum_rows(s.num_few, s.hidden, second.preactivation) : second.preactivation, s.num_few,
          1, "grad_b1");
    check(all.kept_before, second.preactivation, s.num_few, 1, "grad_preactivation");
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
  if (!sizes.is_empty()) {  // else the kernel of a whole head is not used
    problem.forward();
    problem.backward();
  }
  problem.large_forward();
  problem.large_backward();
}

// What differs from one dtype to another: conversions, vectors, products.
template <typename T>
void test_heads() {
  const RuleParams softmax{Rule::Softmax, 0.7, false}, clamp{Rule::Clamp, 0.7, false}, l1{Rule::L1, 0.7, false};
  // batch, N, D, F, H, M, I: ragged and unaligned; then aligned, longer than all unrolled steps and than what is on its way of
  // a product, several rows a warp, and the product in slices; then one network for all.
  test_head<T>({5, 37, 19, 4, 9, 3, 13, First::Separate, false, true, 1, 1, softmax});
  test_head<T>({34, 33, 328, 2, 11, 6, 1048, First::Separate, false, false, 2, 0, clamp});
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
  // 64, 65, 127 and 128 tiles: half of a card is never idle.
  CHECK(head_slices(64, 64 * 64, 2048) == 2 && head_slices(64, 65 * 64, 2048) == 2);
  CHECK(head_slices(64, 127 * 64, 2048) == 2 && head_slices(64, 128 * 64, 2048) == 1);
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
  CHECK(cuda::head_forward_shared_bytes<cuda::kSide>(p) == 32 * 1024);
  p.weight = nullptr;
  CHECK(cuda::head_forward_shared_bytes<cuda::kSide>(p) == (12 + 256) * 4);

  check::context = "what precedes the barrier";
  p.batch = 64;
  p.features = 2048;
  p.num_classes = 1000;
  p.inputs = 3000;
  p.slices = 8;
  CHECK(cuda::product_jobs(p, 64) == 0);
  p.weight = &any;
  CHECK(cuda::product_jobs(p, 64) == 128 && cuda::tile_in_rows(p, 64) == 16);
  p.inputs = 4;
  CHECK(cuda::tile_in_rows(p, 64) == 192);

  check::context = "shapes";
  const cuda::LaunchShape none = cuda::shape_for(0, 8, 256), one = cuda::shape_for(8, 8, 256), two = cuda::shape_for(9, 8, 256);
  CHECK(none.blocks == 0 && one.blocks == 1 && two.blocks == 2);
  CHECK(cuda::shape_for(int64_t{1} << 40, 1, 256).blocks == cuda::kMaxBlocks);
  CHECK(large_head_stage_bytes(6, ScalarType::Float32) == 1072);
  CHECK(large_head_stage_bytes(6016, ScalarType::BFloat16) == 48 * 1024);
  CHECK(large_head_stage_bytes(6017, ScalarType::Float32) == 0 && large_head_stage_bytes(2945, ScalarType::Float64) == 0);
}

// Shares follow each other from the first item to the last, and nobody does more than one item more than another one could take.
void test_shares() {
  for (const int64_t blocks : {1, 2, 7, 264}) {
    for (const int64_t loaded : {int64_t{0}, int64_t{1}, blocks / 2, blocks - 1}) {
      for (const int64_t cost : {0, 1, 3, 16}) {
        for (const int64_t items : {0, 1, 5, 256, 68'000}) {
          if (loaded >= blocks) continue;
          cases::describe("shares", "", {{"items", items}, {"blocks", blocks}, {"loaded", loaded}, {"cost", cost}});
          int64_t next = 0, most = 0, least = std::numeric_limits<int64_t>::max();
          for (int64_t block = 0; block < blocks; ++block) {
            const cuda::Share share = cuda::fair_share(items, block, blocks, loaded, cost);
            CHECK(share.begin <= share.end && (share.begin == share.end || share.begin == next));
            next += share.end - share.begin;
            const int64_t work = share.end - share.begin + (block < loaded ? cost : 0);
            least = std::min(least, work);
            if (share.begin < share.end) most = std::max(most, work);
          }
          CHECK(next == items && most <= least + 1);
        }
      }
    }
  }
  check::context = "shares at ImageNet-LT size";
  // 136 classes, 256 jobs of columns: two for each block without a class. 250 classes: those without have no more than three.
  const auto jobs = [](int64_t block, int64_t classes) {
    const cuda::Share share = cuda::fair_share(256, block, 264, classes, cuda::kClassInJobs);
    return share.end - share.begin;
  };
  CHECK(jobs(0, 136) == 0 && jobs(135, 136) == 0 && jobs(136, 136) == 2 && jobs(263, 136) == 2);
  CHECK(jobs(0, 250) <= 1 && jobs(249, 250) <= 1 && jobs(250, 250) >= 3 && jobs(263, 250) <= 4);
}

// Sizes that are 0 leave nothing unwritten that exists: an empty sum is 0.
template <typename T>
void test_empty_heads() {
  const RuleParams softmax{Rule::Softmax, 0.7, false}, clamp{Rule::Clamp, 0.7, false}, l1{Rule::L1, 0.7, false};
  test_head<T>({0, 7, 5, 2, 3, 3, 4, First::Separate, false, true, 1, 0, clamp});
  test_head<T>({0, 7, 0, 2, 3, 3, 4, First::Shared, true, true, 1, 0, l1});
  test_head<T>({3, 7, 5, 0, 3, 3, 4, First::Separate, false, true, 1, 0, softmax});
  test_head<T>({3, 7, 0, 0, 3, 3, 0, First::Factored, true, true, 1, 0, l1});
  test_head<T>({3, 7, 5, 2, 0, 3, 4, First::Separate, false, true, 1, 0, clamp});
  test_head<T>({3, 7, 5, 2, 3, 3, 0, First::Separate, false, true, 1, 0, clamp});
  test_head<T>({3, 7, 0, 2, 3, 3, 0, First::Shared, false, false, 1, 0, clamp});
  test_head<T>({3, 0, 0, 0, 3, 3, 4, First::Factored, false, false, 1, 0, clamp});
}

}  // namespace

// ThreadSanitizer watches which threads meet. That depends on sizes and on an element's width, not on a rule's arithmetic, and
// it is many times slower than all other tests: under it a rule and a type of each width will do.
#ifdef __SANITIZE_THREAD__
constexpr bool kEveryRuleAndType = false;
#else
constexpr bool kEveryRuleAndType = true;
#endif

int main() {
  test_head_shapes();
  test_shares();
  std::vector<RuleParams> rules = cases::all_rules();
  if (!kEveryRuleAndType) rules.resize(1);
  for (const RuleParams& rule : rules) {
    test_head<float>({3, 11, 0, 3, 5, 4, 0, First::Factored, false, true, 1, 0, rule});
    test_head<double>({2, 9, 6, 2, 35, 6, 5, First::Separate, true, true, 1, 0, rule});
  }
  test_heads<float>();
  test_heads<double>();
  test_heads<bfloat16>();
  test_more_heads<float>();
  if (kEveryRuleAndType) {
    test_heads<float16>();
    test_more_heads<bfloat16>();
  }
  test_empty_heads<float>();
  test_empty_heads<bfloat16>();
  test_head<float>({4, 80, 0, 2, 3, 70, 0, First::Factored, true, false, 1, 0, {Rule::Clamp, 0.7, true}});  // M > threads
  // More few classes than threads, and more rows than a thread takes at once.
  test_head<float>({23, 190, 0, 150, 2, 3, 0, First::Factored, false, true, 1, 0, {Rule::L1, 0.7, false}});
  return check::finish("test_cuda_kernels");
}
