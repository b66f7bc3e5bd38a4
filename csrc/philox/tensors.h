// The operators of the family on torch's stable-ABI tensors, and what they ask of them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "torch_floats.h"

namespace mmgen_kernels::philox {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_key(const Tensor& key) {
  if (key.scalar_type() != ScalarType::Long || key.dim() < 1 || key.size(key.dim() - 1) != 2)
    throw std::runtime_error("key must be int64 (..., 2)");
}

// How many keys there are, and how many elements of each.
inline std::pair<int64_t, int64_t> divide(const Tensor& key, const std::vector<int64_t>& shape) {
  check_key(key);
  const int64_t keys_rank = key.dim() - 1;
  int64_t keys = 1, size = 1;
  for (int64_t d = 0; d < int64_t(shape.size()); ++d) {
    if (shape[d] < 0 || (d < keys_rank && shape[d] != key.size(d))) throw std::runtime_error("shape must begin with the key's");
    (d < keys_rank ? keys : size) *= shape[d];
  }
  if (int64_t(shape.size()) < keys_rank) throw std::runtime_error("shape must begin with the key's");
  return {keys, size};
}

inline void check_fold(const Tensor& key, const Tensor& i) {
  check_key(key);
  if (i.scalar_type() != ScalarType::Long || i.numel() * 2 != key.numel())
    throw std::runtime_error("i must be int64, one per key");
}

Tensor integers_cpu(const Tensor& key, std::vector<int64_t> shape);
Tensor uniform_cpu(const Tensor& key, std::vector<int64_t> shape, ScalarType dtype);
Tensor normal_cpu(const Tensor& key, std::vector<int64_t> shape, ScalarType dtype);
Tensor fold_in_cpu(const Tensor& key, const Tensor& i);

Tensor integers_cuda(const Tensor& key, std::vector<int64_t> shape);
Tensor uniform_cuda(const Tensor& key, std::vector<int64_t> shape, ScalarType dtype);
Tensor normal_cuda(const Tensor& key, std::vector<int64_t> shape, ScalarType dtype);
Tensor fold_in_cuda(const Tensor& key, const Tensor& i);

}  // namespace mmgen_kernels::philox
