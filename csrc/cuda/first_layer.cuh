// The first layer of all sub-modules, one weight matrix per few class, and its backward. See params.h for the arrays.
#pragma once

#include "device.cuh"

namespace alphaext::cuda {

inline LaunchShape first_layer_forward_shape(const FirstLayerParams& params, int threads = kThreads) {
  return shape_for(params.num_few * params.hidden, threads / kWarp, threads);
}

// A warp per row of w1: w1 is by far the largest array, it is read once, and lanes read neighbouring elements.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) first_layer_forward_kernel(const FirstLayerParams params) {
  using Acc = accumulate_t<T>;
  const T* __restrict__ const z = static_cast<const T*>(params.z);
  const T* __restrict__ const w1 = static_cast<const T*>(params.w1);
  const T* __restrict__ const b1 = static_cast<const T*>(params.b1);
  Acc* __restrict__ const preactivation = static_cast<Acc*>(params.preactivation);
  const int64_t rows = params.num_few * params.hidden;
  const int64_t inputs = params.inputs;

  for (int64_t row = warp_begin(); row < rows; row += warp_step()) {
    const T* __restrict__ const w1_row = w1 + row * inputs;
    const T* __restrict__ const z_row = z + row / params.hidden * inputs;
    Acc sum = 0;
    ALPHAEXT_UNROLL(8)
    for (int64_t i = lane_index(); i < inputs; i += kWarp) sum += Acc(widen(w1_row[i])) * Acc(widen(z_row[i]));
    sum = warp_sum(sum);
    if (lane_index() == 0) preactivation[row] = sum + Acc(widen(b1[row]));
  }
}

// A block takes `threads` neighbouring inputs of one class.
inline LaunchShape first_layer_backward_shape(const FirstLayerBackwardParams& params, int threads = kThreads) {
  const int64_t chunks = params.inputs / threads + (params.inputs % threads != 0);
  return shape_for(params.num_few * chunks, 1, threads);
}

// A thread per input i of a class walks down the rows h of w1: both results come from one visit, neighbouring threads touch
// neighbouring elements, and the sum over h stays in one register.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) first_layer_backward_kernel(const FirstLayerBackwardParams params) {
  using Acc = accumulate_t<T>;
  const Acc* __restrict__ const grad_preactivation = static_cast<const Acc*>(params.grad_preactivation);
  const T* __restrict__ const z = static_cast<const T*>(params.z);
  const T* __restrict__ const w1 = static_cast<const T*>(params.w1);
  T* __restrict__ const grad_w1 = static_cast<T*>(params.grad_w1);
  T* __restrict__ const grad_z = static_cast<T*>(params.grad_z);
  const int64_t inputs = params.inputs;
  const int64_t hidden = params.hidden;
  const int64_t threads = blockDim.x;
  const int64_t chunks = inputs / threads + (inputs % threads != 0);

  for (int64_t item = blockIdx.x; item < params.num_few * chunks; item += gridDim.x) {
    const int64_t few = item / chunks;
    const int64_t i = (item - few * chunks) * threads + threadIdx.x;
    if (i >= inputs) continue;
    const Acc* __restrict__ const gradient = grad_preactivation + few * hidden;
    const int64_t first = few * hidden * inputs + i;
    if (grad_w1 != nullptr) {
      const Acc input = Acc(widen(z[few * inputs + i]));
      ALPHAEXT_UNROLL(4)
      for (int64_t h = 0; h < hidden; ++h) grad_w1[first + h * inputs] = narrow<T>(gradient[h] * input);
    }
    if (grad_z != nullptr) {
      Acc sum = 0;
      ALPHAEXT_UNROLL(8)
      for (int64_t h = 0; h < hidden; ++h) sum += gradient[h] * Acc(widen(w1[first + h * inputs]));
      grad_z[few * inputs + i] = narrow<T>(sum);
    }
  }
}

}  // namespace alphaext::cuda
