// The samples of an epoch: which, and in what order. Plain C++, so that every engine and every backend draws the same ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace alphaext {

// SplitMix64: a stream of 64-bit numbers that is a function of (seed, epoch) alone, so that an epoch can be drawn again
// without those before it: nothing of it needs to be saved to resume a training.
class RandomStream {
 public:
  RandomStream(uint64_t seed, uint64_t epoch) : state_(mix(seed) ^ mix(epoch + 0x632be59bd9b4e019u)) {}

  uint64_t next() { return mix(state_ += kStep); }

  // Uniform in [0, bound), bound > 0: Lemire's multiplication, which rejects the few values that would favour some results.
  uint64_t below(uint64_t bound) {
    const uint64_t reject = (0 - bound) % bound;
    while (true) {
      const uint64_t value = next();
      const uint64_t low = value * bound;
      if (low >= reject) return high_half(value, bound);
    }
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;

  static uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
  }

  static uint64_t high_half(uint64_t a, uint64_t b) {
    const uint64_t a_low = a & 0xffffffffu, a_high = a >> 32, b_low = b & 0xffffffffu, b_high = b >> 32;
    const uint64_t middle = a_high * b_low + ((a_low * b_low) >> 32);
    const uint64_t carry = (middle & 0xffffffffu) + a_low * b_high;
    return a_high * b_high + (middle >> 32) + (carry >> 32);
  }

  uint64_t state_;
};

// Moves a random choice of `count` of the first `size` elements to the front, in random order (Fisher and Yates).
inline void shuffle_front(RandomStream& random, int64_t* values, int64_t size, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t other = i + static_cast<int64_t>(random.below(static_cast<uint64_t>(size - i)));
    std::swap(values[i], values[other]);
  }
}

// Draws an epoch: all `num_few` few samples, numbered 0 .. num_few-1, and `negatives` base samples, numbered from num_few on,
// in random order into order[num_few + negatives].
//
// The base samples come in groups, group g being those from group_offsets[g] to group_offsets[g + 1]. Every group gives equally
// many; what is left over after the division, one each from groups chosen at random. So one group draws uniformly over images,
// a group a class draws class-balanced. Within a group they are drawn without replacement, unless more are asked of it than it
// has. `permutation` holds 0, 1, 2, ... for all base samples, and does again on return.
inline void draw_epoch(int64_t num_few, const int64_t* group_offsets, int64_t groups, int64_t negatives, uint64_t seed,
                       uint64_t epoch, int64_t* permutation, int64_t* order) {
  RandomStream random(seed, epoch);
  for (int64_t i = 0; i < num_few; ++i) order[i] = i;
  int64_t* next = order + num_few;
  if (negatives > 0) {
    const int64_t each = negatives / groups, left_over = negatives % groups;
    std::vector<int64_t> chosen(static_cast<size_t>(groups));
    for (int64_t g = 0; g < groups; ++g) chosen[static_cast<size_t>(g)] = g;
    shuffle_front(random, chosen.data(), groups, left_over);
    std::vector<int64_t> quota(static_cast<size_t>(groups), each);
    for (int64_t i = 0; i < left_over; ++i) ++quota[static_cast<size_t>(chosen[static_cast<size_t>(i)])];
    std::vector<std::pair<int64_t, int64_t>> swaps;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = group_offsets[g], size = group_offsets[g + 1] - first, count = quota[static_cast<size_t>(g)];
      if (count > size) {
        for (int64_t i = 0; i < count; ++i) *next++ = num_few + first + static_cast<int64_t>(random.below(static_cast<uint64_t>(size)));
        continue;
      }
      swaps.clear();
      for (int64_t i = 0; i < count; ++i) {
        const int64_t here = first + i;
        const int64_t other = here + static_cast<int64_t>(random.below(static_cast<uint64_t>(size - i)));
        std::swap(permutation[here], permutation[other]);
        swaps.emplace_back(here, other);
        *next++ = num_few + permutation[here];
      }
      // Back to where it was, at a cost of what was drawn and not of all there is.
      for (size_t i = swaps.size(); i-- > 0;) std::swap(permutation[swaps[i].first], permutation[swaps[i].second]);
    }
  }
  shuffle_front(random, order, num_few + negatives, num_few + negatives);
}

}  // namespace alphaext
