// The checks of an operator's arguments: one line each, which also hands out the pointer, so that no argument is read
// unchecked.
#pragma once

#include <initializer_list>

#include "tensors.h"

namespace alphaext {

// A size: a number, or a letter, which the first argument that has it sets and all later ones are held to. The letters are
// those of kernels/*_params.h; a lower-case one may differ from argument to argument.
struct Dim {
  constexpr Dim(char letter_) : letter(letter_), size(-1) {}
  constexpr Dim(int64_t size_) : letter(0), size(size_) {}
  constexpr Dim(int size_) : letter(0), size(size_) {}
  char letter;
  int64_t size;
};
using Shape = std::initializer_list<Dim>;

class Arguments {
 public:
  enum class Layout { Any, Dense };

  // Of an operator whose floating arguments share the dtype of `first`, and all of whose arguments share its device.
  Arguments(const Tensor& first, const char* first_name, Layout layout)
      : type(first.scalar_type()), device_(first.device()), first_name_(first_name), layout_(layout) {
    for (int64_t& size : sizes_) size = -1;
    STD_TORCH_CHECK(first.is_cpu() || (kHasGpu && on_gpu(first)), "alphaext: ", first_name, " is on a GPU, but this build of ",
                    "alphaext has CPU kernels only; to get the others, install a CUDA toolkit and build alphaext again, with "
                    "ALPHAEXT_CUDA=1");
  }

  // Set by an argument, or by set(); -1 before.
  int64_t operator[](char letter) const { return sizes_[letter - 'A']; }
  void set(char letter, int64_t size) { sizes_[letter - 'A'] = size; }

  // Arguments that all have one more dimension, before the others, from here on.
  void stack(char letter) { lead_ = letter; }
  void unstack() { lead_ = 0; }

  void check(const char* name, const Tensor& tensor, TorchType dtype, Shape shape) {
    STD_TORCH_CHECK(tensor.device() == device_, "alphaext: ", name, " must be on the device of ", first_name_);
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, "alphaext: ", name, " must ",
                    dtype == type ? std::string("have the dtype of ") + first_name_ + ", " : "be ", name_of(dtype), ", got ",
                    name_of(tensor.scalar_type()));
    STD_TORCH_CHECK(layout_ == Layout::Any || tensor.is_contiguous(), "alphaext: ", name, " must be contiguous");
    const int64_t lead = lead_ != 0 ? 1 : 0;
    bool fits = tensor.dim() == static_cast<int64_t>(shape.size()) + lead;
    if (fits && lead_ != 0) fits = bind(lead_, tensor.size(0));
    int64_t i = lead;
    for (const Dim& dim : shape) {
      if (!fits) break;
      fits = dim.letter != 0 ? bind(dim.letter, tensor.size(i)) : tensor.size(i) == dim.size;
      ++i;
    }
    if (!fits) STD_TORCH_CHECK(false, "alphaext: ", name, " must have shape ", wanted(shape), ", got ", shape_of(tensor));
  }
  void check(const char* name, const std::optional<Tensor>& tensor, TorchType dtype, Shape shape) {
    if (tensor) check(name, *tensor, dtype, shape);
  }

  // Checks, and where the kernel finds the argument.
  template <typename T = void>
  const T* read(const char* name, const Tensor& tensor, TorchType dtype, Shape shape) {
    check(name, tensor, dtype, shape);
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  const void* read(const char* name, const std::optional<Tensor>& tensor, TorchType dtype, Shape shape) {
    return tensor ? read(name, *tensor, dtype, shape) : nullptr;
  }
  template <typename T = void>
  T* write(const char* name, const Tensor& tensor, TorchType dtype, Shape shape) {
    check(name, tensor, dtype, shape);
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  // The same for ids: int32 or int64, each in [low, high). Reading a GPU's would make the CPU wait for it: there the kernels
  // look at every id themselves.
  template <typename Index>
  const Index* read_ids(const char* name, const Tensor& tensor, Shape shape, int64_t low, int64_t high) {
    const Index* const ids = read<Index>(name, tensor, sizeof(Index) == 8 ? TorchType::Long : TorchType::Int, shape);
    for (int64_t i = 0; !on_gpu(tensor) && i < tensor.numel(); ++i) {
      STD_TORCH_CHECK(ids[i] >= low && ids[i] < high, "alphaext: ", name, " must be in [", low, ", ", high, "), got ", ids[i],
                      " at position ", i);
    }
    return ids;
  }

  // `shape`: of the argument, in words.
  void at_least(const char* name, const char* shape, char letter, int64_t minimum) const {
    STD_TORCH_CHECK((*this)[letter] >= minimum, "alphaext: ", name, " must have shape ", shape, " with ", name_of_size(letter),
                    " of at least ", minimum, ", got ", (*this)[letter]);
  }

  const TorchType type;

 private:
#if ALPHAEXT_WITH_CUDA
  static constexpr bool kHasGpu = true;
#else
  static constexpr bool kHasGpu = false;
#endif

  static const char* name_of_size(char letter) {
    switch (letter) {
      case 'B': return "batch";
      case 'D': return "in_features or num_classes";
      case 'F': return "num_few";
      case 'M': return "top_k + 1";
      case 'N': return "num_classes";
      case 'H': return "hidden";
      case 'I': return "inputs";
      default: return "n";
    }
  }

  bool bind(char letter, int64_t size) {
    if (letter >= 'a') return true;
    int64_t& bound = sizes_[letter - 'A'];
    if (bound < 0) bound = size;
    return bound == size;
  }

  std::string wanted(Shape shape) const {
    std::string text;
    const auto add = [&](const Dim& dim) {
      const int64_t size = dim.letter == 0 ? dim.size : dim.letter >= 'a' ? -1 : (*this)[dim.letter];
      text += (text.empty() ? "[" : ", ") + (size < 0 ? std::string(name_of_size(dim.letter)) : std::to_string(size));
    };
    if (lead_ != 0) add(Dim(lead_));
    for (const Dim& dim : shape) add(dim);
    return text + "]";
  }

  const decltype(std::declval<const Tensor&>().device()) device_;
  const char* const first_name_;
  const Layout layout_;
  char lead_ = 0;
  int64_t sizes_[26];
};

inline void check_rule(double gamma, int64_t rule) {
  STD_TORCH_CHECK(gamma > 0 && gamma <= 1, "alphaext: gamma must be in (0, 1], got ", gamma);
  STD_TORCH_CHECK(rule >= 0 && rule <= 2, "alphaext: rule must be 0 (softmax), 1 (clamp) or 2 (l1), got ", rule);
}

}  // namespace alphaext
