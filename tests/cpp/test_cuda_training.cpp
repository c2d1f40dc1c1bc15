// The CUDA form of the training engine, its own text on CPU threads, against the CPU engine: one epoch of one and of several
// runs under every cut of the work, which must not change a bit, and validation.
#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/train.cuh"
#include "cuda/validate.cuh"

#include "check.h"

using namespace alphaext;

namespace {

struct Sizes {
  int64_t num_few, members, tiles, batch, samples, rows, columns;
  bool shared = false;
  bool separate_logits = false;
  bool penalized = false;  // with penalty and few_offset
};

// Memory of the exact size, so that the sanitizers see every step beyond it.
struct Bytes {
  Bytes(int64_t size, int fill) : size(size), data(static_cast<unsigned char*>(operator new(size, std::align_val_t(256)))) {
    std::memset(data, fill, static_cast<size_t>(size));
  }
  ~Bytes() { operator delete(data, std::align_val_t(256)); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  const int64_t size;
  unsigned char* const data;
};

struct Run {
  RuleParams rule;
  SgdParams sgd;
  int64_t samples = -1;  // of its row of `order`; -1: all
};

// The stacked arrays of some runs, and the launch parameters that point into them.
template <typename T>
struct Problem {
  Problem(const Sizes& sizes, const std::vector<Run>& runs, unsigned seed) : sizes(sizes), runs(runs) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto draw = [&](int64_t count, double scale) {
      std::vector<T> values(static_cast<size_t>(count));
      for (T& value : values) value = static_cast<T>(scale * normal(random));
      return values;
    };
    const auto index = [&](int64_t count) { return static_cast<int64_t>(random() % static_cast<unsigned>(count)); };
    const int64_t count = static_cast<int64_t>(runs.size()), few = sizes.num_few, networks = sizes.shared ? 1 : few;
    const int64_t rows = sizes.rows * (sizes.separate_logits ? count : 1);
    state = draw(count * state_size(), 0.3);
    b2 = draw(count * networks * sizes.members, 0.3);
    b2_momentum = draw(count * networks * sizes.members, 0.1);
    alpha = raw = draw(count * few * sizes.members, 1);
    member_logits = draw(rows * sizes.columns, 1.5);
    base_logsumexp = draw(rows, 1);
    label_logit = draw(rows, 1);
    scale = draw(count * few * (sizes.shared ? few : 1), 0.1);
    if (sizes.penalized) {
      penalty = draw(count * 2 * sizes.members, 0.3);
      few_offset = draw(count * few, 1);
    }
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t f = 0; f < few; ++f) {
        const int64_t own = r * few + f;
        scale[static_cast<size_t>(sizes.shared ? own * few + f : own)] = T(1.5);
      }
      for (int64_t i = 0; i < sizes.samples; ++i) order.push_back(index(sizes.rows));
      for (int64_t i = 0; i < few * sizes.members; ++i) columns.push_back(static_cast<int32_t>(index(sizes.columns)));
      const Run& run = runs[static_cast<size_t>(r)];
      for (const double value :
           {run.rule.gamma, static_cast<double>(run.rule.rule), run.rule.projected_gradient ? 1.0 : 0.0, run.sgd.lr,
            run.sgd.momentum, run.sgd.dampening, run.sgd.weight_decay, run.sgd.nesterov ? 1.0 : 0.0,
            run.sgd.first_step ? 1.0 : 0.0, static_cast<double>(run.samples < 0 ? sizes.samples : run.samples)}) {
        settings.push_back(value);
      }
    }
    for (int64_t i = 0; i < rows; ++i) few_of_label.push_back(static_cast<int32_t>(index(few + 1)) - 1);
    results.assign(static_cast<size_t>(count * 3), -7);
  }

  int64_t state_size() const {
    return (sizes.shared ? 1 : sizes.num_few) * sizes.tiles * (2 * (sizes.shared ? sizes.num_few : 1) + 2 * sizes.members) *
           kTileWidth;
  }

  TrainRunsParams params() {
    TrainRunsParams p{};
    p.first = run_params(0);
    p.runs = static_cast<int64_t>(runs.size());
    p.rows = sizes.rows;
    p.separate_logits = sizes.separate_logits;
    p.settings = settings.data();
    p.results = results.data();
    p.first.samples = sizes.samples;
    return p;
  }

  // One run for the CPU engine.
  TrainParams run_params(int64_t r) {
    const int64_t few = sizes.num_few, networks = sizes.shared ? 1 : few, rows = sizes.separate_logits ? r * sizes.rows : 0;
    const Run& run = runs[static_cast<size_t>(r)];
    TrainParams p{};
    p.dtype = sizeof(T) == 8 ? ScalarType::Float64 : ScalarType::Float32;
    p.rule = run.rule;
    p.sgd = run.sgd;
    p.num_few = few, p.members = sizes.members, p.tiles = sizes.tiles, p.columns = sizes.columns;
    p.samples = run.samples < 0 ? sizes.samples : run.samples;
    p.batch = sizes.batch;
    p.shared = sizes.shared;
    p.order = order.data() + r * sizes.samples;
    p.member_logits = member_logits.data() + rows * sizes.columns;
    p.base_logsumexp = base_logsumexp.data() + rows;
    p.label_logit = label_logit.data() + rows;
    p.few_of_label = few_of_label.data() + rows;
    p.member_columns = columns.data() + r * few * sizes.members;
    p.gradient_scale = scale.data() + r * few * (sizes.shared ? few : 1);
    p.penalty = sizes.penalized ? penalty.data() + r * 2 * sizes.members : nullptr;
    p.few_offset = sizes.penalized ? few_offset.data() + r * few : nullptr;
    p.state = state.data() + r * state_size();
    p.b2 = b2.data() + r * networks * sizes.members;
    p.b2_momentum = b2_momentum.data() + r * networks * sizes.members;
    p.alpha = alpha.data() + r * few * sizes.members;
    p.raw = raw.data() + r * few * sizes.members;
    return p;
  }

  // On the CPU, run after run.
  void train() {
    for (int64_t r = 0; r < static_cast<int64_t>(runs.size()); ++r) {
      TrainParams p = run_params(r);
      const Bytes workspace(train_workspace_bytes(p), 0);
      p.workspace = workspace.data;
      const TrainResult result = cpu::kernels().train_epoch(p);
      double* const values = results.data() + 3 * r;
      values[0] = result.loss;
      values[1] = static_cast<double>(result.failed_step);
      values[2] = static_cast<double>(result.failed_class);
    }
  }

  // The kernel, with `blocks` to a run.
  void train_on_device(bool resident, int64_t blocks, int64_t runs_at_once, unsigned threads, bool with_settings = true) {
    TrainRunsParams p = params();
    if (!with_settings) p.settings = nullptr;
    cuda::TrainPlan plan = cuda::train_plan_with(p, resident, blocks, runs_at_once);
    if (resident) plan.shared_bytes = cuda::train_arena(p.first, true, plan.classes, plan.tiles).bytes;
    const Bytes workspace(plan.workspace_bytes, 0xff);
    std::memset(workspace.data, 0, static_cast<size_t>(cuda::train_meeting_bytes(plan)));
    p.workspace = workspace.data;
    const shim::LaunchConfig config{.grid = static_cast<unsigned>(blocks * runs_at_once),
                                    .block = threads,
                                    .shared_bytes = static_cast<std::size_t>(plan.shared_bytes),
                                    .cooperative = true};
    if (sizes.shared) {
      shim::launch(resident ? cuda::train_kernel<T, true, true> : cuda::train_kernel<T, false, true>, config, p, plan);
    } else {
      shim::launch(resident ? cuda::train_kernel<T, true, false> : cuda::train_kernel<T, false, false>, config, p, plan);
    }
  }

  Sizes sizes;
  std::vector<Run> runs;
  std::vector<T> state, b2, b2_momentum, alpha, raw, member_logits, base_logsumexp, label_logit, scale, penalty, few_offset;
  std::vector<int64_t> order;
  std::vector<int32_t> columns, few_of_label;
  std::vector<double> settings, results;
};

template <typename T>
bool same_bits(const std::vector<T>& one, const std::vector<T>& two) {
  return one.size() == two.size() && (one.empty() || std::memcmp(one.data(), two.data(), one.size() * sizeof(T)) == 0);
}

template <typename T>
void check_same_bits(const Problem<T>& one, const Problem<T>& two) {
  CHECK(same_bits(one.state, two.state) && same_bits(one.b2, two.b2) && same_bits(one.b2_momentum, two.b2_momentum));
  CHECK(same_bits(one.alpha, two.alpha) && same_bits(one.raw, two.raw) && same_bits(one.results, two.results));
}

template <typename T>
void check_array(const std::vector<T>& actual, const std::vector<T>& expected, int64_t begin, int64_t end, double tolerance) {
  for (int64_t i = begin; i < end; ++i) {
    const double wanted = static_cast<double>(expected[static_cast<size_t>(i)]);
    CHECK_CLOSE(actual[static_cast<size_t>(i)], wanted, tolerance * std::max(1.0, std::fabs(wanted)));
  }
}

// A few steps' rounding, in the largest of some thousand numbers.
template <typename T>
constexpr double kTolerance = sizeof(T) == 8 ? 1e-9 : 1e-4;

template <typename T>
void check_results(const Problem<T>& actual, const Problem<T>& expected) {
  const int64_t count = static_cast<int64_t>(expected.runs.size());
  const auto part = [&](const auto& array) { return static_cast<int64_t>(array.size()) / count; };
  for (int64_t r = 0; r < count; ++r) {
    const double* const wanted = expected.results.data() + 3 * r;
    const double* const got = actual.results.data() + 3 * r;
    CHECK(got[1] == wanted[1] && got[2] == wanted[2]);
    if (wanted[1] >= 0) continue;  // the state is of no use
    CHECK_CLOSE(got[0], wanted[0], kTolerance<T> * std::max(1.0, std::fabs(wanted[0])));
    const auto close = [&](const std::vector<T>& one, const std::vector<T>& two) {
      check_array(one, two, r * part(two), (r + 1) * part(two), kTolerance<T>);
    };
    close(actual.state, expected.state);
    close(actual.b2, expected.b2);
    close(actual.b2_momentum, expected.b2_momentum);
    close(actual.raw, expected.raw);
    close(actual.alpha, expected.alpha);
  }
}

constexpr SgdParams kPlain{0.1, 0.9, 0, 0, false, true};

std::vector<RuleParams> all_rules() {
  return {{Rule::Softmax, 0.7, false}, {Rule::Softmax, 0.5, true}, {Rule::Clamp, 0.7, false},
          {Rule::Clamp, 0.4, true},    {Rule::L1, 1.0, false}};
}

struct Cut {
  bool resident;
  int64_t blocks, runs_at_once;
  unsigned threads;
};

// Trains under every cut; the first is compared with the CPU, the others with the first.
template <typename T>
void test_cuts(const char* name, const Sizes& sizes, const std::vector<Run>& runs, const std::vector<Cut>& cuts) {
  check::context = name;
  Problem<T> expected(sizes, runs, 5);
  const Problem<T> start = expected;
  expected.train();
  Problem<T> first = start;
  for (size_t i = 0; i < cuts.size(); ++i) {
    Problem<T> actual = start;
    actual.train_on_device(cuts[i].resident, cuts[i].blocks, cuts[i].runs_at_once, cuts[i].threads);
    if (i == 0) {
      check_results(actual, expected);
      first = actual;
    } else {
      check_same_bits(actual, first);
    }
  }
}

template <typename T>
void test_options() {
  // Every rule, every option of SGD, going on from an earlier epoch or not; the last batch is a partial one.
  std::vector<Run> runs;
  for (const RuleParams& rule : all_rules()) runs.push_back({rule, kPlain});
  runs.push_back({{Rule::Clamp, 0.7, false}, {0.1, 0, 0, 0, false, true}});
  runs.push_back({{Rule::Softmax, 0.7, false}, {0.05, 0.9, 0, 0.01, true, false}});
  runs.push_back({{Rule::L1, 0.7, false}, {0.05, 0.8, 0.3, 0.02, false, true}});
  runs.push_back({{Rule::Clamp, 0.7, true}, {0.05, 0.8, 0.3, 0.02, false, false}});
  runs.push_back({{Rule::Clamp, 0.7, false}, kPlain, 5});
  runs.push_back({{Rule::Clamp, 0.7, false}, kPlain, 0});
  // In waves of 1, 3 and of all at once.
  test_cuts<T>("options", {5, 6, 1, 7, 9, 23, 11}, runs, {{true, 2, 3, 32}, {false, 1, 11, 32}});
  test_cuts<T>("options, separate logits", {3, 4, 2, 7, 16, 9, 5, false, true}, {runs[3], runs[6], runs[9]},
               {{true, 3, 1, 32}, {false, 2, 2, 32}});
  test_cuts<T>("options, shared network", {4, 3, 3, 6, 8, 23, 11, true}, {runs[0], runs[3], runs[4], runs[6], runs[8]},
               {{true, 4, 1, 32}, {false, 1, 2, 32}});
  for (const bool shared : {false, true}) {
    test_cuts<T>("options, penalty and offset", {4, 3, 2, 6, 8, 23, 11, shared, false, true}, {runs[1], runs[3], runs[6], runs[9]},
                 {{true, 2, 2, 32}, {false, 1, 4, 32}});
  }
  test_cuts<T>("options, no hidden units", {4, 9, 0, 6, 8, 23, 11, false, false, true}, {runs[2], runs[7], runs[8]},
               {{true, 2, 2, 32}, {false, 4, 1, 32}});
}

template <typename T>
void test_sizes() {
  const std::vector<Run> run{{{Rule::Clamp, 0.7, false}, kPlain}}, two{run[0], {{Rule::Softmax, 0.9, false}, kPlain}};
  // More hidden units than the slices' warps take at once, a batch of more than a warp, more classes than are in flight.
  test_cuts<T>("hidden units", {2, 6, 19, 37, 80, 50, 7}, run, {{true, 2, 1, 64}, {false, 1, 1, 32}});
  test_cuts<T>("hidden units, other members", {2, 2, 19, 3, 7, 50, 7}, run, {{true, 1, 1, 64}, {false, 2, 1, 32}});
  test_cuts<T>("classes", {75, 2, 1, 5, 9, 20, 30}, two, {{true, 3, 2, 32}, {false, 2, 1, 32}});
  test_cuts<T>("many members", {2, 35, 1, 4, 8, 20, 30}, run, {{true, 2, 1, 32}, {false, 1, 1, 32}});
  test_cuts<T>("one of each", {1, 2, 1, 1, 1, 1, 1}, run, {{true, 1, 1, 32}, {false, 1, 1, 32}});
  test_cuts<T>("more tiles than classes", {2, 3, 5, 4, 8, 9, 6, true}, two, {{true, 5, 1, 32}, {false, 3, 2, 32}});
}

// What does not come from `settings` comes from the parameters.
template <typename T>
void test_without_settings() {
  check::context = "without settings";
  Problem<T> expected({3, 3, 1, 4, 10, 9, 6}, {{{Rule::L1, 0.8, false}, {0.1, 0.9, 0.1, 0.01, false, true}}}, 5);
  Problem<T> actual = expected, again = expected;
  expected.train();
  actual.train_on_device(true, 2, 1, 32, false);
  check_results(actual, expected);
  again.train_on_device(true, 2, 1, 32, true);
  check_same_bits(again, actual);
}

// Runs that end early, beside one that does not.
template <typename T>
void test_failures() {
  const Run good{{Rule::Clamp, 0.7, false}, kPlain};
  const double huge = sizeof(T) == 8 ? 1e200 : 1e30;
  const std::vector<Run> runs{good, {{Rule::Clamp, 0.7, false}, {huge, 0.9, 0, 0, false, true}},
                              {{Rule::Softmax, 0.7, false}, {huge, 0.9, 0, 0, false, true}}, good, good};
  for (const bool shared : {false, true}) {
    check::context = shared ? "failures, shared network" : "failures";
    const Sizes sizes{4, 3, 2, 5, 12, 9, 6, shared, true};
    Problem<T> expected(sizes, runs, 5);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    // Run 3: a class's output bias is NaN from the start.
    expected.b2[static_cast<size_t>(shared ? 3 * 3 + 1 : 3 * 12 + 2 * 3 + 1)] = static_cast<T>(nan);
    Problem<T> actual = expected;
    expected.train();
    actual.train_on_device(true, 3, 2, 32);
    CHECK(expected.results[1] == -1 && expected.results[4] >= 0 && expected.results[7] >= 0);
    CHECK(expected.results[10] == 0 && expected.results[11] == (shared ? 0 : 2) && expected.results[13] == -1);
    check_results(actual, expected);
  }

  check::context = "failures of scores";
  const double infinity = std::numeric_limits<double>::infinity();
  for (const bool resident : {true, false}) {
    Problem<T> start({4, 3, 1, 5, 12, 9, 8}, {good}, 5);
    for (int64_t i = 0; i < 12; ++i) start.columns[static_cast<size_t>(i)] = static_cast<int32_t>(i / 3 == 2 ? 1 : 0);
    for (size_t i = 0; i < start.order.size(); ++i) start.order[i] = i == 7 ? 8 : static_cast<int64_t>(i) % 8;
    const size_t row = 8;
    start.few_of_label[row] = -1;
    const auto train = [&](Problem<T> problem) {
      problem.train_on_device(resident, 2, 1, 32);
      return problem.results;
    };
    Problem<T> bad = start;
    bad.member_logits[row * 8 + 1] = static_cast<T>(infinity);  // a column of class 2 alone
    std::vector<double> result = train(bad);
    CHECK(result[1] == 1 && result[2] == 2 && !std::isfinite(result[0]));
    bad = start;
    bad.label_logit[row] = -static_cast<T>(infinity);  // no class's doing
    result = train(bad);
    CHECK(result[1] == 1 && result[2] == -1 && result[0] == infinity);
    bad = start;
    bad.base_logsumexp[row] = static_cast<T>(std::numeric_limits<double>::quiet_NaN());
    result = train(bad);
    CHECK(result[1] == 1 && result[2] == -1);
    // Indices that nobody has checked end the run and become no address.
    for (const int64_t outside : {int64_t{-1}, int64_t{9}, std::numeric_limits<int64_t>::max()}) {
      bad = start;
      bad.order[7] = outside;
      result = train(bad);
      CHECK(result[1] == 1 && result[2] == 0);
    }
    bad = start;
    bad.few_of_label[row] = 4;
    result = train(bad);
    CHECK(result[1] == 1 && result[2] == -1);
    for (const int32_t outside : {-1, 8}) {
      bad = start;
      bad.columns[3] = outside;
      result = train(bad);
      CHECK(result[1] == 0 && result[2] == 1);
    }
  }
}

template <typename T>
void test_validation(int64_t samples, int64_t num_few, int64_t members, int64_t runs, bool ties) {
  check::context = "validation";
  std::mt19937 random(static_cast<unsigned>(samples));
  std::normal_distribution<double> normal;
  const int64_t columns = 9, num_classes = num_few + 7, blocks = rounded_up(samples, kBlockSamples) / kBlockSamples;
  // Ties come about by few different values.
  const auto draw = [&](int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    for (T& value : values) value = ties ? static_cast<T>(random() % 3) : static_cast<T>(normal(random));
    return values;
  };
  std::vector<T> alpha = draw(runs * num_few * members), logits = draw(blocks * columns * kBlockSamples),
                 label_logit = draw(samples), top_logits = draw(samples * kTopClasses);
  std::vector<int32_t> member_columns, few_classes, top_ids, few_of_label;
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < runs * num_few * members; ++i) member_columns.push_back(static_cast<int32_t>(random() % columns));
  for (int64_t f = 0; f < num_few; ++f) few_classes.push_back(static_cast<int32_t>(num_classes - 1 - f));
  for (int64_t b = 0; b < samples; ++b) {
    labels.push_back(static_cast<int64_t>(random() % static_cast<unsigned>(num_classes)));
    few_of_label.push_back(labels.back() >= 7 ? static_cast<int32_t>(num_classes - 1 - labels.back()) : -1);
    std::sort(top_logits.begin() + b * kTopClasses, top_logits.begin() + (b + 1) * kTopClasses, std::greater<T>());
    for (int i = 0; i < kTopClasses; ++i) top_ids.push_back(i);
  }
  ValidateParams p{};
  p.dtype = sizeof(T) == 8 ? ScalarType::Float64 : ScalarType::Float32;
  p.num_few = num_few, p.members = members, p.columns = columns, p.samples = samples, p.num_classes = num_classes;
  p.alpha = alpha.data(), p.member_columns = member_columns.data(), p.few_classes = few_classes.data();
  p.member_logits = logits.data(), p.label_logit = label_logit.data(), p.top_logits = top_logits.data();
  p.top_ids = top_ids.data(), p.labels = labels.data(), p.few_of_label = few_of_label.data();
  std::vector<int64_t> expected(static_cast<size_t>(runs * 2 * num_classes), 0), actual;
  for (int64_t r = 0; r < runs; ++r) {
    ValidateParams one = p;
    one.alpha = alpha.data() + r * num_few * members;
    one.member_columns = member_columns.data() + r * num_few * members;
    one.hits = expected.data() + r * 2 * num_classes;
    const Bytes workspace(validate_workspace_bytes(one), 0);
    one.workspace = workspace.data;
    cpu::kernels().validate(one, 0, blocks);
  }
  for (const unsigned threads : {32u, 64u, 160u}) {
    actual.assign(expected.size(), 0);
    p.hits = actual.data();
    const ValidateRunsParams all{p, runs};
    const cuda::LaunchShape shape = cuda::validate_shape(all, static_cast<int>(threads));
    if (shape.blocks == 0) continue;
    const unsigned grid = static_cast<unsigned>(std::min<int64_t>(shape.blocks, 3));
    shim::launch(cuda::validate_kernel<T>, {.grid = grid, .block = threads}, all);
    CHECK(same_bits(actual, expected));
  }
}

// Every class's score has a place of its own, and a stripe's next class is the next element or in the next vector.
template <typename T>
void test_score_places() {
  check::context = "score places";
  for (const int64_t num_few : {1, 7, 8, 33, 136}) {
    TrainParams p{};
    p.num_few = num_few, p.batch = 33;
    const cuda::ScorePlaces<T> places(p);
    std::vector<int> uses(static_cast<size_t>(places.all()), 0);
    for (int f = 0; f < static_cast<int>(num_few); ++f) {
      for (int b = 0; b < 64; ++b) {
        ++uses.at(static_cast<size_t>(places.of(f, b)));
        const int place = f / cuda::kStripes;
        CHECK(places.of(f, b) == places.vector(f % cuda::kStripes, place / places.kSize, b) * places.kSize + place % places.kSize);
      }
    }
    const int64_t used = std::count(uses.begin(), uses.end(), 1), free = std::count(uses.begin(), uses.end(), 0);
    CHECK(used == num_few * 64 && used + free == places.all());
  }
  CHECK(cuda::shift_for(1) == 0 && cuda::shift_for(2) == 1 && cuda::shift_for(6) == 3 && cuda::shift_for(8) == 3);
}

// Which cut is chosen, for the sizes of ImageNet-LT on a card of 132 multiprocessors with 227 KB of shared memory each.
void test_plans() {
  check::context = "plans";
  TrainParams p{};
  p.dtype = ScalarType::Float32;
  p.num_few = 136, p.members = 6, p.tiles = 32, p.columns = 1000, p.batch = 64, p.samples = 3286;
  const auto plan_for = [&](int64_t runs, int64_t threads = 512, int64_t most_blocks = 1000) {
    TrainRunsParams params{};
    params.first = p;
    params.runs = runs;
    return cuda::choose_train_plan(params, 132, 226 * 1024, most_blocks, [&](bool, int64_t bytes) {
      return std::min<int64_t>(512 / threads, bytes > 0 ? 226 * 1024 / bytes : 4);
    });
  };
  const cuda::TrainPlan one = plan_for(1), many = plan_for(90);
  CHECK(one.resident && one.runs_at_once == 1 && one.blocks <= 132 && one.classes * one.blocks >= 136);
  CHECK(many.resident && many.runs_at_once * many.blocks <= 132 && many.runs_at_once >= 4 && many.shared_bytes <= 226 * 1024);
  // No more blocks than are allowed: more classes each, or fewer runs at once.
  CHECK(plan_for(1, 512, 30).resident && plan_for(1, 512, 30).blocks <= 30);
  CHECK(plan_for(90, 512, 50).resident && plan_for(90, 512, 50).blocks * plan_for(90, 512, 50).runs_at_once <= 50);
  CHECK(!plan_for(1, 512, 5).resident && plan_for(1, 512, 5).blocks == 5);
  p.tiles = 4000;
  const cuda::TrainPlan wide = plan_for(2);
  CHECK(!wide.resident && wide.shared_bytes == 0 && wide.blocks == 132 && wide.runs_at_once == 1);
  p.tiles = 32;
  p.num_few = 3224;
  CHECK(!plan_for(1).resident && plan_for(1).blocks == 132 && plan_for(1).classes == 25);
  p.num_few = 136;
  p.shared = true;
  CHECK(plan_for(1).resident && plan_for(1).tiles == 1);
  CHECK(plan_for(1, 1024).blocks == 0);
  // A batch of which a block could not number what it owns.
  p.shared = false;
  p.batch = int64_t{1} << 30;
  CHECK(plan_for(1).blocks == 0);
}

template <typename T>
void test_all() {
  test_options<T>();
  test_sizes<T>();
  test_without_settings<T>();
  test_failures<T>();
  for (const bool ties : {false, true}) {
    test_validation<T>(150, 5, 6, 1, ties);
    test_validation<T>(65, 11, 3, 3, ties);
    test_validation<T>(0, 2, 2, 2, ties);
  }
}

}  // namespace

int main() {
  test_plans();
  test_score_places<float>();
  test_score_places<double>();
  test_all<float>();
  test_all<double>();
  return check::finish("test_cuda_training");
}
