// Which of the kernels' floating-point types a torch dtype is.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "floats.h"

namespace mmgen_kernels {

inline Float float_of(torch::headeronly::ScalarType dtype) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Double:
      return Float::fp64;
    case torch::headeronly::ScalarType::Float:
      return Float::fp32;
    case torch::headeronly::ScalarType::BFloat16:
      return Float::bf16;
    case torch::headeronly::ScalarType::Half:
      return Float::fp16;
    default:
      throw std::runtime_error("mmgen_kernels: expected a float64, float32, bfloat16 or float16 tensor");
  }
}

}  // namespace mmgen_kernels
