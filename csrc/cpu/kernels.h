// The CPU kernels. Each call handles the items [begin, end) of one loop, so that the caller brings the threads: torch's in
// the extension, std::thread in the C++ tests. Results do not depend on how a loop is cut.
#pragma once

#include "kernels/head_params.h"
#include "kernels/training_params.h"

namespace alphaext::cpu {

struct Kernels {
  const char* name;  // the instruction set this table was compiled for
  void (*first_layer_forward)(const FirstLayerParams&, int64_t begin, int64_t end);              // items: F * H rows
  void (*first_layer_backward_w1)(const FirstLayerBackwardParams&, int64_t begin, int64_t end);  // items: F * H rows
  void (*first_layer_backward_z)(const FirstLayerBackwardParams&, int64_t begin, int64_t end);   // items: F classes
  void (*coefficient_forward)(const CoefficientParams&, int64_t begin, int64_t end);             // items: F classes
  void (*coefficient_backward)(const CoefficientBackwardParams&, int64_t begin, int64_t end);    // items: F classes
  void (*mix_forward)(const MixParams&, int64_t begin, int64_t end);                             // items: batch rows
  void (*mix_backward_alpha)(const MixBackwardParams&, int64_t begin, int64_t end);              // items: F classes
  void (*mix_backward_logits)(const MixBackwardParams&, int64_t begin, int64_t end);             // items: batch rows
  void (*cache_logits)(const CacheParams&, int64_t begin, int64_t end);                          // items: samples
  void (*validate)(const ValidateParams&, int64_t begin, int64_t end);  // items: blocks; `hits` and workspace are one caller's
  void (*initial_weights)(const InitialWeightsParams&, int64_t begin, int64_t end, void* workspace);  // items: networks * H rows
  TrainResult (*train_epoch)(const TrainParams&);
};

// The best table for this processor; ALPHAEXT_SIMD=default|avx2|avx512 lowers it (a level the processor lacks is ignored).
const Kernels& kernels();

// Every table this processor can run, best last.
int available_kernels(const Kernels** tables);  // room for 3

}  // namespace alphaext::cpu
