// The launchers' own text, on a GPU of fibers: how many launches a head takes, where blocks can wait for each other and where
// not, and what becomes of errors. That the kernels are right is test_cuda_kernels.cpp's matter.
#define SHIM_FIBERS 1

#include "cuda/head.cu"
#include "cuda/large_head.cu"
#include "cuda/train.cu"
#include "cuda/validate.cu"

#include <cstdlib>
#include <string>

#include "kernel_cases.h"

using namespace alphaext;

namespace {

// A variable of the environment, for as long as this lives.
struct Setting {
  Setting(const char* name_, const char* value) : name(name_) { setenv(name_, value, 1); }
  ~Setting() { unsetenv(name); }
  const char* name;
};

struct Counts {
  int plain, cooperative;
  bool operator==(const Counts& other) const { return plain == other.plain && cooperative == other.cooperative; }
};

template <typename Function>
Counts count(const Function& function) {
  shim::launches = shim::cooperative_launches = 0;
  const char* const message = function();
  if (message != nullptr) std::printf("%s\n", message);
  CHECK(message == nullptr);
  return {shim::launches, shim::cooperative_launches};
}

std::string text_of(const char* message) { return message != nullptr ? message : ""; }

// A head with a first layer for each class, from features or from logits.
struct Head {
  static constexpr int64_t batch = 5, features = 7, num_classes = 600, num_few = 9, hidden = 6, members = 4, inputs = 12;
  cases::Random random{3};
  const bool from_features;
  cases::Buffer<float> input, weight, bias, z, w1, b1, w2, b2;
  cases::Buffer<float> preactivation, raw, alpha, logits, scores;
  cases::Buffer<float> grad_scores, grad_bias, grad_z, grad_w1, grad_b1, grad_w2, grad_b2, grad_logits, grad_preactivation;
  cases::Buffer<int64_t> ids, entries, offsets;

  explicit Head(bool from_features_)
      : from_features(from_features_), input(random.uniform(batch * (from_features ? features : num_classes)), 0),
        weight(random.uniform(from_features ? num_classes * features : 0), 0), bias(random.uniform(num_classes), 0),
        z(random.uniform(num_few * inputs), 0), w1(random.uniform(num_few * hidden * inputs), 0),
        b1(random.uniform(num_few * hidden), 0), w2(random.uniform(num_few * members * hidden), 0),
        b2(random.uniform(num_few * members), 0), preactivation(num_few * hidden), raw(num_few * members),
        alpha(num_few * members), logits(random.uniform(from_features ? batch * num_classes : 0), 0),
        scores(batch * num_classes), grad_scores(random.uniform(batch * num_classes), 0), grad_bias(num_classes),
        grad_z(num_few * inputs), grad_w1(num_few * hidden * inputs), grad_b1(num_few * hidden),
        grad_w2(num_few * members * hidden), grad_b2(num_few * members), grad_logits(batch * num_classes),
        grad_preactivation(num_few * hidden), ids(num_few * members), entries(num_few * members), offsets(num_classes + 1) {
    const naive::Ids drawn = cases::random_members(random, num_classes, num_few, members);
    std::copy(drawn.begin(), drawn.end(), ids.data());
    std::iota(entries.data(), entries.data() + entries.size(), int64_t{0});
    std::stable_sort(entries.data(), entries.data() + entries.size(),
                     [&](int64_t a, int64_t b) { return ids.data()[a] < ids.data()[b]; });
    for (int64_t c = 0; c <= num_classes; ++c) {
      offsets.data()[c] = std::count_if(drawn.begin(), drawn.end(), [&](int64_t id) { return id < c; });
    }
  }

  HeadParams forward() const {
    return {ScalarType::Float32, {Rule::Clamp, 0.7, false}, batch, from_features ? features : num_classes, num_classes, num_few,
            hidden, members, inputs, false, false, input.data(), weight.data(), bias.data(), ids.data(), z.data(), w1.data(),
            b1.data(), w2.data(), b2.data(), preactivation.data(), raw.data(), alpha.data(), logits.data(), scores.data(), 1,
            nullptr};
  }
  // With everything that a large head can be asked for, or the weights of the sub-modules alone.
  HeadBackwardParams backward(bool all) const {
    return {ScalarType::Float32, {Rule::Clamp, 0.7, false}, batch, from_features ? features : num_classes, num_classes, num_few,
            hidden, members, inputs, false, false, input.data(), weight.data(), bias.data(), ids.data(), z.data(), w1.data(),
            w2.data(), preactivation.data(), raw.data(), alpha.data(), logits.data(), grad_scores.data(), nullptr, nullptr,
            all ? grad_bias.data() : nullptr, all ? grad_z.data() : nullptr, grad_w1.data(), grad_b1.data(), grad_w2.data(),
            grad_b2.data(), all ? grad_logits.data() : nullptr, nullptr, all ? grad_preactivation.data() : nullptr, 1, nullptr};
  }
  LargeHeadBackwardParams large_backward(bool all) const { return {backward(all), entries.data(), offsets.data(), false}; }
};

void test_launches() {
  for (const bool from_features : {false, true}) {
    check::context = from_features ? "launches, from features" : "launches, from logits";
    Head head(from_features), other(from_features);
    CHECK((count([&] { return cuda::large_head_forward({head.forward(), false}, 0, nullptr); }) == Counts{0, 1}));
    CHECK((count([&] { return cuda::large_head_backward(head.large_backward(true), 0, nullptr); }) == Counts{0, 1}));
    // What asks for no sum over classes waits for nobody.
    CHECK((count([&] { return cuda::large_head_backward(head.large_backward(false), 0, nullptr); }) == Counts{1, 0}));
    {
      const Setting alone("SHIM_COOPERATES", "0");
      CHECK(!cuda::fuses_head(ScalarType::Float32, 5, 600, 4, 0) && !cuda::can_train(0));
      CHECK((count([&] { return cuda::large_head_forward({other.forward(), false}, 0, nullptr); }) == Counts{3, 0}));
      CHECK((count([&] { return cuda::large_head_backward(other.large_backward(true), 0, nullptr); }) == Counts{2, 0}));
    }
    CHECK(head.scores.same_bits(other.scores) && head.alpha.same_bits(other.alpha));
    CHECK(head.grad_w1.same_bits(other.grad_w1) && head.grad_z.same_bits(other.grad_z));
    CHECK(head.grad_bias.same_bits(other.grad_bias) && head.grad_logits.same_bits(other.grad_logits));
    // The same with the products inside.
    CHECK(cuda::fuses_head(ScalarType::Float32, 5, 600, 4, 0) && cuda::can_train(0));
    CHECK((count([&] { return cuda::head_forward(other.forward(), 0, nullptr); }) == Counts{0, 1}));
    HeadBackwardParams weights = other.backward(false);
    CHECK((count([&] { return cuda::head_backward(weights, 0, nullptr); }) == Counts{1, 0}));
    CHECK(head.preactivation.same_bits(other.preactivation) && head.alpha.same_bits(other.alpha));
  }
}

// A device of another size, and so another grid, gives the same bits.
void test_sizes_of_the_device() {
  check::context = "sizes of the device";
  const Head one(true), two(true);
  CHECK(cuda::large_head_forward({one.forward(), false}, 0, nullptr) == nullptr);
  CHECK(cuda::large_head_backward(one.large_backward(true), 0, nullptr) == nullptr);
  const Setting processors("SHIM_PROCESSORS", "5"), blocks("SHIM_BLOCKS", "2");
  CHECK(cuda::large_head_forward({two.forward(), false}, 0, nullptr) == nullptr);
  CHECK(cuda::large_head_backward(two.large_backward(true), 0, nullptr) == nullptr);
  CHECK(one.scores.same_bits(two.scores) && one.grad_w1.same_bits(two.grad_w1) && one.grad_bias.same_bits(two.grad_bias));
}

// No more blocks wait for each other than are allowed, with the same bits; launches without waiting are not cut.
void test_allowed_blocks() {
  check::context = "allowed blocks";
  const Setting processors("SHIM_PROCESSORS", "5");
  const Head free(true), cut(true);
  CHECK(cuda::head_forward(free.forward(), 0, nullptr) == nullptr && shim::last_blocks == 5);
  CHECK(cuda::large_head_backward(free.large_backward(true), 0, nullptr) == nullptr && shim::last_blocks == 5);
  const Setting most("ALPHAEXT_COOPERATIVE_BLOCKS", "2");
  CHECK(cuda::head_forward(cut.forward(), 0, nullptr) == nullptr && shim::last_blocks == 2);
  CHECK(cuda::large_head_backward(cut.large_backward(true), 0, nullptr) == nullptr && shim::last_blocks == 2);
  CHECK(free.scores.same_bits(cut.scores) && free.grad_w1.same_bits(cut.grad_w1) && free.grad_z.same_bits(cut.grad_z));
  CHECK(cuda::large_head_backward(cut.large_backward(false), 0, nullptr) == nullptr && shim::last_blocks == 5);
  for (const char* const value : {"0", "-3", "2.5", "many"}) {
    const Setting wrong("ALPHAEXT_COOPERATIVE_BLOCKS", value);
    const std::string message = text_of(cuda::head_forward(cut.forward(), 0, nullptr));
    CHECK(message.find("from 1 on, got '" + std::string(value) + "'") != std::string::npos);
  }
}

void test_crossing_point() {
  check::context = "crossing point";
  const auto fuses = [](int64_t batch, int64_t classes, int64_t members = 6, ScalarType dtype = ScalarType::Float32) {
    return cuda::fuses_head(dtype, batch, classes, members, 0);
  };
  for (const ScalarType dtype : {ScalarType::Float32, ScalarType::Float64}) {
    CHECK(fuses(100, 10'000, 6, dtype) && !fuses(101, 10'000, 6, dtype));
  }
  for (const ScalarType dtype : {ScalarType::Float16, ScalarType::BFloat16}) {
    CHECK(fuses(250, 1'000, 6, dtype) && !fuses(251, 1'000, 6, dtype));
  }
  CHECK(fuses(1, 8, 6016) && !fuses(1, 8, 6017));
  const Setting never("ALPHAEXT_FUSED_SCORES", "0");
  CHECK(!fuses(1, 1));
}

void test_errors() {
  check::context = "errors";
  const Head head(true);
  const std::string no_device = text_of(cuda::large_head_forward({head.forward(), false}, 7, nullptr));
  CHECK(no_device.find("large_head_forward: cudaErrorInvalidDevice") != std::string::npos);
  CHECK(cudaGetLastError() == cudaErrorInvalidDevice);
  {
    const Setting none("SHIM_BLOCKS", "0");
    const std::string too_large = text_of(cuda::head_forward(head.forward(), 0, nullptr));
    CHECK(too_large.find("head_forward: cudaErrorCooperativeLaunchTooLarge") != std::string::npos);
  }
  LargeHeadBackwardParams without = head.large_backward(true);
  without.entry_offsets = nullptr;
  CHECK(text_of(cuda::large_head_backward(without, 0, nullptr)).find("needs entries") != std::string::npos);
  LargeHeadBackwardParams many = head.large_backward(false);
  many.head.members = 6017;
  CHECK(text_of(cuda::large_head_backward(many, 0, nullptr)).find("need grad_raw") != std::string::npos);
  // An error is reported by the call that had it, and by no later one.
  CHECK(cuda::large_head_forward({head.forward(), false}, 0, nullptr) == nullptr && cudaGetLastError() == cudaSuccess);
}

void test_training_plans() {
  check::context = "training plans";
  TrainRunsParams params{};
  TrainParams& p = params.first;
  p.dtype = ScalarType::Float32;
  params.runs = 1;
  p.num_few = 12;
  p.members = 6;
  p.tiles = 32;
  p.batch = 64;
  p.samples = 64;
  cuda::TrainPlan plan{};
  CHECK(cuda::plan_training(params, &plan, 0) == nullptr);
  // More than 48 KiB had to be asked for, and was; two processors of one block each.
  CHECK(plan.resident && plan.shared_bytes > 48 * 1024 && plan.blocks == 2 && plan.classes == 6);
  {
    const Setting most("ALPHAEXT_COOPERATIVE_BLOCKS", "1");
    CHECK(cuda::plan_training(params, &plan, 0) == nullptr && plan.blocks == 1 && plan.runs_at_once == 1);
    const Setting wrong("ALPHAEXT_COOPERATIVE_BLOCKS", "none");
    CHECK(text_of(cuda::plan_training(params, &plan, 0)).find("train_epoch: ALPHAEXT_COOPERATIVE_BLOCKS") != std::string::npos);
  }
  CHECK(cuda::plan_training(params, &plan, 0) == nullptr);
  {
    const Setting small("SHIM_SHARED", "65536");
    CHECK(cuda::plan_training(params, &plan, 0) == nullptr);
    CHECK(!plan.resident && plan.shared_bytes <= 65536);
  }
  {
    const Setting alone("SHIM_COOPERATES", "0");
    CHECK(text_of(cuda::plan_training(params, &plan, 0)).find("cudaErrorNotSupported") != std::string::npos);
  }
  CHECK(text_of(cuda::plan_training(params, &plan, 3)).find("cudaErrorInvalidDevice") != std::string::npos);
}

}  // namespace

int main() {
  test_launches();
  test_sizes_of_the_device();
  test_allowed_blocks();
  test_crossing_point();
  test_errors();
  test_training_plans();
  return check::finish("test_cuda_launchers");
}
