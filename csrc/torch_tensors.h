// What the families ask of torch's tensors.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "torch_floats.h"

namespace mmgen_kernels {

// A tensor whose channels lie side by side; one that has others is copied once.
inline torch::stable::Tensor with_dense_channels(const torch::stable::Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) == 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

inline torch::stable::Tensor empty(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                   torch::headeronly::ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}
inline torch::stable::Tensor empty_as(const torch::stable::Tensor& like) {
  const auto sizes = like.sizes();
  return torch::stable::new_empty(like, {sizes.begin(), sizes.end()}, like.scalar_type());
}
inline torch::stable::Tensor zeros_as(const torch::stable::Tensor& like) {
  torch::stable::Tensor t = empty_as(like);
  torch::stable::zero_(t);
  return t;
}
inline bool is_double(const torch::stable::Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Double; }

}  // namespace mmgen_kernels
