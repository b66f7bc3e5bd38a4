// A row of fp64 values into a matrix of any float dtype, rounded once.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace mmgen_kernels::vq {

inline uint16_t round_to_bf16(double value) {
  const float f = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Row `row` of a contiguous (rows, dim) matrix.
inline void write_row(void* data, Float dtype, int64_t row, int64_t dim, const double* values) {
  switch (dtype) {
    case Float::fp64:
      std::copy_n(values, dim, static_cast<double*>(data) + row * dim);
      break;
    case Float::fp32:
      for (int64_t d = 0; d < dim; ++d) static_cast<float*>(data)[row * dim + d] = static_cast<float>(values[d]);
      break;
    case Float::bf16:
      for (int64_t d = 0; d < dim; ++d) static_cast<uint16_t*>(data)[row * dim + d] = round_to_bf16(values[d]);
      break;
    case Float::fp16:
      for (int64_t d = 0; d < dim; ++d)
        static_cast<torch::headeronly::Half*>(data)[row * dim + d] = torch::headeronly::Half(static_cast<float>(values[d]));
      break;
  }
}

}  // namespace mmgen_kernels::vq
