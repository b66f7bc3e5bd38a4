// The operators philox_integers, philox_uniform, philox_normal and fold_in on the CPU.
#include "philox/tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "philox.h"
#include "philox/kernels.h"

namespace mmgen_kernels::philox {
namespace {

Tensor filled(const Tensor& key, const std::vector<int64_t>& shape, ScalarType dtype, Fill fill) {
  const auto [keys, size] = divide(key, shape);
  Tensor out = torch::stable::new_empty(key, shape, dtype);
  if (keys * size == 0) return out;
  const Tensor dense = torch::stable::contiguous(key);
  const auto* pairs = static_cast<const uint64_t*>(dense.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(out.element_size());
  // Pieces of a sample, so that one long sample and many short ones both spread over the threads.
  constexpr int64_t piece = 4096, worth_a_thread = 32 * 1024;
  const int64_t pieces = (size + piece - 1) / piece;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::min(size, piece));
  torch::stable::parallel_for(0, keys * pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t k = i / pieces, begin = i % pieces * piece, end = std::min(size, begin + piece);
      fill(pairs[2 * k], pairs[2 * k + 1], begin, end, to + (k * size + begin) * bytes);
    }
  });
  return out;
}

}  // namespace

Tensor integers_cpu(const Tensor& key, std::vector<int64_t> shape) {
  return filled(key, shape, ScalarType::Long, kernels_of(selected()).integers);
}

Tensor uniform_cpu(const Tensor& key, std::vector<int64_t> shape, ScalarType dtype) {
  return filled(key, shape, dtype, kernels_of(selected()).uniform[static_cast<int>(float_of(dtype))]);
}

Tensor normal_cpu(const Tensor& key, std::vector<int64_t> shape, ScalarType dtype) {
  return filled(key, shape, dtype, kernels_of(selected()).normal[static_cast<int>(float_of(dtype))]);
}

Tensor fold_in_cpu(const Tensor& key, const Tensor& i) {
  check_fold(key, i);
  const Tensor dense_key = torch::stable::contiguous(key), dense_i = torch::stable::contiguous(i);
  Tensor out = torch::stable::new_empty(key, {key.sizes().begin(), key.sizes().end()}, ScalarType::Long);
  const auto* pairs = static_cast<const uint64_t*>(dense_key.const_data_ptr());
  const auto* data = static_cast<const uint64_t*>(dense_i.const_data_ptr());
  auto* to = static_cast<uint64_t*>(out.mutable_data_ptr());
  for (int64_t k = 0; k < dense_i.numel(); ++k) {
    to[2 * k] = pairs[2 * k], to[2 * k + 1] = pairs[2 * k + 1];
    fold_in(to[2 * k], to[2 * k + 1], data[k]);
  }
  return out;
}

}  // namespace mmgen_kernels::philox
