// The operators of the family on torch's stable-ABI tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace mmgen_kernels::philox {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor integers_cpu(const Tensor& key, std::vector<int64_t> shape);
Tensor uniform_cpu(const Tensor& key, std::vector<int64_t> shape, ScalarType dtype);
Tensor normal_cpu(const Tensor& key, std::vector<int64_t> shape, ScalarType dtype);
Tensor fold_in_cpu(const Tensor& key, const Tensor& i);

}  // namespace mmgen_kernels::philox
