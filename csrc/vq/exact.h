// The value that defines the nearest code: fp64, d ascending, a rounding after every multiplication and every addition
// (the build's -ffp-contract=off keeps compilers from fusing them). Smaller is nearer.
#pragma once

#include <cmath>

#include "vq/nearest_code.h"

namespace mmgen_kernels::vq {

HOST_DEVICE inline double exact_value(Metric metric, const double* x, const Rows& codebook, int64_t k) {
  return with_row(codebook, k, [&](const auto* c) {
    const int64_t dim = codebook.dim;
    double sum = 0;
    if (metric == Metric::l2) {
      for (int64_t d = 0; d < dim; ++d) {
        const double difference = x[d] - widen(c[d]);
        sum += difference * difference;
      }
      return sum;
    }
    for (int64_t d = 0; d < dim; ++d) sum += x[d] * widen(c[d]);
    if (metric == Metric::dot) return -sum;
    double squared = 0;
    for (int64_t d = 0; d < dim; ++d) squared += widen(c[d]) * widen(c[d]);
    const double norm = std::sqrt(squared);
    return norm == 0 ? 0.0 : -(sum / norm);
  });
}

}  // namespace mmgen_kernels::vq
