// The launchers of the training kernel. Nothing here allocates or synchronises.
#include "train.h"

#include "launching.h"
#include "train.cuh"

namespace alphaext::cuda {
namespace {

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

bool can_train(int32_t device) {
  const DeviceGuard guard(device);
  bool can_wait = false;
  return guard.error() == cudaSuccess && ask_whether_blocks_can_wait(device, &can_wait) == cudaSuccess && can_wait;
}

const char* plan_training(const TrainRunsParams& params, TrainPlan* plan, int32_t device) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("train_epoch", guard.error());
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
    return message_for("train_epoch", error);
  }
  const int threads = params.first.dtype == ScalarType::Float64 ? kTrainThreads<double> : kTrainThreads<float>;
  int64_t most_blocks = int64_t{1} << 31;
  const char* const message = limit_cooperative_blocks("train_epoch", &most_blocks);
  if (message != nullptr) return message;
  *plan = choose_train_plan(params, processors, shared_limit, most_blocks, [&](bool in_shared, int64_t shared_bytes) {
    int blocks = 0;
    const cudaError_t failed = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, train_kernel_of(params, in_shared),
                                                                             threads, static_cast<size_t>(shared_bytes));
    if (failed != cudaSuccess) error = failed;
    return failed == cudaSuccess ? int64_t{blocks} : int64_t{0};
  });
  if (error == cudaSuccess && plan->blocks == 0) error = cudaErrorCooperativeLaunchTooLarge;
  return message_for("train_epoch", error);
}

const char* train_epochs(const TrainRunsParams& params, const TrainPlan& plan, int32_t device, void* stream) {
  if (params.runs == 0 || params.first.num_few == 0) return nullptr;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return message_for("train_epoch", guard.error());
  cudaError_t error = cudaMemsetAsync(params.workspace, 0, static_cast<size_t>(train_meeting_bytes(plan)),
                                      static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return message_for("train_epoch", error);
  const int threads = params.first.dtype == ScalarType::Float64 ? kTrainThreads<double> : kTrainThreads<float>;
  return launch("train_epoch", train_kernel_of(params, plan.resident), {plan.blocks * plan.runs_at_once, threads, plan.shared_bytes},
                true, stream, params, plan);
}

}  // namespace alphaext::cuda
