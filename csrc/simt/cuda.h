// Launches of kernels written with simt/simt.h, on torch's current stream of a tensor's device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

namespace mmgen_kernels::simt {

template <class Problem, class Shared, void (*kernel)(const Problem&, Shared&)>
__global__ void run(const __grid_constant__ Problem problem) {
  __shared__ Shared shared;
  kernel(problem, shared);
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("mmgen_kernels: CUDA: ") + cudaGetErrorString(error));
}

// The device is current as long as this lives.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }

  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

  template <class Problem, class Shared, void (*kernel)(const Problem&, Shared&)>
  void launch(const Problem& problem, int64_t x, int64_t y, int64_t z, int threads) const {
    const dim3 blocks(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    run<Problem, Shared, kernel><<<blocks, threads, 0, static_cast<cudaStream_t>(stream_)>>>(problem);
    check(cudaGetLastError());
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace mmgen_kernels::simt
