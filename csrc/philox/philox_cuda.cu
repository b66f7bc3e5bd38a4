// The operators of the family on NVIDIA GPUs in CUDA C++: memory and launches. The kernels are in philox_simt.h.
#include <torch/csrc/stable/ops.h>

#include "philox/philox_simt.h"
#include "philox/tensors.h"
#include "simt/cuda.h"

namespace mmgen_kernels::philox {
namespace {

auto launch_on(const simt::Device& device) {
  return [&]<class Problem, void (*kernel)(const Problem&, gpu::Nothing&)>(const Problem& p, int64_t blocks) {
    device.launch<Problem, gpu::Nothing, kernel>(p, blocks, 1, 1, gpu::threads);
  };
}

// Start(stream, launch) chooses the kernel.
template <class Start>
Tensor filled(const Tensor& key, const std::vector<int64_t>& shape, ScalarType dtype, const Start& start) {
  const auto [keys, size] = divide(key, shape);
  const simt::Device device(key);
  Tensor out = torch::stable::new_empty(key, shape, dtype);
  if (keys * size == 0) return out;
  const Tensor dense = torch::stable::contiguous(key);
  start(gpu::Stream{static_cast<const uint64_t*>(dense.const_data_ptr()), out.mutable_data_ptr(), keys, size}, launch_on(device));
  return out;
}

}  // namespace

Tensor integers_cuda(const Tensor& key, std::vector<int64_t> shape) {
  return filled(key, shape, ScalarType::Long, [](const auto& p, const auto& launch) { gpu::launch_integers(p, launch); });
}

Tensor uniform_cuda(const Tensor& key, std::vector<int64_t> shape, ScalarType dtype) {
  return filled(key, shape, dtype, [&](const auto& p, const auto& launch) { gpu::launch_stream(p, false, float_of(dtype), launch); });
}

Tensor normal_cuda(const Tensor& key, std::vector<int64_t> shape, ScalarType dtype) {
  return filled(key, shape, dtype, [&](const auto& p, const auto& launch) { gpu::launch_stream(p, true, float_of(dtype), launch); });
}

Tensor fold_in_cuda(const Tensor& key, const Tensor& i) {
  check_fold(key, i);
  const simt::Device device(key);
  Tensor out = torch::stable::new_empty(key, {key.sizes().begin(), key.sizes().end()}, ScalarType::Long);
  if (i.numel() == 0) return out;
  const Tensor dense_key = torch::stable::contiguous(key), dense_i = torch::stable::contiguous(i);
  gpu::launch_fold({static_cast<const uint64_t*>(dense_key.const_data_ptr()), static_cast<const uint64_t*>(dense_i.const_data_ptr()),
                    static_cast<uint64_t*>(out.mutable_data_ptr()), i.numel()},
                   launch_on(device));
  return out;
}

}  // namespace mmgen_kernels::philox
