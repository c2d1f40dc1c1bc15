// From the hidden units to the coefficients alpha, and back: the second layer and the rule, a block per few class.
#pragma once

#include "device.cuh"

namespace alphaext::cuda {

// The rule visits a class's K+1 outputs several times, one after the other, so they wait in shared memory; where a class has
// too many members for that, the kernel works in the result arrays themselves.
inline int64_t staging_bytes(int64_t members, ScalarType dtype) {
  const int64_t bytes = 2 * members * (dtype == ScalarType::Float64 ? 8 : 4);
  return bytes <= kMaxSharedBytes ? bytes : 0;
}

inline LaunchShape coefficient_forward_shape(const CoefficientParams& params, int threads = kThreads) {
  return shape_for(params.num_few, 1, threads, staging_bytes(params.members, params.dtype));
}

// A warp per output k, then the rule in one thread.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) coefficient_forward_kernel(const CoefficientParams params, const bool staged) {
  using Acc = accumulate_t<T>;
  ALPHAEXT_DYNAMIC_SHARED(Acc, stage);
  const Acc* __restrict__ const preactivation = static_cast<const Acc*>(params.preactivation);
  const int64_t members = params.members;
  const int64_t hidden = params.hidden;

  for (int64_t few = blockIdx.x; few < params.num_few; few += gridDim.x) {
    const int64_t weights = params.shared ? 0 : few;
    const T* __restrict__ const w2 = static_cast<const T*>(params.w2) + weights * members * hidden;
    const T* __restrict__ const b2 = static_cast<const T*>(params.b2) + weights * members;
    const Acc* __restrict__ const before = preactivation + few * hidden;
    Acc* const raw_out = static_cast<Acc*>(params.raw) + few * members;
    Acc* const alpha_out = static_cast<Acc*>(params.alpha) + few * members;
    Acc* const raw = staged ? stage : raw_out;
    Acc* const alpha = staged ? stage + members : alpha_out;

    for (int64_t k = threadIdx.x / kWarp; k < members; k += blockDim.x / kWarp) {
      Acc sum = 0;
      ALPHAEXT_UNROLL(4)
      for (int64_t h = lane_index(); h < hidden; h += kWarp) {
        const Acc value = before[h];
        sum += (value < Acc(0) ? Acc(0) : value) * Acc(widen(w2[k * hidden + h]));  // a NaN stays a NaN, as in torch.relu
      }
      sum = warp_sum(sum);
      if (lane_index() == 0) raw[k] = sum + Acc(widen(b2[k]));
    }
    __syncthreads();
    if (threadIdx.x == 0) rule_forward(params.rule, members, raw, alpha);
    if (!staged) continue;
    __syncthreads();
    for (int64_t k = threadIdx.x; k < members; k += blockDim.x) {
      raw_out[k] = raw[k];
      alpha_out[k] = alpha[k];
    }
    __syncthreads();  // the next class of this block uses the same stage
  }
}

inline LaunchShape coefficient_backward_shape(const CoefficientBackwardParams& params, int threads = kThreads) {
  return shape_for(params.num_few, 1, threads, staging_bytes(params.members, params.dtype));
}

// The rule's gradient in one thread, then a thread per hidden unit: neighbouring threads touch neighbouring elements of w2
// and grad_w2, and the sum over k stays in one register.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    coefficient_backward_kernel(const CoefficientBackwardParams params, const bool staged) {
  using Acc = accumulate_t<T>;
  ALPHAEXT_DYNAMIC_SHARED(Acc, stage);
  const int64_t members = params.members;
  const int64_t hidden = params.hidden;

  for (int64_t few = blockIdx.x; few < params.num_few; few += gridDim.x) {
    const T* __restrict__ const w2 = static_cast<const T*>(params.w2) + (params.shared ? 0 : few * members * hidden);
    const Acc* __restrict__ const before = static_cast<const Acc*>(params.preactivation) + few * hidden;
    const Acc* const raw_in = static_cast<const Acc*>(params.raw) + few * members;
    const Acc* const grad_alpha_in = static_cast<const Acc*>(params.grad_alpha) + few * members;
    Acc* const grad_raw_out = static_cast<Acc*>(params.grad_raw) + few * members;
    T* __restrict__ const grad_w2 =
        params.grad_w2 == nullptr ? nullptr : static_cast<T*>(params.grad_w2) + few * members * hidden;
    T* __restrict__ const grad_b2 = params.grad_b2 == nullptr ? nullptr : static_cast<T*>(params.grad_b2) + few * members;
    Acc* __restrict__ const grad_before = static_cast<Acc*>(params.grad_preactivation) + few * hidden;
    const Acc* const raw = staged ? stage : raw_in;
    const Acc* const grad_alpha = staged ? stage + members : grad_alpha_in;
    Acc* const grad_raw = staged ? stage + members : grad_raw_out;  // over grad_alpha, which the rule allows

    if (staged) {
      for (int64_t k = threadIdx.x; k < members; k += blockDim.x) {
        stage[k] = raw_in[k];
        stage[members + k] = grad_alpha_in[k];
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) rule_backward(params.rule, members, raw, grad_alpha, grad_raw);
    __syncthreads();
    for (int64_t k = threadIdx.x; k < members; k += blockDim.x) {
      const Acc gradient = grad_raw[k];
      if (staged) grad_raw_out[k] = gradient;
      if (grad_b2 != nullptr) grad_b2[k] = narrow<T>(gradient);
    }
    for (int64_t h = threadIdx.x; h < hidden; h += blockDim.x) {
      const Acc value = before[h];
      const Acc active = value < Acc(0) ? Acc(0) : value;
      Acc sum = 0;
      for (int64_t k = 0; k < members; ++k) {
        const Acc gradient = grad_raw[k];
        sum += gradient * Acc(widen(w2[k * hidden + h]));
        if (grad_w2 != nullptr) grad_w2[k * hidden + h] = narrow<T>(gradient * active);
      }
      grad_before[h] = value <= Acc(0) ? Acc(0) : sum;
    }
    if (staged) __syncthreads();  // the next class of this block uses the same stage
  }
}

}  // namespace alphaext::cuda
