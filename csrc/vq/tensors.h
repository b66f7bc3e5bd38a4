// From torch's stable-ABI tensors to rows: shapes, strides and dtypes, and nothing else.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "torch_floats.h"
#include "vq/nearest_code.h"

namespace mmgen_kernels::vq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Metric metric_of(const std::string& name) {
  if (name == "l2") return Metric::l2;
  if (name == "cosine") return Metric::cosine;
  if (name == "dot") return Metric::dot;
  throw std::runtime_error("metric must be l2, cosine or dot, got '" + name + "'");
}

// A tensor (heads, ..., D) as `heads` matrices of rows. Strided layouts whose leading dimensions collapse into one stride are
// read in place; others are copied once.
struct HeadRows {
  Tensor tensor;  // keeps the data alive
  int64_t heads;
  int64_t head_stride;
  Rows first;

  HeadRows(const Tensor& t, bool has_heads) : tensor(t) {
    const int64_t rank = t.dim(), leading = has_heads ? 1 : 0;
    heads = has_heads ? t.size(0) : 1;
    const int64_t dim = t.size(rank - 1);
    int64_t count = 1, stride = dim;
    bool collapses = dim == 1 || t.stride(rank - 1) == 1, first_seen = false;
    for (int64_t i = rank - 2; i >= leading; --i) {
      const int64_t size = t.size(i);
      if (size == 1) continue;
      if (!first_seen) stride = t.stride(i);
      else if (t.stride(i) != stride * count) collapses = false;
      first_seen = true;
      count *= size;
    }
    if (!collapses) {
      tensor = torch::stable::contiguous(t);
      stride = dim;
    }
    head_stride = has_heads ? tensor.stride(0) : 0;
    first = {tensor.const_data_ptr(), float_of(tensor.scalar_type()), count, dim, stride};
  }

  Rows head(int64_t h) const {
    Rows rows = first;
    rows.data = static_cast<const char*>(first.data) + h * head_stride * static_cast<int64_t>(tensor.element_size());
    return rows;
  }
};

inline Tensor empty_like_with(const Tensor& t, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(t, sizes, dtype);
}

inline std::vector<int64_t> leading_sizes(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

// int64 indices of every row of x (heads, ..., D).
Tensor nearest_code_cpu(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask, const std::string& metric,
                        const std::string& precision);
Tensor nearest_code_cuda(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask, const std::string& metric,
                         const std::string& precision);

}  // namespace mmgen_kernels::vq
