// The kernels of the native training engine, in every instruction set that this processor has, against plain loops in double
// precision: whole epochs, cached logits, validation, the random start; and the samples of an epoch.
#include <cstdlib>
#include <thread>

#include "cpu/intrinsics.h"
#include "cpu/kernels.h"
#include "kernel_cases.h"
#include "kernels/sampling.h"
#include "kernels/training_params.h"

// The vectors of the baseline instruction set, to look at the exponential by itself.
namespace vectors {
using namespace alphaext;
#define ALPHAEXT_VECTOR_BYTES 16
#include "cpu/vectors.inc.h"
#undef ALPHAEXT_INLINE
#undef ALPHAEXT_VECTOR_BYTES
}  // namespace vectors

using namespace alphaext;
using cases::Buffer;
using cases::Random;
using cases::Traits;
using naive::at;
using naive::Doubles;
using naive::Ids;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Memory of exactly so many bytes on a cache line of its own, so that AddressSanitizer sees one byte too many. Its contents
// must not matter.
class Scratch {
 public:
  explicit Scratch(int64_t bytes, int fill = 0xff) {
    CHECK(posix_memalign(&memory_, 64, at(bytes)) == 0);
    std::memset(memory_, fill, at(bytes));
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

template <typename Int>
Buffer<Int> buffer_of(const Ids& values) {
  Buffer<Int> buffer(static_cast<int64_t>(values.size()));
  for (std::size_t i = 0; i < values.size(); ++i) buffer.data()[i] = static_cast<Int>(values[i]);
  return buffer;
}

Ids random_ids(Random& random, int64_t size, int64_t below) {
  std::uniform_int_distribution<int64_t> distribution(0, below - 1);
  Ids ids(at(size));
  for (int64_t& id : ids) id = distribution(random.engine());
  return ids;
}

// ---- Training -------------------------------------------------------------------------------------------------------

struct TrainCase {
  RuleParams rule{Rule::Clamp, 0.7, false};
  SgdParams sgd{0.05, 0.9, 0, 0, false, true};
  int64_t few = 3, hidden = 17, members = 6, batch = 16, samples = 43;
  bool shared = false;
  int64_t lead = 0;
  bool penalty = false, offset = false;
  int64_t common = 0;  // so many of the last members are in the same columns for all classes
};

// Makes the last `common` members of every class those of the first one.
void share_last_members(Ids& member_columns, int64_t few, int64_t members, int64_t common) {
  for (int64_t f = 1; f < few; ++f) {
    for (int64_t k = members - common; k < members; ++k) member_columns[at(f * members + k)] = member_columns[at(k)];
  }
}

// A problem in double precision, holding numbers that T holds too.
struct TrainProblem {
  TrainCase c;
  int64_t networks, rows, columns;
  Doubles logits, base, label, scale;
  Doubles preactivation, w2, b2;                             // [F, H], [networks, M, H], [networks, M]
  Doubles preactivation_momentum, w2_momentum, b2_momentum;  // of the same shapes
  Doubles raw, alpha;
  Doubles penalty, offset;  // [2, M] and [F], or empty
  Ids order, member_columns, few_of_label;
};

template <typename T>
Doubles rounded(Doubles values) {
  for (double& value : values) value = static_cast<double>(static_cast<T>(value));
  return values;
}

template <typename T>
TrainProblem make_problem(const TrainCase& c) {
  Random random(21);
  TrainProblem p;
  p.c = c;
  p.networks = c.shared ? 1 : c.few;
  p.rows = c.samples + 5;
  p.columns = c.few + c.members + 2;  // classes share columns, and some column is nobody's
  p.logits = rounded<T>(random.uniform(p.rows * p.columns, -3, 3));
  p.base = rounded<T>(random.uniform(p.rows, 0, 2));
  p.label = rounded<T>(random.uniform(p.rows, -2, 2));
  p.order = random_ids(random, c.samples, p.rows);
  p.member_columns = random_ids(random, c.few * c.members, p.columns - 1);
  share_last_members(p.member_columns, c.few, c.members, c.common);
  p.few_of_label = random_ids(random, p.rows, 2 * c.few);
  for (int64_t& few : p.few_of_label) few = few < c.few ? few : -1;
  if (c.shared) {
    // A Gram matrix: of classes that all but one see nearly the same input.
    const Doubles z = random.uniform(c.few * 2, -1, 1);
    p.scale = Doubles(at(c.few * c.few));
    for (int64_t f = 0; f < c.few; ++f) {
      for (int64_t g = 0; g < c.few; ++g) {
        p.scale[at(f * c.few + g)] = z[at(2 * f)] * z[at(2 * g)] + z[at(2 * f + 1)] * z[at(2 * g + 1)] + 1;
      }
    }
    p.scale = rounded<T>(p.scale);
  } else {
    p.scale = rounded<T>(random.uniform(c.few, 1, 3));
  }
  p.preactivation = rounded<T>(random.uniform(c.few * c.hidden));
  p.w2 = rounded<T>(random.uniform(p.networks * c.members * c.hidden, -0.3, 0.3));
  p.b2 = rounded<T>(random.uniform(p.networks * c.members, 0.1, 0.5));
  // A training that goes on has a momentum already.
  const double size = c.sgd.first_step ? 0 : 0.1;
  p.preactivation_momentum = rounded<T>(random.uniform(c.few * c.hidden, -size, size));
  p.w2_momentum = rounded<T>(random.uniform(p.networks * c.members * c.hidden, -size, size));
  p.b2_momentum = rounded<T>(random.uniform(p.networks * c.members, -size, size));
  if (c.penalty) p.penalty = rounded<T>(random.uniform(2 * c.members, 0, 0.5));
  if (c.offset) p.offset = rounded<T>(random.uniform(c.few, -2, 2));
  return p;
}

void naive_sgd(const SgdParams& sgd, bool first, double gradient, double& value, double& momentum) {
  gradient += sgd.weight_decay * value;
  const bool undampened = first || sgd.momentum == 0;
  momentum = sgd.momentum * momentum + (undampened ? 1 : 1 - sgd.dampening) * gradient;
  value -= sgd.lr * (sgd.nesterov ? gradient + sgd.momentum * momentum : momentum);
}

void naive_outputs(TrainProblem& p) {
  const TrainCase& c = p.c;
  const naive::Coefficients out =
      naive::coefficients(c.rule, c.few, c.hidden, c.members, c.shared, p.preactivation, p.w2, p.b2);
  p.raw = out.raw;
  p.alpha = out.alpha;
}

// The epoch, step by step; the sum of the samples' losses.
double naive_epoch(TrainProblem& p) {
  const int64_t F = p.c.few, H = p.c.hidden, M = p.c.members;
  double loss = 0;
  naive_outputs(p);
  for (int64_t first = 0; first < p.c.samples; first += p.c.batch) {
    const int64_t count = std::min(p.c.batch, p.c.samples - first);
    Doubles grad_alpha(at(F * M));
    for (int64_t b = 0; b < count; ++b) {
      const int64_t row = p.order[at(first + b)], label = p.few_of_label[at(row)];
      Doubles scores = p.offset.empty() ? Doubles(at(F)) : p.offset;
      for (int64_t f = 0; f < F; ++f) {
        for (int64_t k = 0; k < M; ++k) {
          scores[at(f)] += p.alpha[at(f * M + k)] * p.logits[at(row * p.columns + p.member_columns[at(f * M + k)])];
        }
      }
      double largest = p.base[at(row)];
      for (const double score : scores) largest = std::max(largest, score);
      double total = std::exp(p.base[at(row)] - largest);
      for (const double score : scores) total += std::exp(score - largest);
      loss += largest + std::log(total) - (label >= 0 ? scores[at(label)] : p.label[at(row)]);
      for (int64_t f = 0; f < F; ++f) {
        const double gradient = (std::exp(scores[at(f)] - largest) / total - (f == label ? 1 : 0)) / static_cast<double>(count);
        for (int64_t k = 0; k < M; ++k) {
          grad_alpha[at(f * M + k)] += gradient * p.logits[at(row * p.columns + p.member_columns[at(f * M + k)])];
        }
      }
    }
    naive::CoefficientGradients g =
        naive::coefficients_backward(p.c.rule, F, H, M, p.c.shared, p.preactivation, p.raw, p.w2, grad_alpha);
    if (!p.penalty.empty()) {
      for (int64_t f = 0; f < F; ++f) {
        const int64_t network = p.c.shared ? 0 : f;
        for (int64_t k = 0; k < M; ++k) {
          const double pull = p.penalty[at(k)] * (p.raw[at(f * M + k)] - p.penalty[at(M + k)]);
          g.b2[at(f * M + k)] += pull;
          for (int64_t h = 0; h < H; ++h) {
            const double value = p.preactivation[at(f * H + h)];
            if (!(value > 0)) continue;
            g.w2[at((f * M + k) * H + h)] += pull * value;
            g.preactivation[at(f * H + h)] += pull * p.w2[at((network * M + k) * H + h)];
          }
        }
      }
    }
    Doubles grad_c(at(F * H)), grad_w2(at(p.networks * M * H)), grad_b2(at(p.networks * M));
    for (int64_t f = 0; f < F; ++f) {
      const int64_t n = p.c.shared ? 0 : f;
      for (int64_t i = 0; i < M * H; ++i) grad_w2[at(n * M * H + i)] += g.w2[at(f * M * H + i)];
      for (int64_t k = 0; k < M; ++k) grad_b2[at(n * M + k)] += g.b2[at(f * M + k)];
      for (int64_t h = 0; h < H; ++h) {
        if (!p.c.shared) {
          grad_c[at(f * H + h)] = p.scale[at(f)] * g.preactivation[at(f * H + h)];
          continue;
        }
        for (int64_t other = 0; other < F; ++other) {
          grad_c[at(f * H + h)] += p.scale[at(f * F + other)] * g.preactivation[at(other * H + h)];
        }
      }
    }
    const bool first_step = p.c.sgd.first_step && first == 0;
    for (std::size_t i = 0; i < grad_c.size(); ++i) {
      naive_sgd(p.c.sgd, first_step, grad_c[i], p.preactivation[i], p.preactivation_momentum[i]);
    }
    for (std::size_t i = 0; i < grad_w2.size(); ++i) naive_sgd(p.c.sgd, first_step, grad_w2[i], p.w2[i], p.w2_momentum[i]);
    for (std::size_t i = 0; i < grad_b2.size(); ++i) naive_sgd(p.c.sgd, first_step, grad_b2[i], p.b2[i], p.b2_momentum[i]);
    naive_outputs(p);
  }
  return loss;
}

// Where the state has element h of row r of part `part` (pre-activations, their momentum, w2, its momentum) of a network.
struct StateLayout {
  int64_t classes, members, tiles;
  explicit StateLayout(const TrainCase& c)
      : classes(c.shared ? c.few : 1), members(c.members), tiles(rounded_up(c.hidden, kTileWidth) / kTileWidth) {}
  int64_t rows() const { return 2 * classes + 2 * members; }
  int64_t position(int64_t network, int part, int64_t row, int64_t h) const {
    const int64_t before[] = {0, classes, 2 * classes, 2 * classes + members};
    return ((network * tiles + h / kTileWidth) * rows() + before[part] + row) * kTileWidth + h % kTileWidth;
  }
};

Doubles packed(const TrainProblem& p) {
  const StateLayout layout(p.c);
  Doubles state(at(p.networks * layout.tiles * layout.rows() * kTileWidth));
  for (int64_t h = 0; h < p.c.hidden; ++h) {
    for (int64_t f = 0; f < p.c.few; ++f) {
      const int64_t network = p.c.shared ? 0 : f, row = p.c.shared ? f : 0;
      state[at(layout.position(network, 0, row, h))] = p.preactivation[at(f * p.c.hidden + h)];
      state[at(layout.position(network, 1, row, h))] = p.preactivation_momentum[at(f * p.c.hidden + h)];
    }
    for (int64_t n = 0; n < p.networks; ++n) {
      for (int64_t k = 0; k < p.c.members; ++k) {
        state[at(layout.position(n, 2, k, h))] = p.w2[at((n * p.c.members + k) * p.c.hidden + h)];
        state[at(layout.position(n, 3, k, h))] = p.w2_momentum[at((n * p.c.members + k) * p.c.hidden + h)];
      }
    }
  }
  return state;
}

template <typename T>
struct TrainRun {
  Buffer<T> state, b2, b2_momentum, raw, alpha;
  TrainResult result;
  bool same_bits(const TrainRun& other) const {
    return state.same_bits(other.state) && b2.same_bits(other.b2) && b2_momentum.same_bits(other.b2_momentum) &&
           raw.same_bits(other.raw) && alpha.same_bits(other.alpha) && result.loss == other.result.loss;
  }
};

// `fill`: what the scratch memory holds before.
template <typename T>
TrainRun<T> run_epoch(const cpu::Kernels& kernels, const TrainProblem& p, int fill) {
  const int64_t lead = p.c.lead, outputs = p.c.few * p.c.members;
  TrainRun<T> run{{packed(p), lead},        {p.b2, lead},             {p.b2_momentum, lead},
                  Buffer<T>(outputs, lead), Buffer<T>(outputs, lead), {}};
  const Buffer<T> logits(p.logits, lead), base(p.base, lead), label(p.label, lead), scale(p.scale, lead);
  const Buffer<T> penalty(p.penalty, lead), offset(p.offset, lead);
  const Buffer<int64_t> order = buffer_of<int64_t>(p.order);
  const Buffer<int32_t> member_columns = buffer_of<int32_t>(p.member_columns);
  const Buffer<int32_t> few_of_label = buffer_of<int32_t>(p.few_of_label);
  TrainParams params{};
  params.dtype = Traits<T>::dtype;
  params.rule = p.c.rule;
  params.sgd = p.c.sgd;
  params.num_few = p.c.few;
  params.members = p.c.members;
  params.tiles = StateLayout(p.c).tiles;
  params.columns = p.columns;
  params.batch = p.c.batch;
  params.samples = p.c.samples;
  params.shared = p.c.shared;
  params.order = order.data();
  params.member_logits = logits.data();
  params.base_logsumexp = base.data();
  params.label_logit = label.data();
  params.few_of_label = few_of_label.data();
  params.member_columns = member_columns.data();
  params.gradient_scale = scale.data();
  params.penalty = p.penalty.empty() ? nullptr : penalty.data();
  params.few_offset = p.offset.empty() ? nullptr : offset.data();
  params.state = run.state.data();
  params.b2 = run.b2.data();
  params.b2_momentum = run.b2_momentum.data();
  params.raw = run.raw.data();
  params.alpha = run.alpha.data();
  const Scratch scratch(train_workspace_bytes(params), fill);
  params.workspace = scratch.data();
  run.result = kernels.train_epoch(params);
  return run;
}

void describe(const char* what, const cpu::Kernels& kernels, const char* dtype, const TrainCase& c) {
  cases::describe(what, dtype,
                  {{"rule", static_cast<int>(c.rule.rule)}, {"gamma", c.rule.gamma}, {"projected", c.rule.projected_gradient},
                   {"momentum", c.sgd.momentum}, {"dampening", c.sgd.dampening}, {"decay", c.sgd.weight_decay},
                   {"nesterov", c.sgd.nesterov}, {"first", c.sgd.first_step}, {"F", c.few}, {"H", c.hidden}, {"M", c.members},
                   {"batch", c.batch}, {"samples", c.samples}, {"shared", c.shared}, {"lead", c.lead},
                   {"penalty", c.penalty}, {"offset", c.offset}});
  check::context += std::string(", ") + kernels.name;
}

template <typename T>
void train(const cpu::Kernels& kernels, const TrainCase& c) {
  describe("train", kernels, Traits<T>::name, c);
  TrainProblem p = make_problem<T>(c);
  const TrainRun<T> run = run_epoch<T>(kernels, p, 0xff), again = run_epoch<T>(kernels, p, 0);
  CHECK(run.same_bits(again));  // whatever was in the scratch memory
  CHECK(run.result.failed_step == -1 && run.result.failed_class == -1);
  const double loss = naive_epoch(p);
  // Each step rounds sums of some tens of terms of order 1, and hands its error on to the next, a little larger.
  const double steps = static_cast<double>((c.samples + c.batch - 1) / c.batch);
  const double tolerance = Traits<T>::roundoff * 200 * (steps + 2);
  CHECK_CLOSE(run.result.loss, loss, tolerance * static_cast<double>(c.samples + 1));
  cases::compare_values(run.state.doubles(), packed(p), tolerance, tolerance, "state");  // with zeros beside the last unit
  cases::compare_values(run.b2.doubles(), p.b2, tolerance, tolerance, "b2");
  cases::compare_values(run.b2_momentum.doubles(), p.b2_momentum, tolerance, tolerance, "b2 momentum");
  cases::compare_values(run.raw.doubles(), p.raw, 4 * tolerance, 4 * tolerance, "raw");
  cases::compare_values(run.alpha.doubles(), p.alpha, 4 * tolerance, 4 * tolerance, "alpha");
}

template <typename T>
void train_all(const cpu::Kernels& kernels) {
  const SgdParams optimizers[] = {
      {0.05, 0.9, 0, 0, false, true},     {0.05, 0, 0, 0, false, true},       {0.05, 0, 0.5, 0, false, false},
      {0.05, 0.9, 0, 0, true, true},      {0.05, 0.9, 0.3, 0, false, true},   {0.05, 0.9, 0.3, 0, false, false},
      {0.05, 0.9, 0, 0.01, false, false}, {0.05, 0.8, 0, 0.01, true, false},  {0.05, 0, 0, 0.01, false, true},
  };
  for (const bool shared : {false, true}) {
    TrainCase c;
    c.shared = shared;
    for (const RuleParams& rule : cases::all_rules()) {
      for (const int64_t members : {3, 6}) {
        c.rule = rule;
        c.members = members;
        train<T>(kernels, c);
      }
    }
    c = {};
    c.shared = shared;
    for (const SgdParams& sgd : optimizers) {
      for (const int64_t members : {5, 6}) {
        c.sgd = sgd;
        c.members = members;
        train<T>(kernels, c);
      }
    }
    for (const int64_t hidden : {1, 15, 16, 17, 33}) {
      for (const int64_t members : {2, 3, 6, 7}) {
        c = {};
        c.shared = shared;
        c.hidden = hidden;
        c.members = members;
        c.lead = hidden % 2;
        train<T>(kernels, c);
      }
    }
    for (const int64_t batch : {1, 15, 16, 17, 64}) {
      for (const int64_t samples : {int64_t{0}, int64_t{1}, batch, batch + 1, 3 * batch - 1}) {
        c = {};
        c.shared = shared;
        c.batch = batch;
        c.samples = samples;
        c.few = samples % 2 ? 1 : 5;
        train<T>(kernels, c);
      }
    }
    for (const RuleParams& rule : cases::all_rules()) {
      for (const int penalty : {0, 1}) {
        c = {};
        c.shared = shared;
        c.rule = rule;
        c.penalty = penalty == 1;
        c.offset = !c.penalty || rule.projected_gradient;
        train<T>(kernels, c);
      }
    }
    // Without hidden units the outputs are b2 alone.
    for (const int64_t members : {2, 6, 40}) {
      c = {};
      c.shared = shared;
      c.hidden = 0;
      c.members = members;
      c.penalty = c.offset = true;
      c.lead = 1;
      train<T>(kernels, c);
    }
    // Classes by the vector and some left over, columns by the block and some left over, none of their own.
    for (const int64_t few : {2, 5, 17, 33, 36}) {
      for (const int64_t own : {0, 1, 6}) {
        c = {};
        c.shared = shared;
        c.hidden = own == 1 ? 0 : 3;
        c.few = few;
        c.common = few == 17 ? 71 : 9;
        c.members = own + c.common;
        c.batch = few == 36 ? 80 : 16;
        c.samples = 2 * c.batch + 3;
        train<T>(kernels, c);
      }
    }
  }
}

// What is not finite is found in its step, and the class is named where it is one class's doing.
template <typename T>
void divergence(const cpu::Kernels& kernels) {
  for (const bool shared : {false, true}) {
    TrainCase c;
    c.shared = shared;
    c.rule = {Rule::Softmax, 1, false};  // no coefficient is 0
    const auto expect = [&](const char* what, const TrainProblem& p, int64_t step, int64_t few) {
      describe(what, kernels, Traits<T>::name, p.c);
      const TrainResult result = run_epoch<T>(kernels, p, 0xff).result;
      CHECK(result.failed_step == step);
      CHECK(result.failed_class == few);
    };
    const TrainProblem good = make_problem<T>(c);
    expect("nothing wrong", good, -1, -1);
    for (const double bad : {kNan, kInfinity, -kInfinity}) {
      TrainProblem p = good;
      // A column of class 1 alone, in the second step's samples alone.
      for (int64_t& column : p.member_columns) column = std::min(column, p.columns - 2);
      p.member_columns[at(1 * c.members + 2)] = p.columns - 1;
      for (int64_t row = 0; row < p.rows; ++row) p.logits[at(row * p.columns + p.columns - 1)] = 0;
      p.order[at(c.batch + 3)] = p.rows - 1;
      std::replace(p.order.begin(), p.order.begin() + c.batch, p.rows - 1, int64_t{0});
      p.logits[at(p.rows * p.columns - 1)] = bad;
      p.few_of_label[at(p.rows - 1)] = -1;
      // Minus infinity breaks the gradient instead of the loss, and through one network for all it breaks all.
      expect("a member's logit", p, 1, bad == -kInfinity && shared ? 0 : 1);
      p = good;
      p.few_of_label[at(p.order[0])] = -1;
      p.label[at(p.order[0])] = bad;
      expect("a label's logit", p, 0, -1);
      if (bad != -kInfinity) {  // of which ReLU makes 0
        p = good;
        p.preactivation[at(c.few * c.hidden - 1)] = bad;
        expect("the state", p, 0, c.few - 1);
      }
      p = good;
      p.w2[at(0)] = bad;
      for (int64_t f = 0; f < c.few; ++f) p.preactivation[at(f * c.hidden)] = 1;
      expect("the second layer", p, 0, 0);
    }
    TrainProblem p = good;
    p.c.sgd.lr = std::numeric_limits<T>::max();
    describe("learning rate", kernels, Traits<T>::name, p.c);
    const TrainResult result = run_epoch<T>(kernels, p, 0xff).result;
    CHECK(result.failed_step >= 0 && result.failed_step <= 1 && result.failed_class >= 0);
  }
}

// ---- Cached logits and validation -----------------------------------------------------------------------------------

// Loops cut in one or in uneven parts.
template <typename Loop>
void cut_loop(int64_t items, int cut, const Loop& loop) {
  if (cut == 0) return loop(0, items);
  const int64_t bounds[] = {0, items / 5, items / 5, items / 2, items};
  for (int part = 3; part >= 0; --part) loop(bounds[part], bounds[part + 1]);
}

// A classifier's logits, whole numbers where ties are wanted: every sum of them is exact.
struct Scores {
  int64_t samples, classes, few, members;
  Doubles logits, penalty, bias, alpha;
  Ids labels, class_ids, member_columns, few_classes, few_of_label;
};

Scores make_scores(int64_t samples, int64_t classes, int64_t few, int64_t members, double range, bool whole) {
  Random random(31);
  Scores s;
  s.samples = samples, s.classes = classes, s.few = few, s.members = members;
  s.logits = random.uniform(samples * classes, -range, range);
  s.bias = random.uniform(classes, -2, 2);
  s.alpha = random.uniform(few * members, -1, 1);
  if (whole) {
    for (double& value : s.logits) value = std::round(value);
    for (double& value : s.bias) value = std::round(value);
    for (double& value : s.alpha) value = std::round(4 * value) / 4;
  }
  s.logits = rounded<float>(s.logits);
  s.bias = rounded<float>(s.bias);
  s.alpha = rounded<float>(s.alpha);
  s.labels = random_ids(random, samples, classes);
  Ids ids(at(classes));
  std::iota(ids.begin(), ids.end(), int64_t{0});
  std::shuffle(ids.begin(), ids.end(), random.engine());
  s.few_classes.assign(ids.begin(), ids.begin() + few);
  s.penalty = Doubles(at(classes));
  s.few_of_label = Ids(at(samples), -1);
  for (int64_t f = 0; f < few; ++f) {
    s.penalty[at(s.few_classes[at(f)])] = -kInfinity;
    for (int64_t i = 0; i < samples; ++i) {
      if (s.labels[at(i)] == s.few_classes[at(f)]) s.few_of_label[at(i)] = f;
    }
  }
  // Two columns a class, the second less its bias; members are any of them.
  for (int64_t u = 0; u < 2 * classes; ++u) s.class_ids.push_back(u % classes);
  for (int64_t u = 0; u < classes; ++u) s.bias[at(u)] = 0;
  s.bias.insert(s.bias.end(), s.bias.begin(), s.bias.end());
  for (std::size_t u = at(classes); u < s.bias.size(); ++u) s.bias[u] = static_cast<double>(u % 5) - 2;
  s.member_columns = random_ids(random, few * members, 2 * classes);
  if (few % 2 == 0) share_last_members(s.member_columns, few, members, members - 1);
  return s;
}

template <typename T>
struct CachedLogits {
  Buffer<T> member_logits, base_logsumexp, label_logit, top_logits;
  Buffer<int32_t> top_ids;
};

template <typename T>
CachedLogits<T> cache(const cpu::Kernels& kernels, const Scores& s, bool in_blocks, int cut, int64_t lead) {
  const int64_t columns = static_cast<int64_t>(s.class_ids.size());
  const int64_t rows = in_blocks ? rounded_up(s.samples, kBlockSamples) : s.samples;
  CachedLogits<T> out{Buffer<T>(rows * columns, lead), Buffer<T>(s.samples, lead), Buffer<T>(s.samples, lead),
                      Buffer<T>(in_blocks ? s.samples * kTopClasses : 0, lead),
                      Buffer<int32_t>(in_blocks ? s.samples * kTopClasses : 0, lead)};
  std::fill_n(out.member_logits.data(), rows * columns, T(0));
  const Buffer<T> logits(s.logits, lead), penalty(s.penalty, lead), bias(s.bias, lead);
  const Buffer<int64_t> labels = buffer_of<int64_t>(s.labels), class_ids = buffer_of<int64_t>(s.class_ids);
  const CacheParams params{Traits<T>::dtype,     s.samples,     s.classes,
                           columns,              logits.data(), penalty.data(),
                           class_ids.data(),     bias.data(),   labels.data(),
                           out.base_logsumexp.data(), out.label_logit.data(), in_blocks,
                           out.member_logits.data(),  out.top_logits.data(),  out.top_ids.data()};
  cut_loop(s.samples, cut, [&](int64_t begin, int64_t end) { kernels.cache_logits(params, begin, end); });
  return out;
}

double naive_logsumexp(const Scores& s, int64_t row) {
  double largest = -kInfinity, total = 0;
  const double* const logits = &s.logits[at(row * s.classes)];
  for (int64_t c = 0; c < s.classes; ++c) largest = std::max(largest, logits[c] + s.penalty[at(c)]);
  for (int64_t c = 0; c < s.classes; ++c) total += std::exp(logits[c] + s.penalty[at(c)] - largest);
  return largest + std::log(total);
}

template <typename T>
void compare_logsumexp(const cpu::Kernels& kernels, const Scores& s) {
  const Buffer<T> actual = cache<T>(kernels, s, false, 0, 0).base_logsumexp;
  for (int64_t row = 0; row < s.samples; ++row) {
    const double expected = naive_logsumexp(s, row);
    const double terms = static_cast<double>(s.classes);
    CHECK_CLOSE(actual.data()[row], expected, Traits<T>::roundoff * (4 * std::fabs(expected) + 8 + terms / 2));
  }
}

template <typename T>
void cached_logits(const cpu::Kernels& kernels, int64_t samples, int64_t classes, int64_t few, double range, bool whole) {
  cases::describe("cached logits", Traits<T>::name, {{"samples", samples}, {"N", classes}, {"F", few}, {"range", range}});
  check::context += std::string(", ") + kernels.name;
  const int64_t lead = samples % 2, columns = 2 * classes;
  const Scores s = make_scores(samples, classes, few, 3, range, whole);
  const CachedLogits<T> rows = cache<T>(kernels, s, false, 0, lead), blocks = cache<T>(kernels, s, true, 0, lead);
  const CachedLogits<T> cut = cache<T>(kernels, s, true, 1, lead);
  CHECK(blocks.member_logits.same_bits(cut.member_logits) && blocks.base_logsumexp.same_bits(cut.base_logsumexp));
  CHECK(blocks.top_logits.same_bits(cut.top_logits) && blocks.top_ids.same_bits(cut.top_ids));
  CHECK(rows.base_logsumexp.same_bits(blocks.base_logsumexp) && rows.label_logit.same_bits(blocks.label_logit));
  compare_logsumexp<T>(kernels, s);
  for (int64_t row = 0; row < samples; ++row) {
    const double* const logits = &s.logits[at(row * classes)];
    CHECK(static_cast<double>(rows.label_logit.data()[row]) == logits[s.labels[at(row)]]);
    for (int64_t u = 0; u < columns; ++u) {
      const double expected = static_cast<double>(static_cast<T>(logits[u % classes]) - static_cast<T>(s.bias[at(u)]));
      CHECK(static_cast<double>(rows.member_logits.data()[row * columns + u]) == expected);
      const int64_t position = (row / kBlockSamples * columns + u) * kBlockSamples + row % kBlockSamples;
      CHECK(static_cast<double>(blocks.member_logits.data()[position]) == expected);
    }
    Ids ids;
    for (int64_t c = 0; c < classes; ++c) {
      if (s.penalty[at(c)] == 0) ids.push_back(c);
    }
    std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
    for (int64_t i = 0; i < kTopClasses; ++i) {
      const bool exists = i < static_cast<int64_t>(ids.size());
      CHECK(blocks.top_ids.data()[row * kTopClasses + i] == (exists ? ids[at(i)] : std::numeric_limits<int32_t>::max()));
      CHECK(static_cast<double>(blocks.top_logits.data()[row * kTopClasses + i]) == (exists ? logits[ids[at(i)]] : -kInfinity));
    }
  }
}

template <typename T>
void validation(const cpu::Kernels& kernels, int64_t samples, int64_t classes, int64_t few, int64_t members, double range) {
  cases::describe("validation", Traits<T>::name,
                  {{"samples", samples}, {"N", classes}, {"F", few}, {"M", members}, {"range", range}});
  check::context += std::string(", ") + kernels.name;
  const Scores s = make_scores(samples, classes, few, members, range, true);
  const CachedLogits<T> cached = cache<T>(kernels, s, true, 0, 0);
  const Buffer<T> alpha(s.alpha, 1);
  const Buffer<int64_t> labels = buffer_of<int64_t>(s.labels);
  const Buffer<int32_t> member_columns = buffer_of<int32_t>(s.member_columns), few_classes = buffer_of<int32_t>(s.few_classes),
                        few_of_label = buffer_of<int32_t>(s.few_of_label);
  Ids expected(at(2 * classes));
  for (int64_t i = 0; i < samples; ++i) {
    Doubles scores(s.logits.begin() + i * classes, s.logits.begin() + (i + 1) * classes);
    const Doubles original = scores;
    for (int64_t f = 0; f < few; ++f) {
      double sum = 0;
      for (int64_t k = 0; k < members; ++k) {
        const int64_t column = s.member_columns[at(f * members + k)];
        sum += s.alpha[at(f * members + k)] * (original[at(column % classes)] - s.bias[at(column)]);
      }
      scores[at(s.few_classes[at(f)])] = sum;
    }
    const int64_t label = s.labels[at(i)];
    int64_t rank = 0;
    for (int64_t c = 0; c < classes; ++c) {
      rank += scores[at(c)] > scores[at(label)] || (scores[at(c)] == scores[at(label)] && c < label);
    }
    expected[at(label)] += rank < 1;
    expected[at(classes + label)] += rank < kTopClasses;
  }
  for (int cut = 0; cut < cases::kCuts; ++cut) {
    Buffer<int64_t> hits(2 * classes);
    std::fill_n(hits.data(), 2 * classes, int64_t{0});
    ValidateParams params{Traits<T>::dtype,
                          few,
                          members,
                          static_cast<int64_t>(s.class_ids.size()),
                          samples,
                          classes,
                          alpha.data(),
                          member_columns.data(),
                          few_classes.data(),
                          cached.member_logits.data(),
                          cached.label_logit.data(),
                          cached.top_logits.data(),
                          cached.top_ids.data(),
                          labels.data(),
                          few_of_label.data(),
                          hits.data(),
                          nullptr};
    const Scratch scratch(validate_workspace_bytes(params));
    params.workspace = scratch.data();
    cut_loop(rounded_up(samples, kBlockSamples) / kBlockSamples, cut,
             [&](int64_t begin, int64_t end) { kernels.validate(params, begin, end); });
    CHECK(Ids(hits.data(), hits.data() + 2 * classes) == expected);
  }
}

// Logits far apart and far from 0: nothing overflows, what is too small counts as 0, and an infinity that says "never" is 0.
template <typename T>
void extreme_logits(const cpu::Kernels& kernels) {
  for (const int64_t classes : {2, 3, 5, 9, 17, 40}) {
    cases::describe("extreme logits", Traits<T>::name, {{"N", classes}});
    check::context += std::string(", ") + kernels.name;
    Scores s = make_scores(9, classes, 1, 2, 1, false);
    const double values[] = {80, -80, 1e4, -1e4, -kInfinity, 0, 87, -87.5, -708.5};
    for (int64_t row = 0; row < 9; ++row) {
      for (int64_t c = 0; c < classes; ++c) {
        // Row r: one value throughout, then two that alternate, then all of them.
        const int64_t kind = row % 3;
        double value = kind == 0 ? values[row] : kind == 1 ? (c % 2 ? values[row] : 0) : values[(row + c) % 9];
        if (std::isinf(value) && kind == 0) value = 0;
        s.logits[at(row * classes + c)] = value;
      }
    }
    s.logits = rounded<float>(s.logits);
    compare_logsumexp<T>(kernels, s);
    s.logits[0] = s.logits[at(classes)] = s.logits[at(2 * classes)] = kNan;
    s.logits[at(3 * classes)] = kInfinity;
    s.penalty.assign(at(classes), 0);
    const Buffer<T> actual = cache<T>(kernels, s, false, 0, 0).base_logsumexp;
    for (int64_t row = 0; row < 4; ++row) CHECK(!std::isfinite(actual.data()[row]));
    for (int64_t row = 4; row < 9; ++row) CHECK(std::isfinite(actual.data()[row]));
  }
}

template <typename T>
void exponential() {
  cases::describe("exponential", Traits<T>::name, {});
  using V = vectors::Vector<T>;
  const double lowest = static_cast<double>(vectors::ExponentialConstants<T>::lowest);
  double worst = 0;
  for (double x = 0; x >= lowest; x -= 0.00731 * (1 - x / 40)) {
    const T argument = static_cast<T>(x);
    const V result = vectors::exponential<T>(vectors::all(argument));
    const double expected = std::exp(static_cast<double>(argument));
    worst = std::max(worst, std::fabs(static_cast<double>(result[0]) - expected) / expected);
    CHECK(result[vectors::kLanes<T> - 1] == result[0]);
  }
  CHECK_CLOSE(worst, 0, 2.5 * Traits<T>::roundoff);
  const auto one = [](double x) { return static_cast<double>(vectors::exponential<T>(vectors::all(static_cast<T>(x)))[0]); };
  CHECK(one(0) == 1 && one(-0.0) == 1);
  CHECK(one(lowest * 1.01) == 0 && one(-1e4) == 0 && one(-1e30) == 0);
  CHECK(static_cast<double>(vectors::exponential<T>(V{} - std::numeric_limits<T>::infinity())[0]) == 0);
  CHECK(std::isnan(static_cast<double>(vectors::exponential<T>(V{} + std::numeric_limits<T>::quiet_NaN())[0])));
}

// ---- The random start -----------------------------------------------------------------------------------------------

struct Counter {
  uint32_t words[4];
};

Counter naive_philox(Counter c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xd2511f53u} * c.words[0], b = uint64_t{0xcd9e8d57u} * c.words[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.words[1] ^ key0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.words[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return c;
}

// Weight i of a unit, its bias being weight I: 32 of them come from 8 counters, word by word.
double naive_weight(uint64_t seed, int64_t network, int64_t unit, int64_t i, double bound) {
  const auto low = [](auto value) { return static_cast<uint32_t>(value); };
  const Counter counter{{low(i / 32 * 8 + i % 8), low(unit), low(network), 0}};
  const Counter bits = naive_philox(counter, low(seed), low(seed >> 32));
  return (static_cast<double>(bits.words[i % 32 / 8] >> 8) / 8388608.0 - 1) * bound;
}

template <typename T>
void initial_weights(const cpu::Kernels& kernels, int64_t few, int64_t hidden, int64_t inputs, bool shared) {
  cases::describe("initial weights", Traits<T>::name, {{"F", few}, {"H", hidden}, {"I", inputs}, {"shared", shared}});
  check::context += std::string(", ") + kernels.name;
  const int64_t networks = shared ? 1 : few, lead = hidden % 2;
  const uint64_t seed = 0x123456789abcdef0u;
  Random random(41);
  const Buffer<T> z(random.uniform(few * inputs), lead);
  InitialWeightsParams p{};
  p.dtype = Traits<T>::dtype;
  p.num_few = few;
  p.hidden = hidden;
  p.inputs = inputs;
  p.shared = shared;
  p.seed = seed;
  p.bound = 1 / std::sqrt(static_cast<double>(inputs));
  p.z = z.data();
  const auto run = [&](int64_t count, int cut) {
    cut_loop(count * hidden, cut, [&](int64_t begin, int64_t end) {
      const Scratch scratch(initial_weights_workspace_bytes(p));
      kernels.initial_weights(p, begin, end, scratch.data());
    });
  };
  const Buffer<T> w1(networks * hidden * inputs, lead), b1(networks * hidden, lead), start(few * hidden, lead);
  p.w1 = w1.data();
  p.b1 = b1.data();
  run(networks, 0);
  Doubles expected_w1, expected_b1;
  for (int64_t row = 0; row < networks * hidden; ++row) {
    for (int64_t i = 0; i <= inputs; ++i) {
      (i < inputs ? expected_w1 : expected_b1).push_back(naive_weight(seed, row / hidden, row % hidden, i, p.bound));
    }
  }
  const double rounding = 4 * Traits<T>::roundoff * p.bound;  // of the bound, its 2^-23, their product, and the difference
  cases::compare_values(w1.doubles(), expected_w1, 0, rounding, "w1");
  cases::compare_values(b1.doubles(), expected_b1, 0, rounding, "b1");

  // Not written down, the same weights make the pre-activations; the work may be cut.
  p.w1 = p.b1 = nullptr;
  p.preactivation = start.data();
  run(networks, 0);
  Doubles expected(at(few * hidden));
  for (int64_t f = 0; f < few; ++f) {
    for (int64_t h = 0; h < hidden; ++h) {
      const int64_t row = (shared ? 0 : f) * hidden + h;
      expected[at(f * hidden + h)] = static_cast<double>(b1.data()[row]);
      for (int64_t i = 0; i < inputs; ++i) {
        expected[at(f * hidden + h)] +=
            static_cast<double>(w1.data()[row * inputs + i]) * static_cast<double>(z.data()[f * inputs + i]);
      }
    }
  }
  cases::compare<T, T>(start, expected, static_cast<double>(inputs), p.bound, "preactivation");
  const Buffer<T> cut(few * hidden, lead);
  p.preactivation = cut.data();
  run(networks, 1);
  CHECK(start.same_bits(cut));

  // The last network by itself is the one it was among the others.
  const Buffer<T> last_w1(hidden * inputs, lead), last_b1(hidden, lead);
  p.preactivation = nullptr;
  p.first_network = networks - 1;
  p.w1 = last_w1.data();
  p.b1 = last_b1.data();
  run(1, 1);
  CHECK(std::memcmp(last_w1.data(), w1.data() + (networks - 1) * hidden * inputs, sizeof(T) * at(hidden * inputs)) == 0);
  CHECK(std::memcmp(last_b1.data(), b1.data() + (networks - 1) * hidden, sizeof(T) * at(hidden)) == 0);
}

void known_random_numbers() {
  check::context = "known random numbers";
  // The published answers of Philox4x32-10.
  const auto same = [](const Counter& a, const Counter& b) { return std::equal(a.words, a.words + 4, b.words); };
  const uint32_t f = 0xffffffffu;
  CHECK(same(naive_philox({{0, 0, 0, 0}}, 0, 0), {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}));
  CHECK(same(naive_philox({{f, f, f, f}}, f, f), {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}));
}

// ---- The samples of an epoch ----------------------------------------------------------------------------------------

__extension__ typedef unsigned __int128 wide;

void sampling() {
  check::context = "sampling";
  // below() is Lemire's: the high half of a 128-bit product, unless its low half is among those to reject.
  const uint64_t one = 1;
  for (const uint64_t bound : {one, 2 * one, 3 * one, 10 * one, one << 32, (one << 63) + 1, ~uint64_t{0}}) {
    RandomStream stream(7, 3), raw(7, 3);
    for (int i = 0; i < 200; ++i) {
      wide product = wide{raw.next()} * bound;
      while (static_cast<uint64_t>(product) < (0 - bound) % bound) product = wide{raw.next()} * bound;
      CHECK(stream.below(bound) == static_cast<uint64_t>(product >> 64));
    }
  }
  struct Groups {
    int64_t few, negatives;
    Ids sizes;
  };
  const Groups all[] = {{0, 0, {}},   {4, 0, {}},           {3, 5, {9}},             {3, 9, {9}},
                        {3, 20, {9}}, {2, 7, {4, 1, 3, 6}}, {0, 3, {1, 1, 1, 1, 1}}, {5, 8, {2, 2}}};
  for (const Groups& groups : all) {
    cases::describe("sampling", "int64",
                    {{"few", groups.few}, {"negatives", groups.negatives}, {"groups", groups.sizes.size()}});
    Ids offsets{0};
    for (const int64_t size : groups.sizes) offsets.push_back(offsets.back() + size);
    const int64_t base = offsets.back(), count = static_cast<int64_t>(groups.sizes.size());
    for (const uint64_t epoch : {1, 2, 80}) {
      Buffer<int64_t> permutation(base), order(groups.few + groups.negatives), again(groups.few + groups.negatives);
      std::iota(permutation.data(), permutation.data() + base, int64_t{0});
      const auto draw = [&](uint64_t number, const Buffer<int64_t>& into) {
        draw_epoch(groups.few, offsets.data(), count, groups.negatives, 11, number, permutation.data(), into.data());
        for (int64_t i = 0; i < base; ++i) CHECK(permutation.data()[i] == i);
      };
      draw(epoch, order);
      draw(epoch + 1, again);
      draw(epoch, again);
      CHECK(order.same_bits(again));  // a function of the seed and the epoch alone
      Ids drawn(order.data(), order.data() + order.size());
      std::sort(drawn.begin(), drawn.end());
      for (int64_t i = 0; i < groups.few; ++i) CHECK(drawn[at(i)] == i);
      for (int64_t g = 0; g < count; ++g) {
        const auto first = std::lower_bound(drawn.begin(), drawn.end(), groups.few + offsets[at(g)]);
        const auto last = std::lower_bound(drawn.begin(), drawn.end(), groups.few + offsets[at(g + 1)]);
        const int64_t here = last - first, each = groups.negatives / count;
        CHECK(here == each || (here == each + 1 && groups.negatives % count != 0));
        if (here <= groups.sizes[at(g)]) CHECK(std::adjacent_find(first, last) == last);
      }
    }
  }
}

template <typename T>
void test_all(const cpu::Kernels& kernels) {
  train_all<T>(kernels);
  divergence<T>(kernels);
  for (const int64_t samples : {1, 63, 64, 65}) cached_logits<T>(kernels, samples, 11, 3, 4, samples % 2 == 0);
  for (const int64_t classes : {2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33, 100}) cached_logits<T>(kernels, 5, classes, 1, 3, true);
  cached_logits<T>(kernels, 3, 9, 8, 30, false);  // one base class
  extreme_logits<T>(kernels);
  for (const int64_t samples : {0, 1, 63, 64, 65, 330}) validation<T>(kernels, samples, 12, 4, 3, 5);
  for (const int64_t classes : {2, 3, 5, 40}) validation<T>(kernels, 130, classes, 1, 2, 2);
  validation<T>(kernels, 100, 40, 30, 6, 1000);
  for (const bool shared : {false, true}) {
    for (const int64_t inputs : {1, 7, 15, 16, 31, 32, 33, 63, 64, 130}) initial_weights<T>(kernels, 3, 5, inputs, shared);
    initial_weights<T>(kernels, 1, 1, 4, shared);
  }
}

}  // namespace

int main() {
  known_random_numbers();
  sampling();
  exponential<float>();
  exponential<double>();
  const cpu::Kernels* tables[3];
  const int count = cpu::available_kernels(tables);
  for (int i = 0; i < count; ++i) {
    const int before = check::failures;
    test_all<float>(*tables[i]);
    test_all<double>(*tables[i]);
    std::printf("training kernels %s: %d failed\n", tables[i]->name, check::failures - before);
  }
  return check::finish("test_training");
}
