// The cases that every table of CPU kernels has to pass, each compared with naive.h and run twice with the work cut
// differently: the two results must agree bit by bit. Buffers, random numbers and comparisons serve the tests of the CUDA
// kernels, too.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "naive.h"

namespace cases {

using namespace alphaext;
using naive::at;
using naive::Doubles;
using naive::Ids;

struct Backend {
  virtual ~Backend() = default;
  // `cut` chooses how the work is divided.
  virtual void first_layer_forward(const FirstLayerParams&, int cut) const = 0;
  virtual void first_layer_backward(const FirstLayerBackwardParams&, int cut) const = 0;
  virtual void coefficient_forward(const CoefficientParams&, int cut) const = 0;
  virtual void coefficient_backward(const CoefficientBackwardParams&, int cut) const = 0;
  virtual void mix_forward(const MixParams&, int cut) const = 0;
  virtual void mix_backward(const MixBackwardParams&, int cut) const = 0;
};
constexpr int kCuts = 2;

template <typename T>
struct Traits;
template <>
struct Traits<float> {
  static constexpr ScalarType dtype = ScalarType::Float32;
  static constexpr double roundoff = 0x1p-24, smallest = 0;
  static constexpr const char* name = "float32";
};
template <>
struct Traits<double> {
  static constexpr ScalarType dtype = ScalarType::Float64;
  static constexpr double roundoff = 0x1p-53, smallest = 0;
  static constexpr const char* name = "float64";
};
template <>
struct Traits<float16> {
  static constexpr ScalarType dtype = ScalarType::Float16;
  static constexpr double roundoff = 0x1p-11, smallest = 0x1p-24;
  static constexpr const char* name = "float16";
};
template <>
struct Traits<bfloat16> {
  static constexpr ScalarType dtype = ScalarType::BFloat16;
  static constexpr double roundoff = 0x1p-8, smallest = 0;
  static constexpr const char* name = "bfloat16";
};

// An array that ends exactly where the heap block ends, so that AddressSanitizer sees one element too many. `lead` elements
// before it take away the alignment that the heap gives. An empty one is a null pointer, as an empty tensor's is.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size, int64_t lead = 0) : size_(size) {
    if (size == 0) return;
    memory_.reset(new T[at(size + lead)]);
    data_ = memory_.get() + lead;
    std::memset(static_cast<void*>(data_), 0xff, sizeof(T) * at(size));  // NaN until a kernel writes it
  }
  Buffer(const Doubles& values, int64_t lead) : Buffer(static_cast<int64_t>(values.size()), lead) {
    for (std::size_t i = 0; i < values.size(); ++i) data_[i] = narrow<T>(static_cast<accumulate_t<T>>(values[i]));
  }
  T* data() const { return data_; }
  int64_t size() const { return size_; }
  Doubles doubles() const {
    Doubles values(at(size_));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(widen(data_[i]));
    return values;
  }
  bool same_bits(const Buffer& other) const {
    return size_ == other.size_ && (size_ == 0 || std::memcmp(data_, other.data_, sizeof(T) * at(size_)) == 0);
  }

 private:
  std::unique_ptr<T[]> memory_;
  T* data_ = nullptr;
  int64_t size_ = 0;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  Doubles uniform(int64_t size, double low = -1, double high = 1) {
    std::uniform_real_distribution<double> distribution(low, high);
    Doubles values(at(size));
    for (double& value : values) value = distribution(engine_);
    return values;
  }
  std::mt19937& engine() { return engine_; }

 private:
  std::mt19937 engine_;
};

struct Size {
  const char* name;
  double value;
  template <typename Number>
  Size(const char* name_, Number value_) : name(name_), value(static_cast<double>(value_)) {}
};

inline void describe(const char* kernels, const char* dtype, const std::vector<Size>& sizes) {
  check::context = std::string(kernels) + ", " + dtype;
  char text[64];
  for (const auto& [name, value] : sizes) {
    std::snprintf(text, sizeof(text), ", %s %g", name, value);
    check::context += text;
  }
}

inline void compare_values(const Doubles& actual, const Doubles& expected, double relative, double absolute,
                           const char* what) {
  const std::string before = check::context;
  check::context += std::string(", ") + what;
  CHECK(actual.size() == expected.size());
  for (std::size_t i = 0; i < std::min(actual.size(), expected.size()); ++i) {
    CHECK_CLOSE(actual[i], expected[i], relative * std::fabs(expected[i]) + absolute);
  }
  check::context = before;
}

// One rounding to T, and the accumulation of `terms` numbers of about `scale`, each rounded to Acc. The worst case grows with
// terms * scale; wrong, missing or doubled terms change a result by about `scale`.
template <typename T, typename Acc>
void compare(const Buffer<T>& actual, const Doubles& expected, double terms, double scale, const char* what) {
  const bool rounded = !std::is_same_v<T, Acc>;
  compare_values(actual.doubles(), expected, rounded ? Traits<T>::roundoff * 1.01 : 0,
                 (rounded ? Traits<T>::smallest : 0) + Traits<Acc>::roundoff * 4 * (terms + 16) * scale, what);
}

template <typename T>
void first_layer(const Backend& backend, int64_t F, int64_t H, int64_t I, int64_t lead) {
  using Acc = accumulate_t<T>;
  describe("first layer", Traits<T>::name, {{"F", F}, {"H", H}, {"I", I}, {"lead", lead}});
  Random random(11);
  const Buffer<T> z(random.uniform(F * I), lead), w1(random.uniform(F * H * I), lead), b1(random.uniform(F * H), lead);
  const Doubles expected = naive::first_layer(F, H, I, z.doubles(), w1.doubles(), b1.doubles());
  std::vector<Buffer<Acc>> preactivations;
  for (int cut = 0; cut < kCuts; ++cut) {
    preactivations.emplace_back(F * H, lead);
    backend.first_layer_forward(
        {Traits<T>::dtype, F, H, I, z.data(), w1.data(), b1.data(), preactivations.back().data()}, cut);
  }
  compare<Acc, Acc>(preactivations[0], expected, static_cast<double>(I), 1, "preactivation");
  CHECK(preactivations[0].same_bits(preactivations[1]));

  const Buffer<Acc> gradient(random.uniform(F * H), lead);
  const naive::FirstLayerGradients gradients =
      naive::first_layer_backward(F, H, I, gradient.doubles(), z.doubles(), w1.doubles());
  std::vector<Buffer<T>> grad_w1s, grad_zs;
  for (int cut = 0; cut < kCuts; ++cut) {
    grad_w1s.emplace_back(F * H * I, lead);
    grad_zs.emplace_back(F * I, lead);
    backend.first_layer_backward({Traits<T>::dtype, F, H, I, gradient.data(), z.data(), w1.data(), grad_w1s.back().data(),
                                  grad_zs.back().data()}, cut);
  }
  // One of the two alone gives the same result.
  const Buffer<T> only_w1(F * H * I, lead), only_z(F * I, lead);
  backend.first_layer_backward(
      {Traits<T>::dtype, F, H, I, gradient.data(), z.data(), w1.data(), only_w1.data(), nullptr}, 0);
  backend.first_layer_backward(
      {Traits<T>::dtype, F, H, I, gradient.data(), z.data(), w1.data(), nullptr, only_z.data()}, 0);
  compare<T, Acc>(grad_w1s[0], gradients.w1, 1, 1, "grad_w1");
  compare<T, Acc>(grad_zs[0], gradients.z, static_cast<double>(H), 1, "grad_z");
  CHECK(grad_w1s[0].same_bits(grad_w1s[1]) && grad_w1s[0].same_bits(only_w1));
  CHECK(grad_zs[0].same_bits(grad_zs[1]) && grad_zs[0].same_bits(only_z));
}

template <typename T>
void coefficients(const Backend& backend, const RuleParams& rule, int64_t F, int64_t H, int64_t M, bool shared,
                  int64_t lead) {
  using Acc = accumulate_t<T>;
  describe("coefficients", Traits<T>::name,
           {{"rule", static_cast<int>(rule.rule)}, {"gamma", rule.gamma}, {"projected", rule.projected_gradient},
            {"shared", shared}, {"F", F}, {"H", H}, {"M", M}, {"lead", lead}});
  Random random(12);
  const int64_t weights = shared ? 1 : F;
  const Buffer<Acc> preactivation(random.uniform(F * H), lead);
  const Buffer<T> w2(random.uniform(weights * M * H), lead), b2(random.uniform(weights * M), lead);
  const naive::Coefficients expected =
      naive::coefficients(rule, F, H, M, shared, preactivation.doubles(), w2.doubles(), b2.doubles());
  std::vector<Buffer<Acc>> raws, alphas;
  for (int cut = 0; cut < kCuts; ++cut) {
    raws.emplace_back(F * M, lead);
    alphas.emplace_back(F * M, lead);
    backend.coefficient_forward({Traits<T>::dtype, rule, F, H, M, shared, preactivation.data(), w2.data(), b2.data(),
                                 raws.back().data(), alphas.back().data()}, cut);
  }
  // The l1 rule divides by the norm of the neighbours' outputs, and their errors with them.
  double smallest_norm = 1;
  for (int64_t f = 0; f < F && rule.rule == Rule::L1; ++f) {
    double norm = 0;
    for (int64_t k = 1; k < M; ++k) norm += std::fabs(expected.raw[at(f * M + k)]);
    smallest_norm = std::min(smallest_norm, norm);
  }
  compare<Acc, Acc>(raws[0], expected.raw, static_cast<double>(H), 1, "raw");
  compare<Acc, Acc>(alphas[0], expected.alpha, static_cast<double>(H), 1 / smallest_norm, "alpha");
  CHECK(raws[0].same_bits(raws[1]) && alphas[0].same_bits(alphas[1]));

  // Outputs of both signs, some of them beyond each clamp, none near 0.
  Doubles outputs = random.uniform(F * M, 0.3, 1.5);
  for (std::size_t i = 0; i < outputs.size(); i += 3) outputs[i] = -outputs[i];
  const Buffer<Acc> raw(outputs, lead), grad_alpha(random.uniform(F * M), lead);
  const naive::CoefficientGradients gradients = naive::coefficients_backward(
      rule, F, H, M, shared, preactivation.doubles(), raw.doubles(), w2.doubles(), grad_alpha.doubles());
  std::vector<Buffer<Acc>> grad_raws, grad_preactivations;
  std::vector<Buffer<T>> grad_w2s, grad_b2s;
  for (int cut = 0; cut < kCuts; ++cut) {
    grad_raws.emplace_back(F * M, lead);
    grad_w2s.emplace_back(F * M * H, lead);
    grad_b2s.emplace_back(F * M, lead);
    grad_preactivations.emplace_back(F * H, lead);
    // With shared weights the caller wants neither grad_w2 nor grad_b2.
    backend.coefficient_backward({Traits<T>::dtype, rule, F, H, M, shared, preactivation.data(), raw.data(), w2.data(),
                                  grad_alpha.data(), grad_raws.back().data(), shared ? nullptr : grad_w2s.back().data(),
                                  shared ? nullptr : grad_b2s.back().data(), grad_preactivations.back().data()}, cut);
  }
  const double terms = static_cast<double>(M);
  compare<Acc, Acc>(grad_raws[0], gradients.raw, terms, 4, "grad_raw");
  compare<Acc, Acc>(grad_preactivations[0], gradients.preactivation, terms, 4 * terms, "grad_preactivation");
  CHECK(grad_raws[0].same_bits(grad_raws[1]) && grad_preactivations[0].same_bits(grad_preactivations[1]));
  if (!shared) {
    compare<T, Acc>(grad_w2s[0], gradients.w2, terms, 4, "grad_w2");
    compare<T, Acc>(grad_b2s[0], gradients.b2, terms, 4, "grad_b2");
    CHECK(grad_w2s[0].same_bits(grad_w2s[1]) && grad_b2s[0].same_bits(grad_b2s[1]));
  }
}

// F distinct classes of N, each with M - 1 neighbours other than itself; few classes are among the neighbours too.
inline Ids random_members(Random& random, int64_t N, int64_t F, int64_t M) {
  Ids classes(at(N)), ids;
  std::iota(classes.begin(), classes.end(), int64_t{0});
  std::shuffle(classes.begin(), classes.end(), random.engine());
  const Ids few(classes.begin(), classes.begin() + F);
  for (const int64_t own : few) {
    std::shuffle(classes.begin(), classes.end(), random.engine());
    ids.push_back(own);
    for (const int64_t other : classes) {
      if (static_cast<int64_t>(ids.size()) % M == 0) break;
      if (other != own) ids.push_back(other);
    }
  }
  return ids;
}

// `ids` empty: random ones.
template <typename T>
void mix(const Backend& backend, int64_t batch, int64_t N, int64_t F, int64_t M, bool with_bias, int64_t lead,
         Ids ids = {}) {
  using Acc = accumulate_t<T>;
  describe("mix", Traits<T>::name, {{"batch", batch}, {"N", N}, {"F", F}, {"M", M}, {"bias", with_bias}, {"lead", lead}});
  Random random(13);
  if (ids.empty()) ids = random_members(random, N, F, M);
  CHECK(ids.size() == at(F * M));
  Buffer<int64_t> member_ids(F * M);
  std::copy(ids.begin(), ids.end(), member_ids.data());
  const Buffer<Acc> alpha(random.uniform(F * M), lead), logits(random.uniform(batch * N, -4, 4), lead);
  const Buffer<Acc> bias(with_bias ? random.uniform(N) : Doubles{}, lead);
  const Doubles expected = naive::mix(batch, N, F, M, ids, alpha.doubles(), logits.doubles(), bias.doubles());
  std::vector<Buffer<T>> scores;
  for (int cut = 0; cut < kCuts; ++cut) {
    scores.emplace_back(batch * N, lead);
    backend.mix_forward({Traits<T>::dtype, batch, N, F, M, member_ids.data(), alpha.data(), logits.data(), bias.data(),
                         scores.back().data()}, cut);
  }
  compare<T, Acc>(scores[0], expected, static_cast<double>(M), 8, "scores");
  CHECK(scores[0].same_bits(scores[1]));

  const Buffer<T> grad_scores(random.uniform(batch * N), lead);
  const naive::MixGradients gradients =
      naive::mix_backward(batch, N, F, M, ids, alpha.doubles(), logits.doubles(), bias.doubles(), grad_scores.doubles());
  MixBackwardParams params{Traits<T>::dtype, batch, N, F, M, member_ids.data(), alpha.data(), logits.data(), bias.data(),
                           grad_scores.data(), nullptr, nullptr};
  std::vector<Buffer<Acc>> grad_alphas, grad_logits;
  for (int cut = 0; cut < kCuts; ++cut) {
    grad_alphas.emplace_back(F * M, lead);
    grad_logits.emplace_back(batch * N, lead);
    params.grad_alpha = grad_alphas.back().data();
    params.grad_logits = grad_logits.back().data();
    backend.mix_backward(params, cut);
  }
  const Buffer<Acc> alone(F * M, lead);
  params.grad_alpha = alone.data();
  params.grad_logits = nullptr;
  backend.mix_backward(params, 0);
  compare<Acc, Acc>(grad_alphas[0], gradients.alpha, static_cast<double>(batch), 8, "grad_alpha");
  compare<Acc, Acc>(grad_logits[0], gradients.logits, static_cast<double>(F), 1, "grad_logits");
  CHECK(grad_alphas[0].same_bits(grad_alphas[1]) && grad_alphas[0].same_bits(alone));
  CHECK(grad_logits[0].same_bits(grad_logits[1]));
}

// Sizes that are 0 leave nothing unwritten that exists: an empty sum is 0.
template <typename T>
void empty_sizes(const Backend& backend) {
  first_layer<T>(backend, 0, 3, 5, 0);
  first_layer<T>(backend, 2, 0, 5, 0);
  first_layer<T>(backend, 2, 3, 0, 0);
  const RuleParams rule{Rule::Clamp, 0.7, false};
  coefficients<T>(backend, rule, 0, 4, 3, false, 0);
  coefficients<T>(backend, rule, 0, 4, 3, true, 0);
  coefficients<T>(backend, rule, 2, 0, 3, false, 0);
  mix<T>(backend, 0, 7, 2, 3, true, 0);
  mix<T>(backend, 3, 7, 0, 3, true, 0);
  mix<T>(backend, 0, 0, 0, 3, false, 0);
  mix<T>(backend, 3, 0, 0, 3, false, 0);
}

// Every rule, gradient kind and gamma on either side of 1 / (K+1).
inline std::vector<RuleParams> all_rules() {
  std::vector<RuleParams> rules;
  for (const Rule rule : {Rule::Softmax, Rule::Clamp, Rule::L1}) {
    for (const double gamma : {0.1, 0.7, 1.0}) {
      rules.push_back({rule, gamma, false});
      if (rule != Rule::L1) rules.push_back({rule, gamma, true});
    }
  }
  return rules;
}

}  // namespace cases
