// How the kernels of the family see a tensor: sample by sample.
#pragma once

#include "quick_tensors.h"
#include "torch_tensors.h"

namespace mmgen_kernels::schedule {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor as `count` samples of `size` elements side by side; one whose samples are not dense is copied.
struct Samples {
  Tensor tensor;
  const char* data = nullptr;
  int64_t count = 1, size = 1, stride = 0, bytes = 0;  // stride in bytes, bytes of an element
  int dtype = 0;                                       // csrc/floats.h

  Samples() = default;
  explicit Samples(const Tensor& given) : tensor(dense(given)) {
    data = static_cast<const char*>(tensor.const_data_ptr());
    bytes = static_cast<int64_t>(tensor.element_size());
    dtype = static_cast<int>(float_of(tensor.scalar_type()));
    if (tensor.dim() > 0) count = tensor.size(0);
    size = count > 0 ? tensor.numel() / count : 0;
    stride = (tensor.dim() > 0 && count > 1 ? tensor.stride(0) : size) * bytes;
  }
  const char* at(int64_t sample, int64_t i) const { return data + sample * stride + i * bytes; }
  bool joined() const { return stride == size * bytes; }
  // As one long sample.
  void flatten() { size *= count, stride = size * bytes, count = 1; }

 private:
  static Tensor dense(const Tensor& t) {
    int64_t expected = 1;
    for (int64_t d = t.dim() - 1; d > 0; --d) {
      if (t.size(d) != 1 && t.stride(d) != expected) return torch::stable::contiguous(t);
      expected *= t.size(d);
    }
    return t;
  }
};

}  // namespace mmgen_kernels::schedule
