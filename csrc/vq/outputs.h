// What the quantizing operators write: dtypes of results, rounding to them, and the gradient of the rotation trick.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vq/tensors.h"

namespace mmgen_kernels::vq {

inline ScalarType promote(ScalarType a, ScalarType b) {
  if (a == b) return a;
  if (a == ScalarType::Double || b == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}
inline ScalarType at_least_float(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

inline uint16_t to_bf16(double value) {
  const float f = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Row `row` of a contiguous (rows, dim) tensor of any float dtype.
inline void write_row(void* data, Float dtype, int64_t row, int64_t dim, const double* values) {
  switch (dtype) {
    case Float::fp64:
      std::copy_n(values, dim, static_cast<double*>(data) + row * dim);
      break;
    case Float::fp32:
      for (int64_t d = 0; d < dim; ++d) static_cast<float*>(data)[row * dim + d] = static_cast<float>(values[d]);
      break;
    case Float::bf16:
      for (int64_t d = 0; d < dim; ++d) static_cast<uint16_t*>(data)[row * dim + d] = to_bf16(values[d]);
      break;
    case Float::fp16:
      for (int64_t d = 0; d < dim; ++d)
        static_cast<torch::headeronly::Half*>(data)[row * dim + d] = torch::headeronly::Half(static_cast<float>(values[d]));
      break;
  }
}

// s R^T g of the rotation trick (mmgen_kernels/vq/reference/lookup.py: rotate_to), in place; unchanged where no rotation exists.
inline void rotate_back(const double* x, const double* c, double* g, int64_t dim) {
  double x_norm = 0, c_norm = 0;
  for (int64_t d = 0; d < dim; ++d) x_norm += x[d] * x[d], c_norm += c[d] * c[d];
  x_norm = std::sqrt(x_norm), c_norm = std::sqrt(c_norm);
  if (!(x_norm > 0 && c_norm > 0)) return;
  double r_squared = 0, r_dot_g = 0, q_dot_g = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double q = c[d] / c_norm, r = x[d] / x_norm + q;
    r_squared += r * r;
    r_dot_g += r * g[d];
    q_dot_g += q * g[d];
  }
  if (!(r_squared > 0)) return;
  const double s = c_norm / x_norm;
  for (int64_t d = 0; d < dim; ++d) {
    const double e = x[d] / x_norm, r = e + c[d] / c_norm;
    g[d] = s * (g[d] - 2 * r * (r_dot_g / r_squared) + 2 * e * q_dot_g);
  }
}

}  // namespace mmgen_kernels::vq
