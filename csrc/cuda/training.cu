// The launchers of the training kernels. Nothing here allocates or synchronises.
#include <cstdio>

#include "training.cuh"

#ifndef ALPHAEXT_CUDA_ARCHS
#define ALPHAEXT_CUDA_ARCHS "(not recorded by this build)"
#endif

namespace alphaext::cuda {
namespace {

const char* training_message(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  static thread_local char text[512];
  snprintf(text, sizeof(text), "alphaext CUDA kernel %s: %s (%s); this build has code for %s", what, cudaGetErrorString(error),
           cudaGetErrorName(error), ALPHAEXT_CUDA_ARCHS);
  return text;
}

// Works on the tensors' device, whichever is current, and leaves the current one as it was.
class TrainingDeviceGuard {
 public:
  explicit TrainingDeviceGuard(int32_t device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~TrainingDeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  TrainingDeviceGuard(const TrainingDeviceGuard&) = delete;
  TrainingDeviceGuard& operator=(const TrainingDeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

using TrainKernel = void (*)(const TrainRunsParams, const TrainPlan);

template <typename T>
TrainKernel train_kernel_of(bool resident, bool shared) {
  if (shared) return resident ? train_kernel<T, true, true> : train_kernel<T, false, true>;
  return resident ? train_kernel<T, true, false> : train_kernel<T, false, false>;
}

TrainKernel train_kernel_of(const TrainRunsParams& params, bool resident) {
  return params.first.dtype == ScalarType::Float64 ? train_kernel_of<double>(resident, params.first.shared)
                                                   : train_kernel_of<float>(resident, params.first.shared);
}

}  // namespace

const char* plan_training(const TrainRunsParams& params, TrainPlan* plan, int32_t device) {
  const TrainingDeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return training_message("train_epoch", guard.error());
  int processors = 0, shared_limit = 0, cooperates = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&cooperates, cudaDevAttrCooperativeLaunch, device);
  if (error == cudaSuccess && cooperates == 0) error = cudaErrorNotSupported;
  // Static shared memory counts too.
  cudaFuncAttributes attributes{};
  const TrainKernel resident = train_kernel_of(params, true);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, resident);
  shared_limit -= static_cast<int>(attributes.sharedSizeBytes);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(resident, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit);
  }
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return training_message("train_epoch", error);
  }
  const int threads = params.first.dtype == ScalarType::Float64 ? kTrainThreads<double> : kTrainThreads<float>;
  *plan = choose_train_plan(params, processors, shared_limit, [&](bool in_shared, int64_t shared_bytes) {
    int blocks = 0;
    const cudaError_t failed = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, train_kernel_of(params, in_shared),
                                                                             threads, static_cast<size_t>(shared_bytes));
    if (failed != cudaSuccess) error = failed;
    return failed == cudaSuccess ? int64_t{blocks} : int64_t{0};
  });
  if (error == cudaSuccess && plan->blocks == 0) error = cudaErrorCooperativeLaunchTooLarge;
  return training_message("train_epoch", error);
}

const char* train_epochs(const TrainRunsParams& params, const TrainPlan& plan, int32_t device, void* stream) {
  if (params.runs == 0 || params.first.num_few == 0) return nullptr;
  const TrainingDeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return training_message("train_epoch", guard.error());
  cudaError_t error = cudaMemsetAsync(params.workspace, 0, static_cast<size_t>(train_meeting_bytes(plan)),
                                      static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return training_message("train_epoch", error);
  TrainRunsParams kernel_params = params;
  TrainPlan kernel_plan = plan;
  const int threads = params.first.dtype == ScalarType::Float64 ? kTrainThreads<double> : kTrainThreads<float>;
  void* arguments[] = {&kernel_params, &kernel_plan};
  const dim3 grid(static_cast<unsigned>(plan.blocks * plan.runs_at_once)), block(static_cast<unsigned>(threads));
  const void* const kernel = reinterpret_cast<const void*>(train_kernel_of(params, plan.resident));
  error = cudaLaunchCooperativeKernel(kernel, grid, block, arguments, static_cast<size_t>(plan.shared_bytes),
                                      static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) error = cudaGetLastError();
  static_cast<void>(cudaGetLastError());  // clears what the call itself returned
  return training_message("train_epoch", error);
}

const char* validate_runs(const ValidateRunsParams& params, int32_t device, void* stream) {
  const LaunchShape shape = validate_shape(params);
  if (shape.blocks == 0) return nullptr;
  const TrainingDeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return training_message("validate", guard.error());
  const auto blocks = static_cast<unsigned>(shape.blocks);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (params.first.dtype == ScalarType::Float64) {
    validate_kernel<double><<<blocks, kValidateThreads, 0, queue>>>(params);
    return training_message("validate", cudaGetLastError());
  }
  validate_kernel<float><<<blocks, kValidateThreads, 0, queue>>>(params);
  return training_message("validate", cudaGetLastError());
}

}  // namespace alphaext::cuda
