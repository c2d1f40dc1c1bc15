// The coefficient rules against hand-computed numbers and the paper's Table 3; their gradients against central differences.
#include <random>
#include <vector>

#include "check.h"
#include "kernels/rules.h"

using namespace alphaext;

namespace {

template <typename Acc>
std::vector<Acc> forward(const RuleParams& params, const std::vector<Acc>& raw) {
  std::vector<Acc> alpha(raw.size());
  rule_forward(params, static_cast<int64_t>(raw.size()), raw.data(), alpha.data());
  std::vector<Acc> in_place = raw;
  rule_forward(params, static_cast<int64_t>(raw.size()), in_place.data(), in_place.data());
  for (std::size_t k = 0; k < raw.size(); ++k) CHECK_CLOSE(in_place[k], alpha[k], 0);
  return alpha;
}

template <typename Acc>
std::vector<Acc> backward(const RuleParams& params, const std::vector<Acc>& raw, const std::vector<Acc>& grad_alpha) {
  std::vector<Acc> grad_raw(raw.size());
  rule_backward(params, static_cast<int64_t>(raw.size()), raw.data(), grad_alpha.data(), grad_raw.data());
  std::vector<Acc> in_place = grad_alpha;
  rule_backward(params, static_cast<int64_t>(raw.size()), raw.data(), in_place.data(), in_place.data());
  for (std::size_t k = 0; k < raw.size(); ++k) CHECK_CLOSE(in_place[k], grad_raw[k], 0);
  return grad_raw;
}

void check_row(const std::vector<double>& actual, const std::vector<double>& expected, double tolerance) {
  CHECK(actual.size() == expected.size());
  for (std::size_t k = 0; k < expected.size(); ++k) CHECK_CLOSE(actual[k], expected[k], tolerance);
}

constexpr RuleParams clamp(double gamma, bool projected = false) { return {Rule::Clamp, gamma, projected}; }
constexpr RuleParams softmax(double gamma, bool projected = false) { return {Rule::Softmax, gamma, projected}; }
constexpr RuleParams l1() { return {Rule::L1, 0.7, false}; }

void test_by_hand() {
  check::context = "clamp";
  check_row(forward<double>(clamp(0.7), {0.3, -2, 5}), {0.3, -2, 5}, 0);
  check_row(forward<double>(clamp(0.7), {0.9, -2, 5}), {0.7, -2, 5}, 0);
  check_row(forward<double>(clamp(0.7), {-0.1, -2, 5}), {kAlphaFloor, -2, 5}, 0);
  check_row(forward<double>(clamp(0.7), {0, 1}), {kAlphaFloor, 1}, 0);
  check_row(forward<double>(clamp(1e-6), {0.5, 1}), {1e-6, 1}, 0);   // gamma below the floor: the ceiling wins
  check_row(forward<double>(clamp(1e-6), {-0.5, 1}), {1e-6, 1}, 0);

  check::context = "softmax";
  // exp(raw) = 1, 1, 2: p = 1/4, 1/4, 1/2; floor (1 - 0.3) / 2 = 0.35
  check_row(forward<double>(softmax(0.3), {0, 0, std::log(2.0)}), {0.25, 0.35, 0.5}, 1e-15);
  // exp(raw) = 6, 1, 1: p = 3/4, 1/8, 1/8; gamma 0.5, floor 0.25
  check_row(forward<double>(softmax(0.5), {std::log(6.0), 0, 0}), {0.5, 0.25, 0.25}, 1e-15);
  check_row(forward<double>(softmax(1.0), {std::log(6.0), 0, 0}), {0.75, 0.125, 0.125}, 1e-15);
  // gamma < 1/(K+1): the floor (1 - 0.1)/2 = 0.45 is above the ceiling 0.1, and each clamp holds on its own side.
  check_row(forward<double>(softmax(0.1), {0, 0, 0}), {0.1, 0.45, 0.45}, 1e-15);
  check_row(forward<double>(softmax(0.1), {-50, 1, 0}), {std::exp(-50) / (1 + std::exp(1) + std::exp(-50)),
            std::exp(1) / (1 + std::exp(1)), 0.45}, 1e-15);
  check_row(forward<double>(softmax(0.7), {1000, -1000}), {0.7, 0.3}, 1e-15);  // no overflow; K = 1
  check_row(forward<double>(softmax(0.7), {0, 0}), {0.5, 0.5}, 1e-15);

  check::context = "l1";
  check_row(forward<double>(l1(), {9, 1, -3, 4}), {1, 0.125, -0.375, 0.5}, 1e-15);
  check_row(forward<double>(l1(), {9, -2}), {1, -1}, 1e-15);  // K = 1
  check_row(forward<double>(l1(), {9, 0, 0}), {1, 0, 0}, 0);
  check_row(forward<double>(l1(), {0, 1e-13, 0}), {1, 0.1, 0}, 1e-15);  // below the norm floor

  check::context = "NaN";
  const double nan = std::nan("");
  CHECK(std::isnan(forward<double>(clamp(0.7), {nan, 1})[0]));
  CHECK(std::isnan(forward<double>(softmax(0.7), {0, nan, 0})[0]));
  CHECK(std::isnan(forward<double>(softmax(0.7), {0, nan, 0})[2]));
  CHECK(std::isnan(forward<double>(l1(), {0, nan, 2})[2]));
}

// Table 3 of the paper (gamma 0.7, K = 5), own class last there and first here. The raw outputs are not printed: any that give
// the printed probabilities will do, where floored ones share what the others leave over.
void test_table_3() {
  const double floor = 0.06, gamma = 0.7;
  const double printed[7][6] = {
      {0.2941, 0.0600, 0.0600, 0.0600, 0.0600, 0.7000}, {0.1672, 0.1326, 0.0600, 0.0600, 0.0600, 0.6996},
      {0.0600, 0.2995, 0.0600, 0.0600, 0.0600, 0.7000}, {0.0600, 0.0600, 0.1534, 0.1458, 0.0600, 0.7000},
      {0.1081, 0.0600, 0.2358, 0.0600, 0.0600, 0.6560}, {0.0600, 0.0600, 0.0600, 0.1760, 0.1238, 0.7000},
      {0.0600, 0.0600, 0.0600, 0.2997, 0.0600, 0.7000}};
  for (int row = 0; row < 7; ++row) {
    check::context = "Table 3, row " + std::to_string(row);
    std::vector<double> alpha = {printed[row][5]};
    alpha.insert(alpha.end(), printed[row], printed[row] + 5);
    double unfloored = alpha[0];
    int floored = 0;
    for (std::size_t k = 1; k < 6; ++k) {
      if (alpha[k] > floor) unfloored += alpha[k];
      floored += alpha[k] <= floor;
    }
    // Why the rule is a softmax that is clamped and not renormalised: own and unfloored coefficients sum to 1.
    CHECK_CLOSE(unfloored, 1.0, 0.007);
    std::vector<double> raw(6);
    const double rest = std::max(1.0 - unfloored, 1e-5) / floored;
    for (std::size_t k = 0; k < 6; ++k) raw[k] = std::log(k == 0 || alpha[k] > floor ? alpha[k] : rest) + 3;
    check_row(forward(softmax(gamma), raw), alpha, 1e-4);
    std::vector<float> raw32(raw.begin(), raw.end());
    const std::vector<float> alpha32 = forward(softmax(gamma), raw32);
    for (std::size_t k = 0; k < 6; ++k) CHECK_CLOSE(alpha32[k], alpha[k], 1e-4);
  }
}

// Is any coefficient so near a clamp or kink that a central difference would straddle it?
bool near_kink(const RuleParams& params, const std::vector<double>& raw, double margin) {
  const std::vector<double> free = forward(softmax(1.0), raw);
  const double floor = (1 - params.gamma) / static_cast<double>(raw.size() - 1);
  for (std::size_t k = 0; k < raw.size(); ++k) {
    if (params.rule == Rule::L1 && k > 0 && std::fabs(raw[k]) < margin) return true;
    if (params.rule == Rule::Softmax && std::fabs(free[k] - (k == 0 ? params.gamma : floor)) < margin) return true;
  }
  return params.rule == Rule::Clamp &&
         (std::fabs(raw[0] - params.gamma) < margin || std::fabs(raw[0] - kAlphaFloor) < margin);
}

void test_against_differences() {
  std::mt19937_64 random(2);
  std::normal_distribution<double> normal;
  int tried = 0;
  for (const Rule rule : {Rule::Softmax, Rule::Clamp, Rule::L1}) {
    for (const double gamma : {0.05, 0.3, 0.7, 1.0}) {
      for (const std::size_t members : {2u, 3u, 6u, 11u}) {
        for (int repeat = 0; repeat < 20; ++repeat) {
          const RuleParams params{rule, gamma, false};
          check::context = "rule " + std::to_string(static_cast<int>(rule)) + ", gamma " + std::to_string(gamma) +
                           ", members " + std::to_string(members);
          std::vector<double> raw(members), weight(members);
          for (double& value : raw) value = normal(random);
          for (double& value : weight) value = normal(random);
          if (near_kink(params, raw, 1e-3)) continue;
          ++tried;
          const std::vector<double> gradient = backward(params, raw, weight);
          for (std::size_t k = 0; k < members; ++k) {
            const double step = 1e-5;
            double difference = 0;
            for (const double sign : {1.0, -1.0}) {
              std::vector<double> moved = raw;
              moved[k] += sign * step;
              const std::vector<double> alpha = forward(params, moved);
              for (std::size_t j = 0; j < members; ++j) difference += sign * weight[j] * alpha[j];
            }
            CHECK_CLOSE(gradient[k], difference / (2 * step), 1e-7 * (1 + std::fabs(gradient[k])));
          }
        }
      }
    }
  }
  CHECK(tried > 700);
}

void test_clamped_gradients() {
  check::context = "clamp, plain and projected";
  // Descent moves against the gradient: above the ceiling a positive gradient leads back in, below the floor a negative one.
  const std::vector<double> up = {1.0, 0.5}, down = {-1.0, 0.5};
  check_row(backward(clamp(0.7, false), {0.9, 1}, up), {0, 0.5}, 0);
  check_row(backward(clamp(0.7, false), {0.9, 1}, down), {0, 0.5}, 0);
  check_row(backward(clamp(0.7, false), {-0.9, 1}, down), {0, 0.5}, 0);
  check_row(backward(clamp(0.7, true), {0.9, 1}, up), {1, 0.5}, 0);
  check_row(backward(clamp(0.7, true), {0.9, 1}, down), {0, 0.5}, 0);
  check_row(backward(clamp(0.7, true), {-0.9, 1}, up), {0, 0.5}, 0);
  check_row(backward(clamp(0.7, true), {-0.9, 1}, down), {-1, 0.5}, 0);
  check_row(backward(clamp(0.7, true), {0.3, 1}, down), {-1, 0.5}, 0);
  check_row(backward(clamp(0.7, false), {0.7, 1}, up), {1, 0.5}, 0);  // at the ceiling is inside, as torch.clamp has it
  check_row(backward(clamp(0.7, false), {kAlphaFloor, 1}, up), {1, 0.5}, 0);

  check::context = "softmax, plain and projected";
  // exp(raw) = 8, 1, 1: p = 0.8, 0.1, 0.1; gamma 0.7, floor 0.15: all three sit on a clamp.
  const std::vector<double> raw = {std::log(8.0), 0, 0};
  check_row(backward(softmax(0.7, false), raw, {1, -1, 1}), {0, 0, 0}, 1e-15);
  // Projected: own (positive) and the first neighbour (negative) pass, the second neighbour does not.
  // weighted = 0.8 - 0.1 = 0.7; grad = p (g - weighted)
  check_row(backward(softmax(0.7, true), raw, {1, -1, 1}), {0.8 * 0.3, 0.1 * -1.7, 0.1 * -0.7}, 1e-15);
  check_row(backward(softmax(0.7, true), raw, {-1, 1, 1}), {0, 0, 0}, 1e-15);
  check_row(backward(softmax(1.0, false), raw, {1, -1, 1}), {0.8 * 0.2, 0.1 * -1.8, 0.1 * 0.2}, 1e-15);

  check::context = "l1";
  check_row(backward<double>(l1(), {9, 1, -3, 4}, {5, 1, 0, 0}), {0, 1 / 8.0 - 1 / 64.0, 1 / 64.0, -1 / 64.0}, 1e-15);
  check_row(backward<double>(l1(), {9, 2}, {5, 3}), {0, 0}, 1e-15);  // K = 1: alpha_1 is a sign, its slope 0
  const std::vector<double> zeros = backward<double>(l1(), {9, 0, 0}, {5, 1, -2});
  check_row(zeros, {0, 1 / kNormFloor, -2 / kNormFloor}, 1e-3);
  const std::vector<float> zeros32 = backward<float>(l1(), {9, 0, 0}, {5, 1, -2});
  CHECK(std::isfinite(zeros32[1]) && std::isfinite(zeros32[2]));
}

}  // namespace

int main() {
  test_by_hand();
  test_table_3();
  test_against_differences();
  test_clamped_gradients();
  return check::finish("test_rules");
}
