// Builds one table of kernels for the instruction set that is active where this is included. The including file defines
// ALPHAEXT_SIMD_NAMESPACE and ALPHAEXT_SIMD_NAME, includes every header first, then switches the instruction set on: so no
// inline function of a header is compiled for a processor that may not be there.

namespace alphaext::cpu::ALPHAEXT_SIMD_NAMESPACE {

// max(value, 0) that keeps NaN, as torch.relu does.
template <typename Acc>
static inline Acc relu(Acc value) {
  return value <= Acc(0) ? Acc(0) : value;
}

// destination[i] = source[i] * factor.
template <typename T>
static inline void stream_scaled(T* destination, const T* source, accumulate_t<T> factor, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) destination[i] = narrow<T>(widen(source[i]) * factor);
}

#include "vectors.inc.h"

#include "first_layer.inc.h"
#include "coefficients.inc.h"
#include "mix.inc.h"
#include "cached_logits.inc.h"
#include "initial_weights.inc.h"
#include "train.inc.h"
#include "validate.inc.h"

#define ALPHAEXT_BY_DTYPE(kernel, Params)                                \
  [](const Params& params, int64_t begin, int64_t end) {                 \
    switch (params.dtype) {                                              \
      case ScalarType::Float32: return kernel<float>(params, begin, end);     \
      case ScalarType::Float64: return kernel<double>(params, begin, end);    \
      case ScalarType::Float16: return kernel<float16>(params, begin, end);   \
      case ScalarType::BFloat16: return kernel<bfloat16>(params, begin, end); \
    }                                                                    \
  }

extern const Kernels kTable;
const Kernels kTable = {
    ALPHAEXT_SIMD_NAME,
    ALPHAEXT_BY_DTYPE(first_layer_forward, FirstLayerParams),
    ALPHAEXT_BY_DTYPE(first_layer_backward_w1, FirstLayerBackwardParams),
    ALPHAEXT_BY_DTYPE(first_layer_backward_z, FirstLayerBackwardParams),
    ALPHAEXT_BY_DTYPE(coefficient_forward, CoefficientParams),
    ALPHAEXT_BY_DTYPE(coefficient_backward, CoefficientBackwardParams),
    ALPHAEXT_BY_DTYPE(mix_forward, MixParams),
    ALPHAEXT_BY_DTYPE(mix_backward_alpha, MixBackwardParams),
    ALPHAEXT_BY_DTYPE(mix_backward_logits, MixBackwardParams),
    [](const CacheParams& params, int64_t begin, int64_t end) {
      return params.dtype == ScalarType::Float64 ? cache_logits<double>(params, begin, end)
                                                 : cache_logits<float>(params, begin, end);
    },
    [](const ValidateParams& params, int64_t begin, int64_t end) {
      return params.dtype == ScalarType::Float64 ? validate<double>(params, begin, end) : validate<float>(params, begin, end);
    },
    [](const InitialWeightsParams& params, int64_t begin, int64_t end, void* workspace) {
      return params.dtype == ScalarType::Float64 ? initial_weights<double>(params, begin, end, workspace)
                                                 : initial_weights<float>(params, begin, end, workspace);
    },
    [](const TrainParams& params) {
      return params.dtype == ScalarType::Float64 ? train_epoch<double>(params) : train_epoch<float>(params);
    },
};

#undef ALPHAEXT_BY_DTYPE
#undef ALPHAEXT_INLINE

}  // namespace alphaext::cpu::ALPHAEXT_SIMD_NAMESPACE
